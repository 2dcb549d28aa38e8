"""One pass that sums each token's rows in the order of its choices and adds the affine terms; and its gradients.

T tokens, H hidden size, K choices, C constant experts, N row bound, B blocks of an expert's width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import begin, launch_options
from .tiles import cdiv, next_power_of_2


@triton.jit
def affine_terms(x, alpha, beta, value, column_N, H: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """Return alpha * x + beta @ value at the columns of one token, in float32; NaN throughout where any x is NaN.

    x, alpha, beta: pointers to the token's row, coefficient and coefficients. WHOLE: the columns are all of H.
    """
    in_row = column_N < H
    x_N = tl.load(x + column_N, mask=in_row, other=0.0).to(tl.float32)
    has_nan = tl.max((x_N != x_N).to(tl.int32), 0)
    if not WHOLE:
        for start in range(0, H, 1024):
            columns = start + tl.arange(0, 1024)
            x_C = tl.load(x + columns, mask=columns < H, other=0.0).to(tl.float32)
            has_nan = tl.maximum(has_nan, tl.max((x_C != x_C).to(tl.int32), 0))
    y_N = tl.load(alpha) * x_N
    for constant in tl.static_range(C):
        value_N = tl.load(value + constant * H + column_N, mask=in_row, other=0.0).to(tl.float32)
        y_N += tl.load(beta + constant) * value_N
    return tl.where(has_nan != 0, float("nan"), y_N)


@triton.jit
def _combine(
    rows,
    slot_row,
    weights,
    x,
    alpha,
    beta,
    value,
    out,
    stride_x,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    in_rows_N = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column_N = FIRST + in_rows_N
    in_row = in_rows_N < WIDTH
    whole: tl.constexpr = FIRST == 0 and BLOCK_H >= H
    y_N = affine_terms(x + token * stride_x, alpha + token, beta + token * C, value, column_N, H, C, whole)
    for choice in tl.static_range(K):
        row = tl.load(slot_row + token * K + choice)
        weight = tl.load(weights + token * K + choice)
        row_N = tl.load(rows + row.to(tl.int64) * WIDTH + in_rows_N, mask=in_row & (row >= 0), other=0.0).to(tl.float32)
        y_N += tl.where(row >= 0, weight * row_N, 0.0)
    tl.store(out + token * H + column_N, y_N.to(out.dtype.element_ty), mask=in_row)


def combine(
    rows_NH: Tensor,
    slot_row_TK: Tensor,
    weights_TK: Tensor,
    x_TH: Tensor,
    alpha_T: Tensor,
    beta_TC: Tensor | None,
    value_CH: Tensor | None,
    block_h: int,
    into: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Return out_t = sum_k weight_tk rows[slot_row_tk] + alpha_t x_t + beta_t @ value, [T, H] in x's dtype.

    into: (out, first column), where rows_NH holds some of the H columns only.
    """
    (T, H), width = x_TH.shape, rows_NH.shape[1]
    out_TH, first = into or (torch.empty((T, H), dtype=x_TH.dtype, device=x_TH.device), 0)
    block_h = min(block_h, max(16, next_power_of_2(width)))
    _combine[(T, cdiv(width, block_h))](
        rows_NH,
        slot_row_TK,
        weights_TK,
        x_TH,
        alpha_T,
        alpha_T if beta_TC is None else beta_TC,
        alpha_T if value_CH is None else value_CH,
        out_TH,
        x_TH.stride(0),
        H,
        slot_row_TK.shape[1],
        0 if beta_TC is None else beta_TC.shape[1],
        first,
        width,
        block_h,
        num_warps=max(1, min(8, block_h // 512)),
        **launch_options(x_TH, T),
    )
    return out_TH


@triton.jit
def _grad_tokens(
    rows,
    slot_row,
    partial,
    dout,
    x,
    alpha,
    dx,
    dweights,
    dalpha,
    stride_dout,
    stride_x,
    H: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_WEIGHTS: tl.constexpr,
    WANT_ALPHA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Make the gradients of one token: dx, dalpha = <dout, x>, and dweights from their partial sums.

    dx is the sum over its rows, in the order of its choices, and alpha * dout.

    `combine` makes the output of a token with a NaN in x NaN by itself, as if alpha were NaN whatever it came from: so
    dx is NaN there, and the gradient of alpha is 0.
    """
    begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    if WANT_WEIGHTS:
        k = tl.arange(0, BLOCK_K)
        b = tl.arange(0, BLOCK_B)
        row_K = tl.load(slot_row + token * K + k, mask=k < K, other=-1).to(tl.int64)
        mask = (row_K >= 0)[:, None] & (b < B)[None, :]
        partial_KB = tl.load(partial + row_K[:, None] * B + b[None, :], mask=mask, other=0.0)
        tl.store(dweights + token * K + k, tl.sum(partial_KB, 1), mask=k < K)
    if WANT_X or WANT_ALPHA:
        sum_N = tl.zeros([BLOCK_H], dtype=tl.float32)
        is_nan_N = tl.zeros([BLOCK_H], dtype=tl.int32)
        for start in range(0, H, BLOCK_H):
            column_N = start + tl.arange(0, BLOCK_H)
            in_row = column_N < H
            x_N = tl.load(x + token * stride_x + column_N, mask=in_row, other=0.0).to(tl.float32)
            is_nan_N += (x_N != x_N).to(tl.int32)
            if WANT_ALPHA:
                sum_N += tl.load(dout + token * stride_dout + column_N, mask=in_row, other=0.0).to(tl.float32) * x_N
        has_nan = tl.sum(is_nan_N, 0) > 0
        if WANT_ALPHA:
            tl.store(dalpha + token, tl.where(has_nan, 0.0, tl.sum(sum_N, 0)))
        if WANT_X:
            alpha_t = tl.where(has_nan, float("nan"), tl.load(alpha + token))
            for start in range(0, H, BLOCK_H):
                column_N = start + tl.arange(0, BLOCK_H)
                in_row = column_N < H
                dout_N = tl.load(dout + token * stride_dout + column_N, mask=in_row, other=0.0)
                dx_N = alpha_t * dout_N.to(tl.float32)
                for choice in tl.static_range(K):
                    row = tl.load(slot_row + token * K + choice).to(tl.int64)
                    dx_N += tl.load(rows + row * H + column_N, mask=in_row & (row >= 0), other=0.0).to(tl.float32)
                tl.store(dx + token * H + column_N, dx_N.to(dx.dtype.element_ty), mask=in_row)


def grad_tokens(
    rows_NH: Tensor | None,
    slot_row_TK: Tensor,
    partial_NB: Tensor | None,
    dout_TH: Tensor,
    x_TH: Tensor,
    alpha_T: Tensor,
    block_h: int,
    *,
    want_x: bool,
    want_alpha: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx [T, H], dweights [T, K], dalpha [T]), None for each that is not wanted.

    dweights are wanted where there is a partial_NB.
    """
    (T, H), K = x_TH.shape, slot_row_TK.shape[1]
    blocks = 0 if partial_NB is None else partial_NB.shape[1]
    dx_TH = torch.empty((T, H), dtype=x_TH.dtype, device=x_TH.device) if want_x else None
    dweights_TK = None if partial_NB is None else alpha_T.new_empty((T, K))
    dalpha_T = alpha_T.new_empty(T) if want_alpha else None
    unused = alpha_T
    _grad_tokens[(T,)](
        unused if rows_NH is None else rows_NH,
        slot_row_TK,
        unused if partial_NB is None else partial_NB,
        dout_TH,
        x_TH,
        alpha_T,
        unused if dx_TH is None else dx_TH,
        unused if dweights_TK is None else dweights_TK,
        unused if dalpha_T is None else dalpha_T,
        dout_TH.stride(0),
        x_TH.stride(0),
        H,
        K,
        blocks,
        want_x,
        partial_NB is not None,
        want_alpha,
        next_power_of_2(K),
        next_power_of_2(blocks),
        block_h,
        num_warps=max(1, min(8, block_h // 512)),
        **launch_options(x_TH, T),
    )
    return dx_TH, dweights_TK, dalpha_T
