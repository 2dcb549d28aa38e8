"""The Triton plan kernels, by one launch and by two, against `zemoe.plan` and `zemoe.affine`."""

from __future__ import annotations

import pytest
import torch

from helpers.judge import CASES, Case, assert_bitwise
from zemoe.affine import AffineParams, affine_coefficients
from zemoe.kernels.triton.coefficients import CONSTANT, IDENTITY, SCALED, ZERO
from zemoe.kernels.triton.plan_tiles import plan_tiles
from zemoe.kernels.triton.tiles import max_tiles
from zemoe.plan import make_plan

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes NaN with numpy
]

NAMES = {ZERO: "zero", IDENTITY: "identity", SCALED: "scaled_identity", CONSTANT: "constant"}
CODES = {name: code for code, name in NAMES.items()} | {"copy": IDENTITY}
# One launch; two, with a block for every part; two, with few blocks of many parts.
WAYS = {
    "one": {"most_compared": 10**9},
    "two": {"most_compared": 0, "part": 16},
    "parts": {"most_compared": 0, "part": 16, "most_blocks": 2},
}
pytest_ways = pytest.mark.parametrize("way", WAYS)


def random_ids(T: int, K: int, A: int, seed: int = 0, low: int = 0) -> torch.Tensor:
    return torch.randint(low, A, (T, K), generator=torch.Generator().manual_seed(seed))


def expected_tiles(offsets: list[int], block_m: int, most: int) -> list[list[int]]:
    E = len(offsets) - 1
    used = [[e, row] for e in range(E) for row in range(offsets[e], offsets[e + 1], block_m)]
    return [[len(used), 0], *used, *[[-1, 0]] * (most - len(used))]


def check(ids, E, device, way, *, kinds=(), block_m=16, weights=None, num_slots=-1, scale=None, logits=None):
    """Everything that `plan_tiles` returns is what the host computes. Returns (alpha, beta)."""
    T, K = ids.shape
    if weights is None:
        weights = torch.randn(T, K, generator=torch.Generator().manual_seed(1))
    there = [None if tensor is None else tensor.to(device) for tensor in (weights, ids, scale, logits)]
    row_token, slot_row, offsets, tiles, alpha, beta = plan_tiles(
        *there[:2],
        num_experts=E,
        num_slots=num_slots,
        block_m=block_m,
        kinds=kinds,
        scale_S=there[2],
        constant_logits_TC2=there[3],
        **WAYS[way],
    )
    # The host raises for ids that name no expert; without them the plan is the same.
    plan = make_plan(torch.where((ids >= 0) & (ids < E), ids, -1), E)
    for ours, theirs in zip(
        (row_token, slot_row, offsets), (plan.row_token_N, plan.slot_row_MK, plan.expert_offsets), strict=True
    ):
        assert ours.dtype == torch.int32 and ours.shape == theirs.shape
        assert torch.equal(ours.cpu().long(), theirs)
    assert tiles.dtype == torch.int32
    sizes = [192, 128] if block_m == 192 else [block_m]  # one list of tiles for each product where they differ
    most = max_tiles(T * K, E, min(sizes))
    assert tiles.tolist() == [expected_tiles(offsets.tolist(), size, most) for size in sizes]
    expected_alpha, expected_beta = affine_coefficients(
        weights,
        ids,
        num_experts=E,
        kinds=tuple((NAMES[kind], count) for kind, count in kinds),
        params=AffineParams(scale=scale),
        constant_logits_TC2=logits,
    )
    torch.testing.assert_close(alpha.cpu(), expected_alpha, rtol=1e-5, atol=2e-6, equal_nan=True)
    assert (beta is None) == (expected_beta is None)
    if beta is not None:
        torch.testing.assert_close(beta.cpu(), expected_beta, rtol=1e-5, atol=2e-6, equal_nan=True)
    return alpha.cpu(), beta


def coded(case: Case) -> tuple[tuple[int, int], ...]:
    return tuple((CODES[name], count) for name, count in case.kinds)


def affine_inputs(T: int, kinds, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    count = {code: sum(n for kind, n in kinds if kind == code) for code in NAMES}
    return {
        "scale": torch.randn(count[SCALED], generator=generator) if count[SCALED] else None,
        "logits": 2 * torch.randn(T, count[CONSTANT], 2, generator=generator) if count[CONSTANT] else None,
    }


@pytest_ways
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case, way, device):
    inputs, kinds = case.inputs(), coded(case)
    ids = inputs.ids_TK.to(torch.int32) if case.T % 2 else inputs.ids_TK
    check(ids, case.E, device, way, kinds=kinds, weights=inputs.weights_TK, **affine_inputs(case.T, kinds))


@pytest_ways
@pytest.mark.parametrize(("T", "K"), [(1, 1), (1, 12), (2, 7), (33, 1), (11, 12), (3, 32), (2, 40)])
def test_sizes(T, K, way, device):
    check(random_ids(T, K, 24, low=-1), 17, device, way, kinds=((IDENTITY, 7),), num_slots=24)


@pytest_ways
@pytest.mark.parametrize("E", [0, 1, 16, 17, 512, 1024])
def test_experts(E, way, device):
    check(random_ids(9, 6, E + 3), E, device, way, kinds=((IDENTITY, 3),), num_slots=E + 3)


@pytest_ways
@pytest.mark.parametrize("block_m", [1, 64])
def test_one_expert_takes_all(block_m, way, device):
    check(torch.full((14, 5), 3), 6, device, way, block_m=block_m)
    check(torch.full((3, 5), 5), 6, device, way, block_m=block_m)
    check(torch.full((3, 5), 0), 6, device, way, block_m=block_m)


@pytest_ways
def test_a_list_of_tiles_for_each_product(way, device):
    check(random_ids(400, 3, 5), 3, device, way, block_m=192)
    check(random_ids(2, 3, 5), 3, device, way, block_m=192)


@pytest_ways
def test_many_tiles(way, device):
    check(random_ids(40, 4, 9), 9, device, way, block_m=1)


def test_more_tiles_than_programs_write_at_once(device):
    check(random_ids(150, 4, 9), 9, device, "parts", block_m=1)


@pytest_ways
def test_only_zero_experts(way, device):
    check(8 + random_ids(12, 4, 5), 8, device, way, kinds=((IDENTITY, 5),))


@pytest_ways
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_value(dtype, way, device):
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    ids = random_ids(8, 5, 12, low=-1).to(dtype)
    wild = [low, high, -2, 12, 13, 2**16, 2**31 - 1, -(2**31), -(2**20)]
    if dtype == torch.int64:
        wild += [2**32, 2**32 + 1, -(2**32) + 1, 2**40 + 7, 2**33 + 9]  # the low halves of four of them name experts
    ids.view(-1)[: len(wild)] = torch.tensor(wild, dtype=dtype)
    kinds = ((SCALED, 2), (CONSTANT, 2))
    check(ids, 8, device, way, kinds=kinds, num_slots=12, **affine_inputs(8, kinds))


MIXED = ((CONSTANT, 2), (IDENTITY, 1), (SCALED, 2), (ZERO, 1), (CONSTANT, 1), (SCALED, 1), (IDENTITY, 2))


@pytest_ways
def test_mixed_kinds_and_ids_beyond_them(way, device):
    check(random_ids(20, 7, 16, low=-1), 5, device, way, kinds=MIXED, **affine_inputs(20, MIXED))


@pytest_ways
def test_a_lost_weight(way, device):
    total = sum(count for _, count in MIXED)
    ids = (5 + torch.arange(total))[:, None].repeat(1, 3)
    ids[:, 1:] = torch.tensor([5, 7])  # a constant and an identity beside it
    weights = torch.rand(total, 3)
    weights[:, 0] = float("nan")
    alpha, _ = check(ids, 5, device, way, kinds=MIXED, weights=weights, **affine_inputs(total, MIXED))
    assert alpha.isnan().all()
    ids[:, 0] = torch.tensor([0, 4, -1, 5 + total] * total)[:total]  # no zero-computation expert
    alpha, beta = check(ids, 5, device, way, kinds=MIXED, weights=weights, **affine_inputs(total, MIXED))
    assert alpha.isfinite().all() and beta.isfinite().all()


@pytest_ways
def test_no_kinds(way, device):
    alpha, beta = check(random_ids(6, 3, 9), 5, device, way)
    assert (alpha == 0).all() and beta is None


@pytest_ways
def test_a_part_of_something_larger(way, device):
    """Neighbours of what it may read hold ids and weights that would change the result."""
    ids = random_ids(10, 4, 9).to(device)
    weights = torch.full((10, 4), float("nan"), device=device)
    weights[3:7] = 1.0
    kinds = ((IDENTITY, 4),)
    outputs = plan_tiles(weights[3:7], ids[3:7], num_experts=5, num_slots=9, block_m=2, kinds=kinds, **WAYS[way])
    alone = plan_tiles(
        weights[3:7].clone(), ids[3:7].clone(), num_experts=5, num_slots=9, block_m=2, kinds=kinds, **WAYS[way]
    )
    for left, right in zip(outputs[:5], alone[:5], strict=True):
        assert_bitwise(left, right)
    assert outputs[4].isfinite().all()


@pytest_ways
def test_writes_nothing_beside_its_results(way, device, monkeypatch):
    made = []

    def between_bands(size, *, dtype, device):
        rows = torch.Size([size] if isinstance(size, int) else size).numel()
        memory = torch.full((rows + 256,), 77, dtype=dtype, device=device)
        made.append((memory, rows))
        return memory[128 : 128 + rows].view(size)

    monkeypatch.setattr(torch, "empty", between_bands)
    ids = random_ids(11, 7, 40, low=-9)
    ids[5] = 2**40 + torch.arange(7)
    weights = torch.rand(11, 7)
    plan_tiles(weights.to(device), ids.to(device), num_experts=17, num_slots=-1, block_m=4, kinds=(), **WAYS[way])
    monkeypatch.undo()
    assert len(made) >= 5
    for memory, rows in made:
        assert (memory[:128] == 77).all() and (memory[128 + rows :] == 77).all()


@pytest_ways
def test_not_contiguous(way, device):
    ids = random_ids(4, 30, 9).T
    logits = torch.randn(2, 2, 30, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
    check(ids, 5, device, way, kinds=((CONSTANT, 2), (IDENTITY, 2)), weights=torch.rand(4, 30).T, logits=logits)


@pytest_ways
def test_no_tokens(way, device):
    kinds = ((CONSTANT, 2),)
    outputs = check(torch.empty(0, 3, dtype=torch.int64), 5, device, way, kinds=kinds, logits=torch.empty(0, 2, 2))
    assert outputs[0].shape == (0,) and outputs[1].shape == (0, 2)


def test_more_kinds_than_slots(device):
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="kinds"):
        plan_tiles(ids.float(), ids, num_experts=3, num_slots=5, block_m=16, kinds=((IDENTITY, 3),))
