"""FP8 checkpoints: blocks that don't divide the weights, factors in other files, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, LongcatFlashForCausalLM

import zemoe.integrations.transformers as bridge
from helpers import transformers_shared
from helpers.tiny_checkpoint import BLOCK, write_fp8
from helpers.transformers_shared import assert_ours, logits_of
from zemoe.checkpoints.files import INDEX_NAME, CheckpointError
from zemoe.checkpoints.fp8 import SUFFIX, dequantize, save_dequantized, stream_dequantized, verify_quantized
from zemoe.checkpoints.longcat import verify

# Fixtures
transformers_is_left_as_it_was = transformers_shared.transformers_is_left_as_it_was
ids = transformers_shared.ids
stock = transformers_shared.stock
folders = transformers_shared.folders


@pytest.fixture(scope="module")
def fp8(folders, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder in the published layout, all factors in a file of their own; and the plain tensors that it means."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    return folder, write_fp8(folders["original"], folder)


def test_every_weight_is_dequantized(fp8):
    folder, meant = fp8
    found = dict(stream_dequantized(verify_quantized(folder), torch.float32))
    assert found.keys() == meant.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, meant[name]), name
    assert any(tensor.shape[0] % BLOCK[0] for name, tensor in found.items() if "_proj" in name)


def test_dequantize_rounds_once():
    weight = torch.tensor([[448.0, 1.125]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.01, 3e-3]], dtype=torch.float32)
    found = dequantize(weight, scale, (1, 1), torch.bfloat16)
    assert torch.equal(found, (weight.double() * scale.double()).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", ["auto", torch.float32, "float32"])
def test_the_model_loads(fp8, stock, ids, dtype):
    folder, meant = fp8
    model = bridge.load_model(folder, dtype=dtype)
    assert_ours(model, torch.bfloat16 if dtype == "auto" else torch.float32)
    router, theirs = model.model.layers[1].mlp.router, stock.model.layers[1].mlp.router
    assert torch.equal(router.classifier.weight, theirs.classifier.weight)
    assert torch.equal(router.e_score_correction_bias, theirs.e_score_correction_bias)
    assert not model.training and getattr(model.config, "quantization_config", None) is None
    if dtype != "auto":
        expected = copy.deepcopy(stock)
        bridge.patch_(expected)
        for layer in range(2):
            experts = expected.model.layers[layer].mlp.experts
            for e in range(5):
                gate, up, down = (
                    meant[f"model.layers.{layer}.mlp.experts.{e}.{which}_proj.weight"]
                    for which in ("gate", "up", "down")
                )
                experts.gate_up_proj.data[e], experts.down_proj.data[e] = torch.cat([gate, up]), down
        plain = {name: t for name, t in meant.items() if ".mlp.experts." not in name}
        expected.load_state_dict(plain, strict=False)
        assert torch.equal(logits_of(model, ids), logits_of(expected, ids))


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_from_pretrained_says_what_to_call_instead(fp8, dequantize, by_name):
    asked: dict = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if dequantize else {}
    if by_name:
        bridge.register()
        asked["experts_implementation"] = "zemoe"
    else:
        bridge.apply()
    with pytest.raises(ValueError, match=r"load_model, which dequantizes.*save_dequantized"):
        LongcatFlashForCausalLM.from_pretrained(fp8[0], **asked)
    bridge.unapply()
    bridge.unregister()


def test_a_plain_checkpoint_is_written(fp8, tmp_path, ids):
    folder, _ = fp8
    manifest = save_dequantized(folder, tmp_path / "plain", torch.float32, max_shard_bytes=60_000)
    assert len(manifest.files) > 1
    assert verify(tmp_path / "plain").layout == "original"
    found = bridge.load_model(tmp_path / "plain")
    assert torch.equal(logits_of(found, ids), logits_of(bridge.load_model(folder, dtype=torch.float32), ids))


def changed(folder: Path, target: Path, file: int, change) -> Path:
    for source in folder.iterdir():
        (target / source.name).write_bytes(source.read_bytes())
    path = target / f"model-0000{file}-of-00002.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    content = json.loads((target / INDEX_NAME).read_text())
    index = content["weight_map"]
    index = {name: where for name, where in index.items() if where != path.name} | dict.fromkeys(tensors, path.name)
    (target / INDEX_NAME).write_text(json.dumps(content | {"weight_map": index}))
    return target


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (2, lambda t: t.pop(NAME + SUFFIX), rf"{NAME} has no {NAME}_scale_inv"),
        (2, lambda t: t.update({NAME + SUFFIX: torch.ones(1, 2)}), r"_scale_inv must be float with shape \[2, 2\]"),
        (2, lambda t: t.update({NAME + SUFFIX: torch.ones(2, 2, dtype=torch.int32)}), r"must be float.*got I32"),
        (1, lambda t: t.update({NAME: t[NAME].float()}), rf"{NAME} has dtype F32, but also a"),
        (1, lambda t: t.pop(NAME), rf"{NAME} \[24, 32\] is missing"),
    ],
)
def test_damaged_checkpoints_are_refused(fp8, tmp_path, file, change, words):
    folder = changed(fp8[0], tmp_path, file, change)
    with pytest.raises(CheckpointError, match=words):
        bridge.load_model(folder)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq"}, "quant_method must be 'fp8'"),
        ("fp8", "quant_method must be 'fp8'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt must be 'e4m3', got 'e5m2'"),
        ({"quant_method": "fp8"}, "weight_block_size must be two integers >= 1, got None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size must be two.*got \[128, 0\]"),
    ],
)
def test_other_quantizations_are_refused(fp8, tmp_path, quantization, words):
    config = json.loads((fp8[0] / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        bridge.load_model(tmp_path)
