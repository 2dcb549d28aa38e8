"""Load balance: counts from observed routing, LongCat's balance loss, and the controller of the selection bias.

T tokens, E FFN experts, A = E + Z slots, K choices, K_e FFN experts a token wanted, D groups of FFN experts.
All of it is called by the trainer from what `zemoe.observe` collected; nothing happens inside forward
(SPEC section 5).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .config import check_count
from .routing import SCORES, Routing, check_scoring


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`tensor` summed over the ranks of `group` (the default group, if torch.distributed is initialised)."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, group=group)
    return tensor


def _valid_tokens(mask_T: Tensor, tokens: int) -> Tensor:
    """`mask_T` flattened; ValueError unless it is a bool for each token."""
    if mask_T.dtype != torch.bool:
        raise ValueError(f"mask_T must be of dtype torch.bool, got {mask_T.dtype}")
    if mask_T.numel() != tokens:
        raise ValueError(f"mask_T must have one entry for each of the {tokens} tokens of routing, got {mask_T.numel()}")
    return mask_T.reshape(-1)


def slot_counts(
    topk_ids_TK: Tensor, num_slots: int, mask_T: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """n_i: [A] int64, how often each slot was chosen, summed over data-parallel ranks.

    Args:
        topk_ids_TK: [T, K]; -1 is not counted. num_slots: A.
        mask_T: [T] bool, True for tokens that count; None for all.

    Raises:
        ValueError: for a mask that does not fit.
    """
    ids_TK = topk_ids_TK
    if mask_T is not None:
        ids_TK = ids_TK.masked_fill(~_valid_tokens(mask_T, len(ids_TK))[:, None], -1)
    counts = torch.zeros(num_slots + 1, dtype=torch.int64, device=ids_TK.device)
    skipped_first = ids_TK.reshape(-1).to(torch.int64).clamp(min=-1) + 1  # so an id that is too high is out of bounds
    counts.scatter_add_(0, skipped_first, torch.ones_like(skipped_first))
    return _all_reduce(counts[1:], group)


def ffn_experts_per_token(counts_A: Tensor, num_experts: int, top_k: int) -> Tensor:
    """Scalar: mean number of FFN experts that a token chose, from slot counts of choices that were all counted."""
    return counts_A[:num_experts].sum() * top_k / counts_A.sum()


def longcat_balance_loss(
    routing: Routing,
    *,
    num_experts: int,
    ffn_experts_per_token: float,
    num_groups: int | None = None,
    scoring_func: str = "softmax",
    mask_T: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """LongCat-Flash's device-level balance loss, a scalar without a coefficient: sum_{j=1..D+1} f_j P_j.

    FFN experts form D contiguous groups, zero-computation experts together are group D+1.
    P_j = (1/T) sum_t sum_{i in j} R(x_t)_i; f_j = D/(K_e T) sum_t [t chooses group j], and for the zero-computation
    experts f = 1/((K - K_e) T) sum_t [t chooses one of them].

    Args:
        routing: of the T tokens, as observed; the gradient flows through logits_TA.
        num_experts: E. ffn_experts_per_token: K_e, above 0 and at most K.
        num_groups: D, divides E; E by default.
        scoring_func: the router's; scores that are no softmax are normalised to sum 1.
        mask_T: [T] bool, True for tokens that count.
        group: the data-parallel ranks over which f_j is averaged.

    Raises:
        ValueError: for a count, name or mask that does not fit, naming it.
    """
    check_count("num_experts", num_experts, 1)
    check_scoring(scoring_func)
    T, A = routing.logits_TA.shape
    if num_experts > A:
        raise ValueError(f"num_experts={num_experts} exceeds the {A} slots of routing.logits_TA")
    K = routing.topk_ids_TK.shape[1]
    D = num_experts if num_groups is None else check_count("num_groups", num_groups, 1)
    if num_experts % D:
        raise ValueError(f"num_groups={D} must divide num_experts={num_experts}")
    if not 0 < ffn_experts_per_token <= K or (ffn_experts_per_token == K and num_experts < A):
        bound = "below" if num_experts < A else "at most"
        raise ValueError(f"ffn_experts_per_token must be above 0 and {bound} top_k={K}, got {ffn_experts_per_token}")
    every_T = torch.ones(T, dtype=torch.bool, device=routing.logits_TA.device)
    valid_T = every_T if mask_T is None else _valid_tokens(mask_T, T)
    tokens = valid_T.sum().clamp(min=1)
    # Whatever padding holds, NaN too, must not reach the sums or the gradient.
    scores_TA = SCORES[scoring_func](routing.logits_TA.masked_fill(~valid_T[:, None], 0.0))
    if scoring_func != "softmax":
        scores_TA = scores_TA / scores_TA.sum(-1, keepdim=True)

    group_of_slot = torch.full((A,), D, device=scores_TA.device)
    group_of_slot[:num_experts] = torch.arange(num_experts, device=scores_TA.device) // (num_experts // D)
    P_A = (scores_TA * valid_T[:, None]).sum(0) / tokens
    P_D = P_A.new_zeros(D + 1).index_add(0, group_of_slot, P_A)
    with torch.no_grad():
        ids_TK = routing.topk_ids_TK
        group_TK = torch.where(ids_TK < 0, D + 1, group_of_slot[ids_TK])  # -1 chooses nothing: column D + 1 is cut off
        chosen_TD = torch.zeros(T, D + 2, dtype=torch.bool, device=scores_TA.device)
        chosen_TD = chosen_TD.scatter_(1, group_TK, True)[:, : D + 1]
        total = torch.cat([(chosen_TD & valid_T[:, None]).sum(0), valid_T.sum()[None]]).double()
        total = _all_reduce(total, group)
        f_D = total[:-1] / total[-1].clamp(min=1) * (D / ffn_experts_per_token)
        f_D[D] = total[D] / total[-1].clamp(min=1) / max(K - ffn_experts_per_token, 1e-9) if num_experts < A else 0.0
    return (f_D.to(P_D.dtype) * P_D).sum()


@torch.no_grad()
def update_longcat_bias_(
    e_score_correction_bias: Tensor,
    counts_A: Tensor,
    *,
    num_experts: int,
    top_k: int,
    ffn_experts_per_token: float,
    rate: float,
) -> None:
    """LongCat-Flash's controller, once a global batch: b_i += mu (K_e / (K E) - n_i / (K T)) for FFN experts, in place.

    It steers to K_e FFN experts a token, evenly spread; zero-computation slots stay as they are.

    Args:
        e_score_correction_bias: float32 [A] or [E], changed in place.
        counts_A: [A] choices of each slot over the whole global batch (`slot_counts`).
        num_experts: E. top_k: K. ffn_experts_per_token: K_e. rate: mu.

    Raises:
        ValueError: for a length that does not fit.
    """
    if e_score_correction_bias.shape[0] not in (num_experts, counts_A.shape[0]):
        raise ValueError(
            f"e_score_correction_bias must have length E={num_experts} or A={counts_A.shape[0]}, "
            f"got {tuple(e_score_correction_bias.shape)}"
        )
    share_E = counts_A[:num_experts].double() / counts_A.sum().clamp(min=1)
    step_E = rate * (ffn_experts_per_token / (top_k * num_experts) - share_E)
    e_score_correction_bias[:num_experts] += step_E.to(e_score_correction_bias.dtype)
