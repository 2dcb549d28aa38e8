"""The sum over each token's rows in the order of its choices, and the affine terms, in one pass.

T tokens, H hidden size, K choices, C constant experts, N row bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import begin, launch_options
from .tiles import cdiv


@triton.jit
def affine_terms(x, alpha, beta, value, column_N, H: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """alpha * x + beta @ value at the columns of one token, in float32; NaN throughout where any x is NaN.

    x, alpha, beta: pointers to the token's row, coefficient and coefficients. WHOLE: the columns are all of H.
    """
    in_row = column_N < H
    x_N = tl.load(x + column_N, mask=in_row, other=0.0).to(tl.float32)
    lost = tl.max((x_N != x_N).to(tl.int32), 0)
    if not WHOLE:
        for start in range(0, H, 1024):
            columns = start + tl.arange(0, 1024)
            x_C = tl.load(x + columns, mask=columns < H, other=0.0).to(tl.float32)
            lost = tl.maximum(lost, tl.max((x_C != x_C).to(tl.int32), 0))
    y_N = tl.load(alpha) * x_N
    for constant in tl.static_range(C):
        value_N = tl.load(value + constant * H + column_N, mask=in_row, other=0.0).to(tl.float32)
        y_N += tl.load(beta + constant) * value_N
    return tl.where(lost != 0, float("nan"), y_N)


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
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column_N = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = column_N < H
    y_N = affine_terms(x + token * stride_x, alpha + token, beta + token * C, value, column_N, H, C, BLOCK_H >= H)
    for choice in tl.static_range(K):
        row = tl.load(slot_row + token * K + choice)
        weight = tl.load(weights + token * K + choice)
        row_N = tl.load(rows + row.to(tl.int64) * H + column_N, mask=in_row & (row >= 0), other=0.0).to(tl.float32)
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
) -> Tensor:
    """out_t = sum_k weight_tk rows[slot_row_tk] + alpha_t x_t + beta_t @ value, [T, H] in x's dtype."""
    T, H = x_TH.shape
    out_TH = torch.empty((T, H), dtype=x_TH.dtype, device=x_TH.device)
    _combine[(T, cdiv(H, block_h))](
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
        block_h,
        num_warps=max(1, min(8, block_h // 512)),
        **launch_options(x_TH),
    )
    return out_TH
