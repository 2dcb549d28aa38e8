"""The plan: which rows the FFN experts compute, against a restatement with lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.judge import CASES, NO_TOKENS
from zemoe.plan import RoutingPlan, make_plan

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check(plan: RoutingPlan, ids_MK: torch.Tensor, num_experts: int) -> None:
    """Rows sorted by expert, within an expert by token then choice; every choice of an FFN expert has exactly one."""
    M, K = ids_MK.shape
    ids = ids_MK.tolist()
    expected = sorted((ids[m][k], m, k) for m in range(M) for k in range(K) if 0 <= ids[m][k] < num_experts)
    rows = len(expected)
    offsets = [sum(expert < e for expert, _, _ in expected) for e in range(num_experts + 1)]
    assert plan.expert_offsets.tolist() == offsets
    assert plan.row_token_N.shape == (M * K,) and plan.slot_row_MK.shape == (M, K)
    assert plan.row_token_N[:rows].tolist() == [m for _, m, _ in expected]
    assert (plan.row_token_N[rows:] == 0).all()
    row_of = {(m, k): row for row, (_, m, k) in enumerate(expected)}
    assert plan.slot_row_MK.tolist() == [[row_of.get((m, k), -1) for k in range(K)] for m in range(M)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("case", [*CASES, NO_TOKENS], ids=lambda case: case.name)
def test_cases(case, dtype):
    ids = case.inputs().ids_TK.to(dtype)
    before = ids.clone()
    check(make_plan(ids, case.E, case.A), ids, case.E)
    assert torch.equal(ids, before)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_ids(data):
    num_experts = data.draw(st.integers(0, 6))
    slots = num_experts + data.draw(st.integers(0, 4))
    M, K = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 4))
    # An expert may come twice in a token's choices: a caller's ids are his own affair.
    ids = data.draw(st.lists(st.lists(st.integers(-1, slots - 1), min_size=K, max_size=K), min_size=M, max_size=M))
    ids = torch.tensor(ids, dtype=torch.int64).reshape(M, K)
    check(make_plan(ids, num_experts, slots), ids, num_experts)


@pytest.mark.parametrize("T", [1, 31, 32, 33, 1000, 5000])
def test_sizes_around_every_block(T):
    ids = torch.randint(-1, 70, (T, 3), generator=torch.Generator().manual_seed(T))
    check(make_plan(ids, 50, 70), ids, 50)


def test_not_contiguous():
    ids = torch.randint(0, 9, (4, 30), generator=torch.Generator().manual_seed(0)).T
    check(make_plan(ids, 6, 9), ids, 6)


def test_twice_the_same():
    ids = torch.randint(0, 96, (3000, 12), generator=torch.Generator().manual_seed(0))
    first, second = make_plan(ids, 64), make_plan(ids, 64)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_frozen():
    plan = make_plan(torch.zeros(1, 1, dtype=torch.int64), 1)
    with pytest.raises(AttributeError):
        plan.row_token_N = plan.slot_row_MK


def test_no_bound_means_no_upper_limit():
    ids = torch.tensor([[0, 10**6], [2**31, 1]])
    check(make_plan(ids, 2), ids, 2)


@pytest.mark.parametrize(("wrong", "slots"), [(-2, 8), (8, 8), (9, 8), (-2, None), (-(2**40), None), (2**40, 8)])
@pytest.mark.parametrize("place", [(0, 0), (4, 2)])
def test_ids_that_name_no_slot(wrong, slots, place):
    ids = torch.zeros(5, 3, dtype=torch.int64)
    ids[place] = wrong
    with pytest.raises(ValueError, match="topk_ids") as error:
        make_plan(ids, 6, slots)
    assert str(wrong) in str(error.value) and "-1" in str(error.value)


@pytest.mark.parametrize(
    "ids", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2), torch.zeros(1, 3, 2, dtype=torch.int64)]
)
def test_shape_and_dtype(ids):
    with pytest.raises(ValueError, match="topk_ids"):
        make_plan(ids, 6)


@pytest.mark.parametrize("num_experts", [-1, 1.5, True])
def test_number_of_experts(num_experts):
    with pytest.raises(ValueError, match="num_experts"):
        make_plan(torch.zeros(3, 2, dtype=torch.int64), num_experts)
