"""The operators of routing on CUDA devices, differentiable: router logits, and the choice of experts.

T tokens, H hidden size, A slots, R rows of the router weight, E FFN experts, K choices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._compat import inside_forward_mode
from ..kernels.triton import tiles
from ..scores import weights_of
from .library import define, flat, implement_on_cuda, pairs, with_rows, without_autocast

if TYPE_CHECKING:
    from ..config import RoutingRules

MOST_SLOTS, MOST_CHOICES = tiles.MOST_SLOTS, tiles.MOST_CHOICES
DTYPES = (torch.bfloat16, torch.float16)  # of the hidden states
KERNEL_SCORES = ("softmax", "sigmoid", "sqrtsoftplus")  # the names of zemoe.scores.SCORES that the kernels know

# --- router_logits: float32 logits of bfloat16 or float16 hidden states ---

define("router_logits(Tensor x, Tensor weight) -> Tensor")


@implement_on_cuda("router_logits")
def _router_logits_cuda(x: Tensor, weight: Tensor) -> Tensor:
    from ..kernels.triton.router_logits import router_logits

    return router_logits(with_rows(x), with_rows(weight))


@torch.library.register_fake("zemoe::router_logits")
def _router_logits_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


define("router_logits_backward(Tensor grad, Tensor x, Tensor weight, bool[2] needs) -> (Tensor, Tensor)")


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two bfloat16 matrices in float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


@implement_on_cuda("router_logits_backward")
def _router_logits_backward_cuda(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Compute both gradients from products of bfloat16 parts, as the forward does: tensor cores take no float32."""
    from ..kernels.triton.router_logits_backward import bfloat16_parts

    R = weight.shape[0]
    grad_T3R = bfloat16_parts(with_rows(grad), low=1, beside=True)
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    with without_autocast(x.device):
        if needs[0]:
            weight_3RH = bfloat16_parts(with_rows(weight), low=2, beside=False)
            exact = x.dtype == torch.bfloat16
            dx = grad_T3R @ weight_3RH if exact else _product(grad_T3R, weight_3RH).to(x.dtype)
        if needs[1]:
            both = grad_T3R[:, : 2 * R].T
            if x.dtype == torch.bfloat16:
                sums = _product(both, x)
            else:
                x_T3H = bfloat16_parts(with_rows(x).float(), low=1, beside=True)
                H = x.shape[1]
                sums = _product(both, x_T3H[:, :H]) + _product(both, x_T3H[:, H : 2 * H])
            dweight = sums[:R] + sums[R:]
    return dx, dweight


@torch.library.register_fake("zemoe::router_logits_backward")
def _router_logits_backward_fake(grad, x, weight, needs) -> tuple[Tensor, Tensor]:
    return tuple(like.new_empty(like.shape if need else 0) for like, need in zip((x, weight), needs, strict=True))


def _router_logits_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _router_logits_autograd(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs, (x, weight) = list(ctx.needs_input_grad), ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative may follow, which torch knows
        with without_autocast(x.device):
            found = (grad @ weight).to(x.dtype), grad.T @ x.float()
    else:
        found = torch.ops.zemoe.router_logits_backward(grad, x, weight, needs)
    return tuple(gradient if need else None for gradient, need in zip(found, needs, strict=True))


torch.library.register_autograd("zemoe::router_logits", _router_logits_autograd, setup_context=_router_logits_context)


def takes_router_logits(x_TH: Tensor, weight_RH: Tensor) -> bool:
    """Return whether `router_logits` can multiply these; it has no forward-mode derivative."""
    return x_TH.dtype in DTYPES and weight_RH.dtype == torch.float32 and not inside_forward_mode()


def router_logits(x_TH: Tensor, weight_RH: Tensor) -> Tensor:
    """Return float32 [T, R]: x times the transposed float32 weight, on tensor cores, as exact as a float32 product.

    The weight's gradient is as exact as in float32; that of x is exact to more bits than x has.
    """
    return torch.ops.zemoe.router_logits(x_TH, weight_RH)


# --- select_experts: the weights and ids of the K best slots ---

define(
    "select_experts(Tensor logits, Tensor? bias, int k, int num_experts, str scoring, str renormalize, float scaling, "
    "int num_expert_group, int topk_group, int[] null_ranges) -> (Tensor, Tensor)",
    vmap=False,
)


@implement_on_cuda("select_experts")
def _select_experts_cuda(
    logits, bias, k, num_experts, scoring, renormalize, scaling, num_expert_group, topk_group, null_ranges
) -> tuple[Tensor, Tensor]:
    from ..kernels.triton.select_experts import select_experts

    return select_experts(
        logits,
        k,
        num_experts=num_experts,
        scoring=scoring,
        renormalize=renormalize,
        bias=None if bias is None else bias.contiguous(),
        scaling=scaling,
        num_expert_group=num_expert_group or None,
        topk_group=topk_group or None,
        null_ranges=pairs(null_ranges),
    )


@torch.library.register_fake("zemoe::select_experts")
def _select_experts_fake(
    logits, bias, k, num_experts, scoring, renormalize, scaling, num_expert_group, topk_group, null_ranges
) -> tuple[Tensor, Tensor]:
    T = logits.shape[0]
    return logits.new_empty((T, k)), logits.new_empty((T, k), dtype=torch.int64)


define(
    "select_experts_backward(Tensor grad, Tensor logits, Tensor ids, int num_experts, str scoring, str renormalize, "
    "float scaling, int[] null_ranges) -> Tensor"
)


@implement_on_cuda("select_experts_backward")
def _select_experts_backward_cuda(grad, logits, ids, num_experts, scoring, renormalize, scaling, null_ranges) -> Tensor:
    from ..kernels.triton.select_experts_backward import select_experts_backward

    return select_experts_backward(
        grad.contiguous(),
        logits,
        ids,
        num_experts=num_experts,
        scoring=scoring,
        renormalize=renormalize,
        scaling=scaling,
        null_ranges=pairs(null_ranges),
    )


@torch.library.register_fake("zemoe::select_experts_backward")
def _select_experts_backward_fake(grad, logits, ids, num_experts, scoring, renormalize, scaling, null_ranges) -> Tensor:
    return logits.new_empty(logits.shape)


def _select_experts_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, *rules, _, _, null_ranges = inputs
    ctx.rules = *rules, null_ranges
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _select_experts_autograd(ctx, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 10
    logits, ids = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative may follow, which torch knows
        *rules, null_ranges = ctx.rules
        weights = weights_of(logits, ids, *rules, null_ranges=pairs(null_ranges))
        (dlogits,) = torch.autograd.grad(weights, logits, grad, create_graph=True)
    else:
        dlogits = torch.ops.zemoe.select_experts_backward(grad, logits, ids, *ctx.rules)
    return dlogits, *(None,) * 9


torch.library.register_autograd(
    "zemoe::select_experts", _select_experts_autograd, setup_context=_select_experts_context
)


def takes_select_experts(logits_TA: Tensor, rules: RoutingRules) -> bool:
    """Return whether `select_experts` can choose by these rules; it has no forward-mode derivative."""
    fits = logits_TA.shape[1] <= MOST_SLOTS and rules.top_k <= MOST_CHOICES and rules.scoring_func in KERNEL_SCORES
    return fits and not inside_forward_mode()


def select_experts(logits_TA: Tensor, rules: RoutingRules, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (weights [T, K] float32, ids [T, K] int64) of float32 logits; zemoe.routing.select_experts checks.

    Weights are differentiable in the logits. bias: float32, at most A long, 0 for the slots beyond it.
    """
    return torch.ops.zemoe.select_experts(
        logits_TA,
        bias,
        rules.top_k,
        rules.num_experts,
        rules.scoring_func,
        rules.renormalize,
        rules.routed_scaling_factor,
        rules.num_expert_group or 0,
        rules.topk_group or 0,
        flat(rules.null_ranges),
    )
