"""What `zemoe bench` prints: a progress bar, tables, and notes below them."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Table

from ..terminal import figures
from .cases import Case
from .row import WRONG


class Progress:
    """Shows a bar for so many rows on a terminal, nothing elsewhere; it is gone when the rows are done."""

    def __init__(self, console: Console, rows: int) -> None:
        self._bar = progress.Progress(
            progress.BarColumn(24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=rows)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Say what is going on now."""
        self._bar.update(self._task, description=text)

    def reached(self, rows: float) -> None:
        """Show that so many rows are measured."""
        self._bar.update(self._task, completed=rows)


def headline(about: dict[str, Any], dtype: str) -> str:
    """Return one line: the device, the dtype, and the measured ceilings."""
    return (
        f"{about['device']}; {dtype}; reads {figures(about['read_gb_s'])} GB/s, multiplies "
        f"{figures(about['product_tflop_s'])} TFLOP/s; torch {about['torch']}, seed {about['seed']}, "
        f"commit {about['commit']}"
    )


def title(case: Case, rows: list[dict[str, Any]]) -> str:
    """Return what stands over a case's table."""
    return (
        f"{case.name}: H {case.hidden_size}, I {case.intermediate_size}, {case.num_experts} FFN and "
        f"{case.num_zero_experts} zero experts, {case.top_k} choices; backend {rows[0]['backend']}"
    )


def table(rows: list[dict[str, Any]], baselines: list[str]) -> Table:
    """Make the table of one case's rows."""
    shown = Table(box=None, padding=(0, 1), pad_edge=False)
    skewed = rows[0]["skew_asked"] is not None
    names = ["T", "zero share", *(["top expert"] if skewed else []), "ms", "floor ms", "x floor", "TFLOP/s"]
    for name in [*names, *(f"{side} {unit}" for side in baselines for unit in ("ms", "x"))]:
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [str(row["T"]), f"{row['zero_share']:.1%}", *([f"{row['skew']:.1%}"] if skewed else [])]
        cells += [figures(row[key]) for key in ("ms", "floor_ms", "floor_ratio", "tflop_s")]
        for side in baselines:
            cells += [figures(row[f"{side}_ms"]), figures(row[f"{side}_ratio"])]
        shown.add_row(*cells)
    return shown


def notes(absent: dict[str, str], rows: list[dict[str, Any]], baselines: list[str]) -> list[str]:
    """Return what a reader must know beside the figures."""
    found = [f"{name}: {why}" for name, why in absent.items()]
    replayed = any(row["method"] == "replay" for row in rows)
    for name in ["zemoe", *baselines]:
        methods = [row["method" if name == "zemoe" else f"{name}_method"] for row in rows]
        waits = [row["T"] for row, method in zip(rows, methods, strict=True) if method == "events" and row["T"] <= 512]
        if waits:
            found.append(f"{name} waits for the device, so it was not replayed as a CUDA graph at T = {_listed(waits)}")
        if "out of memory" in methods:
            tokens = [row["T"] for row, method in zip(rows, methods, strict=True) if method == "out of memory"]
            found.append(f"{name} does not fit into memory at T = {_listed(tokens)}")
        found += [
            f"{name} is {method}; not timed for {row['case']} at T = {row['T']}"
            for row, method in zip(rows, methods, strict=True)
            if method.startswith(WRONG)
        ]
    if any(row["floor_ratio"] < 1 for row in rows):
        found.append(
            "some times are below the floor: the machine was busier when its ceilings were measured, or a cache held "
            "weights"
        )
    if replayed:
        found.append("T up to 512 are CUDA graph replays, four calls on four inputs each")
    return found


def _listed(tokens: list[int]) -> str:
    return ", ".join(str(T) for T in dict.fromkeys(tokens))
