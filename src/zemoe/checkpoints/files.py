"""Folders of safetensors files: their headers, checked before a tensor is read, and how a folder is written.

Needs torch and safetensors only; pickled weights are never opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..messages import one_line
from ..regular_files import MOST_JSON_BYTES, check_regular, parse_json, read_json, reason

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHT_DTYPES = ("F32", "BF16", "F16")

_DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_DTYPE_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


class CheckpointError(ValueError):
    """A checkpoint folder that must not be loaded; the message names the file and, where there is one, the tensor.

    It is one line, however long or odd the names in the files are.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class TensorInfo(NamedTuple):
    """Where a tensor is: file name, dtype as safetensors spells it, shape, size in bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or CheckpointError."""
    try:
        loaded = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint folder holds {path.name}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({reason(error)})") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(loaded).__name__}")
    return loaded


def _tensor_info(file: str, entry: object, data_bytes: int) -> TensorInfo | str:
    """The checked header entry of one tensor, or what is wrong with it."""
    if not isinstance(entry, dict):
        return f"is described by {type(entry).__name__}, not by an object"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        return f"has unknown dtype {dtype!r}"
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        return f"has shape {shape!r}"
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        return f"has data_offsets {offsets!r}"
    begin, end = offsets
    size = math.prod(shape) * _DTYPE_BYTES[dtype]
    if begin < 0 or end - begin != size:
        return f"of shape {shape} and dtype {dtype} takes {size} bytes, its data_offsets are {offsets}"
    if end > data_bytes:
        return f"ends at byte {end} of the data, but the file is truncated: only {data_bytes} bytes of data are there"
    return TensorInfo(file, dtype, tuple(shape), size)


def _read_start(path: Path) -> tuple[int, bytes, int, bytes]:
    """Size of a file, its first 8 bytes, the header length they give, and the header (empty where none can be)."""
    try:
        check_regular(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            fits = len(start) == 8 and 2 <= length <= min(size - 8, MOST_JSON_BYTES)
            return size, start, length, file.read(length) if fits else b""
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and how many bytes of data follow it."""
    size, start, length, raw = _read_start(path)
    why = f"{size} bytes, header length {length}"
    try:
        header = parse_json(raw) if raw.startswith(b"{") else None
    except ValueError as error:
        header, why = None, f"the header: {error}"
    if isinstance(header, dict):
        return header, size - 8 - length
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):  # zip, pickle protocol
        raise CheckpointError(f"{path}: holds pickled weights under another name; refused, nothing was loaded")
    raise CheckpointError(f"{path}: truncated, or not a safetensors file ({why})")


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, from its header alone; no tensor data is read.

    Raises CheckpointError for a file that is missing, truncated or of another format (a pickle is named, never loaded).
    """
    path = Path(path)
    header, data_bytes = _parse_header(path)
    metadata = header.pop("__metadata__", None)
    texts = metadata.values() if isinstance(metadata, dict) else [metadata]
    if metadata is not None and not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{path}: __metadata__ must be an object of strings, got {metadata!r}")
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        info = _tensor_info(path.name, entry, data_bytes)
        if isinstance(info, str):
            raise CheckpointError(f"{path}: tensor {name} {info}")
        tensors[name] = info
    described = sum(info.num_bytes for info in tensors.values())
    if described != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes} bytes of data, but its tensors make {described}")
    with open_tensors(path):  # safetensors finds what else is wrong, such as two tensors that share bytes
        return tensors


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """`safetensors.safe_open` of a file, for torch; CheckpointError for what it can't read."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The names of the weight files, and the index {tensor: file} where there is one."""
    if (folder / INDEX_NAME).exists():
        content = load_json(folder / INDEX_NAME)
        index = content.get("weight_map")
        if not isinstance(content.get("metadata"), dict):
            raise CheckpointError(f"{folder / INDEX_NAME}: metadata must be an object, got {content.get('metadata')!r}")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{folder / INDEX_NAME}: weight_map must be an object that names each tensor's file")
        for tensor, file in index.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder / INDEX_NAME}: tensor {tensor} is in {file!r}; only *.safetensors of this folder are read"
                )
        if (folder / SINGLE_NAME).exists() and SINGLE_NAME not in index.values():
            raise CheckpointError(f"{folder / SINGLE_NAME}: is there beside {INDEX_NAME}, which names other files")
        return sorted(set(index.values())), index
    if (folder / SINGLE_NAME).exists():
        return [SINGLE_NAME], None
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{folder / pickled[0]}: pickled weights can run code and are never loaded; convert them to safetensors"
        )
    raise CheckpointError(f"{folder / SINGLE_NAME}: no such file, and no {INDEX_NAME} either")


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder, from its index and its files' headers; CheckpointError where they disagree."""
    files, index = _weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{folder / file}: tensor {name} is also in {tensors[name].file}")
            if index is not None and index.get(name) != file:
                raise CheckpointError(f"{folder / file}: tensor {name} is here, {INDEX_NAME} says {index.get(name)!r}")
            tensors[name] = info
    for name, file in (index or {}).items():
        if name not in tensors:
            raise CheckpointError(f"{folder / file}: tensor {name} is missing, though {INDEX_NAME} lists it")
    return tensors


def check_counts(source: Path, counts: Mapping[str, object], found: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError for a count of layers or experts, each of which has tensors, above the number of tensors.

    This is checked before a model is built, which would take all the time and memory that a wrong count asks for.

    Args:
        source: the config's file. counts: by the names that it calls them.
    """
    for key, count in counts.items():
        if type(count) is not int:
            raise CheckpointError(f"{source}: {key} must be a whole number, got {count!r}")
        if count > len(found):
            raise CheckpointError(f"{source}: {key} of {count} is more than there are tensors")


def check_tensors(
    folder: Path,
    found: Mapping[str, TensorInfo],
    expected: Iterable[tuple[str, tuple[int, ...]]],
    dtypes: tuple[str, ...] = WEIGHT_DTYPES,
) -> None:
    """Raise CheckpointError unless each expected tensor was found, in one of `dtypes`, and no other.

    Args:
        folder: with config.json, for the messages.
        found: what `read_tensors` returns, without what may be there or not.
        expected: name and shape, one by one: at the first name that was not found nothing more is asked for.
    """
    names = set()
    for name, shape in expected:
        names.add(name)
        info = found.get(name)
        if info is None:
            source = folder / INDEX_NAME if (folder / INDEX_NAME).exists() else folder / SINGLE_NAME
            raise CheckpointError(f"{source}: tensor {name} {list(shape)} is missing")
        if info.shape != shape:
            raise CheckpointError(
                f"{folder / info.file}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
            )
        if info.dtype not in dtypes:
            raise CheckpointError(
                f"{folder / info.file}: tensor {name} has dtype {info.dtype}, supported are {', '.join(dtypes)}"
            )
    for name, info in found.items():
        if name not in names:
            got = f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(f"{folder / info.file}: tensor {name} {got} is not part of this config.json")


def stream_tensors(folder: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of each of `tensors`, file by file, one tensor in memory at a time."""
    for file in sorted({info.file for info in tensors.values()}):
        with open_tensors(folder / file) as opened:
            for name, info in tensors.items():
                if info.file == file:
                    yield name, opened.get_tensor(name)


def save_tensors(
    tensors: Iterable[tuple[str, Tensor]], folder: str | Path, max_shard_bytes: int = 5 * 10**9
) -> list[str]:
    """Write (name, tensor) pairs as safetensors, with an index where there is more than one file.

    At most one shard is held in memory. The index, or the final name of a single file, is written last, so an
    interrupted run leaves nothing that loads. Returns the file names; ValueError if the folder already holds weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(path.name for path in folder.glob("model*.safetensors*"))
    if present:
        raise ValueError(f"folder must not hold weights yet, got {folder} with {present[0]}")
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        save_file(pending, folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_shard_bytes:
            flush()
            pending_bytes = 0
        # A copy: views of one storage (a packed parameter's rows) can't be told apart by safetensors.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += size
        total_bytes += size
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE_NAME]
    for i, name in enumerate(names):
        (folder / f"part-{i}.safetensors").rename(folder / name)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return names
