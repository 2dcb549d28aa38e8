"""Blocks of matrices as the products of the forward and the backward read them, and the product that both have.

N row bound. A tile is up to BLOCK_M rows of one expert, see `plan_tiles.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Return what a kernel needs to read blocks of a contiguous tensor by the copy engine (TMA)."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


@triton.jit
def tokens_of(x, row_token, row_M, end, stride_x):
    """Where in x the tokens of rows begin, and which of the rows come before `end`."""
    in_expert_M = row_M < end
    token_M = tl.load(row_token + row_M, mask=in_expert_M, other=0)
    return x + token_M.to(tl.int64) * stride_x, in_expert_M


@triton.jit
def gather(x_M, in_expert_M, k, H: tl.constexpr, BLOCK_K: tl.constexpr):
    """[M, BLOCK_K] of the tokens that x_M points to, from column k on."""
    columns = k + tl.arange(0, BLOCK_K)
    mask = in_expert_M[:, None]
    if H % BLOCK_K != 0:
        mask = mask & (columns < H)[None, :]
    return tl.load(x_M[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def rows_of(matrix, row, k, width, rows_left, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of a matrix with contiguous rows; rows from rows_left on may hold anything."""
    if TMA:
        return matrix.load([row, k])
    else:
        n = tl.arange(0, BLOCK_N)
        columns = k + tl.arange(0, BLOCK_K)
        mask = (n < rows_left)[:, None] & (columns < width)[None, :]
        return tl.load(matrix + (row + n).to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)


@triton.jit
def columns_of(
    stacked, expert, row, column, ROWS, COLUMNS, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr
):
    """[BLOCK_K, BLOCK_N] of an expert's [ROWS, COLUMNS] in `stacked`, zeros outside of it."""
    if TMA:
        return stacked.load([expert, row, column]).reshape([BLOCK_K, BLOCK_N])
    else:
        row_K = row + tl.arange(0, BLOCK_K)
        column_N = column + tl.arange(0, BLOCK_N)
        mask = (row_K < ROWS)[:, None] & (column_N < COLUMNS)[None, :]
        first = stacked + (expert.to(tl.int64) * ROWS + row_K)[:, None] * COLUMNS
        return tl.load(first + column_N[None, :], mask=mask, other=0.0)


@triton.jit
def multiply_rows(
    rows,
    offsets,
    tiles,
    weight,
    out,
    N,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out [N, WIDTH] = rows [N, DEPTH] times the weight of their expert, of whose OUTPUTS columns WIDTH from FIRST on.

    weight: [E, OUTPUTS, DEPTH] if TRANSPOSED, else [E, DEPTH, OUTPUTS], then with FIRST = 0. Programs share the tiles.
    """
    blocks_n: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    work = tl.load(tiles) * blocks_n
    for index in tl.range(tl.program_id(0), work, tl.num_programs(0), flatten=FLATTEN):
        tile = tiles + 2 * (1 + index // blocks_n)
        expert = tl.load(tile)
        column = index % blocks_n * BLOCK_N
        first_row = tl.load(tile + 1)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, DEPTH, BLOCK_K):
            a = rows_of(rows, first_row, k, DEPTH, N - first_row, BLOCK_M, BLOCK_K, TMA)
            if TRANSPOSED:
                row = expert * OUTPUTS + FIRST + column
                w = rows_of(weight, row, k, DEPTH, WIDTH - column, BLOCK_N, BLOCK_K, TMA)
                acc = tl.dot(a, w.T, acc)
            else:
                w = columns_of(weight, expert, k, column, DEPTH, OUTPUTS, BLOCK_K, BLOCK_N, TMA)
                acc = tl.dot(a, w, acc)
        row_M = first_row + tl.arange(0, BLOCK_M)
        column_N = column + tl.arange(0, BLOCK_N)
        mask = (row_M < tl.load(offsets + expert + 1))[:, None] & (column_N < WIDTH)[None, :]
        tl.store(out + row_M.to(tl.int64)[:, None] * WIDTH + column_N[None, :], acc.to(out.dtype.element_ty), mask=mask)
