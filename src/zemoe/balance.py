"""Load balance: slot counts, balance losses and the controllers of the selection bias.

Their formulas: docs/specification.md, "Balance losses" and "Selection-bias controllers".

T tokens, E FFN experts, Z zero-computation experts, A = E + Z slots, K choices, K_e FFN experts a token wanted,
D groups of FFN experts. n_i is how often slot i was chosen, P_i its mean score over the T tokens that count.

All of it is called by the trainer from what `zemoe.observe` collected; nothing happens inside forward. The rules that
all losses share:

- A loss is a scalar in the dtype of the logits (float32 as observed) without a coefficient. Its gradient flows through
  P, that is through logits_TA; how often a slot was chosen is a constant.
- Counts are summed over the data-parallel ranks (torch.distributed, where it is initialised), P is the rank's own: as
  the losses are linear in P, the mean over ranks, weighed by their tokens, is the loss of the whole batch.
- A token that `mask_T` leaves out may hold anything, NaN too. A NaN in a token that counts makes the loss NaN.
- They take one Routing: of one micro-batch, or several of a layer joined by `merge`.
- Activation checkpointing has to be the kind with use_reentrant=False: the other runs the forward without a graph, so
  that a loss made of what was observed has no gradient (`loss.requires_grad` is False).
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .config import check_count
from .routing import Routing
from .scores import SCORES, check_scoring


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum `tensor` in place over the ranks of `group`, and return it; do nothing without torch.distributed.

    None is the default group.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, group=group)
    return tensor


def valid_tokens(mask_T: Tensor | None, like: Tensor) -> Tensor:
    """Return which tokens count, [T] bool: `mask_T` flattened, or all True without one.

    ValueError unless it holds a bool for each of the T rows of `like`.
    """
    if mask_T is None:
        return torch.ones(len(like), dtype=torch.bool, device=like.device)
    if mask_T.dtype != torch.bool:
        raise ValueError(f"mask_T must be of dtype torch.bool, got {mask_T.dtype}")
    if mask_T.numel() != len(like):
        raise ValueError(
            f"mask_T must have one entry for each of the {len(like)} tokens of routing, got {mask_T.numel()}"
        )
    return mask_T.reshape(-1).to(like.device)


def merge(routings: Iterable[Routing]) -> Routing:
    """Join several Routings of one layer into one over all their tokens, as of the micro-batches of a global batch.

    Raises:
        ValueError: if there are none, or if they differ in slots or choices.
    """
    parts = list(routings)
    shapes = {(part.logits_TA.shape[1], part.topk_ids_TK.shape[1]) for part in parts}
    if len(shapes) != 1:
        raise ValueError(f"routings must be of one layer, with the same A and K, got (A, K) = {sorted(shapes)}")
    return Routing(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------------------------ counts


def local_counts(topk_ids_TK: Tensor, num_slots: int, mask_T: Tensor | None = None) -> Tensor:
    """Count as `slot_counts` does, on this rank alone."""
    ids_TK = topk_ids_TK
    if mask_T is not None:
        ids_TK = ids_TK.masked_fill(~valid_tokens(mask_T, ids_TK)[:, None], -1)
    counts = torch.zeros(num_slots + 1, dtype=torch.int64, device=ids_TK.device)
    skipped_first = ids_TK.reshape(-1).to(torch.int64).clamp(min=-1) + 1  # so an id that is too high is out of bounds
    counts.scatter_add_(0, skipped_first, torch.ones_like(skipped_first))
    return counts[1:]


def slot_counts(
    topk_ids_TK: Tensor, num_slots: int, mask_T: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Count how often each slot was chosen, summed over data-parallel ranks: n_i, [A] int64.

    Counts of micro-batches are added: `statistics.RoutingTally` does so for every layer, with one reduction at the end.

    Args:
        topk_ids_TK: [T, K]; -1 is not counted. num_slots: A.
        mask_T: [T] bool, True for tokens that count; None for all.

    Raises:
        ValueError: for a mask that does not fit.
    """
    return all_reduce(local_counts(topk_ids_TK, num_slots, mask_T), group)


def ffn_experts_per_token(counts_A: Tensor, num_experts: int, top_k: int) -> Tensor:
    """Compute how many FFN experts a token chose on average, a scalar, from counts in which no choice was skipped."""
    return (counts_A[:num_experts].sum() * top_k).float() / counts_A.sum()


# ------------------------------------------------------------------------------------------------------------ losses


class _Batch(NamedTuple):
    """What the losses are made of: P_A with its graph, which tokens of this rank count, and the sizes E, A, K."""

    P_A: Tensor
    valid_T: Tensor
    num_experts: int
    num_slots: int
    top_k: int


def _batch(routing: Routing, num_experts: int, scoring_func: str, mask_T: Tensor | None) -> _Batch:
    check_count("num_experts", num_experts, 1)
    check_scoring(scoring_func)
    A = routing.logits_TA.shape[1]
    if num_experts > A:
        raise ValueError(f"num_experts={num_experts} exceeds the {A} slots of routing.logits_TA")
    valid_T = valid_tokens(mask_T, routing.logits_TA)
    # Whatever padding holds, NaN too, must not reach the sums or the gradient.
    scores_TA = SCORES[scoring_func](routing.logits_TA.masked_fill(~valid_T[:, None], 0.0))
    if scoring_func != "softmax":
        total_T1 = scores_TA.sum(-1, keepdim=True)
        scores_TA = scores_TA / torch.where(total_T1 == 0, 1.0, total_T1)  # all scores may underflow: then P gets none
    P_A = (scores_TA * valid_T[:, None]).sum(0) / valid_T.sum().clamp(min=1)
    return _Batch(P_A, valid_T, num_experts, A, routing.topk_ids_TK.shape[1])


@torch.no_grad()
def _frequency(routing: Routing, batch: _Batch, group: dist.ProcessGroup | None) -> Tensor:
    """Compute n_i / T, [A] float64. Counts and tokens are summed over ranks in one reduction."""
    counts_A = local_counts(routing.topk_ids_TK, batch.num_slots, batch.valid_T)
    total = all_reduce(torch.cat([counts_A, batch.valid_T.sum()[None]]), group)
    return total[:-1].double() / total[-1].clamp(min=1)


def switch_balance_loss(
    routing: Routing,
    *,
    num_experts: int,
    scoring_func: str = "softmax",
    mask_T: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute Switch Transformer's loss over all slots: A sum_i f_i P_i, f_i = n_i / (K T).

    It is 1 where all slots are chosen equally often. Kilian et al. use it for zero experts: Z sets the share of zero
    choices. Source: Fedus et al., section 2.2.

    Args:
        routing: of the T tokens, as observed. num_experts: E. scoring_func: the router's; scores that are no softmax
            are normalised to sum 1. mask_T: [T] bool, True for tokens that count. group: the data-parallel ranks.

    Raises:
        ValueError: for a count, name or mask that does not fit, naming it. (So do the losses below.)
    """
    batch = _batch(routing, num_experts, scoring_func, mask_T)
    f_A = _frequency(routing, batch, group) / batch.top_k
    return batch.num_slots * (f_A.to(batch.P_A.dtype) * batch.P_A).sum()


def moe_plus_plus_balance_loss(
    routing: Routing,
    *,
    num_experts: int,
    tau: float,
    scoring_func: str = "softmax",
    mask_T: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute MoE++'s loss, which weighs slots by their kind: sum_i eta_i f_i P_i, f_i = n_i / (K T).

    Source: Jin et al., section 3.3.

    Args:
        tau: eta of a zero-computation slot, above 0; FFN experts have 1. The smaller it is, the more zero choices.
        The others: see `switch_balance_loss`.
    """
    _check_positive("tau", tau)
    batch = _batch(routing, num_experts, scoring_func, mask_T)
    f_A = _frequency(routing, batch, group) / batch.top_k
    f_A[num_experts:] *= tau
    return (f_A.to(batch.P_A.dtype) * batch.P_A).sum()


def adamoe_balance_loss(
    routing: Routing,
    *,
    num_experts: int,
    scoring_func: str = "softmax",
    mask_T: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute AdaMoE's loss: A (sum_ffn f_i P_i + sum_null fbar P_i), f_i = n_i / (K T).

    fbar is the mean of f over the null slots, here all zero-computation slots: they need not be balanced among
    themselves. Source: Zeng et al., section 3.2. Arguments: see `switch_balance_loss`.
    """
    batch = _batch(routing, num_experts, scoring_func, mask_T)
    f_A = _frequency(routing, batch, group) / batch.top_k
    f_A[num_experts:] = f_A[num_experts:].mean()
    return batch.num_slots * (f_A.to(batch.P_A.dtype) * batch.P_A).sum()


def zeda_balance_loss(
    routing: Routing,
    *,
    num_experts: int,
    zero_weight: float,
    scoring_func: str = "softmax",
    mask_T: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute ZEDA's loss over two groups: (E + w Z) / K (f_E P_E / E + f_Z P_Z / (w Z)).

    f = n / T and P are summed over the FFN experts and over the zero-computation slots. The loss is least where the FFN
    experts together get E / (E + w Z) of the choices. How they share these among themselves does not matter to it, so a
    trained model's experts keep their shares.

    Args:
        zero_weight: w, above 0; how much of an FFN expert's load a zero-computation slot should get.
        The others: see `switch_balance_loss`.
    """
    _check_positive("zero_weight", zero_weight)
    batch = _batch(routing, num_experts, scoring_func, mask_T)
    f_A, P_A = _frequency(routing, batch, group).to(batch.P_A.dtype), batch.P_A
    ffn, zero = slice(0, num_experts), slice(num_experts, None)
    weighted_Z = zero_weight * (batch.num_slots - num_experts)
    loss = f_A[ffn].sum() * P_A[ffn].sum() / num_experts
    if weighted_Z:
        loss = loss + f_A[zero].sum() * P_A[zero].sum() / weighted_Z
    return (num_experts + weighted_Z) / batch.top_k * loss


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
    """Compute LongCat-Flash's device-level balance loss: sum_{j=1..D+1} f_j P_j.

    The FFN experts form D groups of neighbours; all zero-computation experts are group D+1.
    P_j = (1/T) sum_t sum_{i in j} R(x_t)_i; f_j = D/(K_e T) sum_t [t chooses group j], and for the zero-computation
    experts f = 1/((K - K_e) T) sum_t [t chooses one of them].

    Args:
        ffn_experts_per_token: K_e, above 0 and at most K (below K where there are zero-computation experts).
        num_groups: D, divides E; E by default.
        The others: see `switch_balance_loss`.
    """
    batch = _batch(routing, num_experts, scoring_func, mask_T)
    A, K, P_A, valid_T = batch.num_slots, batch.top_k, batch.P_A, batch.valid_T
    D = num_experts if num_groups is None else check_count("num_groups", num_groups, 1)
    if num_experts % D:
        raise ValueError(f"num_groups={D} must divide num_experts={num_experts}")
    _check_budget(ffn_experts_per_token, K, strict=num_experts < A)

    group_of_slot = torch.full((A,), D, device=P_A.device)
    group_of_slot[:num_experts] = torch.arange(num_experts, device=P_A.device) // (num_experts // D)
    P_D = P_A.new_zeros(D + 1).index_add(0, group_of_slot, P_A)
    with torch.no_grad():
        ids_TK = routing.topk_ids_TK
        group_TK = torch.where(ids_TK < 0, D + 1, group_of_slot[ids_TK])  # -1 chooses nothing: column D + 1 is cut off
        chosen_TD = torch.zeros(len(ids_TK), D + 2, dtype=torch.bool, device=P_A.device)
        chosen_TD = chosen_TD.scatter_(1, group_TK, True)[:, : D + 1]
        total = torch.cat([(chosen_TD & valid_T[:, None]).sum(0), valid_T.sum()[None]]).double()
        total = all_reduce(total, group)
        f_D = total[:-1] / total[-1].clamp(min=1)
        f_D[:D] *= D / ffn_experts_per_token
        if num_experts < A:  # else nobody chooses group D + 1, and K may be K_e
            f_D[D:] /= K - ffn_experts_per_token
    return (f_D.to(P_D.dtype) * P_D).sum()


def router_z_loss(routing: Routing, *, mask_T: Tensor | None = None) -> Tensor:
    """Compute the router z-loss, the mean over tokens of logsumexp(logits_t)^2: a scalar.

    It keeps logits small; with `logit_norm` they can't grow, and it has nothing to do. Source: ST-MoE, equation 5.

    Args:
        routing: of the T tokens. mask_T: [T] bool, True for tokens that count.

    Raises:
        ValueError: for a mask that does not fit.
    """
    valid_T = valid_tokens(mask_T, routing.logits_TA)
    z_T = routing.logits_TA.masked_fill(~valid_T[:, None], 0.0).logsumexp(-1)
    return (z_T.square() * valid_T).sum() / valid_T.sum().clamp(min=1)


# -------------------------------------------------------------------------------------------------------- controllers


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
    """Move the selection bias of FFN experts by LongCat-Flash's rule: b_i += mu (K_e / (K E) - n_i / (K T)).

    Call it once a global batch. It steers to K_e FFN experts a token, evenly spread; zero-computation slots stay as
    they are. K T is the number of choices that were counted. A batch in which no token counts changes nothing.

    Args:
        e_score_correction_bias: float32 (or float64) [A] or [E], changed in place.
        counts_A: [A] choices of each slot over the whole global batch (`slot_counts`).
        num_experts: E. top_k: K. ffn_experts_per_token: K_e, above 0 and at most K. rate: mu, at least 0.

    Raises:
        ValueError: for a length, dtype, count or rate that does not fit, naming it; nothing has changed then.
    """
    _check_bias(e_score_correction_bias, counts_A, num_experts, rate)
    check_count("top_k", top_k, 1)
    _check_budget(ffn_experts_per_token, top_k, strict=False)
    total = counts_A.sum().double()
    share_E = counts_A[:num_experts] / total.clamp(min=1)
    step_E = rate * (ffn_experts_per_token / (top_k * num_experts) - share_E) * (total > 0)
    e_score_correction_bias[:num_experts] += step_E.to(e_score_correction_bias.dtype)


@torch.no_grad()
def update_deepseek_bias_(e_score_correction_bias: Tensor, counts_A: Tensor, *, num_experts: int, rate: float) -> None:
    """Move the selection bias of FFN experts by DeepSeek-V3's rule: b_i += mu sign(mean - n_i).

    Call it once a global batch. The mean is over the FFN experts: the rule spreads their load, and steers to no number
    of them. Zero-computation slots stay as they are. Arguments and errors: see `update_longcat_bias_`.
    """
    _check_bias(e_score_correction_bias, counts_A, num_experts, rate)
    counts_E = counts_A[:num_experts].double()
    sign_E = (counts_E.sum() - num_experts * counts_E).sign()  # exact, unlike a mean: a load that is the mean stays
    e_score_correction_bias[:num_experts] += rate * sign_E.to(e_score_correction_bias.dtype)


def _check_bias(bias: Tensor, counts_A: Tensor, num_experts: int, rate: float) -> None:
    check_count("num_experts", num_experts, 1)
    if counts_A.ndim != 1 or counts_A.shape[0] < num_experts:
        raise ValueError(
            f"counts_A must have one entry for each of the A >= {num_experts} slots, got shape {tuple(counts_A.shape)}"
        )
    if bias.ndim != 1 or bias.shape[0] not in (num_experts, counts_A.shape[0]):
        raise ValueError(
            f"e_score_correction_bias must have length E={num_experts} or A={counts_A.shape[0]}, "
            f"got {tuple(bias.shape)}"
        )
    if bias.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"e_score_correction_bias must be float32, for steps are small, got {bias.dtype}")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
        raise ValueError(f"rate must be a finite number of at least 0, got {rate!r}")


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def _check_budget(ffn_experts_per_token: float, top_k: int, *, strict: bool) -> None:
    """Raise ValueError unless K_e is above 0 and at most K.

    It must be below K if `strict`, where zero-computation experts have to get something.
    """
    if not 0 < ffn_experts_per_token <= top_k or (strict and ffn_experts_per_token == top_k):
        bound = "below" if strict else "at most"
        raise ValueError(
            f"ffn_experts_per_token must be above 0 and {bound} top_k={top_k}, got {ffn_experts_per_token}"
        )
