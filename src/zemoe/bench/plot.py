"""The picture of `zemoe bench --plot`. Needs matplotlib, the extra `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..terminal import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]
_ZEMOE, _FLOOR, _OTHER = "#cb4b48", "#555555", "#7a7a7a"
_BASELINES = {
    "torch": "#3b6fb6",
    "grouped": "#6fa8a0",
    "eager": "#e3a02f",
    "vllm": "#5a9e6f",
    "sonicmoe": "#8a63a8",
    "liger": "#a0694b",
}
_TALLEST = 3  # times zemoe's longest time: what is above would squeeze everything else to the bottom


def _sides(baselines: list[str]) -> list[tuple[str, str, str]]:
    """Return (name, column, colour) of each side."""
    return [("zemoe", "ms", _ZEMOE), *((name, f"{name}_ms", _BASELINES.get(name, _OTHER)) for name in baselines)]


def _line(axes: Axes, rows: Rows, across: str, column: str, **look: Any) -> None:
    points = [(row[across], row[column]) for row in rows if row[column] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **look)


def _over_tokens(axes: Axes, rows: Rows, baselines: list[str]) -> None:
    rows = sorted((row for row in rows if row["zero_share_asked"] == rows[0]["zero_share_asked"]), key=lambda r: r["T"])
    for name, column, color in _sides(baselines):
        _line(axes, rows, "T", column, label=name, color=color, marker="o", markersize=4)
    _line(axes, rows, "T", "floor_ms", label="floor", color=_FLOOR, linestyle="--", marker="_")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([row["T"] for row in rows], [str(row["T"]) for row in rows])
    axes.minorticks_off()
    axes.set_xlabel("tokens T")
    share = sum(row["zero_share"] for row in rows) / len(rows)
    axes.set_title(f"{rows[0]['case']}: time a layer, {share:.0%} of the choices zero")


def _over_shares(axes: Axes, rows: Rows, baselines: list[str]) -> None:
    tokens = max(row["T"] for row in rows)
    rows = sorted((row for row in rows if row["T"] == tokens), key=lambda row: row["zero_share"])
    top = _TALLEST * max(row["ms"] for row in rows)
    for name, column, color in _sides(baselines):
        times = [row[column] for row in rows if row[column] is not None]
        above = f" ({figures(min(times))} to {figures(max(times))}, not shown)" if times and min(times) > top else ""
        _line(axes, rows, "zero_share", column, label=name + above, color=color, marker="o", markersize=4)
    _line(axes, rows, "zero_share", "floor_ms", label="floor", color=_FLOOR, linestyle="--", marker="_")
    full = rows[0]["ms"] / max(1 - rows[0]["zero_share"], 1e-9)
    axes.plot([0, 1], [full, 0], color=_ZEMOE, linewidth=1, linestyle=":", label="in proportion")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, min(top, axes.get_ylim()[1]))
    axes.set_xlabel("share of zero choices")
    axes.set_title(f"{rows[0]['case']}: T = {tokens}")


def plot(rows: Rows, baselines: list[str], caption: str, path: Path) -> None:
    """Draw each case: time over T (at the share of zero choices that was asked first), and time over that share (at the
    largest T); of a single T and several shares only the second.

    Args:
        rows: of `zemoe.bench.command.run`. baselines: whose columns they have. caption: a line below.
        path: of the file; its suffix says the format.
    """
    from matplotlib.figure import Figure

    cases = {name: [row for row in rows if row["case"] == name] for name in dict.fromkeys(row["case"] for row in rows)}
    swept = len({row["zero_share_asked"] for row in rows}) > 1
    several = any(len({row["T"] for row in of_case}) > 1 for of_case in cases.values())
    panels = [*([_over_tokens] if several or not swept else []), *([_over_shares] if swept else [])]
    figure = Figure(figsize=(6.5 if len(panels) == 1 else 11, 4.2 * len(cases) + 0.4), layout="constrained")
    grid = figure.subplots(len(cases), len(panels), squeeze=False)
    for line, of_case in zip(grid, cases.values(), strict=True):
        for axes, draw in zip(line, panels, strict=True):
            draw(axes, of_case, baselines)
            axes.set_ylabel("milliseconds")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
    figure.supxlabel(caption, fontsize=7, color="#777777")
    figure.savefig(path, dpi=150)
