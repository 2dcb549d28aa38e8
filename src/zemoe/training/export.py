"""The trained model as a checkpoint folder, whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashForCausalLM

from ..checkpoints.files import save_tensors
from ..checkpoints.longcat import original_layout, transformers_layout
from .state import sync


def _is_tied(model: LongcatFlashForCausalLM) -> bool:
    """Return whether the head is the embedding; the config may say so of one that was loaded with other values."""
    return model.lm_head.weight is model.get_input_embeddings().weight


def _whole(model: LongcatFlashForCausalLM, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all that is saved, with shards put together, which takes every rank."""
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and _is_tied(model):
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name, whole if ".mlp.router." in name else whole.to(dtype)  # rounded, the router chooses otherwise


def export(
    model: LongcatFlashForCausalLM,
    folder: Path,
    files: Mapping[str, bytes],
    *,
    layout: str,
    dtype: torch.dtype,
    writes: bool,
) -> None:
    """Put a checkpoint of `model` in place of `folder`, on every rank; one process writes.

    files: {name: content} of what belongs beside weights and config. layout: "original" or "transformers".
    dtype: of all weights but the router's.
    """
    config = model.config
    E, Z = config.n_routed_experts, config.zero_expert_num or 0
    tensors = _whole(model, dtype)
    if not writes:
        for _ in tensors:
            pass
        return
    unfinished = _beside(folder, "part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        save_tensors(
            original_layout(tensors, E) if layout == "original" else transformers_layout(tensors, E, Z), unfinished
        )
        about: dict[str, Any] = json.loads(config.to_json_string())
        about |= {"architectures": [LongcatFlashForCausalLM.__name__], "dtype": str(dtype).removeprefix("torch.")}
        about["tie_word_embeddings"] = _is_tied(model)
        contents = {"config.json": (json.dumps(about, indent=2) + "\n").encode(), **files}
        for name, content in contents.items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            (unfinished / name).write_bytes(content)
        for path in unfinished.rglob("*"):
            sync(path)
    except (OSError, SafetensorError):
        shutil.rmtree(unfinished, ignore_errors=True)  # the room that it took
        for _ in tensors:  # in whose shards the other ranks wait for this one
            pass
        raise
    _swap(unfinished, folder)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _swap(new: Path, folder: Path) -> None:
    old = _beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Bring back what `export` had moved away, if the process ended before the new checkpoint was in its place."""
    if _beside(folder, "old").is_dir() and not folder.exists():
        _beside(folder, "old").rename(folder)
