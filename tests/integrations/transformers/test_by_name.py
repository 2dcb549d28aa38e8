"""`experts_implementation="zemoe"`: LongCat-Flash by name, and families that have no zero experts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Lfm2MoeConfig,
    LongcatFlashForCausalLM,
    conversion_mapping,
)
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.longcat_flash import modeling_longcat_flash as modeling

import zemoe.integrations.transformers as bridge
from helpers import transformers_shared
from helpers.families import FAMILIES, SIZES
from helpers.transformers_shared import STOCK_STATE, TOLERANCE, StockMoE, assert_ours, global_state, greedy, logits_of
from helpers.transformers_tiny import tiny_config
from zemoe.integrations.transformers import by_name
from zemoe.kernels.activations import ACTIVATIONS

# Fixtures
transformers_is_left_as_it_was = transformers_shared.transformers_is_left_as_it_was
ids = transformers_shared.ids
stock = transformers_shared.stock
stock_logits = transformers_shared.stock_logits
folders = transformers_shared.folders


@pytest.fixture
def registered():
    bridge.register()
    yield
    bridge.unregister()


# --- LongCat-Flash


@pytest.mark.parametrize("layout", ["original", "transformers", "packed"])
def test_from_pretrained_by_name(registered, folders, stock, stock_logits, ids, layout):
    model = AutoModelForCausalLM.from_pretrained(folders[layout], experts_implementation="zemoe")
    assert_ours(model)
    assert model.config._experts_implementation == "zemoe"
    assert model._can_compile_fullgraph and model.model._can_compile_fullgraph
    assert (logits_of(model, ids) - stock_logits).abs().max() < TOLERANCE
    assert torch.equal(greedy(model, ids), greedy(stock, ids))


def test_the_router_stays_float32_by_name(registered, folders, stock):
    half = LongcatFlashForCausalLM.from_pretrained(
        folders["original"], experts_implementation="zemoe", dtype=torch.bfloat16
    )
    assert_ours(half, torch.bfloat16)
    router = half.model.layers[1].mlp.router
    assert torch.equal(router.classifier.weight, stock.model.layers[1].mlp.router.classifier.weight)  # never rounded


def test_from_config_by_name(registered, ids):
    model = AutoModelForCausalLM.from_config(tiny_config(), experts_implementation="zemoe")
    assert_ours(model)
    before = logits_of(model, ids)
    model.set_experts_implementation("eager")
    assert (logits_of(model, ids) - before).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", [None, "eager"])
def test_nothing_is_ours_that_does_not_ask_for_it(registered, folders, stock_logits, ids, name):
    model = LongcatFlashForCausalLM.from_pretrained(folders["transformers"], experts_implementation=name)
    assert type(model.model.layers[0].mlp) is StockMoE
    assert model.config._experts_implementation == "eager"
    assert torch.equal(logits_of(model, ids), stock_logits)


def test_names_that_would_miss_the_zero_experts_are_refused(registered, folders, stock):
    for name in sorted({"grouped_mm", "batched_mm", "sonicmoe"} & set(ALL_EXPERTS_FUNCTIONS.keys())):
        with pytest.raises(ValueError, match=rf'must be "eager" or "zemoe", got \'{name}\''):
            LongcatFlashForCausalLM.from_pretrained(folders["transformers"], experts_implementation=name)
        with pytest.raises(ValueError, match=rf"got \'{name}\'"):
            copy.deepcopy(stock).set_experts_implementation(name)


def test_set_experts_implementation(registered, stock, stock_logits, ids):
    model = copy.deepcopy(stock)
    for name in ("zemoe", "zemoe", {"": "zemoe"}):
        model.set_experts_implementation(name)
        assert_ours(model)
        assert model.get_experts_implementation() == {"": "zemoe"}
        assert (logits_of(model, ids) - stock_logits).abs().max() < TOLERANCE
    for name in ("eager", {}):
        model.set_experts_implementation(name)
        assert type(model.model.layers[0].mlp) is StockMoE
        assert model.get_experts_implementation() == {"": "eager"}
        assert torch.equal(logits_of(model, ids), stock_logits)
    base = copy.deepcopy(stock.model)
    base.set_experts_implementation("zemoe")
    assert type(base.layers[1].mlp) is bridge.ZeroExpertLongcatMoE


def test_a_model_that_cannot_be_patched_keeps_name_and_layers(registered, stock):
    model = copy.deepcopy(stock)
    router = model.model.layers[1].mlp.router
    router.forward = router.forward  # wrapped
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp.*wrapped"):
        model.set_experts_implementation("zemoe")
    assert type(model.model.layers[0].mlp) is StockMoE
    assert model.config._experts_implementation == "eager"


def test_unregistering_leaves_models_and_what_is_applied(folders, stock_logits, ids):
    bridge.register()
    bridge.register()
    assert bridge.is_registered() and not bridge.is_applied()
    model = LongcatFlashForCausalLM.from_pretrained(folders["original"], experts_implementation="zemoe")
    with bridge.applied():
        pass
    assert bridge.is_registered()
    loaded = LongcatFlashForCausalLM.from_pretrained(folders["original"], experts_implementation="zemoe")
    assert_ours(loaded)
    bridge.apply()
    bridge.unregister()
    bridge.unregister()
    conversions = conversion_mapping.get_checkpoint_conversion_mapping("longcat_flash")
    assert sum("DropDeadRows" in repr(conversion.operations) for conversion in conversions) == 2
    bridge.unapply()
    assert global_state() == STOCK_STATE
    for each in (model, loaded):
        assert (logits_of(each, ids) - stock_logits).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="zemoe"):
        LongcatFlashForCausalLM(tiny_config(experts_implementation="zemoe"))


def test_register_leaves_nothing_behind_when_it_fails(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(modeling.LongcatFlashPreTrainedModel, "post_init", lambda self: None, raising=False)
        before = global_state()
        with pytest.raises(RuntimeError, match=r"methods of its own.*post_init"):
            bridge.register()
        assert global_state() == before
    if "post_init" in vars(modeling.LongcatFlashPreTrainedModel):  # monkeypatch wrote the inherited one back
        del modeling.LongcatFlashPreTrainedModel.post_init
    assert not bridge.is_registered()


# --- families without zero experts


def built(family: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), experts_implementation="eager").eval()


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(registered, ids, family, tmp_path, monkeypatch):
    model = built(family)
    expected, wanted = logits_of(model, ids), gradients(model, ids)
    used = []
    fused_experts = by_name.fused_experts
    monkeypatch.setattr(
        by_name, "fused_experts", lambda *args, **kwargs: used.append(1) or fused_experts(*args, **kwargs)
    )
    model.set_experts_implementation("zemoe")
    assert (logits_of(model, ids) - expected).abs().max() < TOLERANCE
    assert len(used) == (1 if family == "deepseek_v3" else 2)
    for name, gradient in gradients(model, ids).items():
        assert (gradient - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="zemoe")
    used.clear()
    assert (logits_of(loaded, ids) - expected).abs().max() < TOLERANCE
    assert used
    model.set_experts_implementation("eager")
    assert torch.equal(logits_of(model, ids), expected)


def test_the_default_of_other_families_is_what_it_was(registered):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["qwen3_moe"]))
    assert model.config._experts_implementation == "grouped_mm"


def test_experts_that_are_not_ours_are_refused(registered, ids):
    config = GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=5)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="zemoe")
    with pytest.raises(ValueError, match='"zemoe" does not compute GptOssExperts: they have biases'):
        model(ids)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["mixtral"]), experts_implementation="zemoe")
    model.model.layers[0].mlp.experts.act_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match="their activation is ReLU; ours are gelu, gelu_tanh, silu"):
        model(ids)


def test_activations_are_known_by_what_they_compute():
    """Every activation of transformers that is one of ours (gelu_10 is only up to 10), and functions of torch."""
    x = torch.linspace(-20, 20, 4001)
    found = {}
    for name in ACT2FN:
        values = ACT2FN[name](x)
        same = [ours for ours in ACTIVATIONS if torch.allclose(ACTIVATIONS[ours].forward(x), values, atol=1e-5)]
        assert [by_name.activation_of(ACT2FN[name])] == (same or [None]), name
        found[name] = same
    assert found["silu"] == ["silu"] and found["gelu_new"] == ["gelu_tanh"] and not found["gelu_10"]
    functions = {F.silu: "silu", F.gelu: "gelu", torch.nn.GELU("tanh"): "gelu_tanh", torch.nn.GELU(): "gelu"}
    for function, name in functions.items():
        assert by_name.activation_of(function) == name
    assert by_name.activation_of(F.relu) is None


def test_lfm2_moe_whose_activation_is_a_function(registered, ids):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers")}
    config = Lfm2MoeConfig(
        **sizes,
        num_key_value_heads=2,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_experts=5,
        num_experts_per_tok=2,
        num_dense_layers=1,
        layer_types=["full_attention"] * sizes["num_hidden_layers"],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    expected = logits_of(model, ids)
    model.set_experts_implementation("zemoe")
    assert (logits_of(model, ids) - expected).abs().max() < TOLERANCE
    model.model.layers[1].feed_forward.experts.act_fn = F.relu
    with pytest.raises(ValueError, match="their activation is relu; ours are gelu, gelu_tanh, silu"):
        model(ids)


def test_choices_of_other_ranks_are_worth_nothing():
    """Expert parallelism names experts of other ranks by ids past the rank's own, with weights of zero."""
    experts = built("qwen3_moe").model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(7, 32, generator=generator)
    ids_TK = torch.randint(0, 6, (7, 3), generator=generator)
    weights_TK = torch.rand(7, 3, generator=generator).masked_fill(ids_TK >= 5, 0)
    assert (ids_TK == 5).any()
    expected = experts(x_TH, ids_TK.masked_fill(ids_TK >= 5, 0), weights_TK)
    computed = by_name.experts_forward(experts, x_TH, ids_TK, weights_TK)
    assert (computed - expected).abs().max() < TOLERANCE
