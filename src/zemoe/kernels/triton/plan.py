"""The plan of a layer on the device: rows by expert, tiles of rows, and what the zero-computation experts add.

Few choices: one launch. A choice's row is the number of choices that come before it by (expert, index), and counting
them costs less than sorting while there are few. Many choices: two launches. The first counts the choices of each
expert in each block; the second adds up the blocks before its own and sorts its own.

Legend: T tokens, K choices a token, N = T * K choices and row bound, E FFN experts, C constant experts, B blocks of
choices, P tile bound. A choice without a row (a zero-computation expert, -1, any other id) counts to "expert" E.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ZERO, IDENTITY, SCALED, CONSTANT = range(4)

# Above this many choices two launches are faster than one.
MOST_COMPARED = 4096
# Choices that a program places by comparison, and how many it compares them with at once.
_PLACED = 32
_COMPARED = 256
_COUNTED = 1024
_COMPARING_WARPS = 4
# Choices that a program sorts at once, and how many blocks of them there should be at most.
_FEWEST_SORTED, _MOST_SORTED = 256, 2048
_BLOCKS = 128
_SORTING_WARPS = 8
_BLOCKS_AT_ONCE = 16
_TILES_OF_A_PROGRAM = 32


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """P: the most tiles of `block_m` rows that `num_rows` rows of `num_experts` experts can need."""
    return min(num_experts, num_rows) + num_rows // block_m


# triton's own return what its type hints call a constexpr.
def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _entries(kinds: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int, int, int], ...]:
    """(kind, first slot after E, slots, how many slots of this kind there are before it) of each entry of `kinds`."""
    return tuple(
        (kind, sum(n for _, n in kinds[:i]), count, sum(n for other, n in kinds[:i] if other == kind))
        for i, (kind, count) in enumerate(kinds)
    )


@triton.jit
def _expert(id, valid, E):
    """The FFN expert of each id, E for anything else. Compared before it is narrowed: an int64 may hold anything."""
    return tl.where(valid & (id >= 0) & (id < E), id, E).to(tl.int32)


@triton.jit
def _affine(
    weights_ptr,
    ids_ptr,
    scale_ptr,
    constant_ptr,
    alpha_ptr,
    beta_ptr,
    first_token,
    T,
    E,
    K: tl.constexpr,
    C: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """alpha and beta of BLOCK_T tokens, by the rules of zemoe.affine. KINDS: what _entries returns."""
    t = first_token + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    at = t[:, None] * K + k[None, :]
    exists = (t < T)[:, None] & (k < K)[None, :]
    id = tl.load(ids_ptr + at, mask=exists, other=-1)
    weight = tl.load(weights_ptr + at, mask=exists, other=0.0)
    alpha = tl.zeros([BLOCK_T], dtype=tl.float32)
    constant = tl.full([BLOCK_T, BLOCK_K], -1, dtype=tl.int32)
    for i in tl.static_range(len(KINDS)):
        first = E + KINDS[i][1]
        mine = (id >= first) & (id < first + KINDS[i][2])
        w = tl.where(mine, weight, 0.0)
        if KINDS[i][0] == 0:  # by multiplication, so that a lost token's NaN reaches its output
            alpha += tl.sum(w * 0.0, axis=1)
        elif KINDS[i][0] == 1:
            alpha += tl.sum(w, axis=1)
        elif KINDS[i][0] == 2:
            scale = tl.load(scale_ptr + (id - first + KINDS[i][3]), mask=mine, other=0.0).to(tl.float32)
            alpha += tl.sum(w * scale, axis=1)
        else:
            constant = tl.where(mine, (id - first + KINDS[i][3]).to(tl.int32), constant)
    if C > 0:
        w = tl.where(constant >= 0, weight, 0.0)
        # A NaN among these weights loses every constant of the token.
        lost = tl.sum((w != w).to(tl.int32), axis=1) > 0
        for j in range(C):
            w_c = tl.where(lost, float("nan"), tl.sum(tl.where(constant == j, w, 0.0), axis=1))
            pair_ptr = constant_ptr + (t * C + j) * 2
            a1 = tl.load(pair_ptr, mask=t < T, other=0.0)
            a2 = tl.load(pair_ptr + 1, mask=t < T, other=0.0)
            largest = tl.maximum(a1, a2)
            a1 = tl.exp(a1 - largest)
            a2 = tl.exp(a2 - largest)
            alpha += w_c * (a1 / (a1 + a2))
            tl.store(beta_ptr + t * C + j, w_c * (a2 / (a1 + a2)), mask=t < T)
    tl.store(alpha_ptr + t, alpha, mask=t < T)


@triton.jit
def _write_schedule(
    rows_e,
    offsets_ptr,
    tiles_ptr,
    part,
    E,
    P,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """BLOCK_P tiles; with part 0 the offsets and the number of tiles as well. rows_e: rows of each expert."""
    e = tl.arange(0, BLOCK_E)
    stop_e = tl.cumsum(rows_e)
    tiles_e = (rows_e + BLOCK_M - 1) // BLOCK_M
    last_e = tl.cumsum(tiles_e)
    if part == 0:
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + e, stop_e, mask=e < E)
        tl.store(tiles_ptr, tl.sum(tiles_e))
        tl.store(tiles_ptr + 1, 0)
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    expert = tl.sum((last_e[None, :] <= p[:, None]).to(tl.int32), axis=1)
    used = expert < BLOCK_E
    row = tl.gather(stop_e - rows_e - (last_e - tiles_e) * BLOCK_M, tl.where(used, expert, 0), 0) + p * BLOCK_M
    tl.store(tiles_ptr + 2 + 2 * p, tl.where(used, expert, -1), mask=p < P)
    tl.store(tiles_ptr + 3 + 2 * p, tl.where(used, row, 0), mask=p < P)


@triton.jit
def _count(ids_ptr, start, stop, E, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows of each expert among the choices from start to stop."""
    rows_e = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(start, stop, BLOCK_N):
        c = first + tl.arange(0, BLOCK_N)
        expert = _expert(tl.load(ids_ptr + c, mask=c < stop, other=-1), c < stop, E)
        rows_e += tl.histogram(expert, BLOCK_E, mask=expert < E)
    return rows_e


@triton.jit(do_not_specialize=["T", "P"])
def _plan_by_comparison(
    weights_ptr,
    ids_ptr,
    scale_ptr,
    constant_ptr,
    row_token_ptr,
    slot_row_ptr,
    offsets_ptr,
    tiles_ptr,
    alpha_ptr,
    beta_ptr,
    T,
    E,
    P,
    K: tl.constexpr,
    C: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Programs that place BLOCK_T tokens each, then programs that write BLOCK_P tiles each."""
    N = T * K
    placing = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    if pid < placing:
        c = pid * BLOCK_T * K + tl.arange(0, BLOCK_C)
        exists = (c < (pid + 1) * BLOCK_T * K) & (c < N)
        expert = _expert(tl.load(ids_ptr + c, mask=exists, other=-1), exists, E)
        key = expert * N + c
        before = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.int32)
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            other = _expert(tl.load(ids_ptr + n, mask=n < N, other=-1), n < N, E) * N + n
            before += (other[None, :] < key[:, None]).to(tl.int32)
        row = tl.sum(before, axis=1)
        # Choices without a row come last in this order: they fill the rows that belong to nobody.
        tl.store(row_token_ptr + row, tl.where(expert < E, c // K, 0), mask=exists)
        tl.store(slot_row_ptr + c, tl.where(expert < E, row, -1), mask=exists)
        _affine(
            weights_ptr, ids_ptr, scale_ptr, constant_ptr, alpha_ptr, beta_ptr,
            pid * BLOCK_T, T, E, K, C, KINDS, BLOCK_T, BLOCK_K,
        )  # fmt: skip
    else:
        rows_e = _count(ids_ptr, 0, N, E, COUNTED, BLOCK_E)
        _write_schedule(rows_e, offsets_ptr, tiles_ptr, pid - placing, E, P, BLOCK_M, BLOCK_E, BLOCK_P)


@triton.jit(do_not_specialize=["T", "parts"])
def _count_blocks(
    weights_ptr,
    ids_ptr,
    scale_ptr,
    constant_ptr,
    rows_ptr,
    alpha_ptr,
    beta_ptr,
    T,
    E,
    parts,
    K: tl.constexpr,
    C: tl.constexpr,
    KINDS: tl.constexpr,
    PART_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """rows [B, BLOCK_E]: each expert's rows in each block; alpha and beta of the block's tokens."""
    b = tl.program_id(0)
    start = b * parts * PART_T
    stop = tl.minimum(start + parts * PART_T, T)
    rows_e = _count(ids_ptr, start * K, stop * K, E, BLOCK_N, BLOCK_E)
    tl.store(rows_ptr + b * BLOCK_E + tl.arange(0, BLOCK_E), rows_e)
    for first in range(start, stop, BLOCK_T):
        _affine(
            weights_ptr, ids_ptr, scale_ptr, constant_ptr, alpha_ptr, beta_ptr,
            first, stop, E, K, C, KINDS, BLOCK_T, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "P", "B", "parts"])
def _place_blocks(
    ids_ptr,
    rows_ptr,
    row_token_ptr,
    slot_row_ptr,
    offsets_ptr,
    tiles_ptr,
    T,
    E,
    P,
    B,
    parts,
    K: tl.constexpr,
    PART_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Programs that place a block each, in `parts` parts of PART_T tokens; then programs that write BLOCK_P tiles."""
    N = T * K
    pid = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    rows_e = tl.zeros([BLOCK_E], dtype=tl.int32)
    before_e = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        rows_be = tl.load(rows_ptr + b[:, None] * BLOCK_E + e[None, :], mask=(b < B)[:, None], other=0)
        rows_e += tl.sum(rows_be, axis=0)
        before_e += tl.sum(tl.where((b < pid)[:, None], rows_be, 0), axis=0)
    if pid < B:
        total = tl.sum(rows_e)
        next_e = tl.cumsum(rows_e) - rows_e + before_e  # the row of each expert's next choice
        place = tl.arange(0, BLOCK_N)
        for part in range(parts):
            start = (pid * parts + part) * PART_T * K
            exists = (place < PART_T * K) & (start + place < N)
            id = tl.load(ids_ptr + start + place, mask=exists, other=-1)
            expert = tl.where(exists, _expert(id, exists, E), E + 1)
            key = tl.sort(expert * BLOCK_N + place)
            mine_e = tl.histogram(expert, BLOCK_E, mask=expert < E)
            sorted_expert = key // BLOCK_N
            has_row = sorted_expert < E
            first_e = next_e - (tl.cumsum(mine_e) - mine_e)
            row = tl.gather(first_e, tl.where(has_row, sorted_expert, 0), 0) + place
            c = start + key % BLOCK_N
            tl.store(row_token_ptr + row, c // K, mask=has_row)
            tl.store(slot_row_ptr + c, tl.where(has_row, row, -1), mask=sorted_expert <= E)
            # Rows that belong to nobody.
            tl.store(row_token_ptr + start + place, 0, mask=exists & (start + place >= total))
            next_e += mine_e
    else:
        _write_schedule(rows_e, offsets_ptr, tiles_ptr, pid - B, E, P, BLOCK_M, BLOCK_E, BLOCK_P)


def prepare(
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    *,
    num_experts: int,
    num_slots: int,
    block_m: int,
    kinds: tuple[tuple[int, int], ...],
    scale_S: Tensor | None = None,
    constant_logits_TC2: Tensor | None = None,
    most_compared: int = MOST_COMPARED,
    blocks: int = _BLOCKS,
    fewest_sorted: int = _FEWEST_SORTED,
    most_sorted: int = _MOST_SORTED,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Everything that the experts need to know of the routing, in one launch up to `most_compared` choices, else two.

    Args:
        topk_weights_TK: [T, K] float32. topk_ids_TK: [T, K] int32 or int64 of any values; one that names no expert is
            left out.
        num_experts: E <= 1024.
        num_slots: A, or -1 for no bound; only checked against `kinds`, for an id without a kind counts nowhere.
        block_m: rows of a tile.
        kinds: (ZERO, IDENTITY, SCALED or CONSTANT, count) in id order from id E on.
        scale_S: float scales of the SCALED slots. constant_logits_TC2: float32 W_j x of the CONSTANT slots.
        most_compared, blocks, fewest_sorted, most_sorted: where two launches begin, how many blocks they make at most,
            and the choices that one sort may take; for tests and timing.

    Returns:
        row_token_N int32: the token of each row, 0 where a row belongs to nobody.
        slot_row_TK int32: the row of each choice, -1 for one that has none.
        expert_offsets int32 [E + 1]: expert e owns the rows from expert_offsets[e] to expert_offsets[e + 1], in order
            of the choice index.
        tiles int32 [P + 1, 2]: first (number of tiles, 0), then (expert, first row) of each tile, then (-1, 0).
        alpha_T, beta_TC float32: zemoe.affine.affine_coefficients; beta None without a CONSTANT slot.

    Raises:
        ValueError: if kinds name more slots than num_slots.
    """
    T, K = topk_ids_TK.shape
    E, N, device = num_experts, T * K, topk_ids_TK.device
    C = sum(count for kind, count in kinds if kind == CONSTANT)
    if 0 <= num_slots < E + sum(count for _, count in kinds):
        raise ValueError(f"kinds must name at most num_slots={num_slots} slots with num_experts={E}, got {kinds}")
    P = max_tiles(N, E, block_m)
    make = torch.empty if N else torch.zeros
    row_token_N = make(N, dtype=torch.int32, device=device)
    slot_row_TK = make((T, K), dtype=torch.int32, device=device)
    expert_offsets = make(E + 1, dtype=torch.int32, device=device)
    tiles = make((P + 1, 2), dtype=torch.int32, device=device)
    alpha_T = make(T, dtype=torch.float32, device=device)
    beta_TC = make((T, C), dtype=torch.float32, device=device) if C else None
    result = row_token_N, slot_row_TK, expert_offsets, tiles, alpha_T, beta_TC
    if not N:
        return result

    inputs = topk_weights_TK.contiguous(), topk_ids_TK.contiguous()
    params = scale_S, None if constant_logits_TC2 is None else constant_logits_TC2.contiguous()
    entries = _entries(kinds)
    block_k = _next_power_of_2(K)
    block_e = max(_next_power_of_2(E), 16)
    tile_programs = max(_parts(P, _TILES_OF_A_PROGRAM), 1)
    if most_compared >= N:
        block_n = max(_next_power_of_2(N), 16)
        block_t = 1 << max((_PLACED // K).bit_length() - 1, 0)
        _plan_by_comparison[(_parts(T, block_t) + tile_programs,)](
            *inputs,
            *params,
            *result,
            T,
            E,
            P,
            K=K,
            C=C,
            KINDS=entries,
            BLOCK_M=block_m,
            BLOCK_T=block_t,
            BLOCK_K=block_k,
            BLOCK_C=_next_power_of_2(block_t * K),
            BLOCK_N=min(block_n, _COMPARED),
            COUNTED=min(block_n, _COUNTED),
            BLOCK_E=block_e,
            BLOCK_P=_TILES_OF_A_PROGRAM,
            num_warps=_COMPARING_WARPS,
        )
        return result

    block_n = min(max(_next_power_of_2(_parts(N, blocks)), fewest_sorted), most_sorted)
    block_n = max(block_n, block_k)
    part_t = block_n // K
    parts = _parts(_parts(T, part_t), blocks)
    B = _parts(T, part_t * parts)
    rows = torch.empty(B * block_e, dtype=torch.int32, device=device)
    _count_blocks[(B,)](
        *inputs,
        *params,
        rows,
        alpha_T,
        beta_TC,
        T,
        E,
        parts,
        K=K,
        C=C,
        KINDS=entries,
        PART_T=part_t,
        BLOCK_T=32,
        BLOCK_K=block_k,
        BLOCK_N=block_n,
        BLOCK_E=block_e,
        num_warps=_SORTING_WARPS,
    )
    _place_blocks[(B + tile_programs,)](
        inputs[1],
        rows,
        row_token_N,
        slot_row_TK,
        expert_offsets,
        tiles,
        T,
        E,
        P,
        B,
        parts,
        K=K,
        PART_T=part_t,
        BLOCK_M=block_m,
        BLOCK_B=_BLOCKS_AT_ONCE,
        BLOCK_N=block_n,
        BLOCK_E=block_e,
        BLOCK_P=_TILES_OF_A_PROGRAM,
        num_warps=_SORTING_WARPS,
    )
    return result
