"""The k largest values of each row with ties to the lower id, which torch.topk alone does not promise.

T tokens, A slots. A slot whose logit is -inf counts as -inf, whatever its value; without logits every slot counts.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

HAS_NUMBA = find_spec("numba") is not None
_MOST_ALONE = 2**15  # values, up to which one thread is done before a second one starts
_FEW_LOGITS = 2**12  # up to here one loop over all of selecting takes less time than starting a dozen operators
_FEW = 64  # values, up to which Python looks at them faster than torch
_NEVER = float("-inf")


def by_integer_keys(choice_TA: Tensor, logits_TA: Tensor | None, k: int) -> Tensor:
    """Return [T, k] int64 ids by one topk over integers that hold value and id; no host synchronisation.

    choice_TA: float32.
    """
    if logits_TA is not None:
        choice_TA = torch.where(logits_TA == _NEVER, _NEVER, choice_TA)
    A = choice_TA.shape[1]
    bits = (choice_TA + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the same order as integers
    lower_first = torch.arange(A - 1, -1, -1, device=choice_TA.device)
    key = (rank.to(torch.int64) << 32) | lower_first
    return A - 1 - (key.topk(k, dim=-1).values & 0xFFFFFFFF)


def by_loops(choice_TA: Tensor, logits_TA: Tensor | None, k: int) -> Tensor:
    """Return [T, k] int64 ids by a compiled loop; for float32 on the host, where numba is installed."""
    from .cpu.choices import largest, largest_by_threads
    from .cpu.compiled import array

    T, A = choice_TA.shape
    ids_TK = torch.empty((T, k), dtype=torch.int64)
    if not T:
        return ids_TK
    choice_TA = choice_TA.contiguous()
    logits_TA, masked = (choice_TA, False) if logits_TA is None else (logits_TA.contiguous(), True)
    arrays = array(choice_TA), array(logits_TA), masked, array(ids_TK)
    if T * A < _MOST_ALONE:
        largest(*arrays, 0, T)
    else:
        largest_by_threads(*arrays)
    return ids_TK


def on_host(choice_TA: Tensor, logits_TA: Tensor | None, k: int) -> Tensor:
    """Return [T, k] int64 ids by loops on the host, or by torch.topk and repair where numba is missing."""
    loops = HAS_NUMBA and choice_TA.dtype == torch.float32 and (logits_TA is None or logits_TA.dtype == torch.float32)
    return (by_loops if loops else by_repair)(choice_TA, logits_TA, k)


def takes_select_few(logits_TA: Tensor) -> bool:
    """Return whether `select_few` takes these and is faster: few float32 logits on the host, and numba."""
    return HAS_NUMBA and logits_TA.device.type == "cpu" and 0 < logits_TA.numel() <= _FEW_LOGITS


def select_few(
    logits_TA: Tensor, bias: Tensor | None, k: int, dropped: int, renormalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return (weights [T, k] float32, ids [T, k] int64) of selecting by softmax, in one loop; see `choices.select`."""
    from .cpu.choices import select
    from .cpu.compiled import array

    weights_TK = torch.empty((len(logits_TA), k), dtype=torch.float32)
    ids_TK = torch.empty((len(logits_TA), k), dtype=torch.int64)
    logits_TA = logits_TA.contiguous()
    bias = torch.zeros(1, dtype=torch.float32) if bias is None else bias.contiguous()
    select(array(logits_TA), array(bias), dropped, renormalize, scaling, array(weights_TK), array(ids_TK))
    return weights_TK, ids_TK


def by_repair(choice_TA: Tensor, logits_TA: Tensor | None, k: int) -> Tensor:
    """Return [T, k] int64 ids by torch.topk on the host, with a stable sort for the few rows that have equal values."""
    T, A = choice_TA.shape
    # One more value shows whether the last of the k equals one that is left out. Only where torch.topk would change to
    # a method of half the speed for it (64 k crosses A) is counting cheaper.
    count = 64 * k <= A < 64 * (k + 1)
    looked_at = k if count else min(k + 1, A)
    if 0 < T * k <= _FEW:
        values, ids = choice_TA.topk(looked_at, dim=-1)
        settled = _are_settled(values, None if logits_TA is None else logits_TA.gather(1, ids))
        if settled and not (count and _reach(choice_TA, values).sum(-1).amax() > k):
            return ids[:, :k].contiguous()
    if logits_TA is not None and T and not logits_TA.amin() > _NEVER:
        choice_TA = torch.where(logits_TA == _NEVER, _NEVER, choice_TA)
    values, ids = choice_TA.topk(looked_at, dim=-1)
    equal = values[:, 1:] == values[:, :-1]
    # A row with a NaN, which sorts first, would spoil the count over all rows.
    if equal.any() or (count and (values[:, 0].isnan().any() or _reach(choice_TA, values).count_nonzero() > T * k)):
        equal_T = equal.any(-1)
        if count:
            equal_T |= _reach(choice_TA, values).sum(-1) > k
        tied = equal_T.nonzero().squeeze(1)
        ids[tied] = choice_TA[tied].sort(dim=-1, descending=True, stable=True).indices[:, : ids.shape[1]]
    return ids[:, :k].contiguous()


def _are_settled(values_TK: Tensor, logits_TK: Tensor | None) -> bool:
    """Return whether no two neighbours are equal and no slot is masked: then the order is final.

    It is done in Python, where the operators for it would take longer than topk itself.
    """
    if logits_TK is not None and any(_NEVER in row for row in logits_TK.tolist()):
        return False
    return not any(value == after for row in values_TK.tolist() for value, after in pairwise(row))


def _reach(choice_TA: Tensor, values_TK: Tensor) -> Tensor:
    """Return [T, A] bool: which values are no smaller than the last of the k largest."""
    return choice_TA >= values_TK[:, -1:]
