"""The ids of the k largest values on a CPU: one row and many, ties, masked slots and NaNs against a stable sort.

T tokens, A slots.
"""

from __future__ import annotations

import pytest
import torch

from zemoe.kernels import topk

INF = float("inf")
METHODS = [topk.by_repair, topk.by_integer_keys, *([topk.by_loops] if topk.HAS_NUMBA else [])]
# k, A: more values than chosen, all chosen, and the sizes around which torch.topk changes its method (64 k).
SIZES = [(1, 2), (3, 7), (5, 5), (12, 96), (3, 191), (3, 192), (3, 255), (3, 256), (12, 768)]
TOKENS = [0, 1, 2, 5, 22, 70]


def by_sort(choice: torch.Tensor, logits: torch.Tensor | None, k: int) -> torch.Tensor:
    if logits is not None:
        choice = torch.where(logits == -INF, -INF, choice)
    return choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def check(choice: torch.Tensor, logits: torch.Tensor | None, k: int) -> None:
    wanted = by_sort(choice, logits, k)
    for method in METHODS:
        got = method(choice, logits, k)
        assert got.is_contiguous() and torch.equal(got, wanted), method.__name__


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("k", "A"), SIZES)
class TestAgainstASort:
    def test_different_values(self, k, A, T):
        choice = torch.rand(T, A, generator=torch.Generator().manual_seed(0))
        check(choice, None, k)
        check(choice, choice, k)

    def test_many_ties(self, k, A, T):
        choice = torch.randint(0, 4, (T, A), generator=torch.Generator().manual_seed(0)).float()
        check(choice, None, k)

    def test_one_tie_at_the_last_choice(self, k, A, T):
        """In one row, the value of the last that is chosen is also that of one that is not, with a lower id."""
        choice = torch.rand(T, A, generator=torch.Generator().manual_seed(0))
        if not T or k == A:
            return
        order = choice[-1].argsort(descending=True)
        inside, outside = sorted((int(order[k - 1]), int(order[k])))
        choice[-1, inside] = choice[-1, outside] = choice[-1, order[k - 1]].item()
        check(choice, None, k)
        assert all(inside in method(choice, None, k)[-1] for method in METHODS)

    @pytest.mark.parametrize("masked", [0.2, 0.9, 1.0])
    def test_masked_slots_of_the_highest_value(self, k, A, T, masked):
        generator = torch.Generator().manual_seed(0)
        choice, logits = torch.rand(2, T, A, generator=generator)
        hidden = torch.rand(T, A, generator=generator) < masked
        check(torch.where(hidden, choice + 10, choice), logits.masked_fill(hidden, -INF), k)

    def test_a_nan_harms_no_other_row(self, k, A, T):
        choice = torch.rand(T, A, generator=torch.Generator().manual_seed(0))
        choice[1::2] = choice[1::2].round(decimals=2)  # ties
        choice[:1, A // 2] = float("nan")
        for method in METHODS:
            got = method(choice, choice, k)
            assert torch.equal(got[1:], by_sort(choice, choice, k)[1:])
            assert ((got >= 0) & (got < A)).all()
