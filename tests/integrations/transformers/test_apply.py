"""LongCat-Flash in transformers with our layers, judged against the same model with stock's. Runs on 5.17 and later."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LongcatFlashForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    conversion_mapping,
)
from transformers.models.longcat_flash import modeling_longcat_flash as modeling
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

import zemoe
import zemoe.integrations.transformers as bridge
from helpers import transformers_shared
from helpers.transformers_shared import STOCK_STATE, TOLERANCE, StockMoE, assert_ours, global_state, greedy, logits_of
from helpers.transformers_tiny import tiny_config, tiny_model
from zemoe.backends import BACKENDS
from zemoe.checkpoints.longcat import verify
from zemoe.integrations.transformers import patch
from zemoe.integrations.transformers.layers import layer_config

# Fixtures
transformers_is_left_as_it_was = transformers_shared.transformers_is_left_as_it_was
ids = transformers_shared.ids
stock = transformers_shared.stock
stock_logits = transformers_shared.stock_logits
folders = transformers_shared.folders


# --- patch_ and unpatch_


def test_patched_model_computes_what_stock_does(stock, stock_logits, ids):
    model = copy.deepcopy(stock)
    before = {name: (parameter, parameter.nbytes) for name, parameter in model.named_parameters()}
    report = bridge.patch_(model)
    assert_ours(model)
    assert (logits_of(model, ids) - stock_logits).abs().max() < TOLERANCE
    assert torch.equal(greedy(model, ids), greedy(stock, ids))

    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, (parameter, _) in before.items())
    dead = 2 * 3 * 48 * 32 * 4  # layers, zero experts, 2I, H, bytes
    assert sum(size for _, size in before.values()) - sum(parameter.nbytes for parameter in after.values()) == dead
    assert report.bytes_freed == dead
    assert report.bytes_shared == 2 * 5 * (48 * 32 + 32 * 24) * 4
    assert report.layers == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert report.router_dtype == torch.float32
    assert report.backend == zemoe.resolve_backend("cpu", torch.float32).name
    assert "cpu" in report.backend_reason
    assert model._can_compile_fullgraph
    assert not stock._can_compile_fullgraph


@pytest.mark.parametrize("change", [bridge.patch_, bridge.unpatch_])
@pytest.mark.parametrize("wrong", [None, "model"])
def test_what_is_no_module(change, wrong):
    with pytest.raises(TypeError, match=rf"model must be a torch.nn.Module, got \w+: {wrong!r}"):
        change(wrong)


def test_patching_again_only_sets_the_backend(stock, stock_logits, ids, monkeypatch):
    model = copy.deepcopy(stock)
    bridge.patch_(model)
    used = []

    def spy(*args):
        used.append("torch")
        return BACKENDS["cpu"].infer(*args)

    monkeypatch.setitem(BACKENDS, "torch", dataclasses.replace(BACKENDS["torch"], infer=spy))
    report = bridge.patch_(model, backend="torch")
    assert report.bytes_freed == 0
    assert report.layers == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert (report.backend, report.backend_reason.startswith("asked for")) == ("torch", True)
    assert [layer.mlp.experts.backend for layer in model.model.layers] == ["torch", "torch"]
    assert (logits_of(model, ids) - stock_logits).abs().max() < TOLERANCE
    assert used == ["torch", "torch"]
    with pytest.raises(ValueError, match="backend must be one of"):
        bridge.patch_(model, backend="tpu")
    assert [layer.mlp.experts.backend for layer in model.model.layers] == ["torch", "torch"]


def test_unpatching_gives_stock_back(stock, stock_logits, ids, tmp_path):
    model = copy.deepcopy(stock)
    bridge.patch_(model)
    assert bridge.unpatch_(model) == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert bridge.unpatch_(model) == ()
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert model._can_compile_fullgraph == stock._can_compile_fullgraph
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in stock.state_dict().items()}
    assert torch.equal(logits_of(model, ids), stock_logits)
    model.save_pretrained(tmp_path)
    assert verify(tmp_path).layout == "transformers"
    assert torch.equal(logits_of(LongcatFlashForCausalLM.from_pretrained(tmp_path), ids), stock_logits)


def test_a_model_built_by_apply_can_be_unpatched(folders, stock_logits, ids, tmp_path):
    model = bridge.load_model(folders["original"])
    bridge.unpatch_(model)
    assert torch.equal(logits_of(model, ids), stock_logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(LongcatFlashForCausalLM.from_pretrained(tmp_path), ids), stock_logits)


def test_base_model_and_a_model_inside_another(stock, stock_logits, ids):
    outer = torch.nn.ModuleDict({"text": copy.deepcopy(stock), "head": torch.nn.Linear(2, 2)})
    assert bridge.patch_(outer).layers[0] == "text.model.layers.0.mlp"
    assert (logits_of(outer["text"], ids) - stock_logits).abs().max() < TOLERANCE
    base = copy.deepcopy(stock.model)
    assert bridge.patch_(base).layers == ("layers.0.mlp", "layers.1.mlp")
    with torch.no_grad():
        difference = base(ids).last_hidden_state - stock.model(ids).last_hidden_state
    assert difference.abs().max() < TOLERANCE


def test_after_an_exception_nothing_is_patched(stock, stock_logits, ids, monkeypatch):
    model = copy.deepcopy(stock)
    free, calls = patch._free_dead_rows, []

    def fails_at_the_second_layer(experts):
        calls.append(experts)
        if len(calls) == 2:
            raise MemoryError
        return free(experts)

    monkeypatch.setattr(patch, "_free_dead_rows", fails_at_the_second_layer)
    with pytest.raises(MemoryError):
        bridge.patch_(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in stock.state_dict().items()
    }
    assert torch.equal(logits_of(model, ids), stock_logits)


def test_unsupported_models_are_told_what_they_are(stock, ids):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=16, num_hidden_layers=1, num_local_experts=2, **sizes))
    with pytest.raises(ValueError, match=r"must be LongcatFlash.*got MixtralForCausalLM.*'mixtral'.*MixtralExperts"):
        bridge.patch_(mixtral)
    with pytest.raises(ValueError, match=r"got Linear \(model_type None, mixture-of-experts modules: none\)"):
        bridge.unpatch_(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("part", ["experts", "router", "", "experts.identity_expert"])
def test_wrapped_layers_are_refused_before_anything_changes(stock, stock_logits, ids, part):
    model = copy.deepcopy(stock)
    wrapped = model.model.layers[1].mlp.get_submodule(part)
    wrapped.forward = wrapped.forward  # as tensor parallelism and offloading do it
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp.*call apply\(\) before loading"):
        bridge.patch_(model)
    assert type(model.model.layers[0].mlp) is StockMoE


def test_replaced_experts_are_refused_before_anything_changes(stock):
    class Float8Experts(modeling.LongcatFlashExperts):
        pass

    model = copy.deepcopy(stock)
    model.model.layers[1].mlp.experts.__class__ = Float8Experts
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: mlp\.experts.*Float8Experts.*quantized"):
        bridge.patch_(model)
    assert type(model.model.layers[0].mlp) is StockMoE


def test_another_activation_than_the_configs_is_refused(stock):
    model = copy.deepcopy(stock)
    model.model.layers[1].mlp.experts.act_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: act_fn must be SiLU\w*, got ReLU"):
        bridge.patch_(model)
    assert type(model.model.layers[0].mlp) is StockMoE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"router_bias": True}, "router_bias"),
        ({"zero_expert_type": "drop"}, "zero_expert_type"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"moe_topk": 9}, "moe_topk"),
    ],
)
def test_configs_that_the_layers_cannot_compute_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        layer_config(tiny_config(**changes))
    with pytest.raises(ValueError, match=words), bridge.applied():
        LongcatFlashForCausalLM(tiny_config(**changes))


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu_pytorch_tanh"}, {"zero_expert_num": 0}, {"moe_topk": 8}])
def test_other_configs(changes, ids):
    model = tiny_model(**changes)
    before = logits_of(model, ids)
    bridge.patch_(model)
    assert (logits_of(model, ids) - before).abs().max() < TOLERANCE


# --- apply and unapply


def test_apply_is_idempotent_and_can_be_undone(stock, stock_logits, ids):
    bridge.unapply()
    bridge.apply()
    bridge.apply()
    assert bridge.is_applied()
    conversions = conversion_mapping.get_checkpoint_conversion_mapping("longcat_flash")
    assert sum("DropDeadRows" in repr(conversion.operations) for conversion in conversions) == 2
    built = tiny_model()
    from_config = AutoModelForCausalLM.from_config(tiny_config())
    bridge.unapply()
    bridge.unapply()
    assert not bridge.is_applied()
    assert_ours(built)
    assert_ours(from_config)
    assert built._can_compile_fullgraph == stock._can_compile_fullgraph  # what stock's class says again
    assert type(tiny_model().model.layers[0].mlp) is StockMoE
    built.load_state_dict({k: v[:5] if k.endswith("gate_up_proj") else v for k, v in stock.state_dict().items()})
    assert (logits_of(built, ids) - stock_logits).abs().max() < TOLERANCE


def test_apply_leaves_nothing_behind_when_it_fails(monkeypatch):
    register = conversion_mapping.register_checkpoint_conversion_mapping

    def fails_late(*args, **kwargs):
        register(*args, **kwargs)
        monkeypatch.undo()
        raise RuntimeError("late")

    monkeypatch.setattr(conversion_mapping, "register_checkpoint_conversion_mapping", fails_late)
    with pytest.raises(RuntimeError, match="late"):
        bridge.apply()
    assert global_state() == STOCK_STATE


def test_apply_refuses_when_another_has_taken_the_place(monkeypatch):
    class Other(StockMoE):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(modeling, "LongcatFlashMoE", Other)
        with pytest.raises(RuntimeError, match=r"has been replaced by .*Other"):
            bridge.apply()
    register_patch_mapping({"LongcatFlashExperts": Other})
    try:
        with pytest.raises(RuntimeError, match="LongcatFlashExperts"):
            bridge.apply()
    finally:
        unregister_patch_mapping(["LongcatFlashExperts"])
    assert global_state() == STOCK_STATE


def test_applied_undoes_itself_after_an_exception_and_keeps_what_was():
    with pytest.raises(KeyError), bridge.applied():
        raise KeyError
    assert not bridge.is_applied()
    bridge.apply()
    with bridge.applied():
        pass
    assert bridge.is_applied()
    bridge.unapply()


def test_nothing_is_allocated_for_zero_experts():
    with bridge.applied(), torch.device("meta"):
        ours = LongcatFlashForCausalLM(tiny_config())
    with torch.device("meta"):
        theirs = LongcatFlashForCausalLM(tiny_config())

    def count(model) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    assert count(theirs) - count(ours) == 2 * 3 * 48 * 32
    report = bridge.patch_(theirs)
    assert count(theirs) == count(ours)
    assert report.bytes_freed == 2 * 3 * 48 * 32 * 4
