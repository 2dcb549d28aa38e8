"""The gradient of an expert's weight: a product over its rows, one side of which is gathered from tokens.

T tokens, E FFN experts, N row bound, O numbers a row, J numbers a token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .forward import descriptor
from .launch import begin, launch_options
from .tiles import Product, cdiv


@triton.jit
def _tokens_at(row_token, row, end, done, BLOCK_K: tl.constexpr):
    """The tokens of rows row to row + BLOCK_K, and which of the rows come before `end` and not before `done`."""
    row_K = row + tl.arange(0, BLOCK_K)
    in_expert_K = row_K < end
    return tl.load(row_token + row_K, mask=in_expert_K, other=0), in_expert_K & (row_K >= done)


@triton.jit
def _grad_weight(
    rows_tma,
    rows,
    tokens,
    row_token,
    offsets,
    grad,
    stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """grad [E, HEIGHT, WIDTH]: for each expert the sum over its rows n of left_n right_n^T.

    One side is `rows` [N, ...], the other the row's token in `tokens` [T, ...]; TOKENS_LEFT says which. Behind an
    expert's last row there may be a NaN, which a descriptor would read. So its last block of BLOCK_K rows ends there,
    and rows that the block before had already meet zeros for tokens. An expert of fewer rows is read by pointers.
    """
    begin(OVERLAP)
    blocks_n: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (HEIGHT + BLOCK_M - 1) // BLOCK_M * blocks_n
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    line = block // blocks_n * BLOCK_M
    column = block % blocks_n * BLOCK_N
    rows_width: tl.constexpr = WIDTH if TOKENS_LEFT else HEIGHT
    tokens_width: tl.constexpr = HEIGHT if TOKENS_LEFT else WIDTH
    rows_block: tl.constexpr = BLOCK_N if TOKENS_LEFT else BLOCK_M
    tokens_block: tl.constexpr = BLOCK_M if TOKENS_LEFT else BLOCK_N
    rows_column = column if TOKENS_LEFT else line
    tokens_column = line if TOKENS_LEFT else column
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    columns = tokens_column + tl.arange(0, tokens_block)
    in_token = (columns < tokens_width)[None, :]
    if TMA and end - start >= BLOCK_K:
        # A step ahead, so that the loads of tokens are loads like others, which Triton overlaps with the products.
        token_K, new_K = _tokens_at(row_token, start, end, start, BLOCK_K)
        for done in range(start, end, BLOCK_K):
            ours = rows_tma.load([tl.minimum(done, end - BLOCK_K), rows_column])
            mask = new_K[:, None] & in_token
            theirs = tl.load(tokens + token_K.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
            next_row = tl.minimum(done + BLOCK_K, end - BLOCK_K)
            token_K, new_K = _tokens_at(row_token, next_row, end, done + BLOCK_K, BLOCK_K)
            acc = tl.dot(theirs.T, ours, acc) if TOKENS_LEFT else tl.dot(ours.T, theirs, acc)
    else:
        token_K, new_K = _tokens_at(row_token, start, end, start, BLOCK_K)
        for row in tl.range(start, end, BLOCK_K, num_stages=1 if TMA else None):
            row_K = row + tl.arange(0, BLOCK_K)
            ours_columns = rows_column + tl.arange(0, rows_block)
            mask = (row_K < end)[:, None] & (ours_columns < rows_width)[None, :]
            at = row_K.to(tl.int64)[:, None] * rows_width + ours_columns[None, :]
            ours = tl.load(rows + at, mask=mask, other=0.0)
            mask = new_K[:, None] & in_token
            theirs = tl.load(tokens + token_K.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
            token_K, new_K = _tokens_at(row_token, row + BLOCK_K, end, row + BLOCK_K, BLOCK_K)
            acc = tl.dot(theirs.T, ours, acc) if TOKENS_LEFT else tl.dot(ours.T, theirs, acc)
    line_M = line + tl.arange(0, BLOCK_M)
    column_N = column + tl.arange(0, BLOCK_N)
    mask = (line_M < HEIGHT)[:, None] & (column_N < WIDTH)[None, :]
    to = grad + (expert.to(tl.int64) * HEIGHT + line_M)[:, None] * WIDTH + column_N[None, :]
    if ADD:
        acc += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, acc.to(grad.dtype.element_ty), mask=mask)


def grad_weight(
    rows_NO: Tensor,
    tokens_TJ: Tensor,
    row_token_N: Tensor,
    offsets: Tensor,
    how: Product,
    *,
    tokens_left: bool,
    into: Tensor | None = None,
) -> Tensor:
    """[E, O, J], with tokens_left [E, J, O]: for each expert the sum over its rows n of rows_n (x) tokens_(token of n).

    Summed in float32; zeros for an expert without rows. into: a contiguous tensor of this shape and any float dtype,
    to which the sum is added and which is returned, e.g. a gradient in float32.
    """
    (O, J), E = (rows_NO.shape[1], tokens_TJ.shape[1]), len(offsets) - 1
    height, width = (J, O) if tokens_left else (O, J)
    grad = rows_NO.new_empty((E, height, width)) if into is None else into
    _grad_weight[(E * cdiv(height, how.block_m) * cdiv(width, how.block_n),)](
        descriptor(rows_NO, (how.block_k, how.block_n if tokens_left else how.block_m)) if how.tma else rows_NO,
        rows_NO,
        tokens_TJ,
        row_token_N,
        offsets,
        grad,
        tokens_TJ.stride(0),
        height,
        width,
        tokens_left,
        into is not None,
        how.block_m,
        how.block_n,
        how.block_k,
        how.tma,
        num_warps=how.warps,
        num_stages=how.stages,
        **launch_options(rows_NO),
    )
    return grad
