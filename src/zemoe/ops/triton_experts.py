"""The operators of the `triton` backend, on CUDA devices only. A call imports its kernels.

T tokens, H hidden size, I expert width, E FFN experts, A slots, K choices, N = T * K row bound, P tile bound,
C constant experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._compat import backward_keeps_graph
from ..kernels.triton import tiles as tile_sizes
from .library import define, flat, implement_on_cuda, no_second_derivative, pairs, with_rows, without_autocast

if TYPE_CHECKING:
    from ..affine import AffineTerms

MOST_EXPERTS = 1024  # what one program of plan_tiles can hold
MOST_PAIRS = 2**31 - 2**20  # T * K: kernels count rows in int32, and look a block further than the last
DTYPES = (torch.bfloat16, torch.float16)

rows_per_tile = tile_sizes.rows_per_tile
training_rows_per_tile = tile_sizes.training_rows_per_tile


# --- plan_tiles: the plan, its tiles of rows, and the affine coefficients ---

define(
    "plan_tiles(Tensor weights, Tensor topk_ids, int num_experts, int num_slots, int block_m, int[] kinds, "
    "Tensor? scale, Tensor? constant_logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    vmap=False,
)


@implement_on_cuda("plan_tiles")
def _plan_tiles_cuda(
    weights, topk_ids, num_experts, num_slots, block_m, kinds, scale, constant_logits
) -> tuple[Tensor, ...]:
    from ..kernels.triton.coefficients import CONSTANT
    from ..kernels.triton.plan_tiles import plan_tiles

    if topk_ids.numel() >= MOST_PAIRS:
        raise ValueError(f"topk_ids must have fewer than {MOST_PAIRS} entries, got {tuple(topk_ids.shape)}")
    constants = sum(count for kind, count in pairs(kinds) if kind == CONSTANT)
    needed = (len(topk_ids), constants, 2)
    if constants and (constant_logits is None or tuple(constant_logits.shape) != needed):
        got = None if constant_logits is None else tuple(constant_logits.shape)
        raise ValueError(f"constant_logits must have shape {needed}, got {got}")
    *made, beta = plan_tiles(
        weights,
        topk_ids,
        num_experts=num_experts,
        num_slots=num_slots,
        block_m=block_m,
        kinds=pairs(kinds),
        scale_S=None if scale is None else scale.contiguous(),
        constant_logits_TC2=None if constant_logits is None else constant_logits.float(),
    )
    return (*made, weights.new_empty((len(weights), 0)) if beta is None else beta)


@torch.library.register_fake("zemoe::plan_tiles")
def _plan_tiles_fake(
    weights, topk_ids, num_experts, num_slots, block_m, kinds, scale, constant_logits
) -> tuple[Tensor, ...]:
    T, K = topk_ids.shape
    N = T * K
    block_ms = set(tile_sizes.rows_of_products(block_m))
    P = tile_sizes.max_tiles(N, num_experts, min(block_ms))
    C = 0 if constant_logits is None else constant_logits.shape[1]
    sizes = N, (T, K), num_experts + 1, (len(block_ms), P + 1, 2)
    integers = (topk_ids.new_empty(size, dtype=torch.int32) for size in sizes)
    return (*integers, weights.new_empty(T), weights.new_empty((T, C)))


def plan_tiles(
    weights_TK: Tensor,
    topk_ids_TK: Tensor,
    *,
    num_experts: int,
    num_slots: int,
    block_m: int,
    kinds: Sequence[tuple[int, int]],
    scale_S: Tensor | None,
    constant_logits_TC2: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (row_token_N, slot_row_TK, expert_offsets, tiles, alpha_T, beta_TC): see zemoe.plan and zemoe.affine.

    block_m: what rows_per_tile returns. kinds: (code of zemoe.affine.CODES, count) in id order. tiles: [L, P + 1, 2],
    one list for both products (L = 1) or one for each (L = 2). A list's first entry holds the number of tiles, each
    other entry a tile's expert and first row. Integers are int32. beta is [T, 0] without constant experts.
    """
    return torch.ops.zemoe.plan_tiles(
        weights_TK, topk_ids_TK, num_experts, num_slots, block_m, flat(kinds), scale_S, constant_logits_TC2
    )


# --- moe_ffn_tiles: x and weights to weighted sums, over the tiles of `plan_tiles` ---

define(
    "moe_ffn_tiles(Tensor x, Tensor weights, Tensor row_token, Tensor slot_row, Tensor expert_offsets, Tensor tiles, "
    "int block_m, Tensor w13, Tensor w2, Tensor alpha, Tensor? beta, Tensor? value, str activation) -> Tensor",
    vmap=False,
)


@implement_on_cuda("moe_ffn_tiles")
def _moe_ffn_tiles_cuda(
    x, weights, row_token, slot_row, offsets, tiles, block_m, w13, w2, alpha, beta, value, activation
) -> Tensor:
    from ..kernels.triton.moe_ffn_tiles import moe_ffn_tiles

    plan, affine = (row_token, slot_row, offsets, tiles), (alpha, beta, value)
    T, K = slot_row.shape
    schedule = tile_sizes.schedule(block_m, T, K, w13, w2)
    return moe_ffn_tiles(x, weights, *plan, w13, w2, affine, activation, schedule)


@torch.library.register_fake("zemoe::moe_ffn_tiles")
def _moe_ffn_tiles_fake(
    x, weights, row_token, slot_row, offsets, tiles, block_m, w13, w2, alpha, beta, value, activation
) -> Tensor:
    return x.new_empty(x.shape)


def moe_ffn_tiles(
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: Sequence[Tensor],
    block_m: int,
    w13: Tensor,
    w2: Tensor,
    terms: AffineTerms,
    activation: str,
) -> Tensor:
    """Return what zemoe.ops.experts.moe_ffn does, [T, H], for bfloat16 and float16, without gradients.

    plan: the first four tensors that `plan_tiles` returned for the same block_m.
    """
    return torch.ops.zemoe.moe_ffn_tiles(x_TH, weights_TK, *plan, block_m, w13, w2, *terms, activation)


# --- moe_ffn_tiles_train: the same, differentiable, in one op

_TRAINED = (
    "Tensor x, Tensor weights, Tensor row_token, Tensor slot_row, Tensor expert_offsets, Tensor tiles, int block_m, "
    "Tensor w13, Tensor w2, Tensor alpha, Tensor? beta, Tensor? value"
)
_MAIN = "Tensor{}? main_w13, Tensor{}? main_w2"  # what the gradients of w13 and w2 are added to
_SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
define(
    f"moe_ffn_tiles_train({_TRAINED}, {_MAIN.format('', '')}, str activation, bool save_preact) -> (Tensor, Tensor)",
    vmap=False,
)
define(f"moe_ffn_tiles_backward(Tensor grad, {_TRAINED}, Tensor preact, str activation, bool[7] needs) -> {_SEVEN}")
define(
    f"moe_ffn_tiles_backward_(Tensor grad, {_TRAINED}, Tensor(a!) preact, str activation, bool[7] needs, "
    f"{_MAIN.format('(b!)', '(c!)')}, bool overwrite) -> {_SEVEN}"
)


@implement_on_cuda("moe_ffn_tiles_train")
def _moe_ffn_tiles_train_cuda(
    x, weights, row_token, slot_row, offsets, tiles, block_m, w13, w2, alpha, beta, value, main_w13, main_w2,
    activation, save_preact,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ..kernels.triton.moe_ffn_tiles import moe_ffn_tiles

    T, K = slot_row.shape
    schedule = tile_sizes.schedule(block_m, T, K, w13, w2)
    if save_preact:
        schedule = replace(schedule, slices=tile_sizes.training_slices(T * K, x.shape[1]))
    preact = x.new_empty((len(row_token) if save_preact else 0, w13.shape[1]))
    saved = preact if save_preact else None
    plan, affine = (row_token, slot_row, offsets, tiles), (alpha, beta, value)
    return moe_ffn_tiles(x, weights, *plan, w13, w2, affine, activation, schedule, saved), preact


@torch.library.register_fake("zemoe::moe_ffn_tiles_train")
def _moe_ffn_tiles_train_fake(
    x, weights, row_token, slot_row, offsets, tiles, block_m, w13, w2, alpha, beta, value, main_w13, main_w2,
    activation, save_preact,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty((row_token.shape[0] if save_preact else 0, w13.shape[1]))


def _gradients(
    grad, x, weights, row_token, slot_row, offsets, tiles, block_m, w13, w2, alpha, beta, value, preact, activation,
    needs, main_w13=None, main_w2=None, overwrite=False,
) -> tuple[Tensor, ...]:  # fmt: skip
    from ..kernels.triton.moe_ffn_tiles_backward import moe_ffn_tiles_backward

    plan = row_token, slot_row, offsets, tiles[-1]
    schedule = tile_sizes.backward_schedule(block_m, w13, w2)
    grad = with_rows(grad)
    found = moe_ffn_tiles_backward(
        grad, with_rows(x), weights, *plan, w13, w2, alpha, preact, activation, tuple(needs[:5]), schedule,
        (main_w13, main_w2), overwrite=overwrite,
    )  # fmt: skip
    dbeta = dvalue = None
    if beta is not None and value is not None:
        with without_autocast(x.device):
            dbeta = grad.to(beta.dtype) @ value.to(beta.dtype).T if needs[5] else None
            dvalue = (beta.T @ grad.to(beta.dtype)).to(value.dtype) if needs[6] else None
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in (*found, dbeta, dvalue))


implement_on_cuda("moe_ffn_tiles_backward")(_gradients)
implement_on_cuda("moe_ffn_tiles_backward_")(_gradients)


def _gradients_fake(
    grad, x, weights, row_token, slot_row, offsets, tiles, block_m, w13, w2, alpha, beta, value, preact, activation,
    needs, main_w13=None, main_w2=None, overwrite=False,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (x, weights, w13, w2, alpha, beta, value)
    needs = [*needs[:2], needs[2] and main_w13 is None, needs[3] and main_w2 is None, *needs[4:]]
    return tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else x.new_empty(0)
        for tensor, need in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, main_w13, main_w2, activation, _ = inputs
    ctx.main_grads = main_w13, main_w2  # not saved, for they change until the backward
    ctx.block_m = tensors.pop(6)
    preact = output[1]
    ctx.mark_non_differentiable(preact)
    ctx.set_materialize_grads(False)  # else autograd makes zeros of the size of preact
    ctx.save_for_backward(*tensors, preact)
    ctx.activation = activation


def _autograd(ctx, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:  # the loss does not depend on the output
        return (None,) * 16
    *tensors, preact = ctx.saved_tensors
    tensors.insert(6, ctx.block_m)
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 7, 8, 9, 10, 11)]
    # The gradient of preact is written over preact, unless preact may be read again. It may with retain_graph, and
    # where gradients are enabled: then a second derivative may follow, which only the operator that overwrites nothing
    # refuses. A traced graph (preact is no plain tensor) reuses memory by itself.
    kept = backward_keeps_graph() or torch.is_grad_enabled() or type(preact) is not Tensor
    adds = any(main is not None for main in ctx.main_grads)
    if torch.is_grad_enabled() and adds:  # the operator that adds can't refuse a second derivative later
        no_second_derivative(ctx)
    if kept and not adds:
        found = torch.ops.zemoe.moe_ffn_tiles_backward(grad, *tensors, preact, ctx.activation, wanted)
    else:
        found = torch.ops.zemoe.moe_ffn_tiles_backward_(
            grad, *tensors, preact, ctx.activation, wanted, *ctx.main_grads, not kept
        )
    for i, main in zip((2, 3), ctx.main_grads, strict=True):
        wanted[i] = wanted[i] and main is None
    dx, dweights, dw13, dw2, dalpha, dbeta, dvalue = (
        gradient if need else None for gradient, need in zip(found, wanted, strict=True)
    )
    return dx, dweights, None, None, None, None, None, dw13, dw2, dalpha, dbeta, dvalue, None, None, None, None


torch.library.register_autograd("zemoe::moe_ffn_tiles_train", _autograd, setup_context=_setup_context)
torch.library.register_autograd("zemoe::moe_ffn_tiles_backward", no_second_derivative)
for _name in ("zemoe::moe_ffn_tiles_backward", "zemoe::moe_ffn_tiles_backward_"):
    torch.library.register_fake(_name, _gradients_fake)


def moe_ffn_tiles_train(
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: Sequence[Tensor],
    block_m: int,
    w13: Tensor,
    w2: Tensor,
    terms: AffineTerms,
    activation: str,
    main_grads: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Return what `moe_ffn_tiles` does, differentiable in all float arguments.

    Beside its arguments it saves the pre-activations, [T * K, 2I] in the dtype of x, if the gradient of x, weights, w13
    or w2 is wanted. block_m: what training_rows_per_tile returns. main_grads: for w13 and for w2, the tensor that the
    backward adds the gradient to, returning none for it; or None.
    """
    save_preact = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TH, weights_TK, w13, w2))
    return torch.ops.zemoe.moe_ffn_tiles_train(
        x_TH, weights_TK, *plan, block_m, w13, w2, *terms, *main_grads, activation, save_preact
    )[0]
