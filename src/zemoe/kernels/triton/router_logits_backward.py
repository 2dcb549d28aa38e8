"""The parts that a float32 matrix is taken as where tensor cores multiply it: for the router's product backwards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import begin, launch_options
from .tiles import cdiv, next_power_of_2

_BLOCK = 2048  # numbers of a program


@triton.jit
def _bfloat16_parts(
    matrix_ptr,
    out_ptr,
    rows,
    columns,
    stride,
    row_stride,
    part_stride,
    LOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < rows) & (column < columns)
    row = row.to(tl.int64)
    whole = tl.load(matrix_ptr + row * stride + column, mask=mask, other=0.0)
    high = whole.to(tl.bfloat16)
    low = (whole - high.to(tl.float32)).to(tl.bfloat16)
    for part in tl.static_range(3):
        tl.store(out_ptr + row * row_stride + part * part_stride + column, low if part == LOW else high, mask=mask)


def bfloat16_parts(matrix: Tensor, *, low: int, beside: bool) -> Tensor:
    """Three bfloat16 copies of a float32 matrix [n, m]: [n, 3m], or [3n, m] unless `beside`.

    Copy `low` holds what bfloat16 leaves of each number, the others the number in bfloat16: the product of a matrix
    with low=1 and one with low=2 has all but the smallest of four partial products. Its last dimension is contiguous.
    """
    rows, columns = matrix.shape
    assert matrix.dtype == torch.float32
    assert matrix.stride(1) == 1
    out = torch.empty(
        (rows, 3 * columns) if beside else (3 * rows, columns), dtype=torch.bfloat16, device=matrix.device
    )
    block_c = min(next_power_of_2(columns), 1024)
    block_r = _BLOCK // block_c
    if matrix.numel():
        _bfloat16_parts[(cdiv(rows, block_r), cdiv(columns, block_c))](
            matrix,
            out,
            rows,
            columns,
            matrix.stride(0),
            3 * columns if beside else columns,
            columns if beside else rows * columns,
            low,
            block_r,
            block_c,
            num_warps=4,
            **launch_options(matrix, rows),
        )
    return out
