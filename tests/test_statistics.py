"""Statistics of observed routing against loops; accumulation, data parallelism and activation checkpointing."""

from __future__ import annotations

import json
import math
import statistics as stdlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.ranks import as_rank
from zemoe import MoE, MoEConfig, Routing, observe
from zemoe.balance import (
    adamoe_balance_loss,
    longcat_balance_loss,
    merge,
    moe_plus_plus_balance_loss,
    slot_counts,
    switch_balance_loss,
    update_deepseek_bias_,
    update_longcat_bias_,
    zeda_balance_loss,
)
from zemoe.statistics import BiasTrajectory, RoutingTally, gradient_ratios, router_cosines

E, Z, K, H = 5, 3, 3, 8
A = E + Z
CONFIG = MoEConfig(hidden_size=H, intermediate_size=6, num_experts=E, top_k=K, zero_expert_kinds=(("identity", Z),))


class Model(nn.Module):
    """Two MoE layers and a head; `reentrant` is None without activation checkpointing."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([MoE(CONFIG, init_std=0.5) for _ in range(2)])
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
            x = x + y
        return x


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def fixed(ids, slots: int = A) -> Routing:
    ids = torch.tensor(ids)
    return Routing(torch.zeros(len(ids), slots), torch.zeros(ids.shape), ids)


class TestTally:
    def test_against_loops(self):
        model, mask = Model(), torch.arange(30) % 4 != 2
        with observe(model) as seen:
            model(tokens(30))
        tally = RoutingTally(E)
        tally.add(seen, mask)
        found = tally.statistics()
        assert list(found.layers) == seen.layers() == ["layers.0.router", "layers.1.router"]
        for layer, stats in found.layers.items():
            rows = [ids for ids, valid in zip(seen[layer, 0].topk_ids_TK.tolist(), mask, strict=True) if valid]
            ffn = [sum(slot < E for slot in ids) for ids in rows]
            loads = [sum(ids.count(expert) for ids in rows) for expert in range(E)]
            assert stats.tokens == len(rows) == 23
            assert stats.ffn_mean == pytest.approx(stdlib.mean(ffn))
            assert stats.ffn_std == pytest.approx(stdlib.pstdev(ffn))
            assert stats.ffn_histogram == [ffn.count(k) for k in range(K + 1)]
            assert stats.zero_share == pytest.approx(sum(slot >= E for ids in rows for slot in ids) / (K * len(rows)))
            assert stats.max_load == pytest.approx(max(loads) / stdlib.mean(loads))
            assert stats.dead_experts == [expert for expert in range(E) if loads[expert] == 0]
            assert torch.equal(tally.counts[layer], slot_counts(seen[layer, 0].topk_ids_TK, A, mask))
            assert tally.ffn_histograms[layer].tolist() == stats.ffn_histogram
        one, two = found.layers.values()
        assert found.ffn_mean == pytest.approx((one.ffn_mean + two.ffn_mean) / 2)
        assert found.ffn_std == pytest.approx((one.ffn_std + two.ffn_std) / 2)
        assert found.zero_share == pytest.approx((one.zero_share + two.zero_share) / 2)
        assert found.max_load == max(one.max_load, two.max_load) > 1
        assert found.dead_experts == len(one.dead_experts) + len(two.dead_experts)

    def test_by_hand(self):
        tally = RoutingTally(E)
        tally.add({("a", 0): fixed([[0, 1, 7], [0, 5, 6], [0, 3, 4], [-1, 0, 7]])})
        stats = tally.statistics().layers["a"]
        assert stats.ffn_histogram == [0, 2, 1, 1] and stats.dead_experts == [2]
        assert (stats.ffn_mean, stats.max_load) == (1.75, 4 * 5 / 7)
        assert stats.zero_share == pytest.approx(4 / 11)  # the choice that was skipped is none

    def test_load_and_dead_experts_are_of_ffn_experts(self):
        """A busy zero expert and idle ones change neither."""
        tally = RoutingTally(E)
        tally.add({("a", 0): fixed([[7, 0, 1], [7, 1, 2], [7, 2, 3], [7, 3, 4], [7, 4, 0]])})
        stats = tally.statistics().layers["a"]
        assert stats.max_load == 1 and stats.dead_experts == []

    def test_micro_batches_are_added(self):
        """Three micro-batches, seen together or one by one, count as the whole batch does."""
        model, x = Model(), tokens(30)
        with observe(model) as seen:
            model(x)
        whole, together, single = RoutingTally(E), RoutingTally(E), RoutingTally(E)
        mask = torch.arange(30) % 4 != 2
        whole.add(seen, mask)
        pieces = (slice(0, 7), slice(7, 20), slice(20, 30))
        with observe(model) as seen:
            for piece in pieces:
                model(x[piece])
        together.add(seen, {i: mask[piece] for i, piece in enumerate(pieces)})
        for piece in pieces:
            with observe(model) as seen:
                model(x[piece]).sum().backward()
            single.add(seen, mask[piece])
        assert whole.statistics() == together.statistics() == single.statistics()
        single.clear()
        assert single.counts == {} and single.statistics().layers == {}

    def test_nothing_is_kept_of_the_graph(self):
        model = Model()
        with observe(model) as seen:
            model(tokens(9))
        tally = RoutingTally(E)
        tally.add(seen)
        assert not any(t.requires_grad for t in (*tally.counts.values(), *tally.ffn_histograms.values()))

    def test_all_choices_of_one_sort_and_no_token(self):
        tally = RoutingTally(E)
        tally.add({("zero", 0): fixed([[5, 6, 7]]), ("ffn", 0): fixed([[0, 1, 2]], slots=E)})
        tally.add({("none", 0): Routing(torch.zeros(0, A), torch.zeros(0, K), torch.zeros(0, K, dtype=torch.int64))})
        layers = tally.statistics().layers
        assert (layers["zero"].ffn_mean, layers["zero"].zero_share, layers["zero"].dead_experts) == (
            0,
            1,
            list(range(E)),
        )
        assert math.isnan(layers["zero"].max_load)
        assert (layers["ffn"].ffn_mean, layers["ffn"].zero_share, layers["ffn"].dead_experts) == (3, 0, [3, 4])
        assert layers["none"].tokens == 0 and math.isnan(layers["none"].ffn_mean)
        written = tally.statistics().to_dict()
        assert json.loads(json.dumps(written, allow_nan=False)) == written
        assert written["layers"]["none"]["ffn_mean"] is None and written["layers"]["zero"]["ffn_mean"] == 0
        assert written["ffn_mean"] is None and written["layers"]["ffn"]["ffn_histogram"] == [0, 0, 0, 1]

    @pytest.mark.parametrize(
        ("routing", "masks", "words"),
        [
            (fixed([[0, 1, 2]], slots=E - 1), None, ["num_experts", "5", "4", "'a'"]),
            (fixed([[0, 1, 2]], slots=A + 1), None, ["'a'", "A=8", "A=9"]),
            (fixed([[0, 1]]), None, ["'a'", "K=3", "K=2"]),
            (fixed([[0, 1, 2]]), torch.ones(2, dtype=torch.bool), ["mask_T", "1", "2"]),
            (fixed([[0, 1, 2]]), torch.ones(1), ["mask_T", "bool"]),
            (fixed([[0, 1, 2]]), {1: torch.ones(1, dtype=torch.bool)}, ["masks", "0"]),
        ],
    )
    def test_refused(self, routing, masks, words):
        tally = RoutingTally(E)
        tally.add({("a", 0): fixed([[0, 1, 2]])})
        before = {layer: counts.clone() for layer, counts in tally.counts.items()}
        with pytest.raises(ValueError) as error:
            tally.add({("b", 0): fixed([[0, 1, 2]]), ("a", 0): routing}, masks)
        assert all(word in str(error.value) for word in words), str(error.value)
        assert tally.counts.keys() == before.keys() and torch.equal(tally.counts["a"], before["a"])

    def test_unknown_names_are_refused(self):
        tally = RoutingTally(E)
        tally.add({("a", 0): fixed([[0, 1, 2]])})
        for name in ("biases", "router_weights", "gradient_ratios"):
            with pytest.raises(ValueError, match=rf"{name}.*'a'.*'b'"):
                tally.statistics(**{name: {"b": torch.zeros(A, 2)}})
        with pytest.raises(ValueError, match="num_experts"):
            RoutingTally(0)


class TestOneCopyToTheHost:
    def test_tolist_is_called_once(self, monkeypatch):
        """Counting and reducing read no number; `statistics` reads all of them at once."""
        reads = []
        for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "nonzero", "numpy"):
            real = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor,
                name,
                lambda self, *a, real=real, name=name, **k: (reads.append(name), real(self, *a, **k))[1],
            )
        model = Model()
        with observe(model) as seen:
            model(tokens(9))
        reads.clear()
        tally, path = RoutingTally(E), BiasTrajectory()
        biases = {layer: model.get_submodule(layer).e_score_correction_bias for layer in seen.layers()}
        tally.add(seen, torch.ones(9, dtype=torch.bool))
        tally.all_reduce_()
        for layer, counts in tally.counts.items():
            update_longcat_bias_(biases[layer], counts, num_experts=E, top_k=K, ffn_experts_per_token=2.0, rate=0.1)
            update_deepseek_bias_(biases[layer], counts, num_experts=E, rate=0.1)
        path.record(0, biases)
        for routing in seen.values():
            switch_balance_loss(routing, num_experts=E)
        assert reads == []
        tally.statistics(biases=biases, router_weights={layer: torch.randn(A, H) for layer in biases})
        assert reads == ["tolist"]
        path.to_dict()
        assert reads == ["tolist"] * 2


class TestExtras:
    def test_biases_cosines_and_ratios_in_the_result(self):
        tally = RoutingTally(E)
        tally.add({(name, 0): fixed([[0, 1, 2]]) for name in "ab"})
        bias = torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0, 99.0, 99.0, 99.0])  # zero-computation slots are not looked at
        weight = torch.randn(A, H, generator=torch.Generator().manual_seed(0))
        found = tally.statistics(
            biases={"a": bias}, router_weights={"a": weight}, gradient_ratios={"a": torch.tensor(0.25)}
        )
        a, b = found.layers["a"], found.layers["b"]
        assert (a.bias_min, a.bias_mean, a.bias_max, a.gradient_ratio) == (-1.0, 0.5, 2.0, 0.25)
        assert a.row_cosine == pytest.approx(router_cosines(weight, E).rows.item())
        assert a.ffn_zero_cosine == pytest.approx(router_cosines(weight, E).ffn_zero.item())
        assert b.bias_min is b.row_cosine is b.gradient_ratio is None
        written = found.to_dict()
        assert written["layers"]["a"]["bias_max"] == 2.0 and "bias_max" not in written["layers"]["b"]

    def test_cosines_against_a_loop(self):
        weight = torch.randn(A, H, generator=torch.Generator().manual_seed(0))
        cosine = lambda i, j: float(weight[i] @ weight[j] / (weight[i].norm() * weight[j].norm()))  # noqa: E731
        found = router_cosines(weight, E)
        every = [cosine(i, j) for i in range(A) for j in range(i)]
        across = [cosine(i, j) for i in range(E) for j in range(E, A)]
        assert found.rows.item() == pytest.approx(stdlib.mean(every), abs=1e-6)
        assert found.ffn_zero.item() == pytest.approx(stdlib.mean(across), abs=1e-6)

    def test_cosines_at_the_edges(self):
        same = router_cosines(torch.ones(A, H) * torch.arange(1, A + 1)[:, None], E)
        assert same.rows.item() == pytest.approx(1) and same.ffn_zero.item() == pytest.approx(1)
        assert router_cosines(torch.eye(A), E).rows.item() == 0
        rows = torch.eye(4)
        rows[1] = 0  # a row of zeros makes no NaN
        assert router_cosines(rows, 2).rows.item() == 0
        assert router_cosines(torch.eye(E), E).ffn_zero.isnan() and router_cosines(torch.eye(1), 1).rows.isnan()
        with pytest.raises(ValueError, match=r"weight_RH.*5.*\(4, 4\)"):
            router_cosines(torch.eye(4), E)

    def test_gradient_ratios(self):
        model = Model()
        weights = {f"layers.{i}.router": layer.router.classifier.weight for i, layer in enumerate(model.layers)}
        with observe(model) as seen:
            lm_loss = model(tokens(20)).square().mean()
        balance = 0.1 * sum(switch_balance_loss(routing, num_experts=E) for routing in seen.values())
        found = gradient_ratios(balance, lm_loss, weights)
        assert all(weight.grad is None for weight in weights.values())
        balance.backward(retain_graph=True)
        over = {name: weight.grad.norm().item() for name, weight in weights.items()}
        model.zero_grad()
        lm_loss.backward()  # the graph is still there
        for name, weight in weights.items():
            assert found[name].item() == pytest.approx(over[name] / weight.grad.norm().item(), rel=1e-5)
            assert found[name].item() > 0 and not found[name].requires_grad

    def test_gradient_ratios_without_a_gradient(self):
        a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        found = gradient_ratios(a.sum(), (0 * a).sum() + b.sum(), {"a": a, "b": b})
        assert found["a"].item() == math.inf and found["b"].item() == 0

    def test_a_loss_without_a_graph_is_refused(self):
        """As under reentrant checkpointing, where a balance loss would do nothing without a word."""
        model = Model(reentrant=True)
        weights = {"layers.0.router": model.layers[0].router.classifier.weight}
        with observe(model) as seen:
            lm_loss = model(tokens(20)).square().mean()
        balance = sum(switch_balance_loss(routing, num_experts=E) for routing in seen.values())
        assert lm_loss.requires_grad and not balance.requires_grad
        with pytest.raises(ValueError, match=r"balance_loss.*use_reentrant=False"):
            gradient_ratios(balance, lm_loss, weights)
        with pytest.raises(ValueError, match="lm_loss"):
            gradient_ratios(lm_loss, lm_loss.detach(), weights)

    def test_gradient_ratios_at_the_logits(self):
        model = Model()
        with observe(model) as seen:
            lm_loss = model(tokens(20)).square().mean()
        balance = sum(switch_balance_loss(routing, num_experts=E) for routing in seen.values())
        found = gradient_ratios(balance, lm_loss, {layer: seen[layer, 0].logits_TA for layer in seen.layers()})
        assert all(0 < ratio.item() < math.inf for ratio in found.values())

    def test_bias_trajectory(self):
        path, bias = BiasTrajectory(), torch.zeros(E)
        for step in (0, 10, 20):
            path.record(step, {"a": bias, "b": torch.full((A,), float(step))})
            bias += torch.arange(E)  # in place: what was recorded must not follow
        found = path.to_dict()
        assert found["steps"] == [0, 10, 20]
        assert found["layers"]["a"] == [[float(n * i) for i in range(E)] for n in range(3)]
        assert found["layers"]["b"] == [[float(step)] * A for step in (0, 10, 20)]
        assert BiasTrajectory().to_dict() == {"steps": [], "layers": {}}
        with pytest.raises(ValueError, match=r"biases.*'a'.*'b'.*\['a'\]"):
            path.record(30, {"a": bias})


LOSSES = {
    "switch": (switch_balance_loss, {}),
    "moe++": (moe_plus_plus_balance_loss, {"tau": 0.5}),
    "adamoe": (adamoe_balance_loss, {}),
    "zeda": (zeda_balance_loss, {"zero_weight": 0.7}),
    "longcat": (longcat_balance_loss, {"ffn_experts_per_token": 2.0}),
}


class TestCheckpointing:
    @pytest.mark.parametrize("after_backward", [False, True])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_counts(self, reentrant, after_backward):
        """Two micro-batches under activation checkpointing count as without, before their backward and after."""
        tallies = []
        for model in (Model(), Model(reentrant)):
            tally = RoutingTally(E)
            with observe(model) as seen:
                outputs = [model(tokens(9, seed)) for seed in (1, 2)]
                if not after_backward:
                    tally.add(seen)
                for output in outputs:
                    output.sum().backward()
            if after_backward:
                tally.add(seen)
            tallies.append(tally)
        assert tallies[0].statistics() == tallies[1].statistics()
        assert tallies[1].statistics().layers["layers.0.router"].tokens == 18

    @pytest.mark.parametrize("name", LOSSES)
    def test_losses_and_gradients(self, name):
        """The same gradient of LM loss plus balance loss, with the layers recomputed or not."""
        loss_function, extra = LOSSES[name]
        results = []
        for model in (Model(), Model(reentrant=False)):
            with observe(model) as seen:
                loss = model(tokens(20)).square().mean()
                balance = sum(loss_function(routing, num_experts=E, **extra) for routing in seen.values())
                (loss + 0.1 * balance).backward()
                assert len(seen) == 2
            results.append([balance.detach(), *(p.grad for p in model.parameters())])
        for plain, recomputed in zip(*results, strict=True):
            torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-8)
        assert results[0][1].abs().sum() > 0


# ------------------------------------------------------------------------------------------------- data parallelism

PIECES = {0: (slice(0, 8), slice(8, 14)), 1: (slice(14, 17), slice(17, 20))}  # two micro-batches a rank, uneven


def _step(
    model: Model, batches: list[torch.Tensor], name: str
) -> tuple[RoutingTally, torch.Tensor, list[torch.Tensor]]:
    """One global batch: losses weighed by tokens, one bias update. (tally, balance loss, biases)"""
    loss_function, extra = LOSSES[name]
    tally, total = RoutingTally(E), torch.zeros(())
    with observe(model) as seen:
        for x in batches:
            model(x)
    for layer in seen.layers():
        merged = merge([routing for (where, _), routing in seen.items() if where == layer])
        loss = loss_function(merged, num_experts=E, **extra) * len(merged.logits_TA) / 20
        loss.backward(retain_graph=True)
        total += loss.detach()
    tally.add(seen)
    tally.all_reduce_()
    biases = [layer.router.e_score_correction_bias for layer in model.layers]
    for bias, counts in zip(biases, tally.counts.values(), strict=True):
        update_longcat_bias_(bias, counts, num_experts=E, top_k=K, ffn_experts_per_token=2.0, rate=0.5)
        update_deepseek_bias_(bias, counts, num_experts=E, rate=0.01)
    return tally, total, biases


def _work(rank: int, folder: str) -> None:
    x, results = tokens(20).detach(), {}
    for name in LOSSES:
        model = Model()
        tally, loss, biases = _step(model, [x[piece] for piece in PIECES[rank]], name)
        grads = [layer.router.classifier.weight.grad for layer in model.layers]
        for tensor in (loss, *grads):
            dist.all_reduce(tensor)  # what a trainer does with gradients
        results[name] = (tally.counts, tally.ffn_histograms, loss, biases, grads, tally.statistics().to_dict())
    torch.save(results, Path(folder) / f"{rank}.pt")


def _rank(rank: int, folder: str) -> None:
    as_rank(rank, f"{folder}/meeting", _work, rank, folder)


def test_two_ranks_equal_one_process(tmp_path):
    """Counts, statistics, bias updates, balance losses and their gradients: those of the whole batch in one process."""
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2, join=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in LOSSES:
        model = Model()
        tally, loss, biases = _step(model, [tokens(20).detach()], name)
        grads = [layer.router.classifier.weight.grad for layer in model.layers]
        for counts, histograms, rank_loss, rank_biases, rank_grads, written in (rank[name] for rank in ranks):
            torch.testing.assert_close(counts, tally.counts, rtol=0, atol=0)
            torch.testing.assert_close(histograms, tally.ffn_histograms, rtol=0, atol=0)
            torch.testing.assert_close(rank_biases, biases, rtol=0, atol=0)
            torch.testing.assert_close(rank_loss, loss, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(rank_grads, grads, rtol=1e-4, atol=1e-6)
            assert written == tally.statistics().to_dict()
            assert written["layers"]["layers.0.router"]["tokens"] == 20
