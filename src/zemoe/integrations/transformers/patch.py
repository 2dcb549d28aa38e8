"""`patch_` and `unpatch_`: a loaded LongCat-Flash model gets our MoE layers, or stock's again.

E FFN experts, Z zero experts, A = E + Z slots.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN

from ...backends import resolve_backend
from .layers import (
    StockExperts,
    StockMoE,
    StockRouter,
    ZeroExpertLongcatExperts,
    ZeroExpertLongcatMoE,
    ZeroExpertLongcatRouter,
    layer_config,
    modeling,
)
from .private import can_compile, set_can_compile

STOCK_CAN_COMPILE = can_compile(modeling.LongcatFlashPreTrainedModel)


@dataclass(frozen=True)
class PatchReport:
    """What `patch_` did.

    layers: names of the MoE layers that are ours now, those that were before included.
    bytes_freed: dead zero-expert rows given back. bytes_shared: expert weights in use, all in stock's own Parameters.
    router_dtype: of the router's weight and bias. backend: the one that computes. backend_reason: why that one.
    """

    layers: tuple[str, ...]
    bytes_freed: int
    bytes_shared: int
    router_dtype: torch.dtype
    backend: str
    backend_reason: str


def patch_(model: nn.Module, backend: str | None = None) -> PatchReport:
    """Give a loaded LongCat-Flash model our MoE layers, in place.

    Modules and Parameters stay the same objects, with their hooks and names; only the modules' class changes. The dead
    rows that stock allocates for zero experts are freed, layer by layer, not hidden behind a view: they are Z / A of
    the gate and up weights, 12.9 GB a layer at full size in bfloat16. Patch before an optimizer's first step, since
    its state has the shape of the weights. The router becomes float32. Patching again only sets `backend`.

    Args:
        model: LongcatFlashForCausalLM, LongcatFlashModel, or a module that contains one.
        backend: a name in zemoe.backends.BACKENDS for these layers, or None for the first that works.

    Raises:
        ValueError: if the model has no LongCat-Flash MoE layer, has one that is quantized, wrapped (tensor parallel,
            offloaded) or changed, or the backend can't run it. Nothing has changed then, nor after any other exception.
        TypeError: if model is no module.
    """
    layers = longcat_layers(model)
    for name, layer in layers.items():
        _check_plain(name, layer)
    experts = next(iter(layers.values())).experts
    weight = experts.gate_up_proj
    chosen = resolve_backend(weight.device, weight.dtype, backend, num_experts=experts.num_routed_experts)
    stock: dict[str, Any] = {name: layer for name, layer in layers.items() if type(layer) is StockMoE}
    freed = 0
    try:
        for layer in stock.values():
            layer.__class__ = ZeroExpertLongcatMoE
            layer.router.__class__ = ZeroExpertLongcatRouter
            layer.router.adopt()
            layer.experts.__class__ = ZeroExpertLongcatExperts
            layer.experts.adopt(layer.config)
        for layer in stock.values():
            freed += _free_dead_rows(layer.experts)
    except BaseException:
        _to_stock(stock)
        raise
    for layer in layers.values():
        layer.experts.backend = backend
        layer.router.use(backend)
    _set_can_compile(model, True)
    experts = [layer.experts for layer in layers.values()]
    why = "asked for" if backend is not None else f"the first that works on {weight.device.type} in {weight.dtype}"
    return PatchReport(
        layers=tuple(layers),
        bytes_freed=freed,
        bytes_shared=sum(p.numel() * p.element_size() for e in experts for p in (e.gate_up_proj, e.down_proj)),
        router_dtype=next(iter(layers.values())).router.classifier.weight.dtype,
        backend=chosen.name,
        backend_reason=f"{why}: {chosen.about}",
    )


def unpatch_(model: nn.Module) -> tuple[str, ...]:
    """Give a model stock's MoE layers back, in place, also one built under `apply`; returns the names of those changed.

    The zero experts' rows, which nothing reads, come back as zeros; the router stays float32. After that the model
    saves in transformers' own layout again.

    Raises:
        ValueError: as `patch_`; nothing has changed then.
    """
    layers = longcat_layers(model)
    for name, layer in layers.items():
        _check_plain(name, layer)
    ours: dict[str, Any] = {name: layer for name, layer in layers.items() if isinstance(layer, ZeroExpertLongcatMoE)}
    _to_stock(ours)
    _set_can_compile(model, STOCK_CAN_COMPILE)
    return tuple(ours)


def longcat_layers(model: nn.Module) -> dict[str, Any]:
    """The MoE layers, ours or stock's, by name; TypeError or ValueError where there are none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: {model!r}")
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, StockMoE)}
    if not layers:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        classes = {type(module).__name__ for module in model.modules()}
        mixtures = ", ".join(sorted(name for name in classes if re.search("moe|experts", name, re.I))) or "none"
        raise ValueError(
            f"model must be LongcatFlashForCausalLM or LongcatFlashModel, or contain one, got {type(model).__name__} "
            f"(model_type {model_type!r}, mixture-of-experts modules: {mixtures})"
        )
    return layers


def _check_plain(name: str, layer: Any) -> None:
    """Raise ValueError unless the layer is exactly stock's or ours, with nothing wrapped around its parts."""
    parts = {
        "mlp": (layer, (StockMoE, ZeroExpertLongcatMoE)),
        "mlp.experts": (layer.experts, (StockExperts, ZeroExpertLongcatExperts)),
        "mlp.router": (layer.router, (StockRouter, ZeroExpertLongcatRouter)),
    }
    for part, (module, known) in parts.items():
        if type(module) not in known:
            raise ValueError(
                f"{name}: {part} must be {known[0].__name__}, got {type(module).__name__} (quantized? PEFT?)"
            )
        if "forward" in vars(module):
            raise ValueError(f"{name}: {part} is wrapped (parallel or offloaded); call apply() before loading instead")
    if "forward" in vars(layer.experts.identity_expert) or isinstance(layer.experts.gate_up_proj, DTensor):
        raise ValueError(f"{name}: the experts are sharded; call apply() before loading instead")
    layer_config(layer.config)
    activation = type(ACT2FN[layer.config.hidden_act])
    if type(layer.experts.act_fn) is not activation:
        raise ValueError(f"{name}: act_fn must be {activation.__name__}, got {type(layer.experts.act_fn).__name__}")


def _free_dead_rows(experts: Any) -> int:
    """Shrink gate_up_proj to its E live rows and return the bytes freed; meanwhile the live rows are held twice."""
    weight, rows = experts.gate_up_proj, experts.num_routed_experts
    before = weight.numel() * weight.element_size()
    if weight.shape[0] > rows:
        weight.data = weight.data[:rows].clone()
        if weight.grad is not None:
            weight.grad = weight.grad[:rows].clone()
    return before - weight.numel() * weight.element_size()


def _to_stock(layers: dict[str, Any]) -> None:
    # Classes first: they can't fail, and stock computes the same without the rows that it never reads.
    for layer in layers.values():
        ZeroExpertLongcatRouter.release(layer.router)  # which may not have our class yet
        layer.__class__, layer.router.__class__, layer.experts.__class__ = StockMoE, StockRouter, StockExperts
    for layer in layers.values():
        weight, slots = layer.experts.gate_up_proj, layer.experts.total_experts
        missing = slots - weight.shape[0]
        if missing:
            weight.data = torch.cat([weight.data, weight.data.new_zeros(missing, *weight.shape[1:])])
            if weight.grad is not None:
                weight.grad = torch.cat([weight.grad, weight.grad.new_zeros(missing, *weight.shape[1:])])


def _set_can_compile(model: nn.Module, value: bool) -> None:
    for module in model.modules():
        if isinstance(module, modeling.LongcatFlashPreTrainedModel):
            set_can_compile(module, value)
