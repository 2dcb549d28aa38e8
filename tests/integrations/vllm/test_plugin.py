"""The vLLM plug-in without an engine: who decides, what is loaded, what the layer computes; and vLLM's own defects.

`make test-vllm` runs this in the engine's environment.
"""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import vllm
from vllm import ModelRegistry
from vllm.model_executor.models import longcat_flash
from vllm.platforms import current_platform

from tools.vllm_minors import missing
from zemoe.integrations.engines.from_logits import moe_from_logits
from zemoe.integrations.vllm import layers as our_layers
from zemoe.integrations.vllm import models, plugin
from zemoe.integrations.vllm.layers import ZeroExpertLongcatMoE
from zemoe.routing import router_logits

T, H, WIDTH, E, Z, K = 9, 200, 24, 6, 5, 4
SCALING = 2.5
FP8 = SimpleNamespace(get_name=lambda: "fp8")


# --- who decides ---


def configuration(**changes) -> SimpleNamespace:
    """As much of a VllmConfig as is looked at, of a model that gets our layers."""
    hf = {"zero_expert_type": "identity", "n_routed_experts": E, "moe_intermediate_size": WIDTH, "router_bias": False}
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": False, "data_parallel_size": 1}
    parallel |= {"prefill_context_parallel_size": 1, "enable_eplb": False, "all2all_backend": "allgather_reducescatter"}
    model = {"dtype": torch.float32, "enable_return_routed_experts": False}
    top = {"quant_config": None, "lora_config": None, "additional_config": {"mine": 1}}
    for name, value in changes.items():
        owner = next(part for part in (hf, parallel, model, top) if name in part)
        owner[name] = value
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(**hf), **model),
        parallel_config=SimpleNamespace(**parallel),
        compilation_config=SimpleNamespace(custom_ops=["all"]),
        **top,
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_config": object()}, "LoRA"),
        ({"enable_expert_parallel": True, "enable_eplb": True}, "load balancing"),
        ({"enable_expert_parallel": True}, "can't be spread over ranks"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"enable_return_routed_experts": True}, "enable_return_routed_experts"),
        ({"zero_expert_type": None}, "zero_expert_type is None"),
        ({"router_bias": True}, "bias"),
        ({"tensor_parallel_size": 5}, f"{WIDTH} columns of an expert don't divide among 5 ranks"),
    ],
)
def test_what_vllm_keeps_for_itself(changes, reason):
    assert models.why_not(configuration()) is None
    assert reason in models.why_not(configuration(**changes))
    assert reason in models.why_not(configuration(**changes, quant_config=FP8))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quant_config": FP8}, "the model is quantised (fp8)"),
        ({"quant_config": FP8, "tensor_parallel_size": 1, "enable_expert_parallel": True}, "quantised (fp8)"),
        ({"tensor_parallel_size": 1, "enable_expert_parallel": True}, "expert parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"data_parallel_size": 2, "all2all_backend": "deepep_low_latency"}, "data parallelism"),
        ({"dtype": torch.int8}, "dtype"),
    ],
)
def test_when_the_experts_are_vllms(changes, reason):
    assert models.why_their_experts(configuration()) is None
    assert models.why_not(configuration(**changes)) is None
    assert reason in models.why_their_experts(configuration(**changes))


def test_batch_invariance_is_not_ours(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "VLLM_BATCH_INVARIANT" in models.why_not(configuration())


@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [("rocm", torch.bfloat16, models.why_not), ("cuda", torch.float32, models.why_their_experts)],
)
def test_another_device(monkeypatch, name, dtype, why):
    """No path for ROCm; on CUDA our experts only where our own kernels run, and they take 16 bits."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: name == "cuda")
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    monkeypatch.setattr(type(current_platform), "device_name", name)
    assert name in why(configuration(dtype=dtype))


def test_ways_between_ranks(monkeypatch):
    """vLLM gathers tokens by default. Other ways may count on the choices of a token to differ."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    ways = {"enable_expert_parallel": True, "data_parallel_size": 2}
    assert models.why_not(configuration(**ways)) is None
    for changes in ({}, {"quant_config": FP8}):
        found = models.why_not(configuration(**ways, **changes, all2all_backend="deepep_low_latency"))
        assert "deepep_low_latency" in found


@pytest.fixture
def registry(monkeypatch) -> dict:
    """vLLM's registry with vLLM's own LongCat models, put back afterwards."""
    models = dict(ModelRegistry.models)
    stock = {"LongcatFlashForCausalLM": "longcat_flash", "LongcatFlashNgramForCausalLM": "longcat_flash_ngram"}
    monkeypatch.setattr(ModelRegistry, "models", models)
    for architecture, module in stock.items():
        ModelRegistry.register_model(architecture, f"vllm.model_executor.models.{module}:{architecture}")
    return models


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "MoE layers" in record.getMessage()]


@pytest.fixture
def heard(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_register(registry, monkeypatch, heard):
    """Twice is as good as once; the models are subclasses of vLLM's; nothing is said before one is built."""
    monkeypatch.delenv("ZEMOE_VLLM", raising=False)
    plugin.register()
    plugin.register()
    for architecture, name in plugin.ARCHITECTURES.items():
        ours, stock = registry[architecture].load_model_cls(), name.rpartition("ZeroExpert")[2]
        assert ours.__module__ == "zemoe.integrations.vllm.models"
        assert ours.__mro__[1].__name__ == stock and ours.__mro__[1].__module__.startswith("vllm.")
    assert lines(heard) == []


@pytest.mark.parametrize(("switch", "version"), [("0", vllm.__version__), ("1", "0.25.0")])
def test_off(registry, monkeypatch, heard, switch, version):
    """Nothing is registered, one line says why; vLLM's other processes don't repeat it."""
    monkeypatch.setenv("ZEMOE_VLLM", switch)
    monkeypatch.setattr(vllm, "__version__", version)
    before = dict(registry)
    plugin.register()
    assert before == registry
    assert len(lines(heard)) == 1 and ("ZEMOE_VLLM=0" in lines(heard)[0]) == (switch == "0")
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    plugin.register()
    assert len(lines(heard)) == 1


def test_off_is_seen():
    """vLLM loads plug-ins before it makes a place for its log."""
    command = [sys.executable, "-c", "from vllm.plugins import load_general_plugins as load; load(); load()"]
    done = subprocess.run(command, env=os.environ | {"ZEMOE_VLLM": "0"}, capture_output=True, text=True, timeout=120)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "MoE layers" in line]
    assert done.returncode == 0 and len(said) == 1 and "ZEMOE_VLLM=0" in said[0]


@pytest.mark.parametrize(
    ("changes", "layer", "said"),
    [
        ({}, "ZeroExpertLongcatMoE", "has zemoe's MoE layers: unquantised torch.float32"),
        (
            {"quant_config": FP8},
            "ZeroExpertLongcatMoEAroundTheirs",
            "has MoE layers with routing and zero experts by zemoe, FFN experts by vLLM: the model is quantised (fp8)",
        ),
        ({"lora_config": object()}, "LongcatMoe", "has vLLM's own MoE layers: LoRA adapters are enabled"),
    ],
)
def test_all_layers_are_of_one_kind(monkeypatch, heard, changes, layer, said):
    monkeypatch.setattr(models, "get_world_group", lambda: SimpleNamespace(is_first_rank=True))
    stock = longcat_flash.LongcatMoe
    config = configuration(**changes)
    with models.moe_layers(config):
        assert longcat_flash.LongcatMoe.__name__ == layer
    assert longcat_flash.LongcatMoe is stock
    assert len(lines(heard)) == 1 and said in lines(heard)[0]
    if layer == "LongcatMoe":
        assert config.additional_config == {"mine": 1} and config.compilation_config.custom_ops == ["all"]


def test_a_model_that_fails_to_build(monkeypatch, heard):
    monkeypatch.setattr(models, "get_world_group", lambda: SimpleNamespace(is_first_rank=True))
    stock, config = longcat_flash.LongcatMoe, configuration()
    with pytest.raises(KeyError), models.moe_layers(config):
        raise KeyError
    assert longcat_flash.LongcatMoe is stock
    # What was compiled with other layers must not be found again; a rotary embedding that is wrong must not be used.
    assert config.additional_config == {"mine": 1, "zemoe": models.__version__}
    assert config.compilation_config.custom_ops == ["all", "-rotary_embedding"]


def test_experts_that_dont_fit_leave_the_model_to_vllm(monkeypatch, heard):
    """Known only while the first layer is built: what was built and noted is forgotten, and one line says why."""
    monkeypatch.setattr(models, "get_world_group", lambda: SimpleNamespace(is_first_rank=True))
    stock, config, built = longcat_flash.LongcatMoe, configuration(quant_config=FP8), []
    noted = config.compilation_config
    noted.static_forward_context, noted.static_all_moe_layers = {"before": 0}, ["before"]

    def build():
        assert list(noted.static_forward_context) == noted.static_all_moe_layers == ["before"]
        built.append(longcat_flash.LongcatMoe)
        noted.static_forward_context["layer"] = len(built)
        noted.static_all_moe_layers.append("layer")
        if longcat_flash.LongcatMoe is not stock:
            raise our_layers.UnsupportedExpertsError("its experts choose by themselves")

    models.construct(build, config)
    assert built == [our_layers.ZeroExpertLongcatMoEAroundTheirs, stock]
    assert noted.static_forward_context == {"before": 0, "layer": 2}
    assert config.additional_config == {"mine": 1}
    assert len(lines(heard)) == 1 and "vLLM's own MoE layers: its experts choose by themselves" in lines(heard)[0]


def test_one_rank_speaks(monkeypatch, heard):
    monkeypatch.setattr(models, "get_world_group", lambda: SimpleNamespace(is_first_rank=False))
    for config in (configuration(), configuration(quant_config=FP8), configuration(lora_config=object())):
        with models.moe_layers(config):
            pass
    assert lines(heard) == []


def test_same_arguments_as_the_layer_that_it_replaces():
    stock = inspect.signature(longcat_flash.LongcatMoe.__init__).parameters
    for layer in (ZeroExpertLongcatMoE, our_layers.ZeroExpertLongcatMoEAroundTheirs):
        ours = inspect.signature(layer.__init__).parameters
        assert list(stock) == list(ours)
        assert {name: stock[name].default for name in stock} == {name: ours[name].default for name in ours}


def test_what_the_plugin_leans_on():
    """In the sources of the version that runs here; `vllm_minors.py` reads those of others."""
    assert missing(Path(vllm.__file__).parents[1]) == []


def test_what_is_missing_is_found(tmp_path):
    package = tmp_path / "vllm" / "model_executor" / "models"
    package.mkdir(parents=True)
    source = Path(longcat_flash.__file__).read_text()
    assert "top_k: int," in source
    (package / "longcat_flash.py").write_text(source.replace("top_k: int,", "topk: int,", 1))
    found = missing(tmp_path)
    assert any("LongcatMoe takes" in fact for fact in found) and any("envs.py" in fact for fact in found)
    assert not any("self\\.mlp = LongcatMoe" in fact for fact in found)


# --- what is loaded ---


def layers(monkeypatch, ranks: int = 1, hidden: int = H) -> list[ZeroExpertLongcatMoE]:
    """One layer a rank, loaded by vLLM's names with one set of random weights."""
    generator = torch.Generator().manual_seed(0)
    config = SimpleNamespace(routed_scaling_factor=SCALING, zero_expert_num=Z)
    tensors = {
        (expert, shard): torch.randn((hidden, WIDTH) if shard == "w2" else (WIDTH, hidden), generator=generator) * 0.1
        for expert in range(E)
        for shard in ("w1", "w3", "w2")
    }
    classifier = torch.randn(E + Z, hidden, generator=generator) * 0.2
    bias = torch.randn(E + Z, generator=generator) * 0.05
    made = []
    for rank in range(ranks):
        monkeypatch.setattr(our_layers, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(our_layers, "get_tensor_model_parallel_world_size", lambda: ranks)
        layer = ZeroExpertLongcatMoE(
            config, E, K, hidden, WIDTH, params_dtype=torch.float32, prefix="model.layers.0.mlp"
        )
        for parameter in layer.parameters():
            assert not parameter.requires_grad
            parameter.data.fill_(float("nan"))
        named = dict(layer.named_parameters())
        for (expert, shard), tensor in tensors.items():
            parameter = named[f"experts.routed_experts.{'w2' if shard == 'w2' else 'w13'}_weight"]
            loaded = parameter.weight_loader(
                parameter, tensor, f"{shard}.weight", shard_id=shard, expert_id=expert, return_success=True
            )
            assert loaded is True
        named["router.classifier.weight"].data.copy_(classifier)
        parameter = named["router.e_score_correction_bias"]
        parameter.weight_loader(parameter, bias)
        assert not any(parameter.isnan().any() for parameter in named.values())
        made.append(layer)
    return made


def tokens(count: int = T, hidden: int = H) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(1))


def by_loops(layer: ZeroExpertLongcatMoE, x_TH: torch.Tensor) -> torch.Tensor:
    """The layer in float64, choice by choice, from its own weights."""
    routed = layer.experts.routed_experts
    scores = (x_TH.double() @ layer.router.classifier.weight.double().T).softmax(-1)
    ids_TK = (scores + layer.router.e_score_correction_bias.double()).topk(K).indices
    y_TH = torch.zeros_like(x_TH, dtype=torch.float64)
    for t, ids in enumerate(ids_TK.tolist()):
        for e in ids:
            x, value = x_TH[t].double(), x_TH[t].double()
            if e < E:
                gate, up = (routed.w13_weight[e].double() @ x).chunk(2)
                value = routed.w2_weight[e].double() @ (torch.nn.functional.silu(gate) * up)
            y_TH[t] += SCALING * scores[t, e] * value
    return y_TH


def test_names_that_vllm_loads_to():
    """What vLLM's own loader of the model asks for, from the class it asks."""
    mapping = longcat_flash.fused_moe_make_expert_params_mapping(
        torch.nn.Module(), "gate_proj", "down_proj", "up_proj", num_experts=E
    )
    found = {(f"model.layers.0.mlp.{weight}weight").replace(weight, param) for param, weight, *_ in mapping}
    assert found == {f"model.layers.0.mlp.experts.routed_experts.{name}_weight" for name in ("w13", "w2")}
    assert {shard for *_, shard in mapping} == {"w1", "w2", "w3"}


def test_experts_that_dont_fit_are_refused(monkeypatch):
    (layer,) = layers(monkeypatch)
    routed = layer.experts.routed_experts
    with pytest.raises(ValueError, match=r"gate.weight must have shape \(24, 200\), got \(24, 199\)"):
        routed.weight_loader(routed.w13_weight, torch.zeros(WIDTH, H - 1), "gate.weight", "w1", 0)
    with pytest.raises(ValueError, match="shard_id"):
        routed.weight_loader(routed.w13_weight, torch.zeros(WIDTH, H), "gate.weight", "w4", 0)


def test_gate_rows_come_before_up_rows(monkeypatch):
    """On the second of two ranks: its half of the expert's columns of each."""
    routed = layers(monkeypatch, ranks=2)[1].experts.routed_experts
    rows = torch.arange(WIDTH, dtype=torch.float32)[:, None].expand(WIDTH, H)
    routed.weight_loader(routed.w13_weight, rows, "gate.weight", "w1", 2)
    routed.weight_loader(routed.w13_weight, rows + 100, "up.weight", "w3", 2)
    routed.weight_loader(routed.w2_weight, rows.T + 200, "down.weight", "w2", 2)
    half = list(range(WIDTH // 2, WIDTH))
    assert routed.w13_weight[2, :, 0].tolist() == half + [row + 100 for row in half]
    assert routed.w2_weight[2, 0].tolist() == [row + 200 for row in half]


def test_dead_rows_are_not_loaded():
    names = [f"model.layers.0.mlp.experts.{expert}.gate_proj.weight" for expert in range(E + Z)]
    others = [
        "model.layers.0.mlp.router.classifier.weight",
        "model.layers.11.mlps.0.gate_proj.weight",
        "lm_head.weight",
    ]
    found = models.without_dead_rows([(name, torch.zeros(1)) for name in names + others], E)
    assert [name for name, _ in found] == names[:E] + others


# --- what it computes, and what vLLM's own layer gets wrong ---


@pytest.mark.parametrize("count", [0, 1, 3, T, 70])
def test_layer(monkeypatch, count):
    """H = 200: vLLM's own layer pads to a multiple of 256 on GPUs and then asks a router of 200 columns."""
    (layer,) = layers(monkeypatch)
    x_TH = tokens(count)
    y_TH = layer(x_TH)
    assert y_TH.shape == x_TH.shape and y_TH.dtype == x_TH.dtype
    torch.testing.assert_close(y_TH.double(), by_loops(layer, x_TH), rtol=1e-4, atol=1e-5)


def test_ranks_sum_up_to_the_layer(monkeypatch):
    """With the zero experts' part in the sum once."""
    monkeypatch.setattr(our_layers, "tensor_model_parallel_all_reduce", lambda y_TH: y_TH)
    x_TH = tokens()
    (whole,) = layers(monkeypatch)
    parts = [layer(x_TH) for layer in layers(monkeypatch, ranks=2)]
    torch.testing.assert_close(parts[0] + parts[1], whole(x_TH), rtol=1e-4, atol=1e-5)


def test_bias_of_the_ffn_experts_only(monkeypatch):
    (layer,) = layers(monkeypatch)
    bias = layer.router.e_score_correction_bias
    bias.weight_loader(bias, torch.arange(E, dtype=torch.bfloat16))
    assert bias.tolist() == [*range(E), *[0] * Z]
    with pytest.raises(ValueError, match=r"\(6,\), \(11,\)"):
        bias.weight_loader(bias, torch.zeros(E + 1))


def test_zero_choices_reach_no_expert(monkeypatch):
    """vLLM's own router sends them to expert 0 with weight 0: work, load that EPLB counts, NaN if that one has NaN."""
    (layer,) = layers(monkeypatch)
    layer.router.e_score_correction_bias.data[0] = -10.0  # never chosen
    routed = layer.experts.routed_experts
    routed.w13_weight.data[0] = float("nan")
    routed.w2_weight.data[0] = float("nan")
    for count in (1, T, 70):
        assert layer(tokens(count)).isfinite().all()


def test_threads_share_a_layer(monkeypatch):
    """vLLM's own router keeps the zero experts' output on itself from one call to the next."""
    (layer,) = layers(monkeypatch)
    inputs = [tokens() * scale for scale in range(1, 9)]
    alone = [layer(x_TH) for x_TH in inputs]
    before = {name: id(value) for module in layer.modules() for name, value in vars(module).items()}
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for together, single in zip(pool.map(layer, inputs), alone, strict=True):
                assert torch.equal(together, single)
    assert before == {name: id(value) for module in layer.modules() for name, value in vars(module).items()}


def test_compiles_once_for_all_numbers_of_tokens(monkeypatch):
    """Without a guard on the number: vLLM drops guards."""
    (layer,) = layers(monkeypatch)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for count in (70, 2, 9):
        x_TH = tokens(count)
        torch._dynamo.mark_dynamic(x_TH, 0)
        assert torch.equal(compiled(x_TH), layer(x_TH))
    assert len(graphs) == 1


def test_operator(monkeypatch):
    (layer,) = layers(monkeypatch)
    routed, bias = layer.experts.routed_experts, layer.router.e_score_correction_bias
    logits_TA = router_logits(tokens(), layer.router.classifier.weight)
    weights = (logits_TA, bias, routed.w13_weight, routed.w2_weight)
    torch.library.opcheck(torch.ops.zemoe.moe_from_logits.default, (tokens(), *weights, K, SCALING, True))
    assert torch.equal(moe_from_logits(tokens(), *weights, top_k=K, scaling=SCALING), layer(tokens()))
