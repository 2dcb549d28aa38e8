"""What inference engines hand to FusedMoE: arguments, custom routing, weights.

Source: docs/specification.md, "Engine names".
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from helpers.judge import assert_bitwise, judge
from helpers.layers import BASE, MIXED, A, Classifier, E, H, I, K, Z, base_layer, tokens, zero_layer
from zemoe import FusedMoE, ZeroExpertFusedMoE, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")


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
    def test_the_names_of_engines_are_attributes(self):
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
            (None, (("identity", 4),), ["zero_expert_num", "None", "integer"]),
            ("4", "identity", ["zero_expert_num", "'4'", "integer"]),
            (4.0, (("identity", 4),), ["zero_expert_num", "4.0", "integer"]),
        ],
    )
    def test_zero_experts_that_do_not_fit(self, num, kinds, parts):
        with pytest.raises(ValueError) as error:
            ZeroExpertFusedMoE(num, kinds, None, **BASE)
        for part in parts:
            assert part in str(error.value), str(error.value)

    @pytest.mark.parametrize("wrong", ["2", 2.0, None])
    @pytest.mark.parametrize("router", [None, Classifier()], ids=["no router", "router"])
    def test_num_experts_that_is_no_integer(self, router, wrong):
        with pytest.raises(ValueError, match=f"num_experts must be an integer >= 0, got {wrong!r}"):
            ZeroExpertFusedMoE(Z, "identity", router, **{**BASE, "num_experts": wrong})

    @pytest.mark.parametrize("make", [base_layer, lambda **kwargs: zero_layer(router=None, **kwargs), zero_layer])
    def test_a_bias_that_is_no_tensor(self, make):
        with pytest.raises(TypeError, match=r"e_score_correction_bias must be a tensor, got list: \[0\.5"):
            make(e_score_correction_bias=[0.5] * E)

    @pytest.mark.parametrize("shape", [(E - 1,), (A,), (E, 1), ()])
    def test_a_bias_of_another_shape(self, shape):
        """Found at construction; a layer without zero-computation experts has E slots."""
        with pytest.raises(ValueError) as error:
            base_layer(e_score_correction_bias=torch.zeros(shape))
        for part in ("e_score_correction_bias", f"({E},)", str(shape)):
            assert part in str(error.value)
        # One's own routing has no use for it.
        base_layer(e_score_correction_bias=torch.zeros(shape), custom_routing_function=lambda *_, **__: None)

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
            ("w2", torch.zeros(H, I), "0", ["expert_id", "'0'", "integer", "some.name"]),
            ("w2", torch.zeros(H, I), 1.5, ["expert_id", "1.5", "integer", "some.name"]),
            ("w2", torch.zeros(H, I), None, ["expert_id", "None", "integer", "some.name"]),
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
