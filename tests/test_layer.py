"""MoE, the whole block: router, experts, zero-computation experts and shared experts against the specification."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.judge import assert_bitwise, judge, one_thread
from zemoe import MoE, MoEConfig, observe, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

E, H, I, K = 6, 10, 8, 3
MIXED = (("constant", 2), ("identity", 1), ("null", 1), ("scaled_identity", 1))
A = E + 5


def config_of(**changes) -> MoEConfig:
    fields = {"hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": K, "zero_expert_kinds": MIXED}
    return MoEConfig(**fields | changes)


def block(dtype: torch.dtype | None = None, options: dict | None = None, **changes) -> MoE:
    layer = MoE(config_of(**changes), dtype=dtype, **(options or {}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
        bias = layer.router.e_score_correction_bias
        bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    return layer


def tokens(T: int = 14, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1)).to(dtype)


def previous_logits(T: int = 14) -> torch.Tensor:
    return torch.randn(T, A, generator=torch.Generator().manual_seed(2))


def expected(layer: MoE, x, routing, dtype: torch.dtype) -> torch.Tensor:
    """After routing: the layer's own weights and ids, everything else from the reference."""
    config, shared = layer.config, layer.shared_experts
    with one_thread():
        y = reference.experts(
            x,
            layer.w13,
            layer.w2,
            routing.topk_weights_TK,
            routing.topk_ids_TK,
            num_experts=config.num_experts,
            zero_expert_kinds=config.zero_expert_kinds,
            affine_params=layer,  # has constant_router, constant_value and scale
            activation=config.activation,
            dtype=dtype,
        )
        if shared is not None:
            y = y + reference.shared_experts(
                x,
                shared.gate_up_proj.weight,
                shared.down_proj.weight,
                None if shared.gate is None else shared.gate.weight,
                activation=config.activation,
                dtype=dtype,
            )
    return y


OPTIONS = {
    "plain": {},
    "router bias": {"router_bias": True},
    "tied null": {"tied_null": True},
    "shared": {"shared_intermediate_size": 12},
    "gated shared": {"shared_intermediate_size": 12, "shared_gated": True},
}


class TestValues:
    @pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
    @pytest.mark.parametrize("option", OPTIONS)
    def test_options(self, option, activation):
        layer = block(options=OPTIONS[option], activation=activation)
        x = tokens()
        out, routing = layer(x, return_routing=True)
        judge(out, *(expected(layer, x, routing, dtype) for dtype in (torch.float64, torch.float32)))

    @pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
    @pytest.mark.parametrize("renormalize", ["none", "all", "real", "nonnull", True, False])
    @pytest.mark.parametrize("option", ["plain", "router bias", "tied null"])
    def test_routing(self, scoring_func, renormalize, option):
        rules = {"scoring_func": scoring_func, "renormalize": renormalize, "routed_scaling_factor": 6.0}
        layer = block(options=OPTIONS[option], **rules)
        x = tokens()
        _, routing = layer(x, return_routing=True)
        results = []
        for dtype in (torch.float64, torch.float32):
            logits = reference.router_logits(
                x,
                layer.router.classifier.weight,
                layer.router.classifier.bias,
                num_experts=E,
                num_zero_experts=5,
                dtype=dtype,
            )
            chosen = reference.select(
                logits,
                K,
                num_experts=E,
                zero_expert_kinds=MIXED,
                e_score_correction_bias=layer.router.e_score_correction_bias,
                ids_TK=routing.topk_ids_TK,
                dtype=dtype,
                **rules,
            )
            results.append((logits, chosen.topk_weights_TK))
        judge(routing.logits_TA, results[0][0], results[1][0], "logits")
        judge(routing.topk_weights_TK, results[0][1], results[1][1], "weights")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes(self, dtype):
        layer = block(dtype)
        x = tokens(dtype=dtype)
        out, routing = layer(x, return_routing=True)
        assert out.dtype == dtype and routing.logits_TA.dtype == routing.topk_weights_TK.dtype == torch.float32
        assert layer.router.classifier.weight.dtype == layer.constant_router.dtype == layer.scale.dtype == torch.float32
        if dtype != torch.float64:  # there the constants' own router is a float32 product of its own
            judge(out, *(expected(layer, x, routing, d) for d in (torch.float64, dtype)))

    def test_backend_is_the_one_that_was_named(self):
        x = tokens()
        torch.testing.assert_close(block(options={"backend": "torch"})(x), block()(x))
        with pytest.raises(ValueError, match="backend 'triton' needs a device"):
            block(options={"backend": "triton"})(x)
        with pytest.raises(ValueError, match="backend must be one of"):
            block(options={"backend": "none"})

    def test_gating_residual(self):
        layer = block(options={"gating_residual": True})
        x, previous = tokens(), previous_logits()
        _, routing = layer(x, previous, return_routing=True)
        results = [
            reference.router_logits(
                x,
                layer.router.classifier.weight,
                num_experts=E,
                num_zero_experts=5,
                residual_weight=layer.router.residual.weight,
                prev_logits_TA=previous,
                dtype=dtype,
            )
            for dtype in (torch.float64, torch.float32)
        ]
        judge(routing.logits_TA, *results)

    def test_a_chain_of_gating_residuals(self):
        """Each layer hands its logits on, and their graph with them."""
        first, second = (block(options={"gating_residual": True}) for _ in range(2))
        x = tokens()
        y, routing = first(x, return_routing=True)
        second(y.detach(), routing.logits_TA).sum().backward()
        assert first.router.classifier.weight.grad.abs().sum() > 0
        assert second.router.residual.weight.grad.abs().sum() > 0

    def test_group_limit(self):
        layer = block(num_expert_group=None, zero_expert_kinds=(("identity", 6),))
        limited = block(num_expert_group=4, topk_group=1, zero_expert_kinds=(("identity", 6),))
        x = tokens()
        groups = limited(x, return_routing=True)[1].topk_ids_TK // 3
        assert (groups == groups[:, :1]).all()
        assert not torch.equal(layer(x), limited(x))


class TestForm:
    def test_routing_is_flat(self):
        layer = block(options={"shared_intermediate_size": 12})
        x = tokens(12)
        out, routing = layer(x.view(3, 4, H), return_routing=True)
        assert out.shape == (3, 4, H) and routing.topk_ids_TK.shape == (12, K)
        assert_bitwise(out.view(12, H), layer(x))

    def test_observed_under_its_own_name(self):
        model = nn.ModuleDict({"a": block(), "b": block()})
        x = tokens()
        with observe(model) as seen:
            _, routing = model["a"](x, return_routing=True)
            model["b"](x)
        assert len(seen.layers()) == 2
        assert seen.layers()[0].startswith("a") and seen.layers()[1].startswith("b")
        assert_bitwise(seen[seen.layers()[0], 0].topk_ids_TK, routing.topk_ids_TK)

    def test_nothing_is_kept(self):
        layer = block(options=OPTIONS["gated shared"])
        before = [dict(vars(module)) for module in layer.modules()]
        layer(tokens())
        for module, attributes in zip(layer.modules(), before, strict=True):
            assert vars(module).keys() == attributes.keys()
            assert all(vars(module)[name] is value for name, value in attributes.items())

    def test_initialised(self):
        """No parameter is left as memory happened to be (here: NaN)."""
        torch.manual_seed(0)
        layer = MoE(config_of(), router_bias=True, gating_residual=True, shared_intermediate_size=12, shared_gated=True)
        assert all(parameter.isfinite().all() for parameter in layer.parameters())
        assert (layer.scale == 1).all() and (layer.router.residual.weight == 0).all()
        assert layer.w13.std().item() == pytest.approx(0.02, rel=0.1)

    def test_state_dict_goes_round(self):
        layer, other = block(), MoE(config_of())
        other.load_state_dict(layer.state_dict())
        assert_bitwise(other(tokens()), layer(tokens()))

    def test_checkpointing(self):
        layer = block(options=OPTIONS["shared"])
        grads = []
        for wrapped in (False, True):
            layer.zero_grad()
            x = tokens().requires_grad_()
            out = checkpoint(layer, x, use_reentrant=False) if wrapped else layer(x)
            out.square().sum().backward()
            grads.append([x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
        for plain, wrapped in zip(*grads, strict=True):
            assert_bitwise(wrapped, plain)

    def test_every_parameter_gets_a_gradient(self):
        layer = block(options={"router_bias": True, "shared_intermediate_size": 12, "shared_gated": True})
        layer(tokens(100)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name

    def test_gradients_against_the_reference(self):
        layer = block(options=OPTIONS["gated shared"])
        x = tokens(20).requires_grad_()
        out, routing = layer(x, return_routing=True)
        seeds = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        out.backward(seeds)
        mine = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"x": x.grad}
        ids = routing.topk_ids_TK
        results = []
        for dtype in (torch.float64, torch.float32):
            leaves = {name: p.detach().to(dtype, copy=True).requires_grad_() for name, p in layer.named_parameters()}
            leaf_x = x.detach().to(dtype, copy=True).requires_grad_()
            logits = reference.router_logits(
                leaf_x, leaves["router.classifier.weight"], num_experts=E, num_zero_experts=5, dtype=dtype
            )
            chosen = reference.select(
                logits, K, num_experts=E, zero_expert_kinds=MIXED, ids_TK=ids, dtype=dtype
            ).topk_weights_TK
            params = type("Params", (), {name: leaves[name] for name in ("constant_router", "constant_value", "scale")})
            y = reference.experts(
                leaf_x,
                leaves["w13"],
                leaves["w2"],
                chosen,
                ids,
                num_experts=E,
                zero_expert_kinds=MIXED,
                affine_params=params,
                dtype=dtype,
            ) + reference.shared_experts(
                leaf_x,
                leaves["shared_experts.gate_up_proj.weight"],
                leaves["shared_experts.down_proj.weight"],
                leaves["shared_experts.gate.weight"],
                dtype=dtype,
            )
            y.backward(seeds.to(dtype))
            results.append({name: leaf.grad for name, leaf in leaves.items()} | {"x": leaf_x.grad})
        for name, grad in mine.items():
            judge(grad, results[0][name], results[1][name], f"gradient of {name}")

    def test_compiles_whole(self):
        layer = block(options=OPTIONS["gated shared"])
        x = tokens()
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)

    def test_autocast(self):
        layer = block(options=OPTIONS["gated shared"])
        x = tokens().requires_grad_()
        exact = layer(x, return_routing=True)
        with torch.autocast("cpu", torch.bfloat16):
            out, routing = layer(x, return_routing=True)
        assert_bitwise(routing.logits_TA, exact[1].logits_TA)
        assert (out.float() - exact[0]).abs().max() < 0.05 * exact[0].abs().max()
        out.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.grad is not None)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "options", "parts"),
        [
            ({"activation": "relu"}, {}, ["activation", "relu"]),
            ({"scoring_func": "relu"}, {}, ["scoring_func", "relu"]),
            ({"zero_expert_kinds": (("other", 2),)}, {}, ["other", "identity"]),
            ({"zero_expert_kinds": ()}, {"tied_null": True}, ["tied_null"]),
        ],
    )
    def test_construction(self, changes, options, parts):
        with pytest.raises(ValueError) as error:
            MoE(config_of(**changes), **options)
        for part in parts:
            assert part in str(error.value), str(error.value)

    def test_hidden_states(self):
        with pytest.raises(ValueError, match=r"hidden_states.*10.*\(3, 11\)"):
            block()(torch.zeros(3, 11))
        with pytest.raises(ValueError, match="hidden_states"):
            block()(torch.zeros(()))

    def test_hidden_states_of_another_dtype(self):
        with pytest.raises(ValueError, match=r"bfloat16.*float32"):
            block()(tokens(dtype=torch.bfloat16))

    def test_previous_logits(self):
        with pytest.raises(ValueError, match="prev_logits"):
            block()(tokens(), previous_logits())
        with pytest.raises(ValueError, match="prev_logits"):
            block(options={"gating_residual": True})(tokens(), previous_logits(13))


class TestConfig:
    def test_is_frozen_and_by_keyword(self):
        with pytest.raises(AttributeError):
            config_of().top_k = 2
        with pytest.raises(TypeError):
            MoEConfig(10, 8, 6, 3)

    def test_canonical(self):
        config = config_of(renormalize=True, zero_expert_kinds=[("copy", 2), ["null", 1], ("zero", 0)])
        assert config.renormalize == "all" and config.zero_expert_kinds == (("identity", 2), ("zero", 1))
        assert (config.num_zero_experts, config.num_slots) == (3, 9)
        assert config_of(renormalize=False).renormalize == "none"
        assert hash(config) == hash(config_of(renormalize=True, zero_expert_kinds=(("identity", 2), ("zero", 1))))

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"hidden_size": 0}, ["hidden_size", "0"]),
            ({"intermediate_size": -1}, ["intermediate_size", "-1"]),
            ({"num_experts": -1}, ["num_experts", "-1"]),
            ({"top_k": 0}, ["top_k", "0"]),
            ({"top_k": True}, ["top_k", "True"]),
            ({"top_k": 12}, ["top_k", "12", "11"]),
            ({"renormalize": "some"}, ["renormalize", "some"]),
            ({"zero_expert_kinds": "identity"}, ["zero_expert", "identity"]),
            ({"zero_expert_kinds": None}, ["zero_expert", "None"]),
            ({"routed_scaling_factor": None}, ["routed_scaling_factor", "None"]),
            ({"routed_scaling_factor": "6"}, ["routed_scaling_factor", "'6'"]),
            ({"routed_scaling_factor": float("nan")}, ["routed_scaling_factor", "nan"]),
            ({"zero_expert_kinds": (("identity", -1),)}, ["identity", "-1"]),
            ({"num_expert_group": 2}, ["num_expert_group", "topk_group"]),
            ({"num_expert_group": 3, "topk_group": 1}, ["num_expert_group", "3", "11"]),
            ({"num_expert_group": 11, "topk_group": 2}, ["top_k", "3", "2"]),
        ],
    )
    def test_refused(self, changes, parts):
        with pytest.raises(ValueError) as error:
            config_of(**changes)
        for part in parts:
            assert part in str(error.value), str(error.value)


def test_shapes_on_the_meta_device() -> None:
    """A model can be sized without memory; the meta device knows no autocast."""
    kinds = (("constant", 2), ("identity", 2))
    config = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=6, top_k=3, zero_expert_kinds=kinds)
    assert MoE(config).to("meta")(torch.empty(2, 5, 16, device="meta")).shape == (2, 5, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_shared_experts_have_the_dtype_of_the_others(dtype) -> None:
    """As the layer has that is cast after it was made: its own tokens are what it takes."""
    options = {"shared_intermediate_size": 6, "shared_gated": True}
    layer, cast = block(dtype, options), block(None, options).to(dtype)
    assert all(parameter.dtype == dtype for parameter in layer.shared_experts.parameters())
    cast.load_state_dict(layer.state_dict())
    x = tokens(dtype=dtype)
    assert torch.equal(layer(x), cast(x))
