"""The judge is judged: a wrong result must be rejected at every shape and dtype that the other tests use."""

from __future__ import annotations

import functools

import pytest
import torch

from helpers.judge import CASES, Case, check_selection, judge, rejects
from zemoe import reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@functools.cache
def outputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = case.inputs(dtype)
    return case.reference(inputs), case.reference(inputs, dtype)


def with_ids(case: Case, dtype: torch.dtype, t: int, ids_K: torch.Tensor) -> torch.Tensor:
    """The right computation, in the test's dtype, with wrong ids for token t."""
    inputs = case.inputs(dtype)
    one = inputs._replace(x_TH=inputs.x_TH[t : t + 1], weights_TK=inputs.weights_TK[t : t + 1], ids_TK=ids_K[None])
    result = outputs(case, dtype)[1].clone()
    result[t] = case.reference(one, dtype)[0]
    return result


def counting_choices(case: Case, ids_TK: torch.Tensor) -> list[tuple[int, int]]:
    """The (t, k) whose expert isn't 0 by definition."""
    kinds = reference.slot_kinds(case.E, case.kinds, case.A)
    return [(t, k) for t in range(case.T) for k in range(case.K) if ids_TK[t, k] >= 0 and kinds[ids_TK[t, k]] != "zero"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestJudge:
    def test_the_reference_in_its_own_dtype_passes(self, case, dtype):
        exact, own = outputs(case, dtype)
        judge(own, exact, own)
        judge(exact.to(dtype), exact, own)

    def test_zeros_fail(self, case, dtype):
        exact, own = outputs(case, dtype)
        assert rejects(torch.zeros_like(own), exact, own)

    def test_one_dropped_choice_fails(self, case, dtype):
        exact, own = outputs(case, dtype)
        ids = case.inputs(dtype).ids_TK
        choices = counting_choices(case, ids)
        for t, k in [choices[0], choices[len(choices) // 2], choices[-1]]:
            wrong = ids[t].clone()
            wrong[k] = -1
            assert rejects(with_ids(case, dtype, t, wrong), exact, own), f"choice {k} of token {t} dropped"

    def test_two_swapped_rows_fail(self, case, dtype):
        exact, own = outputs(case, dtype)
        if case.T > 1:
            wrong = own.clone()
            wrong[[0, case.T - 1]] = wrong[[case.T - 1, 0]]
        elif case.K > 1:  # the rows of two choices get each other's weight
            ids = case.inputs(dtype).ids_TK
            wrong = with_ids(case, dtype, 0, ids[0].roll(1))
        else:  # a single row: its two halves
            wrong = own.roll(case.H // 2, dims=1)
        assert rejects(wrong, exact, own)

    def test_one_nan_fails(self, case, dtype):
        exact, own = outputs(case, dtype)
        wrong = own.clone()
        wrong[0, -1] = float("nan")
        assert rejects(wrong, exact, own)


def test_shape_and_dtype_count():
    exact, own = outputs(CASES[0], torch.float32)
    assert rejects(own[:-1], exact, own)
    assert rejects(own.double(), exact, own)
    assert rejects(own.bfloat16(), exact, own)


def test_infinities_count():
    exact = torch.tensor([1.0, float("inf")], dtype=torch.float64)
    own = exact.float()
    judge(own.clone(), exact, own)
    for wrong in ([1.0, 1.0], [float("inf")] * 2, [1.0, -float("inf")], [1.0, float("nan")]):
        assert rejects(torch.tensor(wrong), exact, own)


def test_a_wrong_id_fails():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    expected = reference.select(logits, 2, num_experts=4)
    assert check_selection(torch.tensor([[2, 3]]), expected) == 1
    for wrong in ([[3, 1]], [[3, 3]], [[3, 4]], [[3, -1]]):
        with pytest.raises(AssertionError):
            check_selection(torch.tensor(wrong), expected)


def test_an_unclear_choice_is_left_open():
    expected = reference.select(torch.tensor([[0.0, 0.0, 0.0, 3.0], [0.0, 0.0, 3.0, 2.0]]), 2, num_experts=4)
    assert check_selection(torch.tensor([[3, 2], [2, 3]]), expected) == 0.5


def test_each_case_is_what_it_says():
    ids = {case.name: case.inputs().ids_TK for case in CASES}
    assert (
        not (ids["empty_expert"] == 1).any() and (ids["empty_expert"] == 0).any() and (ids["empty_expert"] == 2).any()
    )
    assert (ids["all_zero"] >= 6).all()
    assert (ids["all_on_one"] == 2).any(dim=1).all()
    assert (ids["skips"][0] == -1).all() and (ids["skips"] >= 0).any()
    assert (ids["choose_all"].sort(dim=1).values == torch.arange(8)).all()
    assert (ids["heavy_skew"] == 0).sum() > 50 and (ids["heavy_skew"] == 11).sum() <= 1
    assert set(ids["mixed"].flatten().tolist()) == set(range(14))
    for case in CASES:
        assert len(case.why) > 10


@pytest.mark.usefixtures("poisoned_empty")
def test_empty_memory_is_poisoned():
    like = torch.zeros(3)
    for memory in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (1,))):
        assert memory.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) > 2**60).all()
