"""The picture of `zemoe bench --plot`. Needs matplotlib, the extra `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]
_ZEMOE, _FLOOR = "#cb4b48", "#555555"
_OTHERS = ("#3b6fb6", "#e3a02f", "#5a9e6f", "#8a63a8", "#7a7a7a")


def _sides(baselines: list[str]) -> list[tuple[str, str, str]]:
    """(name, column, colour)."""
    others = [(name, f"{name}_ms", _OTHERS[i % len(_OTHERS)]) for i, name in enumerate(baselines)]
    return [("zemoe", "ms", _ZEMOE), *others]


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
    for name, column, color in _sides(baselines):
        _line(axes, rows, "zero_share", column, label=name, color=color, marker="o", markersize=4)
    _line(axes, rows, "zero_share", "floor_ms", label="floor", color=_FLOOR, linestyle="--", marker="_")
    full = rows[0]["ms"] / (1 - rows[0]["zero_share"])
    axes.plot([0, 1], [full, 0], color=_ZEMOE, linewidth=1, linestyle=":", label="in proportion")
    axes.set_xlim(0, 1)
    axes.set_ylim(0)
    axes.set_xlabel("share of zero choices")
    axes.set_title(f"{rows[0]['case']}: T = {tokens}")


def plot(rows: Rows, baselines: list[str], caption: str, path: Path) -> None:
    """Draw each case: time over T, and beside it time over the share of zero choices where there are several.

    Args:
        rows: of `zemoe.bench.run`. baselines: whose columns they have. caption: a line below.
        path: of the file; its suffix says the format.
    """
    from matplotlib.figure import Figure

    cases = {name: [row for row in rows if row["case"] == name] for name in dict.fromkeys(row["case"] for row in rows)}
    swept = len({row["zero_share_asked"] for row in rows}) > 1
    figure = Figure(figsize=(11 if swept else 6.5, 4.2 * len(cases) + 0.4), layout="constrained")
    grid = figure.subplots(len(cases), 2 if swept else 1, squeeze=False)
    for line, of_case in zip(grid, cases.values(), strict=True):
        panels = [_over_tokens, *([_over_shares] if swept else [])]
        for axes, draw in zip(line, panels, strict=True):
            draw(axes, of_case, baselines)
            axes.set_ylabel("milliseconds")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
    figure.supxlabel(caption, fontsize=7, color="#777777")
    figure.savefig(path, dpi=150)
