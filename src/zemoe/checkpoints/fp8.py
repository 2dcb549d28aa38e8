"""LongCat-Flash checkpoints with FP8 weights, as published: checked, streamed and dequantized.

A weight `NAME` [R, C] in e4m3 comes with `NAME_scale_inv` [ceil(R / m), ceil(C / n)], the factor of each block of
[m, n] numbers; m and n are config.json's `weight_block_size`. What has no such factors is stored plainly. The format is
that of DeepSeek-V3; activations are quantized when a model runs, so nothing of theirs is on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import longcat
from .config import check_config
from .files import WEIGHT_DTYPES, CheckpointError, TensorInfo, load_json, open_tensors, read_tensors
from .longcat import Manifest, save_original_layout, stream, verify_tensors

SUFFIX = "_scale_inv"
_FP8 = "F8_E4M3"


@dataclass(frozen=True)
class QuantizedManifest:
    """A verified FP8 checkpoint.

    weights: as `zemoe.checkpoints.verify` finds them, with a config that is not quantized. scales: where the factors
    are, by weight. block: (m, n).
    """

    weights: Manifest
    scales: Mapping[str, TensorInfo]
    block: tuple[int, int]


def read_config(folder: str | Path) -> dict[str, Any]:
    """As `zemoe.checkpoints.read_config`, also for a folder with FP8 weights, without `quantization_config`."""
    folder = Path(folder)
    if not is_quantized(folder):
        return longcat.read_config(folder)
    source = folder / "config.json"
    config = load_json(source)
    _block_of(config.pop("quantization_config"), source)
    check_config(config, str(source))
    return config


def verify_any(folder: str | Path) -> Manifest | QuantizedManifest:
    """`verify_quantized` of a folder with FP8 weights, `zemoe.checkpoints.verify` of one without. CheckpointError."""
    return verify_quantized(folder) if is_quantized(folder) else longcat.verify(folder)


def is_quantized(folder: str | Path) -> bool:
    """Whether config.json says that weights are quantized, in whatever way."""
    return longcat.open_config(folder).get("quantization_config") is not None


def _block_of(quantization: Any, source: Path) -> tuple[int, int]:
    def refuse(key: str, needs: str) -> CheckpointError:
        got = quantization.get(key) if isinstance(quantization, Mapping) else quantization
        return CheckpointError(f"{source}: quantization_config.{key} must be {needs}, got {got!r}")

    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        raise refuse("quant_method", "'fp8' (the supported quantization)")
    if quantization.get("fmt", "e4m3") != "e4m3":
        raise refuse("fmt", "'e4m3'")
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise refuse("weight_block_size", "two integers >= 1")
    return block[0], block[1]


def verify_quantized(folder: str | Path) -> QuantizedManifest:
    """As `verify`, for weights in FP8: each has its factors, of the right shape, and nothing else has.

    Raises:
        CheckpointError: naming the file and the tensor, and what was expected.
    """
    folder = Path(folder)
    source = folder / "config.json"
    config = load_json(source)
    block = _block_of(config.pop("quantization_config", None), source)
    check_config(config, str(source))
    found = read_tensors(folder)
    scales = {name.removesuffix(SUFFIX): info for name, info in found.items() if name.endswith(SUFFIX)}
    tensors = {name: info for name, info in found.items() if not name.endswith(SUFFIX)}
    weights = verify_tensors(folder, config, tensors, (*WEIGHT_DTYPES, _FP8))
    for name, info in weights.tensors.items():
        scale = scales.get(name)
        if (info.dtype == _FP8) != (scale is not None):
            what = "has no" if scale is None else f"has dtype {info.dtype}, but also a"
            raise CheckpointError(f"{folder / info.file}: tensor {name} {what} {name}{SUFFIX}")
        if scale is None:
            continue
        if len(info.shape) != 2:
            raise CheckpointError(
                f"{folder / info.file}: tensor {name} is FP8 with shape {list(info.shape)}, not [R, C]"
            )
        shape = tuple(-(-size // part) for size, part in zip(info.shape, block, strict=True))
        if scale.shape != shape or scale.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{folder / scale.file}: tensor {name}{SUFFIX} must be float with shape {list(shape)}, got "
                f"{scale.dtype} {list(scale.shape)}"
            )
    return QuantizedManifest(weights, {name: scales[name] for name in scales if name in weights.tensors}, block)


def dequantize(weight_RC: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """weight [R, C] in FP8 times its blocks' factors [ceil(R / m), ceil(C / n)], computed in float32."""
    rows, columns = weight_RC.shape
    factors_RC = scale_inv.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (weight_RC.float() * factors_RC).to(dtype)


def stream_dequantized(
    manifest: QuantizedManifest, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for the whole checkpoint, FP8 weights as `dtype`, others as they are on disk.

    In memory are one weight and all factors, which are 1 / (m n) of the weights' number.
    """
    files: dict[str, list[str]] = {}
    for name, info in manifest.scales.items():
        files.setdefault(info.file, []).append(name)
    factors = {}
    for file, names in files.items():
        with open_tensors(manifest.weights.folder / file) as tensors:
            factors |= {name: tensors.get_tensor(name + SUFFIX) for name in names}
    for name, tensor in stream(manifest.weights):
        scale = factors.get(name)
        yield name, tensor if scale is None else dequantize(tensor, scale, manifest.block, dtype)


def save_dequantized(
    folder: str | Path, target: str | Path, dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = 5 * 10**9
) -> Manifest:
    """Write a checkpoint with FP8 weights anew with weights in `dtype`, in the original layout; one shard in memory.

    Raises CheckpointError for a folder that must not be loaded, ValueError for a target that holds weights already.
    """
    manifest = verify_quantized(folder)
    config = dict(manifest.weights.config) | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    return save_original_layout(stream_dequantized(manifest, dtype), target, config, max_shard_bytes)
