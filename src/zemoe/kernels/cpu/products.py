"""Products of a few rows with one expert's weight on a CPU, each by the routine that suits its number of rows.

M rows, O and I rows and columns of a weight. Which routine wins is a matter of M and of the weight's row stride much
more than of the instruction set; the measurements behind the numbers here are in dev/cpu.md.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..._compat import has_bfloat16_instructions, onednn_linear
from ..activations import ACTIVATIONS
from ..topk import HAS_NUMBA

_SMALL_WEIGHT = 2**17  # elements; such a weight is multiplied in less time than oneDNN needs to start
_SMALL_WEIGHT_ROWS = 64
_LOOP_ROWS_BFLOAT16 = 24  # rows of one expert, up to which our loops beat torch's instructions for bfloat16
_MOST_SHARED_ROWS = 16  # rows of one expert, up to which experts with small weights share calls
_SWAP_ROWS = 96  # above, the two orders of the factors take the same time
_DIRECT_ROWS = 16
_PANELS = 2**20  # float32 numbers of gate and up that our loops compute before the activation takes them
_CACHE_PAGE = 4096  # bytes; rows of a weight at multiples of this compete for the same lines of the first-level cache


def _takes(dtype: torch.dtype) -> bool:
    """Try whether oneDNN multiplies this dtype here: ONEDNN_MAX_CPU_ISA can keep it from what the CPU has."""
    if not torch.backends.mkldnn.is_available():
        return False
    zeros = torch.zeros((2, 2), dtype=dtype, device="cpu")
    try:
        onednn_linear(zeros, zeros)
    except RuntimeError:  # could not create a primitive descriptor
        return False
    return True


_ONEDNN = tuple(dtype for dtype in (torch.float32, torch.bfloat16) if _takes(dtype))
# Whether this CPU multiplies bfloat16 in hardware; where it does not, float32 is faster at any number of rows. A
# constant to torch.compile, which can trace none of these questions.
FAST_BFLOAT16 = torch.bfloat16 in _ONEDNN and has_bfloat16_instructions()


def is_small(weight_EOI: Tensor) -> bool:
    """Return whether an expert's weight is multiplied in less time than it takes torch to start."""
    return weight_EOI.shape[1] * weight_EOI.shape[2] <= _SMALL_WEIGHT


def loop_rows(x_TH: Tensor, w13: Tensor, w2: Tensor) -> int:
    """Return up to how many rows of an expert our compiled loops are faster; 0 for never.

    They take contiguous float32 or bfloat16, and need numba.
    """
    same = x_TH.dtype == w13.dtype == w2.dtype and x_TH.dtype in (torch.float32, torch.bfloat16)
    if not HAS_NUMBA or not same or any(not tensor.is_contiguous() or not tensor.numel() for tensor in (x_TH, w13, w2)):
        return 0
    if x_TH.dtype == torch.bfloat16 and FAST_BFLOAT16:
        return _SMALL_WEIGHT_ROWS if is_small(w13) else _LOOP_ROWS_BFLOAT16
    return sys.maxsize


def sort_by_loop(ids_N: Tensor, num_slots: int, choice_N: Tensor, expert_offsets: Tensor) -> int:
    """Fill choice_N and expert_offsets, all int64; return an id out of range or -1. See `choices.sort_choices`."""
    from .choices import sort_choices
    from .compiled import array

    return sort_choices(array(ids_N), num_slots, array(choice_N), array(expert_offsets))


def add_by_loops(
    y_TH: Tensor,
    x_TH: Tensor,
    token_N: Tensor,
    weight_N1: Tensor,
    expert_offsets: Tensor,
    most: int,
    w13: Tensor,
    w2: Tensor,
    activation: str,
    preact_N2I: Tensor | None,
) -> None:
    """Add the weighted rows of each expert that has at most `most` to y; what gate and up yield goes to preact."""
    from .compiled import array
    from .loops import group_rows, lanes_of, multiply, rows_of_panels

    I, x_TH = w2.shape[2], x_TH.float()
    token_N, weight_N1, expert_offsets = token_N.contiguous(), weight_N1.contiguous(), expert_offsets.contiguous()
    y, x, token, weight, up, down = (array(tensor) for tensor in (y_TH, x_TH, token_N, weight_N1.view(-1), w13, w2))
    all_groups = group_rows(array(expert_offsets), most)
    places, stop = all_groups[:, 3], 0
    while stop < len(all_groups):
        start = stop
        stop = int(places.searchsorted(places[start] + max(1, _PANELS // (2 * I))))
        groups = all_groups[start:stop]
        both = torch.empty((2, I * lanes_of(groups)), dtype=torch.float32)
        multiply(x, token, weight, groups, up, array(both), True)
        if preact_N2I is not None:
            rows_of_panels(array(both), groups, array(preact_N2I))
        inner = ACTIVATIONS[activation].forward(both[:1]).mul_(both[1:])
        multiply(y, token, weight, groups, down, array(inner), False)


def add_layer(
    y_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    identities: int,
    num_slots: int,
) -> int:
    """Write a layer of identities and silu to y, float32, without any operator; return an id out of range or -1."""
    from .choices import plan_and_set_identities
    from .compiled import array
    from .loops import group_rows, lanes_of, multiply, silu_panels

    x, y, ids, weights = (array(tensor) for tensor in (x_TH, y_TH, ids_TK, weights_TK))
    expert_offsets = torch.empty(len(w13) + 1, dtype=torch.int64)
    offsets = array(expert_offsets)
    wrong, token, weight = plan_and_set_identities(x, weights, ids, identities, num_slots, offsets, y)
    groups = group_rows(offsets, len(weight))
    if len(groups):
        both = torch.empty((2, w2.shape[2] * lanes_of(groups)), dtype=torch.float32)
        panels = array(both)
        multiply(x, token, weight, groups, array(w13), panels, True)
        silu_panels(panels, groups)
        multiply(y, token, weight, groups, array(w2), panels[:1], False)
    return wrong


def shared_rows(weight_EOI: Tensor) -> int:
    """Return up to how many rows of an expert `products` is faster, which takes two experts a call; 0 for never.

    Small weights take longer to start than to compute; and MKL reads a weight on one thread for a single row.
    """
    if weight_EOI.dtype != torch.float32 or not weight_EOI.is_contiguous() or not len(weight_EOI):
        return 0
    return _MOST_SHARED_ROWS if is_small(weight_EOI) else 1


def has_onednn(weight: Tensor) -> bool:
    """Return whether oneDNN's product takes this weight as it is; torch.mm takes them all."""
    return bool(torch.backends.mkldnn.enabled) and weight.dtype in _ONEDNN and weight.is_contiguous()


def padded_rows(M: int) -> int:
    """Return how many rows to give `product` for M: its kernels work in blocks, and each new size has to be built."""
    if M <= 3:
        return max(M, 2)  # MKL reads a weight twice as fast for two rows as for one
    block = 16 if _DIRECT_ROWS < M <= _SWAP_ROWS else 8
    return -(-M // block) * block


def products(weight_EOI: Tensor, experts: list[int], rows_GMI: Tensor) -> Tensor:
    """Return [G, O, M]: the transposed weight of each of G experts times its M rows, transposed.

    Two experts at a time, as a batch with a stride of its own instead of copies of the weights: torch gives a product
    to each thread, where it would split a single one, which does not pay for small weights.
    """
    G, M, I = rows_GMI.shape
    O, stride, start = weight_EOI.shape[1], weight_EOI.stride(0), weight_EOI.storage_offset()
    # Strides spelt out, as those of a single row may be anything: unless they say that columns lie in one piece,
    # MKL takes ten times as long.
    rows_GIM = rows_GMI.contiguous().as_strided((G, I, M), (M * I, 1, I))
    out_GOM = rows_GMI.new_empty((G, O, M))
    for g in range(0, G - 1, 2):
        first, second = experts[g], experts[g + 1]
        pair_2OI = weight_EOI.as_strided((2, O, I), ((second - first) * stride, I, 1), start + first * stride)
        torch.bmm(pair_2OI, rows_GIM[g : g + 2], out=out_GOM[g : g + 2])
    if G % 2:
        last_OI, row_IM, out_OM = weight_EOI[experts[-1]], rows_GIM[-1], out_GOM[-1]
        if M == 1 and O % 2 == 0:  # a product with a single vector stays on one thread, two halves take one each
            torch.bmm(last_OI.view(2, -1, I), row_IM.expand(2, I, 1), out=out_OM.view(2, -1, 1))
        else:
            torch.mm(last_OI, row_IM, out=out_OM)
    return out_GOM


def product(weight_OI: Tensor, rows_RI: Tensor, M: int, *, onednn: bool) -> Tensor:
    """Return [M and up, O]: at least the first M of R rows times the transposed weight, contiguous in either order.

    rows_RI: [R, I] with R >= M; what the rows past M hold may influence only the rows past M of the result.
    onednn: `has_onednn` of the weight.
    """
    O, I = weight_OI.shape
    pitch = I * weight_OI.element_size()
    few_rows = _SMALL_WEIGHT_ROWS if O * I <= _SMALL_WEIGHT else 6 if pitch % _CACHE_PAGE else 3
    if not onednn or (weight_OI.element_size() == 4 and 0 < M <= few_rows):
        # Rows that lie one after the other: with columns MKL takes four times as long here.
        return torch.mm(weight_OI, rows_RI[: max(M, 2)].contiguous().t()).t()
    # The weight as the left factor is read as it lies; as the right one it has to be transposed block by block, which
    # takes longer than the product itself, unless the rows compete for cache lines. bfloat16 is rearranged either way.
    few_rows_direct = weight_OI.dtype == torch.bfloat16 or (pitch % _CACHE_PAGE == 0 and _wide())
    if M <= _SWAP_ROWS and not (M <= _DIRECT_ROWS and few_rows_direct):
        return onednn_linear(weight_OI, rows_RI).t()
    return onednn_linear(rows_RI[:M] if M <= _DIRECT_ROWS else rows_RI, weight_OI)


def _wide() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
