"""LongCat-Flash's MoE layer for SGLang, computed by zemoe.

SGLang's own layer is wrong in two ways that change logits: it multiplies the FFN experts' sum by
`routed_scaling_factor`, but not the zero experts', and under tensor parallelism every rank adds the zero experts' sum
before ranks are summed. Ours scales both, and one rank adds it.

T tokens, H hidden size, I expert width, R tensor-parallel ranks, E FFN experts, Z zero experts, A = E + Z slots,
K choices.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import get_moe_a2a_backend
from sglang.srt.models import longcat_flash
from torch import Tensor

from ...routing import select_experts
from ..engines.from_logits import moe_from_logits
from ..engines.weights import ExpertShare
from ..engines.zero_choices import without_zero_choices

logger = logging.getLogger("sglang.plugins.zemoe")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Up to 0.5.14 the layer sums over ranks; later the model does, around it.
_SUMS_OVER_RANKS = hasattr(longcat_flash, "tensor_model_parallel_all_reduce")


class ZeroExpertLongcatExperts(ExpertShare):
    """One rank's share of the experts, under the names and with the loaders of SGLang's, so that its model loads them.

    SGLang repacks none of ours. For some of its back ends SGLang's own are wider; ours are as the configuration says.

    Args:
        theirs: SGLang's experts, as built for this rank.
        intermediate_size: I, a multiple of R; a checkpoint's may be less (SGLang for CPUs rounds up to R times 32).
    """

    def __init__(self, theirs: FusedMoE, intermediate_size: int) -> None:
        super().__init__(
            theirs.num_local_experts,
            theirs.hidden_size,
            intermediate_size,
            rank=theirs.moe_tp_rank,
            ranks=theirs.moe_tp_size,
            fill_up=True,
            dtype=theirs.w13_weight.dtype,
            device=theirs.w13_weight.device,
        )
        self.num_local_experts = theirs.num_local_experts


def why_theirs(layer: Any) -> str | None:
    """Why a built layer of SGLang's stays as it is, or None."""
    if layer.zero_expert_num and layer.zero_expert_type != "identity":
        return f"zero_expert_type is {layer.zero_expert_type!r}"
    if type(layer.experts) is not FusedMoE or not get_moe_a2a_backend().is_none():
        return f"tokens travel between ranks ({type(layer.experts).__name__}, {get_moe_a2a_backend()})"
    return None


def why_their_experts(experts: Any) -> str | None:
    """Why SGLang's own experts compute the FFN experts' sum, or None where ours do."""
    if type(experts.quant_method).__name__ != "UnquantizedFusedMoEMethod":
        return f"the experts are quantized ({type(experts.quant_method).__name__})"
    if experts.moe_ep_size != 1:
        return f"the experts are spread over {experts.moe_ep_size} ranks"
    weight = experts.w13_weight
    if weight.dtype not in _DTYPES:
        return f"the experts are {weight.dtype}"
    if weight.device.type not in ("cuda", "cpu") or torch.version.hip is not None:
        return "our kernels are for NVIDIA GPUs and CPUs"
    return None


class ZeroExpertLongcatMoE(longcat_flash.LongcatFlashMoE):
    """LongCat-Flash's MoE layer: SGLang builds and loads it, zemoe computes it.

    Routing and the zero experts' sum are ours, and so are the FFN experts where `why_their_experts` has no objection. A
    layer that `why_theirs` names a reason for is SGLang's, whole. The first layer of a model says in the log which.
    """

    def __init__(self, config: Any, layer_id: int, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config=config, layer_id=layer_id, quant_config=quant_config, prefix=prefix)
        experts: Any = self.experts
        theirs = why_theirs(self)
        self.computed_by = "sglang" if theirs else "zemoe"
        said = f"SGLang's own MoE layers: {theirs}" if theirs else "MoE layers computed by zemoe"
        if not theirs:
            # One of the ranks that are summed adds the zero experts' sum.
            self.adds_zero_experts = (experts.moe_tp_rank, experts.moe_ep_rank) == (0, 0)
            their_experts = why_their_experts(experts)
            if their_experts is None:
                self.experts = ZeroExpertLongcatExperts(experts, config.moe_intermediate_size)
            else:
                said = f"routing and zero experts by zemoe, FFN experts by SGLang: {their_experts}"
        if layer_id == 0:
            logger.info("zemoe: LongCat-Flash models have %s", said)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [T, H]; the same out, summed over ranks where this version's own layer does that."""
        if self.computed_by == "sglang":
            return super().forward(hidden_states)
        logits_TA, bias_A = self.router(hidden_states), self.router.e_score_correction_bias
        if isinstance(self.experts, ZeroExpertLongcatExperts):
            output_TH = moe_from_logits(
                hidden_states,
                logits_TA,
                bias_A,
                self.experts.w13_weight,
                self.experts.w2_weight,
                top_k=self.top_k,
                scaling=float(self.routed_scaling_factor),
                identity=self.adds_zero_experts,
            )
        else:
            output_TH = self._with_their_experts(hidden_states, logits_TA, bias_A)
        if _SUMS_OVER_RANKS and self.tp_size > 1:
            output_TH = longcat_flash.tensor_model_parallel_all_reduce(output_TH)
        return output_TH

    def _with_their_experts(self, x_TH: Tensor, logits_TA: Tensor, bias_A: Tensor) -> Tensor:
        weights_TK, ids_TK = select_experts(
            logits_TA.float(),
            self.top_k,
            num_experts=self.num_experts,
            e_score_correction_bias=bias_A.float(),
            routed_scaling_factor=float(self.routed_scaling_factor),
        )
        weights_TK, ids_TK, alpha_T1 = without_zero_choices(weights_TK, ids_TK, self.num_experts, replacement=0)
        # Before the experts: they may write their output over their input.
        zero_TH = x_TH * alpha_T1 if self.adds_zero_experts else None
        output_TH = self.experts(x_TH, StandardTopKOutput(weights_TK, ids_TK.to(torch.int32), logits_TA))
        return output_TH if zero_TH is None else (output_TH + zero_TH).to(output_TH.dtype)
