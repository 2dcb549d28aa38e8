"""`zemoe train` and `zemoe report`: from what was asked for to what is shown, with one-line errors."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .._version import __version__
from ..checkpoints.files import CheckpointError
from ..generate.command import CommandError
from ..regular_files import kind_of, read_json, reason
from .report import METRICS, ReportError, check_matplotlib, draw, read_metrics
from .settings import RunSettings, Settings, SettingsError, make, read
from .state import TrainingError, unsealed
from .view import View, at_step, headline, number, open_view, training_line

# For a model that is trained already, where neither the file nor --set says anything: a smaller learning rate, fewer
# steps, and a short look at the held-out text often enough to keep the best one.
FINE_TUNE = {
    "data": {"heldout_tokens": 20_000},
    "train": {"learning_rate": 3e-4, "steps": 200, "rows": 8, "warmup": 20},
    "run": {"eval_every": 20, "save_every": 50},
}


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What was asked for. None and (): the file, or the defaults. overrides: "section.key=value"."""

    config: Path | None = None
    start: str | None = None
    data: tuple[str, ...] = ()
    out: str | None = None
    overrides: tuple[str, ...] = ()
    resume: bool = False


@contextmanager
def _one_line_errors() -> Iterator[None]:
    import torch

    try:
        yield
    except SettingsError as error:
        raise CommandError(str(error)) from error
    except (TrainingError, ReportError, CheckpointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise CommandError(str(error) or type(error).__name__, 1) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch's CPU allocator has no exception of its own
            raise
        raise CommandError(str(error), 1) from error


def settings_of(request: TrainRequest) -> Settings:
    """Read the file, then --set, then the options that have a name of their own. Raises SettingsError.

    --resume with no more than --out takes the settings that the run in that folder has.
    """
    given: dict[str, dict[str, Any]] = {}
    for section, key, value in (
        ("model", "start", request.start),
        ("data", "paths", list(request.data) or None),
        ("run", "out", request.out),
    ):
        if value is not None:
            given.setdefault(section, {})[key] = value
    if request.resume and request.config is None and given.keys() <= {"run"}:
        stored = _stored(Path(request.out or RunSettings().out))
        return read(None, (*_overrides(stored), *request.overrides), given)
    settings = read(request.config, request.overrides, given)
    if not settings.model.start:
        return settings
    said = {} if request.config is None else tomllib.loads(request.config.read_text(encoding="utf-8"))
    unsaid = {
        section: {key: value for key, value in table.items() if key not in said.get(section, {})}
        for section, table in FINE_TUNE.items()
    }
    return read(request.config, (*_overrides(unsaid), *request.overrides), given)


def _overrides(tables: dict[str, dict[str, Any]]) -> Iterator[str]:
    for section, table in tables.items():
        for key, value in table.items():
            yield f"{section}.{key}={json.dumps(value, ensure_ascii=False)}"  # which TOML reads as well


def _stored(out: Path) -> dict[str, dict[str, Any]]:
    path = out / "settings.json"
    try:
        stored = unsealed(read_json(path))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path}: not readable ({reason(error)}); --resume needs --config, or --from and --data, where there is no "
            "run yet"
        ) from None
    return make(stored, str(path)).as_dict()


def run(request: TrainRequest, out: Console, as_json: bool) -> int:
    """Train, showing it on `out`; return the exit code: 0, or 130 or 143 if Ctrl-C or SIGTERM stopped the run.

    Raises CommandError.

    Of the processes that torchrun starts, the first alone shows the run. An error is told by each: the first one to
    end has torchrun end the others, perhaps before they could say anything.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        with _one_line_errors():
            return _run(request, open_view(out, as_json) if rank == 0 else View(), rank == 0)
    except CommandError as error:
        if rank == 0:
            raise
        raise CommandError(f"process {rank}: {error}", error.code) from error


def _run(request: TrainRequest, view: View, first: bool) -> int:
    from .run import train

    settings = settings_of(request)
    if settings.report.plots:
        check_matplotlib()
    if request.resume:
        with suppress(ReportError):  # there is nothing yet
            before = read_metrics(Path(settings.run.out))
            view.remember(before.train, before.evals)
    with view:
        end = train(settings, resume=request.resume, listener=view)
    if settings.report.plots and first:
        draw(Path(settings.run.out))
    if end["reason"] != "stopped":
        return 0
    return 128 + (signal.SIGTERM if end["signal"] == "SIGTERM" else signal.SIGINT)


def dry_run(request: TrainRequest, out: Console) -> dict[str, Any]:
    """Show what would be trained; return the result for programs. Raises CommandError."""
    from .dry_run import plan, show

    with _one_line_errors():
        planned = plan(settings_of(request))
    show(planned, out)
    return planned


def report(folder: Path, out: Console) -> dict[str, Any]:
    """Draw the run in `folder` and say how it went; return the result for programs. Raises CommandError."""
    if (found := kind_of(folder)) != "a folder":
        raise CommandError(f"RUN must be a folder that zemoe train wrote, found {found} at {folder}")
    with _one_line_errors():
        plots, metrics = draw(folder)
    last, best = metrics.train[-1], next((record for record in reversed(metrics.evals) if record["best"]), None)
    lines = [headline(metrics.run), training_line(last, metrics.run)]
    if best is not None:
        lines.append(f"best held-out {number(best['heldout_bits_per_byte'])} bits/byte {at_step(best['step'])}")
    if metrics.unreadable:
        lines.append(f"lines of {METRICS} that are unreadable and left out: {metrics.unreadable}")
    for line in (*lines, *map(str, plots)):
        out.print(line, markup=False)
    return {
        "zemoe": __version__,
        "run": metrics.run,
        "last": last,
        "best": best,
        "unreadable_lines": metrics.unreadable,
        "plots": [str(path) for path in plots],
    }
