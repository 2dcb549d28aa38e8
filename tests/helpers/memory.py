"""The same values elsewhere in memory, and tile sizes of a GPU that is not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor


def poisoned(like: Tensor, *shape: int) -> Tensor:
    """Values that show where somebody reads them: NaN, or an expert that is there."""
    value = float("nan") if like.is_floating_point() else 1
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def moved(tensor: Tensor) -> Tensor:
    """The same values one element off any alignment."""
    memory = poisoned(tensor, tensor.numel() + 1)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


def strided(tensor: Tensor) -> Tensor:
    """The same values, every other element of a larger tensor."""
    memory = poisoned(tensor, *tensor.shape[:-1], 2 * tensor.shape[-1])
    memory[..., ::2] = tensor
    return memory[..., ::2]


def pretend_hopper(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, `schedule` is told of an H100 with few processors."""
    if device == "cpu":
        hopper = SimpleNamespace(major=9, shared_memory_per_block_optin=232448, multi_processor_count=3)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: hopper)
