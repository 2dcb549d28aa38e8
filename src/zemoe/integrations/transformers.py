"""LongCat-Flash in Hugging Face transformers (5.17 and later), with its MoE layers computed by zemoe.

`apply()` makes every LongCat-Flash model built or loaded from then on use our layers; `patch_(model)` changes a loaded
one; `register()` makes `experts_implementation="zemoe"` known, for LongCat-Flash and for families without zero experts.
All can be undone, and importing this module changes nothing.

What becomes better: the layer costs work for its FFN experts only, compiles without graph breaks, routes in float32
whatever the dtype of the model, has no weights for its zero experts, and loads checkpoints in the layout in which the
models are published, which plain transformers can't.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.monkey_patching import get_patch_mapping

from ..checkpoints.config import READ
from ..checkpoints.files import load_json
from ..checkpoints.fp8 import QuantizedManifest, read_config, verify_any
from ..checkpoints.longcat import CheckpointError, save_tensors, transformers_layout
from . import transformers_conversions as conversions
from . import transformers_experts as by_name
from .transformers_fp8 import load_dequantized
from .transformers_layers import (
    StockMoE,
    ZeroExpertLongcatExperts,
    ZeroExpertLongcatMoE,
    ZeroExpertLongcatRouter,
    layer_config,
    modeling,
)
from .transformers_patch import STOCK_CAN_COMPILE, PatchReport, longcat_layers, patch_, unpatch_

# For DistributedConfig(ep_size=..., ep_plan=EP_PLAN), whole experts on each rank: transformers has no such plan itself.
EP_PLAN = {
    "model.layers.*.mlp.experts": "ep_dispatch_experts",
    "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
}

__all__ = [
    "EP_PLAN",
    "PatchReport",
    "ZeroExpertLongcatExperts",
    "ZeroExpertLongcatMoE",
    "ZeroExpertLongcatRouter",
    "applied",
    "apply",
    "export",
    "is_applied",
    "is_registered",
    "load_config",
    "load_model",
    "patch_",
    "register",
    "unapply",
    "unpatch_",
    "unregister",
]


def is_applied() -> bool:
    """Whether LongCat-Flash models built now get our layers, whatever they are asked for."""
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
    try:
        conversions.install()
        modeling.LongcatFlashPreTrainedModel._can_compile_fullgraph = True
        modeling.LongcatFlashMoE = ZeroExpertLongcatMoE
    except BaseException:
        unapply()
        raise


def unapply() -> None:
    """Undo `apply`. Models that have our layers keep them (and save as before); `unpatch_` takes them out."""
    if is_applied():
        modeling.LongcatFlashMoE = StockMoE
    modeling.LongcatFlashPreTrainedModel._can_compile_fullgraph = STOCK_CAN_COMPILE
    if not is_registered():
        conversions.remove()


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


def is_registered() -> bool:
    """Whether transformers knows `experts_implementation="zemoe"`."""
    return by_name.is_registered()


def register() -> None:
    """From now on transformers knows `experts_implementation="zemoe"`; nothing changes for what doesn't ask for it.

    For `from_pretrained`, `from_config` and `model.set_experts_implementation`. LongCat-Flash models get our layers as
    by `patch_` ("eager" gives stock's back, any other name is refused, since nobody else knows zero experts) and load
    from both layouts. In families without zero experts `zemoe.fused_experts` computes the experts; one whose experts
    are not of our kind (biases, a clamped gate, ...) raises ValueError at its first forward.
    Calling it again does nothing; after an exception nothing has changed.

    Raises:
        RuntimeError: if something else has taken the place of LongCat-Flash's methods, or this transformers is not
            understood.
    """
    if is_registered():
        return
    try:
        conversions.install()
        by_name.install()
    except BaseException:
        unregister()
        raise


def unregister() -> None:
    """Undo `register`. LongCat-Flash models keep their layers; models of other families must be set to another name."""
    by_name.remove()
    if not is_applied():
        conversions.remove()


# What transformers raises for a value of the wrong type, in its own check or its arithmetic.
_WRONG_VALUE = (StrictDataclassError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


def load_config(folder: str | Path) -> transformers.LongcatFlashConfig:
    """The config of a checkpoint folder, not quantized if its weights are; CheckpointError naming config.json.

    Entries that this architecture doesn't know are left out.
    """
    config = read_config(folder)
    try:
        return transformers.LongcatFlashConfig(**{key: config[key] for key in READ if key in config})
    except _WRONG_VALUE as error:
        raise CheckpointError(f"{Path(folder) / 'config.json'}: {error}") from error


def _generation_config(folder: Path, config: transformers.LongcatFlashConfig) -> transformers.GenerationConfig:
    """What generation_config.json says, or where there is none `config`. Raises CheckpointError."""
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return transformers.GenerationConfig.from_model_config(config)
    entries = load_json(path)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):  # which transformers takes as they are
        ids = entries.get(key)
        listed = ids if key == "eos_token_id" and isinstance(ids, list) else [] if ids is None else [ids]
        if any(type(one) is not int for one in listed):
            needs = "a token id, a list of them, or null" if key == "eos_token_id" else "a token id or null"
            raise CheckpointError(f"{path}: {key} must be {needs}, got {ids!r}")
    try:
        return transformers.GenerationConfig.from_dict(dict(entries))
    except _WRONG_VALUE as error:
        names = (
            ", ".join(key for key, value in entries.items() if not _makes_sense(key, value)) or "its entries together"
        )
        raise CheckpointError(f"{path}: {names} can't be used by transformers ({error})") from error


def _makes_sense(key: str, value: Any) -> bool:
    try:
        transformers.GenerationConfig.from_dict({key: value})
    except _WRONG_VALUE:
        return False
    return True


_LOADING = threading.Lock()  # `applied` is for the process: one thread must not leave it while another one loads


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    backend: str | None = None,
) -> modeling.LongcatFlashForCausalLM:
    """Load a LongCat-Flash checkpoint folder with our layers, in evaluation mode.

    The folder is verified first (`zemoe.checkpoints.verify`). Nothing is downloaded, no code of the checkpoint is run,
    no pickle is opened, and transformers is left as it was. Threads that call it at once load one after another.

    Args:
        folder: with config.json and safetensors, in any layout that zemoe.checkpoints knows; FP8 weights (in the format
            of zemoe.checkpoints.fp8) are dequantized while they are read.
        device: where the model goes. dtype: of all but the router, "auto" for the checkpoint's own (FP8: bfloat16).
        backend: as for `patch_`.

    Raises:
        zemoe.checkpoints.CheckpointError: naming file and tensor. ValueError: for a backend that can't run it.
    """
    folder = Path(folder)
    manifest, config = verify_any(folder), load_config(folder)
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise CheckpointError(f"{adapter}: adapters are not supported, give a folder with all weights")
    generation = _generation_config(folder, config)
    if isinstance(manifest, QuantizedManifest):
        with _LOADING, applied():
            model: Any = load_dequantized(manifest, config, torch.bfloat16 if dtype == "auto" else _dtype_of(dtype))
        model.generation_config = generation
        model.to(device)
        patch_(model, backend)
        return model
    with _LOADING, applied():
        loaded: Any = modeling.LongcatFlashForCausalLM.from_pretrained(
            folder,
            config=config,
            generation_config=generation,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(f"{folder}: transformers could not place every tensor: {wrong}")
    model.to(device)
    patch_(model, backend)
    return model


def _dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype or its name, got {dtype!r}")
    return found


def export(model: modeling.LongcatFlashForCausalLM, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> list[str]:
    """Save a model, ours or stock, so that plain transformers loads it: with its dead rows, written as zeros.

    `model.save_pretrained` of a model with our layers writes the original layout, which plain transformers can't load.
    `folder` must not hold weights yet. Returns the names of the weight files.

    Raises:
        ValueError: for another model, for one whose weights are not in memory (offloaded), for a folder with weights.
    """
    layers = longcat_layers(model)
    if not isinstance(model, modeling.LongcatFlashForCausalLM):
        raise ValueError(f"model must be LongcatFlashForCausalLM, got {type(model).__name__}")
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise ValueError(f"weights must be in memory, {missing[0]} is offloaded: export what load_model gives instead")
    layer = layer_config(next(iter(layers.values())).config)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    # The config may say tied of a head that was loaded with values of its own.
    config.tie_word_embeddings = model.lm_head.weight is model.get_input_embeddings().weight
    tensors = ((k, v) for k, v in model.state_dict().items() if k != "lm_head.weight" or not config.tie_word_embeddings)
    files = save_tensors(
        transformers_layout(tensors, layer.num_experts, layer.num_zero_experts), folder, max_shard_bytes
    )
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return files
