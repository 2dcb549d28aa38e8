"""Training runs in processes of their own: killed at a moment of choice, or one of several ranks."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.judge import one_thread
from helpers.ranks import as_rank
from zemoe.cli import main
from zemoe.training import data, export, files, parallel, run, state
from zemoe.training.settings import Settings, SettingsError, read
from zemoe.training.state import StateError

SIZES = {
    "vocab_size": 280,
    "hidden_size": 32,
    "num_layers": 2,
    "ffn_hidden_size": 32,
    "expert_ffn_hidden_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 6,
    "zero_expert_num": 3,
    "moe_topk": 3,
    "routed_scaling_factor": 2.0,
}
TRAIN = {"steps": 12, "rows": 4, "warmup": 3, "learning_rate": 1e-2}
RUN = {"device": "cpu", "log_every": 1, "eval_every": 6, "save_every": 4}


def write_text(path: Path, lines: int = 300, seed: int = 0) -> Path:
    """A made-up language that is easy to learn: a subject, a verb and a place."""
    draw = random.Random(seed)
    subjects, verbs, places = ("the cat", "a sailor", "my aunt"), ("sat", "slept", "sang"), ("sea", "house", "tree")
    path.write_text(
        "\n".join(f"{draw.choice(subjects)} {draw.choice(verbs)} by the {draw.choice(places)}." for _ in range(lines))
    )
    return path


def settings_for(folder: Path, out: str, *overrides: str) -> Settings:
    """A tiny model on `folder`/text.txt."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    given = {"model": SIZES, "train": TRAIN, "run": RUN}
    plain = [f"{name}.{key}={value}" for name, table in given.items() for key, value in table.items()]
    return read(None, [*plain, f"data.paths={text}", "data.context=16", f"run.out={folder / out}", *overrides])


def records(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of these kinds, without what depends on the clock or the place."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_s", "seconds", "path", "export")
    return [{k: v for k, v in one.items() if k not in clock} for one in found if one["kind"] in kinds]


def whole_run(folder: Path, *overrides: str) -> SimpleNamespace:
    """A run from its first step to its last, never stopped; what the others are compared with."""
    settings, told = settings_for(folder, "out", "run.keep=3", *overrides), []
    with one_thread():
        end = run.train(settings, resume=False, listener=told.append)
    return SimpleNamespace(folder=folder, out=folder / "out", settings=settings, told=told, end=end)


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in records(out, "train")]


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_step(step: int, kind: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: die() if (record["kind"], record["step"]) == (kind, step) else None


def _nothing(record: dict[str, Any]) -> None:
    pass


def _half_a_file(pending: Any, path: Path) -> None:
    path.write_bytes(b"\x10" * 5000)
    die()


def _half_a_swap(new: Path, folder: Path) -> None:
    folder.rename(export._beside(folder, "old"))
    die()


# By name: what is replaced in which module, by what.
MOMENTS: dict[str, tuple[Any, str, Any]] = {
    "half a state": (state, "save_file", _half_a_file),
    "a state without its description": (state, "write_json", die),
    "a state that replaces the older one": (state, "remove", die),
    "half an export": (export, "save_tensors", die),
    "between two exports": (export, "_swap", _half_a_swap),
    "in a step": (run.Optimizer, "step", die),
}


def one_run(settings: Settings, resume: bool, moment: str | None, step: int) -> None:
    """Train; `moment` is a key of MOMENTS or a kind of record, and comes after `step` steps."""
    torch.set_num_threads(1)
    if moment in MOMENTS:
        owner, name, replacement = MOMENTS[moment]
        whole = getattr(owner, name)
        trainers = _trainers()

        def now_or_later(*args: Any, **kwargs: Any) -> Any:
            due = bool(trainers) and trainers[0].progress.step >= step
            return (replacement if due else whole)(*args, **kwargs)

        setattr(owner, name, now_or_later)
    listener = _nothing if moment is None or moment in MOMENTS else _at_step(step, moment)
    run.train(settings, resume=resume, listener=listener)


def train_until(settings: Settings, step: int, go: Path) -> None:
    """Train; after `step` steps wait until the file `go` is there, having made `go`.waiting, then stop."""
    torch.set_num_threads(1)

    def wait(record: dict[str, Any]) -> None:
        if (record["kind"], record["step"]) == ("train", step):
            go.with_suffix(".waiting").touch()
            while not go.exists():
                time.sleep(0.02)
            signal.raise_signal(signal.SIGTERM)

    run.train(settings, resume=False, listener=wait)


def with_small_files(arguments: list[str], most: int, stderr: Path) -> None:
    """`zemoe` on a machine where no file can be larger than `most` bytes, as on a disk that is full."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)
        sys.exit(main(arguments))


def dies_in(settings: Settings, module: str, name: str) -> None:
    """Train, and be killed where the function `name` of a module of zemoe.training is called."""
    torch.set_num_threads(1)
    setattr({"data": data, "files": files, "state": state, "run": run}[module], name, die)
    run.train(settings, resume=True, listener=_nothing)


def one_rank(rank: int, world: int, rendezvous: str, settings: Settings, resume: bool, last: int) -> None:
    """Train as one of several processes; the first is asked to stop so that step `last` is the last one."""

    def stop(record: dict[str, Any]) -> None:
        if (record["kind"], record["step"]) == ("train", last - 1):
            signal.raise_signal(signal.SIGTERM)

    def work() -> None:
        end = run.train(settings, resume=resume, listener=stop)
        assert (end["reason"], end["step"]) == ("stopped", last)

    as_rank(rank, rendezvous, work, world=world)


def _fail(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


_FULL = OSError(28, "No space left on device")
# By name: the rank on which, what is replaced in which module, by what; from step 5 on, or at once.
FAILURES: dict[str, tuple[int, Any, str, Any, bool]] = {
    "no such device": (1, parallel, "usable_devices", lambda: ["abacus"], False),
    "a text that is none": (0, data, "read_texts", _fail(SettingsError("data.paths: a poem")), False),
    "a full disk at the start": (0, files.Files, "begin", _fail(StateError("settings.json: no room")), False),
    "a damaged state": (1, state, "_digest", lambda path: "another", False),
    "a full disk, metrics": (0, files.Files, "write", _fail(StateError("metrics.jsonl: no room")), True),
    "a full disk, state": (0, state, "save_file", _fail(_FULL), True),
    "a full disk, export": (0, export, "save_tensors", _fail(_FULL), True),
    "no number": (1, run.Optimizer, "step", lambda *_: torch.tensor(math.nan), True),
    "memory": (1, run.F, "cross_entropy", _fail(MemoryError("not enough memory")), True),
    "killed": (1, run.F, "cross_entropy", die, True),
}


def failing_rank(rank: int, world: int, port: int, folder: Path, arguments: list[str], failure: str) -> None:
    """`zemoe train` as torchrun starts it, with a key of FAILURES; stderr goes to `folder`/stderr-0, -1, .."""
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in numbers.items()}, TORCHELASTIC_RUN_ID="test")
    state._PART_BYTES = 100_000  # a state in parts, so that one fails while tensors are still to come
    where, owner, name, replacement, later = FAILURES[failure]
    if where == rank:
        whole, trainers = getattr(owner, name), _trainers()

        def now_or_later(*args: Any, **kwargs: Any) -> Any:
            due = not later or (trainers and trainers[0].progress.step >= 5)
            return (replacement if due else whole)(*args, **kwargs)

        setattr(owner, name, now_or_later)
    with (folder / f"stderr-{rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
        sys.exit(main(["train", *arguments]))


def _trainers() -> list[run.Trainer]:
    """Those that this process makes from here on."""
    made: list[run.Trainer] = []
    init = run.Trainer.__init__

    def remember(self: run.Trainer, *args: Any) -> None:
        made.append(self)
        init(self, *args)

    run.Trainer.__init__ = remember
    return made


def start(target: Callable[..., None], *args: Any) -> Any:
    """A process that has imported everything, and computed nothing, when it begins."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["zemoe.training.run", "zemoe.kernels.cpu.choices"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def ended(process: Any) -> int:
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("a training run hangs")
    return process.exitcode


@pytest.fixture
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return whole_run(tmp_path_factory.mktemp("whole"))
