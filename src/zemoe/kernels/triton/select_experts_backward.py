"""From gradients of the chosen experts' weights to gradients of the logits, one launch: `select_experts.py` backwards.

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
from .select_experts import _exp, _score
from .tiles import cdiv, next_power_of_2

_BLOCK = 2048  # numbers of a program


@triton.jit
def _derivative(logit, SCORING: tl.constexpr):
    """Return the derivative of sigmoid or sqrtsoftplus, 0 where that of the latter does not exist."""
    small = _exp(-tl.abs(logit))
    sigmoid = tl.where(logit < 0, small, 1.0) / (1.0 + small)
    if SCORING == "sigmoid":
        return sigmoid * (tl.where(logit < 0, 1.0, small) / (1.0 + small))
    score = _score(logit, 0.0, 1.0, SCORING)
    return tl.where(score == 0.0, 0.0, sigmoid / (2.0 * tl.where(score == 0.0, 1.0, score)))


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
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_T = (t_T < T)[:, None]
    t_T = t_T.to(tl.int64)[:, None]
    slot_A = tl.arange(0, BLOCK_A)[None, :]
    logit_TA = tl.load(logits_ptr + t_T * stride + slot_A, mask=in_T & (slot_A < A), other=-float("inf"))
    largest_T = tl.max(logit_TA, 1, keep_dims=True)
    is_nan_T = tl.max((logit_TA != logit_TA).to(tl.int32), 1, keep_dims=True) != 0
    invalid_T = is_nan_T | (largest_T == float("inf")) | (largest_T == -float("inf"))
    largest_T = tl.where(invalid_T, 0.0, largest_T)
    total_T = tl.where(invalid_T, 1.0, tl.sum(_exp(logit_TA - largest_T), 1, keep_dims=True))

    choice_K = tl.arange(0, BLOCK_K)[None, :]
    chosen = in_T & (choice_K < K)
    id_TK = tl.load(ids_ptr + t_T * K + choice_K, mask=chosen, other=-1)
    chosen = (id_TK >= 0) & (id_TK < A)  # no id leads outside of the row
    dscore_TK = tl.load(grad_ptr + t_T * K + choice_K, mask=chosen, other=0.0)
    chosen_TK = tl.load(logits_ptr + t_T * stride + id_TK, mask=chosen, other=-float("inf"))
    score_TK = _score(chosen_TK, largest_T, total_T, SCORING)
    if RENORMALIZE != "none":
        kept = chosen
        if RENORMALIZE == "real":
            kept = kept & (id_TK < E)
        if RENORMALIZE == "nonnull":
            for i in tl.static_range(len(NULL_RANGES)):
                kept = kept & ((id_TK < NULL_RANGES[i][0]) | (id_TK >= NULL_RANGES[i][1]))
        kept_TK = tl.where(kept, score_TK, 0.0)
        sum_T = tl.sum(kept_TK, 1, keep_dims=True)
        divisor_T = tl.where(sum_T == 0.0, 1.0, sum_T)  # nothing to divide by: then the weights are the scores, all 0
        shared_T = tl.sum(dscore_TK * kept_TK, 1, keep_dims=True) / divisor_T
        dscore_TK = tl.where(kept, (dscore_TK - shared_T) / divisor_T, 0.0)
    dscore_TK *= scaling

    # First what each slot gets that was not chosen, then, over it, what the chosen ones get.
    if SCORING == "softmax":
        dot_T = tl.sum(tl.where(chosen, dscore_TK * score_TK, 0.0), 1, keep_dims=True)
        dlogit_TA = -dot_T * _score(logit_TA, largest_T, total_T, SCORING)
        dlogit_TK = (dscore_TK - dot_T) * score_TK
        if_invalid = float("nan")
    else:
        dlogit_TA = tl.zeros([BLOCK_T, BLOCK_A], dtype=tl.float32)
        dlogit_TK = dscore_TK * _derivative(chosen_TK, SCORING)
        if_invalid = 0.0
    dlogit_TA = tl.where(invalid_T, if_invalid, dlogit_TA)
    dlogit_TA = tl.where(logit_TA == logit_TA, dlogit_TA, float("nan"))
    tl.store(out_ptr + t_T * A + slot_A, dlogit_TA, mask=in_T & (slot_A < A))
    tl.debug_barrier()
    tl.store(out_ptr + t_T * A + id_TK, dlogit_TK, mask=chosen & (invalid_T == 0))


def select_experts_backward(
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
    """Return [T, A] float32: the gradient of the logits that `select_experts` was given, ids_TK being what it chose.

    grad_TK: contiguous float32, of its weights. The rest is as there. Where a token has a NaN or +inf logit, or
    only -inf, its logits get NaN from softmax as in torch, and from the other scores 0, but for a NaN itself.
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
            next_power_of_2(K),
            num_warps=4,
            **launch_options(logits_TA, T),
        )
    return out_TA
