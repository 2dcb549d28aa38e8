"""All of a LongCat-like layer that follows the router's product, as operators for engines that compile a model.

Compiled code calls them as they are: our backends decide by the number of tokens at each call, and engines compile once
for all numbers.

T tokens, H hidden size, I expert width, E FFN experts, A slots (E and the zero experts), K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import Backend, backend_of
from ...config import RoutingRules
from ...experts import fused_experts
from ...routing import select

torch.library.define(
    "zemoe::select_from_logits",
    "(Tensor logits, Tensor bias, int top_k, int num_experts, float scaling) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("zemoe::select_from_logits")
def _select_from_logits_fake(logits, bias, top_k, num_experts, scaling) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _select_from_logits(
    logits_TA: Tensor,
    bias_A: Tensor,
    top_k: int,
    num_experts: int,
    scaling: float,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    rules = RoutingRules(num_experts=num_experts, top_k=top_k, routed_scaling_factor=scaling)
    return select(logits_TA, rules, bias_A, backend)


torch.library.impl("zemoe::select_from_logits", "CompositeExplicitAutograd", _select_from_logits)


def select_from_logits(
    logits_TA: Tensor, bias_A: Tensor, *, top_k: int, num_experts: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """`select_experts` with softmax scores that are not renormalised: weights [T, K] float32 and ids [T, K] int64."""
    return torch.ops.zemoe.select_from_logits(logits_TA, bias_A, top_k, num_experts, scaling)


torch.library.define(
    "zemoe::moe_from_logits",
    "(Tensor x, Tensor logits, Tensor bias, Tensor w13, Tensor w2, int top_k, float scaling, bool identity) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("zemoe::moe_from_logits")
def _moe_from_logits_fake(x, logits, bias, w13, w2, top_k, scaling, identity) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.impl("zemoe::moe_from_logits", "CompositeExplicitAutograd")
def _moe_from_logits(
    x_TH: Tensor,
    logits_TA: Tensor,
    bias_A: Tensor,
    w13: Tensor,
    w2: Tensor,
    top_k: int,
    scaling: float,
    identity: bool,
) -> Tensor:
    num_experts, num_slots = w13.shape[0], logits_TA.shape[1]
    backend = backend_of(x_TH, num_experts)
    weights_TK, ids_TK = _select_from_logits(logits_TA, bias_A, top_k, num_experts, scaling, backend)
    kind = "identity" if identity else "zero"
    return fused_experts(
        x_TH,
        w13,
        w2,
        weights_TK,
        ids_TK,
        num_experts=num_experts,
        zero_expert_kinds=((kind, num_slots - num_experts),) if num_slots > num_experts else (),
        backend=backend,
    ).to(x_TH.dtype)  # which autocast changes


def moe_from_logits(
    x_TH: Tensor,
    logits_TA: Tensor,
    bias_A: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    top_k: int,
    scaling: float,
    identity: bool = True,
) -> Tensor:
    """The layer's output [T, H] in x's dtype, for inference: softmax scores, not renormalised.

    x [T, H], w13 [E, 2I, H] and w2 [E, H, I] of one dtype, logits [T, A] and selection bias [A] of any float dtype.
    identity: zero experts give back x; otherwise nothing, as on all ranks but one.
    """
    return torch.ops.zemoe.moe_from_logits(x_TH, logits_TA, bias_A, w13, w2, top_k, scaling, identity)
