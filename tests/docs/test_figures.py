"""The tables of the README that give measurements: each figure is that of a CSV beside it, rounded."""

from __future__ import annotations

import csv
from itertools import pairwise

import pytest

from helpers.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def table(first_cell: str) -> list[list[str]]:
    """The cells of the README's table whose heading begins so, heading left out."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell}"))
    cells = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def assert_rounded(shown: list[str], measured: list[str]) -> None:
    """AssertionError unless each figure shown is the one measured, rounded to the digits that it has."""
    for figure, number in zip(shown, measured, strict=True):
        digits = figure.removesuffix("x")
        half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
        assert abs(float(digits) - float(number)) <= 1.0001 * half, f"{figure} is shown, {number} was measured"


@pytest.mark.parametrize("cells", table("tokens | first"), ids=lambda cells: f"T{cells[0]}")
def test_the_row_of_the_cpu_is_that_of_the_files(cells):
    tokens, *shown = cells
    measured = []
    for shape in ("first", "second"):
        (row,) = [row for row in rows(f"cpu-avx512/layer-{shape}-float32.csv") if row["T"] == tokens]
        measured += [row[name] for name in ("eager_ms", "ours_ms", "speedup")]
    assert_rounded(shown, measured)


def gpu_rows() -> list[list[str]]:
    """The rows of the GPU's table, with the shape in each."""
    cells = table("| tokens")
    for before, row in pairwise(cells):
        row[0] = row[0] or before[0]
    return cells


@pytest.mark.parametrize("cells", gpu_rows(), ids=lambda cells: f"{cells[0].partition(':')[0]}-T{cells[1]}")
def test_the_row_of_the_gpu_is_that_of_the_files(cells):
    title, tokens, *shown = cells
    case = title.partition(":")[0]

    def of(name: str) -> dict[str, str]:
        plain = [row for row in rows(f"nvidia-h100-80gb/{name}.csv") if not row["skew_asked"] + row["zero_share_asked"]]
        (row,) = [row for row in plain if (row["case"], row["T"]) == (case, tokens)]
        return row

    layer, vllm = of("layer"), of(f"peers_vllm_{case}")
    ours = [layer[name] for name in ("ms", "floor_ratio", "grouped_ratio")]
    assert_rounded(shown, [*ours, vllm["vllm_ratio"], layer["eager_ratio"]])
