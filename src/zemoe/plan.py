"""RoutingPlan: which rows the FFN experts compute. Integers only, no gradients, made on the device.

M tokens with K choices each, E FFN experts, N = M * K, a static bound on the rows, so that no size has to
travel to the host.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .config import check_count
from .ops.experts import plan


class RoutingPlan(NamedTuple):
    """The (token, FFN expert) pairs sorted by expert, in order of tokens within an expert.

    row_token_N: the token of each row; rows from expert_offsets[E] on are padding rows and name token 0.
    slot_row_MK: the row of each choice, -1 for a choice that has none (a zero-computation expert, or -1).
    expert_offsets: [E + 1]; expert e owns rows expert_offsets[e] up to expert_offsets[e + 1].
    """

    row_token_N: Tensor
    slot_row_MK: Tensor
    expert_offsets: Tensor


def make_plan(topk_ids_MK: Tensor, num_experts: int, num_slots: int | None = None) -> RoutingPlan:
    """Return the plan of the rows of `num_experts` FFN experts.

    Args:
        topk_ids_MK: [M, K] int32 or int64. -1 is skipped, ids >= num_experts (zero-computation experts) get no row.
        num_experts: E.
        num_slots: A, the bound of valid ids; None for no bound.

    Raises:
        ValueError: on the CPU, for an id below -1 or >= num_slots. On other devices such a choice gets no row.
    """
    check_count("num_experts", num_experts, 0)
    if topk_ids_MK.ndim != 2 or topk_ids_MK.is_floating_point() or topk_ids_MK.is_complex():
        raise ValueError(
            f"topk_ids must be an integer [M, K] tensor, got {topk_ids_MK.dtype} {tuple(topk_ids_MK.shape)}"
        )
    return RoutingPlan(*plan(topk_ids_MK, num_experts, -1 if num_slots is None else num_slots))
