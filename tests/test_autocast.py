"""torch.autocast around a forward, a backward or both: the same gradients, and routing in float32 throughout.

T tokens, H hidden size, I expert width, E FFN experts, A slots, K choices.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from helpers.judge import Case, assert_bitwise, one_thread
from zemoe import AffineParams, MoE, MoEConfig, fused_experts
from zemoe.integrations.engines.from_logits import moe_from_logits

KINDS = (("constant", 2), ("identity", 1), ("scaled_identity", 1), ("zero", 1))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def autocast(on: bool) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


def _case(T: int) -> Case:
    return Case("autocast", "", T=T, H=16, I=8, E=4, kinds=KINDS, K=3)


def _experts(case: Case, dtype: torch.dtype, backend: str, forward: bool, backward: bool) -> list[Tensor]:
    """Output and gradients; `forward`, `backward`: which of them are inside of autocast."""
    inputs = case.inputs(dtype)
    assert inputs.affine is not None
    tensors = [*inputs[:4], *inputs.affine]
    x, w13, w2, weights, *affine = leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    rules = {"num_experts": case.E, "zero_expert_kinds": KINDS, "affine_params": AffineParams(*affine)}
    with autocast(forward):
        out = fused_experts(x, w13, w2, weights, inputs.ids_TK, backend=backend, **rules)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    with autocast(backward):
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _error(got: Tensor, wanted: Tensor) -> float:
    difference = (got.double() - wanted.double()).abs().max()
    return float(difference / wanted.double().abs().max()) if difference else 0.0


@pytest.mark.parametrize("forward", [False, True], ids=["", "forward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("T", [1, 7, 60])
def test_backward_of_experts(T: int, backend: str, dtype: torch.dtype, forward: bool):
    with one_thread():
        wanted = _experts(_case(T), dtype, backend, forward, False)
        got = _experts(_case(T), dtype, backend, forward, True)
    for n, (mine, other) in enumerate(zip(got, wanted, strict=True)):
        assert mine.dtype == other.dtype
        if backend == "cpu" and n not in (1, 5):  # x and constant_router, between which torch's own product stands
            assert_bitwise(mine, other)
        assert _error(mine, other) <= 0.01


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("T", [1, 7, 60])
def test_forward_of_experts(T: int, backend: str, trained: bool):
    """As if x, w13 and w2 had been rounded by hand: nothing else is rounded."""
    case = _case(T)
    inputs = case.inputs()
    rounded = inputs._replace(x_TH=inputs.x_TH.bfloat16(), w13=inputs.w13.bfloat16(), w2=inputs.w2.bfloat16())
    results = []
    for x, w13, w2, weights, ids, affine in (inputs, rounded):
        leaf = x.clone().requires_grad_(trained)
        with autocast(x is inputs.x_TH), one_thread():
            rules = {"num_experts": case.E, "zero_expert_kinds": KINDS, "affine_params": affine, "backend": backend}
            results.append(fused_experts(leaf, w13, w2, weights, ids, **rules))
    assert_bitwise(*results)


@pytest.mark.parametrize("T", [1, 60])
def test_layer(T: int):
    """Routing is the same to the bit inside of autocast; gradients are as near as bfloat16 lets them be."""
    torch.manual_seed(0)
    layer = MoE(MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=3, zero_expert_kinds=KINDS))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    x = torch.randn(T, 16)
    results = []
    for forward in (False, True):
        for backward in (False, True):
            leaf = x.clone().requires_grad_()
            with autocast(forward), one_thread():
                out, routing = layer(leaf, return_routing=True)
            loss = out.float().square().sum() + routing.logits_TA.square().sum()
            with autocast(backward), one_thread():
                gradients = torch.autograd.grad(loss, [leaf, *layer.parameters()])
            results.append((routing, gradients))
    first, wanted = results[0]
    for routing, gradients in results[1:]:
        for mine, other in zip(routing, first, strict=True):
            assert_bitwise(mine, other)
        for mine, other in zip(gradients, wanted, strict=True):
            assert mine.dtype == torch.float32
            assert _error(mine, other) <= 0.03


def test_operator_for_engines():
    """It returns what a compiler was told."""
    inputs = _case(7).inputs()
    logits, bias = torch.randn(7, 9), torch.zeros(9)
    arguments = (inputs.x_TH, logits, bias, inputs.w13, inputs.w2)
    with autocast(True):
        assert moe_from_logits(*arguments, top_k=3, scaling=1.0).dtype == torch.float32
