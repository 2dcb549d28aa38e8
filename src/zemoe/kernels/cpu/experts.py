"""The `cpu` backend: gather, two products and a sum, expert by expert; never the rows of all experts at once.

T tokens, H hidden size, I expert width, E FFN experts, K choices, C constant experts, N = T * K row bound,
M rows of one expert, R rows with padding, G experts with equally many rows.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from .products import (
    FAST_BFLOAT16,
    add_by_loops,
    add_layer,
    has_onednn,
    loop_rows,
    padded_rows,
    product,
    products,
    shared_rows,
    sort_by_loop,
)

_MOST_PADDING = 16
_FEW_CHOICES = 96  # up to here lists of Python numbers, or a single loop, are faster than tensors


def check_ids(ids: Tensor, num_slots: int) -> None:
    """Raise ValueError for an id below -1 or, with a num_slots >= 0, not below it."""
    if ids.numel():
        low, high = torch.aminmax(ids)
        _check_bounds(int(low), int(high), num_slots)


def _check_bounds(low: int, high: int, num_slots: int) -> None:
    if low < -1 or 0 <= num_slots <= high:
        bound = f"0..{num_slots - 1}" if num_slots >= 0 else "0 and up"
        raise ValueError(f"topk_ids must be {bound}, or -1 to skip a choice; got {low if low < -1 else high}")


def _sorted_choices(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return (choice_N, expert_offsets): the choices t * K + k by expert, those without a row last; all int64."""
    ids_N = topk_ids_TK.reshape(-1)
    # torch sorts integers by radix: the narrower they are, the fewer passes.
    narrow = torch.int16 if num_experts < 2**15 else torch.int32
    expert_N = ids_N.masked_fill(ids_N < 0, num_experts).clamp_(max=num_experts).to(narrow)
    sorted_N, choice_N = expert_N.sort(stable=True)
    return choice_N, torch.searchsorted(sorted_N, torch.arange(num_experts + 1, dtype=narrow))


def make_plan(topk_ids_MK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row_token_N, slot_row_MK, expert_offsets) of zemoe.plan.RoutingPlan, all int64."""
    M, K = topk_ids_MK.shape
    choice_N, expert_offsets = _sorted_choices(topk_ids_MK, num_experts)
    R = int(expert_offsets[-1])
    row_token_N = choice_N // K
    row_token_N[R:] = 0
    row_N = torch.arange(M * K)
    row_N[R:] = -1
    slot_row_MK = torch.empty_like(choice_N).scatter_(0, choice_N, row_N).view(M, K)
    return row_token_N, slot_row_MK, expert_offsets


def _row_weights(weights_TK: Tensor, slot_row_TK: Tensor, padding: int) -> Tensor:
    """Return [N + padding]: the weight of each row; the last entry takes the weights of choices without a row."""
    N = slot_row_TK.numel()
    target_N = torch.where(slot_row_TK < 0, N + padding - 1, slot_row_TK)
    return weights_TK.new_zeros(N + padding).scatter_(0, target_N.reshape(-1), weights_TK.reshape(-1))


def _rows_by_expert(expert_offsets: Tensor) -> list[tuple[int, int, int]]:
    """Return (expert, first row, number of rows) of each expert that has any."""
    rows_E = expert_offsets.diff()
    busy = rows_E.nonzero().view(-1)  # in torch: for one token a loop over all experts takes longer than their products
    return list(zip(busy.tolist(), expert_offsets[busy].tolist(), rows_E[busy].tolist(), strict=True))


class _Weights:
    """One expert's weight at a time in the dtype that the products are computed in."""

    def __init__(self, stacked_EOI: Tensor, dtype: torch.dtype) -> None:
        self.stacked = stacked_EOI
        same = stacked_EOI.dtype == dtype
        self.converted = None if same else torch.empty(stacked_EOI.shape[1:], dtype=dtype)
        self.onednn = has_onednn(stacked_EOI if self.converted is None else self.converted)

    def __getitem__(self, e: int) -> Tensor:
        return self.stacked[e] if self.converted is None else self.converted.copy_(self.stacked[e])


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and FAST_BFLOAT16):
        return dtype
    return torch.float32


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
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    """Return (y [T, H] in x's dtype, what gate and up yield [N, 2I] for the backward or an empty tensor)."""
    x_TH = x_TH.contiguous()
    preact_N2I = x_TH.new_zeros((row_token_N.shape[0] if save_preact else 0, w13.shape[1]))
    y_TH = _affine(x_TH, alpha_T, beta_TC, value_CH)
    token_N = torch.nn.functional.pad(row_token_N, (0, _MOST_PADDING))
    weight_N1 = _row_weights(weights_TK, slot_row_TK, _MOST_PADDING)[:, None]
    rows = y_TH, x_TH, token_N, weight_N1
    _add_rows(*rows, expert_offsets, w13, w2, activation, preact_N2I if save_preact else None)
    return y_TH.to(x_TH.dtype), preact_N2I


def moe_ffn_from_ids(
    x_TH: Tensor,
    weights_TK: Tensor,
    topk_ids_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    alpha_T: Tensor,
    beta_TC: Tensor | None,
    value_CH: Tensor | None,
    num_slots: int,
    activation: str,
) -> Tensor:
    """Return y [T, H] in x's dtype as `moe_ffn` after `make_plan` does, for inference, where no plan is kept."""
    K, x_TH = topk_ids_TK.shape[1], x_TH.contiguous()
    y_TH = _affine(x_TH, alpha_T, beta_TC, value_CH)
    if loop_rows(x_TH, w13, w2) and topk_ids_TK.numel():
        choice_N, expert_offsets = _choices_by_loop(topk_ids_TK, w13.shape[0], num_slots)
        weight_N1 = weights_TK.reshape(-1).index_select(0, choice_N)[:, None]
        _add_rows(y_TH, x_TH, choice_N // K, weight_N1, expert_offsets, w13, w2, activation, None)
        return y_TH.to(x_TH.dtype)
    choice_N, experts = _choices_by_expert(topk_ids_TK, w13.shape[0], num_slots)
    if experts:
        weight_N1 = weights_TK.reshape(-1).index_select(0, choice_N)[:, None]
        _add_experts(y_TH, x_TH, choice_N // K, weight_N1, experts, w13, w2, activation, None)
    return y_TH.to(x_TH.dtype)


def takes_moe_ffn_few(x_TH: Tensor, topk_ids_TK: Tensor, w13: Tensor, w2: Tensor, activation: str) -> bool:
    """Return whether `moe_ffn_few` takes these and is faster: few choices, and numba."""
    few_choices = 0 < topk_ids_TK.numel() <= _FEW_CHOICES and activation == "silu"
    return few_choices and loop_rows(x_TH, w13, w2) >= len(x_TH)


def moe_ffn_few(
    x_TH: Tensor, weights_TK: Tensor, topk_ids_TK: Tensor, w13: Tensor, w2: Tensor, identities: int, num_slots: int
) -> Tensor:
    """Return [T, H]: the layer after routing, in compiled loops alone; `identities` ids from E on are identities."""
    y_TH = torch.empty(x_TH.shape, dtype=torch.float32)
    ids_TK, weights_TK = topk_ids_TK.to(torch.int64).contiguous(), weights_TK.contiguous()
    rows = y_TH, x_TH.float().contiguous(), weights_TK, ids_TK
    wrong = add_layer(*rows, w13.contiguous(), w2.contiguous(), identities, num_slots)
    _check_bounds(wrong, wrong, num_slots)
    return y_TH.to(x_TH.dtype)


def _choices_by_expert(
    topk_ids_TK: Tensor, num_experts: int, num_slots: int
) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Return the choices t * K + k that have a row, by expert and padded, and `_rows_by_expert` of them."""
    if topk_ids_TK.numel() > _FEW_CHOICES:
        check_ids(topk_ids_TK, num_slots)
        choice_N, expert_offsets = _sorted_choices(topk_ids_TK, num_experts)
        return torch.nn.functional.pad(choice_N, (0, _MOST_PADDING)), _rows_by_expert(expert_offsets)
    ids = topk_ids_TK.reshape(-1).tolist()
    if ids:
        _check_bounds(min(ids), max(ids), num_slots)
    # Sorted by Python: a dozen small operators take longer.
    choices = sorted((n for n, e in enumerate(ids) if 0 <= e < num_experts), key=ids.__getitem__)
    experts: list[tuple[int, int, int]] = []
    for row, n in enumerate(choices):
        if experts and experts[-1][0] == ids[n]:
            e, start, M = experts[-1]
            experts[-1] = e, start, M + 1
        else:
            experts.append((ids[n], row, 1))
    return torch.tensor(choices + [0] * _MOST_PADDING), experts


def _choices_by_loop(topk_ids_TK: Tensor, num_experts: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """Return the choices t * K + k that have a row, by expert and padded, and expert_offsets, for compiled loops."""
    choice_N = torch.zeros(topk_ids_TK.numel() + _MOST_PADDING, dtype=torch.int64)
    expert_offsets = torch.empty(num_experts + 1, dtype=torch.int64)
    ids_N = topk_ids_TK.to(torch.int64).reshape(-1).contiguous()  # reshape alone leaves a column of a table strided
    wrong = sort_by_loop(ids_N, num_slots, choice_N, expert_offsets)
    _check_bounds(wrong, wrong, num_slots)
    return choice_N, expert_offsets


def _affine(x_TH: Tensor, alpha_T: Tensor, beta_TC: Tensor | None, value_CH: Tensor | None) -> Tensor:
    """Return alpha x + beta V in the dtype of alpha, to which the experts' rows are added."""
    y_TH = x_TH * alpha_T[:, None]
    if beta_TC is not None and value_CH is not None:
        y_TH.addmm_(beta_TC, value_CH.to(y_TH.dtype))
    return y_TH


def _rows_of_group(starts: list[int], M: int) -> slice | Tensor:
    """Return which rows belong to the experts that have M each, from `starts` on."""
    if starts[-1] - starts[0] == (len(starts) - 1) * M:
        return slice(starts[0], starts[-1] + M)
    start_G = torch.tensor(starts)
    return start_G if M == 1 else (start_G[:, None] + torch.arange(M)).view(-1)


def _add_rows(
    y_TH: Tensor,
    x_TH: Tensor,
    token_N: Tensor,
    weight_N1: Tensor,
    expert_offsets: Tensor,
    w13: Tensor,
    w2: Tensor,
    activation: str,
    preact_N2I: Tensor | None,
) -> None:
    """Add each expert's weighted rows to y, by compiled loops where they are faster, else by `_add_experts`."""
    # What is saved for the backward has the dtype of x, what loops compute is float32.
    most = loop_rows(x_TH, w13, w2) if preact_N2I is None or preact_N2I.dtype == torch.float32 else 0
    if most:
        add_by_loops(y_TH, x_TH, token_N, weight_N1, expert_offsets, most, w13, w2, activation, preact_N2I)
    if most < sys.maxsize:
        experts = [expert for expert in _rows_by_expert(expert_offsets) if expert[2] > most]
        _add_experts(y_TH, x_TH, token_N, weight_N1, experts, w13, w2, activation, preact_N2I)


def _add_experts(
    y_TH: Tensor,
    x_TH: Tensor,
    token_N: Tensor,
    weight_N1: Tensor,
    experts: list[tuple[int, int, int]],
    w13: Tensor,
    w2: Tensor,
    activation: str,
    preact_N2I: Tensor | None,
) -> None:
    """`_add_rows` by torch; token_N and weight_N1 go on for some entries after the last row."""
    act = ACTIVATIONS[activation].forward
    shared = min(shared_rows(w13), shared_rows(w2))
    by_count: dict[int, list[tuple[int, int]]] = {}
    alone = []
    for e, start, M in experts:
        if shared < M:
            alone.append((e, start, M))
        else:
            by_count.setdefault(M, []).append((e, start))
    for M, group in by_count.items():
        ids, G = [e for e, _ in group], len(group)
        rows = _rows_of_group([start for _, start in group], M)
        token = token_N[rows]
        both_G2IM = products(w13, ids, x_TH.index_select(0, token).view(G, M, -1))
        if preact_N2I is not None:
            preact_N2I[rows] = both_G2IM.transpose(1, 2).reshape(G * M, -1)
        gate_GIM, up_GIM = both_G2IM.chunk(2, dim=1)
        inner_GIM = act(gate_GIM).mul_(up_GIM).mul_(weight_N1[rows].view(G, 1, M))
        out_GHM = products(w2, ids, inner_GIM.transpose(1, 2))
        rows_RH = out_GHM.transpose(1, 2).reshape(G * M, -1)
        if len(y_TH) == 1:  # faster than the general sum
            y_TH += rows_RH.sum(0)
        else:
            y_TH.index_add_(0, token, rows_RH)
    if not alone:
        return
    acc, dtype = y_TH.dtype, _product_dtype(x_TH.dtype)
    w13_E, w2_E = _Weights(w13, dtype), _Weights(w2, dtype)
    for e, start, M in alone:
        stop = start + padded_rows(M)
        rows_RH = x_TH.index_select(0, token_N[start:stop]).to(dtype)
        both_R2I = product(w13_E[e], rows_RH, M, onednn=w13_E.onednn)
        if preact_N2I is not None:
            preact_N2I[start : start + M] = both_R2I[:M]
        gate_RI, up_RI = both_R2I.to(acc).chunk(2, dim=1)
        inner_RI = act(gate_RI).mul_(up_RI).mul_(weight_N1[start : start + len(gate_RI)])
        out_RH = product(w2_E[e], inner_RI.to(dtype), M, onednn=w2_E.onednn)
        y_TH.index_add_(0, token_N[start : start + M], out_RH[:M].to(acc).contiguous())


def moe_ffn_backward(
    grad_TH: Tensor,
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
    preact_N2I: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weights, w13, w2, alpha, beta and value, an empty tensor for each that is not needed.

    They are computed in float32 (float64 for float64); an expert's output is never needed again, for
    d weight = <d out, w2 inner> = <d out w2, inner>.
    """
    acc = weights_TK.dtype
    need_x, need_weights, need_w13, need_w2, need_alpha, need_beta, need_value = needs
    x_TH, grad_TH = x_TH.contiguous(), grad_TH.to(acc).contiguous()
    dx_TH = grad_TH * alpha_T[:, None] if need_x else x_TH.new_empty(0)
    dw13 = torch.empty_like(w13) if need_w13 else x_TH.new_empty(0)
    dw2 = torch.empty_like(w2) if need_w2 else x_TH.new_empty(0)
    dweight_N = weights_TK.new_zeros(row_token_N.shape[0] + 1)
    if need_w13 or need_w2:
        for e in (expert_offsets.diff() == 0).nonzero().view(-1).tolist():
            for dweight in (dw13, dw2):
                dweight[e : e + 1].zero_()
    w13_E, w2_E = _Weights(w13, acc), _Weights(w2, acc)
    weight_N1 = _row_weights(weights_TK, slot_row_TK, 1)[:, None]
    act = ACTIVATIONS[activation]
    for e, start, M in _rows_by_expert(expert_offsets) if any(needs[:4]) else ():
        rows = slice(start, start + M)
        token_M = row_token_N[rows]
        x_MH, grad_MH = x_TH.index_select(0, token_M).to(acc), grad_TH.index_select(0, token_M)
        both_M2I = preact_N2I[rows].to(acc) if len(preact_N2I) else torch.mm(x_MH, w13_E[e].t())
        gate_MI, up_MI = both_M2I.chunk(2, dim=1)
        act_MI = act.forward(gate_MI)
        inner_MI = act_MI * up_MI
        if need_w2:
            dw2[e].copy_(torch.mm(grad_MH.t(), inner_MI * weight_N1[rows]))
        dinner_MI = torch.mm(grad_MH, w2_E[e])
        torch.sum(dinner_MI * inner_MI, 1, out=dweight_N[rows])
        dinner_MI.mul_(weight_N1[rows])
        dboth_M2I = torch.cat([dinner_MI * up_MI * act.derivative(gate_MI), dinner_MI * act_MI], 1)
        if need_w13:
            dw13[e].copy_(torch.mm(dboth_M2I.t(), x_MH))
        if need_x:
            dx_TH.index_add_(0, token_M, torch.mm(dboth_M2I, w13_E[e]))
    dbeta_TC, dvalue_CH = x_TH.new_empty(0), x_TH.new_empty(0)
    if beta_TC is not None and value_CH is not None:
        dbeta_TC = grad_TH @ value_CH.to(acc).t() if need_beta else dbeta_TC
        dvalue_CH = (beta_TC.t() @ grad_TH).to(value_CH.dtype) if need_value else dvalue_CH
    return (
        dx_TH.to(x_TH.dtype),
        dweight_N[slot_row_TK.contiguous()] if need_weights else x_TH.new_empty(0),  # -1, for no row, reads a 0
        dw13,
        dw2,
        (grad_TH * x_TH).sum(-1) if need_alpha else x_TH.new_empty(0),
        dbeta_TC,
        dvalue_CH,
    )
