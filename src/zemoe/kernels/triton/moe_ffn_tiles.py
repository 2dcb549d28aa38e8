"""The FFN experts' two products. GEMM1 gathers its rows itself and ends in the activation, GEMM2 writes each row once.

T tokens, H hidden size, I expert width, E FFN experts, K choices, N = T * K row bound, P tile bound. A tile is up to
BLOCK_M rows of one expert, see `plan.py`; all grids come from static bounds, and a program without work ends at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import descriptor, gather, multiply_rows, tokens_of
from .combine import affine_terms, combine
from .launch import begin, launch_options
from .tiles import Product, Schedule, cdiv, max_tiles


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # gate * (1 + tanh(z)) / 2 = gate * sigmoid(2 z)
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-2.0 * z))


@triton.jit
def _gate_up_rows(w13, expert, column, k, H, I, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Return [2 BLOCK_N, BLOCK_K]: gate rows, then the up rows that belong to them, so that one product makes both."""
    if TMA:
        return w13.load([2 * expert, column, k]).reshape([2 * BLOCK_N, BLOCK_K])
    else:
        n = tl.arange(0, 2 * BLOCK_N)
        column_N = column + n % BLOCK_N
        row_N = (2 * expert + n // BLOCK_N).to(tl.int64) * I + column_N
        columns = k + tl.arange(0, BLOCK_K)
        mask = (column_N < I)[:, None] & (columns < H)[None, :]
        return tl.load(w13 + row_N[:, None] * H + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_activated(
    acc, inner, preact, row_M, in_expert_M, column, I, ACTIVATION: tl.constexpr, SAVE_PREACT: tl.constexpr
):
    """Store act(gate) * up of gate and up sums [M, 2 n] in columns column to column + n of rows row_M.

    SAVE_PREACT: store the sums themselves as well, gates in the first I columns of `preact` and ups in the next.
    """
    M: tl.constexpr = acc.shape[0]
    n: tl.constexpr = acc.shape[1] // 2
    gate, up = acc.reshape([M, 2, n]).permute(0, 2, 1).split()
    out = (_activate(gate, ACTIVATION) * up).to(inner.dtype.element_ty)
    column_N = column + tl.arange(0, n)
    mask = in_expert_M[:, None] & (column_N < I)[None, :]
    tl.store(inner + row_M.to(tl.int64)[:, None] * I + column_N[None, :], out, mask=mask)
    if SAVE_PREACT:
        gate_ptr = preact + row_M.to(tl.int64)[:, None] * (2 * I) + column_N[None, :]
        tl.store(gate_ptr, gate.to(preact.dtype.element_ty), mask=mask)
        tl.store(gate_ptr + I, up.to(preact.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def _gate_up(
    x,
    row_token,
    offsets,
    tiles,
    w13,
    inner,
    preact,
    stride_x,
    H: tl.constexpr,
    I: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_PREACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MORE_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """inner[n] = act(gate(x[token of n])) * up(x[token of n]); tiles of BLOCK_M + MORE_M rows."""
    begin(OVERLAP)
    blocks_n: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    for index in range(tl.program_id(0), tl.load(tiles) * blocks_n, tl.num_programs(0)):
        tile = tiles + 2 * (1 + index // blocks_n)
        expert = tl.load(tile)
        column = index % blocks_n * BLOCK_N
        first_row = tl.load(tile + 1)
        end = tl.load(offsets + expert + 1)
        row_M = first_row + tl.arange(0, BLOCK_M)
        x_M, in_expert_M = tokens_of(x, row_token, row_M, end, stride_x)
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], dtype=tl.float32)
        if MORE_M > 0 and end - first_row > BLOCK_M:
            row_L = first_row + BLOCK_M + tl.arange(0, MORE_M)
            x_L, in_expert_L = tokens_of(x, row_token, row_L, end, stride_x)
            acc_L = tl.zeros([MORE_M, 2 * BLOCK_N], dtype=tl.float32)
            for k in range(0, H, BLOCK_K):
                x_MK = gather(x_M, in_expert_M, k, H, BLOCK_K)
                x_LK = gather(x_L, in_expert_L, k, H, BLOCK_K)
                w_NK = _gate_up_rows(w13, expert, column, k, H, I, BLOCK_N, BLOCK_K, TMA)
                acc = tl.dot(x_MK, w_NK.T, acc)
                acc_L = tl.dot(x_LK, w_NK.T, acc_L)
            _store_activated(acc_L, inner, preact, row_L, in_expert_L, column, I, ACTIVATION, SAVE_PREACT)
        else:
            for k in range(0, H, BLOCK_K):
                x_MK = gather(x_M, in_expert_M, k, H, BLOCK_K)
                w_NK = _gate_up_rows(w13, expert, column, k, H, I, BLOCK_N, BLOCK_K, TMA)
                acc = tl.dot(x_MK, w_NK.T, acc)
        _store_activated(acc, inner, preact, row_M, in_expert_M, column, I, ACTIVATION, SAVE_PREACT)


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def _down(
    inner,
    offsets,
    tiles,
    w2,
    out,
    N,
    H: tl.constexpr,
    I: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[n] = inner[n] times the transposed w2 of its expert, of whose H columns it holds WIDTH from FIRST on."""
    begin(OVERLAP)
    multiply_rows(inner, offsets, tiles, w2, out, N, I, H, FIRST, WIDTH, True, BLOCK_M, BLOCK_N, BLOCK_K, TMA, FLATTEN)


@triton.jit
def _gate_up_one(
    x,
    tiles,
    w13,
    inner,
    H: tl.constexpr,
    I: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token: row n of `inner` is the n-th tile's expert. No tensor cores, every weight is used once."""
    begin(OVERLAP)
    expert = tl.load(tiles + 2 * (1 + tl.program_id(0)))
    if expert >= 0:
        column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        gate_N = w13 + (expert.to(tl.int64) * (2 * I) + column_N) * H
        gate = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for k in range(0, H, BLOCK_K):
            columns = k + tl.arange(0, BLOCK_K)
            in_row = columns < H
            x_K = tl.load(x + columns, mask=in_row, other=0.0).to(tl.float32)
            mask = (column_N < I)[:, None] & in_row[None, :]
            pointers = gate_N[:, None] + columns[None, :]
            gate += tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * x_K[None, :]
            up += tl.load(pointers + I * H, mask=mask, other=0.0).to(tl.float32) * x_K[None, :]
        out_N = _activate(tl.sum(gate, 1), ACTIVATION) * tl.sum(up, 1)
        tl.store(inner + tl.program_id(0) * I + column_N, out_N.to(inner.dtype.element_ty), mask=column_N < I)


@triton.jit
def _down_one(
    inner,
    slot_row,
    weights,
    tiles,
    w2,
    x,
    alpha,
    beta,
    value,
    out,
    H: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token: its FFN outputs, weighted and summed in the order of the choices, and the affine terms."""
    begin(OVERLAP)
    column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_out = column_N < H
    y_N = affine_terms(x, alpha, beta, value, column_N, H, C, BLOCK_N >= H)
    for choice in range(K):
        row = tl.load(slot_row + choice)
        if row >= 0:
            expert = tl.load(tiles + 2 * (1 + row))
            w2_N = w2 + (expert.to(tl.int64) * H + column_N) * I
            acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
            for k in range(0, I, BLOCK_K):
                columns = k + tl.arange(0, BLOCK_K)
                in_row = columns < I
                inner_K = tl.load(inner + row * I + columns, mask=in_row, other=0.0).to(tl.float32)
                w = tl.load(w2_N[:, None] + columns[None, :], mask=in_out[:, None] & in_row[None, :], other=0.0)
                acc += w.to(tl.float32) * inner_K[None, :]
            y_N += tl.load(weights + choice) * tl.sum(acc, 1)
    tl.store(out + column_N, y_N.to(out.dtype.element_ty), mask=in_out)


def gate_up(
    x_TH: Tensor,
    row_token_N: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    w13: Tensor,
    activation: str,
    product: Product,
    preact_N2I: Tensor | None = None,
) -> Tensor:
    """Return [N, I]: the activated rows of all experts. Padding rows are not written.

    preact_N2I: where to write what gate and up yield, for the backward.
    """
    (E, two_I, H), N = w13.shape, row_token_N.shape[0]
    I = two_I // 2
    inner_NI = x_TH.new_empty((N, I))
    block_m = 1 << (product.block_m.bit_length() - 1)
    grid = (product.programs(max_tiles(N, E, product.block_m) * cdiv(I, product.block_n)),)
    _gate_up[grid](
        x_TH,
        row_token_N,
        offsets,
        tiles,
        descriptor(w13.view(2 * E, I, H), (2, product.block_n, product.block_k)) if product.tma else w13,
        inner_NI,
        inner_NI if preact_N2I is None else preact_N2I,
        x_TH.stride(0),
        H,
        I,
        activation,
        preact_N2I is not None,
        block_m,
        product.block_m - block_m,
        product.block_n,
        product.block_k,
        product.tma,
        num_warps=product.warps,
        num_stages=product.stages,
        **launch_options(x_TH, len(x_TH)),
    )
    return inner_NI


def down(
    inner_NI: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    w2: Tensor,
    product: Product,
    num_tokens: int,
    columns: slice = slice(None),
) -> Tensor:
    """Return [N, H]: the outputs of all rows, without their routing weights. Padding rows are not written.

    num_tokens: T. columns: the part of H that is wanted.
    """
    (E, H, I), N = w2.shape, inner_NI.shape[0]
    first, stop, _ = columns.indices(H)
    out_NH = inner_NI.new_empty((N, stop - first))
    grid = (product.programs(max_tiles(N, E, product.block_m) * cdiv(stop - first, product.block_n)),)
    _down[grid](
        descriptor(inner_NI, (product.block_m, product.block_k)) if product.tma else inner_NI,
        offsets,
        tiles,
        descriptor(w2.view(-1, I), (product.block_n, product.block_k)) if product.tma else w2,
        out_NH,
        N,
        H,
        I,
        first,
        stop - first,
        product.block_m,
        product.block_n,
        product.block_k,
        product.tma,
        product.flatten,
        num_warps=product.warps,
        num_stages=product.stages,
        **launch_options(inner_NI, num_tokens),
    )
    return out_NH


def one_token(
    x_TH: Tensor,
    weights_TK: Tensor,
    slot_row_TK: Tensor,
    tiles: Tensor,
    w13: Tensor,
    w2: Tensor,
    affine: tuple[Tensor, Tensor | None, Tensor | None],
    activation: str,
    schedule: Schedule,
) -> Tensor:
    """Return [1, H]: the whole layer of one token in two launches; its plan has tiles of one row."""
    (_, H, I), K = w2.shape, slot_row_TK.shape[1]
    alpha_T, beta_TC, value_CH = affine
    inner_NI = x_TH.new_empty((K, I))
    out_TH = x_TH.new_empty((1, H))
    block_n, block_k = schedule.gate_up.block_n, schedule.gate_up.block_k
    _gate_up_one[(K, cdiv(I, block_n))](
        x_TH,
        tiles,
        w13,
        inner_NI,
        H,
        I,
        activation,
        block_n,
        block_k,
        num_warps=schedule.gate_up.warps,
        **launch_options(x_TH, len(x_TH)),
    )
    block_n, block_k = schedule.down.block_n, schedule.down.block_k
    _down_one[(cdiv(H, block_n),)](
        inner_NI,
        slot_row_TK,
        weights_TK,
        tiles,
        w2,
        x_TH,
        alpha_T,
        alpha_T if beta_TC is None else beta_TC,
        alpha_T if value_CH is None else value_CH,
        out_TH,
        H,
        I,
        K,
        0 if beta_TC is None else beta_TC.shape[1],
        block_n,
        block_k,
        num_warps=schedule.down.warps,
        **launch_options(x_TH, len(x_TH)),
    )
    return out_TH


def moe_ffn_tiles(
    x_TH: Tensor,
    weights_TK: Tensor,
    row_token_N: Tensor,
    slot_row_TK: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    w13: Tensor,
    w2: Tensor,
    affine: tuple[Tensor, Tensor | None, Tensor | None],
    activation: str,
    schedule: Schedule,
    preact_N2I: Tensor | None = None,
) -> Tensor:
    """y_t = sum_k w_tk * expert_k(x_t) + alpha_t x_t + beta_t @ V, [T, H] in x's dtype; see zemoe.ops.experts.moe_ffn.

    preact_N2I: as in `gate_up`, not with tiles of one row.
    """
    if not len(x_TH):
        return x_TH.new_empty(x_TH.shape)
    x_TH = x_TH if x_TH.stride(1) == 1 else x_TH.contiguous()
    w13, w2, weights_TK = w13.contiguous(), w2.contiguous(), weights_TK.contiguous()
    alpha_T, beta_TC, value_CH = affine
    affine = alpha_T.contiguous(), *(None if one is None else one.contiguous() for one in (beta_TC, value_CH))
    N, H = len(row_token_N), x_TH.shape[1]
    if not w13.numel() or not N:  # no product: without experts no row is read, experts of width 0 return zeros
        rows_NH = x_TH.new_zeros((N, H)) if len(w13) else x_TH
        return combine(rows_NH, slot_row_TK, weights_TK, x_TH, *affine, schedule.block_h)
    if schedule.block_m == 1:
        assert preact_N2I is None
        return one_token(x_TH, weights_TK, slot_row_TK, tiles[0], w13, w2, affine, activation, schedule)
    inner_NI = gate_up(x_TH, row_token_N, offsets, tiles[0], w13, activation, schedule.gate_up, preact_N2I)
    if schedule.slices == 1:
        out_NH = down(inner_NI, offsets, tiles[-1], w2, schedule.down, len(x_TH))
        return combine(out_NH, slot_row_TK, weights_TK, x_TH, *affine, schedule.block_h)
    out_TH = torch.empty((len(x_TH), H), dtype=x_TH.dtype, device=x_TH.device)
    for first in range(0, H, cdiv(H, schedule.slices)):
        columns = slice(first, first + cdiv(H, schedule.slices))
        rows = down(inner_NI, offsets, tiles[-1], w2, schedule.down, len(x_TH), columns)
        combine(rows, slot_row_TK, weights_TK, x_TH, *affine, schedule.block_h, into=(out_TH, first))
        del rows  # its memory goes to the next slice
    return out_TH
