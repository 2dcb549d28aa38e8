"""Checkpoints in ZEDA's published layout, in transformers' own models; blocks are judged by a restatement as loops."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.zeda import BLOCK, CONFIGS, E, H, restated, written
from zemoe.checkpoints.files import CheckpointError
from zemoe.integrations.transformers.retrofit import unretrofit_
from zemoe.integrations.transformers.zeda import load_zeda


@pytest.mark.parametrize("kind", ["zero", "copy"])
@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_compute_what_zeda_does(tmp_path, family, kind):
    tensors = written(family, tmp_path, kind)
    model = load_zeda(tmp_path, dtype=torch.float32)
    x_TH = torch.randn(40, H, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.get_submodule(BLOCK)(x_TH[None])[0]
        logits = model(torch.arange(12)[None]).logits
    assert (found - restated(family, tensors, x_TH, kind)).abs().max() < 1e-4  # values of order 10
    assert logits.isfinite().all() and not model.training
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        assert torch.equal(state[name], tensors[name])
    assert torch.equal(state[f"{BLOCK}.zero_weight"], tensors[f"{BLOCK}.gate.weight"][E:])
    assert unretrofit_(model) == (BLOCK,)
    assert not any("zero_" in name for name in model.state_dict())


def test_a_mask_over_the_zero_experts_gives_the_base_model(tmp_path):
    written("qwen3_moe_plus_plus", tmp_path, use_zce_mask=True)
    model = load_zeda(tmp_path, dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        masked = model(ids).logits
        unretrofit_(model)
        assert torch.equal(model(ids).logits, masked)


def test_bfloat16_by_config(tmp_path):
    written("glm4_moe_lite_plus_plus", tmp_path, dtype="bfloat16")
    model = load_zeda(tmp_path)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.get_submodule(BLOCK).zero_bias.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen3_moe"}, "model_type must be one of"),
        ({"zce_types": ["zero", "copy"]}, "must all be 'zero' or all 'copy'"),
        ({"zce_types": ["constant", "constant"]}, "must all be 'zero' or all 'copy'"),
        ({"zce_types": ["zero"]}, "lists of one length"),
        ({"zce_types": [["zero"], ["zero"]]}, "must all be 'zero' or all 'copy'"),
        ({"num_local_experts": "x"}, "config.json: num_experts must be a whole number, got .x."),
        ({"mlp_only_layers": [0, 1]}, "config.json: model must have mixture-of-experts blocks"),
        ({"model_type": ["qwen3_moe"]}, "model_type must be one of"),
        ({"rope_parameters": {"rope_type": {}}}, "rope_parameters must be an object with a rope_type of transformers"),
        ({"rope_scaling": {"type": 2}, "rope_parameters": None}, "rope_scaling must be an object with a rope_type"),
        ({"rope_parameters": 7}, "rope_parameters must be an object with a rope_type"),
        ({"zce_nums": [1, 0]}, "zce_nums must be integers >= 1"),
        ({"zce_nums": [1, 10**9]}, r"config\.json: its sizes make [\d,]+ numbers, in the files are [\d,]+$"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of 1000000000 is more than there are tensors"),
        ({"num_local_experts": 10**9}, "num_experts of 1000000000 is more than there are tensors"),
        ({"hidden_size": "x"}, r"config\.json: .*hidden_size"),
        ({"intermediate_size": 10**9}, r"config\.json: its sizes make [\d,]+ numbers, in the files are [\d,]+$"),
        ({"zce_nums": [1, 1]}, r"gate.weight has shape \[9, 32\], config.json asks for \[8, 32\]"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, config, words):
    written("qwen3_moe_plus_plus", tmp_path, **config)
    with pytest.raises(CheckpointError, match=words):
        load_zeda(tmp_path)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_missing_and_unknown_tensors_are_refused(tmp_path, change):
    tensors = written("qwen3_moe_plus_plus", tmp_path)
    name = f"{BLOCK}.experts.4.up_proj.weight"
    moved = tensors.pop(name) if change == "missing" else tensors[name].clone()
    if change == "unknown":
        tensors[f"{BLOCK}.experts.{E}.up_proj.weight"] = moved
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len(load_file(tmp_path / "model.safetensors")) == len(tensors)
    with pytest.raises(CheckpointError, match="4.up_proj.weight .*missing" if change == "missing" else "not part of"):
        load_zeda(tmp_path)
