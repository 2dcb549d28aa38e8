"""Compiled loops on disk: damaged, of other versions or another CPU, or without a place. Then they are compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numba")

import llvmlite
import numba
from numba.core import event

from zemoe.kernels.cpu import loop_cache
from zemoe.kernels.cpu.choices import sort_choices
from zemoe.kernels.cpu.compiled import array, compiled

SORT: Any = sort_choices
IDS = torch.tensor([2, 0, -1, 2, 1, 5])


class Count(event.Listener):
    def __init__(self) -> None:
        self.compiled = 0

    def on_start(self, event: Any) -> None:
        self.compiled += event.data["dispatcher"].py_func is SORT.py_func

    def on_end(self, event: Any) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new"))
    return tmp_path / "new"


@pytest.fixture
def count() -> Iterator[Callable[[], int]]:
    """How often numba compiles what a new process would find on disk, or not; the result has to be right."""
    listener = Count()
    event.register("numba:compile", listener)

    def run() -> int:
        before = listener.compiled
        choice, offsets = torch.zeros(6, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        loop = compiled()(SORT.py_func)
        assert loop(array(IDS), -1, array(choice), array(offsets)) == -1
        assert choice[:4].tolist() == [1, 4, 0, 3] and offsets.tolist() == [0, 1, 2, 4]
        return listener.compiled - before

    yield run
    event.unregister("numba:compile", listener)


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_found_again(folder: Path, count: Callable[[], int]):
    assert [count(), count(), count()] == [1, 0, 0]
    assert only_file(folder).name.startswith("choices.sort_choices-")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[:32],
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"\0",
        lambda content: bytes(len(content)),
        lambda content: os.urandom(len(content)),
        lambda content: flipped(content, 3),
        lambda content: flipped(content, 40),
        lambda content: flipped(content, len(content) // 2),  # in the machine code
        lambda content: flipped(content, len(content) - 1),
    ],
)
def test_damaged(damage: Callable[[bytes], bytes], folder: Path, count: Callable[[], int]):
    assert count() == 1
    file = only_file(folder)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert [count(), count()] == [1, 0]
    assert only_file(folder) == file


@pytest.mark.parametrize("package", [numba, llvmlite])
def test_of_another_version(package, folder: Path, count: Callable[[], int], monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(package, "__version__", "0.1")
        assert [count(), count()] == [1, 0]
    assert [count(), count()] == [1, 0]


def test_of_another_source(folder: Path, count: Callable[[], int], monkeypatch: pytest.MonkeyPatch):
    """As after an upgrade: only the bytes of the file differ."""
    assert count() == 1
    real = Path.read_bytes
    changed = "choices.py"
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + b"#" * (path.name == changed))
    assert [count(), count()] == [1, 0]


def test_of_another_cpu(folder: Path, count: Callable[[], int]):
    """A folder that two machines share: each finds its own."""
    assert count() == 1
    program = "import numpy as np; from zemoe.kernels.cpu.choices import sort_choices"
    program += "; ids = np.zeros(6, np.int64); sort_choices(ids, -1, ids, ids.copy())"
    other = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert not subprocess.run([sys.executable, "-c", program], env=other, check=False).returncode
    assert len(list(folder.iterdir())) == 2
    assert count() == 0


@pytest.mark.parametrize("place", ["a file", "a folder of nobody's"])
def test_no_place_to_write(place: str, tmp_path: Path, count: Callable[[], int], monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file") if place == "a file" else "/proc/zemoe")
    assert [count(), count()] == [1, 1]


def test_a_full_disk(folder: Path, count: Callable[[], int], monkeypatch: pytest.MonkeyPatch):
    real = Path.write_bytes

    def write_some(path: Path, content: bytes) -> int:
        real(path, content[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_some)
        assert [count(), count()] == [1, 1]
    assert not list(folder.iterdir())
    assert [count(), count()] == [1, 0]


def test_the_second_place(tmp_path: Path, count: Callable[[], int], monkeypatch: pytest.MonkeyPatch):
    """A package that was installed by somebody else: the user's own folder for such things."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(loop_cache, "_folders", lambda: [tmp_path / "file", tmp_path / "second"])
    assert [count(), count()] == [1, 0]


def test_the_folders(monkeypatch: pytest.MonkeyPatch):
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    beside = Path(loop_cache.__file__).parent / "__pycache__"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, and no entry for the user either
    assert loop_cache._folders() == [beside]
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert loop_cache._folders() == [beside, Path("/somewhere/zemoe")]
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/elsewhere")
    assert loop_cache._folders() == [Path("/elsewhere")]
