"""The k largest values of each row with ties to the lower id, which torch.topk alone does not promise.

T tokens, A slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_integer_keys(choice_TA: Tensor, k: int) -> Tensor:
    """[T, k] int64 ids by one topk over integers that hold value and id; no host synchronisation.

    choice_TA: float32.
    """
    A = choice_TA.shape[1]
    bits = (choice_TA + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the same order as integers
    lower_first = torch.arange(A - 1, -1, -1, device=choice_TA.device)
    key = (rank.to(torch.int64) << 32) | lower_first
    return A - 1 - (key.topk(k, dim=-1).values & 0xFFFFFFFF)


def by_repair(choice_TA: Tensor, k: int) -> Tensor:
    """[T, k] int64 ids by torch.topk, with a stable sort for the few rows in which equal values meet; for the host."""
    A = choice_TA.shape[1]
    # One more value shows whether the last of the k equals one that is left out. Only where torch.topk would change to
    # a method of half the speed for it (64 k crosses A) is counting cheaper.
    count = 64 * k <= A < 64 * (k + 1)
    values, ids = choice_TA.topk(k if count else min(k + 1, A), dim=-1)
    equal_T = (values[:, 1:] == values[:, :-1]).any(-1)
    if count:
        equal_T |= (choice_TA >= values[:, -1:]).sum(-1) > k
    if equal_T.any():
        tied = equal_T.nonzero().squeeze(1)
        ids[tied] = choice_TA[tied].sort(dim=-1, descending=True, stable=True).indices[:, : ids.shape[1]]
    return ids[:, :k].contiguous()
