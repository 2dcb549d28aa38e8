"""What fails on one of two processes ends both, with one line each and the last state whole."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import training_worker
from helpers.training_worker import failing_rank, settings_for, start
from zemoe.checkpoints.longcat import verify
from zemoe.training.state import Reader

whole = training_worker.whole
_SECONDS = 60  # both are gone long before, unless one waits for the other


def end(whole: SimpleNamespace, folder: Path, failure: str, *sets: str, resume: bool) -> list[tuple[int, str]]:
    """Exit code and stderr of both; `resume`: from step 4 of the whole run, else from the start."""
    shutil.copy(whole.folder / "text.txt", folder)
    if resume:
        shutil.copytree(whole.out / "states" / "step-00000004", folder / "out" / "states" / "step-00000004")
        shutil.copytree(whole.out / "export", folder / "out" / "export")
        for name in ("metrics.jsonl", "tokenizer.json"):
            shutil.copy(whole.out / name, folder / "out")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    tables = settings_for(folder, "out", *sets).as_dict()
    settings = [f"{name}.{key}={json.dumps(value)}" for name, table in tables.items() for key, value in table.items()]
    arguments = ["--data", str(folder / "text.txt"), *(part for setting in settings for part in ("--set", setting))]
    arguments += ["--resume"] * resume
    processes = [start(failing_rank, rank, 2, port, folder, arguments, failure) for rank in range(2)]
    for process in processes:
        process.join(_SECONDS)
    hang = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in hang:
        processes[rank].kill()
    assert not hang, f"of {failure}"
    return [(process.exitcode, (folder / f"stderr-{rank}").read_text()) for rank, process in enumerate(processes)]


BEGIN = "zemoe: error: "
GONE = "another process of the run has failed or was killed; the state of step 4 is kept"
FULL = "could not be written ([Errno 28] No space left on device); the state of step 4 is whole, go on with --resume"


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        ("no such device", 2, ("process 1 failed: run.device must be", "process 1: run.device must be")),
        ("a text that is none", 2, ("data.paths: a poem", "process 1: process 0 failed: data.paths: a poem")),
        ("a full disk at the start", 1, ("settings.json: no room", "process 1: process 0 failed: settings.json: no")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_before_the_first_step(whole, tmp_path, failure, code, said):
    for (got, err), part in zip(end(whole, tmp_path, failure, resume=False), said, strict=True):
        assert got == code and err.startswith(BEGIN + part) and err.count("\n") == 1, err
    assert not any((tmp_path / "out" / name).exists() for name in ("metrics.jsonl", "states", "export"))


@pytest.mark.parametrize(
    ("failure", "parallel", "said"),
    [
        ("a damaged state", "ddp", ("process 1 failed: ", "process 1: ")),
        ("a full disk, metrics", "ddp", ("metrics.jsonl: no room", "process 1: process 0 failed: metrics.jsonl: no")),
        ("a full disk, state", "fsdp", (FULL, FULL)),
        ("a full disk, export", "fsdp", (FULL, FULL)),
        ("no number", "ddp", ("the gradient's norm is nan at step 6; the", "process 1: the gradient's norm is nan at")),
        ("memory", "ddp", (GONE, "process 1: not enough memory")),
        ("killed", "ddp", (GONE, None)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_on_the_way(whole, tmp_path, failure, parallel, said):
    sets = (f"run.parallel={parallel}", "run.eval_every=6", "run.save_every=6")
    ends = end(whole, tmp_path, failure, *sets, resume=True)
    for (code, err), part in zip(ends, said, strict=True):
        if part is None:
            assert (code, err) == (-signal.SIGKILL, "")
        else:
            assert code == 1 and err.startswith(BEGIN) and part in err and err.count("\n") == 1, err
    assert Reader(tmp_path / "out" / "states").step == 4
    verify(tmp_path / "out" / "export")
    assert not list(tmp_path.glob("out/**/.*"))
