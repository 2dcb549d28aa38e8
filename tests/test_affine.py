"""Zero-computation experts: every kind in AFFINE_KINDS is affine in x, and its sentence stands in the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.judge import Case, judge, only_zero_experts
from zemoe import AffineParams, fused_experts
from zemoe.affine import AFFINE_KINDS, affine_coefficients, check_kinds, check_params, count_kind
from zemoe.config import expand_kinds

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def case_of(kinds: tuple[tuple[str, int], ...], **fields) -> Case:
    return Case("kinds", "made for one test", kinds=kinds, ids=only_zero_experts, **fields)


def run(case: Case, inputs) -> torch.Tensor:
    return fused_experts(
        *inputs[:5], num_experts=case.E, zero_expert_kinds=case.kinds, affine_params=inputs.affine, backend="cpu"
    )


@pytest.mark.parametrize("kind", [*AFFINE_KINDS, "copy", "null"])
def test_each_kind_alone(kind):
    case = case_of(((kind, 4),))
    inputs = case.inputs()
    judge(run(case, inputs), case.reference(inputs), case.reference(inputs, torch.float32))


@pytest.mark.parametrize("kind", sorted(AFFINE_KINDS))
@pytest.mark.parametrize("count", [1, 3])
def test_the_coefficients_are_the_layer(kind, count):
    """alpha_t x_t + beta_t V is all there is."""
    case = case_of(((kind, count),), K=1)
    x, _, _, weights, ids, affine = case.inputs()
    params = affine or AffineParams()
    logits = None
    if params.constant_router is not None:
        logits = torch.einsum("th,ckh->tck", x, params.constant_router)
    alpha, beta = affine_coefficients(
        weights, ids, num_experts=case.E, kinds=case.kinds, params=params, constant_logits_TC2=logits
    )
    assert alpha.shape == (case.T,) and (beta is None or beta.shape == (case.T, count))
    result = alpha[:, None] * x
    if beta is not None:
        result = result + beta @ params.constant_value
    inputs = case.inputs()
    judge(result, case.reference(inputs), case.reference(inputs, torch.float32))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*AFFINE_KINDS, "copy", "null"]), st.integers(0, 3)), min_size=1, max_size=6))
def test_any_mixture_in_id_order(kinds):
    total = sum(count for _, count in kinds)
    if total == 0:
        return
    case = case_of(tuple(kinds), T=8, H=7, K=min(3, total))
    inputs = case.inputs()
    judge(run(case, inputs), case.reference(inputs), case.reference(inputs, torch.float32))


def test_an_added_kind_needs_no_other_change(monkeypatch):
    """The promise of the recipe: one rule in AFFINE_KINDS."""
    monkeypatch.setitem(AFFINE_KINDS, "negation", lambda chosen: (-chosen.weight_TK.sum(-1), None))
    case = case_of((("negation", 3),))
    inputs = case.inputs()
    expected = -inputs.weights_TK.sum(1, keepdim=True) * inputs.x_TH
    torch.testing.assert_close(run(case, inputs), expected)


@pytest.mark.parametrize("name", ["x", "weights", "constant_router", "constant_value", "scale"])
def test_gradients(name):
    kinds = (("constant", 2), ("scaled_identity", 2), ("identity", 1), ("constant", 1), ("scaled_identity", 1))
    case = case_of(kinds, T=9, H=8, K=5)
    results = []
    for dtype in (torch.float32, torch.float64, torch.float32):
        inputs = case.inputs()
        leaves = {"x": inputs.x_TH, "weights": inputs.weights_TK, **inputs.affine._asdict()}
        leaf = leaves[name].to(dtype).requires_grad_()
        leaves[name] = leaf
        inputs = inputs._replace(
            x_TH=leaves["x"], weights_TK=leaves["weights"], affine=AffineParams(*list(leaves.values())[2:])
        )
        out = run(case, inputs) if not results else case.reference(inputs, dtype)
        seeds = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (out * seeds.to(dtype)).sum().backward()
        results.append(leaf.grad)
    judge(*results, f"gradient of {name}")
    assert results[1].abs().sum() > 0


def test_constant_logits_may_be_given():
    """They then ride along in the router's product."""
    case = case_of((("constant", 3),))
    inputs = case.inputs()
    logits = torch.einsum("th,ckh->tck", inputs.x_TH, inputs.affine.constant_router)
    out = fused_experts(
        *inputs[:5],
        num_experts=case.E,
        zero_expert_kinds=case.kinds,
        affine_params=inputs.affine,
        constant_logits=logits,
    )
    judge(out, case.reference(inputs), case.reference(inputs, torch.float32))


class TestNames:
    def test_aliases(self):
        assert expand_kinds((("copy", 2), ("null", 1))) == (("identity", 2), ("zero", 1))
        assert expand_kinds("copy", 3) == (("identity", 3),)

    def test_counts(self):
        kinds = expand_kinds((("constant", 2), ("zero", 1), ("constant", 1)))
        assert count_kind(kinds, "constant") == 3 and count_kind(kinds, "scaled_identity") == 0

    @pytest.mark.parametrize(
        ("kinds", "num", "parts"),
        [
            ("identity", None, ["zero_expert_num"]),
            ("identity", -1, ["zero_expert_num", "-1"]),
            ("identity", 1.5, ["zero_expert_num", "1.5"]),
            ((("identity", 2), ("zero", 1)), 4, ["3", "zero_expert_num", "4"]),
            ((("identity", -2),), None, ["identity", "-2"]),
            ((("identity", "2"),), None, ["identity", "'2'"]),
            (("identity",), None, ["pairs", "'identity'"]),
            (((3, "identity"),), None, ["pairs", "3"]),
        ],
    )
    def test_refused(self, kinds, num, parts):
        with pytest.raises(ValueError) as error:
            expand_kinds(kinds, num)
        for part in parts:
            assert part in str(error.value), str(error.value)

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match=r"scaled_identity.*'other'"):
            check_kinds((("identity", 1), ("other", 1)))


class TestParams:
    KINDS = (("constant", 2), ("scaled_identity", 1))
    GOOD = AffineParams(torch.zeros(2, 2, 8), torch.zeros(2, 8), torch.ones(1))

    def test_good(self):
        check_params(self.KINDS, self.GOOD, 8)
        check_params((("identity", 3),), AffineParams(), 8)

    @pytest.mark.parametrize("name", AffineParams._fields)
    def test_missing(self, name):
        with pytest.raises(ValueError, match=f"affine_params.{name}.*None"):
            check_params(self.KINDS, self.GOOD._replace(**{name: None}), 8)

    @pytest.mark.parametrize("name", AffineParams._fields)
    def test_misshapen(self, name):
        wrong = getattr(self.GOOD, name)[:, None]
        with pytest.raises(ValueError, match=f"affine_params.{name}.*shape"):
            check_params(self.KINDS, self.GOOD._replace(**{name: wrong}), 8)

    @pytest.mark.parametrize("name", AffineParams._fields)
    def test_of_no_use(self, name):
        with pytest.raises(ValueError, match=f"affine_params.{name}"):
            check_params((("identity", 3),), AffineParams(**{name: getattr(self.GOOD, name)}), 8)
