"""The specification itself, against numbers worked out by hand (or with `math` alone)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from zemoe import reference

LN = [math.log(v) for v in (1.0, 2.0, 3.0, 4.0)]  # softmax of these is 0.1, 0.2, 0.3, 0.4


def close(result: torch.Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def select(logits, top_k=2, **kwargs):
    kwargs.setdefault("num_experts", 2)
    kwargs.setdefault("zero_expert_kinds", (("identity", 1), ("zero", 1)))
    return reference.select(torch.tensor([logits], dtype=torch.float64), top_k, **kwargs)


class TestLogits:
    X = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])

    def test_product(self):
        close(reference.router_logits(self.X, self.W, num_experts=2, num_zero_experts=1), [[1, 2, 3], [0, -1, -1]])

    def test_bias(self):
        bias = torch.tensor([10.0, 20.0, 30.0])
        result = reference.router_logits(self.X, self.W, bias, num_experts=2, num_zero_experts=1)
        close(result, [[11, 22, 33], [10, 19, 29]])

    def test_tied_null_logit_is_repeated(self):
        result = reference.router_logits(self.X, self.W, num_experts=2, num_zero_experts=3)
        close(result, [[1, 2, 3, 3, 3], [0, -1, -1, -1, -1]])

    def test_gating_residual(self):
        residual = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
        previous = torch.tensor([[1.0, 5.0, 7.0], [0.0, 0.0, 0.0]])
        result = reference.router_logits(
            self.X, self.W, num_experts=2, num_zero_experts=1, residual_weight=residual, prev_logits_TA=previous
        )
        close(result, [[6, 2, 5], [0, -1, -1]])

    def test_normalised_before_the_null_logit_is_repeated_and_the_residual_added(self):
        result = reference.router_logits(
            self.X,
            self.W,
            num_experts=2,
            num_zero_experts=2,
            residual_weight=torch.eye(4),
            prev_logits_TA=torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]),
            logit_norm=2.0,
        )
        third = math.sqrt(1.5) * 2  # (1, 2, 3) has mean 2 and variance 2/3
        expected = [[-third, 0, third, third + 1], [2 * math.sqrt(2), -math.sqrt(2), -math.sqrt(2), -math.sqrt(2)]]
        close(result, expected, 1e-5)

    def test_no_tokens(self):
        assert reference.router_logits(self.X[:0], self.W, num_experts=2, num_zero_experts=3).shape == (0, 5)


class TestScores:
    def test_softmax(self):
        close(select(LN).scores_TA, [[0.1, 0.2, 0.3, 0.4]])

    def test_softmax_of_large_logits(self):
        close(select([1000 + v for v in LN]).scores_TA, [[0.1, 0.2, 0.3, 0.4]])

    def test_sigmoid(self):
        close(
            select([0.0, math.log(3), -math.log(3), 800.0], scoring_func="sigmoid").scores_TA, [[0.5, 0.75, 0.25, 1.0]]
        )

    def test_sqrtsoftplus(self):
        logits = [math.log(math.e - 1), math.log(math.e**4 - 1), -1000.0, 900.0]
        close(select(logits, scoring_func="sqrtsoftplus").scores_TA, [[1.0, 2.0, 0.0, 30.0]])

    @pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
    def test_a_masked_slot_scores_zero(self, scoring_func):
        scores = select([1.0, -math.inf, 0.0, 2.0], scoring_func=scoring_func).scores_TA
        assert scores[0, 1] == 0 and (scores[0, [0, 2, 3]] > 0).all()

    def test_unknown(self):
        with pytest.raises(ValueError, match="scoring_func"):
            select(LN, scoring_func="relu")


class TestChoice:
    def test_best_first(self):
        chosen = select(LN, 3)
        assert chosen.topk_ids_TK.tolist() == [[3, 2, 1]]
        close(chosen.topk_weights_TK, [[0.4, 0.3, 0.2]])

    def test_ties_go_to_the_lower_id(self):
        assert select([0.0, 1.0, 1.0, 1.0], 2).topk_ids_TK.tolist() == [[1, 2]]
        assert select([1.0, 1.0, 1.0, 1.0], 3).topk_ids_TK.tolist() == [[0, 1, 2]]

    def test_bias_selects_and_does_not_weigh(self):
        chosen = select(LN, 2, e_score_correction_bias=torch.tensor([1.0, 0.0, 0.0, 0.0]))
        assert chosen.topk_ids_TK.tolist() == [[0, 3]]
        close(chosen.topk_weights_TK, [[0.1, 0.4]])

    def test_short_bias_leaves_zero_experts_alone(self):
        chosen = select(LN, 2, e_score_correction_bias=torch.tensor([-5.0, 0.25]))
        close(chosen.choice_TA, [[-4.9, 0.45, 0.3, 0.4]])
        assert chosen.topk_ids_TK.tolist() == [[1, 3]]

    def test_bias_cannot_unmask(self):
        bias = torch.tensor([100.0, 0.0, 0.0, 0.0])
        chosen = select([-math.inf, 0.0, 1.0, 2.0], 3, e_score_correction_bias=bias)
        assert chosen.topk_ids_TK.tolist() == [[3, 2, 1]]

    def test_masked_slots_come_last_and_weigh_nothing(self):
        chosen = select([-math.inf, -math.inf, -math.inf, 2.0], 3)
        assert chosen.topk_ids_TK.tolist() == [[3, 0, 1]]
        close(chosen.topk_weights_TK, [[1.0, 0.0, 0.0]])

    @pytest.mark.parametrize("logits", [[math.nan, 0, 0, 0], [math.inf, 0, 0, 0], [-math.inf] * 4])
    @pytest.mark.parametrize("renormalize", ["none", "all", "real", "nonnull"])
    def test_a_token_without_routing(self, logits, renormalize):
        chosen = select(logits, 2, renormalize=renormalize)
        assert chosen.topk_weights_TK.isnan().all() and chosen.scores_TA.isnan().all()
        assert set(chosen.topk_ids_TK[0].tolist()) <= {0, 1, 2, 3}

    def test_given_ids(self):
        chosen = select(LN, 2, ids_TK=torch.tensor([[0, 2]]), renormalize="all")
        assert chosen.topk_ids_TK.tolist() == [[0, 2]]
        close(chosen.topk_weights_TK, [[0.25, 0.75]])


class TestGroups:
    LOGITS = tuple(math.log(v) for v in (30.0, 1.0, 20.0, 19.0, 5.0, 25.0))  # over 100

    def test_by_best_slot(self):
        kinds = (("zero", 4),)
        chosen = select(self.LOGITS, 2, zero_expert_kinds=kinds, num_expert_group=3, topk_group=1)
        assert chosen.topk_ids_TK.tolist() == [[0, 1]]
        chosen = select(self.LOGITS, 3, zero_expert_kinds=kinds, num_expert_group=3, topk_group=2)
        assert chosen.topk_ids_TK.tolist() == [[0, 5, 4]]

    def test_by_two_best_slots_with_a_bias(self):
        kwargs = {"zero_expert_kinds": (("zero", 4),), "num_expert_group": 3, "topk_group": 1}
        chosen = select(self.LOGITS, 2, e_score_correction_bias=torch.zeros(2), **kwargs)
        assert chosen.topk_ids_TK.tolist() == [[2, 3]]  # 0.39 > 0.31 and 0.30
        chosen = select(self.LOGITS, 2, e_score_correction_bias=torch.tensor([0.0, 0.09]), **kwargs)
        assert chosen.topk_ids_TK.tolist() == [[0, 1]]  # 0.40 now
        close(chosen.topk_weights_TK, [[0.3, 0.01]])

    def test_equal_groups_go_to_the_lower_one(self):
        chosen = select([0.0] * 6, 2, zero_expert_kinds=(("zero", 4),), num_expert_group=3, topk_group=1)
        assert chosen.topk_ids_TK.tolist() == [[0, 1]]


class TestRenormalize:
    """Slots 0 and 1 are FFN experts, 2 is an identity, 3 is a null; weights 0.1 to 0.4."""

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            ("none", [0.4, 0.3, 0.2]),
            (False, [0.4, 0.3, 0.2]),
            ("all", [4 / 9, 3 / 9, 2 / 9]),
            (True, [4 / 9, 3 / 9, 2 / 9]),
            ("real", [0.0, 0.0, 1.0]),
            ("nonnull", [0.0, 0.6, 0.4]),
        ],
    )
    def test_modes(self, mode, expected):
        close(select(LN, 3, renormalize=mode).topk_weights_TK, [expected])
        scaled = select(LN, 3, renormalize=mode, routed_scaling_factor=6.0)
        close(scaled.topk_weights_TK, [[6 * v for v in expected]])

    def test_aliases(self):
        kinds = (("copy", 1), ("null", 1))
        close(select(LN, 3, renormalize="nonnull", zero_expert_kinds=kinds).topk_weights_TK, [[0.0, 0.6, 0.4]])

    def test_nothing_left(self):
        close(select(LN, 2, renormalize="real").topk_weights_TK, [[0.0, 0.0]])
        close(select(LN, 1, renormalize="nonnull").topk_weights_TK, [[0.0]])
        underflow = select([-2000.0, -3000.0, -2000.0, -2000.0], 2, renormalize="all", scoring_func="sigmoid")
        close(underflow.topk_weights_TK, [[0.0, 0.0]])

    def test_unknown(self):
        with pytest.raises(ValueError, match="renormalize"):
            select(LN, renormalize="some")


class TestExperts:
    X = torch.tensor([[1.0, 2.0]])
    W13 = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [1.0, 1.0]]])  # I = 1: gate row, up row
    W2 = torch.tensor([[[1.0], [-1.0]], [[5.0], [5.0]]])

    def run(self, weights, ids, kinds=(), x=X, **kwargs):
        return reference.experts(
            x,
            self.W13,
            self.W2,
            torch.tensor([weights]),
            torch.tensor([ids]),
            num_experts=2,
            zero_expert_kinds=kinds,
            **kwargs,
        )

    def test_ffn(self):
        silu = 6 / (1 + math.exp(-1))  # gate 1, up 6; the gate of expert 1 is 0
        close(self.run([1.0], [0]), [[silu, -silu]])
        close(self.run([0.5, 2.0], [0, 1]), [[silu / 2, -silu / 2]])

    def test_activations(self):
        gelu = 6 * 0.5 * (1 + math.erf(1 / math.sqrt(2)))
        tanh = 6 * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))
        close(self.run([1.0], [0], activation="gelu"), [[gelu, -gelu]])
        close(self.run([1.0], [0], activation="gelu_tanh"), [[tanh, -tanh]])
        with pytest.raises(ValueError, match="activation"):
            self.run([1.0], [0], activation="relu")

    def test_kinds_in_id_order(self):
        kinds = (
            ("scaled_identity", 1),
            ("constant", 1),
            ("null", 1),
            ("copy", 1),
            ("constant", 1),
            ("scaled_identity", 1),
        )
        params = SimpleNamespace(
            constant_router=torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, math.log(2.0)]]]),
            constant_value=torch.tensor([[8.0, 0.0], [0.0, 10.0]]),
            scale=torch.tensor([3.0, -1.0]),
        )
        expected = {
            2: [3.0, 6.0],
            3: [0.75 * 1 + 0.25 * 8, 0.75 * 2],  # softmax of (ln 3, 0)
            4: [0.0, 0.0],
            5: [1.0, 2.0],
            6: [0.2 * 1, 0.2 * 2 + 0.8 * 10],  # softmax of (0, 2 ln 2)
            7: [-1.0, -2.0],
        }
        for slot, value in expected.items():
            close(self.run([1.0], [slot], kinds, affine_params=params), [value], 1e-6)
        both = self.run([0.5, 2.0], [3, 7], kinds, affine_params=params)
        close(both, [[0.5 * expected[3][0] - 2.0, 0.5 * expected[3][1] - 4.0]], 1e-6)

    def test_one_string_is_the_kind_of_all(self):
        close(self.run([1.0, 0.5], [2, 9], "identity"), [[1.5, 3.0]])
        close(self.run([1.0, 0.5], [2, 9], "null"), [[0.0, 0.0]])

    def test_skipped(self):
        close(self.run([math.nan, 2.0], [-1, 2], "identity"), [[2.0, 4.0]])
        close(self.run([1.0, 1.0], [-1, -1]), [[0.0, 0.0]])

    def test_other_ids(self):
        for slot in (-2, -3, 3):
            with pytest.raises(ValueError, match="topk_ids"):
                self.run([1.0], [slot], (("identity", 1),))

    def test_nan(self):
        nan_x = torch.tensor([[1.0, math.nan]])
        for ids, kinds in (([0], ()), ([2], "identity"), ([2], "zero"), ([-1], ())):
            assert self.run([1.0], ids, kinds, x=nan_x).isnan().all()
        assert self.run([math.nan], [2], "zero").isnan().all()

    def test_shared_experts(self):
        silu = 6 / (1 + math.exp(-1))
        close(reference.shared_experts(self.X, self.W13[0], self.W2[0]), [[silu, -silu]])
        gate = torch.tensor([0.0, math.log(3.0) / 2])
        close(reference.shared_experts(self.X, self.W13[0], self.W2[0], gate), [[0.75 * silu, -0.75 * silu]], 1e-6)

    def test_own_dtype(self):
        assert self.run([1.0], [0], dtype=torch.bfloat16).dtype == torch.bfloat16


class TestBalance:
    def test_longcat_group_loss(self):
        # E = 4 in D = 2 groups, Z = 1, K = 2, K_e = 1.5, scores 0.1 0.2 0.3 0.4 0 and 0.2 each
        logits = torch.tensor([[*LN, -math.inf], [0.0] * 5], dtype=torch.float64)
        ids = torch.tensor([[2, 3], [0, 4]])
        # group 0: chosen by 1 token, P (0.3 + 0.4)/2; group 1: by 1, (0.7 + 0.4)/2; zero: by 1, (0 + 0.2)/2
        expected = 2 / (1.5 * 2) * 0.35 + 2 / (1.5 * 2) * 0.55 + 1 / (0.5 * 2) * 0.1
        result = reference.longcat_group_loss(logits, ids, num_experts=4, expected_ffn=1.5, num_groups=2)
        close(result, expected)
        masked = reference.longcat_group_loss(
            logits, ids, num_experts=4, expected_ffn=1.5, num_groups=2, mask_T=torch.tensor([False, True])
        )
        close(masked, 2 / 1.5 * 0.4 + 1 / 0.5 * 0.2)

    def test_longcat_group_loss_with_sigmoid_scores_sums_to_one(self):
        logits = torch.tensor([[0.0, math.log(3), -math.log(3)]], dtype=torch.float64)  # 0.5, 0.75, 0.25 over 1.5
        result = reference.longcat_group_loss(
            logits, torch.tensor([[1, 2]]), num_experts=2, expected_ffn=1.0, scoring_func="sigmoid"
        )
        close(result, 2 / 1 * 0.5 + 1 / 1 * (0.25 / 1.5))

    def test_longcat_bias_update(self):
        ids = torch.tensor([[0, 2], [0, 1], [0, 3]])
        result = reference.longcat_bias_update(ids, num_experts=3, num_slots=5, expected_ffn=1.5, rate=0.1)
        close(result, [0.1 * (0.25 - 0.5), 0.1 * (0.25 - 1 / 6), 0.1 * (0.25 - 1 / 6), 0.0, 0.0])
        masked = reference.longcat_bias_update(
            ids, num_experts=3, num_slots=5, expected_ffn=1.5, rate=0.1, mask_T=torch.tensor([False, True, False])
        )
        close(masked, [0.1 * (0.25 - 0.5), 0.1 * (0.25 - 0.5), 0.1 * 0.25, 0.0, 0.0])
