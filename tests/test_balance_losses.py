"""Every balance loss and the DeepSeek controller against their formulas, stated again here as loops in float64.

The formulas: docs/specification.md, "Balance losses" and "Selection-bias controllers".

Nothing of zemoe is used in the restatements: scores, counts and sums are written out, so that they can't share a fault.
E FFN experts, Z zero-computation experts, A slots, K choices, T tokens.
"""

from __future__ import annotations

import math

import pytest
import torch

from zemoe import Routing, select_experts
from zemoe.balance import (
    adamoe_balance_loss,
    longcat_balance_loss,
    merge,
    moe_plus_plus_balance_loss,
    router_z_loss,
    slot_counts,
    switch_balance_loss,
    update_deepseek_bias_,
    update_longcat_bias_,
    zeda_balance_loss,
)

E, Z, K, T = 6, 4, 3, 17
A = E + Z
TAU, W, KE = 0.4, 0.7, 2.25


# ------------------------------------------------------------------------------------------------- the formulas


def score(logit: torch.Tensor, name: str) -> torch.Tensor:
    if name == "sigmoid":
        return 1 / (1 + torch.exp(-logit))
    if name == "sqrtsoftplus":
        return torch.log1p(torch.exp(logit)) ** 0.5
    return torch.exp(logit)  # the softmax's numerator: P is normalised anyway


def parts(logits, ids, scoring, mask):
    """(T', P_i as scalars with a graph, n_i as numbers) over the tokens that count."""
    tokens = [t for t in range(len(ids)) if mask is None or mask[t]]
    slots = logits.shape[1]
    P, n = [torch.zeros((), dtype=torch.float64)] * slots, [0] * slots
    for t in tokens:
        row = [score(logits[t, i].double(), scoring) for i in range(slots)]
        total = sum(row)
        P = [P[i] + row[i] / total / len(tokens) for i in range(slots)]
        for slot in ids[t].tolist():
            n[slot] += 1
    return len(tokens), P, n


def switch(logits, ids, experts, scoring, mask):
    count, P, n = parts(logits, ids, scoring, mask)
    return sum(len(P) * n[i] / (ids.shape[1] * count) * P[i] for i in range(len(P)))


def moe_plus_plus(logits, ids, experts, scoring, mask):
    count, P, n = parts(logits, ids, scoring, mask)
    eta = [1.0 if i < experts else TAU for i in range(len(P))]
    return sum(eta[i] * n[i] / (ids.shape[1] * count) * P[i] for i in range(len(P)))


def adamoe(logits, ids, experts, scoring, mask):
    count, P, n = parts(logits, ids, scoring, mask)
    f = [m / (ids.shape[1] * count) for m in n]
    null = list(range(experts, len(P)))
    loss = sum(f[i] * P[i] for i in range(experts))
    for i in null:
        loss = loss + sum(f[j] for j in null) / len(null) * P[i]
    return len(P) * loss


def zeda(logits, ids, experts, scoring, mask):
    count, P, n = parts(logits, ids, scoring, mask)
    null = len(P) - experts
    loss = sum(n[:experts]) / count * sum(P[:experts]) / experts
    if null:
        loss = loss + sum(n[experts:]) / count * sum(P[experts:]) / (W * null)
    return (experts + W * null) / ids.shape[1] * loss


def longcat(logits, ids, experts, scoring, mask):
    count, P, _ = parts(logits, ids, scoring, mask)
    tokens = [t for t in range(len(ids)) if mask is None or mask[t]]
    loss = 0
    for first in range(0, experts, 2):  # D = E / 2 groups of two
        pair = (first, first + 1)
        hits = sum(any(slot in pair for slot in ids[t].tolist()) for t in tokens)
        loss = loss + (experts // 2) / (KE * count) * hits * (P[first] + P[first + 1])
    if len(P) > experts:
        hits = sum(any(slot >= experts for slot in ids[t].tolist()) for t in tokens)
        loss = loss + hits / ((ids.shape[1] - KE) * count) * sum(P[experts:])
    return loss


def z_loss(logits, ids, experts, scoring, mask):
    tokens = [t for t in range(len(logits)) if mask is None or mask[t]]
    return sum(torch.log(sum(torch.exp(v) for v in logits[t].double())) ** 2 for t in tokens) / len(tokens)


LOSSES = {
    "switch": (switch, switch_balance_loss, {}),
    "moe++": (moe_plus_plus, moe_plus_plus_balance_loss, {"tau": TAU}),
    "adamoe": (adamoe, adamoe_balance_loss, {}),
    "zeda": (zeda, zeda_balance_loss, {"zero_weight": W}),
    "longcat": (longcat, longcat_balance_loss, {"ffn_experts_per_token": KE}),
}
SCORINGS = ["softmax", "sigmoid", "sqrtsoftplus"]


def routing_of(seed: int = 0, slots: int = A, scoring: str = "softmax", tokens: int = T) -> Routing:
    """Slot 1 is never chosen, and the others unevenly."""
    logits = torch.randn(tokens, slots, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[:, 1] -= 20
    logits[:, 2] += 1
    return Routing(logits, *select_experts(logits, K, num_experts=min(E, slots), scoring_func=scoring))


def call(name, routing, scoring="softmax", mask=None, experts=E, **change):
    """Our loss; LongCat's with groups of two."""
    _, ours, extra = LOSSES[name]
    if name == "longcat":
        extra = {**extra, "num_groups": experts // 2}
    return ours(routing, num_experts=experts, scoring_func=scoring, mask_T=mask, **{**extra, **change})


def mask_of(tokens: int = T) -> torch.Tensor:
    return torch.arange(tokens) % 3 != 1


class TestLosses:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("scoring", SCORINGS)
    @pytest.mark.parametrize("name", LOSSES)
    def test_value_and_gradient(self, name, scoring, masked):
        routing, mask = routing_of(scoring=scoring), mask_of() if masked else None
        grads, values = [], []
        for ours in (True, False):
            logits = routing.logits_TA.clone().requires_grad_()
            if ours:
                loss = call(name, routing._replace(logits_TA=logits), scoring, mask)
            else:
                loss = LOSSES[name][0](logits, routing.topk_ids_TK, E, scoring, mask)
            assert loss.shape == () and loss.dtype == torch.float64
            (grad,) = torch.autograd.grad(loss, logits)
            values.append(loss.detach())
            grads.append(grad)
        torch.testing.assert_close(*values, rtol=1e-12, atol=0)
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-14)
        assert grads[1].abs().sum() > 1e-3

    @pytest.mark.parametrize("name", LOSSES)
    def test_in_float32(self, name):
        routing = routing_of()
        exact = LOSSES[name][0](routing.logits_TA.float(), routing.topk_ids_TK, E, "softmax", None)
        loss = call(name, routing._replace(logits_TA=routing.logits_TA.float()))
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-6)

    @pytest.mark.parametrize("scoring", SCORINGS)
    @pytest.mark.parametrize("name", LOSSES)
    def test_gradcheck(self, name, scoring):
        routing = routing_of(tokens=4, scoring=scoring)
        logits = routing.logits_TA.clone().requires_grad_()
        mask = torch.tensor([True, True, False, True])
        assert torch.autograd.gradcheck(lambda x: call(name, routing._replace(logits_TA=x), scoring, mask), logits)

    @pytest.mark.parametrize("name", LOSSES)
    def test_no_zero_experts(self, name):
        routing = routing_of(slots=E)
        exact = LOSSES[name][0](routing.logits_TA, routing.topk_ids_TK, E, "softmax", None)
        assert call(name, routing).item() == pytest.approx(exact.item(), rel=1e-12)

    @pytest.mark.parametrize("first", [0, E], ids=["only FFN choices", "only zero choices"])
    @pytest.mark.parametrize("name", LOSSES)
    def test_all_choices_of_one_sort(self, name, first):
        routing = routing_of()
        ids = first + torch.arange(T * K).view(T, K) % Z
        logits = routing.logits_TA.clone().requires_grad_()
        exact = LOSSES[name][0](routing.logits_TA, ids, E, "softmax", None)
        loss = call(name, Routing(logits, routing.topk_weights_TK, ids))
        assert loss.item() == pytest.approx(exact.item(), rel=1e-12)
        loss.backward()
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize("name", LOSSES)
    def test_a_masked_slot(self, name):
        """A logit of -inf has probability 0, and no NaN in its gradient."""
        routing = routing_of()
        logits = routing.logits_TA.clone()
        logits[:, 1] = -math.inf  # the slot that is never chosen
        exact = LOSSES[name][0](logits, routing.topk_ids_TK, E, "softmax", None)
        logits.requires_grad_()
        loss = call(name, routing._replace(logits_TA=logits))
        assert loss.item() == pytest.approx(exact.item(), rel=1e-12)
        loss.backward()
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
    @pytest.mark.parametrize("name", LOSSES)
    def test_scores_that_all_underflow(self, name, scoring):
        """A token whose scores are all 0 has no share in P, and makes no NaN."""
        routing = routing_of(scoring=scoring)
        logits = routing.logits_TA.clone()
        logits[3] = -2000.0
        logits.requires_grad_()
        loss = call(name, routing._replace(logits_TA=logits), scoring)
        loss.backward()
        assert 0 < loss.item() < math.inf and logits.grad.isfinite().all() and (logits.grad[3] == 0).all()

    @pytest.mark.parametrize("name", LOSSES)
    def test_padding_may_hold_anything(self, name):
        routing, mask = routing_of(), mask_of()
        expected = call(name, routing, mask=mask).item()
        for rubbish in (math.nan, math.inf, -math.inf, 1e300):
            logits = routing.logits_TA.clone()
            logits[~mask] = rubbish
            logits.requires_grad_()
            loss = call(name, routing._replace(logits_TA=logits), mask=mask)
            loss.backward()
            assert loss.item() == expected
            assert logits.grad.isfinite().all() and (logits.grad[~mask] == 0).all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("name", LOSSES)
    def test_a_lost_token_that_counts_is_not_hidden(self, name, bad):
        routing = routing_of()
        logits = routing.logits_TA.clone()
        logits[3, 2] = bad
        assert call(name, routing._replace(logits_TA=logits)).isnan()

    @pytest.mark.parametrize("name", LOSSES)
    def test_no_token_counts(self, name):
        assert call(name, routing_of(), mask=torch.zeros(T, dtype=torch.bool)).item() == 0
        empty = Routing(torch.zeros(0, A), torch.zeros(0, K), torch.zeros(0, K, dtype=torch.int64))
        assert call(name, empty).item() == 0

    @pytest.mark.parametrize("name", LOSSES)
    def test_frequencies_carry_no_gradient(self, name):
        """Weights may be part of the graph; how often a slot is chosen is a constant."""
        routing = routing_of()
        weights = routing.topk_weights_TK.clone().requires_grad_()
        logits = routing.logits_TA.clone().requires_grad_()
        loss = call(name, Routing(logits, weights, routing.topk_ids_TK))
        assert torch.autograd.grad(loss, [logits, weights], allow_unused=True)[1] is None

    def test_switch_is_one_where_all_is_even(self):
        ids = torch.arange(A * 3).view(-1, 3) % A
        routing = Routing(torch.zeros(len(ids), A), torch.zeros(len(ids), 3), ids)
        assert switch_balance_loss(routing, num_experts=E).item() == pytest.approx(1.0)

    @pytest.mark.parametrize("masked", [False, True])
    def test_merged_micro_batches(self, masked):
        """The loss of merged micro-batches is that of the whole batch, which the mean of theirs is not."""
        whole = routing_of()
        pieces = [Routing(*(tensor[part] for tensor in whole)) for part in (slice(0, 5), slice(5, 6), slice(6, T))]
        mask = mask_of() if masked else None
        assert call("switch", merge(pieces), mask=mask).item() == call("switch", whole, mask=mask).item()
        mean = sum(call("switch", piece).item() * len(piece.logits_TA) for piece in pieces) / T
        assert abs(mean - call("switch", whole).item()) > 1e-3

    def test_merge_refuses_other_layers(self):
        with pytest.raises(ValueError, match=r"routings.*6, 3.*10, 3"):
            merge([routing_of(), routing_of(slots=E)])
        with pytest.raises(ValueError, match=r"routings.*\[\]"):
            merge([])


class TestZLoss:
    @pytest.mark.parametrize("masked", [False, True])
    def test_value_and_gradient(self, masked):
        routing, mask = routing_of(), mask_of() if masked else None
        logits, again = (routing.logits_TA.clone().requires_grad_() for _ in range(2))
        loss = router_z_loss(routing._replace(logits_TA=logits), mask_T=mask)
        exact = z_loss(again, None, None, None, mask)
        torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
        grads = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(exact, again)[0]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)

    def test_gradcheck(self):
        routing = routing_of(tokens=4)
        logits = routing.logits_TA.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: router_z_loss(routing._replace(logits_TA=x)), logits)

    def test_edges(self):
        routing, mask = routing_of(), mask_of()
        expected = router_z_loss(routing, mask_T=mask).item()
        for rubbish in (math.nan, math.inf, -math.inf):
            logits = routing.logits_TA.clone()
            logits[~mask] = rubbish
            logits.requires_grad_()
            loss = router_z_loss(routing._replace(logits_TA=logits), mask_T=mask)
            loss.backward()
            assert loss.item() == expected and (logits.grad[~mask] == 0).all()
        logits = routing.logits_TA.clone()
        logits[2, 2] = math.nan
        assert router_z_loss(routing._replace(logits_TA=logits)).isnan()
        assert router_z_loss(routing, mask_T=torch.zeros(T, dtype=torch.bool)).item() == 0
        with pytest.raises(ValueError, match="mask_T"):
            router_z_loss(routing, mask_T=torch.ones(3, dtype=torch.bool))


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"num_experts": 0}, ["num_experts", "0"]),
            ({"num_experts": A + 1}, ["num_experts", "11", "10"]),
            ({"num_experts": True}, ["num_experts", "True"]),
            ({"scoring_func": "relu"}, ["scoring_func", "relu"]),
            ({"mask_T": torch.ones(T)}, ["mask_T", "float32"]),
            ({"mask_T": torch.ones(T + 1, dtype=torch.bool)}, ["mask_T", "18", "17"]),
        ],
    )
    @pytest.mark.parametrize("name", LOSSES)
    def test_common(self, name, change, words):
        _, ours, extra = LOSSES[name]
        with pytest.raises(ValueError) as error:
            ours(routing_of(), **{"num_experts": E, **extra, **change})
        assert all(word in str(error.value) for word in words), str(error.value)

    @pytest.mark.parametrize("bad", [0, -1.0, math.inf, math.nan, True, "1"])
    def test_weights(self, bad):
        with pytest.raises(ValueError, match=f"tau.*{bad!r}"):
            moe_plus_plus_balance_loss(routing_of(), num_experts=E, tau=bad)
        with pytest.raises(ValueError, match=f"zero_weight.*{bad!r}"):
            zeda_balance_loss(routing_of(), num_experts=E, zero_weight=bad)


class TestDeepseekBias:
    @pytest.mark.parametrize("length", [E, A])
    def test_against_a_loop(self, length):
        counts = slot_counts(routing_of().topk_ids_TK, A)
        counts[3] = (counts[:3].sum() + counts[4:E].sum()) // (E - 1)
        counts[4] += counts[:E].sum()  # very busy
        bias = torch.randn(length, generator=torch.Generator().manual_seed(1))
        before, n = bias.tolist(), counts.tolist()
        update_deepseek_bias_(bias, counts, num_experts=E, rate=0.25)
        mean = sum(n[:E]) / E
        for i in range(length):
            step = 0.25 * ((mean > n[i]) - (mean < n[i])) if i < E else 0.0
            assert bias[i].item() == pytest.approx(before[i] + step, abs=1e-6), i

    def test_a_load_that_is_the_mean_stays(self):
        bias = torch.zeros(E)
        update_deepseek_bias_(bias, torch.tensor([7, 7, 7, 7, 6, 8, 100, 0, 0, 0]), num_experts=E, rate=1.0)
        assert bias.tolist() == [0, 0, 0, 0, 1, -1]
        update_deepseek_bias_(bias, torch.zeros(A, dtype=torch.int64), num_experts=E, rate=1.0)
        assert bias.tolist() == [0, 0, 0, 0, 1, -1]

    def test_it_spreads_the_load(self):
        generator = torch.Generator().manual_seed(0)
        offset, bias = torch.linspace(1, -1, A), torch.zeros(A)
        for _ in range(300):
            logits = offset + torch.randn(200, A, generator=generator)
            ids = select_experts(logits, K, num_experts=E, e_score_correction_bias=bias)[1]
            counts = slot_counts(ids, A)[:E].float()
            update_deepseek_bias_(bias, slot_counts(ids, A), num_experts=E, rate=0.003)
        assert counts.std() / counts.mean() < 0.25
        assert (bias[E:] == 0).all()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"e_score_correction_bias": torch.zeros(9)}, ["e_score_correction_bias", "6", "10", "9"]),
            ({"e_score_correction_bias": torch.zeros(2, A)}, ["e_score_correction_bias", "2, 10"]),
            ({"counts_A": torch.zeros(5)}, ["counts_A", "6", "5"]),
            ({"counts_A": torch.zeros(2, A)}, ["counts_A", "2, 10"]),
            ({"num_experts": 0}, ["num_experts", "0"]),
            ({"rate": math.nan}, ["rate", "nan"]),
            ({"rate": -1.0}, ["rate", "-1.0"]),
        ],
    )
    @pytest.mark.parametrize("update", [update_deepseek_bias_, update_longcat_bias_])
    def test_refused(self, update, change, words):
        bias = torch.zeros(A)
        arguments = {
            "e_score_correction_bias": bias,
            "counts_A": torch.ones(A, dtype=torch.int64),
            "num_experts": E,
            "rate": 0.1,
        }
        if update is update_longcat_bias_:
            arguments |= {"top_k": K, "ffn_experts_per_token": 2.0}
        with pytest.raises(ValueError) as error:
            update(**{**arguments, **change})
        assert all(word in str(error.value) for word in words), str(error.value)
        assert (bias == 0).all()

    def test_a_budget_that_cannot_be(self):
        for bad in (0, K + 0.5):
            with pytest.raises(ValueError, match=rf"ffn_experts_per_token.*{bad}"):
                update_longcat_bias_(
                    torch.zeros(A), torch.ones(A), num_experts=E, top_k=K, ffn_experts_per_token=bad, rate=0.1
                )
