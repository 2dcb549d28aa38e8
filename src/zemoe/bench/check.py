"""How far a result may be from zemoe.reference in float64, and a few tokens of a layer to judge it by.

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
# In units of the largest score. Where the last choice and the best slot left out are closer, rounding to float32
# decides between them, and the token is not checked.
_CLEAR_GAP = 1e-4
_REFERENCE_ERRORS = 4  # the error that is allowed, in errors of the reference in the same dtype
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


def rms(values: Tensor) -> Tensor:
    """Return the root of the mean square over the last dimension, in float64."""
    return values.double().square().mean(-1).sqrt()


def allowed_error(own_error: float, size: float, dtype: torch.dtype) -> float:
    """Return the largest RMS error that a result in `dtype` may have.

    own_error: RMS error of the reference when it computes in that dtype. size: RMS of the exact result. Four times the
    error of the reference is allowed, or four roundings of the result where the reference makes less than one.
    """
    return _REFERENCE_ERRORS * max(own_error, torch.finfo(dtype).eps * size)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: products of single tokens are too small for two, which would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def expected(layer: MoE, x_TH: Tensor) -> Expected:
    """Compute up to four tokens of `layer(x_TH)`: the first, the last and random ones; none where no choice is clear.

    They are routed in float64 too. What `allowed_error` says of the layer's own dtype (with routing in float32) is
    allowed, or a number of roundings of the router's logits where that is more.
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
    own_error = rms(outputs(own_weights, x_TH.dtype) - exact_nH).amax().item()
    size = rms(exact_nH).amax().item()
    allowed = max(allowed_error(own_error, size, x_TH.dtype), _ROUTER_ROUNDINGS * torch.finfo(torch.float32).eps * size)
    return Expected([candidates[row] for row in rows], exact_nH, allowed)


def judge(out_TH: Tensor, wanted: Expected) -> str:
    """Return what is wrong with `out_TH`, "" if nothing is; without tokens to compare it need only be finite."""
    if not out_TH.isfinite().all():
        return "its output is not finite"
    if not wanted.tokens:
        return ""
    errors = rms(out_TH[wanted.tokens].double() - wanted.exact_nH)
    worst = int(errors.argmax())
    if not errors[worst].item() <= wanted.allowed:
        return (
            f"token {wanted.tokens[worst]} is off by {errors[worst].item():.2g} RMS, {wanted.allowed:.2g} is allowed "
            f"(its own size is {rms(wanted.exact_nH)[worst].item():.2g})"
        )
    return ""
