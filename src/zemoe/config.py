"""MoEConfig: the numbers that define a layer, checked once.

E FFN experts, Z zero-computation experts, A = E + Z slots, K choices per token.
This file does not import torch. Counts, ranges and their relations are checked here; the names of kinds, scores and
activations are checked by affine.py, scores.py and experts.py.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

KIND_ALIASES = {"copy": "identity", "null": "zero"}
RENORMALIZE_MODES = ("none", "all", "real", "nonnull")

ZeroExpertKinds = tuple[tuple[str, int], ...]


def check_count(name: str, value: object, minimum: int) -> int:
    """`value` as an int of at least `minimum`; ValueError naming `name` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
    return value


def check_scale(factor: object) -> None:
    """ValueError unless `factor` is a finite number."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        raise ValueError(f"routed_scaling_factor must be a finite number, got {factor!r}")


def renormalize_mode(renormalize: str | bool) -> str:
    """Return the canonical mode: True means "all", False means "none" (docs/specification.md, "Renormalising").

    Raises:
        ValueError: for another value that is not in RENORMALIZE_MODES.
    """
    if isinstance(renormalize, bool):
        return "all" if renormalize else "none"
    if renormalize not in RENORMALIZE_MODES:
        raise ValueError(f"renormalize must be True, False or one of {RENORMALIZE_MODES}, got {renormalize!r}")
    return renormalize


def expand_kinds(
    zero_expert_type: str | Sequence[tuple[str, int]], zero_expert_num: int | None = None
) -> ZeroExpertKinds:
    """Zero-computation experts in id order as `((kind, count), ...)`.

    `zero_expert_type` is one kind for all `zero_expert_num` slots, or a sequence of (kind, count) pairs whose
    counts add up to `zero_expert_num` where that is given. Aliases become the kind they stand for; whether a kind
    exists is for `affine` to say. Raises ValueError otherwise.
    """
    if zero_expert_num is not None:
        check_count("zero_expert_num", zero_expert_num, 0)
    if isinstance(zero_expert_type, str):
        if zero_expert_num is None:
            raise ValueError(f"zero_expert_type={zero_expert_type!r} needs zero_expert_num, or (kind, count) pairs")
        kind = KIND_ALIASES.get(zero_expert_type, zero_expert_type)
        return ((kind, zero_expert_num),) if zero_expert_num else ()
    if not isinstance(zero_expert_type, tuple | Sequence):
        got = repr(zero_expert_type)
        raise ValueError(f"zero_expert_type must be a kind or (kind, count) pairs in id order, got {got}")
    kinds: list[tuple[str, int]] = []
    for pair in zero_expert_type:
        is_pair = isinstance(pair, tuple | Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], str):
            raise ValueError(f"zero_expert_type must be a kind or (kind, count) pairs in id order, got {pair!r} in it")
        count = check_count(f"count of zero_expert_type {pair[0]!r}", pair[1], 0)
        kinds.append((KIND_ALIASES.get(pair[0], pair[0]), count))
    total = sum(count for _, count in kinds)
    if zero_expert_num is not None and total != zero_expert_num:
        raise ValueError(f"zero_expert_type names {total} experts, but zero_expert_num is {zero_expert_num}")
    return tuple((kind, count) for kind, count in kinds if count)


def warn_of_weights_without_gradient(top_k: int, renormalize: str | bool) -> None:
    """Warn if a token's only weight is divided by itself, so that the router gets no gradient through it."""
    if top_k == 1 and renormalize_mode(renormalize) != "none":
        warnings.warn(
            f"top_k=1 with renormalize={renormalize!r}: a token's only weight is 1 or 0 always, so the router gets no "
            'gradient but from balance losses; use renormalize="none" to train it',
            stacklevel=4,
        )


def check_groups(
    num_expert_group: int | None, topk_group: int | None, num_slots: int, top_k: int, has_bias: bool
) -> None:
    """Raise ValueError unless `num_slots` slots can have this group limit (docs/specification.md, "Group limit")."""
    if num_expert_group is None and topk_group is None:
        return
    if num_expert_group is None or topk_group is None:
        raise ValueError(
            f"num_expert_group and topk_group belong together, got num_expert_group={num_expert_group}, "
            f"topk_group={topk_group}"
        )
    check_count("num_expert_group", num_expert_group, 1)
    check_count("topk_group", topk_group, 1)
    if num_slots % num_expert_group:
        raise ValueError(f"num_expert_group={num_expert_group} must divide the {num_slots} expert slots")
    if topk_group > num_expert_group:
        raise ValueError(f"topk_group={topk_group} must be at most num_expert_group={num_expert_group}")
    group_size = num_slots // num_expert_group
    if has_bias and group_size < 2:
        raise ValueError(
            f"num_expert_group={num_expert_group} leaves {group_size} slot a group; with a selection bias a group is "
            "valued by its two best slots, so it needs at least 2"
        )
    if top_k > topk_group * group_size:
        raise ValueError(f"top_k={top_k} exceeds the {topk_group * group_size} slots of topk_group={topk_group} groups")


@dataclass(frozen=True, kw_only=True)
class RoutingRules:
    """How a router chooses K of its slots for a token and weighs them. Nothing is checked here.

    Attributes:
        num_experts: E. top_k: K.
        zero_expert_kinds: zero-computation experts in id order, as (kind, count) pairs; () if kinds play no part.
        scoring_func: a name in zemoe.scores.SCORES, such as "softmax" or "sigmoid".
        renormalize: "none", "all", "real" or "nonnull".
        routed_scaling_factor: multiplies every weight, zero-computation experts' too.
        num_expert_group, topk_group: the group limit, or None.
    """

    num_experts: int
    top_k: int
    zero_expert_kinds: ZeroExpertKinds = ()
    scoring_func: str = "softmax"
    renormalize: str = "none"
    routed_scaling_factor: float = 1.0
    num_expert_group: int | None = None
    topk_group: int | None = None

    @property
    def num_zero_experts(self) -> int:
        """Z."""
        return sum(count for _, count in self.zero_expert_kinds)

    @property
    def num_slots(self) -> int:
        """A = E + Z."""
        return self.num_experts + self.num_zero_experts

    @property
    def null_ranges(self) -> list[tuple[int, int]]:
        """(first, stop) of the slots of null experts, which renormalize="nonnull" leaves out."""
        ranges, first = [], self.num_experts
        for kind, count in self.zero_expert_kinds:
            if kind == "zero":
                ranges.append((first, first + count))
            first += count
        return ranges


@dataclass(frozen=True, kw_only=True)
class MoEConfig(RoutingRules):
    """The shape and the rules of one zero-expert MoE layer, checked.

    Attributes:
        hidden_size: H. intermediate_size: I, the width of one FFN expert. num_experts: E. top_k: K.
        zero_expert_kinds: zero-computation experts in id order, as (kind, count) pairs.
        scoring_func: a name in zemoe.scores.SCORES, such as "softmax" or "sigmoid".
        renormalize: "none", "all", "real" or "nonnull"; True is stored as "all", False as "none".
        routed_scaling_factor: multiplies every weight, zero-computation experts' too.
        num_expert_group, topk_group: the group limit, or None.
        activation: "silu", "gelu" or "gelu_tanh".

    Raises:
        ValueError: for a count or range that cannot be, naming it.
    """

    hidden_size: int
    intermediate_size: int
    renormalize: str | bool = "none"  # pyright: ignore[reportIncompatibleVariableOverride] bool only until it is stored
    activation: str = "silu"

    def __post_init__(self) -> None:
        check_count("hidden_size", self.hidden_size, 1)
        check_count("intermediate_size", self.intermediate_size, 1)
        check_count("num_experts", self.num_experts, 0)
        check_count("top_k", self.top_k, 1)
        check_scale(self.routed_scaling_factor)
        object.__setattr__(self, "zero_expert_kinds", expand_kinds(self.zero_expert_kinds))
        object.__setattr__(self, "renormalize", renormalize_mode(self.renormalize))
        if self.top_k > self.num_slots:
            raise ValueError(f"top_k={self.top_k} exceeds the {self.num_slots} slots (num_experts + zero experts)")
        check_groups(self.num_expert_group, self.topk_group, self.num_slots, self.top_k, has_bias=False)
