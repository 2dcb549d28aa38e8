"""Tile sizes by shape and device; needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from zemoe.kernels.triton.tiles import (
    backward_schedule,
    max_tiles,
    rows_of_products,
    rows_per_tile,
    schedule,
    takes_large_tiles,
)

HOPPER, AMPERE, SMALL_BLACKWELL = (9, 232448), (8, 166912), (12, 101376)  # compute capability, bytes a block may have
ITEM = 2  # bytes of an element


def pretend(monkeypatch, gpu: tuple[int, int]) -> None:
    major, memory = gpu
    properties = SimpleNamespace(major=major, shared_memory_per_block_optin=memory, multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize("gpu", [HOPPER, AMPERE, SMALL_BLACKWELL])
@pytest.mark.parametrize("T", [1, 8, 64, 512, 1024, 4096, 16384])
@pytest.mark.parametrize(("E", "Z", "I", "H"), [(256, 128, 1024, 3072), (64, 32, 1024, 2048), (8, 0, 37, 111)])
def test_tiles_fit_the_shared_memory(monkeypatch, gpu, T, E, Z, I, H) -> None:
    pretend(monkeypatch, gpu)
    K = 8
    block_m = rows_per_tile(T, K, E + Z)
    # Weights on "meta" take no memory, but are on no GPU that could be asked.
    monkeypatch.setattr("zemoe.kernels.triton.tiles.takes_large_tiles", lambda _: gpu == HOPPER)
    w13, w2 = torch.empty(E, 2 * I, H, device="meta"), torch.empty(E, H, I, device="meta")
    how = schedule(block_m, T, K, w13, w2)
    assert (how.gate_up.block_m, how.down.block_m) == rows_of_products(block_m)
    assert not (how.gate_up.tma or how.down.tma) or (gpu == HOPPER and H % 8 == I % 8 == 0)
    if T > 1:
        for product, weight_rows in ((how.gate_up, 2 * how.gate_up.block_n), (how.down, how.down.block_n)):
            stage = ITEM * product.block_k * (product.block_m + weight_rows)
            assert stage * product.stages <= gpu[1]
        back = backward_schedule(block_m, w13, w2)
        assert back.preact.block_m == back.rows.block_m == how.down.block_m  # one list of tiles serves all three
        for product in (back.preact, back.weight, back.rows):
            assert ITEM * product.block_k * (product.block_m + product.block_n) * product.stages <= gpu[1]


def test_large_tiles_are_for_hopper_and_newer_with_its_memory(monkeypatch) -> None:
    cuda = torch.device("cuda")
    for gpu, large in ((HOPPER, True), (AMPERE, False), (SMALL_BLACKWELL, False), ((10, 232448), True)):
        pretend(monkeypatch, gpu)
        assert takes_large_tiles(cuda) == large
    assert takes_large_tiles(torch.device("cpu"))  # Triton's interpreter


@pytest.mark.parametrize(
    ("tokens", "block_m"), [(1, 1), (2, 16), (384, 16), (385, 32), (832, 32), (833, 64), (1792, 64), (1793, 192)]
)
def test_rows_per_tile_grow_with_the_rows_of_an_expert(tokens: int, block_m: int) -> None:
    assert rows_per_tile(tokens, 12, 384) == block_m
    assert rows_per_tile(5120, 12, 384) == 192 and rows_per_tile(5121, 12, 384) == 128
    assert rows_per_tile(10240, 12, 384) == 128 and rows_per_tile(10241, 12, 384) == 192


def test_max_tiles() -> None:
    assert [max_tiles(*sizes) for sizes in ((0, 5, 16), (3, 5, 16), (160, 5, 16), (9, 0, 4))] == [0, 3, 15, 2]
