"""LongCat-Flash in Hugging Face transformers (5.17 and later), with its MoE layers computed by zemoe.

`apply()` makes every LongCat-Flash model built or loaded from then on use our layers; `patch_(model)` changes a loaded
one. Both can be undone, and importing this module changes nothing.

What becomes better: the layer costs work for its FFN experts only, compiles without graph breaks, routes in float32
whatever the dtype of the model, has no weights for its zero experts, and loads checkpoints in the layout in which the
models are published, which plain transformers can't.

E FFN experts, Z zero experts, A = E + Z slots.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.monkey_patching import get_patch_mapping

from ..checkpoint import CheckpointError, save_tensors, transformers_layout, verify
from ..experts import resolve_backend
from .transformers_layers import (
    StockExperts,
    StockMoE,
    StockRouter,
    ZeroExpertLongcatExperts,
    ZeroExpertLongcatMoE,
    ZeroExpertLongcatRouter,
    layer_config,
    modeling,
)

_STOCK_CAN_COMPILE = modeling.LongcatFlashPreTrainedModel._can_compile_fullgraph
_MODEL_TYPE = "longcat_flash"
_GATE_UP = "mlp.experts.gate_up_proj"


class DropDeadRows(ConversionOps):
    """Keep as many experts as the parameter has rows: a checkpoint may carry dead rows for the zero experts.

    Stands before stock's stacking, so that dead tensors are dropped and never copied. A model that does have rows for
    its zero experts is left alone.
    """

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        name, config = kwargs["full_layer_name"], kwargs["config"]
        param = kwargs["model"].get_parameter(name)
        rows = (param.to_local() if isinstance(param, DTensor) else param).shape[0]
        slots = config.n_routed_experts + config.zero_expert_num
        # Where the rows themselves are sharded, a rank sees its own, and dead ones behind them.
        allowed = {rows, slots} if rows == param.shape[0] else set(range(rows, rows + config.zero_expert_num + 1))
        kept = {}
        for pattern, tensors in input_dict.items():
            packed = len(tensors) == 1 and tensors[0].ndim == 3  # all rows in one tensor, not a list of rows
            found = tensors[0].shape[0] if packed else len(tensors)
            if found not in allowed:
                raise ValueError(f"{name} needs {rows} experts ({slots} with dead rows), the checkpoint has {found}")
            if packed and found > rows:
                kept[pattern] = [tensors[0][:rows].clone()]  # a view would keep the dead rows in memory
            else:
                kept[pattern] = tensors if packed else tensors[:rows]
        return kept

    @property
    def reverse_op(self) -> ConversionOps:
        return KeepRows()


class KeepRows(ConversionOps):
    """The reverse of dropping what nothing reads: nothing."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return DropDeadRows()


def _our_conversions(stock: list[Any]) -> list[Any]:
    """Stock's weight conversions with dead rows dropped on the way; `_stock_conversions` takes that out again."""
    ours = [WeightConverter(_GATE_UP, _GATE_UP, [DropDeadRows()])]  # first here is last when saving
    found = False
    for converter in stock:
        if isinstance(converter, WeightConverter) and converter.target_patterns == [_GATE_UP]:
            converter.operations = [DropDeadRows(), *converter.operations]
            found = True
        ours.append(converter)
    if not found:
        raise RuntimeError(f"transformers {transformers.__version__} stacks LongCat-Flash's experts in an unknown way")
    return ours


def _stock_conversions(conversions: list[Any]) -> list[Any]:
    stock = []
    for converter in conversions:
        operations = getattr(converter, "operations", None)
        if operations is not None:
            converter.operations = [op for op in operations if not isinstance(op, DropDeadRows)]
        if operations is None or converter.operations:
            stock.append(converter)
    return stock


def _register_conversions(conversions: list[Any]) -> None:
    by_user = _MODEL_TYPE in conversion_mapping.USER_REGISTERED_MAPPINGS
    try:
        conversion_mapping.register_checkpoint_conversion_mapping(_MODEL_TYPE, conversions, overwrite=True)
    finally:
        if not by_user:  # registering marks it, and then it would count for remote code of the same model_type too
            conversion_mapping.USER_REGISTERED_MAPPINGS.discard(_MODEL_TYPE)


def is_applied() -> bool:
    """Whether LongCat-Flash models built now get our layers."""
    return modeling.LongcatFlashMoE is ZeroExpertLongcatMoE


def apply() -> None:
    """From now on, every LongCat-Flash model that is built or loaded in this process has our MoE layers.

    Covers `from_pretrained`, `from_config` and the class called directly. Checkpoints load in the original layout and
    in the one transformers saves, and are saved in the original one. Calling it again does nothing; `unapply` undoes
    it; after an exception nothing has changed. Models built before are for `patch_`.

    Raises:
        RuntimeError: if something else has replaced LongCat-Flash's layers, or this transformers is not understood.
    """
    if is_applied():
        return
    if modeling.LongcatFlashMoE is not StockMoE:
        raise RuntimeError(f"LongcatFlashMoE has been replaced by {modeling.LongcatFlashMoE!r}; undo that first")
    taken = {"LongcatFlashMoE", "LongcatFlashExperts", "LongcatFlashTopkRouter"} & set(get_patch_mapping())
    if taken:
        raise RuntimeError(f"a patch mapping is registered for {sorted(taken)}; unregister it first")
    stock = conversion_mapping.get_checkpoint_conversion_mapping(_MODEL_TYPE)  # a copy
    if not stock:
        raise RuntimeError(f"transformers {transformers.__version__} has no weight conversions for {_MODEL_TYPE}")
    conversions = _our_conversions(stock)
    try:
        _register_conversions(conversions)
        modeling.LongcatFlashPreTrainedModel._can_compile_fullgraph = True
        modeling.LongcatFlashMoE = ZeroExpertLongcatMoE
    except BaseException:
        unapply()
        raise


def unapply() -> None:
    """Undo `apply`. Models that have our layers keep them (and save as before); `unpatch_` takes them out."""
    if is_applied():
        modeling.LongcatFlashMoE = StockMoE
    modeling.LongcatFlashPreTrainedModel._can_compile_fullgraph = _STOCK_CAN_COMPILE
    conversions = conversion_mapping.get_checkpoint_conversion_mapping(_MODEL_TYPE) or []
    if any(isinstance(op, DropDeadRows) for converter in conversions for op in getattr(converter, "operations", ())):
        _register_conversions(_stock_conversions(conversions))


@contextmanager
def applied() -> Iterator[None]:
    """`apply` for the duration of a `with` block."""
    before = is_applied()
    apply()
    try:
        yield
    finally:
        if not before:
            unapply()


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
        backend: a name in zemoe.experts.BACKENDS for these layers, or None for the first that works.

    Raises:
        ValueError: if the model has no LongCat-Flash MoE layer, has one that is quantized, wrapped (tensor parallel,
            offloaded) or changed, or the backend can't run it. Nothing has changed then, nor after any other exception.
        TypeError: if model is no module.
    """
    layers = _longcat_layers(model)
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
    layers = _longcat_layers(model)
    for name, layer in layers.items():
        _check_plain(name, layer)
    ours: dict[str, Any] = {name: layer for name, layer in layers.items() if isinstance(layer, ZeroExpertLongcatMoE)}
    _to_stock(ours)
    _set_can_compile(model, _STOCK_CAN_COMPILE)
    return tuple(ours)


def _longcat_layers(model: nn.Module) -> dict[str, Any]:
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
            raise ValueError(f"{name}: {part} must be {known[0].__name__}, got {type(module).__name__} (quantized?)")
        if "forward" in vars(module):
            raise ValueError(f"{name}: {part} is wrapped (parallel or offloaded); call apply() before loading instead")
    if "forward" in vars(layer.experts.identity_expert) or isinstance(layer.experts.gate_up_proj, DTensor):
        raise ValueError(f"{name}: the experts are sharded; call apply() before loading instead")
    layer_config(layer.config)


def _free_dead_rows(experts: Any) -> int:
    """Shrink gate_up_proj to its E live rows; bytes freed. One layer's live rows are held twice meanwhile."""
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
            module._can_compile_fullgraph = value


# A value of the wrong type is found by whoever uses it first, transformers' own check or its arithmetic.
_WRONG_VALUE = (StrictDataclassError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


def load_config(folder: str | Path) -> transformers.LongcatFlashConfig:
    """The config of a checkpoint folder; CheckpointError naming config.json for a value that transformers can't use."""
    try:
        return transformers.LongcatFlashConfig.from_pretrained(folder, local_files_only=True)
    except _WRONG_VALUE as error:
        raise CheckpointError(f"{Path(folder) / 'config.json'}: {error}") from error


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    backend: str | None = None,
) -> modeling.LongcatFlashForCausalLM:
    """Load a LongCat-Flash checkpoint folder with our layers, in evaluation mode.

    The folder is verified first (`zemoe.checkpoint.verify`). Nothing is downloaded, no code of the checkpoint is run,
    no pickle is opened, and transformers is left as it was.

    Args:
        folder: with config.json and safetensors, in any layout that zemoe.checkpoint knows.
        device: where the model goes. dtype: of all but the router, "auto" for the checkpoint's own.
        backend: as for `patch_`.

    Raises:
        zemoe.checkpoint.CheckpointError: naming file and tensor. ValueError: for a backend that can't run it.
    """
    folder = Path(folder)
    verify(folder)
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise ValueError(f"folder must be a plain checkpoint, got {adapter}: adapters are not supported")
    config = load_config(folder)
    with applied():
        loaded: Any = modeling.LongcatFlashForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"{folder}: transformers could not place every tensor: {wrong}")
    model.to(device)
    patch_(model, backend)
    return model


def export(model: modeling.LongcatFlashForCausalLM, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> list[str]:
    """Save a model, ours or stock, so that plain transformers loads it: with its dead rows, written as zeros.

    `model.save_pretrained` of a model with our layers writes the original layout, which plain transformers can't load.
    `folder` must not hold weights yet. Returns the names of the weight files.
    """
    layers = _longcat_layers(model)
    if not isinstance(model, modeling.LongcatFlashForCausalLM):
        raise ValueError(f"model must be LongcatFlashForCausalLM, got {type(model).__name__}")
    layer = layer_config(next(iter(layers.values())).config)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    tensors = ((k, v) for k, v in model.state_dict().items() if k != "lm_head.weight" or not config.tie_word_embeddings)
    files = save_tensors(
        transformers_layout(tensors, layer.num_experts, layer.num_zero_experts), folder, max_shard_bytes
    )
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return files
