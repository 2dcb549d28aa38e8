"""All of a LongCat-like layer behind the router's product as one operator, for engines that compile a model.

Compiled code calls it as it is: our backends decide by the number of tokens at each call, and engines compile once for
all numbers.

T tokens, H hidden size, I expert width, E FFN experts, A slots (E and the zero experts), K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .experts import fused_experts
from .routing import select_experts

torch.library.define(
    "zemoe::moe_from_logits",
    "(Tensor x, Tensor logits, Tensor bias, Tensor w13, Tensor w2, int top_k, float scaling, bool identity) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("zemoe::moe_from_logits")
def _moe_from_logits_fake(x, logits, bias, w13, w2, top_k, scaling, identity) -> Tensor:
    return torch.empty_like(x)


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
    weights_TK, ids_TK = select_experts(
        logits_TA,
        top_k,
        num_experts=num_experts,
        e_score_correction_bias=bias_A,
        routed_scaling_factor=scaling,
    )
    kind = "identity" if identity else "zero"
    return fused_experts(
        x_TH,
        w13,
        w2,
        weights_TK,
        ids_TK,
        num_experts=num_experts,
        zero_expert_kinds=((kind, num_slots - num_experts),) if num_slots > num_experts else (),
    )


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
