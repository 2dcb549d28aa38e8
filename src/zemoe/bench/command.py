"""`zemoe bench`: times the layer beside baselines and beside the floor of the machine, and checks it before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from .._version import __version__
from ..compile_loops import compile_loops
from ..machine import commit, device_name, processor_model, versions
from ..terminal import CommandError
from . import cases, table, timing
from .baselines import BASELINES
from .cases import Case
from .csv_files import write_csv
from .request import BenchRequest, BenchSettings, settings_of
from .row import WRONG, Row


def _about(settings: BenchSettings, ceilings: timing.Ceilings) -> dict[str, Any]:
    installed, name = versions(), device_name(str(settings.device))
    if settings.device.type == "cpu" and (model := processor_model()):
        name = f"{model}, {name}"
    return {
        "repeats": settings.repeats,
        "seed": settings.request.seed,
        "commit": settings.request.commit or commit(),
        "device": name,
        "read_gb_s": ceilings.bytes_per_second / 1e9,
        "product_tflop_s": ceilings.flops_per_second / 1e12,
        "zemoe": __version__,
        **{package: installed[package] for package in ("torch", "triton", "transformers")},
    }


@contextmanager
def _torch_state(settings: BenchSettings) -> Iterator[None]:
    """Use our seed and device inside, and restore the caller's random numbers afterwards; nothing keeps a graph."""
    devices = [settings.device] if settings.device.type == "cuda" else []
    current = torch.cuda.device(settings.device) if devices else nullcontext()
    with torch.random.fork_rng(devices), current, torch.inference_mode():
        torch.manual_seed(settings.request.seed)
        yield


def _measure_case(
    settings: BenchSettings, case: Case, ceilings: timing.Ceilings, progress: table.Progress, rows: list[dict[str, Any]]
) -> None:
    """Append the rows of a case to `rows` as they come."""
    before = len(rows)
    progress.say(f"{case.name}: making the weights")
    layer = cases.build(case, settings.dtype, settings.device)
    built = {"zemoe": layer, **{name: BASELINES[name].build(layer) for name in settings.baselines}}
    for zero_share in settings.zero_shares:
        if zero_share is not None or settings.request.skew is not None:
            try:
                cases.steer(layer, zero_share, settings.request.skew)
            except ValueError as error:
                raise CommandError(f"{case.name}: --{error}") from None
        for tokens in settings.tokens(case):
            share = "" if zero_share is None else f", zero share {zero_share:g}"
            progress.say(f"{case.name}, T = {tokens}{share}")
            row = Row(settings, case, layer, dict(built), tokens)
            done = len(rows) - before
            seconds = row.seconds(lambda part, done=done: progress.reached(done + part))
            rows.append(row.result(seconds, ceilings, zero_share))
            progress.reached(done + 1)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its numbers as text of six significant digits, as the CSV has them."""
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}


def _measure_cases(
    settings: BenchSettings, ceilings: timing.Ceilings, out: Console, status: Console, rows: list[dict[str, Any]]
) -> str:
    """Measure all cases and print a table of each; return "done", or "interrupted" after Ctrl-C."""
    for case in settings.cases:
        done = len(rows)
        units = len(settings.tokens(case)) * len(settings.zero_shares)
        finish = "done"
        try:
            with table.Progress(status, units) as progress:
                _measure_case(settings, case, ceilings, progress, rows)
        except KeyboardInterrupt:
            finish = "interrupted"
        if rows[done:]:
            out.print()
            out.print(table.title(case, rows[done:]), style="bold", markup=False)
            out.print(table.table(rows[done:], settings.baselines))
        if finish == "interrupted":
            units = sum(len(settings.tokens(each)) * len(settings.zero_shares) for each in settings.cases)
            out.print(f"interrupted: {len(rows)} of {units} rows were measured", style="bold", markup=False)
            return finish
    return "done"


def _notes(settings: BenchSettings, rows: list[dict[str, Any]]) -> list[str]:
    """Return what has to be known to read the tables."""
    cuda = settings.device.type == "cuda"
    cache = torch.cuda.get_device_properties(settings.device).L2_cache_size if cuda else 0
    return [
        *table.notes(settings.absent, rows, settings.baselines),
        *(
            f"{case.name}: its weights are no larger than the cache of {cache / 1e6:.0f} MB, which may have held them"
            for case in settings.cases
            if case.weight_bytes(settings.dtype.itemsize) <= cache
        ),
    ]


def _write(settings: BenchSettings, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the files that were asked for. Raises CommandError where that fails."""
    request = settings.request
    try:
        if rows and request.csv is not None:
            write_csv(request.csv, [_rounded(row | about) for row in rows])
        if rows and request.plot is not None:
            from .plot import plot

            plot(rows, settings.baselines, table.headline(about, rows[0]["dtype"]), request.plot)
    except OSError as error:
        raise CommandError(f"{error.filename or request.csv}: could not be written ({error.strerror})", 1) from None


def run(request: BenchRequest, out: Console, status: Console) -> tuple[int, dict[str, Any]]:
    """Show tables on `out` and progress on `status`; return the exit code, and the result for programs.

    Ctrl-C ends the measuring; what was measured until then is still shown and written. A baseline that computes
    something else than the reference is named, left out, and makes the exit code 1. Raises CommandError, with code 1
    where zemoe does.
    """
    settings = settings_of(request)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"zemoe": __version__, "finish": "interrupted", "rows": rows}
    with _torch_state(settings):
        try:
            compile_loops(settings.device, settings.dtype)
            with status.status("measuring the machine's ceilings") if status.is_terminal else nullcontext():
                measure = timing.cpu_ceilings if settings.device.type == "cpu" else timing.cuda_ceilings
                ceilings = measure(settings.dtype)
        except KeyboardInterrupt:
            status.print("interrupted before anything was measured")
            return 130, result
        about = _about(settings, ceilings)
        out.print(table.headline(about, str(settings.dtype).removeprefix("torch.")), style="dim", markup=False)
        finish = _measure_cases(settings, ceilings, out, status, rows)
    notes = _notes(settings, rows)
    for note in notes:
        out.print(note, style="dim", markup=False)
    result |= {
        "finish": finish,
        "about": about,
        "cases": [asdict(case) for case in settings.cases],
        "baselines": {name: settings.absent.get(name) or "timed" for name in dict.fromkeys(request.baselines)},
        "notes": notes,
    }
    _write(settings, rows, about)
    wrong = any(row[f"{name}_method"].startswith(WRONG) for row in rows for name in settings.baselines)
    return 130 if finish == "interrupted" else int(wrong), result
