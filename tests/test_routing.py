"""Routing against the specification: ids and weights judged apart, because ids jump where weights are smooth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.judge import assert_bitwise, check_selection, judge
from zemoe import reference, select_experts
from zemoe.scores import SCORES

pytestmark = pytest.mark.usefixtures("poisoned_empty")

INF, NAN = float("inf"), float("nan")
KINDS = (("constant", 2), ("null", 3), ("copy", 1), ("zero", 2))
E, A = 16, 24
MODES = ["none", "all", "real", "nonnull"]


def logits_of(T: int, seed: int = 0, slots: int = A) -> torch.Tensor:
    return 2 * torch.randn(T, slots, generator=torch.Generator().manual_seed(seed))


def bias_of(length: int | None) -> torch.Tensor | None:
    if length is None:
        return None
    return 0.2 * torch.randn(length, generator=torch.Generator().manual_seed(9))


def check(logits: torch.Tensor, top_k: int, least_clear: float = 0.9, **rules) -> tuple[torch.Tensor, torch.Tensor]:
    """Both the selection and, with the library's own ids, the weights."""
    weights, ids = select_experts(logits, top_k, **rules)
    assert weights.dtype == torch.float32 and weights.shape == ids.shape == (len(logits), top_k)
    assert check_selection(ids, reference.select(logits, top_k, **rules)) >= least_clear
    exact = reference.select(logits, top_k, ids_TK=ids, **rules).topk_weights_TK
    own = reference.select(logits, top_k, ids_TK=ids, dtype=torch.float32, **rules).topk_weights_TK
    judge(weights, exact, own, "topk_weights")
    return weights, ids


class TestAgainstTheReference:
    @pytest.mark.parametrize("groups", [None, (6, 3), (4, 1)], ids=str)
    @pytest.mark.parametrize("bias", [None, E, A])
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    def test_rules(self, scoring_func, mode, bias, groups):
        rules = {"num_expert_group": groups[0], "topk_group": groups[1]} if groups else {}
        check(
            logits_of(30),
            5,
            num_experts=E,
            zero_expert_kinds=KINDS,
            scoring_func=scoring_func,
            renormalize=mode,
            e_score_correction_bias=bias_of(bias),
            routed_scaling_factor=2.5,
            **rules,
        )

    @pytest.mark.parametrize(("old", "new"), [(True, "all"), (False, "none")])
    def test_booleans(self, old, new):
        rules = {"num_experts": E, "zero_expert_kinds": KINDS}
        for left, right in zip(
            select_experts(logits_of(9), 4, renormalize=old, **rules),
            select_experts(logits_of(9), 4, renormalize=new, **rules),
            strict=True,
        ):
            assert_bitwise(left, right)

    @pytest.mark.parametrize(
        ("T", "slots", "top_k"), [(0, 24, 3), (1, 1, 1), (1, 24, 1), (7, 24, 24), (3, 769, 12), (200, 17, 2)]
    )
    def test_shapes(self, T, slots, top_k):
        check(
            logits_of(T, slots=slots),
            top_k,
            0.0 if T == 0 else 0.5,
            num_experts=min(E, slots),
            zero_expert_kinds=(("zero", max(slots - E, 0)),),
        )

    def test_no_ffn_experts(self):
        weights, _ = check(
            logits_of(5, slots=4), 2, num_experts=0, zero_expert_kinds=(("identity", 4),), renormalize="real"
        )
        assert (weights == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_always_float32(self, dtype):
        logits = logits_of(20).to(dtype)
        rules = {"num_experts": E, "zero_expert_kinds": KINDS}
        weights, ids = select_experts(logits, 4, **rules)
        expected_weights, expected_ids = select_experts(logits.float(), 4, **rules)
        assert_bitwise(weights, expected_weights)
        assert torch.equal(ids, expected_ids)

    def test_inputs_are_left_alone(self):
        logits, bias = logits_of(9), bias_of(A)
        before = logits.clone(), bias.clone()
        select_experts(
            logits,
            4,
            num_experts=E,
            zero_expert_kinds=KINDS,
            e_score_correction_bias=bias,
            num_expert_group=6,
            topk_group=2,
        )
        assert_bitwise(logits, before[0])
        assert_bitwise(bias, before[1])

    def test_the_order_is_best_choice_first(self):
        bias = bias_of(A)
        logits = logits_of(50)
        _, ids = select_experts(logits, 6, num_experts=E, zero_expert_kinds=KINDS, e_score_correction_bias=bias)
        choice = logits.softmax(-1) + bias
        assert (choice.gather(1, ids).diff(dim=1) <= 1e-6).all()

    def test_not_contiguous(self):
        logits = logits_of(A, slots=40).T  # [40, A], strided
        weights, ids = select_experts(logits, 3, num_experts=E, zero_expert_kinds=KINDS)
        expected = select_experts(logits.contiguous(), 3, num_experts=E, zero_expert_kinds=KINDS)
        assert torch.equal(ids, expected[1])
        torch.testing.assert_close(weights, expected[0], rtol=1e-6, atol=0)

    def test_twice_the_same_bits(self):
        logits = logits_of(300)
        first, second = (
            select_experts(logits, 6, num_experts=E, zero_expert_kinds=KINDS, renormalize=True) for _ in range(2)
        )
        assert_bitwise(first[0], second[0])
        assert_bitwise(first[1], second[1])


class TestTies:
    """Equal logits choose the lower id: whatever the score, the value, the row's length or its place in the batch."""

    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    @pytest.mark.parametrize("slots", [3, 5, 13, 31, 67])
    def test_all_equal(self, scoring_func, slots):
        for value in torch.linspace(-6, 6, 49).tolist():
            for T in (1, 3):
                _, ids = select_experts(torch.full((T, slots), value), 3, num_experts=slots, scoring_func=scoring_func)
                assert ids.tolist() == [[0, 1, 2]] * T, value

    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    def test_equal_logits_score_the_same_bits(self, scoring_func):
        """In the last elements of a vector loop and of a thread's share too, which some kernels round differently."""
        for T, slots in ((1, 5), (3, 13), (7, 17), (7, 67), (997, 131)):
            for value in torch.linspace(-6, 6, 97).tolist():
                scores = SCORES[scoring_func](torch.full((T, slots), value))
                assert (scores == scores[0, 0]).all(), (T, slots, value)

    @pytest.mark.parametrize("groups", [None, (4, 2)], ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(
            st.lists(st.sampled_from([-INF, -3.0, -0.0, 0.0, 0.7, 2.5]), min_size=12, max_size=12),
            min_size=1,
            max_size=5,
        )
    )
    def test_few_values(self, scoring_func, bias, groups, logits):
        rules = {"num_experts": 8, "zero_expert_kinds": (("identity", 4),), "scoring_func": scoring_func}
        # With groups all biases are 0: else sums over two groups could differ by their rounding alone.
        rules["e_score_correction_bias"] = torch.tensor([0.0, 0.0 if groups else 8.0, 0.0] * 4) if bias else None
        rules |= {"num_expert_group": groups[0], "topk_group": groups[1]} if groups else {}
        logits = torch.tensor(logits)
        expected = reference.select(logits, 5, dtype=torch.float32, **rules).topk_ids_TK
        routed = ~(logits == -INF).all(1)
        assert torch.equal(select_experts(logits, 5, **rules)[1][routed], expected[routed])

    def test_plain_topk_would_fail(self):
        logits = torch.zeros(4, 200)
        assert select_experts(logits, 12, num_experts=200)[1].tolist() == [list(range(12))] * 4

    def test_negative_zero_is_zero(self):
        assert select_experts(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 3, num_experts=4)[1].tolist() == [[0, 1, 2]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_rules(data):
    num_experts = data.draw(st.integers(0, 9))
    kinds = data.draw(
        st.lists(
            st.tuples(st.sampled_from(["identity", "copy", "zero", "null", "constant"]), st.integers(0, 3)), max_size=4
        )
    )
    slots = num_experts + sum(count for _, count in kinds)
    if slots == 0:
        return
    top_k = data.draw(st.integers(1, slots))
    logits = logits_of(data.draw(st.integers(0, 5)), data.draw(st.integers(0, 999)), slots)
    rules = {
        "num_experts": num_experts,
        "zero_expert_kinds": tuple(kinds),
        "scoring_func": data.draw(st.sampled_from(sorted(SCORES))),
        "renormalize": data.draw(st.sampled_from([*MODES, True, False])),
        "e_score_correction_bias": bias_of(data.draw(st.sampled_from([None, num_experts, slots]))),
        "routed_scaling_factor": data.draw(st.sampled_from([1.0, 6.0, 0.5])),
    }
    check(logits, top_k, 0.0, **rules)


class TestEdges:
    RULES = {"num_experts": E, "zero_expert_kinds": KINDS}  # noqa: RUF012

    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    def test_the_bias_only_selects(self, scoring_func):
        logits = logits_of(20)
        bias = torch.zeros(A)
        bias[7] = 50.0
        weights, ids = select_experts(logits, 4, **self.RULES, scoring_func=scoring_func, e_score_correction_bias=bias)
        assert (ids[:, 0] == 7).all()
        torch.testing.assert_close(weights[:, 0], SCORES[scoring_func](logits)[:, 7])

    def test_a_short_bias_leaves_zero_slots_alone(self):
        logits = logits_of(40)
        short = bias_of(E)
        long = torch.cat([short, torch.zeros(A - E)])
        for left, right in zip(
            select_experts(logits, 4, **self.RULES, e_score_correction_bias=short),
            select_experts(logits, 4, **self.RULES, e_score_correction_bias=long),
            strict=True,
        ):
            assert_bitwise(left, right)
        # A large negative bias of length E leaves only zero-computation slots to choose.
        _, ids = select_experts(logits, 4, **self.RULES, e_score_correction_bias=torch.full((E,), -50.0))
        assert (ids >= E).all()

    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("groups", [None, (6, 3)], ids=str)
    def test_a_masked_slot_is_not_chosen(self, scoring_func, mode, groups):
        logits = logits_of(20)
        logits[:, ::3] = -INF
        bias = torch.zeros(A)
        bias[::3] = 1000.0
        rules = {"num_expert_group": groups[0], "topk_group": groups[1]} if groups else {}
        weights, ids = check(
            logits,
            5,
            0.5,
            **self.RULES,
            scoring_func=scoring_func,
            renormalize=mode,
            e_score_correction_bias=bias,
            **rules,
        )
        assert (ids % 3 != 0).all() and weights.isfinite().all()

    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    @pytest.mark.parametrize("mode", MODES)
    def test_too_few_slots_left(self, scoring_func, mode):
        logits = torch.full((2, A), -INF)
        logits[:, 3], logits[:, 20] = 1.0, 0.5
        weights, ids = check(logits, 5, 0.0, **self.RULES, scoring_func=scoring_func, renormalize=mode)
        assert ids.tolist() == [[3, 20, 0, 1, 2]] * 2
        assert (weights[:, 2:] == 0).all() and weights.isfinite().all()

    @pytest.mark.parametrize("broken", ["nan", "inf", "masked", "nan and inf", "inf and masked"])
    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("groups", [None, (6, 3)], ids=str)
    def test_a_token_without_routing(self, broken, scoring_func, mode, groups):
        rules = {"scoring_func": scoring_func, "renormalize": mode, "e_score_correction_bias": bias_of(A)}
        rules |= {"num_expert_group": groups[0], "topk_group": groups[1]} if groups else {}
        logits = logits_of(6)
        expected = select_experts(logits, 5, **self.RULES, **rules)
        damaged = logits.clone()
        if "masked" in broken:
            damaged[2] = -INF
        if "nan" in broken:
            damaged[2, 19] = NAN
        if "inf" in broken:
            damaged[2, 4] = INF
        weights, ids = select_experts(damaged, 5, **self.RULES, **rules)
        assert weights[2].isnan().all()
        assert ((ids >= 0) & (ids < A)).all() and len(set(ids[2].tolist())) == 5
        others = torch.arange(6) != 2
        assert_bitwise(weights[others], expected[0][others])
        assert_bitwise(ids[others], expected[1][others])

    def test_nothing_left_to_normalise(self):
        logits = torch.zeros(1, A)
        logits[:, E:] = 20.0
        weights, _ = select_experts(logits, 3, **self.RULES, renormalize="real")
        assert weights.tolist() == [[0.0, 0.0, 0.0]]
        weights, _ = select_experts(
            torch.full((1, A), -300.0),
            3,
            **self.RULES,
            renormalize="all",
            scoring_func="sigmoid",
            routed_scaling_factor=6.0,
        )
        assert weights.tolist() == [[0.0, 0.0, 0.0]]

    @pytest.mark.parametrize("mode", MODES)
    def test_scaling_reaches_zero_experts(self, mode):
        logits = logits_of(20)
        one, ids = select_experts(logits, 6, **self.RULES, renormalize=mode)
        six, _ = select_experts(logits, 6, **self.RULES, renormalize=mode, routed_scaling_factor=6.0)
        torch.testing.assert_close(six, 6 * one)
        if mode in ("none", "all"):
            assert (six[ids >= E] > 0).all()


class TestGradients:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    def test_logits(self, scoring_func, mode):
        rules = {"num_experts": E, "zero_expert_kinds": KINDS, "scoring_func": scoring_func, "renormalize": mode}
        rules |= {"e_score_correction_bias": bias_of(A), "routed_scaling_factor": 3.0}
        mine, exact, own = (
            (0.5 * logits_of(12)).to(d).requires_grad_() for d in (torch.float32, torch.float64, torch.float32)
        )
        weights, ids = select_experts(mine, 5, **rules)
        seeds = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
        (weights * seeds).sum().backward()
        for logits, dtype in ((exact, torch.float64), (own, torch.float32)):
            expected = reference.select(logits, 5, ids_TK=ids, dtype=dtype, **rules).topk_weights_TK
            (expected * seeds.to(dtype)).sum().backward()
        judge(mine.grad, exact.grad, own.grad, "gradient of the logits")

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    @pytest.mark.parametrize("low", [-INF, -120.0])
    def test_masked_slots_get_none(self, scoring_func, mode, low):
        """Also with scores whose derivative is unbounded at 0, and where nothing is left to normalise."""
        logits = logits_of(4)
        logits[:, ::4] = low
        logits[3, 1:] = low  # fewer than K remain
        logits[3, 0] = 0.0
        logits.requires_grad_()
        weights, _ = select_experts(
            logits, 4, num_experts=E, zero_expert_kinds=KINDS, scoring_func=scoring_func, renormalize=mode
        )
        (weights * torch.rand(4, 4)).sum().backward()
        assert logits.grad.isfinite().all()

    def test_the_bias_has_none(self):
        bias = nn.Parameter(bias_of(A))
        logits = logits_of(4).requires_grad_()
        weights, _ = select_experts(logits, 4, num_experts=E, zero_expert_kinds=KINDS, e_score_correction_bias=bias)
        weights.sum().backward()
        assert bias.grad is None


class TestRefusals:
    GOOD = {"num_experts": E, "zero_expert_kinds": KINDS}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("top_k", "rules", "parts"),
        [
            (25, {}, ["top_k", "25", "24"]),
            (0, {}, ["top_k", "0"]),
            (-1, {}, ["top_k", "-1"]),
            (2.0, {}, ["top_k", "2.0"]),
            (2, {"num_experts": -1}, ["num_experts", "-1"]),
            (2, {"num_experts": 25}, ["num_experts", "25", "24"]),
            (2, {"zero_expert_kinds": (("identity", -1),)}, ["identity", "-1"]),
            (2, {"zero_expert_kinds": (("identity", 7),)}, ["zero_expert_kinds", "7", "8"]),
            (2, {"scoring_func": "relu"}, ["scoring_func", "relu", "softmax"]),
            (2, {"renormalize": "some"}, ["renormalize", "some", "nonnull"]),
            (2, {"e_score_correction_bias": torch.zeros(17)}, ["e_score_correction_bias", "17", "16", "24"]),
            (2, {"e_score_correction_bias": torch.zeros(1, 24)}, ["e_score_correction_bias"]),
            (2, {"num_expert_group": 5, "topk_group": 2}, ["num_expert_group", "5", "24"]),
            (2, {"num_expert_group": 4}, ["topk_group"]),
            (2, {"topk_group": 4}, ["num_expert_group"]),
            (2, {"num_expert_group": 4, "topk_group": 5}, ["topk_group", "5", "4"]),
            (2, {"num_expert_group": 0, "topk_group": 1}, ["num_expert_group", "0"]),
            (2, {"num_expert_group": 4, "topk_group": 0}, ["topk_group", "0"]),
            (9, {"num_expert_group": 6, "topk_group": 2}, ["top_k", "9", "8"]),
            (
                2,
                {"num_expert_group": 24, "topk_group": 3, "e_score_correction_bias": torch.zeros(24)},
                ["num_expert_group", "24", "2"],
            ),
        ],
    )
    def test_message(self, top_k, rules, parts):
        with pytest.raises(ValueError) as error:
            select_experts(logits_of(3), top_k, **{**self.GOOD, **rules})
        for part in parts:
            assert part in str(error.value), str(error.value)

    @pytest.mark.parametrize("logits", [torch.zeros(24), torch.zeros(1, 2, 24), torch.zeros(2, 24, dtype=torch.int64)])
    def test_logits(self, logits):
        with pytest.raises(ValueError, match="logits"):
            select_experts(logits, 2, **self.GOOD)

    def test_groups_of_one_without_a_bias(self):
        check(logits_of(9), 3, num_expert_group=24, topk_group=3, **self.GOOD)


def test_a_bias_of_no_ffn_experts():
    """One number an FFN expert is none where there are none: as without a bias."""
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    rules = {"num_experts": 0, "zero_expert_kinds": (("identity", 3),)}
    found = select_experts(logits, 2, e_score_correction_bias=torch.zeros(0), **rules)
    for one, other in zip(found, select_experts(logits, 2, **rules), strict=True):
        assert torch.equal(one, other)
