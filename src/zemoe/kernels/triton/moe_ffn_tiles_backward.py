"""Gradients of the FFN experts, by the tiles of the forward; no atomics, so that the same input gives the same bits.

For each row n (a choice of token t that fell on expert e, weight s), from the saved pre-activation (gate, up):

    dinner  = w2[e]^T dout[t]                        ds = <dinner, inner>,  inner = act(gate) * up
    dgate   = s dinner * up * act'(gate)             dup = s dinner * act(gate)
    dw2[e] += dout[t] (s inner)^T                    dw13[e] += (dgate, dup) x[t]^T
    dx[t]  += w13[e]^T (dgate, dup)                  an expert's output is never needed again

T tokens, H hidden size, I expert width, E FFN experts, K choices, N = T * K row bound, B blocks of I. All grids come
from static bounds, and a program without work ends at once. What padding rows hold has no
influence, and they are not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import columns_of, descriptor, gather, multiply_rows, tokens_of
from .combine import grad_tokens
from .grad_weight import grad_weight
from .launch import begin, launch_options
from .tiles import BackwardSchedule, Product, cdiv, max_tiles

_SCATTERED = 1024  # choices of a program
# Columns of the pre-activation that a program of _grad_preact turns into gradients at once: as many as fit beside
# 128 x 256 sums.
_COLUMNS_AT_ONCE = 32


@triton.jit
def _scatter_weights(slot_row, weights, row_weight, N, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """row_weight[row of a choice] = weight of the choice."""
    begin(OVERLAP)
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(slot_row + choice, mask=choice < N, other=-1)
    tl.store(row_weight + row, tl.load(weights + choice, mask=choice < N, other=0.0), mask=row >= 0)


@triton.jit
def _activate_and_derive(gate, ACTIVATION: tl.constexpr):
    """(act(gate), its derivative)."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-gate))
        return gate * s, s * (1.0 + gate * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        return gate * cdf, cdf + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        square = gate * gate
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * gate * (1.0 + 0.044715 * square)))
        return gate * s, s + gate * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * square))


@triton.jit
def _store_preact_gradient(
    dinner,
    preact,
    dpreact,
    inner,
    weight_M,
    row_M,
    in_expert_M,
    column,
    I,
    ACTIVATION: tl.constexpr,
    WANT_DPREACT: tl.constexpr,
    WANT_INNER: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Store what follows from dinner [M, n], columns column to column + n of rows row_M; return <dinner, inner>."""
    M: tl.constexpr = dinner.shape[0]
    n: tl.constexpr = dinner.shape[1]
    if n > AT_ONCE:
        left, right = dinner.reshape([M, 2, n // 2]).permute(0, 2, 1).split()
        sum_M = _store_preact_gradient(
            left, preact, dpreact, inner, weight_M, row_M, in_expert_M, column, I,
            ACTIVATION, WANT_DPREACT, WANT_INNER, AT_ONCE,
        )  # fmt: skip
        sum_M += _store_preact_gradient(
            right, preact, dpreact, inner, weight_M, row_M, in_expert_M, column + n // 2, I,
            ACTIVATION, WANT_DPREACT, WANT_INNER, AT_ONCE,
        )  # fmt: skip
        return sum_M
    else:
        column_N = column + tl.arange(0, n)
        mask = in_expert_M[:, None] & (column_N < I)[None, :]
        gate_offset = row_M.to(tl.int64)[:, None] * (2 * I) + column_N[None, :]
        gate = tl.load(preact + gate_offset, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(preact + gate_offset + I, mask=mask, other=0.0).to(tl.float32)
        tl.debug_barrier()  # dpreact may be preact, and a thread may store what another one loads
        act, derivative = _activate_and_derive(gate, ACTIVATION)
        inner_MN = act * up
        if WANT_INNER:
            inner_ptr = inner + row_M.to(tl.int64)[:, None] * I + column_N[None, :]
            tl.store(inner_ptr, (inner_MN * weight_M[:, None]).to(inner.dtype.element_ty), mask=mask)
        if WANT_DPREACT:
            weighted = dinner * weight_M[:, None]
            tl.store(dpreact + gate_offset, (weighted * up * derivative).to(dpreact.dtype.element_ty), mask=mask)
            tl.store(dpreact + gate_offset + I, (weighted * act).to(dpreact.dtype.element_ty), mask=mask)
        return tl.sum(dinner * inner_MN, 1)


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def _grad_preact(
    dout,
    row_token,
    row_weight,
    offsets,
    tiles,
    w2,
    preact,
    dpreact,
    inner,
    partial,
    stride_dout,
    H: tl.constexpr,
    I: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WANT_DPREACT: tl.constexpr,
    WANT_INNER: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """dpreact [N, 2I], which may be preact itself; weight * inner [N, I]; partial [N, B], which add up to ds."""
    begin(OVERLAP)
    blocks_n: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    for index in range(tl.program_id(0), tl.load(tiles) * blocks_n, tl.num_programs(0)):
        tile = tiles + 2 * (1 + index // blocks_n)
        expert = tl.load(tile)
        block = index % blocks_n
        column = block * BLOCK_N
        row_M = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
        dout_M, in_expert_M = tokens_of(dout, row_token, row_M, tl.load(offsets + expert + 1), stride_dout)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, H, BLOCK_K):
            dout_MK = gather(dout_M, in_expert_M, k, H, BLOCK_K)
            w_KN = columns_of(w2, expert, k, column, H, I, BLOCK_K, BLOCK_N, TMA)
            acc = tl.dot(dout_MK, w_KN, acc)
        weight_M = tl.load(row_weight + row_M, mask=in_expert_M, other=0.0)
        sum_M = _store_preact_gradient(
            acc, preact, dpreact, inner, weight_M, row_M, in_expert_M, column, I,
            ACTIVATION, WANT_DPREACT, WANT_INNER, AT_ONCE,
        )  # fmt: skip
        tl.store(partial + row_M.to(tl.int64) * blocks_n + block, sum_M, mask=in_expert_M)


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def _grad_rows(
    dpreact,
    offsets,
    tiles,
    w13,
    out,
    N,
    H: tl.constexpr,
    TWO_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[n] = dpreact[n] times the w13 of its expert."""
    begin(OVERLAP)
    multiply_rows(dpreact, offsets, tiles, w13, out, N, TWO_I, H, 0, H, False, BLOCK_M, BLOCK_N, BLOCK_K, TMA, FLATTEN)


def row_weights(slot_row_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return [N] float32: the weight of each row. Padding rows are not written."""
    N = slot_row_TK.numel()
    weight_N = weights_TK.new_empty(N)
    _scatter_weights[(cdiv(N, _SCATTERED),)](
        slot_row_TK, weights_TK, weight_N, N, _SCATTERED, num_warps=4, **launch_options(weights_TK, len(weights_TK))
    )
    return weight_N


def grad_preact(
    dout_TH: Tensor,
    row_token_N: Tensor,
    weight_N: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    w2: Tensor,
    preact_N2I: Tensor,
    dpreact_N2I: Tensor | None,
    activation: str,
    product: Product,
    *,
    want_inner: bool,
    columns_at_once: int = _COLUMNS_AT_ONCE,
) -> tuple[Tensor | None, Tensor]:
    """Return (weight * inner [N, I] if wanted, [N, B] float32 whose rows add up to the gradients of the weights).

    dpreact_N2I: where to write the gradient of the pre-activation, preact_N2I itself if that is not needed again, None
    where it is not wanted. Padding rows are not written. columns_at_once: for timing.
    """
    (E, H, I), N = w2.shape, row_token_N.shape[0]
    inner_NI = preact_N2I.new_empty((N, I)) if want_inner else None
    blocks = cdiv(I, product.block_n)
    partial_NB = weight_N.new_empty((N, blocks))
    grid = (product.programs(max_tiles(N, E, product.block_m) * blocks),)
    _grad_preact[grid](
        dout_TH,
        row_token_N,
        weight_N,
        offsets,
        tiles,
        descriptor(w2, (1, product.block_k, product.block_n)) if product.tma else w2,
        preact_N2I,
        preact_N2I if dpreact_N2I is None else dpreact_N2I,
        preact_N2I if inner_NI is None else inner_NI,
        partial_NB,
        dout_TH.stride(0),
        H,
        I,
        activation,
        dpreact_N2I is not None,
        want_inner,
        columns_at_once,
        product.block_m,
        product.block_n,
        product.block_k,
        product.tma,
        num_warps=product.warps,
        num_stages=product.stages,
        **launch_options(dout_TH, len(dout_TH)),
    )
    return inner_NI, partial_NB


def grad_rows(
    dpreact_N2I: Tensor, offsets: Tensor, tiles: Tensor, w13: Tensor, product: Product, num_tokens: int
) -> Tensor:
    """Return [N, H]: what each row adds to the gradient of its token. Padding rows are not written."""
    (E, two_I, H), N = w13.shape, dpreact_N2I.shape[0]
    out_NH = dpreact_N2I.new_empty((N, H))
    grid = (product.programs(max_tiles(N, E, product.block_m) * cdiv(H, product.block_n)),)
    _grad_rows[grid](
        descriptor(dpreact_N2I, (product.block_m, product.block_k)) if product.tma else dpreact_N2I,
        offsets,
        tiles,
        descriptor(w13, (1, product.block_k, product.block_n)) if product.tma else w13,
        out_NH,
        N,
        H,
        two_I,
        product.block_m,
        product.block_n,
        product.block_k,
        product.tma,
        product.flatten,
        num_warps=product.warps,
        num_stages=product.stages,
        **launch_options(dpreact_N2I, num_tokens),
    )
    return out_NH


def moe_ffn_tiles_backward(
    dout_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    row_token_N: Tensor,
    slot_row_TK: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    w13: Tensor,
    w2: Tensor,
    alpha_T: Tensor,
    preact_N2I: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool, bool, bool],
    schedule: BackwardSchedule,
    into: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    overwrite: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weights, w13, w2 and alpha, None for each that is not in `needs`.

    preact_N2I: what the forward wrote. into: contiguous tensors that the gradients of w13 and w2 are added to, instead
    of being returned, or None. overwrite: preact is not needed again, and the gradient takes its place, which saves
    4 N I bytes. Beside it there are at most N (I or H) numbers of x's dtype at a time.
    """
    need_x, need_weights, need_w13, need_w2, need_alpha = needs
    T, N = len(x_TH), len(row_token_N)
    dw13 = dw2 = rows_NH = partial_NB = None
    if not w13.numel() or not N or not T:  # no product: there is no row, or all of them yield zeros
        dw13, dw2 = torch.zeros_like(w13) if need_w13 else None, torch.zeros_like(w2) if need_w2 else None
        rows_NH = x_TH.new_zeros((N, x_TH.shape[1])) if need_x else None
        partial_NB = alpha_T.new_zeros((N, 1)) if need_weights else None
    elif need_x or need_weights or need_w13 or need_w2:
        w13, w2 = w13.contiguous(), w2.contiguous()
        weight_N = row_weights(slot_row_TK, weights_TK.contiguous())
        dpreact_N2I = None
        if need_x or need_w13:
            dpreact_N2I = preact_N2I if overwrite else torch.empty_like(preact_N2I)
        inner_NI, partial_NB = grad_preact(
            dout_TH, row_token_N, weight_N, offsets, tiles, w2, preact_N2I, dpreact_N2I, activation, schedule.preact,
            want_inner=need_w2,
        )  # fmt: skip
        if inner_NI is not None:
            dw2 = grad_weight(inner_NI, dout_TH, row_token_N, offsets, schedule.weight, tokens_first=True, into=into[1])
            del inner_NI  # its memory goes to the rows
        if dpreact_N2I is not None:
            if need_w13:
                dw13 = grad_weight(
                    dpreact_N2I, x_TH, row_token_N, offsets, schedule.weight, tokens_first=False, into=into[0]
                )
            if need_x:
                rows_NH = grad_rows(dpreact_N2I, offsets, tiles, w13, schedule.rows, T)
    dw13, dw2 = (None if main is not None else grad for main, grad in zip(into, (dw13, dw2), strict=True))
    if not T:
        return (
            torch.empty_like(x_TH) if need_x else None,
            torch.empty_like(weights_TK) if need_weights else None,
            dw13,
            dw2,
            torch.empty_like(alpha_T) if need_alpha else None,
        )
    dx_TH = dweights_TK = dalpha_T = None
    if need_x or need_weights or need_alpha:
        dx_TH, dweights_TK, dalpha_T = grad_tokens(
            rows_NH, slot_row_TK, partial_NB if need_weights else None, dout_TH, x_TH, alpha_T.contiguous(),
            schedule.block_h, want_x=need_x, want_alpha=need_alpha,
        )  # fmt: skip
    return dx_TH, dweights_TK, dw13, dw2, dalpha_T
