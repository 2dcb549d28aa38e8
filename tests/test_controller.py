"""BudgetController: the budget is reached at any batch size and any scale of the scores, however a batch is cut up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.ranks import as_rank
from zemoe import Routing, reference, select_experts
from zemoe.balance import update_longcat_bias_
from zemoe.controller import BudgetController

LAYER = ("layer", 0)


def routed(logits: torch.Tensor, bias: torch.Tensor, E: int, K: int, scoring: str = "softmax") -> Routing:
    chosen = select_experts(logits, K, num_experts=E, scoring_func=scoring, e_score_correction_bias=bias)
    return Routing(logits, *chosen)


def ffn_mean(routing: Routing, E: int) -> float:
    return (routing.topk_ids_TK < E).sum(1).double().mean().item()


def draw(T: int, A: int, spread: float, seed: int = 0) -> torch.Tensor:
    """Logits of slots with means of their own, as a router has them."""
    generator = torch.Generator().manual_seed(seed)
    return spread * (torch.randn(T, A, generator=generator) + torch.randn(A, generator=generator))


class TestOneStep:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        sizes=st.sampled_from([(16, 8, 6), (64, 32, 12), (4, 1, 2), (2, 6, 4), (8, 8, 1), (3, 9, 5)]),
        share=st.floats(0.1, 0.9),
        spread=st.sampled_from([1e-4, 1e-2, 1.0, 2.0]),
        scoring=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
        seed=st.integers(0, 1000),
    )
    def test_the_shift_is_the_one_at_which_this_batch_meets_the_budget(self, sizes, share, spread, scoring, seed):
        E, Z, K = sizes
        least, most = max(0, K - Z), min(K, E)
        K_e = least + share * (most - least)
        logits, bias = draw(1500, E + Z, spread, seed), torch.zeros(E + Z)
        even = BudgetController(E, K_e, rate=1.0, scoring_func=scoring)
        even.add({LAYER: routed(logits, bias, E, K, scoring)}, {"layer": bias})
        even.update_({"layer": bias})
        shift = bias[:E].mean()  # the evening moves no mean
        after = routed(logits, torch.full((E,), shift.item()), E, K, scoring)
        # Scores that lie within 1e-5 of each other have few values in float32: many tokens change at the same shift.
        assert ffn_mean(after, E) == pytest.approx(K_e, abs=0.03 if spread > 1e-3 else 0.1)
        assert torch.equal(bias[E:], torch.zeros(Z))

    def test_against_a_search_in_float64(self):
        E, K, K_e = 6, 4, 2.3
        logits, bias = draw(101, 10, 0.7), torch.zeros(10)
        controller = BudgetController(E, K_e, rate=1.0)
        controller.add({LAYER: routed(logits, bias, E, K)}, {"layer": bias})
        controller.update_({"layer": bias})
        low, high = -1.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            shift_E = torch.full((E,), middle, dtype=torch.float64)
            chosen = reference.select(
                logits, K, num_experts=E, zero_expert_kinds="zero", e_score_correction_bias=shift_E
            )
            used = (chosen.topk_ids_TK < E).sum().item()
            low, high = (middle, high) if used < K_e * len(logits) else (low, middle)
        assert bias[:E].mean().item() == pytest.approx(low, rel=0.05)

    def test_load_is_evened_out_by_the_measured_gap(self):
        """Expert 0's logit is always a little higher: its bias falls, the others' rise, the mean meets the budget."""
        E, K = 8, 4
        logits, bias = draw(2000, 12, 0.05, seed=3), torch.zeros(12)
        logits[:, 0] += 0.1
        loads = []
        for _ in range(30):
            routing = routed(logits, bias, E, K)
            counts = torch.bincount(routing.topk_ids_TK.reshape(-1), minlength=12)[:E].double()
            loads.append((counts.max() / counts.mean()).item())
            controller = BudgetController(E, 2.5)
            controller.add({LAYER: routing}, {"layer": bias})
            controller.update_({"layer": bias})
        assert loads[0] > 1.4 and loads[-1] < 1.05
        assert ffn_mean(routed(logits, bias, E, K), E) == pytest.approx(2.5, abs=0.02)

    def test_without_zero_experts_loads_are_evened_out(self):
        E, K = 8, 2
        logits, bias = draw(2000, E, 1.0, seed=5), torch.zeros(E)
        for _ in range(90):
            routing = routed(logits, bias, E, K)
            controller = BudgetController(E, K)
            controller.add({LAYER: routing}, {"layer": bias})
            controller.update_({"layer": bias})
        counts = torch.bincount(routing.topk_ids_TK.reshape(-1), minlength=E).double()
        assert (counts.max() / counts.mean()).item() < 1.05

    def test_equal_logits_move_something(self):
        """All scores tie, so the lower ids, FFN experts, get every choice; any shift down changes that."""
        bias = torch.zeros(12)
        controller = BudgetController(8, 2.0)
        controller.add({LAYER: routed(torch.zeros(50, 12), bias, 8, 4)}, {"layer": bias})
        controller.update_({"layer": bias})
        assert bias.isfinite().all() and (bias[:8] != 0).any()


class TestWhatCounts:
    def measured(self, parts: list[torch.Tensor], **masks) -> torch.Tensor:
        bias = torch.linspace(-0.01, 0.01, 8)
        controller = BudgetController(8, 2.5)
        for part in parts:
            controller.add({LAYER: routed(part, bias, 8, 4)}, {"layer": bias}, **masks)
        controller.update_({"layer": bias})
        return bias

    def test_how_a_batch_is_cut_up_does_not_matter(self):
        logits = draw(100, 12, 1.0)
        assert torch.allclose(self.measured([logits]), self.measured(list(logits.split(7))), rtol=1e-6, atol=0)

    def test_padding_may_hold_anything(self):
        logits = draw(30, 12, 1.0)
        for padding in (0.0, math.nan, math.inf, -math.inf):
            padded = torch.cat([logits, torch.full((9, 12), padding)])
            assert torch.equal(self.measured([padded], masks=torch.arange(39) < 30), self.measured([logits]))

    def test_a_broken_token_or_a_skipped_choice_does_not_count(self):
        logits = draw(30, 12, 1.0)
        assert torch.equal(self.measured([torch.cat([logits, torch.full((1, 12), math.nan)])]), self.measured([logits]))
        bias = torch.zeros(12)
        skipped = routed(logits, bias, 8, 4)
        skipped.topk_ids_TK[::2] = -1
        half, whole = torch.zeros(12), torch.zeros(12)
        for routing, moved in ((skipped, half), (routed(logits[1::2], bias, 8, 4), whole)):
            controller = BudgetController(8, 2.5)
            controller.add({LAYER: routing}, {"layer": bias})
            controller.update_({"layer": moved})
        assert torch.equal(half, whole) and (whole != 0).any()

    @pytest.mark.parametrize("tokens", [0, 20])
    def test_where_no_token_counts_nothing_moves(self, tokens):
        bias = torch.linspace(-0.01, 0.01, 8)
        assert torch.equal(self.measured([draw(tokens, 12, 1.0)], masks=torch.zeros(tokens, dtype=torch.bool)), bias)

    def test_masked_slots_are_never_reached(self):
        """Half of the tokens may use no FFN expert at all; the rest can't make up for it, and the bias stays finite."""
        logits, bias = draw(64, 12, 1.0), torch.zeros(12)
        logits[::2, :8] = -math.inf
        for _ in range(20):
            controller = BudgetController(8, 3.0)
            controller.add({LAYER: routed(logits, bias, 8, 4)}, {"layer": bias})
            controller.update_({"layer": bias})
        assert bias.abs().max() < 2
        assert ffn_mean(routed(logits, bias, 8, 4), 8) == pytest.approx(2.0, abs=0.1)

    def test_clear_forgets(self):
        bias = torch.zeros(12)
        controller = BudgetController(8, 2.5)
        controller.add({LAYER: routed(draw(30, 12, 1.0), bias, 8, 4)}, {"layer": bias})
        controller.clear()
        controller.update_({"layer": bias})
        assert torch.equal(bias, torch.zeros(12))


class TestALoop:
    """A router that drifts, as it does in training: its scores grow and move towards FFN experts."""

    def run(self, move, T: int, spread: float, steps: int = 100) -> list[float]:
        bias, means, generator = torch.zeros(24), [], torch.Generator().manual_seed(1)
        drift = torch.randn(24, generator=generator)
        for step in range(steps):
            logits = spread * (1 + step / 40) * (torch.randn(T, 24, generator=generator) + drift)
            logits[:, :16] += spread * min(step, 60) / 30
            routing = routed(logits, bias, 16, 6)
            means.append(ffn_mean(routing, 16))
            move(routing, bias)
        return means

    @pytest.mark.parametrize("T", [64, 1024])
    @pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
    def test_settles_whatever_the_scale(self, T, spread):
        controller = BudgetController(16, 4.0)

        def move(routing, bias):
            controller.add({LAYER: routing}, {"layer": bias})
            controller.update_({"layer": bias})

        means = self.run(move, T, spread)
        assert sum(means[75:]) / 25 == pytest.approx(4.0, rel=0.05)
        assert max(abs(mean - 4.0) for mean in means[60:]) < 0.25 * 4.0

    def test_which_a_fixed_rate_does_not(self):
        """So the test above can fail: this rate suits a spread of 0.1, and is far too fast for one of 0.001."""

        def move(routing, bias):
            counts = torch.bincount(routing.topk_ids_TK.reshape(-1), minlength=24)
            update_longcat_bias_(bias, counts, num_experts=16, top_k=6, ffn_experts_per_token=4.0, rate=0.2)

        assert max(abs(mean - 4.0) for mean in self.run(move, 512, 0.1)[60:]) < 0.25 * 4.0
        assert max(abs(mean - 4.0) for mean in self.run(move, 512, 1e-3)[60:]) > 0.25 * 4.0


def _work(rank: int, folder: str) -> None:
    logits, bias = draw(100, 12, 1.0), torch.zeros(12)
    controller = BudgetController(8, 2.5)
    mine = logits[:80] if rank == 0 else logits[80:]  # uneven on purpose
    controller.add(
        {LAYER: routed(mine, bias, 8, 4), ("other", 0): routed(2 * mine, bias, 8, 4)}, dict.fromkeys(NAMES, bias)
    )
    controller.all_reduce_()
    biases = {name: torch.zeros(12) for name in NAMES}
    controller.update_(biases)
    torch.save(biases, f"{folder}/{rank}.pt")


def _rank(rank: int, folder: str) -> None:
    as_rank(rank, f"{folder}/meeting", _work, rank, folder)


NAMES = ("layer", "other")


def test_two_ranks_move_as_one(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2, join=True)
    logits, bias = draw(100, 12, 1.0), torch.zeros(12)
    controller = BudgetController(8, 2.5)
    controller.add(
        {LAYER: routed(logits, bias, 8, 4), ("other", 0): routed(2 * logits, bias, 8, 4)}, dict.fromkeys(NAMES, bias)
    )
    alone = {name: torch.zeros(12) for name in NAMES}
    controller.update_(alone)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], alone[name], rtol=1e-6, atol=0)


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 2.0), "num_experts"),
            ((8, 0), "ffn_experts_per_token"),
            ((8, 9.0), "ffn_experts_per_token.*at most num_experts=8.*9.0"),
            ((8, math.nan), "ffn_experts_per_token"),
            ((8, 2.0, -0.1), "rate must be .* 0 to 1, got -0.1"),
            ((8, 2.0, 1.5), "rate"),
            ((8, 2.0, 0.5, "hard"), "scoring_func"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            BudgetController(*arguments)

    @pytest.mark.parametrize(
        ("K_e", "bias", "message"),
        [
            (4.0, torch.zeros(12), "below K=4"),
            (2.0, torch.zeros(9), r"length E=8 or A=12, got \(9,\)"),
            (2.0, torch.zeros(12, dtype=torch.bfloat16), "float32.*bfloat16"),
            (2.0, None, "an entry for each layer"),
        ],
    )
    def test_what_does_not_fit_is_not_added(self, K_e, bias, message):
        controller, zeros = BudgetController(8, K_e), torch.zeros(12)
        seen = {LAYER: routed(draw(20, 12, 1.0), zeros, 8, 4)}
        with pytest.raises(ValueError, match=message):
            controller.add(seen, {} if bias is None else {"layer": bias})
        controller.update_({})

    def test_without_zero_experts_the_budget_is_all(self):
        with pytest.raises(ValueError, match="must be K=2 without zero experts, got 1"):
            BudgetController(8, 1).add(
                {LAYER: routed(draw(20, 8, 1.0), torch.zeros(8), 8, 2)}, {"layer": torch.zeros(8)}
            )

    def test_another_number_of_slots(self):
        controller, zeros = BudgetController(8, 2.0), torch.zeros(8)
        controller.add({LAYER: routed(draw(20, 12, 1.0), zeros, 8, 4)}, {"layer": zeros})
        with pytest.raises(ValueError, match="A=12 slots and K=4 choices as before, got A=13, K=4"):
            controller.add({LAYER: routed(draw(20, 13, 1.0), zeros, 8, 4)}, {"layer": zeros})
