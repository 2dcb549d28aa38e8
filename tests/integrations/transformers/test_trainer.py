"""transformers' Trainer goes on from its checkpoints, and loads the best of them, with our layers' weights in it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import zemoe.integrations.transformers as bridge
from helpers import transformers_shared
from helpers.families import FAMILIES
from helpers.transformers_tiny import tiny_model
from zemoe.integrations.transformers.retrofit import retrofit_, unretrofit_

# Fixtures
transformers_is_left_as_it_was = transformers_shared.transformers_is_left_as_it_was
stock = transformers_shared.stock
folders = transformers_shared.folders


def longcat(stock) -> nn.Module:
    model = copy.deepcopy(stock)
    bridge.patch_(model)
    return model


def retrofitted(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    retrofit_(model, 3, generator=torch.Generator().manual_seed(0))
    return model


MODELS = {"longcat": longcat} | {f: (lambda stock, family=f: retrofitted(family)) for f in FAMILIES}


def trainer(model: nn.Module, folder, **changes) -> Trainer:
    ids = torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    options = {
        "max_steps": 6,
        "learning_rate": 3e-2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    } | changes
    arguments = TrainingArguments(output_dir=str(folder), **options)
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_a_resumed_run_ends_as_one_that_never_stopped(stock, made, tmp_path):
    whole = trainer(made(stock), tmp_path / "whole")
    whole.train()
    again = trainer(made(stock), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(parameters(again.model), parameters(whole.model))
    assert again.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_the_best_model_is_the_best(stock, made, tmp_path):
    """Best is what has the largest loss here, the first checkpoint, so that loading it changes every weight."""
    run = trainer(
        made(stock),
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    run.train()
    best = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert best["best_global_step"] == 2
    assert run.evaluate()["eval_loss"] == best["best_metric"]


@pytest.mark.parametrize("layout", ["original", "transformers", "packed"])
def test_a_state_dict_of_each_layout_loads(stock, folders, layout):
    """Strictly, in one piece and in shards; stock's dead rows are dropped."""
    expected, tensors = parameters(longcat(stock)), load_file(folders[layout] / "model.safetensors")
    model = longcat(stock)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(tensors)
    assert_same(parameters(model), expected)
    for parameter in model.parameters():
        parameter.data.zero_()
    names = sorted(tensors)
    for i in range(3):  # an expert's tensors in different shards
        result = model.load_state_dict({name: tensors[name] for name in names[i::3]}, strict=False)
        assert result.missing_keys and not result.unexpected_keys
    assert_same(parameters(model), expected)
    with torch.device("meta"):
        empty = longcat(tiny_model())
    empty.load_state_dict(tensors, assign=True)
    assert_same(parameters(empty), expected)


def test_a_state_dict_that_does_not_fit(stock, folders):
    tensors = load_file(folders["original"] / "model.safetensors")
    experts = "model.layers.1.mlp.experts."
    model, before = longcat(stock), parameters(stock)
    for name, value, words in (
        (
            "4.up_proj.weight",
            tensors[experts + "4.up_proj.weight"][:-1],
            r"4.up_proj.weight must have shape \(24, 32\)",
        ),
        ("8.up_proj.weight", tensors[experts + "4.up_proj.weight"], "Unexpected key.*8.up_proj"),
        ("4.up_proj.weight", None, "Missing key.*4.up_proj"),
    ):
        changed = tensors | {experts + name: value}
        if value is None:
            del changed[experts + name]
        with pytest.raises(RuntimeError, match=words):
            model.load_state_dict(changed)
    model.load_state_dict({}, strict=False)
    assert torch.equal(parameters(model)[experts + "down_proj"], before[experts + "down_proj"])


def test_a_retrofit_that_is_taken_back_loads_as_before(tmp_path):
    model = retrofitted("mixtral")
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(model)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any("block_sparse_moe" in name for name in tensors)
    again.load_state_dict(tensors)
    assert_same(parameters(again), parameters(model))
    unretrofit_(model)
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
