"""alpha and beta of `zemoe.affine`: what zero-computation experts add to a token. Made in the plan's launches.

T tokens, K choices a token, E FFN experts, C constant experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

ZERO, IDENTITY, SCALED, CONSTANT = range(4)


def entries_of(kinds: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int, int, int], ...]:
    """Return (kind, first slot after E, slots, slots of this kind before it) of each entry of `kinds`."""
    return tuple(
        (kind, sum(n for _, n in kinds[:i]), count, sum(n for other, n in kinds[:i] if other == kind))
        for i, (kind, count) in enumerate(kinds)
    )


@triton.jit
def coefficients(
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
    """Make alpha and beta of BLOCK_T tokens by the rules of zemoe.affine. KINDS: what entries_of returns."""
    t = first_token + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    choice = t[:, None] * K + k[None, :]
    exists = (t < T)[:, None] & (k < K)[None, :]
    id = tl.load(ids_ptr + choice, mask=exists, other=-1)
    weight = tl.load(weights_ptr + choice, mask=exists, other=0.0)
    alpha = tl.zeros([BLOCK_T], dtype=tl.float32)
    constant = tl.full([BLOCK_T, BLOCK_K], -1, dtype=tl.int32)
    for i in tl.static_range(len(KINDS)):
        first = E + KINDS[i][1]
        mine = (id >= first) & (id < first + KINDS[i][2])
        w = tl.where(mine, weight, 0.0)
        if KINDS[i][0] == 0:  # by multiplication, so that a NaN weight reaches the token's output
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
        # A NaN among these weights makes every constant of the token NaN.
        has_nan = tl.sum((w != w).to(tl.int32), axis=1) > 0
        for j in range(C):
            w_c = tl.where(has_nan, float("nan"), tl.sum(tl.where(constant == j, w, 0.0), axis=1))
            pair_ptr = constant_ptr + (t * C + j) * 2
            a1 = tl.load(pair_ptr, mask=t < T, other=0.0)
            a2 = tl.load(pair_ptr + 1, mask=t < T, other=0.0)
            largest = tl.maximum(a1, a2)
            a1 = tl.exp(a1 - largest)
            a2 = tl.exp(a2 - largest)
            alpha += w_c * (a1 / (a1 + a2))
            tl.store(beta_ptr + t * C + j, w_c * (a2 / (a1 + a2)), mask=t < T)
    tl.store(alpha_ptr + t, alpha, mask=t < T)
