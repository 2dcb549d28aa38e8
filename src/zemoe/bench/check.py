"""What `zemoe bench` knows to be right: a few tokens of a layer by zemoe.reference in float64.

T tokens, H hidden size, A slots, K choices a token, n tokens that are checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..layer import MoE

TOKENS = 4
_CANDIDATES = 12
# Of the largest score: a smaller gap between the last choice and the best slot left out is float32's to decide.
_CLEAR_GAP = 1e-4
# Of float32: an error of a token's logits moves all of its weights together, so a few tokens say little about its size.
_ROUTER_ROUNDINGS = 32


class Expected(NamedTuple):
    """tokens: which were computed. exact_nH: their outputs in float64. allowed: largest RMS error of a token."""

    tokens: list[int]
    exact_nH: Tensor
    allowed: float


def _clear(selection: reference.Selection, row: int, top_k: int) -> bool:
    best_first = sorted(selection.choice_TA[row].tolist(), reverse=True)
    if top_k == len(best_first):
        return True
    return best_first[top_k - 1] - best_first[top_k] > _CLEAR_GAP * selection.scores_TA[row].max().item()


def _rms(values_nH: Tensor) -> Tensor:
    return values_nH.double().square().mean(-1).sqrt()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The products of single tokens are too small for two threads, which on a busy machine only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def expected(layer: MoE, x_TH: Tensor) -> Expected:
    """Up to four tokens of `layer(x_TH)`, the first, the last and random ones; none where no choice is clear.

    Routing in float64 too. Allowed is four times the error that the reference makes in the layer's own dtype (with
    routing in float32), or a number of roundings where that is more.
    """
    config, router = layer.config, layer.router
    T = x_TH.shape[0]
    candidates = list(dict.fromkeys([0, T - 1, *torch.randperm(T)[:_CANDIDATES].tolist()]))
    x_nH = x_TH[candidates]
    rules = {
        "num_experts": config.num_experts,
        "zero_expert_kinds": config.zero_expert_kinds,
        "scoring_func": config.scoring_func,
        "renormalize": config.renormalize,
        "e_score_correction_bias": router.e_score_correction_bias,
        "routed_scaling_factor": config.routed_scaling_factor,
    }

    def selected(x_nH: Tensor, ids_nK: Tensor | None, dtype: torch.dtype) -> reference.Selection:
        logits_nA = reference.router_logits(
            x_nH,
            router.classifier.weight,
            num_experts=config.num_experts,
            num_zero_experts=config.num_zero_experts,
            dtype=dtype,
        )
        return reference.select(logits_nA, config.top_k, ids_TK=ids_nK, dtype=dtype, **rules)

    selection = selected(x_nH, None, torch.float64)
    rows = [row for row in range(len(candidates)) if _clear(selection, row, config.top_k)][:TOKENS]
    x_nH, ids_nK = x_nH[rows], selection.topk_ids_TK[rows]

    def outputs(weights_nK: Tensor, dtype: torch.dtype) -> Tensor:
        return reference.experts(
            x_nH,
            layer.w13,
            layer.w2,
            weights_nK,
            ids_nK,
            num_experts=config.num_experts,
            zero_expert_kinds=config.zero_expert_kinds,
            activation=config.activation,
            dtype=dtype,
        ).double()

    if not rows:
        return Expected([], x_nH.double(), 0.0)
    exact_nH = outputs(selection.topk_weights_TK[rows], torch.float64)
    own_weights = selected(x_nH, ids_nK, torch.float32).topk_weights_TK
    own_error = _rms(outputs(own_weights, x_TH.dtype) - exact_nH).amax().item()
    size = _rms(exact_nH).amax().item()
    roundings = max(4 * torch.finfo(x_TH.dtype).eps, _ROUTER_ROUNDINGS * torch.finfo(torch.float32).eps)
    return Expected([candidates[row] for row in rows], exact_nH, max(4 * own_error, roundings * size))


def judge(out_TH: Tensor, wanted: Expected) -> str:
    """What is wrong with `out_TH`, "" if nothing is; without tokens to compare it need only be finite."""
    if not out_TH.isfinite().all():
        return "its output is not finite"
    if not wanted.tokens:
        return ""
    errors = _rms(out_TH[wanted.tokens].double() - wanted.exact_nH)
    worst = int(errors.argmax())
    if not errors[worst].item() <= wanted.allowed:
        return (
            f"token {wanted.tokens[worst]} is off by {errors[worst].item():.2g} RMS, {wanted.allowed:.2g} is allowed "
            f"(its own size is {_rms(wanted.exact_nH)[worst].item():.2g})"
        )
    return ""
