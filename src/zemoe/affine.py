"""Zero-computation experts: each is affine in x, so a token needs only alpha_t and beta_t.

    y_t += alpha_t * x_t + beta_t @ V

What each kind computes, and its source: docs/specification.md, "Zero-computation experts". A kind is one rule in
AFFINE_KINDS, which works on every backend. The triton backend computes the kinds of CODES in a kernel of its own, and
any other kind by its rule.

T tokens, H hidden size, K choices, C constant experts, S scaled_identity experts.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ZeroExpertKinds, expand_kinds


class AffineParams(NamedTuple):
    """What the zero-computation experts of a layer learn; None where a layer has no expert of that kind.

    constant_router: W [C, 2, H], constant_value: V [C, H], scale: s [S], each in the id order of its kind.
    """

    constant_router: Tensor | None = None
    constant_value: Tensor | None = None
    scale: Tensor | None = None


NO_PARAMS = AffineParams()


class Chosen(NamedTuple):
    """The choices that fell on the slots of one (kind, count) entry of a layer: what the rule of a kind is given.

    weight_TK: float32 or float64, 0 where the choice is another slot's. ids_TK: all choices of the layer. first: the id
    less which `id - first` numbers the experts of this kind from 0, also where several entries have the kind. params:
    of the whole layer. constant_logits_TC2: W_j x of every constant expert, or None in a layer without one.
    """

    weight_TK: Tensor
    ids_TK: Tensor
    first: int
    params: AffineParams
    constant_logits_TC2: Tensor | None


Coefficients = tuple[Tensor, Tensor | None]  # alpha_T, and beta_TC or None in a layer without constant experts


class AffineTerms(NamedTuple):
    """What the zero-computation experts add to a layer's output: alpha_t x_t + beta_t @ V.

    alpha_T: of x. beta_TC: of the constant experts' vectors value_CH; both None in a layer without constant experts.
    """

    alpha_T: Tensor
    beta_TC: Tensor | None
    value_CH: Tensor | None


def _identity(chosen: Chosen) -> Coefficients:
    return chosen.weight_TK.sum(-1), None


def _zero(chosen: Chosen) -> Coefficients:
    # Not torch.zeros: the weight of a token with a NaN has to reach its output.
    return chosen.weight_TK.detach().sum(-1) * 0, None


def _weight_by_expert(chosen: Chosen, experts: int) -> Tensor:
    """Return [T, experts]: the sum of a token's weights for each expert of the kind.

    A comparison and a sum take the place of scatter_add, whose order of adding is not fixed on every device.
    """
    ids = torch.arange(chosen.first, chosen.first + experts, device=chosen.ids_TK.device)
    return (chosen.weight_TK[:, :, None] * (chosen.ids_TK[:, :, None] == ids)).sum(1)


def _scaled_identity(chosen: Chosen) -> Coefficients:
    scale_S = chosen.params.scale
    assert scale_S is not None
    return (_weight_by_expert(chosen, scale_S.shape[0]) * scale_S.to(chosen.weight_TK.dtype)).sum(-1), None


def _constant(chosen: Chosen) -> Coefficients:
    assert chosen.constant_logits_TC2 is not None
    mix_TC2 = chosen.constant_logits_TC2.softmax(-1)
    weight_TC = _weight_by_expert(chosen, mix_TC2.shape[1])
    return (weight_TC * mix_TC2[..., 0]).sum(-1), weight_TC * mix_TC2[..., 1]


AFFINE_KINDS: dict[str, Callable[[Chosen], Coefficients]] = {
    "identity": _identity,
    "zero": _zero,
    "constant": _constant,
    "scaled_identity": _scaled_identity,
}

LEARNED = {"constant": "constant_value", "scaled_identity": "scale"}  # of a kind that learns: a field of AffineParams
HIGHEST_ID = 2**31 - 1  # ids may be int32

# The numbers that stand for kinds in the Triton kernel of kernels/triton/coefficients.py. A kind without a number works
# too: the triton backend runs its rule of AFFINE_KINDS instead.
CODES = {"zero": 0, "identity": 1, "scaled_identity": 2, "constant": 3}


def kernel_kinds(kinds: ZeroExpertKinds) -> tuple[tuple[int, int], ...] | None:
    """Return (number in CODES, count) in id order, or None if one of the kinds has no number there."""
    if any(kind not in CODES for kind, _ in kinds):
        return None
    return tuple((CODES[kind], count) for kind, count in kinds)


def check_kinds(kinds: ZeroExpertKinds) -> None:
    """Raise ValueError for a kind that is not in AFFINE_KINDS."""
    for kind, _ in kinds:
        if kind not in AFFINE_KINDS:
            raise ValueError(f"zero_expert_type must be of {sorted(AFFINE_KINDS)} (or copy, null), got {kind!r}")


def count_kind(kinds: ZeroExpertKinds, kind: str) -> int:
    """Return how many experts of `kind` a layer has."""
    return sum(count for name, count in kinds if name == kind)


def count_identities(kinds: ZeroExpertKinds) -> int:
    """Return how many zero-computation experts a layer has if all of them are identities, and 0 otherwise."""
    if any(kind != "identity" for kind, _ in kinds):
        return 0
    return sum(count for _, count in kinds)


def kinds_of_all_ids(kind: str, num_experts: int, params: AffineParams) -> tuple[ZeroExpertKinds, int | None]:
    """Return the kinds of a layer in which every id from `num_experts` on is of `kind`, and A or None.

    A kind that learns has as many experts as `params` holds. Any other kind has no limit: its ids go up to HIGHEST_ID,
    and None is returned in place of the number of slots A.

    Raises:
        ValueError: if `params` lacks what the kind learns.
    """
    if kind not in LEARNED:
        return expand_kinds(kind, HIGHEST_ID - num_experts), None
    learned: Tensor | None = getattr(params, LEARNED[kind])
    if learned is None:
        raise ValueError(f"affine_params must hold what the kind {kind!r} learns, got {params}")
    count = learned.shape[0]
    return expand_kinds(kind, count), num_experts + count


def check_params(kinds: ZeroExpertKinds, params: AffineParams, hidden_size: int) -> None:
    """Raise ValueError unless `params` has just what `kinds` need, in the right shapes."""
    C, S = count_kind(kinds, "constant"), count_kind(kinds, "scaled_identity")
    if not C and not S and all(tensor is None for tensor in params):
        return
    needs = {"constant_router": (C, 2, hidden_size), "constant_value": (C, hidden_size), "scale": (S,)}
    for name, shape in needs.items():
        tensor = getattr(params, name)
        if shape[0] and (tensor is None or tuple(tensor.shape) != shape):
            got = "None" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"affine_params.{name} must have shape {shape} for the kinds {kinds}, got {got}")
        if not shape[0] and tensor is not None:
            raise ValueError(f"affine_params.{name} must be None: the kinds {kinds} have no use for it")


def affine_coefficients(
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    *,
    num_experts: int,
    kinds: ZeroExpertKinds,
    params: AffineParams = NO_PARAMS,
    constant_logits_TC2: Tensor | None = None,
) -> Coefficients:
    """Return (alpha_T, beta_TC or None), the sums over each token's choices with ids >= num_experts.

    Args:
        topk_weights_TK: float32 or float64. topk_ids_TK: integers; ids below num_experts and -1 are left out.
        kinds: canonical kinds in id order. params: see AffineParams.
        constant_logits_TC2: W_j x of the C constant experts, in float32; needed where there are any.

    Differentiable in the weights, the parameters and the constant logits.
    """
    alpha_T: Tensor | None = None
    beta_TC: Tensor | None = None
    first = num_experts
    seen_of_kind: dict[str, int] = {}
    for kind, count in kinds:
        mine_TK = (topk_ids_TK >= first) & (topk_ids_TK < first + count)
        offset = seen_of_kind.get(kind, 0)
        weight_TK = torch.where(mine_TK, topk_weights_TK, 0.0)
        alpha, beta = AFFINE_KINDS[kind](Chosen(weight_TK, topk_ids_TK, first - offset, params, constant_logits_TC2))
        alpha_T = alpha if alpha_T is None else alpha_T + alpha
        if beta is not None:
            beta_TC = beta if beta_TC is None else beta_TC + beta
        first += count
        seen_of_kind[kind] = offset + count
    if alpha_T is None:
        alpha_T = topk_weights_TK.new_zeros(topk_weights_TK.shape[0])
    return alpha_T, beta_TC
