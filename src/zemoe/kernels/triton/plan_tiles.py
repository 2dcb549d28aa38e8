"""The plan of a layer on the device: rows by expert, tiles of rows, and what the zero-computation experts add.

The row of a choice is the number of choices that come before it by (expert, index). Few choices: one launch, in which
each program compares its own choices with all others. Many choices: two launches. The first counts the choices of each
expert in each block; in the second each program adds up the blocks before its own and compares only within parts of it.

Legend: T tokens, K choices a token, N = T * K choices and row bound, E FFN experts, C constant experts, B blocks of
choices, P tile bound. A choice without a row (a zero-computation expert, -1, any other id) counts as one of an
"expert" E. Rows from the last choice that has one to N are padding rows: N is a bound that is known without the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficients import CONSTANT, coefficients, entries_of
from .launch import begin, launch_options
from .tiles import cdiv, max_tiles, next_power_of_2, rows_of_products

# Above this many choices two launches are faster than one.
MOST_COMPARED = 2048
# One launch: choices that a program places, how many it compares them with at once, tiles of a program.
_PLACED = 16
_COMPARED = 512
_COUNTED = 1024
_TILES_OF_A_PROGRAM = 16
_COMPARING_WARPS = 4
# Two launches: blocks at most, choices of a part, and how many values of the blocks' counts are added up at once. Fewer
# choices than threads would have each thread load all that it compares with, instead of exchanging them.
_BLOCKS = 128
_MANY_CHOICES, _BLOCKS_OF_MANY = 100_000, 256  # two programs a multiprocessor hide each other's waiting
_PART = 128
_COUNTED_OF_A_BLOCK = 2048
_ADDED = 16384
_TILE_PROGRAMS = 16
_TILES_AT_ONCE = 32
_COUNTING_WARPS = 4
_PLACING_WARPS = 4
_COEFFICIENT_TOKENS = 64

_Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # weights, ids, scales, logits of the constants
_Plan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # what `plan_tiles` returns
_Entries = tuple[tuple[int, int, int, int], ...]  # what `entries_of` returns


@triton.jit
def _expert(id, valid, E):
    """Return the FFN expert of each id, E for any other id. It is compared before it is narrowed to int32."""
    return tl.where(valid & (id >= 0) & (id < E), id, E).to(tl.int32)


@triton.jit
def _write_schedule(
    rows_e,
    offsets_ptr,
    tiles_ptr,
    program,
    programs,
    E,
    P,
    BLOCK_MS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write a program's share of each list of tiles; program 0 writes the offsets and numbers of tiles as well.

    rows_e: how many rows each expert has.
    """
    e = tl.arange(0, BLOCK_E)
    for i in tl.static_range(len(BLOCK_MS)):
        list_ptr = tiles_ptr + i * 2 * (P + 1)
        tiles_e = (rows_e + BLOCK_MS[i] - 1) // BLOCK_MS[i]
        both_e = tl.cumsum((rows_e.to(tl.int64) << 32) | tiles_e)  # one scan for two
        stop_e = (both_e >> 32).to(tl.int32)
        last_e = both_e.to(tl.int32)
        if program == 0:
            tl.store(offsets_ptr, 0)
            tl.store(offsets_ptr + 1 + e, stop_e, mask=e < E)
            tl.store(list_ptr, tl.sum(tiles_e))
            tl.store(list_ptr + 1, 0)
        row_e = stop_e - rows_e - (last_e - tiles_e) * BLOCK_MS[i]  # where tile 0 would begin
        for first in range(program * BLOCK_P, P, programs * BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            expert = tl.sum((last_e[:, None] <= p[None, :]).to(tl.int32), axis=0)
            used = expert < BLOCK_E
            row = tl.gather(row_e, tl.where(used, expert, 0), 0) + p * BLOCK_MS[i]
            tl.store(list_ptr + 2 + 2 * p, tl.where(used, expert, -1), mask=p < P)
            tl.store(list_ptr + 3 + 2 * p, tl.where(used, row, 0), mask=p < P)


@triton.jit
def _count(ids_ptr, start, stop, E, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return how many rows each expert has among the choices from start to stop."""
    rows_e = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(start, stop, BLOCK_N):
        c = first + tl.arange(0, BLOCK_N)
        expert = _expert(tl.load(ids_ptr + c, mask=c < stop, other=-1), c < stop, E)
        rows_e += tl.histogram(expert, BLOCK_E, mask=expert < E)
    return rows_e


@triton.jit(do_not_specialize=["T", "P", "tile_programs", "place_programs"])
def _plan_few(
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
    tile_programs,
    place_programs,
    K: tl.constexpr,
    C: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK_MS: tl.constexpr,
    PLACED_T: tl.constexpr,
    COEFFICIENT_T: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Programs write BLOCK_P tiles each, the slowest work; then programs place PLACED_T tokens each; the last
    make alpha and beta.
    """
    begin(OVERLAP)
    N = T * K
    pid = tl.program_id(0)
    if pid < tile_programs:
        rows_e = _count(ids_ptr, 0, N, E, COUNTED, BLOCK_E)
        _write_schedule(rows_e, offsets_ptr, tiles_ptr, pid, tile_programs, E, P, BLOCK_MS, BLOCK_E, BLOCK_P)
    elif pid < tile_programs + place_programs:
        start = (pid - tile_programs) * PLACED_T * K
        place = tl.arange(0, BLOCK_C)
        c = start + place
        exists = (place < PLACED_T * K) & (c < N)
        expert = _expert(tl.load(ids_ptr + c, mask=exists, other=-1), exists, E)
        key = expert * N + c
        before = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.int32)
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            other = _expert(tl.load(ids_ptr + n, mask=n < N, other=-1), n < N, E) * N + n
            before += (other[:, None] < key[None, :]).to(tl.int32)
        row = tl.sum(before, axis=0)
        # Choices without a row come last in this order: their places are the padding rows.
        tl.store(row_token_ptr + row, tl.where(expert < E, c // K, 0), mask=exists)
        tl.store(slot_row_ptr + c, tl.where(expert < E, row, -1), mask=exists)
    else:
        coefficients(
            weights_ptr, ids_ptr, scale_ptr, constant_ptr, alpha_ptr, beta_ptr,
            (pid - tile_programs - place_programs) * COEFFICIENT_T, T, E, K, C, KINDS, COEFFICIENT_T, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "B", "block_t"])
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
    B,
    block_t,
    K: tl.constexpr,
    C: tl.constexpr,
    KINDS: tl.constexpr,
    COEFFICIENT_T: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Programs count each expert's rows in a block, a line of rows [B, BLOCK_E]; then programs make alpha and beta."""
    begin(OVERLAP)
    pid = tl.program_id(0)
    if pid < B:
        stop = tl.minimum((pid + 1) * block_t, T)
        rows_e = _count(ids_ptr, pid * block_t * K, stop * K, E, COUNTED, BLOCK_E)
        tl.store(rows_ptr + pid * BLOCK_E + tl.arange(0, BLOCK_E), rows_e)
    else:
        coefficients(
            weights_ptr, ids_ptr, scale_ptr, constant_ptr, alpha_ptr, beta_ptr,
            (pid - B) * COEFFICIENT_T, T, E, K, C, KINDS, COEFFICIENT_T, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "P", "B", "parts", "tile_programs"])
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
    tile_programs,
    K: tl.constexpr,
    PART_T: tl.constexpr,
    BLOCK_MS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Programs write the tiles, then programs place a block each, in `parts` parts of PART_T tokens."""
    begin(OVERLAP)
    N = T * K
    block = tl.program_id(0) - tile_programs
    e = tl.arange(0, BLOCK_E)
    rows_e = tl.zeros([BLOCK_E], dtype=tl.int32)
    before_e = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        rows_be = tl.load(rows_ptr + b[:, None] * BLOCK_E + e[None, :], mask=(b < B)[:, None], other=0)
        rows_e += tl.sum(rows_be, axis=0)
        before_e += tl.sum(tl.where((b < block)[:, None], rows_be, 0), axis=0)
    if block < 0:
        _write_schedule(
            rows_e, offsets_ptr, tiles_ptr, block + tile_programs, tile_programs, E, P, BLOCK_MS, BLOCK_E, BLOCK_P
        )
    else:
        total = tl.sum(rows_e)
        next_e = tl.cumsum(rows_e) - rows_e + before_e  # the row of each expert's next choice
        place = tl.arange(0, BLOCK_C)
        c = block * parts * PART_T * K + place
        id = tl.load(ids_ptr + c, mask=(place < PART_T * K) & (c < N), other=-1)
        for _ in range(parts):
            exists = (place < PART_T * K) & (c < N)
            expert = _expert(id, exists, E)
            following = c + PART_T * K
            id = tl.load(ids_ptr + following, mask=(place < PART_T * K) & (following < N), other=-1)
            same_before = (expert[:, None] == expert[None, :]) & (place[:, None] < place[None, :])
            has_row = expert < E
            row = tl.gather(next_e, tl.where(has_row, expert, 0), 0) + tl.sum(same_before.to(tl.int32), axis=0)
            tl.store(row_token_ptr + row, c // K, mask=has_row)
            tl.store(slot_row_ptr + c, tl.where(has_row, row, -1), mask=exists)
            tl.store(row_token_ptr + c, 0, mask=exists & (c >= total))  # a padding row
            next_e += tl.histogram(expert, BLOCK_E, mask=has_row)
            c = following


def plan_tiles(
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
    most_blocks: int | None = None,
    part: int = _PART,
) -> _Plan:
    """Plan the rows of all experts from the routing, in one launch up to `most_compared` choices, else in two.

    Args:
        topk_weights_TK: [T, K] float32. topk_ids_TK: [T, K] int32 or int64 of any values; one that names no expert is
            left out.
        num_experts: E <= 1024.
        num_slots: A, or -1 for no bound; only checked against `kinds`, for an id without a kind counts nowhere.
        block_m: rows of a tile of the first product; zemoe.kernels.triton.tiles says what the second one's are.
        kinds: (ZERO, IDENTITY, SCALED or CONSTANT, count) in id order from id E on.
        scale_S: float scales of the SCALED slots. constant_logits_TC2: float32 W_j x of the CONSTANT slots.
        most_compared: the choices up to which there is one launch. most_blocks, part: how many blocks two launches
            make of the choices at most, and how many choices are compared at once. For tests and timing.

    Returns:
        row_token_N int32: the token of each row, 0 for a padding row.
        slot_row_TK int32: the row of each choice, -1 for one that has none.
        expert_offsets int32 [E + 1]: expert e owns the rows from expert_offsets[e] to expert_offsets[e + 1], in order
            of the choice index.
        tiles int32 [1 or 2, P + 1, 2]: one list for both products, or one each. In a list first (number of tiles, 0),
            then (expert, first row) of each tile, then (-1, 0).
        alpha_T, beta_TC float32: zemoe.affine.affine_coefficients; beta None without a CONSTANT slot.

    Raises:
        ValueError: if kinds name more slots than num_slots.
    """
    T, K = topk_ids_TK.shape
    E, N = num_experts, T * K
    C = sum(count for kind, count in kinds if kind == CONSTANT)
    if 0 <= num_slots < E + sum(count for _, count in kinds):
        raise ValueError(f"kinds must name at most num_slots={num_slots} slots with num_experts={E}, got {kinds}")
    block_ms = tuple(dict.fromkeys(rows_of_products(block_m)))
    P = max_tiles(N, E, min(block_ms))
    plan = _allocate(T, K, E, C, P, len(block_ms), topk_ids_TK.device)
    if not N:
        return plan
    constant_logits_TC2 = None if constant_logits_TC2 is None else constant_logits_TC2.contiguous()
    inputs = topk_weights_TK.contiguous(), topk_ids_TK.contiguous(), scale_S, constant_logits_TC2
    if most_compared >= N:
        _launch_comparison(inputs, plan, E, C, P, entries_of(kinds), block_ms)
    else:
        if most_blocks is None:
            most_blocks = _BLOCKS if N < _MANY_CHOICES else _BLOCKS_OF_MANY
        part_t = max(part // K, 1)
        parts = cdiv(cdiv(T, part_t), most_blocks)
        rows = _launch_count(inputs, plan, E, C, entries_of(kinds), part_t * parts)
        _launch_placement(inputs[1], rows, plan, E, P, block_ms, part_t, parts)
    return plan


def _allocate(T: int, K: int, E: int, C: int, P: int, lists: int, device: torch.device) -> _Plan:
    """Return the tensors that `plan_tiles` returns, to be written; zeros where there is no choice to plan."""
    make = torch.empty if T * K else torch.zeros
    return (
        make(T * K, dtype=torch.int32, device=device),
        make((T, K), dtype=torch.int32, device=device),
        make(E + 1, dtype=torch.int32, device=device),
        make((lists, P + 1, 2), dtype=torch.int32, device=device),
        make(T, dtype=torch.float32, device=device),
        make((T, C), dtype=torch.float32, device=device) if C else None,
    )


def _launch_comparison(
    inputs: _Inputs, plan: _Plan, E: int, C: int, P: int, entries: _Entries, block_ms: tuple[int, ...]
) -> None:
    """Plan few choices in one launch, in which each choice is compared with all others."""
    T, K = inputs[1].shape
    n = max(next_power_of_2(T * K), 16)
    placed_t = 1 << max((_PLACED // K).bit_length() - 1, 0)
    coefficient_t = min(next_power_of_2(T), _COEFFICIENT_TOKENS)
    tile_programs = max(cdiv(P, _TILES_OF_A_PROGRAM), 1)
    place_programs = cdiv(T, placed_t)
    _plan_few[(tile_programs + place_programs + cdiv(T, coefficient_t),)](
        *inputs,
        *plan,
        T,
        E,
        P,
        tile_programs,
        place_programs,
        K=K,
        C=C,
        KINDS=entries,
        BLOCK_MS=block_ms,
        PLACED_T=placed_t,
        COEFFICIENT_T=coefficient_t,
        COUNTED=min(n, _COUNTED),
        BLOCK_K=next_power_of_2(K),
        BLOCK_C=next_power_of_2(placed_t * K),
        BLOCK_N=min(n, _COMPARED),
        BLOCK_E=_experts_in_registers(E),
        BLOCK_P=_TILES_OF_A_PROGRAM,
        num_warps=_COMPARING_WARPS,
        **launch_options(inputs[1], T),
    )


def _launch_count(inputs: _Inputs, plan: _Plan, E: int, C: int, entries: _Entries, block_t: int) -> Tensor:
    """Count each expert's rows in every block of `block_t` tokens: [B, BLOCK_E], flat. Makes alpha and beta as well."""
    T, K = inputs[1].shape
    B, block_e = cdiv(T, block_t), _experts_in_registers(E)
    rows = torch.empty(B * block_e, dtype=torch.int32, device=inputs[1].device)
    _count_blocks[(B + cdiv(T, _COEFFICIENT_TOKENS),)](
        *inputs,
        rows,
        *plan[4:],
        T,
        E,
        B,
        block_t,
        K=K,
        C=C,
        KINDS=entries,
        COEFFICIENT_T=_COEFFICIENT_TOKENS,
        COUNTED=min(next_power_of_2(block_t * K), _COUNTED_OF_A_BLOCK),
        BLOCK_K=next_power_of_2(K),
        BLOCK_E=block_e,
        num_warps=_COUNTING_WARPS,
        **launch_options(inputs[1], T),
    )
    return rows


def _launch_placement(
    ids_TK: Tensor, rows: Tensor, plan: _Plan, E: int, P: int, block_ms: tuple[int, ...], part_t: int, parts: int
) -> None:
    """Place the choices and write the tiles by what `_launch_count` has counted in blocks of parts * part_t tokens."""
    T, K = ids_TK.shape
    B, block_e = cdiv(T, part_t * parts), _experts_in_registers(E)
    tile_programs = min(max(cdiv(P, _TILES_AT_ONCE), 1), _TILE_PROGRAMS)
    _place_blocks[(tile_programs + B,)](
        ids_TK,
        rows,
        *plan[:4],
        T,
        E,
        P,
        B,
        parts,
        tile_programs,
        K=K,
        PART_T=part_t,
        BLOCK_MS=block_ms,
        BLOCK_B=min(next_power_of_2(B), max(_ADDED // block_e, 1)),
        BLOCK_C=next_power_of_2(part_t * K),
        BLOCK_E=block_e,
        BLOCK_P=_TILES_AT_ONCE,
        num_warps=_PLACING_WARPS,
        **launch_options(ids_TK, T),
    )


def _experts_in_registers(E: int) -> int:
    """Return BLOCK_E: how many experts a program holds, a power of two."""
    return max(next_power_of_2(E), 16)
