"""What `zemoe bench` times zemoe against: one entry in BASELINES each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .experts import fused_experts
from .layer import MoE

Call = Callable[[Tensor], Tensor]


def _torch(layer: MoE) -> Call:
    config = layer.config

    def call(x_TH: Tensor) -> Tensor:
        routing = layer.router(x_TH)
        return fused_experts(
            x_TH,
            layer.w13,
            layer.w2,
            routing.topk_weights_TK,
            routing.topk_ids_TK,
            num_experts=config.num_experts,
            zero_expert_kinds=config.zero_expert_kinds,
            activation=config.activation,
            backend="torch",
        )

    return call


def _eager(layer: MoE) -> Call:
    """transformers' own module on the weights of `layer`, nothing copied.

    It would allocate rows of `gate_up_proj` for zero experts too, which it never reads; here it has none.
    """
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    config = layer.config
    sizes: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "expert_ffn_hidden_size": config.intermediate_size,
        "n_routed_experts": config.num_experts,
        "zero_expert_num": config.num_zero_experts,
        "moe_topk": config.top_k,
        "num_experts_per_tok": config.top_k,  # what the newest version calls it
        "routed_scaling_factor": config.routed_scaling_factor,
    }
    with torch.device("meta"):
        eager = LongcatFlashMoE(LongcatFlashConfig(**sizes))
    eager.experts.gate_up_proj, eager.experts.down_proj = layer.w13, layer.w2
    eager.router.classifier.weight = layer.router.classifier.weight
    eager.router.register_buffer("e_score_correction_bias", layer.router.e_score_correction_bias)
    eager.eval()
    return lambda x_TH: eager(x_TH[None])[0]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """about: one line for people. module: what must be importable.

    build: from a layer to a call that computes the same from hidden states, router included; None where zemoe has no
    adapter that ever ran beside the real package, so that none is offered.
    """

    about: str
    module: str
    build: Callable[[MoE], Call] | None = None

    def why_absent(self) -> str:
        """Why it can't be timed here, "" if it can."""
        if find_spec(self.module) is None:
            return "not installed"
        return "" if self.build is not None else "installed, but zemoe has no adapter for it that was ever tried"


BASELINES: dict[str, Baseline] = {
    "torch": Baseline(
        about="zemoe's router and its torch backend: sort and grouped_mm, zero pairs dropped",
        module="torch",
        build=_torch,
    ),
    "eager": Baseline(about="transformers' LongcatFlashMoE", module="transformers", build=_eager),
    "vllm": Baseline(about="the serving engine vLLM", module="vllm"),
    "sonicmoe": Baseline(about="the training library SonicMoE", module="sonicmoe"),
    "liger": Baseline(about="Liger's kernels", module="liger_kernel"),
}
