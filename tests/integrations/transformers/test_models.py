"""LongCat-Flash models in transformers with our layers: layouts on disk, dtypes, what others read, sharding."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    LongcatFlashForCausalLM,
    LongcatFlashModel,
)
from transformers.distributed import DistributedConfig
from transformers.models.longcat_flash import modeling_longcat_flash as modeling

import zemoe
import zemoe.integrations.transformers as bridge
from helpers import transformers_shared
from helpers.paths import ROOT
from helpers.transformers_shared import TOLERANCE, StockMoE, assert_ours, greedy, logits_of
from helpers.transformers_tiny import tiny_config, tiny_model
from zemoe.checkpoints.files import CheckpointError
from zemoe.checkpoints.longcat import verify
from zemoe.integrations.transformers.layers import expert_rank

# Fixtures
transformers_is_left_as_it_was = transformers_shared.transformers_is_left_as_it_was
ids = transformers_shared.ids
stock = transformers_shared.stock
stock_logits = transformers_shared.stock_logits
folders = transformers_shared.folders


# --- layouts on disk


@pytest.mark.parametrize("layout", ["original", "transformers", "packed"])
def test_every_layout_loads(folders, stock, stock_logits, ids, layout):
    assert verify(folders[layout]).layout == layout
    with bridge.applied():
        applied = AutoModelForCausalLM.from_pretrained(folders[layout])
    for model in (applied, bridge.load_model(folders[layout])):
        assert_ours(model)
        assert not model.training
        assert (logits_of(model, ids) - stock_logits).abs().max() < TOLERANCE
    assert torch.equal(greedy(model, ids), greedy(stock, ids))


def test_what_stock_loads_is_untouched_while_applied(folders, stock_logits, ids):
    """Conversions are registered for the model type, so a model with stock layers meets them too."""
    with bridge.applied():
        modeling.LongcatFlashMoE = StockMoE
        model = LongcatFlashForCausalLM.from_pretrained(folders["transformers"])
        modeling.LongcatFlashMoE = bridge.ZeroExpertLongcatMoE
    assert tuple(model.model.layers[0].mlp.experts.gate_up_proj.shape) == (8, 48, 32)
    assert torch.equal(logits_of(model, ids), stock_logits)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_the_original_layout_is_saved(folders, stock, ids, tmp_path, layout):
    bridge.load_model(folders[layout]).save_pretrained(tmp_path)
    assert verify(tmp_path).layout == "original"
    original, saved = (load_file(folder / "model.safetensors") for folder in (folders["original"], tmp_path))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("source", ["ours", "stock"])
@pytest.mark.parametrize("tied", [False, True])
def test_export_is_for_plain_transformers(ids, tmp_path, source, tied):
    model = tiny_model(tie_word_embeddings=tied)
    expected = logits_of(model, ids)
    if source == "ours":
        bridge.patch_(model)
    files = bridge.export(model, tmp_path, max_shard_bytes=60_000)
    assert len(files) > 1
    assert verify(tmp_path).layout == "transformers"
    assert torch.equal(logits_of(LongcatFlashForCausalLM.from_pretrained(tmp_path), ids), expected)
    with pytest.raises(ValueError, match="must not hold weights yet"):
        bridge.export(model, tmp_path)


def test_export_needs_the_whole_model(stock, tmp_path):
    with pytest.raises(ValueError, match="must be LongcatFlashForCausalLM, got LongcatFlashModel"):
        bridge.export(LongcatFlashModel(tiny_config()), tmp_path)


def test_export_needs_weights_in_memory(stock, tmp_path):
    model = copy.deepcopy(stock)
    model.model.layers[1].to("meta")  # as offloading leaves it
    with pytest.raises(ValueError, match=r"weights must be in memory, model\.layers\.1\..* is offloaded"):
        bridge.export(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_a_missing_expert_never_shifts_the_others(folders, tmp_path, layout):
    """Stacking counts tensors, it doesn't look at their numbers: expert 3 would silently become expert 2."""
    tensors = load_file(folders[layout] / "model.safetensors")
    for which in ("gate", "up"):
        del tensors[f"model.layers.1.mlp.experts.2.{which}_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders[layout] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"experts\.2\.gate_proj\.weight"):
        bridge.load_model(tmp_path)
    with bridge.applied(), pytest.raises(RuntimeError):
        LongcatFlashForCausalLM.from_pretrained(tmp_path)


# --- load_model: nothing of the checkpoint is executed


def copy_of(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_code_in_the_folder_is_never_run(folders, stock_logits, ids, tmp_path):
    folder = copy_of(folders["original"], tmp_path)
    trap = f"import pathlib; pathlib.Path({str(tmp_path / 'executed')!r}).touch()\n"
    (folder / "modeling_evil.py").write_text(trap)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(trap)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert (logits_of(bridge.load_model(folder), ids) - stock_logits).abs().max() < TOLERANCE
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("change", [{"rms_norm_eps": "small"}, {"hidden_act": 7}, {"vocab_size": "8192"}])
def test_load_model_names_the_config_for_a_value_of_the_wrong_type(folders, tmp_path, change):
    folder = copy_of(folders["original"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"config\.json: .*" + next(iter(change))):
        bridge.load_model(folder)


def test_threads_that_load_at_once(folders, stock_logits, ids, monkeypatch):
    """One of them leaving `applied` would give the others stock's layers."""
    inside, most, applied = [], [], bridge.applied

    @contextmanager
    def slow():
        with applied():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            yield
            inside.pop()

    monkeypatch.setattr("zemoe.integrations.transformers.loading.applied", slow)
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(bridge.load_model, folders.values()))
    assert most == [1, 1, 1] and not bridge.is_applied()
    for model in models:
        assert (logits_of(model, ids) - stock_logits).abs().max() < TOLERANCE


def test_load_model_refuses_adapters_pickles_and_unknown_backends(folders, tmp_path):
    folder = copy_of(folders["original"], tmp_path)
    with pytest.raises(ValueError, match="backend must be one of"):
        bridge.load_model(folder, backend="tpu")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: adapters are not supported"):
        bridge.load_model(folder)
    (folder / "adapter_config.json").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        bridge.load_model(folder)


# --- dtypes


def test_the_router_stays_float32(folders, stock, ids):
    stock_router = stock.model.layers[1].mlp.router
    with bridge.applied():
        applied = LongcatFlashForCausalLM.from_pretrained(folders["transformers"], dtype=torch.bfloat16)
        fresh = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    assert_ours(fresh, torch.bfloat16)
    patched = copy.deepcopy(stock)
    bridge.patch_(patched)
    for model in (applied, bridge.load_model(folders["original"], dtype=torch.bfloat16), patched):
        for cast in (model, model.to(torch.bfloat16), model.to("cpu", torch.bfloat16), model.bfloat16()):
            assert_ours(cast, cast.lm_head.weight.dtype)
            router = cast.model.layers[1].mlp.router
            assert torch.equal(router.classifier.weight, stock_router.classifier.weight)  # never rounded on the way
            assert torch.equal(router.e_score_correction_bias, stock_router.e_score_correction_bias)
    assert patched.half().model.layers[0].mlp.router.classifier.weight.dtype == torch.float32
    assert patched.lm_head.weight.dtype == torch.float16


def test_a_bfloat16_stock_model_gets_a_float32_router(ids):
    model = tiny_model(torch.bfloat16)
    assert model.model.layers[0].mlp.router.classifier.weight.dtype == torch.bfloat16
    rounded = model.model.layers[0].mlp.router.classifier.weight.float()
    assert bridge.patch_(model).router_dtype == torch.float32
    assert torch.equal(model.model.layers[0].mlp.router.classifier.weight, rounded)
    assert_ours(model, torch.bfloat16)


def test_bfloat16_is_no_less_exact_than_stock(stock, stock_logits, ids):
    """Judged where nothing else differs: one MoE layer, the same bfloat16 input and the same choices."""
    theirs = copy.deepcopy(stock).to(torch.bfloat16).model.layers[0].mlp
    x_TH = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    exact_layer = copy.deepcopy(theirs).double()
    choice = theirs.router(x_TH)[-2:]
    exact = exact_layer.experts(x_TH.double(), choice[1], choice[0].double())
    stock_error = (theirs.experts(x_TH, choice[1], choice[0]) - exact).square().mean().sqrt()
    ours = copy.deepcopy(theirs)
    bridge.patch_(ours)
    error = (ours.experts(x_TH, choice[1], choice[0]) - exact).square().mean().sqrt()
    assert error <= 1.05 * stock_error


# --- what others read: recorded logits, observe, gradients, compilation


@pytest.mark.parametrize("recording_before", [False, True])
def test_output_router_logits(stock, ids, recording_before):
    """5.17 has no recorder for them; from the version that has, ours are recorded too, also by hooks set before."""
    model = copy.deepcopy(stock)
    if recording_before:
        model(ids, output_router_logits=True)
    bridge.patch_(model)
    with torch.no_grad():
        expected = stock(ids, output_router_logits=True).get("router_logits")
        recorded = model(ids, output_router_logits=True).get("router_logits")
        hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    if expected is None:
        assert recorded is None
    else:
        assert len(recorded) == len(expected) == 2
        assert all((a - b).abs().max() < TOLERANCE for a, b in zip(recorded, expected, strict=True))


def test_observe_sees_what_the_router_decided(stock, ids):
    model = copy.deepcopy(stock)
    bridge.patch_(model)
    with torch.no_grad(), zemoe.observe(model) as seen:
        model(ids)
        model(ids[:1])
    assert seen.layers() == ["model.layers.0.mlp.router", "model.layers.1.mlp.router"]
    assert len(seen) == 4
    routing = seen["model.layers.0.mlp.router", 0]
    assert routing.logits_TA.shape == (22, 8)
    inputs = []
    hook = stock.model.layers[0].mlp.router.register_forward_hook(lambda module, args, output: inputs.append(output))
    stock(ids)
    hook.remove()
    weights, chosen = inputs[0][-2:]
    order = routing.topk_ids_TK.argsort(-1)
    assert torch.equal(routing.topk_ids_TK.gather(1, order), chosen.sort(-1).values)
    difference = routing.topk_weights_TK.gather(1, order) - weights.gather(1, chosen.argsort(-1))
    assert difference.abs().max() < 1e-6
    assert (routing.topk_ids_TK >= 5).any()
    assert (routing.topk_ids_TK < 5).any()


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_stock_with_and_without_checkpointing(stock, ids):
    expected = gradients(copy.deepcopy(stock).train(), ids)
    model = copy.deepcopy(stock).train()
    bridge.patch_(model)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with zemoe.observe(model) as seen:
            computed = gradients(model, ids)
        assert len(seen) == 2  # a recomputation overwrites
        for name, gradient in computed.items():
            wanted = expected[name][:5] if name.endswith("gate_up_proj") else expected[name]
            scale = wanted.abs().max()
            assert scale > 0, name
            assert (gradient - wanted).abs().max() < 1e-4 * scale, name


def test_patching_keeps_gradients_and_optimizers(stock, ids):
    """The Parameters are the same objects, so an optimizer made before trains what runs."""
    model = copy.deepcopy(stock).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = gradients(model, ids)
    bridge.patch_(model)
    gate_up = model.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(gate_up.grad, before["model.layers.0.mlp.experts.gate_up_proj"][:5])
    old = gate_up.detach().clone()
    optimizer.step()
    assert (gate_up.detach() - (old - 0.1 * gate_up.grad)).abs().max() < 1e-7
    bridge.unpatch_(model)
    assert gate_up.grad.shape == gate_up.shape == (8, 48, 32)


def test_autocast_leaves_routing_in_float32(stock, ids):
    model = copy.deepcopy(stock)
    bridge.patch_(model)
    x = torch.randn(3, 7, 32)
    moe = model.model.layers[0].mlp
    plain = moe.router(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), zemoe.observe(moe) as seen:
        assert moe(x).shape == x.shape
    (routing,) = seen.values()
    assert torch.equal(routing.logits_TA, plain.logits_TA)


@pytest.mark.slow
def test_generation_with_a_static_cache_compiles_without_graph_breaks(stock, ids):
    model = copy.deepcopy(stock)
    bridge.patch_(model)
    options = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    options._compile_all_devices = True  # transformers compiles for accelerators only, unless told
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = greedy(model, ids, cache_implementation="static", compile_config=options)
    assert torch.equal(compiled, greedy(stock, ids))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


# --- sharded weights


def run_two_ranks(folder: Path, result: Path, plan: str) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = ROOT / "tests" / "helpers" / "transformers_sharded.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [port, str(folder), str(result), plan]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), rank, *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(error[-2000:] for error in errors)
    return torch.load(result)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_tensor_parallel_plan(folders, stock, stock_logits, ids, tmp_path, layout):
    """Two ranks, weights sharded, the identity term once: twice or not at all would be far outside the tolerance."""
    found = run_two_ranks(folders[layout], tmp_path / "result.pt", "tp_size")
    assert found["class"] == "ZeroExpertLongcatExperts"
    assert found["local_gate_up"] == (5, 24, 32)  # half the width of every expert, gate and up
    assert (found["logits"] - stock_logits).abs().max() < TOLERANCE
    assert_gradients_of_shared_weights(found, copy.deepcopy(stock), ids)


def assert_gradients_of_shared_weights(found: dict, model, ids: torch.Tensor) -> None:
    model(ids).logits.square().mean().backward()
    layer = model.model.layers[0]
    expected = {"router": layer.mlp.router.classifier.weight, "norm": layer.post_attention_layernorm[0].weight}
    for name, parameter in expected.items():
        scale = parameter.grad.abs().max()
        assert (found[name] - parameter.grad).abs().max() < 1e-4 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_whole_experts_may_be_sharded(folders, stock_logits, tmp_path, layout):
    """FSDP divides the rows: 3 and 2 of 5, so that each rank meets another number of them, and of dead ones."""
    found = run_two_ranks(folders[layout], tmp_path / "result.pt", "fsdp_size")
    assert found["local_gate_up"] == (3, 48, 32)
    assert (found["logits"] - stock_logits).abs().max() < TOLERANCE


def test_the_rank_among_the_experts():
    """Of a mesh of one dimension whatever its name, as 5.23 has it; of 5.19's two the experts' own."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        assert expert_rank(init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))) == 3
        for shape, rank in (((2, 2), 1), ((1, 4), 3), ((4, 1), 0)):
            assert expert_rank(init_device_mesh("cpu", shape, mesh_dim_names=("efsdp", "ep"))) == rank
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif("ep_size" not in signature(DistributedConfig).parameters, reason="transformers 5.17 has no ep_size")
def test_expert_parallel_plan(ids, tmp_path):
    """Two ranks with three whole experts each: tokens travel with gradients, partial sums without; both are stock's."""
    model = tiny_model(n_routed_experts=6)
    with torch.no_grad():
        expected = model(ids).logits
    patched = copy.deepcopy(model)
    bridge.patch_(patched)
    patched.save_pretrained(tmp_path / "checkpoint")
    found = run_two_ranks(tmp_path / "checkpoint", tmp_path / "result.pt", "experts")
    assert found["class"].endswith("ZeroExpertLongcatExperts")  # 5.19 puts FSDP in front
    assert found["local_gate_up"] == (3, 48, 32)
    for logits in (found["logits"], found["logits without gradients"]):
        assert (logits - expected).abs().max() < TOLERANCE
    assert_gradients_of_shared_weights(found, model, ids)
