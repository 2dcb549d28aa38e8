"""From gradients of the chosen experts' weights to gradients of the logits, one launch: `route.py` backwards.

With scores p = score(logits), the chosen ones p_k, and what renormalising divides by, S (a sum over kept choices):

    none        w_k = scaling p_k            dp_k = scaling dw_k
    otherwise   w_k = scaling p_k / S        dp_k = scaling (dw_k - sum_j dw_j p_j / S) / S, over kept choices
    softmax     dlogit_a = p_a (dp_a - sum_k dp_k p_k)
    others      dlogit_a = dp_a score'(logit_a)

Legend: T tokens, A slots, K choices, E FFN experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import begin, launch_options
from .route import _exp, _score
from .tiles import cdiv, next_power_of_2

_BLOCK = 2048  # logits of a program


@triton.jit
def _derivative(logit, SCORING: tl.constexpr):
    """Of sigmoid and sqrtsoftplus; the latter has 0 where its root would have none."""
    small = _exp(-tl.abs(logit))
    sigmoid = tl.where(logit < 0, small, 1.0) / (1.0 + small)
    if SCORING == "sigmoid":
        return sigmoid * (tl.where(logit < 0, 1.0, small) / (1.0 + small))
    score = _score(logit, 0.0, 1.0, SCORING)
    return tl.where(score == 0.0, 0.0, sigmoid / (2.0 * tl.where(score == 0.0, 1.0, score)))


@triton.jit
def _choice(
    logits_ptr, ids_ptr, first_T, id_T, in_T, n,
    A: tl.constexpr, E: tl.constexpr, RENORMALIZE: tl.constexpr, NULL: tl.constexpr,
):  # fmt: skip
    """Of the n-th choices: the slot, its logit, and whether renormalising keeps it."""
    at_T = tl.load(ids_ptr + id_T + n, mask=in_T, other=-1)
    kept_T = (at_T >= 0) & (at_T < A)  # no id leads outside of the row
    logit_T = tl.load(logits_ptr + first_T + at_T, mask=kept_T, other=-float("inf"))
    if RENORMALIZE == "real":
        kept_T = kept_T & (at_T < E)
    if RENORMALIZE == "nonnull":
        for i in tl.static_range(len(NULL)):
            kept_T = kept_T & ((at_T < NULL[i][0]) | (at_T >= NULL[i][1]))
    return at_T, logit_T, kept_T


@triton.jit(do_not_specialize=["T", "K"])
def _route_grad(
    grad_ptr,
    logits_ptr,
    ids_ptr,
    out_ptr,
    stride,
    T,
    K,
    scaling,
    A: tl.constexpr,
    E: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NULL_RANGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_T = t_T < T
    t_T = t_T.to(tl.int64)
    slot_A = tl.arange(0, BLOCK_A)
    mask = in_T[:, None] & (slot_A < A)[None, :]
    logit_TA = tl.load(logits_ptr + t_T[:, None] * stride + slot_A[None, :], mask=mask, other=-float("inf"))
    largest_T = tl.max(logit_TA, 1)
    is_nan_T = tl.max((logit_TA != logit_TA).to(tl.int32), 1) != 0
    lost_T = is_nan_T | (largest_T == float("inf")) | (largest_T == -float("inf"))
    largest_T = tl.where(lost_T, 0.0, largest_T)
    total_T = tl.where(lost_T, 1.0, tl.sum(_exp(logit_TA - largest_T[:, None]), 1))
    first_T = t_T * stride
    id_T = t_T * K

    kept_sum_T = tl.zeros([BLOCK_T], dtype=tl.float32)
    kept_dot_T = tl.zeros([BLOCK_T], dtype=tl.float32)
    if RENORMALIZE != "none":
        for n in range(K):
            at_T, chosen_T, kept_T = _choice(
                logits_ptr, ids_ptr, first_T, id_T, in_T, n, A, E, RENORMALIZE, NULL_RANGES
            )
            score_T = tl.where(kept_T, _score(chosen_T, largest_T, total_T, SCORING), 0.0)
            kept_sum_T += score_T
            kept_dot_T += score_T * tl.load(grad_ptr + id_T + n, mask=in_T, other=0.0)
        # Nothing to divide by: then the weights are the scores, which are 0.
        kept_dot_T = tl.where(kept_sum_T == 0.0, 0.0, kept_dot_T / tl.where(kept_sum_T == 0.0, 1.0, kept_sum_T))
        kept_sum_T = tl.where(kept_sum_T == 0.0, 1.0, kept_sum_T)

    dscore_TA = tl.zeros([BLOCK_T, BLOCK_A], dtype=tl.float32)
    dot_T = tl.zeros([BLOCK_T], dtype=tl.float32)
    for n in range(K):
        at_T, chosen_T, kept_T = _choice(logits_ptr, ids_ptr, first_T, id_T, in_T, n, A, E, RENORMALIZE, NULL_RANGES)
        dscore_T = tl.load(grad_ptr + id_T + n, mask=in_T, other=0.0)
        if RENORMALIZE != "none":
            dscore_T = tl.where(kept_T, (dscore_T - kept_dot_T) / kept_sum_T, 0.0)
        dscore_T *= scaling
        if SCORING == "softmax":
            dot_T += dscore_T * _score(chosen_T, largest_T, total_T, SCORING)
        dscore_TA += tl.where(slot_A[None, :] == at_T[:, None], dscore_T[:, None], 0.0)
    if SCORING == "softmax":
        dlogit_TA = _score(logit_TA, largest_T[:, None], total_T[:, None], SCORING) * (dscore_TA - dot_T[:, None])
        dlogit_TA = tl.where(lost_T[:, None], float("nan"), dlogit_TA)
    else:
        dlogit_TA = tl.where(lost_T[:, None], 0.0, dscore_TA * _derivative(logit_TA, SCORING))
        dlogit_TA = tl.where(logit_TA == logit_TA, dlogit_TA, float("nan"))
    tl.store(out_ptr + t_T[:, None] * A + slot_A[None, :], dlogit_TA, mask=mask)


def grad_logits(
    grad_TK: Tensor,
    logits_TA: Tensor,
    ids_TK: Tensor,
    *,
    num_experts: int,
    scoring: str,
    renormalize: str,
    scaling: float,
    null_ranges: tuple[tuple[int, int], ...] = (),
) -> Tensor:
    """[T, A] float32: the gradient of the logits that `select_experts` was given, ids_TK being what it chose.

    grad_TK: contiguous float32, of its weights. The rest is as there. A lost token's logits get, as in torch, NaN from
    softmax, and from the other scores 0, but for a NaN itself.
    """
    (T, A), K = logits_TA.shape, ids_TK.shape[1]
    if logits_TA.stride(1) != 1:
        logits_TA = logits_TA.contiguous()
    out_TA = torch.empty((T, A), dtype=torch.float32, device=logits_TA.device)
    block_a = next_power_of_2(A)
    block_t = max(1, _BLOCK // block_a)
    if T:
        _route_grad[(cdiv(T, block_t),)](
            grad_TK,
            logits_TA,
            ids_TK,
            out_TA,
            logits_TA.stride(0),
            T,
            K,
            float(scaling),
            A,
            num_experts,
            scoring,
            renormalize,
            null_ranges,
            block_t,
            block_a,
            num_warps=4,
            **launch_options(logits_TA, T),
        )
    return out_TA
