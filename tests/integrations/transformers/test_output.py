"""The output of our layers in transformers' models is no view, so that a residual may be added in place under FSDP."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import zemoe.integrations.transformers as bridge
from helpers import transformers_shared
from helpers.families import FAMILIES
from zemoe.integrations.transformers.moepp_model import MoEPlusPlusBlock, MoEPlusPlusConfig
from zemoe.integrations.transformers.retrofit import retrofit_

# Fixtures
transformers_is_left_as_it_was = transformers_shared.transformers_is_left_as_it_was
stock = transformers_shared.stock


def longcat(stock) -> nn.Module:
    model = copy.deepcopy(stock)
    bridge.patch_(model)
    return model.model.layers[0].mlp


def retrofitted(stock) -> nn.Module:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(next(iter(FAMILIES.values()))))
    retrofit_(model, 3, generator=torch.Generator().manual_seed(0))
    return model.model.layers[1].mlp


def moe_plus_plus(stock) -> nn.Module:
    config = MoEPlusPlusConfig(hidden_size=32, intermediate_size=16, num_experts=[8], num_attention_heads=2)
    block = MoEPlusPlusBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("made", [longcat, retrofitted, moe_plus_plus])
def test_the_output_is_no_view(stock, made, gradients):
    layer = made(stock)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(gradients):
        out = layer(x)
        y = out[0] if isinstance(out, tuple) else out
        assert y.shape == x.shape and not y._is_view() and y._base is None
        before = x.clone()
        y += x
        assert torch.equal(x, before)
