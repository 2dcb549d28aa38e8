"""What is wrapped around a retrofitted block's gate and experts takes part: offloading hooks, LoRA."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.families import FAMILIES
from helpers.transformers_shared import logits_of
from helpers.transformers_tiny import tiny_ids
from helpers.zeda import written
from zemoe.integrations.transformers.retrofit import retrofit_, unretrofit_
from zemoe.integrations.transformers.zeda import load_zeda

every_family = pytest.mark.parametrize("family", FAMILIES)


def retrofitted(family: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).eval()
    retrofit_(model, 3, generator=torch.Generator().manual_seed(0))
    return model


def with_layers_on_disk(model, folder) -> None:
    parts = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    layers = {f"layers.{name}": "disk" for name, _ in model.model.layers.named_children()}
    places = {f"model.{name}": place for name, place in (parts | layers).items()} | {"lm_head": "cpu"}
    accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, offload_buffers=True, force_hooks=True
    )


@every_family
def test_layers_on_disk(family, tmp_path):
    model = retrofitted(family)
    expected = logits_of(model, tiny_ids())
    with_layers_on_disk(model, tmp_path)
    block = model.model.layers[1].mlp
    assert block.gate.weight.is_meta and block.experts.down_proj.is_meta and block.zero_weight.is_meta
    assert torch.equal(logits_of(model, tiny_ids()), expected)


def test_a_zeda_checkpoint_with_layers_on_disk(tmp_path):
    """Its gate's bias and the zero experts' own are on disk too."""
    written("glm4_moe_lite_plus_plus", tmp_path)
    model = load_zeda(tmp_path, dtype=torch.float32)
    expected = logits_of(model, torch.arange(12)[None])
    with_layers_on_disk(model, tmp_path / "offloaded")
    block = model.model.layers[1].mlp
    assert block.gate.e_score_correction_bias.is_meta and block.zero_bias.is_meta
    assert torch.equal(logits_of(model, torch.arange(12)[None]), expected)


@every_family
def test_lora_on_gate_and_experts(family):
    """What the adapter gives is what the merged model gives, and not what the model gave before."""
    model = retrofitted(family)
    before = logits_of(model, tiny_ids())
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=[], target_parameters=[f"mlp.{name}"], init_lora_weights=False)
        adapted = get_peft_model(copy.deepcopy(model), config)
        expected = logits_of(adapted, tiny_ids())
        assert (expected - before).abs().max() > 0.01, name
        merged = adapted.merge_and_unload()
        assert (logits_of(merged, tiny_ids()) - expected).abs().max() < 1e-4, name
        assert unretrofit_(merged)
        assert not any("ZeroExpert" in type(part).__name__ for part in merged.modules())


def test_taken_out_under_an_adapter():
    model = retrofitted("qwen3_moe")
    config = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    adapted = get_peft_model(model, config)
    assert len(unretrofit_(adapted)) == 2
    assert not any("ZeroExpert" in type(part).__name__ for part in adapted.modules())
    assert logits_of(adapted, tiny_ids()).isfinite().all()
