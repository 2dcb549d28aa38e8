"""Small FusedMoE layers for the tests of that class, filled, with inputs; and how a whole layer is judged."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from helpers.judge import judge, one_thread
from zemoe import FusedMoE, ZeroExpertFusedMoE, reference

E, Z, H, I, K = 6, 4, 16, 12, 3
A = E + Z
MIXED = (("constant", 1), ("identity", 1), ("null", 1), ("scaled_identity", 1))
BASE = {"num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": I, "renormalize": False}


class Classifier(nn.Module):
    """A router as engines have it: a weight and a bias that only selects."""

    def __init__(self, slots: int = A, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(slots, H, generator=generator))
        values = 0.3 * torch.randn(slots, generator=generator)
        self.e_score_correction_bias = nn.Parameter(values) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() @ self.weight.T


def fill(layer: FusedMoE, seed: int = 0) -> FusedMoE:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
    return layer


def zero_layer(kinds="identity", num: int = Z, router: nn.Module | None = None, **kwargs) -> ZeroExpertFusedMoE:
    return fill(ZeroExpertFusedMoE(num, kinds, router, **{**BASE, **kwargs}))


def base_layer(**kwargs) -> FusedMoE:
    return fill(FusedMoE(**{**BASE, **kwargs}))


def tokens(T: int = 10, slots: int = A, seed: int = 1, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, H, generator=generator).to(dtype), torch.randn(T, slots, generator=generator)


def rules(layer: FusedMoE, kinds, bias: torch.Tensor | None = None) -> dict:
    return {
        "num_experts": layer.num_experts,
        "zero_expert_kinds": kinds,
        "scoring_func": layer.scoring_func,
        "renormalize": layer.renormalize,
        "e_score_correction_bias": bias,
        "routed_scaling_factor": layer.routed_scaling_factor,
        "num_expert_group": layer.num_expert_group if layer.use_grouped_topk else None,
        "topk_group": layer.topk_group if layer.use_grouped_topk else None,
    }


def judge_layer(out, layer, x, logits, kinds, bias=None) -> None:
    """The whole layer against the reference, with the layer's own ids."""
    ids = layer.route(x, logits).topk_ids_TK
    params = SimpleNamespace(
        constant_router=getattr(layer, "constant_router", None),
        constant_value=getattr(layer, "constant_value", None),
        scale=getattr(layer, "scale", None),
    )
    results = []
    for dtype in (torch.float64, x.dtype):
        routed = torch.float64 if dtype == torch.float64 else torch.float32
        weights = reference.select(
            logits, layer.top_k, ids_TK=ids, dtype=routed, **rules(layer, kinds, bias)
        ).topk_weights_TK
        if x.dtype == torch.float64:  # routing stays float32, so only what follows it can be judged in float64
            weights = layer.route(x, logits).topk_weights_TK
        with one_thread():
            exact_or_own = reference.experts(
                x,
                layer.w13_weight,
                layer.w2_weight,
                weights,
                ids,
                num_experts=layer.num_experts,
                zero_expert_kinds=kinds,
                affine_params=params,
                activation=layer.activation,
                dtype=dtype,
            )
        results.append(exact_or_own)
    judge(out, *results)
