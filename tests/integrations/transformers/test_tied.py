"""A config that says tied, of a head with values of its own: it is loaded, trained and saved, never dropped."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LongcatFlashForCausalLM

import zemoe.integrations.transformers as bridge
from helpers import training_worker, transformers_shared
from helpers.tiny_checkpoint import write_checkpoint, write_fp8
from helpers.training_worker import settings_for
from helpers.transformers_shared import TOLERANCE, logits_of
from helpers.transformers_tiny import tiny_ids
from helpers.zeda import written as zeda_written
from zemoe.integrations.transformers.zeda import load_zeda
from zemoe.training.run import train
from zemoe.training.settings import make

# Fixtures
transformers_is_left_as_it_was = transformers_shared.transformers_is_left_as_it_was
on_one_thread = training_worker.on_one_thread

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def with_head(folder, target, factor: float | None):
    """A copy of a checkpoint whose config says tied, with a head of `factor` times the embedding, or none."""
    shutil.copytree(folder, target)
    path = next(path for path in target.glob("*.safetensors") if EMBEDDING in load_file(path))
    for other in target.glob("*.safetensors"):
        tensors = load_file(other)
        tensors.pop(HEAD, None)
        if other == path and factor is not None:
            tensors[HEAD] = (tensors[EMBEDDING] * factor).contiguous()
        save_file(tensors, other, metadata={"format": "pt"})
    index = target / "model.safetensors.index.json"
    if index.exists():
        about = json.loads(index.read_text())
        about["weight_map"].pop(HEAD, None)
        about["weight_map"] |= {HEAD: path.name} if factor is not None else {}
        index.write_text(json.dumps(about))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return target


def is_tied(model) -> bool:
    return model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("factor", "tied"), [(None, True), (1.0, True), (-0.5, False)])
def test_export(tmp_path, factor, tied):
    folder = with_head(write_checkpoint(tmp_path / "plain"), tmp_path / "model", factor)
    model = bridge.load_model(folder)
    assert is_tied(model) == tied
    expected = logits_of(LongcatFlashForCausalLM.from_pretrained(bridge_export(model, tmp_path / "out")), tiny_ids())
    assert (logits_of(model, tiny_ids()) - expected).abs().max() < TOLERANCE
    assert (HEAD in load_file(tmp_path / "out" / "model.safetensors")) == (not tied)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == tied
    assert model.config.tie_word_embeddings


def bridge_export(model, folder):
    bridge.export(model, folder)
    return folder


@pytest.mark.parametrize(("factor", "tied"), [(None, True), (-0.5, False)])
def test_zemoe_train_from_a_checkpoint(tmp_path, on_one_thread, factor, tied):
    """With next to no learning rate the export has to compute what the start does."""
    plain = write_checkpoint(tmp_path / "plain", eos_token_id=0, bos_token_id=None)
    start = with_head(plain, tmp_path / "start", factor)
    overrides = ["train.steps=1", "train.learning_rate=1e-9", "train.bias_rate=0"]
    settings = settings_for(tmp_path, "out", *overrides).as_dict() | {"model": {"start": str(start)}}
    train(make(settings, "test"), resume=False, listener=lambda _: None)
    export = tmp_path / "out" / "export"
    ids = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    found, wanted = (logits_of(bridge.load_model(folder), ids) for folder in (export, start))
    assert (found - wanted).abs().max() < 1e-4
    tensors = load_file(export / "model.safetensors")
    assert (HEAD in tensors) == (not tied)
    assert json.loads((export / "config.json").read_text())["tie_word_embeddings"] == tied


@pytest.mark.parametrize("factor", [None, 1.0, -0.5])
def test_zeda(tmp_path, factor):
    """As transformers loads the base model: both, where both are there and differ."""
    family = "qwen3_moe_plus_plus"
    (tmp_path / "plain").mkdir()
    zeda_written(family, tmp_path / "plain")
    folder = with_head(tmp_path / "plain", tmp_path / "model", factor)
    model = load_zeda(folder, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, tensors[EMBEDDING])
    assert torch.equal(model.lm_head.weight, tensors.get(HEAD, tensors[EMBEDDING]))
    assert is_tied(model) == (factor != -0.5)


@pytest.mark.parametrize("factor", [None, 1.0, -0.5])
def test_fp8(tmp_path, factor):
    meant = write_fp8(with_head(write_checkpoint(tmp_path / "plain"), tmp_path / "model", factor), tmp_path / "fp8")
    model = bridge.load_model(tmp_path / "fp8", dtype=torch.float32)
    assert torch.equal(model.model.embed_tokens.weight, meant[EMBEDDING])
    assert torch.equal(model.lm_head.weight, meant.get(HEAD, meant[EMBEDDING]))
    assert is_tied(model) == (factor != -0.5)
