"""The specification: what a zero-expert mixture-of-experts layer computes, as loops over tokens in float64.

docs/specification.md says the same in words, with sources. Every backend is judged against this file. So it shares no
code with them: it imports nothing of zemoe, and only what judges imports it (`zemoe doctor`, `zemoe bench` and tests).
It is written to be read in one go rather than to be fast.

Each function takes tensors of any dtype and computes in `dtype`: float64 by default; a test also runs it in its own
dtype, to learn how much error that dtype costs. All of it is differentiable by plain autograd.

Legend: T tokens, H hidden size, I expert width, E FFN experts, Z zero-computation experts, A = E + Z slots,
K choices a token, C constant experts, S scaled_identity experts. Ids 0..E-1 are FFN experts, E..A-1 are not.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Kinds = str | Sequence[tuple[str, int]]

ALIASES = {"copy": "identity", "null": "zero"}
NAN = float("nan")
INF = float("inf")


class Selection(NamedTuple):
    """What `select` found: all scores, what was compared to choose, and the chosen pairs, best first."""

    scores_TA: Tensor
    choice_TA: Tensor
    topk_weights_TK: Tensor
    topk_ids_TK: Tensor


def slot_kinds(num_experts: int, zero_expert_kinds: Kinds, num_slots: int) -> list[str]:
    """Return the kind of every slot in id order: "ffn" E times, then the zero-computation kinds.

    One string in place of (kind, count) pairs is the kind of all Z.
    """
    if isinstance(zero_expert_kinds, str):
        zero_expert_kinds = [(zero_expert_kinds, num_slots - num_experts)]
    kinds = ["ffn"] * num_experts
    for kind, count in zero_expert_kinds:
        kinds += [ALIASES.get(kind, kind)] * count
    if len(kinds) != num_slots:
        raise ValueError(f"zero_expert_kinds gives {len(kinds)} slots, but there are {num_slots}")
    return kinds


# ---------------------------------------------------------------------------------------------------------- routing


def router_logits(
    x_TH: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_experts: int,
    num_zero_experts: int,
    residual_weight: Tensor | None = None,
    prev_logits_TA: Tensor | None = None,
    logit_norm: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Compute the logits of all slots, [T, A] = W x (+ bias) (+ W_g prev_logits).

    A classifier of E + 1 rows has a tied null logit: its last one stands for each of the Z zero-computation slots.
    With `logit_norm` the classifier's logits are normalised to that scale before anything is done to them.
    """
    rows = []
    for t in range(x_TH.shape[0]):
        logits = weight.to(dtype) @ x_TH[t].to(dtype)
        if bias is not None:
            logits = logits + bias.to(dtype)
        if logit_norm is not None:
            logits = _normalized(logits, logit_norm)
        if logits.shape[0] == num_experts + 1:
            logits = torch.cat([logits[:num_experts], logits[num_experts:].expand(num_zero_experts)])
        if prev_logits_TA is not None and residual_weight is not None:
            logits = logits + residual_weight.to(dtype) @ prev_logits_TA[t].to(dtype)
        rows.append(logits)
    return _stack(rows, (num_experts + num_zero_experts,), dtype, x_TH)


def _normalized(logits_R: Tensor, scale: float) -> Tensor:
    """Give a token's logits mean 0 and a standard deviation of `scale`; those of -inf stay, and don't count."""
    counted = [logit for logit in logits_R if logit != -INF]
    if not counted:
        return logits_R
    mean = sum(counted) / len(counted)
    variance = sum((logit - mean) ** 2 for logit in counted) / len(counted)
    return scale * (logits_R - mean) / (variance + 1e-6) ** 0.5


def is_broken(logits_A: Tensor) -> bool:
    """Say whether a token's logits hold a NaN or a +inf, or are -inf throughout: then all its scores are NaN."""
    values = logits_A.tolist()
    return any(math.isnan(v) or v == INF for v in values) or all(v == -INF for v in values)


def scores_of_token(logits_A: Tensor, scoring_func: str) -> Tensor:
    """Compute the scores of one token over all A slots. A logit of -inf scores 0."""
    if is_broken(logits_A):
        return torch.full_like(logits_A, NAN)
    if scoring_func == "softmax":
        exponentials = (logits_A - logits_A.detach().max()).exp()
        return exponentials / exponentials.sum()
    if scoring_func == "sigmoid":
        return torch.sigmoid(logits_A)
    if scoring_func == "sqrtsoftplus":
        softplus = logits_A.clamp(min=0) + (-logits_A.abs()).exp().log1p()
        return softplus.sqrt()
    raise ValueError(f"scoring_func: {scoring_func!r} is not known")


def _outside_best_groups(choice: list[float], num_groups: int, topk_group: int, biased: bool) -> set[int]:
    """Find the slots outside the best groups.

    A group is worth the sum of its two largest choice values with a selection bias, and its largest one without.
    """
    size = len(choice) // num_groups
    values = []
    for group in range(num_groups):
        best_first = sorted(choice[group * size : (group + 1) * size], reverse=True)
        values.append(best_first[0] + best_first[1] if biased else best_first[0])
    best_groups = sorted(range(num_groups), key=lambda group: (-values[group], group))[:topk_group]
    return {slot for slot in range(len(choice)) if slot // size not in best_groups}


def _renormalized(weights_K: Tensor, kinds_K: list[str], mode: str | bool) -> Tensor:
    """Divide a token's weights by their sum, after setting those to 0 that the mode leaves out.

    All weights are 0 where the sum is.
    """
    if mode in ("none", False):
        return weights_K
    if mode in ("all", True):
        kept = [1.0 for _ in kinds_K]
    elif mode == "real":
        kept = [1.0 if kind == "ffn" else 0.0 for kind in kinds_K]
    elif mode == "nonnull":
        kept = [0.0 if kind == "zero" else 1.0 for kind in kinds_K]
    else:
        raise ValueError(f"renormalize: {mode!r} is not known")
    weights_K = weights_K * torch.tensor(kept, dtype=weights_K.dtype)
    total = weights_K.sum()
    return weights_K * 0 if total == 0 else weights_K / total


def select(
    logits_TA: Tensor,
    top_k: int,
    *,
    num_experts: int,
    zero_expert_kinds: Kinds = (),
    scoring_func: str = "softmax",
    renormalize: str | bool = "none",
    e_score_correction_bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    ids_TK: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Selection:
    """Choose K slots for every token, and weigh them.

    `ids_TK` gives the choices, so that somebody's weights can be judged apart from what was chosen.
    """
    num_slots = logits_TA.shape[1]
    kinds = slot_kinds(num_experts, zero_expert_kinds, num_slots)
    scores_TA, choice_TA, weights_TK, chosen_TK = [], [], [], []
    for t in range(logits_TA.shape[0]):
        logits_A = logits_TA[t].to(dtype)
        scores_A = scores_of_token(logits_A, scoring_func)

        # The bias selects and nothing else; a bias of length E leaves the zero-computation slots alone.
        choice_A = scores_A.detach().clone()
        if e_score_correction_bias is not None:
            choice_A[: len(e_score_correction_bias)] += e_score_correction_bias.to(dtype)
        choice = [
            -INF if logit == -INF else value for logit, value in zip(logits_A.tolist(), choice_A.tolist(), strict=True)
        ]
        if num_expert_group is not None and topk_group is not None:
            biased = e_score_correction_bias is not None
            for slot in _outside_best_groups(choice, num_expert_group, topk_group, biased):
                choice[slot] = -INF

        if ids_TK is not None:
            ids = ids_TK[t].tolist()
        elif is_broken(logits_A):
            ids = list(range(top_k))
        else:
            ids = sorted(range(num_slots), key=lambda slot: (-choice[slot], slot))[:top_k]

        weights_K = torch.stack([scores_A[slot] for slot in ids])
        if not is_broken(logits_A):
            weights_K = _renormalized(weights_K, [kinds[slot] for slot in ids], renormalize)
        weights_TK.append(weights_K * routed_scaling_factor)
        scores_TA.append(scores_A)
        choice_TA.append(torch.tensor(choice, dtype=dtype))
        chosen_TK.append(torch.tensor(ids, dtype=torch.int64))
    return Selection(
        _stack(scores_TA, (num_slots,), dtype, logits_TA),
        _stack(choice_TA, (num_slots,), dtype, logits_TA),
        _stack(weights_TK, (top_k,), dtype, logits_TA),
        _stack(chosen_TK, (top_k,), torch.int64, logits_TA),
    )


# ---------------------------------------------------------------------------------------------------------- experts


def activate(gate_I: Tensor, activation: str) -> Tensor:
    """Apply an FFN expert's activation to what its gate gives."""
    if activation == "silu":
        return gate_I / (1 + (-gate_I).exp())
    if activation == "gelu":
        return 0.5 * gate_I * (1 + torch.erf(gate_I / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * gate_I * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate_I + 0.044715 * gate_I**3)))
    raise ValueError(f"activation: {activation!r} is not known")


def ffn(x_H: Tensor, w13: Tensor, w2: Tensor, activation: str = "silu") -> Tensor:
    """Compute down(act(gate(x)) * up(x)) for one token; `w13` [2I, H] holds the gate rows first, `w2` is [H, I]."""
    width = w13.shape[0] // 2
    gate_I, up_I = w13[:width] @ x_H, w13[width:] @ x_H
    return w2 @ (activate(gate_I, activation) * up_I)


def experts(
    x_TH: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    *,
    num_experts: int,
    zero_expert_kinds: Kinds = (),
    affine_params: Any = None,
    activation: str = "silu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Compute y_t = sum_k weight_tk * expert_{id_tk}(x_t), [T, H]. An id of -1 is skipped, whatever its weight.

    `affine_params` holds `constant_router` [C, 2, H], `constant_value` [C, H] and `scale` [S], numbered in id order.
    A NaN anywhere in a token's x, or in a weight that counts, makes all of that token's output NaN.
    """
    if isinstance(zero_expert_kinds, str):  # then there are as many as anybody asks for
        num_slots = max([num_experts, *(slot + 1 for slot in topk_ids_TK.flatten().tolist())])
    else:
        num_slots = num_experts + sum(count for _, count in zero_expert_kinds)
    kinds = slot_kinds(num_experts, zero_expert_kinds, num_slots)
    rows = []
    for t in range(x_TH.shape[0]):
        x_H = x_TH[t].to(dtype)
        y_H = torch.zeros_like(x_H)
        for k, slot in enumerate(topk_ids_TK[t].tolist()):
            if slot == -1:
                continue
            if not 0 <= slot < num_slots:
                raise ValueError(f"topk_ids: {slot} is neither -1 nor in 0..{num_slots - 1}")
            weight = topk_weights_TK[t, k].to(dtype)
            nth = kinds[:slot].count(kinds[slot])  # this is the nth expert of its kind
            if kinds[slot] == "ffn":
                value_H = ffn(x_H, w13[slot].to(dtype), w2[slot].to(dtype), activation)
            elif kinds[slot] == "identity":
                value_H = x_H
            elif kinds[slot] == "zero":
                value_H = torch.zeros_like(x_H)
            elif kinds[slot] == "constant":
                a1, a2 = scores_of_token(affine_params.constant_router[nth].to(dtype) @ x_H, "softmax")
                value_H = a1 * x_H + a2 * affine_params.constant_value[nth].to(dtype)
            elif kinds[slot] == "scaled_identity":
                value_H = affine_params.scale[nth].to(dtype) * x_H
            else:
                raise ValueError(f"zero_expert_kinds: {kinds[slot]!r} is not known")
            y_H = y_H + weight * value_H
        rows.append(torch.full_like(y_H, NAN) if x_H.isnan().any() else y_H)
    return _stack(rows, (x_TH.shape[1],), dtype, x_TH)


def shared_experts(
    x_TH: Tensor,
    w13: Tensor,
    w2: Tensor,
    gate_1H: Tensor | None = None,
    *,
    activation: str = "silu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Compute what a layer's shared experts add: one FFN for every token, times sigmoid(gate . x) if it is gated."""
    rows = []
    for t in range(x_TH.shape[0]):
        x_H = x_TH[t].to(dtype)
        y_H = ffn(x_H, w13.to(dtype), w2.to(dtype), activation)
        if gate_1H is not None:
            y_H = torch.sigmoid(gate_1H.to(dtype) @ x_H) * y_H
        rows.append(y_H)
    return _stack(rows, (x_TH.shape[1],), dtype, x_TH)


# ----------------------------------------------------------------------------------------------------- load balance


def longcat_group_loss(
    logits_TA: Tensor,
    topk_ids_TK: Tensor,
    *,
    num_experts: int,
    expected_ffn: float,
    num_groups: int | None = None,
    scoring_func: str = "softmax",
    mask_T: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Compute LongCat's balance loss, without a coefficient: the sum of f P over D groups of FFN experts and the rest.

    The rest are all zero-computation experts, which form one more group.

    P_j is the mean score mass in group j. f_j counts the tokens that choose group j at all, over the number that would
    if `expected_ffn` = K_e of the K choices fell on FFN experts: f_j = D/(K_e T) n_j, and n_zero/((K - K_e) T).
    """
    num_tokens, num_slots = logits_TA.shape
    top_k = topk_ids_TK.shape[1]
    num_groups = num_experts if num_groups is None else num_groups
    size = num_experts // num_groups
    valid = [t for t in range(num_tokens) if mask_T is None or bool(mask_T[t])]
    members = [list(range(j * size, (j + 1) * size)) for j in range(num_groups)]
    per_choice = [num_groups / expected_ffn] * num_groups
    if num_slots > num_experts:
        members.append(list(range(num_experts, num_slots)))
        per_choice.append(1 / (top_k - expected_ffn))
    loss = torch.zeros((), dtype=dtype)
    for slots, factor in zip(members, per_choice, strict=True):
        mass = torch.zeros((), dtype=dtype)
        choosing = 0
        for t in valid:
            scores_A = scores_of_token(logits_TA[t].to(dtype), scoring_func)
            mass = mass + scores_A[slots].sum() / scores_A.sum()
            choosing += any(slot in slots for slot in topk_ids_TK[t].tolist())
        loss = loss + factor * choosing / len(valid) * mass / len(valid)
    return loss


def longcat_bias_update(
    topk_ids_TK: Tensor,
    *,
    num_experts: int,
    num_slots: int,
    expected_ffn: float,
    rate: float,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Compute how far LongCat's controller moves the selection bias, [A].

    An FFN expert's bias moves by rate (K_e/(K E) - n_i/(K T)), the others do not move.
    """
    valid = [t for t in range(topk_ids_TK.shape[0]) if mask_T is None or bool(mask_T[t])]
    top_k = topk_ids_TK.shape[1]
    step = torch.zeros(num_slots, dtype=torch.float64)
    for expert in range(num_experts):
        chosen = sum(topk_ids_TK[t].tolist().count(expert) for t in valid)
        step[expert] = rate * (expected_ffn / (top_k * num_experts) - chosen / (top_k * len(valid)))
    return step


def _stack(rows: list[Tensor], row_shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Stack rows, also where there are none."""
    return torch.stack(rows) if rows else torch.empty((0, *row_shape), dtype=dtype, device=like.device)
