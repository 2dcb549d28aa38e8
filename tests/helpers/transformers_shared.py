"""What the tests of LongCat-Flash in transformers share: stock's model, its checkpoints, and who judges."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    LongcatFlashForCausalLM,
    conversion_mapping,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.longcat_flash import modeling_longcat_flash as modeling

import zemoe.integrations.transformers as bridge
from helpers.transformers_tiny import tiny_ids, tiny_model

StockMoE = modeling.LongcatFlashMoE
TOLERANCE = 1e-5  # float32 logits, absolute; they are of order 1


def global_state() -> tuple:
    """All that `apply` touches in transformers."""
    conversions = conversion_mapping.get_checkpoint_conversion_mapping("longcat_flash")
    return (
        modeling.LongcatFlashMoE,
        dict(vars(modeling.LongcatFlashPreTrainedModel)),
        sorted(ALL_EXPERTS_FUNCTIONS.keys()),
        "longcat_flash" in conversion_mapping.USER_REGISTERED_MAPPINGS,
        [repr(conversion) + repr(conversion.operations) for conversion in conversions],
    )


STOCK_STATE = global_state()


@pytest.fixture(autouse=True)
def transformers_is_left_as_it_was() -> Iterator[None]:
    assert global_state() == STOCK_STATE  # at first: importing the bridge changed nothing
    yield
    leaked = global_state() != STOCK_STATE
    bridge.unapply()
    bridge.unregister()
    assert not leaked
    assert global_state() == STOCK_STATE


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return tiny_ids()


@pytest.fixture(scope="module")
def stock() -> LongcatFlashForCausalLM:
    """Never changed by a test: patch a deepcopy."""
    return tiny_model()


@pytest.fixture(scope="module")
def stock_logits(stock, ids) -> torch.Tensor:
    with torch.no_grad():
        return stock(ids).logits


@pytest.fixture(scope="module")
def folders(stock, tmp_path_factory) -> dict[str, Path]:
    """The same model in each layout; stock itself wrote all but the original one."""
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in ("original", "transformers", "packed")}
    stock.save_pretrained(folders["transformers"])
    stock.save_pretrained(folders["packed"], save_original_format=False)
    patched = copy.deepcopy(stock)
    bridge.patch_(patched)
    patched.save_pretrained(folders["original"])
    return folders


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def greedy(model, ids: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, **options)


def assert_ours(model, dtype: torch.dtype = torch.float32) -> None:
    for layer in model.model.layers:
        experts, router = layer.mlp.experts, layer.mlp.router
        assert type(layer.mlp) is bridge.ZeroExpertLongcatMoE
        assert tuple(experts.gate_up_proj.shape) == (5, 48, 32)
        assert tuple(experts.down_proj.shape) == (5, 32, 24)
        assert experts.gate_up_proj.untyped_storage().nbytes() == experts.gate_up_proj.nbytes  # no dead rows behind it
        assert experts.gate_up_proj.dtype == dtype
        assert router.classifier.weight.dtype == router.e_score_correction_bias.dtype == torch.float32
