"""examples/decoder.py: a decoder that hands routing logits on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import zemoe
from helpers.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def decoder() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import decoder

        yield decoder
    sys.modules.pop("decoder", None)


def build(decoder: ModuleType, make_moe, seed: int = 0, **changes):
    sizes = {"vocab_size": 64, "hidden": 32, "layers": 3, "heads": 2, "context": 16}
    return decoder.Decoder(decoder.DecoderConfig(**sizes | changes), make_moe, seed)


IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["plain", "zero_experts", "moe_plus_plus"])
class TestModel:
    def test_no_position_sees_a_later_one(self, decoder, name):
        model = build(decoder, getattr(decoder, name))
        later = IDS.clone()
        later[:, 9:] = (later[:, 9:] + 1) % 64
        changed = (model(IDS) - model(later)).abs().amax((0, 2))
        assert (changed[:9] < 1e-6).all() and (changed[9:] > 1e-5).all()

    def test_every_parameter_gets_a_gradient(self, decoder, name):
        model = build(decoder, getattr(decoder, name))
        with torch.no_grad():
            for layer in model.layers[1:]:
                if layer.moe.router.residual is not None:
                    layer.moe.router.residual.weight.normal_(std=0.1)
        model(IDS).square().sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_learns(self, decoder, name):
        loss, used = decoder.train_toy(getattr(decoder, name), steps=40)
        assert loss < 1.0 and used == pytest.approx(2.0, abs=0.5)


def test_logits_are_handed_to_the_next_layer(decoder):
    model = build(decoder, decoder.moe_plus_plus)
    routers = [layer.moe.router for layer in model.layers]
    assert routers[0].residual is None and not routers[1].residual.weight.any()
    with zemoe.observe(model) as seen:
        model(IDS)
        alone = [routing.logits_TA for routing in seen.values()]
        with torch.no_grad():
            routers[1].residual.weight.copy_(0.5 * torch.eye(12))
        seen.clear()
        model(IDS)
        handed = [routing.logits_TA for routing in seen.values()]
    torch.testing.assert_close(handed[0], alone[0])
    torch.testing.assert_close(handed[1], alone[1] + 0.5 * alone[0])


def test_models_that_share_parameters_start_equal(decoder):
    plain, zero = (build(decoder, getattr(decoder, name), seed=3) for name in ("plain", "zero_experts"))
    theirs = dict(zero.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, theirs[name][: len(parameter)]), name
    other = build(decoder, decoder.plain, seed=4)
    assert not torch.equal(plain.embedding.weight, other.embedding.weight)


def test_positions_are_relative(decoder):
    cos, sin = decoder.rope_table(32, 8, 10000.0)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    products = [decoder.rotate(q, cos[i + 5], sin[i + 5]) @ decoder.rotate(k, cos[i], sin[i]) for i in (0, 3, 20)]
    torch.testing.assert_close(products[1], products[0])
    torch.testing.assert_close(products[2], products[0])
    assert abs(products[0] - q @ k) > 1e-3


def test_refusals(decoder):
    with pytest.raises(ValueError, match=r"hidden=30.*heads=4"):
        decoder.DecoderConfig(hidden=30, heads=4)
    with pytest.raises(ValueError, match=r"context=16.*17"):
        build(decoder, decoder.plain)(torch.zeros(1, 17, dtype=torch.int64))
