"""The Triton routing kernel, against the reference and against `zemoe.select_experts`."""

from __future__ import annotations

import pytest
import torch

import zemoe
from helpers.judge import assert_bitwise, check_selection, judge
from zemoe import reference
from zemoe.kernels.triton.select_experts import select_experts

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes infinities and NaN with numpy
]

NAN, INF = float("nan"), float("inf")
SCORINGS = ["softmax", "sigmoid", "sqrtsoftplus"]
KINDS = (("zero", 2), ("identity", 3), ("zero", 1))  # of 6 zero-computation slots


def random_logits(T: int, A: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(T, A, generator=torch.Generator().manual_seed(seed))


def null_ranges(E: int) -> tuple[tuple[int, int], ...]:
    return (E, E + 2), (E + 5, E + 6)


def check(
    logits, top_k, device, *, E, scoring="softmax", renormalize="none", bias=None, scaling=1.0, groups=None, clear=0.9
):
    """Ids and weights as the reference has them, best choice first; `clear` is the least share of rows without ties."""
    zero = KINDS if renormalize == "nonnull" else (("identity", logits.shape[1] - E),)
    group, best = groups or (None, None)
    weights, ids = select_experts(
        logits.to(device),
        top_k,
        num_experts=E,
        scoring=scoring,
        renormalize=renormalize,
        bias=None if bias is None else bias.to(device),
        scaling=scaling,
        num_expert_group=group,
        topk_group=best,
        null_ranges=null_ranges(E) if renormalize == "nonnull" else (),
    )
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    weights, ids = weights.cpu(), ids.cpu()
    rules = {
        "num_experts": E,
        "zero_expert_kinds": zero,
        "scoring_func": scoring,
        "renormalize": renormalize,
        "e_score_correction_bias": bias,
        "routed_scaling_factor": scaling,
        "num_expert_group": group,
        "topk_group": best,
    }
    expected = reference.select(logits, top_k, **rules)
    assert check_selection(ids, expected) >= clear
    chosen = expected.choice_TA.gather(1, ids)
    assert not (chosen.diff(dim=1) > 1e-5).any()
    exact = reference.select(logits, top_k, ids_TK=ids, **rules)
    own = reference.select(logits, top_k, ids_TK=ids, dtype=torch.float32, **rules)
    judge(weights, exact.topk_weights_TK, own.topk_weights_TK, "weights")
    # A judge of sums forgives a small weight everything.
    torch.testing.assert_close(weights.double(), exact.topk_weights_TK, rtol=2e-6, atol=1e-30, equal_nan=True)
    return weights, ids


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalize", ["none", "all", "real", "nonnull"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_modes(scoring, renormalize, with_bias, device):
    logits = random_logits(3, 22)
    bias = torch.randn(22, generator=torch.Generator().manual_seed(1)) if with_bias else None
    check(logits, 6, device, E=16, scoring=scoring, renormalize=renormalize, bias=bias, scaling=2.5)


@pytest.mark.parametrize("A", [1, 2, 3, 31, 96, 257, 768, 1000, 1024])
@pytest.mark.parametrize("K", [1, 12])
def test_sizes(A, K, device):
    check(random_logits(2, A), min(K, A), device, E=A)


@pytest.mark.parametrize("A", [1, 8, 13, 32])
def test_choose_all(A, device):
    _, ids = check(random_logits(4, A), A, device, E=max(A - 2, 0))
    assert (ids.sort().values == torch.arange(A)).all()


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("length", [16, 22])
def test_bias_moves_the_choice_and_not_the_weight(scoring, length, device):
    bias = torch.zeros(length)
    bias[3] = 100.0
    _, ids = check(random_logits(2, 22), 5, device, E=16, scoring=scoring, bias=bias)
    assert (ids[:, 0] == 3).all()
    # A bias of length E leaves the others at 0 wherever it lies in memory.
    wide = torch.full((64,), -100.0)
    wide[length:] = 100.0
    _, again = check(random_logits(2, 22), 5, device, E=16, scoring=scoring, bias=wide[:length])
    assert (again >= length).any() == (length == 16)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("A", [9, 96, 300])
def test_equal_logits_tie_to_the_lower_id(scoring, A, device):
    for value in (0.0, -3.7, 11.0):
        _, ids = check(torch.full((2, A), value), 7, device, E=A, scoring=scoring, clear=0)
        assert (ids == torch.arange(7)).all()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_few_values_tie_as_the_torch_backend_does(scoring, device):
    logits = torch.randint(-2, 3, (6, 77), generator=torch.Generator().manual_seed(0)).float()
    weights, ids = select_experts(logits.to(device), 20, num_experts=77, scoring=scoring)
    expected_weights, expected_ids = zemoe.select_experts(logits, 20, num_experts=77, scoring_func=scoring)
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected_weights)


def test_negative_zero_ties_with_zero(device):
    bias = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    logits = torch.full((1, 4), -1e4)  # scores 0
    logits[0, 3] = 0.0
    _, ids = select_experts(logits.to(device), 3, num_experts=4, bias=bias.to(device))
    assert ids.tolist() == [[3, 0, 1]]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_masked_slots(scoring, with_bias, device):
    logits = random_logits(3, 40)
    logits[0, ::2] = -INF
    logits[1, 3:] = -INF  # fewer than K are left
    logits[2, 1:] = -INF
    bias = torch.randn(40, generator=torch.Generator().manual_seed(1)) if with_bias else None
    if bias is not None:
        bias[2] = 50.0
    weights, ids = check(logits, 6, device, E=40, scoring=scoring, bias=bias, clear=0.3)
    assert (ids[0] % 2 == 1).all()
    assert set(ids[1].tolist()) == set(range(6)) and ids[1, 3:].tolist() == [3, 4, 5]
    assert (weights[1, 3:] == 0).all() and ids[2].tolist() == list(range(6))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalize", ["none", "all", "real", "nonnull"])
def test_lost_tokens(scoring, renormalize, device):
    logits = random_logits(7, 22)
    whole = check(logits[[1, 5]], 6, device, E=16, scoring=scoring, renormalize=renormalize)
    logits[0, 21] = NAN
    logits[2, 0] = INF
    logits[3] = -INF
    logits[4] = NAN
    logits[6, :] = INF
    lost = [0, 2, 3, 4, 6]
    for groups in (None, (2, 1)) if renormalize == "none" else (None,):
        weights, ids = check(
            logits, 6, device, E=16, scoring=scoring, renormalize=renormalize, groups=groups, clear=0.2
        )
        assert weights[lost].isnan().all() and ((ids >= 0) & (ids < 22)).all()
        if groups is None:
            assert (ids[lost] == torch.arange(6)).all()
            assert_bitwise(weights[[1, 5]], whole[0])


@pytest.mark.parametrize("groups", [(None, None), (5, 5)])
def test_a_bias_of_nan_chooses_no_slot_that_is_not_there(groups, device):
    bias = torch.full((10,), -(2**22), dtype=torch.int32).view(torch.float32)  # the NaN with the sign bit
    _, ids = select_experts(
        random_logits(2, 10).to(device),
        10,
        num_experts=10,
        bias=bias.to(device),
        num_expert_group=groups[0],
        topk_group=groups[1],
    )
    assert ((ids >= 0) & (ids < 10)).all()


@pytest.mark.parametrize("renormalize", ["real", "nonnull"])
def test_nothing_to_normalise_is_zero(renormalize, device):
    logits = random_logits(3, 22)
    logits[:, 16:18] += 60
    weights, ids = check(logits, 2, device, E=16, renormalize=renormalize, scaling=3.0)
    assert (ids >= 16).all() and (weights == 0).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("groups", "A", "K"), [((4, 2), 24, 5), ((3, 1), 21, 7), ((8, 3), 96, 12), ((1, 1), 10, 3)])
def test_groups(with_bias, groups, A, K, device):
    bias = 0.1 * torch.randn(A, generator=torch.Generator().manual_seed(1)) if with_bias else None
    for scoring in SCORINGS:
        _, ids = check(random_logits(3, A), K, device, E=A, scoring=scoring, bias=bias, groups=groups)
        assert all(len(set(row)) <= groups[1] for row in (ids // (A // groups[0])).tolist())


@pytest.mark.parametrize("with_bias", [False, True])
def test_groups_tie_to_the_lower_group(with_bias, device):
    logits = torch.zeros(1, 20)
    bias = torch.zeros(20) if with_bias else None
    _, ids = check(logits, 10, device, E=20, bias=bias, groups=(4, 2), clear=0)
    assert ids.tolist() == [list(range(10))]


def test_a_group_is_worth_its_two_best_only_with_a_bias(device):
    logits = torch.tensor([[5.0, 0.0, 0.0, 4.5, 4.5, 0.0]])  # the best slot, or the best pair
    _, one = check(logits, 3, device, E=6, groups=(2, 1), clear=0)
    _, two = check(logits, 3, device, E=6, groups=(2, 1), bias=torch.zeros(6), clear=0)
    assert one.tolist() == [[0, 1, 2]] and two.tolist() == [[3, 4, 5]]
    equal = torch.tensor([[4.0, 4.0, -4.0, 4.5, 0.0, 0.0]])  # two equal best count twice
    _, ids = check(equal, 3, device, E=6, groups=(2, 1), bias=torch.zeros(6), clear=0)
    assert ids.tolist() == [[0, 1, 2]]


def test_masked_groups(device):
    logits = random_logits(2, 12)
    logits[0, :6] = -INF
    logits[1, 2:] = -INF
    for bias in (None, torch.ones(12)):
        check(logits, 5, device, E=12, groups=(4, 3), bias=bias, clear=0.5)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_far_apart_logits_keep_their_precision(scoring, device):
    logits = torch.linspace(-60, 0, 32)[None] + torch.tensor([[0.0], [20.0]])
    weights, ids = select_experts(logits.to(device), 32, num_experts=32, scoring=scoring)
    exact = reference.select(logits, 32, num_experts=32, zero_expert_kinds=(), scoring_func=scoring, ids_TK=ids.cpu())
    # The interpreter's fma rounds twice.
    rtol = 1e-6 if device == "cuda" else 5e-6
    torch.testing.assert_close(weights.cpu().double(), exact.topk_weights_TK, rtol=rtol, atol=0)


def test_rows_apart_and_columns_apart(device):
    wide = random_logits(6, 50)
    expected = check(wide[:, :37].contiguous(), 5, device, E=37)
    for logits in (wide.to(device)[:, :37], wide[:, :37].T.contiguous().to(device).T):
        weights, ids = select_experts(logits, 5, num_experts=37)
        assert torch.equal(ids.cpu(), expected[1])
        assert_bitwise(weights.cpu(), expected[0])


def test_no_tokens(device):
    weights, ids = select_experts(torch.empty(0, 9, device=device), 4, num_experts=9)
    assert weights.shape == ids.shape == (0, 4) and ids.dtype == torch.int64


def test_reads_and_writes_nothing_else(device, monkeypatch):
    """Neighbours of the logits would win every choice; around the results nothing changes."""
    T, A, K = 3, 21, 5
    around = torch.full((T + 2, A), 1e9)
    around[1:-1] = random_logits(T, A)
    bias = torch.full((64,), 1e9)
    bias[20:41] = 0.0
    made = []

    def between_bands(size, *, dtype, device):
        memory = torch.full((T + 2, K), 77, dtype=dtype, device=device)
        made.append(memory)
        assert size == (T, K)
        return memory[1:-1]

    there, bias = around.to(device), bias.to(device)
    monkeypatch.setattr(torch, "empty", between_bands)
    weights, ids = select_experts(there[1:-1], K, num_experts=A, bias=bias[20:41])
    monkeypatch.undo()
    expected_weights, expected_ids = zemoe.select_experts(around[1:-1], K, num_experts=A)
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected_weights)
    assert len(made) == 2
    for memory in made:
        assert (memory[[0, -1]] == 77).all()


def test_twice_the_same(device):
    logits = random_logits(6, 300).to(device)
    first, second = (select_experts(logits, 12, num_experts=200, renormalize="all") for _ in range(2))
    assert_bitwise(first[0], second[0])
    assert_bitwise(first[1], second[1])


@pytest.mark.parametrize(
    ("logits", "K"),
    [(torch.zeros(1, 1025), 2), (torch.zeros(1, 40), 33), (torch.zeros(1, 3), 4), (torch.zeros(1, 9).double(), 2)],
)
def test_what_it_cannot_take(logits, K, device):
    with pytest.raises(ValueError, match="logits_TA"):
        select_experts(logits.to(device), K, num_experts=1)
