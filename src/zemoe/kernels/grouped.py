"""The `torch` backend: sort and `torch.nn.functional.grouped_mm`, on any device.

T tokens, H hidden size, I expert width, O rows of a weight, E FFN experts, K choices, N = T * K, the static bound on
the rows. In bfloat16 nothing here waits for the device: padding rows, those past the last offset, are gathered but not
multiplied, and what grouped_mm leaves in them is masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS

_ALIGN_BYTES = 16  # grouped_mm needs rows that start at multiples of this
_MOST_EXPERTS = 1024  # that it takes on a GPU


def make_plan(topk_ids_MK: Tensor, num_experts: int, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row_token_N, slot_row_MK, expert_offsets) of zemoe.plan.RoutingPlan, on any device; all int64."""
    M, K = topk_ids_MK.shape
    ids_N = topk_ids_MK.reshape(-1)
    expert_N = torch.where((ids_N < 0) | (ids_N >= num_experts), num_experts, ids_N)
    sorted_N, choice_N = expert_N.sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=ids_N.device, dtype=sorted_N.dtype)
    expert_offsets = torch.searchsorted(sorted_N, bounds)
    has_expert_N = sorted_N < num_experts
    row_token_N = torch.where(has_expert_N, choice_N // K, 0)
    rows_N = torch.where(has_expert_N, torch.arange(M * K, device=ids_N.device), -1)
    slot_row_MK = torch.empty_like(choice_N).scatter_(0, choice_N, rows_N).view(M, K)
    return row_token_N, slot_row_MK, expert_offsets


def _aligned(matrix: Tensor, *dims: int) -> Tensor:
    """Return `matrix` with zeros appended in `dims` until its strides suit grouped_mm; itself where they already do."""
    multiple = _ALIGN_BYTES // matrix.element_size()
    missing = [-matrix.shape[dim] % multiple if dim in dims else 0 for dim in range(matrix.ndim)]
    if any(missing):
        return F.pad(matrix, [n for missing_of_dim in reversed(missing) for n in (0, missing_of_dim)])
    inner, outer = sorted(matrix.stride()[-2:])
    return matrix if inner == 1 and outer % multiple == 0 else matrix.contiguous()


def _has_grouped_mm(tensor: Tensor, num_experts: int) -> bool:
    """Return whether torch's grouped_mm takes rows of this kind without waiting for the device.

    On a GPU it needs bfloat16 and at most 1024 experts; on a CPU float64 is missing.
    """
    if tensor.device.type == "cpu":
        return tensor.dtype != torch.float64
    return tensor.dtype == torch.bfloat16 and num_experts <= _MOST_EXPERTS


def linear(rows_NH: Tensor, weight_EOH: Tensor, expert_offsets: Tensor) -> Tensor:
    """Return [N, O]: row n times the transposed weight of its expert; 0 in padding rows."""
    N, O = rows_NH.shape[0], weight_EOH.shape[1]
    if not N or not _has_grouped_mm(rows_NH, len(weight_EOH)):
        product = rows_NH.new_zeros((N, O))
        bounds = expert_offsets.tolist()
        for weight_OH, start, end in zip(weight_EOH, bounds, bounds[1:], strict=False):
            torch.mm(rows_NH[start:end], weight_OH.T, out=product[start:end])
        return product
    ends_E = expert_offsets[1:].to(torch.int32)
    product = F.grouped_mm(_aligned(rows_NH, 1), _aligned(weight_EOH, 1, 2).mT, offs=ends_E)[:, :O]
    padding_N = torch.arange(N, device=rows_NH.device) >= expert_offsets[-1]
    return product.masked_fill(padding_N[:, None], 0.0)


def outer(left_NO: Tensor, right_NH: Tensor, expert_offsets: Tensor) -> Tensor:
    """Return [E, O, H]: for each expert the sum over its rows of left_n (x) right_n; 0 for an expert without rows."""
    O, H = left_NO.shape[1], right_NH.shape[1]
    E = expert_offsets.shape[0] - 1
    if not left_NO.shape[0] or not _has_grouped_mm(left_NO, E):
        product = left_NO.new_zeros((E, O, H))
        bounds = expert_offsets.tolist()
        for out_OH, start, end in zip(product, bounds, bounds[1:], strict=False):
            torch.mm(left_NO[start:end].T, right_NH[start:end], out=out_OH)
        return product
    ends_E = expert_offsets[1:].to(torch.int32)
    product = F.grouped_mm(_aligned(left_NO, 1).T, _aligned(right_NH, 1), offs=ends_E)[:, :O, :H]
    idle_E = expert_offsets.diff() == 0
    return product.masked_fill(idle_E[:, None, None], 0.0)


def gather_rows(x_TH: Tensor, row_token_N: Tensor, slot_row_TK: Tensor) -> Tensor:
    """Return [N, H]: the token of each row."""
    return x_TH[row_token_N]


def sum_rows(rows_NH: Tensor, slot_row_TK: Tensor, row_token_N: Tensor) -> Tensor:
    """Return [T, H]: the sum of each token's rows in the order of its choices, at least in float32.

    Padding rows must be 0: where a choice has no row (-1), row N - 1 is a padding row, and index -1 means that one.
    """
    T, K = slot_row_TK.shape
    dtype = torch.promote_types(rows_NH.dtype, torch.float32)
    return rows_NH[slot_row_TK.reshape(-1)].view(T, K, rows_NH.shape[1]).sum(1, dtype=dtype)


def moe_ffn(
    x_TH: Tensor,
    weights_TK: Tensor,
    row_token_N: Tensor,
    slot_row_TK: Tensor,
    expert_offsets: Tensor,
    w13: Tensor,
    w2: Tensor,
    alpha_T: Tensor,
    beta_TC: Tensor | None,
    value_CH: Tensor | None,
    activation: str,
) -> Tensor:
    """y_t = sum_k w_tk * expert_k(x_t) + alpha_t x_t + beta_t @ V, [T, H] in x's dtype; see the operator."""
    N = row_token_N.shape[0]
    y_TH = alpha_T[:, None] * x_TH
    if beta_TC is not None and value_CH is not None:
        y_TH = y_TH + beta_TC @ value_CH.to(beta_TC.dtype)
    if w13.shape[0]:
        # Entry N takes the weights of choices without a row, and is cut off.
        target_N = torch.where(slot_row_TK < 0, N, slot_row_TK).reshape(-1)
        weight_N = weights_TK.new_zeros(N + 1).scatter(0, target_N, weights_TK.reshape(-1))[:N]
        linear = torch.ops.zemoe.grouped_linear
        rows_NH = torch.ops.zemoe.gather_rows(x_TH, row_token_N, slot_row_TK)
        gate_NI, up_NI = linear(rows_NH, w13, expert_offsets).to(weights_TK.dtype).chunk(2, dim=-1)
        # The weight is applied here, in float32, so that the sum over a token's rows is all that is left at the end.
        inner_NI = ACTIVATIONS[activation].forward(gate_NI) * up_NI * weight_N[:, None]
        out_NH = linear(inner_NI.to(x_TH.dtype), w2, expert_offsets)
        y_TH = y_TH + torch.ops.zemoe.sum_rows(out_NH, slot_row_TK, row_token_N)
    return y_TH.to(x_TH.dtype)
