"""What `zemoe bench` times zemoe against: that it computes the layer, and what is said where it can't be had.

The peers themselves run on GPUs. Here they are stood in for by the least that keeps their contract, so what is tested
is what zemoe does around them: which choices they get, in which order, and what is added.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from zemoe import reference
from zemoe.bench import cases, check
from zemoe.bench.baselines import BASELINES

CASE = cases.Case(
    name="tiny",
    about="for these tests",
    hidden_size=32,
    intermediate_size=16,
    num_experts=8,
    num_zero_experts=6,
    top_k=4,
    routed_scaling_factor=2.0,
    tokens=(),
    devices=(),
)


def experts(x, w13, w2, weights, ids):
    """Routed FFN experts by the reference, in x's dtype; it raises for any other id."""
    return reference.experts(x, w13, w2, weights, ids, num_experts=len(w2), dtype=torch.float64).to(x.dtype)


class VllmRouter:
    """Zero choices become FFN expert 0 with weight 0; their sum is kept until it is asked for."""

    def __init__(self, **settings):
        assert (settings.pop("zero_expert_type"), settings.pop("renormalize")) == ("identity", False)
        self.settings = SimpleNamespace(**settings)
        self.kept = None

    def _compute_routing(self, x, logits, indices_type):
        assert logits.dtype == torch.float32
        settings = self.settings
        assert settings.global_num_experts == settings.num_logical_experts == 8
        selection = reference.select(
            logits,
            settings.top_k,
            num_experts=8,
            zero_expert_kinds=(("identity", 6),),
            scoring_func=settings.scoring_func,
            renormalize="none",
            e_score_correction_bias=settings.e_score_correction_bias,
            routed_scaling_factor=settings.routed_scaling_factor,
            dtype=torch.float32,
        )
        weights, ids = selection.topk_weights_TK.clone(), selection.topk_ids_TK.clone()
        zero = ids >= 8
        self.kept = (x * (weights * zero).sum(-1, keepdim=True)).to(x.dtype)
        weights[zero], ids[zero] = 0, 0
        return weights, ids.int()

    @property
    def zero_expert_output(self):
        kept, self.kept = self.kept, None
        return kept


def sonicmoe_experts(
    x, scores, tokens, ids, w1, b1, w2, b2, num_experts, stream, activation, inference, *, concat_layout
):
    assert (b1, b2, activation, inference, concat_layout) == (None, None, "swiglu", True, True)
    assert scores.dtype == torch.float32 and tokens.dtype == ids.dtype == torch.int32
    assert tokens.ndim == ids.ndim == scores.ndim == 1 and (tokens.diff() >= 0).all() and len(tokens) > 0
    assert (w1.shape, w2.shape, num_experts) == ((2 * 16, 32, 8), (32, 16, 8), 8)
    each = experts(x[tokens], w1.permute(2, 0, 1), w2.permute(2, 0, 1), scores[:, None], ids[:, None].long())
    return torch.zeros_like(x).index_add_(0, tokens, each), torch.bincount(ids, minlength=num_experts)


class LigerExperts:
    @staticmethod
    def apply(x, gate_up, down, ids, weights):
        assert ids.dtype == torch.int32 and ids.is_contiguous() and ids.shape == weights.shape == (len(x), 4)
        assert ids.min() >= 0 and ids.max() < 8
        return experts(x, gate_up, down, weights, ids.long())


PARTS = {
    "torch": None,
    "eager": None,
    "grouped": None,
    "vllm": (VllmRouter, experts),
    "sonicmoe": (sonicmoe_experts, SimpleNamespace(SWIGLU="swiglu")),
    "liger": (LigerExperts,),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_baselines_compute_the_layer_on_its_weights(monkeypatch, name, dtype):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    with torch.inference_mode():
        layer = cases.build(CASE, dtype, torch.device("cpu"))
        baseline = BASELINES[name]
        side = baseline.build(layer) if PARTS[name] is None else baseline.adapt(layer, *PARTS[name])
        for share in (None, 1.0, 0.0, 0.7):  # what steers the layer steers the baseline
            cases.steer(layer, share, None)
            x = torch.randn(12, 32).to(dtype)
            wanted = check.expected(layer, x)
            assert len(wanted.tokens) == check.TOKENS
            before = x.clone()
            assert check.judge(side(x), wanted) == check.judge(layer(x), wanted) == ""
            assert torch.equal(x, before)
        layer.w2.zero_()
        assert check.judge(side(x), wanted), "the weights are the layer's own, not a copy"


def test_every_baseline_is_tested_here():
    assert list(PARTS) == list(BASELINES)


def test_why_absent():
    torch_ = replace(BASELINES["torch"], devices=("cuda",))
    assert torch_.why_absent("cuda") == ""
    assert torch_.why_absent("cpu") == "runs on cuda only"
    assert replace(torch_, module="no_such_package").why_absent("cpu") == "not installed"
    missing = "installed, but what zemoe calls is missing: "
    assert replace(torch_, parts=("torch:no_such_name",)).why_absent("cuda").startswith(missing)
    assert replace(torch_, parts=("torch:nn", "torch.no_such:x")).why_absent("cuda") == missing + (
        "No module named 'torch.no_such'"
    )


def test_peers_run_on_gpus_only():
    assert [name for name, baseline in BASELINES.items() if "cpu" in baseline.devices] == ["torch", "eager", "grouped"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vllm", "sonicmoe", "liger"])
def test_peers_that_are_installed(monkeypatch, name):
    """The real packages, at sizes that all of them take."""
    baseline = BASELINES[name]
    if why := baseline.why_absent("cuda"):
        pytest.skip(f"{name}: {why}")
    if name == "sonicmoe":  # it would tune for minutes
        forward = import_module("sonicmoe.functional.forward")
        for gemm in ("gemm", "gemm_gated"):
            monkeypatch.setattr(forward, gemm, partial(getattr(forward, gemm), tuned=False))
    torch.manual_seed(0)
    case = replace(CASE, hidden_size=512, intermediate_size=256)
    with torch.inference_mode():
        layer = cases.build(case, torch.bfloat16, torch.device("cuda"))
        side = baseline.build(layer)
        for share, tokens in ((None, 600), (0.5, 7)):
            cases.steer(layer, share, None)
            x = torch.randn(tokens, 512, device="cuda").bfloat16()
            assert check.judge(side(x), check.expected(layer, x)) == ""
