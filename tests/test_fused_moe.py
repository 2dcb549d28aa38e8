"""FusedMoE and ZeroExpertFusedMoE, member by member (section 3 of the specification)."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from judge import assert_bitwise, judge, one_thread
from zemoe import FusedMoE, ZeroExpertFusedMoE, observe, reference, select_experts
from zemoe.routing import SCORES

pytestmark = pytest.mark.usefixtures("poisoned_empty")

E, Z, H, I, K = 6, 4, 16, 12, 3
A = E + Z
MIXED = (("constant", 1), ("identity", 1), ("null", 1), ("scaled_identity", 1))
BASE = {"num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": I, "renormalize": False}


class Classifier(nn.Module):
    """A router as engines have it: a weight and a bias that only selects."""

    def __init__(self, slots: int = A, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(slots, H, generator=generator))
        values = 0.3 * torch.randn(slots, generator=generator)
        self.e_score_correction_bias = nn.Parameter(values) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() @ self.weight.T


def fill(layer: FusedMoE, seed: int = 0) -> FusedMoE:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
    return layer


def zero_layer(kinds="identity", num: int = Z, router: nn.Module | None = None, **kwargs) -> ZeroExpertFusedMoE:
    return fill(ZeroExpertFusedMoE(num, kinds, router, **{**BASE, **kwargs}))


def base_layer(**kwargs) -> FusedMoE:
    return fill(FusedMoE(**{**BASE, **kwargs}))


def tokens(T: int = 10, slots: int = A, seed: int = 1, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, H, generator=generator).to(dtype), torch.randn(T, slots, generator=generator)


def rules(layer: FusedMoE, kinds, bias: torch.Tensor | None = None) -> dict:
    return {
        "num_experts": layer.num_experts,
        "zero_expert_kinds": kinds,
        "scoring_func": layer.scoring_func,
        "renormalize": layer.renormalize,
        "e_score_correction_bias": bias,
        "routed_scaling_factor": layer.routed_scaling_factor,
        "num_expert_group": layer.num_expert_group if layer.use_grouped_topk else None,
        "topk_group": layer.topk_group if layer.use_grouped_topk else None,
    }


def judge_layer(out, layer, x, logits, kinds, bias=None) -> None:
    """The whole layer against the reference, with the layer's own ids."""
    ids = layer.route(x, logits).topk_ids_TK
    params = SimpleNamespace(
        constant_router=getattr(layer, "constant_router", None),
        constant_value=getattr(layer, "constant_value", None),
        scale=getattr(layer, "scale", None),
    )
    results = []
    for dtype in (torch.float64, x.dtype):
        routed = torch.float64 if dtype == torch.float64 else torch.float32
        weights = reference.select(
            logits, layer.top_k, ids_TK=ids, dtype=routed, **rules(layer, kinds, bias)
        ).topk_weights_TK
        if x.dtype == torch.float64:  # routing stays float32, so only what follows it can be judged in float64
            weights = layer.route(x, logits).topk_weights_TK
        with one_thread():
            exact_or_own = reference.experts(
                x,
                layer.w13_weight,
                layer.w2_weight,
                weights,
                ids,
                num_experts=layer.num_experts,
                zero_expert_kinds=kinds,
                affine_params=params,
                activation=layer.activation,
                dtype=dtype,
            )
        results.append(exact_or_own)
    judge(out, *results)


# ----------------------------------------------------------------------------------------------------------- forward


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


# -------------------------------------------------------------------------------------------------------------- bias


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
        with pytest.raises(ValueError, match=r"e_score_correction_bias.*7"):
            zero_layer(router=None, e_score_correction_bias=own)(x, logits)

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


# ------------------------------------------------------------------------------------------------------- attributes


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


# -------------------------------------------------------------------------------------------------------------- memo


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
        from zemoe.experts import BACKENDS

        plans = []
        backend = BACKENDS["cpu"]

        def spy(x, weights, row_token, slot_row, offsets, *rest):
            plans.append((row_token, slot_row, offsets))
            return backend.moe_ffn(x, weights, row_token, slot_row, offsets, *rest)

        import dataclasses

        monkeypatch.setitem(BACKENDS, "cpu", dataclasses.replace(backend, moe_ffn=spy))
        layer = zero_layer(MIXED)
        x, logits = tokens(50)
        layer(x, logits)
        ((_, slot_row, offsets),) = plans
        ids = layer.route(x, logits).topk_ids_TK
        assert offsets[-1] == (ids < E).sum() < ids.numel()
        assert ((slot_row >= 0) == (ids < E)).all()


# -------------------------------------------------------------------------------------------------- compile, training


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


# -------------------------------------------------------------------------------------------- what engines hand over

NEUTRAL = {
    "quant_config": [None],
    "reduce_results": [True, False],
    "tp_size": [None, 0, 1],
    "ep_size": [None, 0, 1],
    "dp_size": [None, 0, 1],
    "apply_router_weight_on_input": [None, False, 0],
    "has_bias": [None, False, 0],
    "num_redundant_experts": [None, False, 0],
    "enable_eplb": [None, False, 0],
}
REFUSED = {
    "quant_config": [object(), {"bits": 8}],
    "tp_size": [2, 8],
    "ep_size": [2],
    "dp_size": [2],
    "apply_router_weight_on_input": [True],
    "has_bias": [True],
    "num_redundant_experts": [1],
    "enable_eplb": [True],
}


class TestArguments:
    def test_names_of_section_3(self):
        layer = zero_layer(
            MIXED,
            router=Classifier(),
            scoring_func="sigmoid",
            e_score_correction_bias=None,
            routed_scaling_factor=2.5,
            use_grouped_topk=True,
            num_expert_group=2,
            topk_group=1,
            activation="gelu",
            custom_routing_function=None,
            params_dtype=torch.bfloat16,
            prefix="model.layers.3.mlp.experts",
        )
        assert layer.prefix == "model.layers.3.mlp.experts"
        assert (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size) == (E, K, H, I)
        assert (layer.zero_expert_num, layer.zero_expert_type) == (Z, MIXED)
        assert (layer.scoring_func, layer.routed_scaling_factor, layer.activation) == ("sigmoid", 2.5, "gelu")
        assert (layer.use_grouped_topk, layer.num_expert_group, layer.topk_group) == (True, 2, 1)
        assert layer.w13_weight.shape == (E, 2 * I, H) and layer.w2_weight.shape == (E, H, I)
        assert isinstance(layer, FusedMoE) and isinstance(layer.w13_weight, nn.Parameter)

    def test_positional_order(self):
        """zero_expert_num, zero_expert_type, router come first."""
        router = Classifier()
        layer = ZeroExpertFusedMoE(Z, "identity", router, **BASE)
        assert layer.zero_expert_num == Z and layer.router is router

    def test_without_grouped_topk_groups_have_no_effect(self):
        x, logits = tokens()
        layer = zero_layer(num_expert_group=2, topk_group=1)
        assert_bitwise(layer(x, logits), zero_layer()(x, logits))

    @pytest.mark.parametrize(("name", "value"), [(name, value) for name in NEUTRAL for value in NEUTRAL[name]])
    @pytest.mark.parametrize("make", [base_layer, zero_layer])
    def test_accepted(self, make, name, value):
        make(**{name: value})

    @pytest.mark.parametrize(("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]])
    @pytest.mark.parametrize("make", [base_layer, zero_layer])
    def test_refused(self, make, name, value):
        with pytest.raises(ValueError, match=name) as error:
            make(**{name: value})
        message = str(error.value)
        assert repr(value) in message and ";" in message and len(message.split(";")[-1].split()) >= 2

    @pytest.mark.parametrize("make", [base_layer, zero_layer])
    def test_unknown(self, make):
        with pytest.raises(TypeError, match="num_expertz"):
            make(num_expertz=3)

    def test_missing(self):
        with pytest.raises(TypeError):
            FusedMoE(num_experts=E, top_k=K, hidden_size=H)
        with pytest.raises(TypeError):
            ZeroExpertFusedMoE(zero_expert_num=Z, zero_expert_type="identity", **BASE)

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"top_k": A + 1}, ["top_k", "11", "10"]),
            ({"top_k": 0}, ["top_k", "0"]),
            ({"num_experts": -1}, ["num_experts", "-1"]),
            ({"hidden_size": 0}, ["hidden_size", "0"]),
            ({"intermediate_size": -3}, ["intermediate_size", "-3"]),
            ({"renormalize": "some"}, ["renormalize", "some"]),
            ({"scoring_func": "relu"}, ["scoring_func", "relu"]),
            ({"activation": "relu"}, ["activation", "relu"]),
            ({"use_grouped_topk": True}, ["num_expert_group", "None"]),
            ({"use_grouped_topk": True, "num_expert_group": 3, "topk_group": 1}, ["num_expert_group", "3", "10"]),
            ({"use_grouped_topk": True, "num_expert_group": 5, "topk_group": 1}, ["top_k", "3", "2"]),
        ],
    )
    def test_values_that_do_not_fit(self, change, parts):
        """At construction, not at the first forward."""
        with pytest.raises(ValueError) as error:
            ZeroExpertFusedMoE(Z, "identity", None, **{**BASE, **change})
        for part in parts:
            assert part in str(error.value), str(error.value)

    @pytest.mark.parametrize(
        ("num", "kinds", "parts"),
        [
            (-1, "identity", ["zero_expert_num", "-1"]),
            (4, "other", ["zero_expert_type", "other", "identity"]),
            (4, (("identity", 3),), ["zero_expert_num", "4", "3"]),
            (4, (("identity", 3), ("other", 1)), ["zero_expert_type", "other"]),
            (4, (("identity", 5), ("zero", -1)), ["zero", "-1"]),
        ],
    )
    def test_zero_experts_that_do_not_fit(self, num, kinds, parts):
        with pytest.raises(ValueError) as error:
            ZeroExpertFusedMoE(num, kinds, None, **BASE)
        for part in parts:
            assert part in str(error.value), str(error.value)

    @pytest.mark.parametrize(
        ("x", "logits", "parts"),
        [
            (torch.zeros(10, H + 1), torch.zeros(10, A), ["hidden_states", "17", "16"]),
            (torch.zeros(10, H), torch.zeros(10, E), ["router_logits", "6", "10"]),
            (torch.zeros(10, H), torch.zeros(10, E + 1), ["router_logits", "7", "10"]),
            (torch.zeros(10, H), torch.zeros(9, A), ["router_logits", "(9, 10)", "10"]),
            (torch.zeros(2, 5, H), torch.zeros(10, A), ["router_logits", "(10, 10)", "(2, 5, 10)"]),
            (torch.zeros(10, H), torch.zeros(10, A, dtype=torch.int64), ["logits", "int64"]),
            (torch.zeros(10, H), torch.zeros(10, A, device="meta"), ["router_logits", "meta", "cpu"]),
            (torch.zeros(10, H, dtype=torch.bfloat16), torch.zeros(10, A), ["bfloat16", "float32"]),
            (torch.zeros(10, H, dtype=torch.int64), torch.zeros(10, A), ["hidden_states", "int64"]),
            (torch.zeros(()), torch.zeros(A), ["hidden_states"]),
        ],
    )
    def test_inputs_that_do_not_fit(self, x, logits, parts):
        with pytest.raises(ValueError) as error:
            zero_layer()(x, logits)
        for part in parts:
            assert part in str(error.value), str(error.value)


class TestCustomRouting:
    def test_refused_by_the_subclass(self):
        with pytest.raises(ValueError, match="custom_routing_function"):
            ZeroExpertFusedMoE(Z, "identity", None, **BASE, custom_routing_function=lambda *_, **__: None)
        ZeroExpertFusedMoE(Z, "identity", None, **BASE, custom_routing_function=None)

    @pytest.mark.parametrize("renormalize", [True, False])
    def test_of_the_base_class(self, renormalize):
        calls = []

        def route(hidden_states, gating_output, topk, renormalize):
            calls.append((hidden_states, gating_output, topk, renormalize))
            weights = torch.full((len(hidden_states), topk), 0.5)
            return weights, torch.arange(topk).expand(len(hidden_states), topk)

        layer = base_layer(custom_routing_function=route, renormalize=renormalize)
        x, logits = tokens(slots=E)
        out = layer(x, logits)
        ((got_x, got_logits, topk, got_renormalize),) = calls
        assert_bitwise(got_x, x)
        assert_bitwise(got_logits, logits)
        assert (topk, got_renormalize) == (K, renormalize)
        arguments = (x, layer.w13_weight, layer.w2_weight, torch.full((10, K), 0.5), torch.arange(K).expand(10, K))
        exact, own = (reference.experts(*arguments, num_experts=E, dtype=d) for d in (torch.float64, torch.float32))
        judge(out, exact, own)

    def test_int32_ids_as_engines_return_them(self):
        def route(hidden_states, gating_output, topk, renormalize):
            weights, ids = gating_output.softmax(-1).topk(topk)
            return weights, ids.int()

        layer = base_layer(custom_routing_function=route)
        x, logits = tokens(slots=E)
        torch.testing.assert_close(layer(x, logits), base_layer()(x, logits), rtol=1e-5, atol=1e-5)


class TestWeightLoader:
    W = {  # noqa: RUF012
        "w1": torch.full((I, H), 1.0),
        "w3": torch.full((I, H), 3.0),
        "w2": torch.full((H, I), 2.0),
    }

    def param(self, layer: FusedMoE, shard: str) -> nn.Parameter:
        return layer.w2_weight if shard == "w2" else layer.w13_weight

    @pytest.mark.parametrize("shard", ["w1", "w2", "w3"])
    def test_one_matrix(self, shard):
        layer = zero_layer()
        expected = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.weight_loader(self.param(layer, shard), self.W[shard], f"experts.2.{shard}.weight", shard, 2)
        place = {
            "w1": expected["w13_weight"][2, :I],
            "w3": expected["w13_weight"][2, I:],
            "w2": expected["w2_weight"][2],
        }
        place[shard].copy_(self.W[shard])
        for name, value in layer.state_dict().items():
            assert_bitwise(value, expected[name])

    def test_gate_rows_first(self):
        layer = zero_layer()
        for shard in ("w1", "w3", "w2"):
            layer.weight_loader(self.param(layer, shard), self.W[shard], "w", shard_id=shard, expert_id=0)
        assert (layer.w13_weight[0, :I] == 1).all() and (layer.w13_weight[0, I:] == 3).all()
        assert (layer.w2_weight[0] == 2).all()

    def test_return_success(self):
        layer = zero_layer()
        assert layer.weight_loader(layer.w2_weight, self.W["w2"], "w", "w2", 0) is None
        assert layer.weight_loader(layer.w2_weight, self.W["w2"], "w", "w2", 0, return_success=True) is True
        for expert in (E, A - 1, A + 5):
            before = layer.w2_weight.clone()
            assert layer.weight_loader(layer.w2_weight, self.W["w2"], "w", "w2", expert, return_success=True) is False
            assert layer.weight_loader(layer.w2_weight, self.W["w2"], "w", "w2", expert) is None
            assert_bitwise(layer.w2_weight, before)

    def test_converts_the_dtype(self):
        layer = zero_layer(params_dtype=torch.bfloat16)
        layer.weight_loader(layer.w2_weight, self.W["w2"].double(), "w", "w2", 0)
        assert layer.w2_weight.dtype == torch.bfloat16 and (layer.w2_weight[0] == 2).all()

    def test_leaves_gradients_off(self):
        layer = zero_layer()
        layer.weight_loader(layer.w2_weight, nn.Parameter(self.W["w2"].clone()), "w", "w2", 0)
        assert layer.w2_weight.is_leaf and layer.w2_weight.grad_fn is None

    @pytest.mark.parametrize(
        ("shard", "weight", "expert", "parts"),
        [
            ("w4", torch.zeros(I, H), 0, ["shard_id", "w4", "some.name"]),
            ("w1", torch.zeros(H, I), 0, ["loaded_weight", "(16, 12)", "(12, 16)", "some.name"]),
            ("w1", torch.zeros(1, H), 0, ["loaded_weight", "(1, 16)", "(12, 16)"]),
            ("w2", torch.zeros(I, H), 0, ["loaded_weight", "(12, 16)", "(16, 12)", "some.name"]),
            ("w2", torch.zeros(()), 0, ["loaded_weight", "()", "(16, 12)"]),
            ("w2", torch.zeros(H, I), -1, ["expert_id", "-1", "some.name"]),
        ],
    )
    def test_what_does_not_fit(self, shard, weight, expert, parts):
        layer = zero_layer()
        with pytest.raises(ValueError) as error:
            layer.weight_loader(self.param(layer, shard), weight, "some.name", shard, expert)
        for part in parts:
            assert part in str(error.value), str(error.value)

    def test_the_wrong_parameter(self):
        layer = zero_layer()
        with pytest.raises(ValueError, match="w2_weight"):
            layer.weight_loader(layer.w13_weight, self.W["w2"], "w", "w2", 0)

    def test_mapping(self):
        mapping = FusedMoE.make_expert_params_mapping("gate_proj", "down_proj", "up_proj", 2)
        assert mapping == [
            ("experts.w13_", "experts.0.gate_proj.", 0, "w1"),
            ("experts.w2_", "experts.0.down_proj.", 0, "w2"),
            ("experts.w13_", "experts.0.up_proj.", 0, "w3"),
            ("experts.w13_", "experts.1.gate_proj.", 1, "w1"),
            ("experts.w2_", "experts.1.down_proj.", 1, "w2"),
            ("experts.w13_", "experts.1.up_proj.", 1, "w3"),
        ]
        named = ZeroExpertFusedMoE.make_expert_params_mapping(
            ckpt_gate_proj_name="w1", ckpt_down_proj_name="w2", ckpt_up_proj_name="w3", num_experts=1
        )
        assert [entry[1] for entry in named] == ["experts.0.w1.", "experts.0.w2.", "experts.0.w3."]

    def test_a_whole_checkpoint_as_engines_load_it(self):
        """The loop of an engine's load_weights, zero-expert tensors included."""
        layer = zero_layer()
        model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": layer})})
        generator = torch.Generator().manual_seed(2)
        checkpoint = {
            f"mlp.experts.{expert}.{name}_proj.weight": torch.randn(
                (H, I) if name == "down" else (I, H), generator=generator
            )
            for expert, name in itertools.product(range(A), ("gate", "up", "down"))
        }
        mapping = FusedMoE.make_expert_params_mapping("gate_proj", "down_proj", "up_proj", A)
        params = dict(model.named_parameters())
        loaded = 0
        for name, weight in checkpoint.items():
            for param_name, weight_name, expert, shard in mapping:
                if weight_name in name:
                    target = name.replace(weight_name, param_name)
                    loaded += layer.weight_loader(
                        params[target], weight, name, shard_id=shard, expert_id=expert, return_success=True
                    )
                    break
        assert loaded == 3 * E
        for expert in range(E):
            parts = [checkpoint[f"mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")]
            assert_bitwise(layer.w13_weight[expert], torch.cat(parts[:2]))
            assert_bitwise(layer.w2_weight[expert], parts[2])
