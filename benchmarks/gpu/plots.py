"""The pictures of GPU results in docs/images, drawn from the CSVs of a device. Needs matplotlib.

python benchmarks/gpu/plots.py benchmarks/results/nvidia-h100-80gb docs/images
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zemoe.bench.plot import plot
from zemoe.bench.table import headline

Rows = list[dict[str, Any]]
# (name, file, column, colour) of each line, by the case of its panel. A file is one run, with a zemoe of its own.
PEERS = {
    "research": [
        ("vLLM", "peers_vllm_research", "vllm", "#5a9e6f"),
        ("grouped_mm by hand", "peers_vllm_research", "grouped", "#6fa8a0"),
        ("SonicMoE, default tiles", "peers_sonicmoe", "sonicmoe", "#8a63a8"),
        ("Liger", "peers_liger", "liger", "#a0694b"),
        ("Liger, launched by Python", "peers_liger_decode", "liger", "#a0694b"),
    ],
    "lite": [
        ("vLLM", "peers_vllm_lite", "vllm", "#5a9e6f"),
        ("grouped_mm by hand", "peers_vllm_lite", "grouped", "#6fa8a0"),
    ],
}


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def read(path: Path) -> Rows:
    """The rows of a CSV of `zemoe bench`; a commit or a version stays text."""
    texts = ("commit", "torch", "triton", "transformers", "zemoe")
    with path.open(encoding="utf-8") as file:
        return [
            {key: text if key in texts else _value(text) for key, text in row.items()} for row in csv.DictReader(file)
        ]


def _peers(axes: Axes, results: Path, case: str) -> None:
    floor = read(results / f"peers_vllm_{case}.csv")
    for name, file, column, color in PEERS[case]:
        rows = read(results / f"{file}.csv")
        replayed = all(row[f"{column}_method"] == row["method"] for row in rows)
        axes.plot(
            [row["T"] for row in rows],
            [row[f"{column}_ratio"] for row in rows],
            label=name,
            color=color,
            marker="o",
            markersize=5,
            markerfacecolor=color if replayed else "white",
            linestyle="-" if replayed else ":",
        )
    tokens = [row["T"] for row in floor]
    axes.axhline(1, color="#cb4b48", label="zemoe")
    axes.plot(tokens, [1 / row["floor_ratio"] for row in floor], color="#555555", linestyle="--", label="floor")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(T) for T in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, 5)
    axes.set_xlabel("tokens T")
    axes.set_ylabel("times as long as zemoe")
    axes.set_title(case)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=8)


def draw_peers(results: Path, path: Path) -> None:
    """Time over T of each library, in times of zemoe's in the same run."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(PEERS)), PEERS, strict=True):
        _peers(axes, results, case)
    about = read(results / "peers_vllm_research.csv")[0]
    figure.supxlabel(headline(about, about["dtype"]), fontsize=7, color="#777777")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of the device's CSVs")
    parser.add_argument("images", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    for name, baselines in (("layer", ["grouped", "torch", "eager"]), ("zero_share", ["grouped"])):
        rows = read(args.results / f"{name}.csv")
        plot(rows, baselines, headline(rows[0], rows[0]["dtype"]), args.images / f"gpu-{name.replace('_', '-')}.png")
    draw_peers(args.results, args.images / "gpu-peers.png")


if __name__ == "__main__":
    main()
