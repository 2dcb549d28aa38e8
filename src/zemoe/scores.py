"""Scores of logits, and the weights that chosen slots get from them.

T tokens, A slots, K choices per token; all in float32 (docs/specification.md, "Scores").
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _softmax(logits_TA: Tensor) -> Tensor:
    # A NaN, a +inf or nothing but -inf among the logits already makes the whole row NaN.
    return logits_TA.softmax(-1)


def _elementwise(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a score of single logits one of whole tokens, in which a token with a NaN has NaN scores only."""

    def scores(logits_TA: Tensor) -> Tensor:
        # The largest logit is finite unless one is NaN or +inf, or all are -inf: then all scores of the token are NaN.
        broken_T1 = ~logits_TA.detach().amax(-1, keepdim=True).isfinite()
        return score(logits_TA).masked_fill(broken_T1, float("nan"))

    return scores


# Both scores below are built on logsigmoid: torch.sigmoid and F.softplus round the last elements of a vector loop
# differently on CPUs, so that equal logits would not tie.


def _sigmoid(logits_TA: Tensor) -> Tensor:
    return F.logsigmoid(logits_TA).exp()


def _sqrtsoftplus(logits_TA: Tensor) -> Tensor:
    softplus = -F.logsigmoid(-logits_TA)
    # The root has no derivative at 0, where a masked slot is: that slot gets 0 instead of NaN.
    return softplus.clamp(min=torch.finfo(softplus.dtype).tiny).sqrt().masked_fill(softplus == 0, 0.0)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": _elementwise(_sigmoid),
    "sqrtsoftplus": _elementwise(_sqrtsoftplus),
}


def check_scoring(scoring_func: str) -> None:
    """Raise ValueError for a name that is not in SCORES."""
    if scoring_func not in SCORES:
        raise ValueError(f"scoring_func must be one of {sorted(SCORES)}, got {scoring_func!r}")


def renormalized(
    weights_TK: Tensor, ids_TK: Tensor, mode: str, num_experts: int, null_ranges: Sequence[tuple[int, int]]
) -> Tensor:
    """Return the weights [T, K] of chosen slots: those that `mode` leaves out set to 0, then all divided by their sum.

    weights_TK: their scores. mode: one of config.RENORMALIZE_MODES. null_ranges: (first, stop) of slots of kind zero.
    """
    if mode == "none":
        return weights_TK
    # Dropped by multiplication, not by filling, so that a NaN stays.
    if mode == "real":
        weights_TK = weights_TK * (ids_TK < num_experts)
    elif mode == "nonnull":
        for first, stop in null_ranges:
            weights_TK = weights_TK * ((ids_TK < first) | (ids_TK >= stop))
    total_T1 = weights_TK.sum(-1, keepdim=True)
    return weights_TK / torch.where(total_T1 == 0, 1.0, total_T1)


def weights_of(
    logits_TA: Tensor,
    ids_TK: Tensor,
    num_experts: int,
    scoring: str,
    mode: str,
    scaling: float,
    null_ranges: Sequence[tuple[int, int]],
) -> Tensor:
    """Return the weights [T, K] of the chosen slots ids_TK, from float32 logits; differentiable any number of times."""
    scores_TK = SCORES[scoring](logits_TA).gather(1, ids_TK)
    return scaling * renormalized(scores_TK, ids_TK, mode, num_experts, null_ranges)
