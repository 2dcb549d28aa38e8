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
from .request import BenchRequest, Plan, make_plan
from .row import WRONG, Row


def _about(plan: Plan, at: timing.Ceilings) -> dict[str, Any]:
    installed, name = versions(), device_name(str(plan.device))
    if plan.device.type == "cpu" and (model := processor_model()):
        name = f"{model}, {name}"
    return {
        "repeats": plan.repeats,
        "seed": plan.request.seed,
        "commit": plan.request.commit or commit(),
        "device": name,
        "read_gb_s": at.bytes_per_second / 1e9,
        "product_tflop_s": at.flops_per_second / 1e12,
        "zemoe": __version__,
        **{package: installed[package] for package in ("torch", "triton", "transformers")},
    }


@contextmanager
def _torch_state(plan: Plan) -> Iterator[None]:
    """Our seed and device inside, the caller's random numbers as they were afterwards; nothing keeps a graph."""
    devices = [plan.device] if plan.device.type == "cuda" else []
    current = torch.cuda.device(plan.device) if devices else nullcontext()
    with torch.random.fork_rng(devices), current, torch.inference_mode():
        torch.manual_seed(plan.request.seed)
        yield


def _measure_case(
    plan: Plan, case: Case, at: timing.Ceilings, progress: table.Progress, rows: list[dict[str, Any]]
) -> None:
    """Append the rows of a case to `rows` as they come."""
    before = len(rows)
    progress.say(f"{case.name}: making the weights")
    layer = cases.build(case, plan.dtype, plan.device)
    built = {"zemoe": layer, **{name: BASELINES[name].build(layer) for name in plan.baselines}}
    for zero_share in plan.zero_shares:
        if zero_share is not None or plan.request.skew is not None:
            try:
                cases.steer(layer, zero_share, plan.request.skew)
            except ValueError as error:
                raise CommandError(f"{case.name}: --{error}") from None
        for tokens in plan.tokens(case):
            share = "" if zero_share is None else f", zero share {zero_share:g}"
            progress.say(f"{case.name}, T = {tokens}{share}")
            row = Row(plan, case, layer, dict(built), tokens)
            done = len(rows) - before
            seconds = row.seconds(lambda part, done=done: progress.reached(done + part))
            rows.append(row.result(seconds, at, zero_share))
            progress.reached(done + 1)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its numbers as text of six significant digits, as the CSV has them."""
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}


def run(request: BenchRequest, out: Console, status: Console) -> tuple[int, dict[str, Any]]:
    """Show tables on `out` and progress on `status`; the exit code, and the result for programs.

    Ctrl-C ends the measuring; what was measured until then is still shown and written. A baseline that computes
    something else than the reference is named, left out, and makes the exit code 1. Raises CommandError, with code 1
    where zemoe does.
    """
    plan = make_plan(request)
    rows: list[dict[str, Any]] = []
    finish = "done"
    result: dict[str, Any] = {"zemoe": __version__, "finish": finish, "rows": rows}
    with _torch_state(plan):
        try:
            compile_loops(plan.device, plan.dtype)
            with status.status("measuring the machine's ceilings") if status.is_terminal else nullcontext():
                at = (timing.cpu_ceilings if plan.device.type == "cpu" else timing.cuda_ceilings)(plan.dtype)
        except KeyboardInterrupt:
            status.print("interrupted before anything was measured")
            return 130, result | {"finish": "interrupted"}
        about = _about(plan, at)
        out.print(table.headline(about, str(plan.dtype).removeprefix("torch.")), style="dim", markup=False)
        for case in plan.cases:
            done = len(rows)
            units = len(plan.tokens(case)) * len(plan.zero_shares)
            try:
                with table.Progress(status, units) as progress:
                    _measure_case(plan, case, at, progress, rows)
            except KeyboardInterrupt:
                finish = "interrupted"
            if rows[done:]:
                out.print()
                out.print(table.title(case, rows[done:]), style="bold", markup=False)
                out.print(table.table(rows[done:], plan.baselines))
            if finish == "interrupted":
                units = sum(len(plan.tokens(each)) * len(plan.zero_shares) for each in plan.cases)
                out.print(f"interrupted: {len(rows)} of {units} rows were measured", style="bold", markup=False)
                break
    cache = torch.cuda.get_device_properties(plan.device).L2_cache_size if plan.device.type == "cuda" else 0
    notes = table.notes(plan.absent, rows, plan.baselines)
    notes += [
        f"{case.name}: its weights are no larger than the cache of {cache / 1e6:.0f} MB, which may have held them"
        for case in plan.cases
        if case.weight_bytes(plan.dtype.itemsize) <= cache
    ]
    for note in notes:
        out.print(note, style="dim", markup=False)
    result |= {
        "finish": finish,
        "about": about,
        "cases": [asdict(case) for case in plan.cases],
        "baselines": {name: plan.absent.get(name) or "timed" for name in dict.fromkeys(request.baselines)},
        "notes": notes,
    }
    try:
        if rows and request.csv is not None:
            write_csv(request.csv, [_rounded(row | about) for row in rows])
        if rows and request.plot is not None:
            from .plot import plot

            plot(rows, plan.baselines, table.headline(about, rows[0]["dtype"]), request.plot)
    except OSError as error:
        raise CommandError(f"{error.filename or request.csv}: could not be written ({error.strerror})", 1) from None
    wrong = any(row[f"{name}_method"].startswith(WRONG) for row in rows for name in plan.baselines)
    return 130 if finish == "interrupted" else int(wrong), result
