"""observe(): how others get at routing, with nothing kept on a module."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.judge import assert_bitwise
from zemoe import MoEConfig, Router, Routing, observe
from zemoe.routing import RoutingModule

pytestmark = pytest.mark.usefixtures("poisoned_empty")


A = 24


def make_router(**kwargs) -> Router:
    config = {
        "hidden_size": 10,
        "intermediate_size": 4,
        "num_experts": 16,
        "top_k": 4,
        "zero_expert_kinds": (("constant", 2), ("null", 3), ("copy", 1), ("zero", 2)),
    }
    config |= {key: kwargs.pop(key) for key in list(kwargs) if key in MoEConfig.__dataclass_fields__}
    torch.manual_seed(0)
    return Router(MoEConfig(**config), **kwargs)


class Stack(nn.Module):
    """Two routed layers, each x + something of its weights, so that gradients flow through both."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make_router(), make_router()])
        self.reentrant = reentrant

    def block(self, router: Router, x: torch.Tensor) -> torch.Tensor:
        routing = router(x)
        return x * (1 + routing.topk_weights_TK.sum(-1, keepdim=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for router in self.layers:
            if self.reentrant is None:
                x = self.block(router, x)
            else:
                x = checkpoint(self.block, router, x, use_reentrant=self.reentrant)
        return x


class TestObserve:
    @staticmethod
    def batch(seed: int, T: int = 7) -> torch.Tensor:
        return torch.randn(T, 10, generator=torch.Generator().manual_seed(seed)).requires_grad_()

    def test_keys(self):
        model = Stack()
        with observe(model) as seen:
            model(self.batch(0))
            model(self.batch(1))
        layers = seen.layers()
        assert len(layers) == 2 and set(seen) == {(layer, batch) for layer in layers for batch in (0, 1)}
        assert layers[0].startswith("layers.0") and layers[1].startswith("layers.1")
        for routing in seen.values():
            assert isinstance(routing, Routing) and routing.logits_TA.shape == (7, A)

    def test_it_is_what_the_layer_used(self):
        model = Stack()
        x = self.batch(0)
        with observe(model) as seen:
            model(x)
        first = model.layers[0](x)
        for got, expected in zip(seen[seen.layers()[0], 0], first, strict=True):
            assert_bitwise(got, expected)

    def test_logits_keep_their_graph(self):
        model = Stack()
        with observe(model) as seen:
            model(self.batch(0))
        sum(routing.logits_TA.logsumexp(-1).square().mean() for routing in seen.values()).backward()
        for router in model.layers:
            assert router.classifier.weight.grad.abs().sum() > 0

    def test_nothing_is_left_behind(self):
        model = Stack()
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        attributes = [set(vars(module)) for module in model.modules()]
        with pytest.raises(ZeroDivisionError), observe(model) as seen:
            model(self.batch(0))
            raise ZeroDivisionError
        assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        assert attributes == [set(vars(module)) for module in model.modules()]
        model(self.batch(1))
        assert len(seen) == 2

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputation_overwrites(self, reentrant):
        plain, model = Stack(), Stack(reentrant)
        model.load_state_dict(plain.state_dict())
        x = self.batch(0)
        with observe(model) as seen:
            model(x).sum().backward()
        with observe(plain) as expected:
            plain(x)
        assert set(seen) == set(expected)
        for key, routing in expected.items():
            assert_bitwise(seen[key].topk_ids_TK, routing.topk_ids_TK)
            assert_bitwise(seen[key].logits_TA, routing.logits_TA)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputation_of_several_micro_batches(self, reentrant):
        """Forward 0, forward 1, forward 2, then the backwards in another order: as pipeline schedules do."""
        model = Stack(reentrant)
        batches = [self.batch(seed) for seed in range(3)]
        with observe(model) as expected:
            for x in batches:
                model(x)
        with observe(model) as seen:
            losses = [model(x).sum() for x in batches]
            for i in (1, 0, 2):
                losses[i].backward()
        assert len(seen) == 6
        for key, routing in expected.items():
            assert_bitwise(seen[key].topk_ids_TK, routing.topk_ids_TK)
            assert_bitwise(seen[key].logits_TA, routing.logits_TA)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_the_whole_model_recomputed(self, reentrant):
        """Its own forward then runs inside backward, which is no new micro-batch."""
        model = Stack()
        batches = [self.batch(seed) for seed in range(2)]
        with observe(model) as seen:
            for x in batches:
                checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        assert {batch for _, batch in seen} == {0, 1} and len(seen) == 4
        for i, x in enumerate(batches):
            assert_bitwise(seen[seen.layers()[0], i].logits_TA, model.layers[0](x).logits_TA)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_forward_and_backward_in_turn(self, reentrant):
        model = Stack(reentrant)
        batches = [self.batch(seed) for seed in range(3)]
        with observe(model) as seen:
            for x in batches:
                model(x).sum().backward()
        assert len(seen) == 6
        for i, x in enumerate(batches):
            assert_bitwise(seen[seen.layers()[0], i].topk_ids_TK, model.layers[0](x).topk_ids_TK)

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_equal_ids_in_two_micro_batches(self, reentrant, order):
        """Token ids repeat, logits don't: the recomputed logits must not land on the other micro-batch."""
        model = Stack(reentrant)
        for router in model.layers:
            router.e_score_correction_bias[:4] = torch.tensor([40.0, 30.0, 20.0, 10.0])  # every token chooses 0 1 2 3
        batches = [self.batch(seed) for seed in range(3)]
        with observe(model) as expected:
            for x in batches:
                model(x)
        with observe(model) as seen:
            losses = [model(x).sum() for x in batches]
            for i in order:
                losses[i].backward()
        assert set(seen) == set(expected)
        for key, routing in expected.items():
            assert_bitwise(seen[key].logits_TA, routing.logits_TA)

    def test_two_threads(self):
        """Each observes its own model; backward of one must not count as recomputation in the other."""
        results: dict[int, int] = {}

        def work(number: int) -> None:
            model = Stack(False)
            with observe(model) as seen:
                for seed in range(10):
                    model(self.batch(seed)).sum().backward()
            results[number] = len(seen)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {0: 20, 1: 20}

    def test_nested(self):
        model = Stack()
        with observe(model) as outer:
            model(self.batch(0))
            with observe(model) as inner:
                model(self.batch(1))
        assert len(outer) == 4 and len(inner) == 2

    def test_a_layer_alone(self):
        router = make_router()
        with observe(router) as seen:
            router(self.batch(0))
        assert len(seen) == 1

    def test_without_gradients(self):
        model = Stack()
        with torch.no_grad(), observe(model) as seen:
            model(self.batch(0))
        assert all(not routing.logits_TA.requires_grad for routing in seen.values())

    def test_clear(self):
        model = Stack()
        with observe(model) as seen:
            model(self.batch(0))
            seen.clear()
            assert len(seen) == 0
            model(self.batch(1))
        assert {batch for _, batch in seen} == {0}

    def test_a_model_that_does_not_route(self):
        with pytest.raises(ValueError, match="Linear"), observe(nn.Linear(2, 2)):
            pass

    def test_own_routing_modules_are_seen(self):
        class Fixed(RoutingModule):
            def forward(self, x):
                return Routing(x, x[:, :1], torch.zeros(len(x), 1, dtype=torch.int64))

        model = nn.Sequential(nn.Linear(2, 2), Fixed())
        with observe(model) as seen:
            model(torch.zeros(3, 2))
        assert list(seen) == [("1", 0)]
