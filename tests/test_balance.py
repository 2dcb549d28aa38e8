"""Balance losses, counts and the bias controller, against loops and against what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from helpers.judge import judge
from helpers.ranks import as_rank
from zemoe import MoE, MoEConfig, Routing, observe, reference, select_experts
from zemoe.balance import (
    ffn_experts_per_token,
    longcat_balance_loss,
    slot_counts,
    update_deepseek_bias_,
    update_longcat_bias_,
)
from zemoe.scores import SCORES

E, Z, K = 8, 4, 3
A = E + Z


def routing_of(T: int = 20, seed: int = 0, scoring_func: str = "softmax", slots: int = A) -> Routing:
    logits = torch.randn(T, slots, generator=torch.Generator().manual_seed(seed))
    return Routing(logits, *select_experts(logits, K, num_experts=E, scoring_func=scoring_func))


def mask_of(T: int = 20) -> torch.Tensor:
    return torch.arange(T) % 3 != 0


class TestCounts:
    @pytest.mark.parametrize("masked", [False, True])
    def test_against_a_loop(self, masked):
        routing, mask = routing_of(), mask_of() if masked else None
        counts = slot_counts(routing.topk_ids_TK, A, mask)
        expected = [0] * A
        for t, ids in enumerate(routing.topk_ids_TK.tolist()):
            for slot in ids:
                expected[slot] += mask is None or bool(mask[t])
        assert counts.tolist() == expected and counts.dtype == torch.int64

    def test_skipped_choices_and_no_tokens(self):
        assert slot_counts(torch.tensor([[-1, 2], [2, -1]]), 4).tolist() == [0, 0, 2, 0]
        assert slot_counts(torch.zeros(0, K, dtype=torch.int64), A).tolist() == [0] * A

    def test_a_mask_with_leading_dimensions(self):
        routing = routing_of()
        expected = slot_counts(routing.topk_ids_TK, A, mask_of())
        assert torch.equal(slot_counts(routing.topk_ids_TK, A, mask_of().view(4, 5)), expected)

    @pytest.mark.parametrize("mask", [torch.ones(20), torch.ones(20, dtype=torch.int64), mask_of(1), mask_of(10)])
    def test_a_mask_that_does_not_fit(self, mask):
        with pytest.raises(ValueError, match=r"mask_T must .* got"):
            slot_counts(routing_of().topk_ids_TK, A, mask)

    def test_an_id_beyond_the_slots_is_not_passed_over(self):
        with pytest.raises(RuntimeError, match="out of bounds"):
            slot_counts(torch.tensor([[4, 2]]), 4)

    def test_int32(self):
        routing = routing_of()
        assert torch.equal(slot_counts(routing.topk_ids_TK.int(), A), slot_counts(routing.topk_ids_TK, A))

    def test_ffn_experts_per_token(self):
        ids = torch.tensor([[0, 1, 9], [2, 8, 9], [8, 9, 10], [0, 1, 2]])
        assert ffn_experts_per_token(slot_counts(ids, A), E, K).item() == pytest.approx(6 / 4)


class TestLongcatLoss:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("groups", [None, 1, 4, 8])
    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    def test_against_the_reference(self, scoring_func, groups, masked):
        routing, mask = routing_of(scoring_func=scoring_func), mask_of() if masked else None
        kwargs = {"num_experts": E, "num_groups": groups, "scoring_func": scoring_func, "mask_T": mask}
        loss = longcat_balance_loss(routing, ffn_experts_per_token=2.25, **kwargs)
        exact, own = (
            reference.longcat_group_loss(
                routing.logits_TA, routing.topk_ids_TK, expected_ffn=2.25, dtype=dtype, **kwargs
            )
            for dtype in (torch.float64, torch.float32)
        )
        judge(loss, exact, own)

    def test_gradient(self):
        routing = routing_of()
        grads = []
        for dtype in (torch.float32, torch.float64, torch.float32):
            logits = routing.logits_TA.detach().to(dtype, copy=True).requires_grad_()
            if not grads:
                loss = longcat_balance_loss(
                    routing._replace(logits_TA=logits), num_experts=E, ffn_experts_per_token=2.0
                )
            else:
                loss = reference.longcat_group_loss(
                    logits, routing.topk_ids_TK, num_experts=E, expected_ffn=2.0, dtype=dtype
                )
            loss.backward()
            grads.append(logits.grad)
        judge(*grads)
        assert grads[1].abs().sum() > 0

    def test_descent_balances(self):
        """What it is for: routing that starts on few experts spreads out."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(400, 6, generator=generator)
        weight = (0.1 * torch.randn(A, 6, generator=generator)).requires_grad_()
        offset = torch.linspace(1, -1, A).requires_grad_()

        def counts():
            logits = x @ weight.T + offset
            return logits, select_experts(logits, K, num_experts=E)[1]

        before = slot_counts(counts()[1], A).float().std()
        optimizer = torch.optim.Adam([weight, offset], lr=0.05)
        for _ in range(60):
            logits, ids = counts()
            loss = longcat_balance_loss(Routing(logits, logits, ids), num_experts=E, ffn_experts_per_token=2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert slot_counts(counts()[1], A).float().std() < before / 3

    def test_perfect_balance_is_two(self):
        """Everyone at the wanted frequency: sum of f P is then the sum of P, times 1."""
        routing = Routing(torch.zeros(A * 2, A), torch.zeros(A * 2, 3), torch.arange(A * 2 * 3).view(-1, 3) % A)
        loss = longcat_balance_loss(routing, num_experts=E, ffn_experts_per_token=2.0)
        # f of an expert: E/(2 T) * (T 3/12) = 1; f of the zero experts: tokens that choose any, over T
        chosen = (routing.topk_ids_TK >= E).any(1).double().mean()
        assert loss.item() == pytest.approx(E / A + chosen * Z / A)

    def test_no_zero_experts(self):
        routing = routing_of(slots=E)
        kwargs = {"num_experts": E}
        loss = longcat_balance_loss(routing, ffn_experts_per_token=K, **kwargs)
        exact = reference.longcat_group_loss(routing.logits_TA, routing.topk_ids_TK, expected_ffn=K, **kwargs)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-6)

    def test_a_skipped_choice_counts_for_no_group(self):
        routing = routing_of()
        first_only = routing.topk_ids_TK.clone()
        first_only[:, 1:] = -1
        kwargs = {"num_experts": E, "ffn_experts_per_token": 2.0}
        found = longcat_balance_loss(routing._replace(topk_ids_TK=first_only), **kwargs)
        scores = routing.logits_TA.softmax(-1)
        counts = slot_counts(first_only, A).float()
        factor = torch.cat([counts[:E] * E / (2.0 * 20), counts[E:].sum().expand(Z) / ((K - 2.0) * 20)])
        assert found.item() == pytest.approx((factor * scores.mean(0)).sum().item(), rel=1e-5)

    def test_what_padding_holds_does_not_count(self):
        routing, mask = routing_of(), mask_of()
        expected = longcat_balance_loss(routing, num_experts=E, ffn_experts_per_token=2.0, mask_T=mask)
        for rubbish in (float("nan"), float("inf"), -float("inf"), 1e30):
            logits = routing.logits_TA.clone()
            logits[~mask] = rubbish
            logits.requires_grad_()
            loss = longcat_balance_loss(
                routing._replace(logits_TA=logits), num_experts=E, ffn_experts_per_token=2.0, mask_T=mask
            )
            assert loss.item() == expected.item()
            loss.backward()
            assert logits.grad.isfinite().all() and (logits.grad[~mask] == 0).all()

    def test_everything_padded(self):
        loss = longcat_balance_loss(
            routing_of(), num_experts=E, ffn_experts_per_token=2.0, mask_T=torch.zeros(20, dtype=torch.bool)
        )
        assert loss.item() == 0

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"num_groups": 3}, ["num_groups", "3", "8"]),
            ({"num_groups": 0}, ["num_groups", "0"]),
            ({"ffn_experts_per_token": 0}, ["ffn_experts_per_token", "0"]),
            ({"ffn_experts_per_token": 3}, ["ffn_experts_per_token", "3"]),
            ({"ffn_experts_per_token": 3.5}, ["ffn_experts_per_token", "3.5"]),
            ({"num_experts": 0}, ["num_experts", "0"]),
            ({"num_experts": 13}, ["num_experts", "13", "12"]),
            ({"scoring_func": "relu"}, ["scoring_func", "relu"]),
            ({"mask_T": torch.ones(19, dtype=torch.bool)}, ["mask_T", "19", "20"]),
        ],
    )
    def test_refused(self, change, parts):
        with pytest.raises(ValueError) as error:
            longcat_balance_loss(routing_of(), **{"num_experts": E, "ffn_experts_per_token": 2.0} | change)
        for part in parts:
            assert part in str(error.value), str(error.value)


class TestLongcatBias:
    @pytest.mark.parametrize("length", [E, A])
    def test_against_the_reference(self, length):
        ids = routing_of().topk_ids_TK
        bias = torch.randn(length, generator=torch.Generator().manual_seed(1))
        before = bias.double()
        update_longcat_bias_(bias, slot_counts(ids, A), num_experts=E, top_k=K, ffn_experts_per_token=2.0, rate=0.01)
        step = reference.longcat_bias_update(ids, num_experts=E, num_slots=A, expected_ffn=2.0, rate=0.01)
        torch.testing.assert_close(bias.double(), before + step[:length], rtol=1e-6, atol=1e-7)
        assert torch.equal(bias[E:].double(), before[E:])

    def test_it_steers(self):
        """K_e FFN experts a token are reached, evenly, from routing that prefers some."""
        generator = torch.Generator().manual_seed(0)
        offset, bias = torch.linspace(1, -1, A), torch.zeros(A)
        for wanted in (2.0, 1.0):
            for _ in range(400):
                logits = offset + torch.randn(300, A, generator=generator)
                ids = select_experts(logits, K, num_experts=E, e_score_correction_bias=bias)[1]
                counts = slot_counts(ids, A)
                update_longcat_bias_(bias, counts, num_experts=E, top_k=K, ffn_experts_per_token=wanted, rate=0.5)
            assert ffn_experts_per_token(counts, E, K).item() == pytest.approx(wanted, abs=0.15)
            assert counts[:E].float().std() / counts[:E].float().mean() < 0.3

    def test_in_place_and_without_a_graph(self):
        layer = MoE(
            MoEConfig(hidden_size=4, intermediate_size=4, num_experts=E, top_k=K, zero_expert_kinds=(("zero", Z),))
        )
        with observe(layer) as seen:
            layer(torch.randn(9, 4))
        (routing,) = seen.values()
        bias = layer.router.e_score_correction_bias
        counts = slot_counts(routing.topk_ids_TK, A)
        update_longcat_bias_(bias, counts, num_experts=E, top_k=K, ffn_experts_per_token=2.0, rate=0.1)
        assert layer.router.e_score_correction_bias is bias and bias[:E].abs().sum() > 0 and not bias.requires_grad

    def test_a_batch_in_which_no_token_counts_changes_nothing(self):
        bias = torch.randn(A, generator=torch.Generator().manual_seed(2))
        before, none = bias.clone(), slot_counts(routing_of(5).topk_ids_TK, A, mask_T=torch.zeros(5, dtype=torch.bool))
        update_longcat_bias_(bias, none, num_experts=E, top_k=K, ffn_experts_per_token=2.0, rate=0.1)
        assert torch.equal(bias, before)
        update_deepseek_bias_(bias, none, num_experts=E, rate=0.1)
        assert torch.equal(bias, before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
    def test_a_bias_without_room_for_small_steps_is_refused(self, dtype):
        bias, counts = torch.ones(A, dtype=dtype), torch.ones(A)
        with pytest.raises(ValueError, match=f"e_score_correction_bias must be float32.*{dtype}"):
            update_longcat_bias_(bias, counts, num_experts=E, top_k=K, ffn_experts_per_token=2.0, rate=0.1)
        with pytest.raises(ValueError, match=f"e_score_correction_bias must be float32.*{dtype}"):
            update_deepseek_bias_(bias, counts, num_experts=E, rate=0.1)
        assert (bias == 1).all()

    def test_refused(self):
        with pytest.raises(ValueError, match=r"e_score_correction_bias.*8.*12.*9"):
            update_longcat_bias_(
                torch.zeros(9), torch.ones(A), num_experts=E, top_k=K, ffn_experts_per_token=2.0, rate=0.1
            )


def _work(rank: int, folder: str) -> None:
    whole = routing_of(20)
    mine = Routing(*(tensor[:14] if rank == 0 else tensor[14:] for tensor in whole))  # uneven on purpose
    counts = slot_counts(mine.topk_ids_TK, A)
    loss = longcat_balance_loss(mine, num_experts=E, ffn_experts_per_token=2.0)
    torch.save((counts, loss), Path(folder) / f"{rank}.pt")


def _rank(rank: int, folder: str) -> None:
    as_rank(rank, f"{folder}/meeting", _work, rank, folder)


def test_two_ranks(tmp_path):
    """Counts are those of the global batch, and so are the frequencies in the loss; P is the rank's own."""
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2, join=True)
    whole = routing_of(20)
    (counts0, loss0), (counts1, loss1) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = slot_counts(whole.topk_ids_TK, A)
    assert torch.equal(counts0, expected) and torch.equal(counts1, expected)
    # The losses are linear in P, so that their mean over tokens is the loss of the whole batch.
    assert (14 * loss0 + 6 * loss1).item() / 20 == pytest.approx(
        longcat_balance_loss(whole, num_experts=E, ffn_experts_per_token=2.0).item(), rel=1e-5
    )
