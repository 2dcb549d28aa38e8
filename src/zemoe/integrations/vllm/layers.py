"""LongCat-Flash's MoE layer for vLLM: computed by zemoe, or routing and zero experts only.

T tokens, H hidden size, I expert width, E FFN experts, Z zero experts, A = E + Z slots, K choices, R tensor-parallel
ranks.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.utils import set_weight_attrs

from ...routing import router_logits
from ..engines.from_logits import moe_from_logits, select_from_logits
from ..engines.weights import ExpertShare
from ..engines.zero_choices import without_zero_choices


class _Router(nn.Module):
    """The router's tensors, in float32, under the names that vLLM loads to."""

    def __init__(self, num_experts: int, num_slots: int, hidden_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        # Not one of vLLM's linear layers, which repack their weight after loading.
        self.classifier = nn.Linear(hidden_size, num_slots, bias=False, dtype=torch.float32).requires_grad_(False)
        self.e_score_correction_bias = nn.Parameter(torch.zeros(num_slots, dtype=torch.float32), requires_grad=False)
        set_weight_attrs(self.e_score_correction_bias, {"weight_loader": self.load_bias})

    def load_bias(self, param: nn.Parameter, loaded_weight: Tensor) -> None:
        """Copy a selection bias of length A, or of length E: then zero experts have 0."""
        allowed = {(self.num_experts,), tuple(param.shape)}
        if tuple(loaded_weight.shape) not in allowed:
            raise ValueError(
                f"e_score_correction_bias must have a shape of {sorted(allowed)}, got {tuple(loaded_weight.shape)}"
            )
        param.data.copy_(F.pad(loaded_weight.float(), (0, len(param) - len(loaded_weight))))


class _ExpertsByName(nn.Module):
    """Adds a step to the experts' names, for vLLM loads to `experts.routed_experts.w13_weight`."""

    def __init__(self, routed_experts: ExpertShare) -> None:
        super().__init__()
        self.routed_experts = routed_experts


class ZeroExpertLongcatMoE(nn.Module):
    """Stands in for vLLM's LongcatMoe: the same arguments and checkpoint names, nothing kept between calls.

    Routes in float32, whatever the dtype of the model. Of R ranks the first has the zero experts' part, so that the sum
    over ranks has it once.
    """

    def __init__(
        self,
        config: Any,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
        enable_eplb: bool = False,
    ) -> None:
        super().__init__()
        assert quant_config is None, "models that are quantised keep vLLM's layers"
        assert not enable_eplb, "models with expert parallelism keep vLLM's layers"
        self.top_k = top_k
        self.scaling = float(config.routed_scaling_factor)
        self.ranks = get_tensor_model_parallel_world_size()
        self.router = _Router(num_experts, num_experts + config.zero_expert_num, hidden_size)
        rank = get_tensor_model_parallel_rank()
        routed = ExpertShare(
            num_experts, hidden_size, intermediate_size, rank=rank, ranks=self.ranks, dtype=params_dtype
        )
        self.experts = _ExpertsByName(routed)
        self.identity = rank == 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [T, H]; the same shape and dtype out."""
        routed = self.experts.routed_experts
        y_TH = moe_from_logits(
            hidden_states,
            router_logits(hidden_states, self.router.classifier.weight),
            self.router.e_score_correction_bias,
            routed.w13_weight,
            routed.w2_weight,
            top_k=self.top_k,
            scaling=self.scaling,
            identity=self.identity,
        )
        return y_TH if self.ranks == 1 else tensor_model_parallel_all_reduce(y_TH)


# vLLM's experts, router and all: a function by this name since 0.27.
_their_experts = fused_moe.FusedMoEFactory if hasattr(fused_moe, "FusedMoEFactory") else fused_moe.FusedMoE


def _packed(weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
    """A routing as [T, 2K] float32, in which ids are exact: vLLM takes it for router logits, between ranks too."""
    return torch.cat([weights_TK, ids_TK.float()], dim=1)


def _unpacked(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """A `custom_routing_function` of vLLM's: (weights, ids) out of what takes the place of router logits."""
    # vLLM's kernels take both for contiguous.
    return gating_output[:, :topk].contiguous(), gating_output[:, topk:].to(torch.int32)


class UnsupportedExpertsError(Exception):
    """What vLLM has made for a model's FFN experts can't take a routing of ours; the message says why."""


class ZeroExpertLongcatMoEAroundTheirs(nn.Module):
    """Stands in for vLLM's LongcatMoe where vLLM's own experts compute: quantised ones, or experts spread over ranks.

    The same arguments and checkpoint names. Routing and zero experts are ours, and nothing is kept between calls: the
    routing goes to vLLM's experts in the place of router logits. Their output is complete for this rank's tokens, so
    every rank adds the zero experts' part of its tokens to it.

    Raises:
        UnsupportedExpertsError: where vLLM's experts choose by themselves, or there are none for this device.
    """

    def __init__(
        self,
        config: Any,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
        enable_eplb: bool = False,
    ) -> None:
        super().__init__()
        assert not enable_eplb, "models whose experts move between ranks keep vLLM's layers"
        self.num_experts, self.top_k = num_experts, top_k
        self.scaling = float(config.routed_scaling_factor)
        self.router = _Router(num_experts, num_experts + config.zero_expert_num, hidden_size)
        self.experts = _their_experts(
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            params_dtype=params_dtype,
            renormalize=False,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
            custom_routing_function=_unpacked,
            router_logits_dtype=torch.float32,
        )
        method: Any = self.experts.routed_experts.quant_method
        if getattr(method, "experts_cls", method) is None:
            raise UnsupportedExpertsError(f"there are no experts for it here ({type(method).__name__})")
        if method.is_monolithic:
            raise UnsupportedExpertsError(f"its experts choose by themselves ({type(method).__name__})")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [T, H]; the same shape and dtype out."""
        weights_TK, ids_TK = select_from_logits(
            router_logits(hidden_states, self.router.classifier.weight),
            self.router.e_score_correction_bias,
            top_k=self.top_k,
            num_experts=self.num_experts,
            scaling=self.scaling,
        )
        weights_TK, ids_TK, alpha_T1 = without_zero_choices(weights_TK, ids_TK, self.num_experts)
        zero_TH = hidden_states * alpha_T1  # before the experts, which may write over their input
        y_TH = self.experts(hidden_states=hidden_states, router_logits=_packed(weights_TK, ids_TK))
        return (y_TH + zero_TH).to(hidden_states.dtype)
