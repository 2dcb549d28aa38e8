"""FusedMoE and ZeroExpertFusedMoE (docs/specification.md, "Engine names"): what they compute."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.judge import assert_bitwise, judge
from helpers.layers import (
    BASE,
    MIXED,
    A,
    Classifier,
    E,
    H,
    K,
    Z,
    base_layer,
    fill,
    judge_layer,
    rules,
    tokens,
    zero_layer,
)
from zemoe import ZeroExpertFusedMoE, observe, reference, select_experts
from zemoe.scores import SCORES

pytestmark = pytest.mark.usefixtures("poisoned_empty")


class TestForward:
    @pytest.mark.parametrize("groups", [None, (2, 1)], ids=str)
    @pytest.mark.parametrize("mode", [False, True, "real", "nonnull"])
    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    def test_rules(self, scoring_func, mode, groups):
        router = Classifier()
        kwargs = {"scoring_func": scoring_func, "renormalize": mode, "routed_scaling_factor": 2.5}
        if groups:
            kwargs |= {"use_grouped_topk": True, "num_expert_group": groups[0], "topk_group": groups[1]}
        layer = zero_layer(MIXED, router=router, **kwargs)
        x, logits = tokens()
        judge_layer(layer(x, logits), layer, x, logits, MIXED, router.e_score_correction_bias)

    @pytest.mark.parametrize("kind", ["identity", "copy", "zero", "null", "constant", "scaled_identity"])
    def test_kinds(self, kind):
        layer = zero_layer(kind)
        x, logits = tokens()
        judge_layer(layer(x, logits), layer, x, logits, ((kind, Z),))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype):
        layer = zero_layer(MIXED, params_dtype=dtype)
        x, logits = tokens(dtype=dtype)
        assert layer.w13_weight.dtype == layer.w2_weight.dtype == dtype
        out = layer(x, logits)
        assert out.dtype == dtype and out.device == x.device
        judge_layer(out, layer, x, logits, MIXED)

    @pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
    def test_activations(self, activation):
        layer = zero_layer(activation=activation)
        x, logits = tokens()
        judge_layer(layer(x, logits), layer, x, logits, (("identity", Z),))

    def test_the_base_class(self):
        layer = base_layer(e_score_correction_bias=torch.linspace(-0.2, 0.2, E), renormalize=True)
        x, logits = tokens(slots=E)
        judge_layer(layer(x, logits), layer, x, logits, (), torch.linspace(-0.2, 0.2, E))

    def test_no_zero_experts_is_the_base_class(self):
        base, layer = base_layer(), zero_layer(num=0)
        x, logits = tokens(slots=E)
        assert_bitwise(layer(x, logits), base(x, logits))

    @pytest.mark.parametrize("T", [0, 1, 33])
    def test_numbers_of_tokens(self, T):
        layer = zero_layer()
        x, logits = tokens(T)
        out = layer(x, logits)
        assert out.shape == (T, H)
        judge_layer(out, layer, x, logits, (("identity", Z),))

    @pytest.mark.parametrize("shape", [(2, 5), (5, 2, 1), (1, 10)])
    def test_leading_dimensions(self, shape):
        layer = zero_layer(MIXED)
        x, logits = tokens()
        out = layer(x.reshape(*shape, H), logits.reshape(*shape, A))
        assert out.shape == (*shape, H)
        assert_bitwise(out.reshape(10, H), layer(x, logits))

    def test_one_vector(self):
        layer = zero_layer(MIXED)
        x, logits = tokens(1)
        assert_bitwise(layer(x[0], logits[0]), layer(x, logits)[0])

    def test_not_contiguous(self):
        layer = zero_layer(MIXED)
        x, logits = tokens()
        out = layer(x.T.contiguous().T, logits.T.contiguous().T)
        torch.testing.assert_close(out, layer(x, logits), rtol=1e-5, atol=1e-5)

    def test_transposed_batch(self):
        """[S, B, H] seen as [B, S, H], as sequence-first models have it."""
        layer = zero_layer(MIXED)
        x, logits = tokens(12)
        out = layer(x.view(4, 3, H).transpose(0, 1), logits.view(4, 3, A).transpose(0, 1))
        assert out.shape == (3, 4, H)
        torch.testing.assert_close(out.transpose(0, 1).reshape(12, H), layer(x, logits), rtol=1e-5, atol=1e-5)

    def test_inputs_are_left_alone(self):
        layer = zero_layer(MIXED, router=Classifier())
        x, logits = tokens()
        before = x.clone(), logits.clone(), {name: value.clone() for name, value in layer.state_dict().items()}
        layer(x, logits)
        assert_bitwise(x, before[0])
        assert_bitwise(logits, before[1])
        for name, value in layer.state_dict().items():
            assert_bitwise(value, before[2][name])

    def test_nothing_is_kept(self):
        layer = zero_layer(MIXED, router=Classifier())
        x, logits = tokens()
        before = dict(vars(layer))
        layer(x, logits)
        after = dict(vars(layer))
        assert before.keys() == after.keys()
        assert all(before[name] is after[name] for name in before)

    def test_twice_the_same_bits(self):
        layer = zero_layer(MIXED)
        x, logits = tokens(200)
        assert_bitwise(layer(x, logits), layer(x, logits))

    def test_bf16_logits_are_routed_in_float32(self):
        layer = zero_layer()
        x, logits = tokens()
        assert_bitwise(layer(x, logits.bfloat16()), layer(x, logits.bfloat16().float()))

    def test_deepcopy_and_pickle(self, tmp_path):
        layer = zero_layer(MIXED, router=Classifier())
        x, logits = tokens()
        expected = layer(x, logits)
        assert_bitwise(copy.deepcopy(layer)(x, logits), expected)
        torch.save(layer, tmp_path / "layer.pt")
        assert_bitwise(torch.load(tmp_path / "layer.pt", weights_only=False)(x, logits), expected)

    def test_state_dict_goes_round(self):
        layer, other = zero_layer(MIXED, router=Classifier()), zero_layer(MIXED, router=Classifier())
        fill(other, seed=9)
        other.load_state_dict(layer.state_dict())
        x, logits = tokens()
        assert_bitwise(other(x, logits), layer(x, logits))
        assert set(layer.state_dict()) == {"w13_weight", "w2_weight", "constant_router", "constant_value", "scale"}

    def test_affine_parameters_stay_float32(self):
        layer = zero_layer(MIXED, params_dtype=torch.bfloat16)
        assert {p.dtype for n, p in layer.named_parameters() if not n.startswith("w")} == {torch.float32}
        assert (ZeroExpertFusedMoE(Z, MIXED, None, **BASE).scale == 1).all()

    def test_observed(self):
        layer = zero_layer(MIXED)
        x, logits = tokens()
        with observe(nn.ModuleDict({"mlp": layer})) as none_ran:
            pass
        assert len(none_ran) == 0
        with observe(layer) as seen:
            layer(x.reshape(2, 5, H), logits.reshape(2, 5, A))
        (routing,) = seen.values()
        assert_bitwise(routing.logits_TA, logits)
        for got, expected in zip(routing, layer.route(x, logits), strict=True):
            assert_bitwise(got, expected)


class TestDecomposition:
    """full = real + zero, from one routing."""

    @pytest.mark.parametrize("kinds", ["identity", "zero", "constant", "scaled_identity", MIXED], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_full_is_real_plus_zero(self, kinds, dtype):
        layer = zero_layer(kinds, params_dtype=dtype, routed_scaling_factor=3.0)
        x, logits = tokens(40, dtype=dtype)
        _, weights, ids = layer.route(x, logits)
        zero = layer._compute_zero_expert_result(x, weights, ids)
        assert zero.shape == x.shape and zero.dtype == dtype
        base = base_layer(
            params_dtype=dtype, custom_routing_function=lambda **_: (weights, ids.masked_fill(ids >= E, -1))
        )
        base.load_state_dict(layer.state_dict(), strict=False)
        real = base(x, logits[:, :E])
        exact = real.double() + zero.double()
        own = (real + zero).to(dtype)
        judge(layer(x, logits), exact, own)

    def test_exact_where_sums_are_exact(self):
        """Whole numbers and halves: every order of adding gives the same bits."""
        layer = zero_layer("identity")
        with torch.no_grad():
            layer.w13_weight.copy_(torch.randint(-1, 2, layer.w13_weight.shape).float())
            layer.w2_weight.zero_()
        x = torch.randint(-8, 9, (20, H)).float()
        _, logits = tokens(20)
        ids = layer.route(x, logits).topk_ids_TK
        weights = torch.full(ids.shape, 0.5)
        zero = layer._compute_zero_expert_result(x, weights, ids)
        assert_bitwise(zero, 0.5 * (ids >= E).sum(1, keepdim=True) * x)

    def test_tokens_without_a_zero_expert_get_nothing(self):
        layer = zero_layer("identity")
        x, _ = tokens(3)
        ids = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 6, 2]])
        zero = layer._compute_zero_expert_result(x, torch.ones(3, K), ids)
        assert (zero[:2] == 0).all()
        assert_bitwise(zero[2], x[2])

    def test_against_the_reference(self):
        layer = zero_layer(MIXED)
        x, logits = tokens(30)
        _, weights, ids = layer.route(x, logits)
        only_zero = ids.masked_fill(ids < E, -1)
        results = [
            reference.experts(
                x,
                layer.w13_weight,
                layer.w2_weight,
                weights,
                only_zero,
                num_experts=E,
                zero_expert_kinds=MIXED,
                affine_params=layer._affine_params(),
                dtype=dtype,
            )
            for dtype in (torch.float64, torch.float32)
        ]
        judge(layer._compute_zero_expert_result(x, weights, ids), *results)

    def test_inputs_are_left_alone(self):
        layer = zero_layer(MIXED)
        x, logits = tokens()
        _, weights, ids = layer.route(x, logits)
        before = x.clone(), weights.clone(), ids.clone()
        layer._compute_zero_expert_result(x, weights, ids)
        for tensor, expected in zip((x, weights, ids), before, strict=True):
            assert_bitwise(tensor, expected)

    def test_none_without_zero_experts(self):
        x, logits = tokens(slots=E)
        layer = zero_layer(num=0)
        _, weights, ids = layer.route(x, logits)
        assert layer._compute_zero_expert_result(x, weights, ids) is None

    def test_leading_dimensions(self):
        layer = zero_layer(MIXED)
        x, logits = tokens()
        _, weights, ids = layer.route(x, logits)
        shaped = layer._compute_zero_expert_result(x.reshape(2, 5, H), weights, ids)
        assert_bitwise(shaped.reshape(10, H), layer._compute_zero_expert_result(x, weights, ids))

    @pytest.mark.parametrize("slot", range(E, A))
    @pytest.mark.parametrize("scale", [1.0, 6.0])
    def test_pushed_to_an_identity(self, slot, scale):
        """+10 on a zero expert's logit: the output is x times that slot's weight (here K = 1)."""
        layer = zero_layer("identity", top_k=1, routed_scaling_factor=scale)
        x, logits = tokens()
        logits[4, slot] += 10
        weight = scale * logits[4].softmax(-1)[slot]
        out = layer(x, logits)
        assert layer.route(x, logits).topk_ids_TK[4].tolist() == [slot]
        torch.testing.assert_close(out[4], x[4] * weight)

    def test_pushed_to_nothing(self):
        layer = zero_layer("zero", top_k=1)
        x, logits = tokens()
        logits[:, E:] += 10
        assert (layer(x, logits) == 0).all()


class TestBias:
    def test_the_routers_whole_bias_selects(self):
        router = Classifier()
        layer = zero_layer(router=router)
        x, logits = tokens()
        expected = select_experts(logits, K, num_experts=E, e_score_correction_bias=router.e_score_correction_bias)
        _, weights, ids = layer.route(x, logits)
        assert_bitwise(ids, expected[1])
        assert_bitwise(weights, expected[0])
        with torch.no_grad():
            router.e_score_correction_bias[E + 1] = 50.0
        assert (layer.route(x, logits).topk_ids_TK[:, 0] == E + 1).all()

    def test_the_layer_shows_its_first_entries(self):
        router = Classifier()
        layer = zero_layer(router=router)
        assert_bitwise(layer.e_score_correction_bias, router.e_score_correction_bias[:E].detach())

    def test_it_is_live(self):
        """A trainer or a loader that writes into the router's bias changes both."""
        router = Classifier()
        layer = zero_layer(router=router)
        with torch.no_grad():
            router.e_score_correction_bias.copy_(torch.arange(A).float())
        assert layer.e_score_correction_bias.tolist() == list(range(E))
        x, logits = tokens()
        assert layer.route(x, logits).topk_ids_TK.tolist() == [[9, 8, 7]] * 10

    @pytest.mark.parametrize("kinds", ["identity", MIXED], ids=str)
    def test_a_users_short_bias_is_kept(self, kinds):
        """The user's bias of length E, and a router without one: zero-computation slots then get 0."""
        own = torch.linspace(1, 2, E)
        layer = zero_layer(kinds, router=Classifier(bias=False), e_score_correction_bias=own)
        assert_bitwise(layer.e_score_correction_bias, own)
        x, logits = tokens()
        assert (layer.route(x, logits).topk_ids_TK < E).all()

    def test_a_users_bias_of_another_length_is_kept(self):
        """Shown as it is; the router's own, of length A, is what selects. Without that one it can't be used."""
        own, router = torch.linspace(1, 2, E + 1), Classifier()
        layer = zero_layer(router=router, e_score_correction_bias=own)
        assert_bitwise(layer.e_score_correction_bias, own)
        x, logits = tokens()
        assert_bitwise(layer(x, logits), zero_layer(router=router)(x, logits))
        with pytest.raises(ValueError, match=r"e_score_correction_bias.*\(6,\), \(10,\).*\(7,\)"):
            zero_layer(router=None, e_score_correction_bias=own)

    def test_a_users_full_bias(self):
        own = torch.zeros(A)
        own[7] = 9.0
        layer = zero_layer(router=None, e_score_correction_bias=own)
        x, logits = tokens()
        assert (layer.route(x, logits).topk_ids_TK[:, 0] == 7).all()

    def test_no_router_no_bias(self):
        layer = zero_layer(router=None)
        assert layer.e_score_correction_bias is None
        x, logits = tokens()
        expected = select_experts(logits, K, num_experts=E)
        assert_bitwise(layer.route(x, logits).topk_ids_TK, expected[1])

    def test_a_router_that_is_no_module(self):
        router = SimpleNamespace(e_score_correction_bias=torch.full((A,), 0.0))
        router.e_score_correction_bias[8] = 9.0
        layer = zero_layer(router=router)
        x, logits = tokens()
        assert (layer.route(x, logits).topk_ids_TK[:, 0] == 8).all()

    def test_it_only_selects(self):
        router = Classifier()
        layer = zero_layer(router=router)
        x, logits = tokens()
        _, weights, ids = layer.route(x, logits)
        torch.testing.assert_close(weights, logits.softmax(-1).gather(1, ids))

    def test_the_router_is_not_saved_twice(self):
        router = Classifier()
        model = nn.ModuleDict({"router": router, "experts": zero_layer(router=router)})
        names = set(model.state_dict())
        assert names == {"router.weight", "router.e_score_correction_bias", "experts.w13_weight", "experts.w2_weight"}
        assert model["experts"].router is router


class TestCompile:
    @pytest.mark.parametrize("kinds", ["identity", MIXED], ids=str)
    def test_forward_and_backward_whole(self, kinds):
        results = []
        for compiled in (False, True):
            layer = zero_layer(kinds, router=Classifier(), routed_scaling_factor=2.0, renormalize=True)
            x, logits = (tensor.requires_grad_() for tensor in tokens(20))
            function = layer
            if compiled:
                torch._dynamo.reset()
                # The default compiler once; for the other the graphs are what matters.
                function = torch.compile(layer, fullgraph=True, backend="inductor" if kinds == MIXED else "aot_eager")
            out = function(x, logits)
            out.square().sum().backward()
            results.append([out, x.grad, logits.grad, *(p.grad for p in layer.parameters())])
        for eager, compiled in zip(*results, strict=True):
            assert eager is not None
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)

    def test_other_numbers_of_tokens(self):
        layer = zero_layer(MIXED)
        torch._dynamo.reset()
        function = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for T in (1, 7, 30, 8):
            x, logits = tokens(T)
            torch.testing.assert_close(function(x, logits), layer(x, logits), rtol=1e-4, atol=1e-4)

    def test_the_zero_result_traces(self):
        layer = zero_layer()
        x, logits = tokens()
        _, weights, ids = layer.route(x, logits)
        torch._dynamo.reset()
        function = torch.compile(layer._compute_zero_expert_result, fullgraph=True, backend="aot_eager")
        expected = layer._compute_zero_expert_result(x, weights, ids)
        torch.testing.assert_close(function(x, weights, ids), expected)


class TestGradients:
    @pytest.mark.parametrize("mode", ["none", "all", "real", "nonnull"])
    def test_against_the_reference(self, mode):
        router = Classifier()
        names = ["x", "logits", "w13_weight", "w2_weight", "constant_router", "constant_value", "scale"]
        layer = zero_layer(MIXED, router=router, renormalize=mode, scoring_func="sigmoid")
        x, logits = (tensor.requires_grad_() for tensor in tokens(20))
        seeds = torch.randn(20, H, generator=torch.Generator().manual_seed(3))
        layer(x, logits).backward(seeds)
        mine = [x.grad, logits.grad, *(getattr(layer, name).grad for name in names[2:])]
        ids = layer.route(x, logits).topk_ids_TK
        results = []
        for dtype in (torch.float64, torch.float32):
            leaves = [
                tensor.detach().to(dtype).requires_grad_()
                for tensor in (x, logits, *(getattr(layer, name) for name in names[2:]))
            ]
            chosen = reference.select(
                leaves[1],
                K,
                ids_TK=ids,
                dtype=dtype,
                **rules(layer, MIXED, router.e_score_correction_bias.detach()),
            )
            params = SimpleNamespace(constant_router=leaves[4], constant_value=leaves[5], scale=leaves[6])
            reference.experts(
                leaves[0],
                leaves[2],
                leaves[3],
                chosen.topk_weights_TK,
                ids,
                num_experts=E,
                zero_expert_kinds=MIXED,
                affine_params=params,
                dtype=dtype,
            ).backward(seeds.to(dtype))
            results.append([leaf.grad for leaf in leaves])
        for name, grad, exact, own in zip(names, mine, *results, strict=True):
            judge(grad, exact, own, f"gradient of {name}")

    def test_the_routers_bias_gets_none(self):
        router = Classifier()
        layer = zero_layer(router=router)
        x, _ = tokens()
        layer(x, router(x)).sum().backward()
        assert router.e_score_correction_bias.grad is None and router.weight.grad is not None
