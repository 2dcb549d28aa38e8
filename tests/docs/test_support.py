"""docs/support.md says what the code says: versions, backends by device and dtype, families that get zero experts."""

from __future__ import annotations

import re

import pytest
import torch

from helpers.paths import ROOT
from zemoe.backends import BACKENDS
from zemoe.versions import TESTED

PAGE = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")


def rows(title: str) -> list[list[str]]:
    """The cells of the first table under a heading of the page, without its own heading."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table[0].splitlines()[2:]]


def test_the_versions_of_the_page_are_those_of_the_code():
    named = {package: (oldest, newest) for package, oldest, newest, *_ in rows("Versions") if package != "Python"}
    assert named == {
        package: tuple(".".join(map(str, bound)) for bound in bounds) for package, bounds in TESTED.items()
    }


@pytest.mark.parametrize("row", rows("A layer by device and dtype"), ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_backends_of_a_row_are_those_that_take_its_device_and_dtypes(row):
    device, dtypes, backends, *_ = row
    kind = "cpu" if device.startswith("CPU") else "cuda" if device.startswith("NVIDIA") else "any other"
    names = {"all four": "float32, bfloat16, float16, float64"}.get(dtypes, dtypes).split(", ")
    old = device == "NVIDIA older than 8.0"  # its capability is what the backend `triton` refuses
    takes = [
        backend.name
        for backend in BACKENDS.values()
        if (backend.devices is None or kind in backend.devices)
        and all(getattr(torch, name) in backend.dtypes for name in names)
        and not (old and backend.name == "triton")
    ]
    assert backends.split(", ") == takes


def test_the_families_of_the_page_are_those_that_get_zero_experts():
    from zemoe.integrations.transformers import retrofit

    page = {
        name
        for family, *cells in rows("Model families")
        if "`retrofit_`" in cells
        for name in re.sub(r"[^a-z0-9,]", "", family.lower()).split(",")
    }
    blocks = {
        "qwen3moe": "Qwen3MoeSparseMoeBlock",
        "mixtral": "MixtralSparseMoeBlock",
        "deepseekv3": "DeepseekV3MoE",
        "glm47flash": "Glm4MoeLiteMoE",
    }
    assert {blocks[name] for name in page} == {family.block.__name__ for family in retrofit._FAMILIES}
