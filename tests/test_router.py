"""Router: the classifier and its rules, against the specification."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from helpers.judge import assert_bitwise, judge
from zemoe import MoE, MoEConfig, Router, reference, select_experts

pytestmark = pytest.mark.usefixtures("poisoned_empty")


KINDS = (("constant", 2), ("null", 3), ("copy", 1), ("zero", 2))
E, A = 16, 24


def logits_of(T: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(T, A, generator=torch.Generator().manual_seed(seed))


def make_router(**kwargs) -> Router:
    config = {"hidden_size": 10, "intermediate_size": 4, "num_experts": E, "top_k": 4, "zero_expert_kinds": KINDS}
    config |= {key: kwargs.pop(key) for key in list(kwargs) if key in MoEConfig.__dataclass_fields__}
    torch.manual_seed(0)
    return Router(MoEConfig(**config), **kwargs)


class TestRouter:
    X = torch.randn(7, 10, generator=torch.Generator().manual_seed(3))

    def logits(self, router: Router, x: torch.Tensor, dtype: torch.dtype, previous=None) -> torch.Tensor:
        return reference.router_logits(
            x,
            router.classifier.weight,
            router.classifier.bias,
            num_experts=E,
            num_zero_experts=A - E,
            residual_weight=None if router.residual is None else router.residual.weight,
            prev_logits_TA=previous,
            dtype=dtype,
        )

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("tied_null", [False, True])
    @pytest.mark.parametrize("gating_residual", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_logits(self, bias, tied_null, gating_residual, dtype):
        router = make_router(bias=bias, tied_null=tied_null, gating_residual=gating_residual)
        previous = None
        if gating_residual:
            nn.init.normal_(router.residual.weight)
            previous = logits_of(7)
        x = self.X.to(dtype)
        routing = router(x, previous)
        judge(
            routing.logits_TA,
            self.logits(router, x, torch.float64, previous),
            self.logits(router, x, torch.float32, previous),
            "logits",
        )
        weights, ids = select_experts(routing.logits_TA, 4, num_experts=E, zero_expert_kinds=KINDS)
        assert_bitwise(routing.topk_weights_TK, weights)
        assert_bitwise(routing.topk_ids_TK, ids)

    def test_the_tied_null_logit_is_one_row(self):
        router = make_router(tied_null=True)
        assert router.classifier.weight.shape == (E + 1, 10)
        logits = router(self.X).logits_TA
        assert logits.shape == (7, A) and (logits[:, E:] == logits[:, E : E + 1]).all()

    def test_the_tied_null_needs_a_zero_expert(self):
        with pytest.raises(ValueError, match="tied_null"):
            make_router(tied_null=True, zero_expert_kinds=())

    def test_the_gating_residual_starts_at_nothing(self):
        router = make_router(gating_residual=True)
        assert_bitwise(router(self.X, logits_of(7)).logits_TA, router(self.X).logits_TA)

    def test_previous_logits_refused(self):
        with pytest.raises(ValueError, match="prev_logits"):
            make_router()(self.X, logits_of(7))
        with pytest.raises(ValueError, match="prev_logits"):
            make_router(gating_residual=True)(self.X, logits_of(7)[:, :-1])
        with pytest.raises(ValueError, match="prev_logits"):
            make_router(gating_residual=True)(self.X, logits_of(6))

    def test_float32_under_autocast(self):
        router = make_router()
        x = self.X.bfloat16()
        expected = router(x)
        with torch.autocast("cpu", torch.bfloat16):
            routing = router(x)
        assert routing.logits_TA.dtype == torch.float32
        assert_bitwise(routing.logits_TA, expected.logits_TA)
        assert_bitwise(routing.topk_weights_TK, expected.topk_weights_TK)

    def test_the_bias_of_the_buffer_selects(self):
        router = make_router()
        router.e_score_correction_bias[20] = 10.0
        assert (router(self.X).topk_ids_TK[:, 0] == 20).all()

    def test_group_limit_of_the_config(self):
        router = make_router(num_expert_group=6, topk_group=1)
        groups = router(self.X).topk_ids_TK // 4
        assert (groups == groups[:, :1]).all()

    def test_gradient_reaches_the_classifier(self):
        router = make_router()
        router(self.X).topk_weights_TK.sum().backward()
        assert router.classifier.weight.grad.abs().sum() > 0

    def test_compiles_whole(self):
        router = make_router(num_expert_group=6, topk_group=3)
        expected = router(self.X)
        torch._dynamo.reset()
        result = torch.compile(router, fullgraph=True, backend="aot_eager")(self.X)
        assert torch.equal(result.topk_ids_TK, expected.topk_ids_TK)
        torch.testing.assert_close(result.topk_weights_TK, expected.topk_weights_TK)


@pytest.mark.parametrize("renormalize", ["all", "real", "nonnull", "none"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_one_renormalised_choice_is_warned_of(top_k, renormalize):
    """Once at construction, just where the router would get no gradient."""
    config = MoEConfig(
        hidden_size=8,
        intermediate_size=4,
        num_experts=4,
        top_k=top_k,
        renormalize=renormalize,
        zero_expert_kinds=(("identity", 1),),
    )
    expected = top_k == 1 and renormalize != "none"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = MoE(config, init_std=0.5)
        layer(torch.randn(20, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    told = [warning for warning in caught if "the router gets no gradient" in str(warning.message)]
    assert len(told) == expected
    gradient = layer.router.classifier.weight.grad
    assert (gradient is None or bool((gradient.abs() < 1e-4).all())) == expected  # w / w has one of a rounding
