"""MoE++ checkpoints in the published layout, judged by a restatement of MoE++'s model as loops in float64.

T tokens, H hidden size, I expert width, E FFN experts, A = E + 4 slots, V vocabulary, D size of an attention head.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

import zemoe
from helpers.moepp import CONFIG, LAYERS, UNUSED, A, D, E, H, V, restated_block, restated_model, store, written
from zemoe.checkpoints.files import CheckpointError
from zemoe.integrations.transformers.cache import CACHE
from zemoe.integrations.transformers.moepp import load_moepp, save_moepp
from zemoe.integrations.transformers.moepp_model import MoEPlusPlusForCausalLM

OPTIONS = ("moe_2layer_gate", "moe_use_mixtral_gating", "moe_use_logits_norm", "moe_feature_no_mul_topk")


# ---- MoE++'s rule, token by token ------------------------------------------------------------------------------------


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(7))


# ---- blocks ----------------------------------------------------------------------------------------------------------


def by_published_name(block: Any, layer: int) -> dict[str, Tensor]:
    """Gradients of a block's parameters."""
    moe = f"model.layers.{layer}.mlp.moe"
    grads = {f"{moe}.gate.{name}": parameter.grad for name, parameter in block.gate.named_parameters()}
    for e in range(E):
        grads[f"{moe}.experts.experts.{e}.up_proj.weight"] = block.experts.gate_up_proj.grad[e]
        grads[f"{moe}.experts.experts.{e}.down_proj.weight"] = block.experts.down_proj.grad[e]
    for j in range(2):
        grads[f"{moe}.experts.experts.{E + j}.constant"] = block.experts.constant.grad[j]
        grads[f"{moe}.experts.experts.{E + j}.wg.weight"] = block.experts.constant_wg.grad[j]
    return grads


@pytest.mark.parametrize(
    "flags", list(itertools.product([True, False], repeat=4)), ids=lambda flags: str([*map(int, flags)])
)
def test_blocks_and_gradients_are_moe_plus_plus(tmp_path, flags):
    changes: dict[str, Any] = dict(zip(OPTIONS, flags, strict=True)) | {"moe_gate_norm_std": 1.5}
    config, tensors = CONFIG | changes, written(tmp_path, **changes)
    block = load_moepp(tmp_path).model.layers[1].mlp
    generator = torch.Generator().manual_seed(1)
    x_TH, prev_TA, wanted_TH, wanted_TA = (torch.randn(24, size, generator=generator) for size in (H, A, H, A))
    theirs = {name: tensor.double().requires_grad_(".layers.1.mlp." in name) for name, tensor in tensors.items()}
    with torch.no_grad():  # as in the first layer
        for found, exact in zip(block(x_TH), restated_block(theirs, 1, config, x_TH.double(), None), strict=False):
            assert (found - exact).abs().max() < 1e-4 * exact.abs().max()
    mine = [x_TH.clone().requires_grad_(), prev_TA.clone().requires_grad_()]
    exacts = [x_TH.double().requires_grad_(), prev_TA.double().requires_grad_()]
    y, logits, ids = restated_block(theirs, 1, config, *exacts)
    assert ids.unique().tolist() == list(range(A))  # every expert has a say here
    with zemoe.observe(block) as seen:
        found_y, found_logits = block(mine[0][None], mine[1])
    assert torch.equal(seen["", 0].topk_ids_TK, ids)
    assert found_y.shape == (1, 24, H) and (found_y[0] - y).abs().max() < 1e-4 * y.abs().max()
    assert (found_logits - logits).abs().max() < 1e-5 * logits.abs().max()
    assert torch.equal(mine[0], x_TH)
    ((y * wanted_TH).sum() + (logits * wanted_TA).sum()).backward()
    ((found_y[0] * wanted_TH).sum() + (found_logits * wanted_TA).sum()).backward()
    pairs = [(found.grad, exact.grad) for found, exact in zip(mine, exacts, strict=True)]
    pairs += [(grad, theirs[name].grad) for name, grad in by_published_name(block, 1).items()]
    assert len(pairs) == 2 + sum(tensor.requires_grad for tensor in theirs.values())
    for found, exact in pairs:
        assert found is not None and (found - exact).abs().max() <= 2e-4 * exact.abs().max()


def test_the_router_is_float32_in_a_bfloat16_model(tmp_path):
    tensors = written(tmp_path, torch_dtype="bfloat16")
    model = load_moepp(tmp_path)
    gate = model.model.layers[1].mlp.gate
    for name in ("wg.0", "wg.2", "gate_map"):
        assert torch.equal(gate.get_submodule(name).weight, tensors[f"model.layers.1.mlp.moe.gate.{name}.weight"])
    assert model.dtype == model.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    x_TH, prev_TA = torch.randn(40, H).bfloat16(), torch.randn(40, A)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    y, logits, _ = restated_block(exact, 1, CONFIG, x_TH.double(), prev_TA.double())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found_y, found_logits = model.model.layers[1].mlp(x_TH, prev_TA)
    assert found_logits.dtype == torch.float32 and (found_logits - logits).abs().max() < 1e-5 * logits.abs().max()
    assert found_y.dtype == torch.bfloat16 and (found_y - y).abs().max() < 0.02 * y.abs().max()
    half = load_moepp(tmp_path, dtype=torch.float32).half()
    assert {part.weight.dtype for part in (half.lm_head, half.model.norm)} == {torch.float16}
    assert half.model.layers[0].mlp.gate.gate_map.weight.dtype == torch.float32
    with torch.no_grad():
        assert half(tokens(1, 9)).logits.isfinite().all()


def test_equal_logits_have_no_deviation_to_divide_by(tmp_path):
    written(tmp_path, moe_use_logits_norm=True)
    block = load_moepp(tmp_path).model.layers[0].mlp
    x_TH = torch.zeros(2, H, requires_grad=True)
    y_TH, _ = block(x_TH)
    y_TH.sum().backward()
    assert y_TH.isfinite().all() and x_TH.grad is not None and x_TH.grad.isfinite().all()


def test_a_model_compiles_to_one_graph(tmp_path):
    written(tmp_path, moe_use_logits_norm=True)
    model, ids = load_moepp(tmp_path), tokens(2, 7)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False)
        torch.testing.assert_close(compiled.logits, model(ids).logits)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_2layer_gate": False, "moe_use_mixtral_gating": True, "tie_word_embeddings": True},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "moe_use_logits_norm": True},
        {"rope_scaling": {"type": "ntk", "factor": 8.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "moe_feature_no_mul_topk": True},
    ],
    ids=["plain", "one layer, Mixtral, tied", "linear", "ntk", "dynamic"],
)
def test_models_are_moe_plus_plus(tmp_path, changes):
    tensors = written(tmp_path, shards=2, **changes)
    model, ids = load_moepp(tmp_path), tokens(2, 21)  # longer than max_position_embeddings
    with torch.no_grad(), zemoe.observe(model) as seen:
        found = model(ids).logits
    exact = [restated_model(tensors, CONFIG | changes, row) for row in ids]
    assert seen.layers() == [f"model.layers.{number}.mlp" for number in range(LAYERS)]
    for number, name in enumerate(seen.layers()):
        assert torch.equal(seen[name, 0].topk_ids_TK, torch.cat([chosen[number] for _, chosen in exact]))
    logits = torch.stack([row for row, _ in exact])
    assert (found - logits).abs().max() < 2e-4 * logits.abs().max()
    assert not model.training


@pytest.mark.parametrize("on_disk", [True, False], ids=["head in the files", "no head in the files"])
def test_a_tied_head_is_the_embedding_whether_or_not_the_files_hold_it(tmp_path, on_disk):
    (tmp_path / "first").mkdir()
    written(tmp_path / "first", tie_word_embeddings=True)
    model, ids = load_moepp(tmp_path / "first"), tokens(2, 5)
    save_moepp(model, tmp_path / "second")
    assert "lm_head.weight" not in load_file(tmp_path / "second" / "model.safetensors")
    again = load_moepp(tmp_path / ("first" if on_disk else "second"))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_generation_is_the_same_with_and_without_a_cache(tmp_path):
    tensors = written(tmp_path)
    model, ids = load_moepp(tmp_path), tokens(3, 5)
    text = list(ids[0])
    for _ in range(4):
        text.append(restated_model(tensors, CONFIG, torch.stack(text))[0][-1].argmax())
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert plain[0].tolist() == [int(token) for token in text]
    for cache in ("dynamic", "static"):
        found = model.generate(
            ids, attention_mask=mask, use_cache=True, cache_implementation=cache, disable_compile=True, **options
        )
        assert torch.equal(found, plain)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.int64), ids], 1)
    mask = (padded > 0).long()
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 2:], plain)


def test_a_text_in_two_pieces_gives_the_same_logits(tmp_path):
    written(tmp_path)
    model, ids = load_moepp(tmp_path), tokens(2, 8)
    with torch.no_grad():
        whole, start = model(ids).logits, model(ids[:, :5], use_cache=True)
        embedded = model.get_input_embeddings()(ids[:, 5:])
        rest = model(inputs_embeds=embedded, **{CACHE: start[CACHE]}).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), whole, atol=1e-4, rtol=1e-4)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**inputs)


def test_continuous_batching_gives_the_same_tokens(tmp_path):
    """Its pages reach attention under names of their own, `cache` among them, whatever a cache is called otherwise."""
    written(tmp_path, head_dim=D)
    model, prompts = load_moepp(tmp_path), [tokens(1, length)[0].tolist() for length in (5, 2, 7)]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    alone = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    pages = ContinuousBatchingConfig(max_batch_tokens=16, num_blocks=64, max_memory_percent=0.01)
    found = model.generate_batch(
        prompts, generation_config=GenerationConfig(**options), continuous_batching_config=pages
    )
    assert [made.generated_tokens for made in found.values()] == alone


@torch.no_grad()
def test_a_keyword_that_nothing_reads_is_refused(tmp_path):
    """transformers' own models take any keyword, and a cache under another version's name is then no cache at all."""
    written(tmp_path)
    model, ids = load_moepp(tmp_path), tokens(1, 5)
    for keyword in ("caches", "past_key_value", "token_type_ids"):
        for called in (model, model.model):
            with pytest.raises(TypeError, match=f"MoEPlusPlusModel got keywords that it does not read: {keyword}; "):
                called(ids, **{keyword: None})
    for called in (model, model.model):
        start = called(ids[:, :3], use_cache=True)
        for name in ("cache", "past_key_values"):
            with contextlib.suppress(TypeError) if name != CACHE else contextlib.nullcontext():
                # If it is taken, under this version's name or as transformers translates it, it is read.
                rest = called(ids[:, 3:], **{name: copy.deepcopy(start[CACHE])})
                torch.testing.assert_close(rest[0], called(ids)[0][:, 3:], atol=1e-4, rtol=1e-4)
    options = {"num_items_in_batch": torch.tensor(2), "output_attentions": False, "shift_labels": ids}
    assert model(ids, labels=ids, **options).loss.isfinite()


def test_activation_checkpoints_change_no_gradient(tmp_path):
    written(tmp_path)
    model, ids = load_moepp(tmp_path).train(), tokens(2, 5)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}

    expected = gradients()
    assert {name for name, _ in model.named_parameters()} - expected.keys() == {UNUSED}
    model.enable_input_require_grads()  # reentrant ones need it
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_saved_in_either_layout_it_is_the_same_model(tmp_path):
    scaling = {"type": "linear", "factor": 2.0}
    tensors = written(tmp_path, torch.bfloat16, torch_dtype="bfloat16", rope_scaling=scaling)
    model, ids = load_moepp(tmp_path), tokens(2, 9)
    assert save_moepp(model, tmp_path / "published") == ["model.safetensors"]
    again = load_moepp(tmp_path / "published")
    model.save_pretrained(tmp_path / "packed")
    packed = MoEPlusPlusForCausalLM.from_pretrained(tmp_path / "packed")
    for other in (again, packed):
        assert other.dtype == torch.bfloat16 and type(other) is MoEPlusPlusForCausalLM
        for (name, mine), (same, theirs) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
            assert name == same and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        with torch.no_grad():
            assert torch.equal(other(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG | {"rope_scaling": scaling}
    assert torch.equal(again.state_dict()["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type must be 'MoE\\+\\+', got 'llama'"),
        ({"moe_expert_interval": 2}, "moe_expert_interval must be 1 or absent .*, got 2"),
        ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers of 1000000000 is more than there are tensors"),
        ({"num_experts": [10**9]}, "config.json: num_experts of 1000000000 is more than there are tensors"),
        ({"hidden_size": 32 * 10**9}, "config.json: Storage size calculation overflowed"),
        ({"vocab_size": 10**9}, "config.json asks for .1000000000, 32."),
        ({"num_experts": 9}, "num_experts must be a list .*, got 9"),
        ({"num_experts": [4]}, "num_experts must be a list of integers, the first at least 5 .*, got \\[4\\]"),
        ({"num_experts": []}, "num_experts must be a list .*, got \\[\\]"),
        ({"hidden_size": "32"}, "hidden_size must be an integer >= 1, got '32'"),
        (
            {"num_attention_heads": 32},
            "num_attention_heads must be such that hidden_size = 32 gives heads of even size",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of num_attention_heads = 4.*, got 3"),
        ({"pad_token_id": 48}, "pad_token_id must be one of the 48 tokens, or absent, got 48"),
        ({"moe_use_logits_norm": 1}, "moe_use_logits_norm must be true, false or absent, got 1"),
        ({"moe_gate_norm_std": 0}, "moe_gate_norm_std must be a finite number above 0, got 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling must be null or .*, got .*yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, "rope_scaling must be null or .*, got .*1.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling must be null or"),
        ({"rope_parameters": {"rope_theta": 10.0}}, "rope_parameters must be absent"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be absent"),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of float32, .*, got 'int8'"),
        ({"bos_token_id": "one"}, "bos_token_id"),
        ({"num_experts": [10]}, r"wg.0.weight has shape \[72, 32\], config.json asks for \[80, 32\]"),
        ({"intermediate_size": 12}, r"experts.0.up_proj.weight has shape \[48, 32\], config.json asks for \[24, 32\]"),
        ({"num_hidden_layers": 2}, r"tensor model.layers.2.* is not part of this config.json"),
        ({"num_hidden_layers": 4}, r"tensor model.layers.3.self_attn.q_proj.weight \[32, 32\] is missing"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, words):
    written(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(CheckpointError, match=words) as refused:
        load_moepp(tmp_path)
    assert str(refused.value).startswith(str(tmp_path))


@pytest.mark.parametrize("key", ["id2label", "num_labels", "per_layer_config", "_attn_implementation"])
def test_entries_that_are_no_part_of_the_architecture_are_left_out(tmp_path, key):
    """transformers would use the first three before it looks at them, and take code by the last one's name."""
    tensors = written(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: 0.5}))
    assert torch.equal(load_moepp(tmp_path).state_dict()["model.norm.weight"], tensors["model.norm.weight"])


EXPERTS = "model.layers.1.mlp.moe.experts.experts"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (f"{EXPERTS}.4.up_proj.weight", None, rf"tensor {EXPERTS}.4.up_proj.weight \[48, 32\] is missing"),
        ("model.layers.0.mlp.moe.gate.gate_map.weight", None, r"gate_map.weight \[9, 9\] is missing"),
        (f"{EXPERTS}.6.constant", torch.zeros(2, H), r"6.constant has shape \[2, 32\], config.json asks for \[32\]"),
        (
            f"{EXPERTS}.5.wg.weight",
            torch.zeros(2, H, dtype=torch.int64),
            "5.wg.weight has dtype I64, supported are F32",
        ),
        (f"{EXPERTS}.7.constant", torch.zeros(H), rf"tensor {EXPERTS}.7.constant F32 \[32\] is not part of this"),
        ("model.layers.1.mlp.moe.gate.wg.weight", torch.zeros(A, H), "gate.wg.weight .* is not part of this"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, name, tensor, words):
    tensors = written(tmp_path)
    if tensor is None:
        tensors.pop(name)
    else:
        tensors[name] = tensor
    store(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=words) as refused:
        load_moepp(tmp_path)
    assert str(refused.value).startswith(str(tmp_path))


def test_a_folder_without_config_or_with_pickles_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_moepp(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="pickled weights can run code"):
        load_moepp(tmp_path)
