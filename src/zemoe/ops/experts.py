"""The operators from routing weights and ids to weighted sums of experts, for any device.

T tokens, H hidden size, I expert width, E FFN experts, A slots, K choices, N = T * K row bound, C constant experts.

A new device is one `implement` line an operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import grouped
from ..kernels.cpu import experts as cpu_experts
from .library import define, implement, rows_like, without_autocast

if TYPE_CHECKING:
    from ..affine import AffineTerms
    from ..plan import RoutingPlan

# --- plan: rows sorted by expert ---

define("plan(Tensor topk_ids, int num_experts, int num_slots) -> (Tensor, Tensor, Tensor)", vmap=False)
implement("plan", "CompositeExplicitAutograd", grouped.make_plan)  # any device but the CPU


def _plan_cpu(topk_ids: Tensor, num_experts: int, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    cpu_experts.check_ids(topk_ids, num_slots)
    return cpu_experts.make_plan(topk_ids, num_experts)


implement("plan", "CPU", _plan_cpu)


@torch.library.register_fake("zemoe::plan")
def _plan_fake(topk_ids: Tensor, num_experts: int, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    M, K = topk_ids.shape
    new = torch.int64
    return (
        topk_ids.new_empty(M * K, dtype=new),
        topk_ids.new_empty((M, K), dtype=new),
        topk_ids.new_empty(num_experts + 1, dtype=new),
    )


def plan(topk_ids_MK: Tensor, num_experts: int, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three int64 tensors of zemoe.plan.RoutingPlan; num_slots -1 means that ids have no upper bound."""
    return torch.ops.zemoe.plan(topk_ids_MK, num_experts, num_slots)


# --- moe_ffn: x and weights to weighted sums, in one differentiable op ---

define(
    "moe_ffn(Tensor x, Tensor weights, Tensor row_token, Tensor slot_row, Tensor expert_offsets, Tensor w13, "
    "Tensor w2, Tensor alpha, Tensor? beta, Tensor? value, str activation, bool save_preact) -> (Tensor, Tensor)",
    vmap=False,
)
define(
    "moe_ffn_backward(Tensor grad, Tensor x, Tensor weights, Tensor row_token, Tensor slot_row, Tensor expert_offsets, "
    "Tensor w13, Tensor w2, Tensor alpha, Tensor? beta, Tensor? value, Tensor preact, str activation, bool[7] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
implement("moe_ffn", "CPU", cpu_experts.moe_ffn)
implement("moe_ffn_backward", "CPU", cpu_experts.moe_ffn_backward)


@torch.library.register_fake("zemoe::moe_ffn")
def _moe_ffn_fake(
    x, weights, row_token, slot_row, expert_offsets, w13, w2, alpha, beta, value, activation, save_preact
) -> tuple[Tensor, Tensor]:
    return rows_like(x), x.new_empty((row_token.shape[0] if save_preact else 0, w13.shape[1]))


@torch.library.register_fake("zemoe::moe_ffn_backward")
def _moe_ffn_backward_fake(
    grad, x, weights, row_token, slot_row, expert_offsets, w13, w2, alpha, beta, value, preact, activation, needs
) -> tuple[Tensor, ...]:
    inputs = (x, weights, w13, w2, alpha, beta, value)
    made = (rows_like, rows_like, torch.empty_like, torch.empty_like, rows_like, rows_like, rows_like)
    return tuple(
        make(tensor) if need and tensor is not None else x.new_empty(0)
        for tensor, make, need in zip(inputs, made, needs, strict=True)
    )


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, _ = inputs
    preact = output[1]
    ctx.mark_non_differentiable(preact)
    ctx.save_for_backward(*tensors, preact)
    ctx.activation = activation


def _moe_ffn_autograd(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, preact = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 5, 6, 7, 8, 9)]
    grads = torch.ops.zemoe.moe_ffn_backward(grad.contiguous(), *tensors, preact, ctx.activation, wanted)
    dx, dweights, dw13, dw2, dalpha, dbeta, dvalue = (
        grad if need else None for grad, need in zip(grads, wanted, strict=True)
    )
    return dx, dweights, None, None, None, dw13, dw2, dalpha, dbeta, dvalue, None, None


torch.library.register_autograd("zemoe::moe_ffn", _moe_ffn_autograd, setup_context=_setup_context)


def _no_second_derivative(ctx, *grads: Tensor) -> None:
    raise RuntimeError("moe_ffn has no second derivative, its backward is written out by hand; use backend='torch'")


# Without this, torch would leave the term out of a second derivative and only warn.
torch.library.register_autograd("zemoe::moe_ffn_backward", _no_second_derivative)


def moe_ffn(
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: RoutingPlan,
    w13: Tensor,
    w2: Tensor,
    terms: AffineTerms,
    activation: str,
) -> Tensor:
    """Compute y_t = sum_k w_tk * down(act(gate(x_t)) * up(x_t)) + alpha_t x_t + beta_t @ V, [T, H] in x's dtype.

    The sum is over the choices that have a row in the plan. x [T, H], w13 [E, 2I, H] and w2 [E, H, I] have one dtype;
    weights, alpha and beta are float32 (float64 with float64 x); V = value [C, H]. Differentiable in all of them.
    """
    trained = (x_TH, weights_TK, w13, w2)
    save_preact = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    return torch.ops.zemoe.moe_ffn(x_TH, weights_TK, *plan, w13, w2, *terms, activation, save_preact)[0]


# --- moe_ffn_from_ids: plan and moe_ffn in one, without gradients ---

define(
    "moe_ffn_from_ids(Tensor x, Tensor weights, Tensor topk_ids, Tensor w13, Tensor w2, Tensor alpha, Tensor? beta, "
    "Tensor? value, int num_slots, str activation) -> Tensor",
    vmap=False,
)
implement("moe_ffn_from_ids", "CPU", cpu_experts.moe_ffn_from_ids)


@torch.library.register_fake("zemoe::moe_ffn_from_ids")
def _moe_ffn_from_ids_fake(x, weights, topk_ids, w13, w2, alpha, beta, value, num_slots, activation) -> Tensor:
    return rows_like(x)


def moe_ffn_from_ids(
    x_TH: Tensor,
    weights_TK: Tensor,
    topk_ids_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    terms: AffineTerms,
    num_slots: int,
    activation: str,
) -> Tensor:
    """Return what `moe_ffn` does for the plan of these ids, [T, H], in one operator and without gradients.

    topk_ids_TK and num_slots are the arguments of `plan`, the others those of `moe_ffn`.
    """
    return torch.ops.zemoe.moe_ffn_from_ids(x_TH, weights_TK, topk_ids_TK, w13, w2, *terms, num_slots, activation)


# --- moe_ffn_few: few choices, identities included, in one loop, without gradients ---

define(
    "moe_ffn_few(Tensor x, Tensor weights, Tensor topk_ids, Tensor w13, Tensor w2, int identities, int num_slots) "
    "-> Tensor",
    vmap=False,
)
implement("moe_ffn_few", "CPU", cpu_experts.moe_ffn_few)
takes_moe_ffn_few = cpu_experts.takes_moe_ffn_few


@torch.library.register_fake("zemoe::moe_ffn_few")
def _moe_ffn_few_fake(x, weights, topk_ids, w13, w2, identities, num_slots) -> Tensor:
    return rows_like(x)


def moe_ffn_few(
    x_TH: Tensor, weights_TK: Tensor, topk_ids_TK: Tensor, w13: Tensor, w2: Tensor, identities: int, num_slots: int
) -> Tensor:
    """Return [T, H]: a layer whose zero-computation experts are identities, where `takes_moe_ffn_few` says so.

    x, w13 and w2 are float32 or bfloat16. identities: Z. num_slots: A, -1 if ids have no upper bound. No gradients.
    """
    return torch.ops.zemoe.moe_ffn_few(x_TH, weights_TK, topk_ids_TK, w13, w2, identities, num_slots)


# --- gather_rows, sum_rows, grouped_linear, grouped_outer: what the `torch` backend is made of ---

define("gather_rows(Tensor x, Tensor row_token, Tensor slot_row) -> Tensor")
define("sum_rows(Tensor rows, Tensor slot_row, Tensor row_token) -> Tensor")
implement("gather_rows", "CompositeExplicitAutograd", grouped.gather_rows)
implement("sum_rows", "CompositeExplicitAutograd", grouped.sum_rows)


@torch.library.register_fake("zemoe::gather_rows")
def _gather_rows_fake(x: Tensor, row_token: Tensor, slot_row: Tensor) -> Tensor:
    return x.new_empty((row_token.shape[0], x.shape[1]))


@torch.library.register_fake("zemoe::sum_rows")
def _sum_rows_fake(rows: Tensor, slot_row: Tensor, row_token: Tensor) -> Tensor:
    return rows.new_empty((slot_row.shape[0], rows.shape[1]), dtype=torch.promote_types(rows.dtype, torch.float32))


# Each is the other's backward. Plain indexing would add the many padding rows to one token, one after the other.
def _save_indices(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.dtype = inputs[0].dtype


def _gather_rows_autograd(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    row_token, slot_row = ctx.saved_tensors
    return torch.ops.zemoe.sum_rows(grad, slot_row, row_token).to(ctx.dtype), None, None


def _sum_rows_autograd(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    slot_row, row_token = ctx.saved_tensors
    return torch.ops.zemoe.gather_rows(grad.to(ctx.dtype), row_token, slot_row), None, None


torch.library.register_autograd("zemoe::gather_rows", _gather_rows_autograd, setup_context=_save_indices)
torch.library.register_autograd("zemoe::sum_rows", _sum_rows_autograd, setup_context=_save_indices)

define("grouped_linear(Tensor rows, Tensor weight, Tensor expert_offsets) -> Tensor")
define("grouped_outer(Tensor left, Tensor right, Tensor expert_offsets) -> Tensor")
implement("grouped_linear", "CompositeExplicitAutograd", grouped.linear)
implement("grouped_outer", "CompositeExplicitAutograd", grouped.outer)


@torch.library.register_fake("zemoe::grouped_linear")
def _grouped_linear_fake(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))


@torch.library.register_fake("zemoe::grouped_outer")
def _grouped_outer_fake(left: Tensor, right: Tensor, expert_offsets: Tensor) -> Tensor:
    return left.new_empty((expert_offsets.shape[0] - 1, left.shape[1], right.shape[1]))


def _save_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_autograd(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    drows = torch.ops.zemoe.grouped_linear(grad, weight.mT, offsets) if ctx.needs_input_grad[0] else None
    dweight = torch.ops.zemoe.grouped_outer(grad, rows, offsets) if ctx.needs_input_grad[1] else None
    return drows, dweight, None


def _grouped_outer_autograd(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    left, right, offsets = ctx.saved_tensors
    dleft = torch.ops.zemoe.grouped_linear(right, grad, offsets) if ctx.needs_input_grad[0] else None
    dright = torch.ops.zemoe.grouped_linear(left, grad.mT, offsets) if ctx.needs_input_grad[1] else None
    return dleft, dright, None


torch.library.register_autograd("zemoe::grouped_linear", _grouped_linear_autograd, setup_context=_save_inputs)
torch.library.register_autograd("zemoe::grouped_outer", _grouped_outer_autograd, setup_context=_save_inputs)


def moe_ffn_grouped(
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: RoutingPlan,
    w13: Tensor,
    w2: Tensor,
    terms: AffineTerms,
    activation: str,
) -> Tensor:
    """Return what `moe_ffn` does, by the operators above: on any device, and differentiable twice."""
    with without_autocast(x_TH.device):
        return grouped.moe_ffn(x_TH, weights_TK, *plan, w13, w2, *terms, activation)
