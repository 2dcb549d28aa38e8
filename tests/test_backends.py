"""One backend routes and computes the experts of a layer, and a layer asks for it once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import zemoe
from zemoe import backends
from zemoe.backends import BACKENDS
from zemoe.integrations.engines.from_logits import moe_from_logits

E, Z, K, H, I = 6, 3, 2, 16, 8
KINDS = (("identity", Z),)
STEPS = ("router_logits", "select", "infer", "train")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What backends were asked to do, "cpu.select", in order; and "resolve" for each time that one was looked for."""
    calls: list[str] = []

    def spy(step: Callable, label: str, *args: object) -> object:
        calls.append(label)
        return step(*args)

    for name, backend in list(BACKENDS.items()):
        spies = {step: partial(spy, getattr(backend, step), f"{name}.{step}") for step in STEPS}
        monkeypatch.setitem(BACKENDS, name, replace(backend, **spies))
    resolve = backends.resolve_backend

    def counted(*args: object, **options: object) -> object:
        calls.append("resolve")
        return resolve(*args, **options)

    monkeypatch.setattr(backends, "resolve_backend", counted)
    return calls


def layer_of(backend: str | None) -> zemoe.MoE:
    config = zemoe.MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K, zero_expert_kinds=KINDS)
    return zemoe.MoE(config, backend=backend)


@pytest.mark.parametrize("name", [None, "cpu", "torch"])
@pytest.mark.parametrize("trained", [False, True])
def test_one_backend_does_all_of_a_layer(name: str | None, trained: bool, used: list[str]) -> None:
    with torch.set_grad_enabled(trained):
        layer_of(name)(torch.randn(3, H))
    steps = ("router_logits", "select", "train" if trained else "infer")
    assert used == ["resolve", *(f"{name or 'cpu'}.{step}" for step in steps)]


def test_the_engines_layers_ask_once(used: list[str]) -> None:
    layer = zemoe.ZeroExpertFusedMoE(Z, "identity", None, num_experts=E, top_k=K, hidden_size=H, intermediate_size=I)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, logits = torch.randn(3, H), torch.randn(3, E + Z)
    with torch.no_grad():
        layer(x, logits)
        moe_from_logits(x, logits, torch.zeros(E + Z), layer.w13_weight, layer.w2_weight, top_k=K, scaling=1.0)
    assert used == ["resolve", "cpu.select", "cpu.infer"] * 2


def test_routing_alone_is_the_first_backends_that_can(used: list[str]) -> None:
    weight, x = torch.randn(E, H), torch.randn(3, H)
    logits = zemoe.routing.router_logits(x, weight)
    zemoe.select_experts(logits, K, num_experts=E)
    zemoe.select_experts(logits, K, num_experts=E, backend="torch")
    assert [call for call in used if call != "resolve"] == ["cpu.router_logits", "cpu.select", "torch.select"]


def test_the_torch_backend_has_no_operator_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may run where nothing else does: neither loops of the CPU nor Triton's operators."""
    seen: set[str] = set()

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
            seen.add(str(func).removesuffix(".default"))
            return func(*args, **(kwargs or {}))

    def run(backend: str) -> set[str]:
        seen.clear()
        x: Tensor = torch.randn(3, H, requires_grad=True)
        with Seen():
            layer_of(backend)(x).sum().backward()
        with torch.no_grad(), Seen():
            layer_of(backend)(x)
        return {name for name in seen if name.startswith("zemoe.")}

    shared = {"zemoe.plan", "zemoe.topk_ids"}
    rows = {"zemoe.gather_rows", "zemoe.sum_rows", "zemoe.grouped_linear", "zemoe.grouped_outer"}
    assert run("torch") == shared | rows
    assert "zemoe.select_few" in run("cpu") and not seen & rows
