"""What `zemoe bench` times zemoe against: one entry in BASELINES each.

T tokens, H hidden size, E FFN experts, K choices a token, P (token, FFN expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import fused_experts
from ..layer import MoE

Forward = Callable[[Tensor], Tensor]


def by_backend(layer: MoE, backend: str) -> Forward:
    """The layer's router, and its experts by the backend of that name."""
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
            backend=backend,
        )

    return call


def _eager(layer: MoE, make_config: Any, make_module: Any) -> Forward:
    """Return transformers' own module, on the weights of `layer` without a copy.

    It would allocate rows of `gate_up_proj` for zero experts too, which it never reads; here it has none.
    """
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
        eager = make_module(make_config(**sizes))
    eager.experts.gate_up_proj, eager.experts.down_proj = layer.w13, layer.w2
    eager.router.classifier.weight = layer.router.classifier.weight
    eager.router.register_buffer("e_score_correction_bias", layer.router.e_score_correction_bias)
    eager.eval()
    return lambda x_TH: eager(x_TH[None])[0]


def _vllm(layer: MoE, make_router: Any, experts: Any) -> Forward:
    """Return what vLLM's LongCat layer does: a float32 product, its router for zero experts, its experts, their sum.

    The router turns a zero choice into FFN expert 0 with weight 0 and keeps the zero experts' sum, scaled too, aside.
    """
    config = layer.config
    router = make_router(
        top_k=config.top_k,
        global_num_experts=config.num_experts,
        e_score_correction_bias=layer.router.e_score_correction_bias,
        num_logical_experts=config.num_experts,
        zero_expert_type="identity",
        scoring_func=config.scoring_func,
        renormalize=False,
        routed_scaling_factor=config.routed_scaling_factor,
    )

    def call(x_TH: Tensor) -> Tensor:
        logits_TA = F.linear(x_TH.float(), layer.router.classifier.weight)
        weights_TK, ids_TK = router._compute_routing(x_TH, logits_TA, None)
        y_TH = experts(x_TH, layer.w13, layer.w2, weights_TK, ids_TK)
        return y_TH + router.zero_expert_output

    return call


def _add_identities(y_TH: Tensor, x_TH: Tensor, weights_TK: Tensor, real_TK: Tensor) -> Tensor:
    """Add to y, in place and in one launch, the identities of x that the choices other than `real` stand for."""
    return y_TH.addcmul_(x_TH, torch.where(real_TK, 0.0, weights_TK).sum(-1, keepdim=True))


def _grouped(layer: MoE) -> Forward:
    """Return the layer as one writes it by hand: nothing waits for the device, and everything stays in 16 bits."""
    E = layer.config.num_experts

    def call(x_TH: Tensor) -> Tensor:
        routing = layer.router(x_TH)
        weights_TK, ids_TK = routing.topk_weights_TK, routing.topk_ids_TK
        (T, K), real_TK = ids_TK.shape, ids_TK < E
        sorted_N, choice_N = ids_TK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(sorted_N, torch.arange(E, device=x_TH.device), right=True, out_int32=True)
        gate_NI, up_NI = F.grouped_mm(x_TH[choice_N // K], layer.w13.mT, offs=ends_E).chunk(2, dim=-1)
        rows_NH = F.grouped_mm(F.silu(gate_NI) * up_NI, layer.w2.mT, offs=ends_E)
        rows_NH[:1].masked_fill_(ends_E[-1:, None] == 0, 0)  # else uninitialised, and zero choices read it
        row_N = torch.empty_like(choice_N).scatter_(0, choice_N, torch.arange(T * K, device=x_TH.device))
        rows_TKH = rows_NH[torch.where(real_TK, row_N.view(T, K), 0)]
        weights_T1K = torch.where(real_TK, weights_TK, 0.0).to(x_TH.dtype)[:, None]
        return _add_identities((weights_T1K @ rows_TKH).squeeze(1), x_TH, weights_TK, real_TK)

    return call


def _sonicmoe(layer: MoE, experts: Any, activations: Any) -> Forward:
    E = layer.config.num_experts
    w1, w2 = layer.w13.permute(1, 2, 0), layer.w2.permute(1, 2, 0)  # views: it wants the experts last

    def call(x_TH: Tensor) -> Tensor:
        routing = layer.router(x_TH)
        weights_TK, ids_TK = routing.topk_weights_TK, routing.topk_ids_TK
        real_TK = ids_TK < E
        pairs_P = real_TK.flatten().nonzero().squeeze(1)  # in the order of tokens, as it must be; waits for the device
        if not len(pairs_P):  # it can't launch a grid of nothing
            return _add_identities(torch.zeros_like(x_TH), x_TH, weights_TK, real_TK)
        y_TH, _ = experts(
            x_TH,
            weights_TK.flatten()[pairs_P],
            (pairs_P // ids_TK.shape[1]).int(),
            ids_TK.flatten()[pairs_P].int(),
            w1,
            None,
            w2,
            None,
            E,
            torch.cuda.current_stream().cuda_stream,
            activations.SWIGLU,
            True,  # inference: what only its backward needs is not written
            concat_layout=True,  # gate rows before up rows
        )
        return _add_identities(y_TH, x_TH, weights_TK, real_TK)

    return call


def _liger(layer: MoE, experts: Any) -> Forward:
    E = layer.config.num_experts

    def call(x_TH: Tensor) -> Tensor:
        routing = layer.router(x_TH)
        weights_TK, ids_TK = routing.topk_weights_TK, routing.topk_ids_TK
        real_TK = ids_TK < E
        y_TH = experts.apply(
            x_TH,
            layer.w13,
            layer.w2,
            torch.where(real_TK, ids_TK, 0).int(),  # it takes K FFN experts a token, no fewer
            torch.where(real_TK, weights_TK, 0.0),
        )
        return _add_identities(y_TH, x_TH, weights_TK, real_TK)

    return call


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """about: one line for people. module: what must be installed. devices: the device types that it runs on.

    parts: what of the package is called, "module:name" each. adapt: from a layer and the parts to a call that computes
    the same from hidden states, router included, on the weights of the layer (softmax scores, identity zero experts).
    """

    about: str
    module: str
    adapt: Callable[..., Forward]
    parts: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda",)

    def why_absent(self, device_type: str) -> str:
        """Return why it can't be timed here, "" if it can. Imports the package where there is no other reason."""
        if find_spec(self.module) is None:
            return "not installed"
        if device_type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        try:
            self._loaded()
        except (ImportError, AttributeError) as error:
            return f"installed, but what zemoe calls is missing: {error}"
        return ""

    def build(self, layer: MoE) -> Forward:
        """Return the forward of one layer; it follows changes of the layer's weights and of its selection bias."""
        return self.adapt(layer, *self._loaded())

    def _loaded(self) -> list[Any]:
        return [resolve_name(part) for part in self.parts]


BASELINES: dict[str, Baseline] = {
    "torch": Baseline(
        about="zemoe's router and its torch backend: sort and grouped_mm, zero pairs dropped",
        module="torch",
        adapt=partial(by_backend, backend="torch"),
        devices=("cpu", "cuda"),
    ),
    "eager": Baseline(
        about="transformers' LongcatFlashMoE",
        module="transformers",
        adapt=_eager,
        parts=(
            "transformers:LongcatFlashConfig",
            "transformers.models.longcat_flash.modeling_longcat_flash:LongcatFlashMoE",
        ),
        devices=("cpu", "cuda"),
    ),
    "grouped": Baseline(
        about="zemoe's router, then torch by hand: sort, grouped_mm, zero pairs dropped, no gradients",
        module="torch",
        adapt=_grouped,
        devices=("cpu", "cuda"),
    ),
    "vllm": Baseline(
        about="the serving engine vLLM: its router for zero experts and Triton experts, as its LongCat layer runs them",
        module="vllm",
        adapt=_vllm,
        parts=(
            "vllm.model_executor.layers.fused_moe.router.zero_expert_router:ZeroExpertRouter",
            "vllm.model_executor.layers.fused_moe.fused_moe:fused_experts",
        ),
    ),
    "sonicmoe": Baseline(
        about="the training library SonicMoE, its forward, given the real pairs only; zemoe's router, identities added "
        "after",
        module="sonicmoe",
        adapt=_sonicmoe,
        parts=("sonicmoe:moe_general_routing_inputs", "sonicmoe.enums:ActivationType"),
    ),
    "liger": Baseline(
        about="Liger's fused experts for training, their forward, zero choices as FFN expert 0 with weight 0; zemoe's "
        "router, identities added after",
        module="liger_kernel",
        adapt=_liger,
        parts=("liger_kernel.ops:LigerFusedMoEFunction",),
    ),
}
