"""From logits to the chosen experts and their weights, one launch.

The rules: docs/specification.md, "Scores" up to "Renormalising".

A program routes one token. Its row of values to choose by stays in registers as integers of the same order; K times the
largest is taken, the lowest slot among equals.

Legend: T tokens, A slots, K choices, E FFN experts, G groups of S slots (one group of A where there is no group limit).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import begin, launch_options
from .tiles import MOST_CHOICES, MOST_SLOTS, cdiv, next_power_of_2

# Below the key of every float but one NaN, -inf included.
_TAKEN = tl.constexpr(-(2**31))
_NO_SLOT = tl.constexpr(2**31 - 1)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# exp() of anything below is 0 in float32; a bound, for an infinity would turn the correction in _exp into a NaN.
_EXP_IS_ZERO = tl.constexpr(-200.0)

# A row is cut into chunks, so that taking a slot out of it needs a look at one of them only; long rows into longer ones
# (measured at 96, 384 and 768 slots).
_CHUNK, _LONG_CHUNK, _LONG_ROW = 128, 256, 512
# What one warp holds in its registers without spilling.
_SLOTS_OF_A_WARP = 1024


@triton.jit
def _exp(x):
    """exp(x) for x <= 0 to about two roundings; tl.exp loses more the further x is from 0, by rounding x log2(e)."""
    x = tl.maximum(x, _EXP_IS_ZERO)
    power = x * _LOG2E
    rest = tl.fma(x, _LOG2E, -power)
    result = tl.exp2(power)
    return tl.fma(result, rest * _LN2, result)


@triton.jit
def _score(logit, largest, total, SCORING: tl.constexpr):
    """Return scores of logits; `largest` and `total` are the row's maximum and its sum of exponentials, for softmax."""
    if SCORING == "softmax":
        return _exp(logit - largest) / total
    small = _exp(-tl.abs(logit))
    if SCORING == "sigmoid":
        return tl.where(logit < 0, small, 1.0) / (1.0 + small)
    # softplus(x) = max(x, 0) + log(1 + exp(-|x|)). The quotient undoes what rounding 1 + small loses.
    more = 1.0 + small
    log1p = tl.where(more == 1.0, small, tl.log(more) * small / tl.where(more == 1.0, 1.0, more - 1.0))
    return tl.sqrt(tl.maximum(logit, 0.0) + log1p)


@triton.jit
def _order(value):
    """Turn float32 into int32 of the same order. No value here is -0.0: scores and sums with them are not."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _take_best(key, best, slot):
    """Return the lowest slot whose key is `best`, and the keys without it."""
    lowest = tl.min(tl.where(key == best, slot, _NO_SLOT))
    return lowest, tl.where(slot == lowest, _TAKEN, key)


@triton.jit
def _limit_to_groups(choice, g, s, topk_group, HAS_BIAS: tl.constexpr):
    """Return `choice` with -inf outside the `topk_group` best groups, its rows; equal groups by lower number."""
    value = tl.max(choice, axis=1, keep_dims=True)
    if HAS_BIAS:
        first = tl.min(tl.where(choice == value, s, _NO_SLOT), axis=1, keep_dims=True)
        value += tl.max(tl.where(s == first, -float("inf"), choice), axis=1, keep_dims=True)
    key = _order(value)
    inside = g < 0
    for _ in range(topk_group):
        group, key = _take_best(key, tl.max(key), g)
        inside = inside | (g == group)
    return tl.where(inside, choice, -float("inf"))


@triton.jit(do_not_specialize=["topk_group", "K"])
def _route(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    stride_T,
    K,
    scaling,
    topk_group,
    bias_length,
    E: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NULL_RANGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    t = tl.program_id(0)
    row_ptr = logits_ptr + t.to(tl.int64) * stride_T
    g = tl.arange(0, BLOCK_G)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]

    logits = ()
    largest = tl.full([BLOCK_G, BLOCK_S], -float("inf"), dtype=tl.float32)
    is_nan = tl.zeros([BLOCK_G, BLOCK_S], dtype=tl.int32)
    for i in tl.static_range(CHUNKS):
        slot = i * BLOCK_S + g * S + s
        logit = tl.load(row_ptr + slot, mask=(g < G) & (i * BLOCK_S + s < S), other=-float("inf"))
        largest = tl.maximum(largest, logit)
        is_nan |= (logit != logit).to(tl.int32)
        logits = logits + (logit,)
    largest = tl.max(largest)
    invalid = (tl.max(is_nan) != 0) | (largest == float("inf")) | (largest == -float("inf"))
    largest = tl.where(invalid, 0.0, largest)
    total = 0.0
    if SCORING == "softmax":
        exponentials = tl.zeros([BLOCK_G, BLOCK_S], dtype=tl.float32)
        for i in tl.static_range(CHUNKS):
            exponentials += _exp(logits[i] - largest)
        total = tl.sum(exponentials)

    keys = ()
    bests = ()
    for i in tl.static_range(CHUNKS):
        slot = i * BLOCK_S + g * S + s
        exists = (g < G) & (i * BLOCK_S + s < S)
        choice = _score(logits[i], largest, total, SCORING)
        if HAS_BIAS:
            choice += tl.load(bias_ptr + slot, mask=exists & (slot < bias_length), other=0.0)
        choice = tl.where(logits[i] == -float("inf"), -float("inf"), choice)
        choice = tl.where(invalid, 0.0, choice)  # then the first K slots
        if G > 1:
            choice = _limit_to_groups(tl.where(exists, choice, -float("inf")), g, s, topk_group, HAS_BIAS)
        # Even a NaN in the bias must not let a slot beyond A come before another.
        key = tl.where(exists, _order(choice), _TAKEN)
        keys = keys + (key,)
        bests = bests + (tl.max(key),)

    # K times the best of all. Only the chunk that it was taken from is looked through.
    place = tl.where((g < G) & (s < S), g * S + s, _NO_SLOT)
    k = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], dtype=tl.int32)
    for n in range(K):
        best = bests[0]
        chunk = 0
        for i in tl.static_range(1, CHUNKS):
            chunk = tl.where(bests[i] > best, i, chunk)
            best = tl.maximum(best, bests[i])
        taken = 0
        for i in tl.static_range(CHUNKS):
            if chunk == i:
                taken, key = _take_best(keys[i], best, place)
                keys = keys[:i] + (key,) + keys[i + 1 :]
                bests = bests[:i] + (tl.max(key),) + bests[i + 1 :]
                taken += i * BLOCK_S
        chosen = tl.where(k == n, taken, chosen)

    # Once more from memory: cheaper than to keep and search the row of scores.
    weight = _score(tl.load(row_ptr + chosen), largest, total, SCORING)
    if RENORMALIZE == "real":
        weight = tl.where(chosen < E, weight, 0.0)
    if RENORMALIZE == "nonnull":
        for i in tl.static_range(len(NULL_RANGES)):
            weight = tl.where((chosen >= NULL_RANGES[i][0]) & (chosen < NULL_RANGES[i][1]), 0.0, weight)
    if RENORMALIZE != "none":
        kept = tl.sum(tl.where(k < K, weight, 0.0))
        weight = weight / tl.where(kept == 0.0, 1.0, kept)
    weight = tl.where(invalid, float("nan"), weight * scaling)
    choice = t.to(tl.int64) * K + k
    tl.store(weights_ptr + choice, weight, mask=k < K)
    tl.store(ids_ptr + choice, chosen.to(tl.int64), mask=k < K)


def select_experts(
    logits_TA: Tensor,
    top_k: int,
    *,
    num_experts: int,
    scoring: str = "softmax",
    renormalize: str = "none",
    bias: Tensor | None = None,
    scaling: float = 1.0,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    null_ranges: tuple[tuple[int, int], ...] = (),
) -> tuple[Tensor, Tensor]:
    """Do what `zemoe.select_experts` does on the device of the arguments, without gradients and without its checks.

    Args:
        logits_TA: [T, A] float32, A <= 1024; rows may lie apart, the values of a row may not.
        top_k: K <= 32, at most A.
        num_experts: E; only renormalize="real" needs it.
        scoring: "softmax", "sigmoid" or "sqrtsoftplus".
        renormalize: "none", "all", "real" or "nonnull".
        bias: [A] or a part from slot 0 on, such as [E]; contiguous float32.
        scaling: multiplies all weights.
        num_expert_group, topk_group: the group limit, or None.
        null_ranges: (first, stop) of the slots that weigh nothing under renormalize="nonnull".

    Returns:
        (topk_weights_TK float32, topk_ids_TK int64), best choice first, ties to the lower id. A token with a NaN or
        +inf logit, or only -inf, gets NaN weights and the ids 0 to K - 1.

    Raises:
        ValueError: for logits that this kernel cannot take.
    """
    T, A = logits_TA.shape
    if logits_TA.dtype != torch.float32 or A > MOST_SLOTS or top_k > min(A, MOST_CHOICES):
        raise ValueError(
            f"logits_TA must be float32 [T, A] with A <= {MOST_SLOTS} and top_k <= min(A, {MOST_CHOICES}), got "
            f"{logits_TA.dtype} {tuple(logits_TA.shape)} and top_k={top_k}"
        )
    if logits_TA.stride(1) != 1:
        logits_TA = logits_TA.contiguous()
    weights_TK = torch.empty((T, top_k), dtype=torch.float32, device=logits_TA.device)
    ids_TK = torch.empty((T, top_k), dtype=torch.int64, device=logits_TA.device)
    if not T:
        return weights_TK, ids_TK
    groups = num_expert_group if num_expert_group is not None else 1
    block_g, block_s, chunks = next_power_of_2(groups), next_power_of_2(A // groups), 1
    chunk = _LONG_CHUNK if A > _LONG_ROW else _CHUNK
    if groups == 1 and chunk < A:
        block_s, chunks = chunk, cdiv(A, chunk)
    _route[(T,)](
        logits_TA,
        bias,
        weights_TK,
        ids_TK,
        logits_TA.stride(0),
        top_k,
        float(scaling),
        topk_group,
        0 if bias is None else bias.shape[0],
        E=num_experts,
        G=groups,
        S=A // groups,
        SCORING=scoring,
        RENORMALIZE=renormalize,
        NULL_RANGES=null_ranges,
        HAS_BIAS=bias is not None,
        CHUNKS=chunks,
        BLOCK_G=block_g,
        BLOCK_S=block_s,
        BLOCK_K=next_power_of_2(top_k),
        num_warps=max(1, block_g * block_s // _SLOTS_OF_A_WARP),
        **launch_options(logits_TA, T),
    )
    return weights_TK, ids_TK
