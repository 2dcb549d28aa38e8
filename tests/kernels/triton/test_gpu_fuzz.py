"""Layers at random on a CUDA device (fuzz_layers.py): values and gradients of each backend, against the reference."""

from __future__ import annotations

import random

import pytest

from helpers.fuzz_layers import check, draw
from zemoe.backends import BACKENDS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_values_and_gradients(backend: str, part: int) -> None:
    for seed in range(20 * part, 20 * part + 20):
        check(draw(random.Random(seed), BACKENDS[backend].dtypes), backend, "cuda")
