"""Tile sizes by shape and device; needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from zemoe.kernels.triton import gpus
from zemoe.kernels.triton.gpus import GPUS, HOPPER, Gpu
from zemoe.kernels.triton.tiles import (
    Product,
    backward_schedule,
    max_tiles,
    rows_of_products,
    rows_per_tile,
    schedule,
    training_rows_per_tile,
)

ITEM = 2  # bytes of an element


@pytest.fixture
def pretend(monkeypatch):
    """Tensors without memory are on a GPU of the given kind."""

    def as_if(gpu: Gpu) -> None:
        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(gpus, "_gpu", lambda _: gpu)

    return as_if


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu.capability))
@pytest.mark.parametrize("T", [1, 8, 64, 512, 1024, 4096, 16384])
@pytest.mark.parametrize(("E", "Z", "I", "H"), [(256, 128, 1024, 3072), (64, 32, 1024, 2048), (8, 0, 37, 111)])
def test_tiles_fit_the_shared_memory(pretend, gpu, T, E, Z, I, H) -> None:
    """By what their stages hold; `make check-arch` compiles them."""
    pretend(gpu)
    K = 8
    block_m = rows_per_tile(T, K, E + Z)
    w13, w2 = torch.empty(E, 2 * I, H, device="meta"), torch.empty(E, H, I, device="meta")
    how = schedule(block_m, T, K, w13, w2)
    assert (how.gate_up.block_m, how.down.block_m) == rows_of_products(block_m)
    large = gpu.capability in ((9, 0), (10, 0))
    assert not (how.gate_up.tma or how.down.tma) or (large and H % 8 == I % 8 == 0)
    if T > 1:
        for product, weight_rows in ((how.gate_up, 2 * how.gate_up.block_n), (how.down, how.down.block_n)):
            stage = ITEM * product.block_k * (product.block_m + weight_rows)
            assert stage * product.stages <= gpu.shared_memory
        back = backward_schedule(block_m, w13, w2)
        assert back.preact.block_m == back.rows.block_m == how.down.block_m  # one list of tiles serves all three
        for product in (back.preact, back.weight, back.rows):
            stage = ITEM * product.block_k * (product.block_m + product.block_n)
            assert stage * product.stages <= gpu.shared_memory


# (T of LongCat-Flash-Lite's layer, K = 12, A = 384): what was measured on an H100, dev/gpu.md.
ON_HOPPER = {
    1: (Product(1, 1, 1024, 8, 1, False), Product(1, 1, 512, 1, 1, False)),
    64: (Product(16, 32, 256, 4, 3, True), Product(16, 32, 256, 4, 3, True)),
    512: (Product(32, 64, 128, 4, 3, True), Product(32, 64, 128, 4, 3, True)),
    1024: (Product(64, 64, 128, 4, 3, True), Product(64, 128, 128, 4, 2, True)),
    2048: (Product(192, 128, 32, 8, 5, True), Product(128, 128, 128, 8, 3, True)),
    6000: (Product(128, 128, 64, 8, 4, True), Product(128, 256, 64, 8, 4, True)),
    16384: (Product(192, 128, 32, 8, 5, True), Product(128, 256, 64, 8, 4, True, 132, True)),
}
TRAINED_ON_HOPPER = {
    64: (Product(16, 64, 128, 4, 3, True), Product(128, 128, 16, 8, 3, False), Product(16, 64, 128, 4, 3, True)),
    1024: (Product(64, 128, 64, 4, 3, True), Product(128, 128, 64, 8, 3, False), Product(64, 128, 64, 4, 3, True)),
    16384: (
        Product(128, 256, 64, 8, 4, True),
        Product(128, 256, 64, 8, 3, False),
        Product(128, 256, 64, 8, 4, True, 132, True),
    ),
}


def test_what_was_tuned_stays(pretend) -> None:
    """Hopper's choices are measurements: other GPUs don't change them."""
    pretend(HOPPER)
    w13, w2 = torch.empty(256, 2048, 3072, device="meta"), torch.empty(256, 3072, 1024, device="meta")
    for T, wanted in ON_HOPPER.items():
        how = schedule(rows_per_tile(T, 12, 384), T, 12, w13, w2)
        assert (how.gate_up, how.down) == wanted, T
    for T, wanted in TRAINED_ON_HOPPER.items():
        back = backward_schedule(training_rows_per_tile(T, 12, 384), w13, w2)
        assert (back.preact, back.weight, back.rows) == wanted, T


@pytest.mark.parametrize(
    ("tokens", "block_m"), [(1, 1), (2, 16), (384, 16), (385, 32), (832, 32), (833, 64), (1792, 64), (1793, 192)]
)
def test_rows_per_tile_grow_with_the_rows_of_an_expert(tokens: int, block_m: int) -> None:
    assert rows_per_tile(tokens, 12, 384) == block_m
    assert rows_per_tile(5120, 12, 384) == 192 and rows_per_tile(5121, 12, 384) == 128
    assert rows_per_tile(10240, 12, 384) == 128 and rows_per_tile(10241, 12, 384) == 192


def test_max_tiles() -> None:
    assert [max_tiles(*sizes) for sizes in ((0, 5, 16), (3, 5, 16), (160, 5, 16), (9, 0, 4))] == [0, 3, 15, 2]
