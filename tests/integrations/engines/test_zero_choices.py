"""A routing whose choices of zero experts are taken out: what is left, and what identity experts add."""

from __future__ import annotations

import pytest
import torch

from zemoe.integrations.engines.zero_choices import without_zero_choices

E = 4
WEIGHTS = torch.tensor([[0.5, 0.25, 0.125], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [float("nan"), 1.0, 1.0]])
IDS = torch.tensor([[2, 4, 1], [3, 0, 2], [5, 4, 6], [1, 5, 2]])


@pytest.mark.parametrize(
    ("replacement", "ids"),
    [
        (None, [[2, 1, 1], [3, 0, 2], [0, 0, 0], [1, 1, 2]]),
        (0, [[2, 0, 1], [3, 0, 2], [0, 0, 0], [1, 0, 2]]),
        (3, [[2, 3, 1], [3, 0, 2], [3, 3, 3], [1, 3, 2]]),
    ],
    ids=["one that the token has chosen", "expert 0", "expert 3"],
)
def test_a_zero_choice_becomes_an_expert_with_weight_0(replacement, ids):
    weights_TK, ids_TK, alpha_T1 = without_zero_choices(WEIGHTS, IDS, E, replacement)
    assert ids_TK.tolist() == ids and ids_TK.dtype == torch.int64
    assert weights_TK[:3].tolist() == [[0.5, 0, 0.125], [1, 2, 4], [0, 0, 0]]
    assert weights_TK[3].isnan().tolist() == [True, False, False] and weights_TK[3, 1:].tolist() == [0, 1]
    assert alpha_T1.tolist() == [[0.25], [0], [7], [1]]


def test_without_tokens_there_is_nothing_to_take_out():
    weights_TK, ids_TK, alpha_T1 = without_zero_choices(WEIGHTS[:0], IDS[:0], E)
    assert (weights_TK.shape, ids_TK.shape, alpha_T1.shape) == ((0, 3), (0, 3), (0, 1))


def test_gradients_of_all_weights_arrive():
    weights = WEIGHTS[:3].clone().requires_grad_()
    weights_TK, _, alpha_T1 = without_zero_choices(weights, IDS[:3], E)
    (weights_TK.sum() + 3 * alpha_T1.sum()).backward()
    assert weights.grad.tolist() == [[1, 3, 1], [1, 1, 1], [3, 3, 3]]
