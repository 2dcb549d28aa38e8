"""The pictures of the experiment. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from arms import ARMS

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Rows = list[dict[str, Any]]
COLORS = {"": "#6b6b6b", "identity": "#ea7a2c", "zero": "#43255e", "moe++": "#2f7f86"}
STYLES = {3: ":", 4: "-", 5: "--"}
SIZE = (7.2, 4.0)


def look(arm: str) -> dict[str, Any]:
    return {"color": COLORS[ARMS[arm].zero], "linestyle": STYLES[ARMS[arm].ffn_target], "label": ARMS[arm].label}


def present(rows: Rows) -> list[str]:
    """The arms that rows are about, in the order of ARMS."""
    return [name for name in ARMS if any(row["arm"] == name for row in rows)]


def save(axes: Axes, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(axes.figure)


def draw_bits(arms: Rows, runs: Rows, path: Path) -> None:
    """Held-out bits a byte: seeds as dots, mean with its interval as a bar."""
    _, axes = plt.subplots(figsize=SIZE)
    order = sorted(present(arms), key=lambda name: (ARMS[name].ffn_target, list(ARMS).index(name)))
    for place, name in enumerate(order):
        (row,) = (row for row in arms if row["arm"] == name)
        seeds = [run["bits_per_byte"] for run in runs if run["arm"] == name]
        color = COLORS[ARMS[name].zero]
        half = None if np.isnan(row["bits_per_byte_ci95"]) else row["bits_per_byte_ci95"]
        axes.errorbar(row["bits_per_byte"], place, xerr=half, fmt="|", color=color, capsize=4, markersize=14)
        axes.plot(seeds, [place] * len(seeds), "o", color=color, alpha=0.6, markersize=5)
    axes.set_yticks(range(len(order)), [ARMS[name].label for name in order])
    axes.invert_yaxis()
    axes.set_xlabel("held-out bits/byte (dots: seeds; bar: mean and 95 % interval)")
    axes.grid(axis="x", alpha=0.3)
    save(axes, path)


def mean_curve(curves: Rows, arm: str, key: str) -> tuple[list[int], list[float]]:
    """Steps, and the mean over seeds."""
    values: dict[int, list[float]] = {}
    for row in curves:
        if row["arm"] == arm and key in row:
            values.setdefault(row["step"], []).append(row[key])
    return list(values), [float(np.mean(v)) for v in values.values()]


def draw_experts(curves: Rows, path: Path) -> None:
    """FFN experts a token over training, with what was wanted."""
    _, axes = plt.subplots(figsize=SIZE)
    arms = [name for name in present(curves) if ARMS[name].zero]
    for target in sorted({ARMS[name].ffn_target for name in arms}):
        axes.axhline(target, color="#bbbbbb", linewidth=0.8)
    for name in arms:
        axes.plot(*mean_curve(curves, name, "ffn_experts"), **look(name))
    axes.set_xlabel("training step")
    axes.set_ylabel("FFN experts a token (mean over layers)")
    axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.84))
    save(axes, path)


def draw_validation(curves: Rows, path: Path) -> None:
    _, axes = plt.subplots(figsize=SIZE)
    for name in present(curves):
        axes.plot(*mean_curve(curves, name, "validation_bits_per_byte"), **look(name))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_formatter("{x:.2f}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("training step")
    axes.set_ylabel("validation bits/byte")
    axes.legend(frameon=False, fontsize=8)
    save(axes, path)


def draw_kinds(kinds: Rows, path: Path) -> None:
    """FFN experts a token by kind of token, as bars beside each other."""
    _, axes = plt.subplots(figsize=(7.2, 4.8))
    arms, names = present(kinds), list(dict.fromkeys(row["kind"] for row in kinds))
    height = 0.8 / max(1, len(arms))
    for i, arm in enumerate(arms):
        mine = {row["kind"]: row for row in kinds if row["arm"] == arm}
        places = [names.index(kind) + (i - (len(arms) - 1) / 2) * height for kind in mine]
        relative = [row["ffn_experts"] / ARMS[arm].ffn_target for row in mine.values()]
        shade = {3: 0.55, 4: 1.0, 5: 0.75}[ARMS[arm].ffn_target]
        axes.barh(places, relative, height, color=COLORS[ARMS[arm].zero], alpha=shade, label=ARMS[arm].label)
    axes.axvline(1, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("FFN experts a token, as a multiple of K_e")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
    save(axes, path)


def draw(files: Mapping[str, Rows], folder: Path) -> None:
    """All pictures, from the rows that the CSV files hold."""
    draw_bits(files["arms"], files["runs"], folder / "matched-bits.png")
    draw_experts(files["curves"], folder / "matched-experts.png")
    draw_validation(files["curves"], folder / "matched-validation.png")
    draw_kinds(files["kinds"], folder / "matched-kinds.png")
