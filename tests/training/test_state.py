"""States on disk: whole or not there, checked to the last byte, and clear words where the disk is full."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zemoe.training import state
from zemoe.training.state import Reader, StateError, Writer, copy_into, remove, steps, write_json


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {f"weight/{i}": torch.randn(5, 7, generator=generator) for i in range(4)}
    return made | {"bias": torch.randn(3, generator=generator).bfloat16(), "step": torch.tensor(3.0)}


def write(folder: Path, step: int, keep: int = 2, seed: int = 0) -> Path:
    writer = Writer(folder, step, writes=True)
    writer.add(tensors(seed).items())
    return writer.finish({"best": 1.25}, keep)


def test_there_and_back(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_PART_BYTES", 300)  # two tensors of 140 bytes a file
    path = write(tmp_path / "states", 100)
    assert path == tmp_path / "states" / "step-00000100"
    assert sorted(file.name for file in path.iterdir()) == [
        "state.json", "tensors-00001.safetensors", "tensors-00002.safetensors"
    ]  # fmt: skip
    reader = Reader(tmp_path / "states")
    assert reader.step == reader.about["step"] == 100 and reader.about["best"] == 1.25
    own = {name: torch.full_like(tensor, 9) for name, tensor in tensors().items()}
    copy_into(own, reader)
    for name, tensor in tensors().items():
        assert torch.equal(own[name], tensor), name


def test_the_last_ones_are_kept(tmp_path):
    for step in (1, 2, 30, 4):  # 4: a run that went on from 2, after someone removed 30
        if step == 4:
            shutil.rmtree(tmp_path / "step-00000030")
        write(tmp_path, step, seed=step)
    assert steps(tmp_path) == [2, 4] and Reader(tmp_path).step == 4
    write(tmp_path, 4, keep=1, seed=7)
    assert steps(tmp_path) == [4] and sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004"]
    assert torch.equal(dict(Reader(tmp_path).tensors())["bias"], tensors(7)["bias"])


def test_ranks_that_do_not_write(tmp_path):
    writer = Writer(tmp_path / "states", 1, writes=False)
    writer.add(tensors().items())
    writer.finish({}, 2)
    assert not (tmp_path / "states").exists()


def dies(*_, **__):
    raise KeyboardInterrupt  # as sudden as SIGKILL: nothing of ours handles it


@pytest.mark.parametrize("where", ["save_file", "write_json", "remove", "_digest"])
def test_killed_while_writing(tmp_path, monkeypatch, where):
    """Whatever is there afterwards is whole: the new state or the one before; the next one clears what is left."""
    write(tmp_path, 1, seed=1)
    write(tmp_path, 2, seed=2)
    monkeypatch.setattr(state, where, dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 3, seed=3)
    monkeypatch.undo()
    found = Reader(tmp_path)
    assert found.step == (3 if where == "remove" else 2)
    assert torch.equal(dict(found.tensors())["bias"], tensors(found.step)["bias"])
    write(tmp_path, 4)
    assert steps(tmp_path)[-1] == 4 and not list(tmp_path.glob(".*"))


def test_killed_while_deleting(tmp_path, monkeypatch):
    """A folder is never there in part under its own name."""
    write(tmp_path, 1)
    monkeypatch.setattr(state.shutil, "rmtree", lambda path, **_: path.exists() and dies())
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "step-00000001")
    assert steps(tmp_path) == []


@pytest.mark.parametrize("at", [1, 2])
def test_disk_full(tmp_path, monkeypatch, at):
    write(tmp_path, 1)
    monkeypatch.setattr(state, "_PART_BYTES", 300)
    save, calls = state.save_file, []

    def full(pending, path):
        calls.append(path)
        if len(calls) < at:
            return save(pending, path)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(StateError) as caught:
        write(tmp_path, 2)
    assert "the state of step 2 could not be written ([Errno 28] No space left on device)" in str(caught.value)
    assert "the state of step 1 is whole, go on with --resume when there is room" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and Reader(tmp_path).step == 1


def test_disk_full_at_the_first(tmp_path):
    with (
        pytest.raises(StateError, match="there is no state yet"),
        state.writing("x", tmp_path),
    ):
        raise OSError("No space left on device")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"it has \d+ bytes, not \d+"),
    "gone": (Path.unlink, "it is missing"),
    "flipped": (flip, "its bytes are not those that were written"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged(tmp_path, damage):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    change, why = DAMAGE[damage]
    change(path / "tensors-00001.safetensors")
    with pytest.raises(StateError, match=why) as caught:
        Reader(tmp_path)
    assert str(caught.value).endswith(f"remove the folder {path} to go on from step 1")
    assert "tensors-00001.safetensors: damaged" in str(caught.value)
    shutil.rmtree(path)
    assert Reader(tmp_path).step == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": []}', '{"files": {"a": {"bytes": 1}}}'])
def test_damaged_json(tmp_path, content):
    path = write(tmp_path, 2)
    (path / "state.json").write_text(content)
    with pytest.raises(StateError, match=r"state\.json: damaged .* to start again"):
        Reader(tmp_path)


def test_another_model(tmp_path):
    write(tmp_path, 1)
    own = tensors()
    del own["bias"]
    with pytest.raises(StateError, match=r"another model or optimizer \(differs in bias\)"):
        copy_into(own, Reader(tmp_path))
    with pytest.raises(StateError, match=r"bias must be \(3,\) torch.float32, got \(3,\) torch.bfloat16"):
        copy_into(tensors() | {"bias": torch.zeros(3)}, Reader(tmp_path))


def test_write_json_replaces_whole_files(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})
    monkeypatch.setattr(state, "sync", dies)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"x": 2})
    assert (tmp_path / "a.json").read_text() == '{\n "x": 1\n}\n'
