"""The plug-in for SGLang: what it needs is in SGLang's sources, and its layer computes what the reference does.

SGLang itself is in test_engine.py. Here its sources are looked at (sglang_facts.json, of three versions), and our layer
is built from stand-ins (sglang_stand_in.py); after `make sglang` the layer that ours derives from is its own.
"""

from __future__ import annotations

import ast
import logging
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zemoe
from helpers.paths import ROOT
from helpers.sglang_stand_in import FACTS, SOURCES, Ranks, installed
from zemoe import reference
from zemoe.versions import range_of

E, Z, H, I, K, SCALE = 6, 3, 32, 8, 4, 6.0
VERSIONS = sorted(FACTS)
INTEGRATION = Path(zemoe.__file__).parent / "integrations"
CONFIG = SimpleNamespace(
    hidden_size=H,
    moe_intermediate_size=I,
    n_routed_experts=E,
    zero_expert_num=Z,
    zero_expert_type="identity",
    moe_topk=K,
    routed_scaling_factor=SCALE,
    rounter_params_dtype="float32",
    router_bias=False,
    hidden_act="silu",
)


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    """Names as SGLang's loader gives them to a layer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    weights = {"router.classifier.weight": normal(E + Z, H), "router.e_score_correction_bias": normal(E + Z) * 0.2}
    for e in range(E):
        weights |= {f"experts.{e}.{name}.weight": normal(I, H) for name in ("gate_proj", "up_proj")}
        weights[f"experts.{e}.down_proj.weight"] = normal(H, I)
    return weights


@pytest.fixture(scope="module")
def x_TH() -> torch.Tensor:
    return torch.randn(11, H, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(checkpoint, x_TH) -> torch.Tensor:
    gate, up, down = (
        torch.stack([checkpoint[f"experts.{e}.{name}_proj.weight"] for e in range(E)])
        for name in ("gate", "up", "down")
    )
    logits_TA = x_TH.double() @ checkpoint["router.classifier.weight"].double().T
    _, _, weights_TK, ids_TK = reference.select(
        logits_TA,
        K,
        num_experts=E,
        zero_expert_kinds="identity",
        e_score_correction_bias=checkpoint["router.e_score_correction_bias"],
        routed_scaling_factor=SCALE,
    )
    assert (ids_TK >= E).any() and (ids_TK < E).any()
    return reference.experts(
        x_TH.double(),
        torch.cat([gate, up], 1).double(),
        down.double(),
        weights_TK,
        ids_TK,
        num_experts=E,
        zero_expert_kinds=(("identity", Z),),
    )


def loaded(longcat, checkpoint, layer_id: int = 0, **changes):
    """A layer, filled by the loaders of its parameters as SGLang's load_weights does it."""
    layer = longcat.LongcatFlashMoE(
        config=SimpleNamespace(**(vars(CONFIG) | changes)), layer_id=layer_id, quant_config=None, prefix="model.mlp"
    )
    parameters = dict(layer.named_parameters())
    shards = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}
    for name, tensor in checkpoint.items():
        part, *rest = name.split(".")
        if part == "router":
            parameters[name].data.copy_(tensor)
            continue
        expert, projection, _ = rest
        which, shard = shards[projection]
        parameter = parameters[f"experts.{which}_weight"]
        parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=int(expert))
    return layer


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.double() - expected.double()).abs().max() < 1e-4)  # float32; values are of order 10


# --- what SGLang's sources say


@pytest.mark.parametrize("version", VERSIONS)
def test_what_we_import_is_there(version):
    known, found = FACTS[version]["names"], set()
    for path in sorted((INTEGRATION / "sglang").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).startswith("sglang"):
                found |= {(node.module, alias.name) for alias in node.names}
    found.remove(("sglang.srt.models", "longcat_flash"))
    found.add(("sglang.srt.models.longcat_flash", "LongcatFlashMoE"))
    assert len(found) == 7, found
    assert all(name in known[module] for module, name in found)
    assert "UnquantizedFusedMoEMethod" in known["sglang.srt.layers.quantization.unquant"]


@pytest.mark.parametrize("version", VERSIONS)
def test_signatures(version):
    facts = FACTS[version]
    assert facts["layer"] == "self, config, layer_id, quant_config=None, prefix=''"
    assert facts["layer built with"] == [["config", "layer_id", "prefix", "quant_config"]]
    assert facts["layer forward"] == facts["router forward"] == "self, hidden_states"
    assert facts["layer called with"] == [1]
    assert facts["experts loader"] == "self, param, loaded_weight, weight_name, shard_id, expert_id"
    ((positional, by_name),) = facts["experts loaded with"]
    assert (positional, by_name) == ("(param, loaded_weight, name)", "{'shard_id': shard_id, 'expert_id': expert_id}")
    assert facts["topk output"] == ["topk_weights", "topk_ids", "router_logits"]
    assert facts["register hook"].startswith("cls, target, hook, hook_type=")
    assert {"REPLACE", "AFTER"} <= set(facts["hook types"])
    read = {
        "experts",
        "layer_id",
        "num_experts",
        "routed_scaling_factor",
        "router",
        "top_k",
        "tp_size",
        "zero_expert_num",
    }
    assert read | {"zero_expert_type"} <= set(facts["layer attributes"])
    assert {"classifier", "e_score_correction_bias"} <= set(facts["router attributes"])
    read = {"moe_tp_rank", "moe_tp_size", "moe_ep_rank", "moe_ep_size", "hidden_size", "num_local_experts"}
    assert read | {"intermediate_size_per_partition", "quant_method"} <= set(facts["experts attributes"])
    sums = "tensor_model_parallel_all_reduce" in facts["names"]["sglang.srt.models.longcat_flash"]
    assert facts["layer sums over ranks"] == sums  # how the layer finds out


def test_the_versions_that_we_name_were_looked_at():
    assert range_of("sglang") == f"{VERSIONS[0]} to {VERSIONS[-1]}"


def test_the_plug_in_is_registered():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["sglang.srt.plugins"] == {"zemoe": "zemoe.integrations.sglang:register"}


# --- what the layer computes


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("quantized", [False, True])
def test_one_rank(checkpoint, x_TH, expected, version, quantized, caplog):
    """With SGLang's experts too (they are "quantized", so that ours decline them)."""
    caplog.set_level(logging.INFO, "sglang.plugins.zemoe")
    with installed(version, Ranks(quantized=quantized)) as longcat:
        layer = loaded(longcat, checkpoint)
        loaded(longcat, checkpoint, layer_id=1)
        assert type(layer).__mro__[1].__name__ == "LongcatFlashMoE"
        given = x_TH.clone()
        assert close(layer(given), expected)
        assert layer(x_TH[:0]).shape == (0, H)
        if not quantized:
            assert torch.equal(given, x_TH)
            assert type(layer.experts).__name__ == "ZeroExpertLongcatExperts"
            assert not hasattr(layer.experts, "quant_method")  # SGLang repacks what has one
    theirs = "routing and zero experts by zemoe, FFN experts by SGLang: the experts are quantized (Fp8MoEMethod)"
    said = theirs if quantized else "MoE layers computed by zemoe"
    assert [record.getMessage() for record in caplog.records] == [f"zemoe: LongCat-Flash models have {said}"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "ways", [{}, {"quantized": True}, {"ep_size": 2}], ids=["ours", "their experts", "experts spread"]
)
def test_two_ranks_hold_the_zero_experts_once(checkpoint, x_TH, expected, version, ways):
    parts = []
    for rank in range(2):
        ranks = Ranks(tp_rank=rank, tp_size=2, ep_rank=rank if "ep_size" in ways else 0, **ways)
        with installed(version, ranks) as longcat:
            layer = loaded(longcat, checkpoint)
            output = layer(x_TH.clone())
        assert len(ranks.sent) == FACTS[version]["layer sums over ranks"]
        assert all(torch.equal(sent, output) for sent in ranks.sent)
        parts.append(output)
    assert close(parts[0] + parts[1], expected)


@pytest.mark.parametrize(("size", "width"), [(2, 32), (3, 3), (5, 2)])
def test_experts_wider_than_the_checkpoints(checkpoint, x_TH, expected, size, width):
    """As SGLang for CPUs writes it into the configuration. Of the ranks some are full, one is in part, others empty."""
    total = torch.zeros_like(expected)
    for rank in range(size):
        with installed(VERSIONS[-1], Ranks(tp_rank=rank, tp_size=size)) as longcat:
            layer = loaded(longcat, checkpoint, moe_intermediate_size=width * size)
            assert layer.experts.w13_weight.shape == (E, 2 * width, H)
            total += layer(x_TH.clone())
    assert close(total, expected)


def test_bfloat16_and_a_bias_of_its_dtype(checkpoint, x_TH, expected):
    with installed(VERSIONS[-1]) as longcat:
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer = loaded(longcat, {name: w for name, w in checkpoint.items() if not name.startswith("router")})
        finally:
            torch.set_default_dtype(torch.float32)
        for name in ("router.classifier.weight", "router.e_score_correction_bias"):
            layer.get_parameter(name).data = checkpoint[name]
        found = layer(x_TH.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


def test_compiled_code_calls_one_operator_for_any_number_of_tokens(checkpoint, x_TH, expected):
    with installed(VERSIONS[-1]) as longcat:
        layer = loaded(longcat, checkpoint)
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        for tokens in (11, 2, 7):
            assert close(compiled(x_TH[:tokens].clone()), expected[:tokens])
        torch._dynamo.reset()
    assert len(graphs) == 1
    assert sum("moe_from_logits" in str(node.target) for node in graphs[0].graph.nodes) == 1


@pytest.mark.parametrize(
    ("ranks", "changes", "reason"),
    [
        (Ranks(all_to_all=True), {}, "tokens travel between ranks (DeepEPMoE"),
        (Ranks(), {"zero_expert_type": "drop"}, "zero_expert_type is 'drop'"),
    ],
)
def test_what_is_left_to_sglang(checkpoint, x_TH, ranks, changes, reason, caplog):
    caplog.set_level(logging.INFO, "sglang.plugins.zemoe")
    with installed(VERSIONS[-1], ranks) as longcat:
        layer = loaded(longcat, checkpoint, **changes)
        layer_class = type(layer).__mro__[1]
        monkey = pytest.MonkeyPatch()
        monkey.setattr(layer_class, "forward", lambda self, hidden_states: "SGLang's own")
        assert layer(x_TH) == "SGLang's own"
        monkey.undo()
        assert type(layer.experts).__name__ in ("FusedMoE", "DeepEPMoE")
    assert f"have SGLang's own MoE layers: {reason}" in caplog.text


def test_weights_that_do_not_fit_are_refused(checkpoint):
    with installed(VERSIONS[-1], Ranks(tp_size=2)) as longcat:
        layer = loaded(longcat, checkpoint)
        load, weight = layer.experts.weight_loader, layer.experts.w13_weight
        for shape in [(I + 1, H), (I, H + 1), (I, H, 1)]:
            with pytest.raises(ValueError, match=rf"gate must have shape \(8, 32\), got \({str(shape)[1:-1]}\)"):
                load(weight, torch.zeros(shape), "gate", shard_id="w1", expert_id=0)
        with pytest.raises(ValueError, match="shard_id must be 'w1', 'w2' or 'w3', got 'w13'"):
            load(weight, torch.zeros(I, H), "gate", shard_id="w13", expert_id=0)


def test_turned_off(checkpoint, monkeypatch, caplog):
    """Said once, when a model is built: when plug-ins are called, SGLang's log isn't there yet."""
    caplog.set_level(logging.INFO, "sglang.plugins.zemoe")
    monkeypatch.setenv("ZEMOE_SGLANG", "0")
    with installed(VERSIONS[-1]) as longcat:
        assert longcat.LongcatFlashMoE.__module__ != "zemoe.integrations.sglang.layers"
        assert not caplog.records
        for layer_id in range(2):
            loaded(longcat, checkpoint, layer_id)
    (record,) = caplog.records
    assert record.getMessage() == "zemoe: LongCat-Flash models have SGLang's own MoE layers: ZEMOE_SGLANG=0"


# --- SGLang's own source, where `make sglang` has put it


@pytest.mark.parametrize("version", sorted(path.stem for path in SOURCES.glob("*.py")))
def test_why_sglang_is_no_oracle(checkpoint, x_TH, expected, version, monkeypatch):
    """Its own layer leaves the zero experts unscaled: with a scale of 1 it agrees with ours, else it doesn't."""
    monkeypatch.setenv("ZEMOE_SGLANG", "0")
    with installed(version) as longcat:
        theirs = loaded(longcat, checkpoint)(x_TH.clone())
        unscaled = loaded(longcat, checkpoint, routed_scaling_factor=1.0)(x_TH.clone())
    monkeypatch.delenv("ZEMOE_SGLANG")
    with installed(version) as longcat:
        ours = loaded(longcat, checkpoint, routed_scaling_factor=1.0)(x_TH.clone())
    assert close(unscaled, ours)
    assert not close(theirs, expected)
