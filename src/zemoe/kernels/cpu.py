"""The `cpu` backend (first, simple version): one pair of products per expert."""

from __future__ import annotations

import torch
from torch import Tensor

from . import grouped
from .activations import ACTIVATIONS


def make_plan(topk_ids_MK: Tensor, num_experts: int):
    return grouped.plan(topk_ids_MK, num_experts, -1)


def forward(x, weights, row_token, slot_row, offsets, w13, w2, alpha, beta, value, activation, save_preact):
    T, K = slot_row.shape
    N, acc = row_token.shape[0], weights.dtype
    row_weight = weights.new_zeros(N)
    has = slot_row >= 0
    row_weight[slot_row[has]] = weights[has]
    y = alpha[:, None] * x.to(acc)
    if beta is not None:
        y = y + beta @ value.to(acc)
    preact = x.new_zeros((N if save_preact else 0, w13.shape[1]))
    bounds = offsets.tolist()
    for e in range(w13.shape[0]):
        a, b = bounds[e], bounds[e + 1]
        if a == b:
            continue
        h = x[row_token[a:b]] @ w13[e].T
        if save_preact:
            preact[a:b] = h
        gate, up = h.to(acc).chunk(2, -1)
        inner = ACTIVATIONS[activation].forward(gate) * up
        y.index_add_(0, row_token[a:b], (inner.to(x.dtype) @ w2[e].T).to(acc) * row_weight[a:b, None])
    return y.to(x.dtype), preact


def backward(grad, x, weights, row_token, slot_row, offsets, w13, w2, alpha, beta, value, preact, activation, needs):
    N, acc = row_token.shape[0], weights.dtype
    g = grad.to(acc)
    has = slot_row >= 0
    row_weight = weights.new_zeros(N)
    row_weight[slot_row[has]] = weights[has]
    drow = weights.new_zeros(N)
    dx = alpha[:, None] * g
    dw13, dw2 = torch.zeros_like(w13), torch.zeros_like(w2)
    bounds = offsets.tolist()
    act = ACTIVATIONS[activation]
    for e in range(w13.shape[0]):
        a, b = bounds[e], bounds[e + 1]
        if a == b:
            continue
        rows = x[row_token[a:b]]
        h = preact[a:b] if preact.shape[0] else rows @ w13[e].T
        gate, up = h.to(acc).chunk(2, -1)
        s = act.forward(gate)
        inner = s * up
        ge = g[row_token[a:b]]
        da = ge @ w2[e].to(acc)
        drow[a:b] = (da * inner).sum(-1)
        da = da * row_weight[a:b, None]
        dh = torch.cat([da * up * act.derivative(gate), da * s], -1)
        dw2[e] = ((ge * row_weight[a:b, None]).T @ inner).to(w2.dtype)
        dw13[e] = (dh.T @ rows.to(acc)).to(w13.dtype)
        dx.index_add_(0, row_token[a:b], dh @ w13[e].to(acc))
    dweights = torch.zeros_like(weights)
    dweights[has] = drow[slot_row[has]]
    return (
        dx.to(x.dtype) if needs[0] else x.new_empty(0),
        dweights if needs[1] else x.new_empty(0),
        dw13 if needs[2] else x.new_empty(0),
        dw2 if needs[3] else x.new_empty(0),
        (g * x.to(acc)).sum(-1) if needs[4] else x.new_empty(0),
        g @ value.to(acc).T if needs[5] else x.new_empty(0),
        (beta.T @ g).to(value.dtype) if needs[6] else x.new_empty(0),
    )
