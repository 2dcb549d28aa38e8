"""The plan of a layer on the device: rows by expert, tiles of rows, and what the zero-computation experts add.

Few choices: one launch. A choice's row is the number of choices that come before it by (expert, index), and counting
them costs less than sorting while there are few. Many choices: two launches. The first counts the choices of each expert
in each block; the second adds up the blocks before its own and sorts its own.

Legend: T tokens, K choices a token, N = T * K choices and row bound, E FFN experts, C constant experts, B blocks of
choices, P tile bound. A choice without a row (a zero-computation expert, -1, any other id) counts to "expert" E.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ZERO, IDENTITY, SCALED, CONSTANT = range(4)

# Block sizes, in choices: how many a program places by comparison, compares with at once, and sorts at once.
_PLACED = 32
_COMPARED = 256
_SORTED = 2048
# Above this many choices two launches are faster than one.
_MOST_COMPARED = 4096
_MOST_BLOCKS = 128
_TILES_OF_A_PROGRAM = 32


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """P: the most tiles of `block_m` rows that `num_rows` rows of `num_experts` experts can need."""
    return min(num_experts, num_rows) + num_rows // block_m


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
    K,
    E,
    C,
    KINDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """alpha and beta of BLOCK_T tokens; the rules are those of zemoe.affine."""
    t = first_token + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    at = t[:, None] * K + k[None, :]
    exists = (t < T)[:, None] & (k < K)[None, :]
    id = tl.load(ids_ptr + at, mask=exists, other=-1)
    weight = tl.load(weights_ptr + at, mask=exists, other=0.0)
    alpha = tl.zeros([BLOCK_T], dtype=tl.float32)
    first = E
    scaled = 0
    constants = 0
    for i in tl.static_range(len(KINDS)):
        count: tl.constexpr = KINDS[i][1]
        mine = (id >= first) & (id < first + count)
        w = tl.where(mine, weight, 0.0)
        if KINDS[i][0] == 0:  # ZERO: by multiplication, so that a lost token's NaN reaches its output
            alpha += tl.sum(w * 0.0, axis=1)
        if KINDS[i][0] == 1:  # IDENTITY
            alpha += tl.sum(w, axis=1)
        if KINDS[i][0] == 2:  # SCALED
            scale = tl.load(scale_ptr + (id - first + scaled), mask=mine, other=0.0).to(tl.float32)
            alpha += tl.sum(w * scale, axis=1)
            scaled += count
        if KINDS[i][0] == 3:  # CONSTANT
            # One lost weight loses all constants of the token.
            lost = tl.sum((w != w).to(tl.int32), axis=1) > 0
            for j in range(C):
                weight_c = tl.sum(tl.where(id - first + constants == j, w, 0.0), axis=1)
                weight_c = tl.where(lost, float("nan"), weight_c)
                pair_ptr = constant_ptr + (t * C + j) * 2
                one = tl.load(pair_ptr, mask=t < T, other=0.0).to(tl.float32)
                two = tl.load(pair_ptr + 1, mask=t < T, other=0.0).to(tl.float32)
                one_share = 1.0 / (1.0 + tl.exp(two - one))
                two_share = 1.0 / (1.0 + tl.exp(one - two))
                alpha += weight_c * one_share
                beta = weight_c * two_share
                beta_at = beta_ptr + t * C + j
                if constants > 0:
                    beta += tl.load(beta_at, mask=t < T, other=0.0)
                tl.store(beta_at, beta, mask=t < T)
            constants += count
        first += count
    tl.store(alpha_ptr + t, alpha, mask=t < T)
