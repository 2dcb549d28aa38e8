"""The states of a run on disk: each whole or not there, whatever ends the process while it is written.

A state is a folder `step-00000100` of safetensors files and, written last, `state.json` with what they must be. It is
made under another name and renamed, and renamed before it is deleted. `state.json` has a digest of itself too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..regular_files import read_json

_PART_BYTES = 2 * 10**9
_ABOUT = "state.json"
_HIDDEN = ".unfinished-"


class TrainingError(Exception):
    """The error that ends a run before its last step; the message says what to do."""


class StateError(TrainingError):
    """A file can't be written, or a state can't be read."""


def sync(path: Path) -> None:
    """Return when the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write all of it or nothing, and return when it is on the disk."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_bytes(content)
        sync(unfinished)
    except OSError:
        unfinished.unlink(missing_ok=True)  # the room that it took
        raise
    unfinished.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `write_bytes` does."""
    write_bytes(path, json.dumps(value, indent=1).encode() + b"\n")


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the digest of all else in it, which `unsealed` checks."""
    plain = json.loads(json.dumps(value))
    return {**plain, "sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def unsealed(value: Any) -> dict[str, Any]:
    """Return what `sealed` was given. Raises ValueError if it is not that any more."""
    if not isinstance(value, dict) or "sha256" not in value:
        raise ValueError("it has no digest; this version of zemoe train did not write it")
    plain = {key: part for key, part in value.items() if key != "sha256"}
    if sealed(plain) != value:
        raise ValueError("its content is not what was written")
    return plain


def remove(path: Path) -> None:
    """Delete a folder so that it is never there in part under its own name."""
    hidden = path.with_name(f"{_HIDDEN}{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def steps(folder: Path) -> list[int]:
    """Return the steps of which there is a state, in order."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def last_state(folder: Path) -> str:
    """Return the last state, in words for people."""
    kept = steps(folder)
    return f"the state of step {kept[-1]} is kept" if kept else "there is no state yet"


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


@contextmanager
def writing(what: str, states: Path) -> Iterator[None]:
    """Turn what goes wrong while files are written into a StateError that says which state is there to go on from."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept = steps(states)
        last = f"the state of step {kept[-1]} is whole, go on" if kept else "there is no state yet, begin anew"
        raise StateError(f"{what} could not be written ({error}); {last} with --resume when there is room") from None


class Writer:
    """Writes one state: `add` tensors, then `finish`. On ranks that do not write, nothing happens."""

    def __init__(self, folder: Path, step: int, *, writes: bool) -> None:
        self.folder, self.step, self.writes = folder, step, writes
        self.unfinished = folder / f"{_HIDDEN}{step:08d}"
        self.pending: dict[str, Tensor] = {}
        self.size = 0
        self.files: dict[str, dict[str, Any]] = {}
        self.failed: StateError | None = None
        if writes:
            with self._writing():
                folder.mkdir(parents=True, exist_ok=True)
                for left in folder.glob(f"{_HIDDEN}*"):  # by a process that was killed
                    shutil.rmtree(left)
                self.unfinished.mkdir()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with writing(f"{self.folder}: the state of step {self.step}", self.folder):
            try:
                yield
            except (OSError, SafetensorError):
                shutil.rmtree(self.unfinished, ignore_errors=True)  # the room that it took
                raise

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take (name, tensor) pairs, on every rank: sharded ones are put together.

        What can't be written is told by `finish`: the other ranks wait for this one's part of the tensors to come.
        """
        for name, tensor in tensors:
            whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
            if not self.writes or self.failed is not None:
                continue
            if self.pending and self.size + whole.nbytes > _PART_BYTES:
                try:
                    self._flush()
                except StateError as error:
                    self.failed = error
                    continue
            self.pending[name] = whole.to("cpu", copy=True).contiguous()
            self.size += whole.nbytes

    def _flush(self) -> None:
        path = self.unfinished / f"tensors-{len(self.files) + 1:05d}.safetensors"
        with self._writing():
            save_file(self.pending, path)
            sync(path)
            self.files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        self.pending, self.size = {}, 0

    def finish(self, about: Mapping[str, Any], keep: int) -> Path:
        """Make the state exist; of older ones the last `keep` - 1 stay. Returns its folder.

        Raises:
            StateError: if it could not be written, now or before.
        """
        if self.failed is not None:
            raise self.failed
        final = _path(self.folder, self.step)
        if self.writes:
            self._flush()
            with self._writing():
                write_json(self.unfinished / _ABOUT, sealed({**about, "step": self.step, "files": self.files}))
                sync(self.unfinished)
                if final.exists():  # of a run that went the same way before
                    remove(final)
                self.unfinished.rename(final)
                sync(self.folder)
                for step in steps(self.folder)[:-keep]:
                    remove(_path(self.folder, step))
        return final


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Reader:
    """Reads the latest state under `folder`, checked to the last byte: `step`, `about`, and its tensors.

    Raises:
        StateError: naming the file that is damaged and the folder to remove. There must be a state (`steps`).
    """

    def __init__(self, folder: Path) -> None:
        self.step = steps(folder)[-1]
        self.path = _path(folder, self.step)
        try:
            self.about = unsealed(read_json(self.path / _ABOUT))
            expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in self.about["files"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._damaged(_ABOUT, str(error)) from None
        self.where: dict[str, str] = {}
        for name, (size, digest) in expected.items():
            file = self.path / name
            if not file.is_file():
                raise self._damaged(name, "it is missing")
            if (found := file.stat().st_size) != size:
                raise self._damaged(name, f"it has {found} bytes, not {size}")
            try:
                if _digest(file) != digest:
                    raise self._damaged(name, "its bytes are not those that were written")
                with safe_open(file, framework="pt") as opened:
                    self.where |= dict.fromkeys(opened.keys(), name)
            except (OSError, SafetensorError) as error:
                raise self._damaged(name, str(error)) from None

    def _damaged(self, name: str, why: str) -> StateError:
        earlier = [step for step in steps(self.path.parent) if step < self.step]
        then = f"go on from step {earlier[-1]}" if earlier else "start again"
        return StateError(f"{self.path / name}: damaged ({why}); remove the folder {self.path} to {then}")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all of them with their names, one file after the other."""
        for name in dict.fromkeys(self.where.values()):
            with safe_open(self.path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    yield key, file.get_tensor(key)


@torch.no_grad()
def copy_into(own: Mapping[str, Tensor], reader: Reader) -> None:
    """Overwrite `own` tensors, sharded ones too, with those of the state.

    Raises:
        StateError: unless they are the same ones, of the same shapes and dtypes.
    """
    if differs := sorted(own.keys() ^ reader.where.keys()):
        raise StateError(f"{reader.path}: belongs to another model or optimizer (differs in {differs[0]})")
    for name, tensor in reader.tensors():
        mine = own[name]
        if (mine.shape, mine.dtype) != (tensor.shape, tensor.dtype):
            wanted, got = (f"{tuple(one.shape)} {one.dtype}" for one in (mine, tensor))
            raise StateError(f"{reader.path}: {name} must be {wanted}, got {got}")
        if isinstance(mine, DTensor):  # every rank has read the whole tensor, nothing has to be sent
            tensor = distribute_tensor(tensor.to(mine.device), mine.device_mesh, mine.placements, src_data_rank=None)
        mine.copy_(tensor)
