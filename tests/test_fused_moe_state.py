"""What ZeroExpertFusedMoE holds between calls: swapped attributes, the memo, and otherwise nothing.

Source: docs/specification.md, "Engine names".
"""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from helpers.judge import assert_bitwise
from helpers.layers import MIXED, A, Classifier, E, H, K, base_layer, judge_layer, tokens, zero_layer
from zemoe import ZeroExpertFusedMoE
from zemoe.ops.experts import moe_ffn

pytestmark = pytest.mark.usefixtures("poisoned_empty")


class TestTemporarilySetAttrs:
    set_attrs = staticmethod(ZeroExpertFusedMoE._temporarily_set_attrs)

    def test_it_is_static(self):
        assert isinstance(vars(ZeroExpertFusedMoE)["_temporarily_set_attrs"], staticmethod)

    def test_set_and_restored(self):
        layer = zero_layer()
        with self.set_attrs(layer, top_k=5, renormalize=True):
            assert (layer.top_k, layer.renormalize) == (5, True)
        assert (layer.top_k, layer.renormalize) == (K, False)

    def test_restored_after_an_exception(self):
        layer = zero_layer()
        with pytest.raises(ZeroDivisionError), self.set_attrs(layer, top_k=5, scoring_func="sigmoid"):
            raise ZeroDivisionError
        assert (layer.top_k, layer.scoring_func) == (K, "softmax")

    def test_nested(self):
        layer = zero_layer()
        with self.set_attrs(layer, top_k=4):
            with self.set_attrs(layer, top_k=5):
                assert layer.top_k == 5
            assert layer.top_k == 4
        assert layer.top_k == K

    def test_a_buffer_is_not_shadowed_afterwards(self):
        router = Classifier()
        layer = zero_layer(router=router)
        before = layer.e_score_correction_bias
        with self.set_attrs(layer, e_score_correction_bias=torch.full((E,), 7.0)):
            assert layer.e_score_correction_bias[0] == 7
            assert "e_score_correction_bias" in vars(layer)
        assert "e_score_correction_bias" not in vars(layer)
        assert layer.e_score_correction_bias is before
        with torch.no_grad():
            router.e_score_correction_bias[0] = 3.0
        assert layer.e_score_correction_bias[0] == 3.0

    def test_a_parameter_is_not_shadowed_afterwards(self):
        layer = zero_layer()
        before = layer.w2_weight
        with self.set_attrs(layer, w2_weight=torch.zeros_like(before)):
            assert (layer.w2_weight == 0).all()
        assert layer.w2_weight is before and "w2_weight" not in vars(layer)

    def test_a_buffer_is_restored_after_an_exception_too(self):
        layer = zero_layer(router=Classifier())
        with pytest.raises(ZeroDivisionError), self.set_attrs(layer, e_score_correction_bias=None):
            raise ZeroDivisionError
        assert "e_score_correction_bias" not in vars(layer) and layer.e_score_correction_bias is not None

    def test_unknown_name(self):
        layer = zero_layer()
        with pytest.raises(AttributeError, match="no_such"), self.set_attrs(layer, top_k=5, no_such=1):
            pytest.fail("the body must not run")
        assert layer.top_k == K and "no_such" not in vars(layer)

    def test_a_class_attribute(self):
        class Plain:
            kind = "class"

        target = Plain()
        with self.set_attrs(target, kind="own"):
            assert target.kind == "own"
        assert target.kind == "class" and not vars(target)

    def test_forward_reads_them(self):
        layer = zero_layer(MIXED, router=Classifier())
        x, logits = tokens()
        bias = layer.router.e_score_correction_bias
        changes = {"top_k": 5, "renormalize": "all", "scoring_func": "sigmoid", "routed_scaling_factor": 4.0}
        with self.set_attrs(layer, **changes):
            out = layer(x, logits)
            judge_layer(out, layer, x, logits, MIXED, bias)
        other = zero_layer(MIXED, router=layer.router, **changes)
        assert_bitwise(out, other(x, logits))
        with self.set_attrs(layer, use_grouped_topk=True, num_expert_group=2, topk_group=1, top_k=2):
            groups = layer.route(x, logits).topk_ids_TK // (A // 2)
        assert (groups == groups[:, :1]).all()

    def test_the_base_class_reads_its_bias(self):
        layer = base_layer(e_score_correction_bias=torch.zeros(E))
        x, logits = tokens(slots=E)
        bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0, 0.0])
        with self.set_attrs(layer, e_score_correction_bias=bias):
            assert (layer.route(x, logits).topk_ids_TK[:, 0] == 4).all()

    @pytest.mark.parametrize("length", [E, A])
    def test_the_subclass_reads_its_bias(self, length):
        """An engine swaps the bias for a call: what it put there is what selects."""
        layer = zero_layer(router=Classifier())
        x, logits = tokens()
        bias = torch.zeros(length)
        bias[4] = 90.0
        with self.set_attrs(layer, e_score_correction_bias=bias):
            assert (layer.route(x, logits).topk_ids_TK[:, 0] == 4).all()

    def test_plain_assignment(self):
        layer = zero_layer()
        layer.top_k = 5
        x, logits = tokens()
        assert layer.route(x, logits).topk_ids_TK.shape == (10, 5)

    @pytest.mark.xfail(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
        reason="torch 2.11 and 2.12 can't trace the context manager",
        strict=True,
    )
    def test_traced_whole(self):
        layer = zero_layer(router=Classifier())
        x, logits = tokens()

        def function(x, logits):
            with self.set_attrs(layer, top_k=2, e_score_correction_bias=torch.zeros(A)):
                first = layer(x, logits)
            return first, layer(x, logits)

        expected = function(x, logits)
        torch._dynamo.reset()
        result = torch.compile(function, fullgraph=True, backend="aot_eager")(x, logits)
        for got, want in zip(result, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert layer.top_k == K and "e_score_correction_bias" not in vars(layer)


class TestMemo:
    def routed(self, layer, T=10):
        x, logits = tokens(T)
        _, weights, ids = layer.route(x, logits)
        return x, logits, weights, ids

    def test_all_at_once(self):
        layer = zero_layer()
        x, logits, weights, ids = self.routed(layer)
        with layer._memoize(weights, ids):
            got = layer._select_experts_from_memo(x, logits)
        assert_bitwise(got[0], weights)
        assert_bitwise(got[1], ids)

    @pytest.mark.parametrize("sizes", [[10], [4, 4, 2], [1] * 10, [3, 0, 7]], ids=str)
    def test_in_chunks(self, sizes):
        layer = zero_layer()
        x, logits, weights, ids = self.routed(layer)
        got = []
        with layer._memoize(weights, ids):
            for chunk, chunk_logits in zip(x.split(sizes), logits.split(sizes), strict=True):
                pair = layer._select_experts_from_memo(chunk, chunk_logits)
                assert pair[0].shape == pair[1].shape == (len(chunk), K)
                got.append(pair)
        assert_bitwise(torch.cat([pair[0] for pair in got]), weights)
        assert_bitwise(torch.cat([pair[1] for pair in got]), ids)

    def test_the_logits_are_not_used(self):
        layer = zero_layer()
        x, _, weights, ids = self.routed(layer)
        with layer._memoize(weights, ids):
            assert_bitwise(layer._select_experts_from_memo(x, torch.full((10, A), float("nan")))[1], ids)
        with layer._memoize(weights, ids):
            assert_bitwise(layer._select_experts_from_memo(x, None)[1], ids)

    def test_nothing_memoized(self):
        layer = zero_layer()
        x, logits, weights, ids = self.routed(layer)
        with pytest.raises(RuntimeError, match="memo"):
            layer._select_experts_from_memo(x, logits)
        with layer._memoize(weights, ids):
            pass
        with pytest.raises(RuntimeError, match="memo"):
            layer._select_experts_from_memo(x, logits)

    @pytest.mark.parametrize("before", [0, 4, 10])
    def test_more_rows_than_were_routed(self, before):
        layer = zero_layer()
        x, logits, weights, ids = self.routed(layer)
        with layer._memoize(weights, ids):
            layer._select_experts_from_memo(x[:before], logits[:before])
            more = torch.zeros(11 - before, H)
            with pytest.raises(RuntimeError, match="10"):
                layer._select_experts_from_memo(more, None)
            # The refused read has taken nothing.
            assert_bitwise(layer._select_experts_from_memo(x[before:], None)[1], ids[before:])

    def test_cleared_after_an_exception(self):
        layer = zero_layer()
        x, logits, weights, ids = self.routed(layer)
        with pytest.raises(ZeroDivisionError), layer._memoize(weights, ids):
            raise ZeroDivisionError
        with pytest.raises(RuntimeError):
            layer._select_experts_from_memo(x, logits)

    def test_a_new_memo_starts_at_the_first_row(self):
        layer = zero_layer()
        x, logits, weights, ids = self.routed(layer)
        for _ in range(2):
            with layer._memoize(weights, ids):
                assert_bitwise(layer._select_experts_from_memo(x[:4], logits)[1], ids[:4])

    def test_nested(self):
        """A micro-batch inside another one: the outer reads on where it was."""
        layer = zero_layer()
        x, _, weights, ids = self.routed(layer)
        with layer._memoize(weights, ids):
            layer._select_experts_from_memo(x[:4], None)
            with layer._memoize(weights[5:], ids[5:]):
                assert_bitwise(layer._select_experts_from_memo(x[:2], None)[1], ids[5:7])
            assert_bitwise(layer._select_experts_from_memo(x[4:], None)[1], ids[4:])

    def test_each_layer_its_own(self):
        first, second = zero_layer(), zero_layer()
        x, logits, weights, ids = self.routed(first)
        with first._memoize(weights, ids), pytest.raises(RuntimeError):
            second._select_experts_from_memo(x, logits)

    def test_each_thread_its_own(self):
        layer = zero_layer()
        x, logits, weights, ids = self.routed(layer)
        errors = []

        def work():
            try:
                layer._select_experts_from_memo(x, logits)
            except RuntimeError as error:
                errors.append(error)

        with layer._memoize(weights, ids):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert len(errors) == 1

    def test_two_threads_interleaved(self):
        """One reads a chunk, then the other, with different routing, on one module."""
        layer = zero_layer()
        routing = [self.routed(layer, 12)[2:], tuple(t.flip(0) for t in self.routed(layer, 12)[2:])]
        barrier, results, errors = threading.Barrier(2, timeout=20), [[], []], []

        def work(number: int) -> None:
            try:
                weights, ids = routing[number]
                with layer._memoize(weights, ids):
                    for _ in range(4):
                        barrier.wait()
                        results[number].append(layer._select_experts_from_memo(torch.zeros(3, H), None)[1])
                        barrier.wait()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        for number in range(2):
            assert_bitwise(torch.cat(results[number]), routing[number][1])

    def test_forward_does_not_need_it(self):
        layer = zero_layer()
        x, logits, weights, ids = self.routed(layer)
        expected = layer(x, logits)
        with layer._memoize(weights, ids.flip(0)):
            assert_bitwise(layer(x, logits), expected)
            assert_bitwise(layer._select_experts_from_memo(x, logits)[1], ids.flip(0))


class TestReentrant:
    def test_two_threads_on_one_module(self):
        layer = zero_layer(MIXED, router=Classifier())
        work_items = [tokens(20, seed=seed) for seed in range(2)]
        expected = [layer(*item) for item in work_items]
        barrier, failures = threading.Barrier(2, timeout=60), []

        def work(number: int) -> None:
            for _ in range(20):
                barrier.wait()
                if not torch.equal(layer(*work_items[number]), expected[number]):
                    failures.append(number)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_an_exception_leaves_nothing(self):
        layer = zero_layer(MIXED)
        x, logits = tokens()
        expected = layer(x, logits)
        before = {name: id(value) for name, value in vars(layer).items()}
        with pytest.raises(ValueError, match="router_logits"):
            layer(x, logits[:, :-1])
        with pytest.raises(ZeroDivisionError):
            handle = layer.selector.register_forward_hook(lambda *_: 1 / 0)
            try:
                layer(x, logits)
            finally:
                handle.remove()
        assert before == {name: id(value) for name, value in vars(layer).items()}
        assert_bitwise(layer(x, logits), expected)

    def test_a_layer_inside_its_own_hook(self):
        """Another micro-batch in the middle of this one."""
        layer = zero_layer(MIXED)
        first, second = tokens(seed=1), tokens(7, seed=2)
        expected = layer(*first), layer(*second)
        inner = []

        def hook(*_):
            if not inner:
                inner.append(None)
                inner[0] = layer(*second)

        with contextlib.closing(SimpleNamespace(close=layer.selector.register_forward_hook(hook).remove)):
            outer = layer(*first)
        assert_bitwise(outer, expected[0])
        assert_bitwise(inner[0], expected[1])

    def test_no_zero_pair_reaches_the_ffn(self, monkeypatch):
        plans = []

        def spy(x, weights, plan, *rest):
            plans.append(plan)
            return moe_ffn(x, weights, plan, *rest)

        monkeypatch.setattr("zemoe.ops.experts.moe_ffn", spy)
        layer = zero_layer(MIXED)
        x, logits = tokens(50)
        layer(x, logits)
        ((_, slot_row, offsets),) = plans
        ids = layer.route(x, logits).topk_ids_TK
        assert offsets[-1] == (ids < E).sum() < ids.numel()
        assert ((slot_row >= 0) == (ids < E)).all()
