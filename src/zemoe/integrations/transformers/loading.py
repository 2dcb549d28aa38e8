"""Checkpoint folders to models with our layers, and back: every layout of LongCat-Flash, FP8 weights dequantized.

transformers' own way with FP8 replaces the experts by a class that doesn't know zero experts, or, dequantizing, needs
blocks that divide each weight evenly, which `kv_a_proj_with_mqa` (576 rows, blocks of 128) doesn't offer. Here each
weight is dequantized while it is read.

E FFN experts, I expert width.
"""

from __future__ import annotations

import copy
import os
import re
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LongcatFlashConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ...checkpoints.config import READ
from ...checkpoints.files import CheckpointError, load_json, save_tensors
from ...checkpoints.fp8 import QuantizedManifest, read_config, stream_dequantized, verify_any
from ...checkpoints.longcat import original_layout, transformers_layout
from .apply import applied
from .layers import layer_config, modeling
from .patch import longcat_layers, patch_
from .private import build
from .values import WRONG_VALUE


def load_config(folder: str | Path) -> transformers.LongcatFlashConfig:
    """The config of a checkpoint folder, not quantized if its weights are; CheckpointError naming config.json.

    Entries that this architecture doesn't know are left out.
    """
    config = read_config(folder)
    try:
        return transformers.LongcatFlashConfig(**{key: config[key] for key in READ if key in config})
    except WRONG_VALUE as error:
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
    except WRONG_VALUE as error:
        names = (
            ", ".join(key for key, value in entries.items() if not _makes_sense(key, value)) or "its entries together"
        )
        raise CheckpointError(f"{path}: {names} can't be used by transformers ({error})") from error


def _makes_sense(key: str, value: Any) -> bool:
    try:
        transformers.GenerationConfig.from_dict({key: value})
    except WRONG_VALUE:
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


# --- FP8 ---

_EXPERT = re.compile(r"^(?P<experts>.*\.mlp\.experts)\.(?P<id>\d+)\.(?P<which>gate|up|down)_proj\.weight$")


def place(model: nn.Module, name: str) -> torch.Tensor:
    """The part of the model that a tensor of the original layout goes to."""
    expert = _EXPERT.match(name)
    if expert is None:
        module, _, last = name.rpartition(".")
        return getattr(model.get_submodule(module), last).data
    experts, row = model.get_submodule(expert["experts"]), int(expert["id"])
    if expert["which"] == "down":
        return experts.get_parameter("down_proj").data[row]
    gate, up = experts.get_parameter("gate_up_proj").data[row].chunk(2)
    return gate if expert["which"] == "gate" else up


def make_head(model: PreTrainedModel, *, on_disk: bool) -> None:
    """Before filling a model, give it a head of its own where the checkpoint holds one, whatever the config says."""
    head: Any = model.get_output_embeddings()
    if on_disk:
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    else:
        model.tie_weights()


def tie_if_equal(model: PreTrainedModel) -> None:
    """Tie the head of a filled model if the config says so and it equals the embedding, as transformers does."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if torch.equal(head.weight, embedding.weight):
        model.tie_weights()


def load_dequantized(
    manifest: QuantizedManifest, config: LongcatFlashConfig, dtype: torch.dtype
) -> modeling.LongcatFlashForCausalLM:
    """Build the model that `config` (not quantized) says, on the CPU, and fill it. Our layers must be applied.

    Memory beside the model: one weight and all blocks' factors.
    """
    with no_init_weights():
        model = build(modeling.LongcatFlashForCausalLM, config, dtype)
    make_head(model, on_disk="lm_head.weight" in manifest.weights.tensors)
    for name, tensor in original_layout(stream_dequantized(manifest, dtype), config.n_routed_experts):
        place(model, name).copy_(tensor)
    tie_if_equal(model)
    return model.eval()
