"""The tables of values at the edges, row by row, on every backend and every class.

Source: docs/specification.md, "NaN and infinities" and "Shapes, dtypes and errors".
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.judge import BY_NAME, Case, assert_bitwise, judge
from zemoe import AffineParams, MoE, MoEConfig, ZeroExpertFusedMoE, fused_experts
from zemoe.affine import AFFINE_KINDS
from zemoe.backends import BACKENDS
from zemoe.scores import SCORES

pytestmark = pytest.mark.usefixtures("poisoned_empty")

INF, NAN = float("inf"), float("nan")
ON_CPU = [name for name, backend in BACKENDS.items() if backend.devices is None or "cpu" in backend.devices]
ALL_KINDS = tuple((kind, 2) for kind in AFFINE_KINDS)
E, H, I, K = 5, 9, 7, 4
A = E + 2 * len(ALL_KINDS)
EVERY = Case("every", "each affine kind twice, odd H and I", T=11, H=H, I=I, E=E, kinds=ALL_KINDS, K=K)


def run(case: Case, inputs, backend: str) -> torch.Tensor:
    return fused_experts(
        *inputs[:5], num_experts=case.E, zero_expert_kinds=case.kinds, affine_params=inputs.affine, backend=backend
    )


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5)
    return module


def fused(
    scoring_func: str = "softmax", renormalize: str = "none", kinds=ALL_KINDS, top_k: int = K
) -> ZeroExpertFusedMoE:
    return randomised(
        ZeroExpertFusedMoE(
            sum(count for _, count in kinds),
            kinds,
            None,
            num_experts=E,
            top_k=top_k,
            hidden_size=H,
            intermediate_size=I,
            scoring_func=scoring_func,
            renormalize=renormalize,
        )
    )


def moe(scoring_func: str = "softmax", renormalize: str = "none", kinds=ALL_KINDS, top_k: int = K, **kwargs) -> MoE:
    config = MoEConfig(
        hidden_size=H,
        intermediate_size=I,
        num_experts=E,
        top_k=top_k,
        zero_expert_kinds=kinds,
        scoring_func=scoring_func,
        renormalize=renormalize,
    )
    return randomised(MoE(config, **kwargs))


def tokens(T: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(T, H, generator=generator), torch.randn(T, A, generator=generator)


# ------------------------------------------------------------------------------------------- row 1: T = 0 and shapes


class TestNoTokens:
    @pytest.mark.parametrize("backend", ON_CPU)
    @pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3, 2)])
    def test_fused_experts(self, backend, shape):
        inputs = Case("none", "T = 0", T=0, H=H, I=I, E=E, kinds=ALL_KINDS, K=K).inputs()
        x = torch.zeros(*shape, H, requires_grad=True)
        w13 = inputs.w13.requires_grad_()
        out = fused_experts(
            x,
            w13,
            *inputs[2:5],
            num_experts=E,
            zero_expert_kinds=ALL_KINDS,
            affine_params=inputs.affine,
            backend=backend,
        )
        assert out.shape == x.shape
        out.sum().backward()
        assert x.grad.shape == x.shape and (w13.grad == 0).all()

    @pytest.mark.parametrize("shape", [(0,), (2, 0)])
    def test_layers(self, shape):
        assert fused()(torch.zeros(*shape, H), torch.zeros(*shape, A)).shape == (*shape, H)
        for layer in (moe(), moe(shared_intermediate_size=6, shared_gated=True), moe(kinds=())):
            out = layer(torch.zeros(*shape, H))
            assert out.shape == (*shape, H)
            out.sum().backward()

    def test_no_choices(self):
        """K = 0 can come from a caller that dispatches: then there is nothing to add up."""
        x, _ = tokens()
        inputs = EVERY.inputs()
        none = torch.zeros(11, 0)
        out = fused_experts(x, inputs.w13, inputs.w2, none, none.long(), num_experts=E, zero_expert_kinds="identity")
        assert (out == 0).all() and out.shape == x.shape


class TestShapes:
    @pytest.mark.parametrize("shape", [(11,), (1, 11), (11, 1), (1, 1, 11)])
    def test_leading(self, shape):
        x, logits = tokens()
        flat = fused()(x, logits)
        assert_bitwise(fused()(x.view(*shape, H), logits.view(*shape, A)).view(11, H), flat)
        assert_bitwise(moe()(x.view(*shape, H)).view(11, H), moe()(x))

    def test_strided(self):
        x, _ = tokens(12)
        layer = moe(shared_intermediate_size=6)
        strided = x.view(3, 4, H).transpose(0, 1)
        out = layer(strided)
        assert out.shape == (4, 3, H)
        torch.testing.assert_close(out, layer(strided.contiguous()), rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- row 2: who gets the tokens


@pytest.mark.parametrize("backend", ON_CPU)
class TestDistributions:
    @pytest.mark.parametrize("kind", sorted(AFFINE_KINDS))
    def test_every_choice_is_a_zero_expert(self, backend, kind):
        case = Case("zero", "no FFN row", T=9, H=H, I=I, E=E, kinds=((kind, 3),), K=3)
        inputs = case.inputs()
        inputs = inputs._replace(ids_TK=torch.tensor([[E, E + 1, E + 2]] * 9), w13=inputs.w13.requires_grad_())
        # The FFN weights are not even read.
        with torch.no_grad():
            inputs.w13.fill_(NAN)
            inputs.w2.fill_(NAN)
        out = run(case, inputs, backend)
        judge(out, case.reference(inputs), case.reference(inputs, torch.float32))
        assert not out.requires_grad or (out.sum().backward() is None and (inputs.w13.grad == 0).all())

    def test_an_expert_without_tokens_is_not_read(self, backend):
        case = BY_NAME["empty_expert"]
        inputs = case.inputs()
        expected = run(case, inputs, backend)
        inputs.w13[1], inputs.w2[1] = NAN, INF
        assert_bitwise(run(case, inputs, backend), expected)

    @pytest.mark.parametrize("expert", range(E))
    def test_all_on_one(self, backend, expert):
        case = Case("one", "one long slice, K = 1", T=50, H=H, I=I, E=E, kinds=(("identity", 1),), K=1)
        inputs = case.inputs()._replace(ids_TK=torch.full((50, 1), expert))
        judge(run(case, inputs, backend), case.reference(inputs), case.reference(inputs, torch.float32))

    @pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 3), (3, 1, 1), (5, 7, 2)])
    def test_tiny_and_odd(self, backend, sizes):
        H, I, E = sizes
        kinds = (("identity", 1), ("constant", 1))
        case = Case("odd", "sizes that no vector divides", T=4, H=H, I=I, E=E, kinds=kinds, K=E + 2)
        inputs = case.inputs()
        judge(run(case, inputs, backend), case.reference(inputs), case.reference(inputs, torch.float32))


# --------------------------------------------------------------------------------------------------------- row 3: -1


@pytest.mark.parametrize("backend", ON_CPU)
class TestSkipped:
    @pytest.mark.parametrize("weight", [0.7, NAN, INF])
    def test_the_weight_is_ignored(self, backend, weight):
        inputs = EVERY.inputs()
        skipped = inputs.ids_TK % 3 == 0
        ids = inputs.ids_TK.masked_fill(skipped, -1)
        expected = run(
            EVERY, inputs._replace(ids_TK=ids, weights_TK=inputs.weights_TK.masked_fill(skipped, 0.0)), backend
        )
        out = run(
            EVERY, inputs._replace(ids_TK=ids, weights_TK=inputs.weights_TK.masked_fill(skipped, weight)), backend
        )
        assert out.isfinite().all()
        assert_bitwise(out, expected)

    def test_everything_skipped(self, backend):
        inputs = EVERY.inputs()
        inputs = inputs._replace(ids_TK=torch.full_like(inputs.ids_TK, -1))
        assert (run(EVERY, inputs, backend) == 0).all()

    def test_skipped_weights_do_not_reach_gradients(self, backend):
        inputs = EVERY.inputs()
        skipped = inputs.ids_TK % 3 == 0
        weights = inputs.weights_TK.masked_fill(skipped, NAN).requires_grad_()
        x, w13, w2 = (tensor.requires_grad_() for tensor in (inputs.x_TH, inputs.w13, inputs.w2))
        affine = AffineParams(*(tensor.requires_grad_() for tensor in inputs.affine))
        ids = inputs.ids_TK.masked_fill(skipped, -1)
        inputs = inputs._replace(x_TH=x, w13=w13, w2=w2, weights_TK=weights, ids_TK=ids, affine=affine)
        run(EVERY, inputs, backend).square().sum().backward()
        for leaf in (x, w13, w2, weights, *affine):
            assert leaf.grad.isfinite().all()
        assert (weights.grad[skipped] == 0).all()


# ----------------------------------------------------------------------------------------------- row 4: NaN and +inf


class TestNotANumber:
    @pytest.mark.parametrize("backend", ON_CPU)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("token", "column"), [(0, 0), (3, 4), (10, H - 1)])
    @pytest.mark.parametrize("slot", ["ffn", *AFFINE_KINDS, "skipped", "mixed"])
    def test_in_x(self, backend, dtype, token, column, slot):
        inputs = EVERY.inputs(dtype)
        names = ["ffn"] * E + [kind for kind, count in ALL_KINDS for _ in range(count)]
        if slot != "mixed":
            inputs.ids_TK[token] = (
                -1 if slot == "skipped" else torch.tensor([i for i in range(A) if names[i] == slot][:2] * 2)
            )
        expected = run(EVERY, inputs, backend)
        inputs.x_TH[token, column] = NAN
        out = run(EVERY, inputs, backend)
        assert out[token].isnan().all()
        others = torch.arange(11) != token
        assert_bitwise(out[others], expected[others])

    @pytest.mark.parametrize("backend", ON_CPU)
    @pytest.mark.parametrize("slot", range(A))
    def test_in_a_weight(self, backend, slot):
        inputs = EVERY.inputs()
        inputs.ids_TK[3] = torch.tensor([slot, (slot + 1) % A, (slot + 2) % A, -1])
        expected = run(EVERY, inputs, backend)
        inputs.weights_TK[3, 0] = NAN
        out = run(EVERY, inputs, backend)
        assert out[3].isnan().all()
        others = torch.arange(11) != 3
        assert_bitwise(out[others], expected[others])

    @pytest.mark.parametrize("backend", ON_CPU)
    def test_an_infinite_x_stays_in_its_row(self, backend):
        inputs = EVERY.inputs()
        expected = run(EVERY, inputs, backend)
        inputs.x_TH[3] = INF
        others = torch.arange(11) != 3
        assert_bitwise(run(EVERY, inputs, backend)[others], expected[others])

    @pytest.mark.parametrize("broken", ["nan", "inf", "masked", "x"])
    @pytest.mark.parametrize("renormalize", ["none", "all", "real", "nonnull"])
    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    @pytest.mark.parametrize(
        "kinds", [ALL_KINDS, (("identity", A - E),), (("zero", A - E),)], ids=["all", "identity", "zero"]
    )
    def test_in_a_layer(self, scoring_func, renormalize, broken, kinds):
        layer = fused(scoring_func, renormalize, kinds)
        x, logits = tokens()
        logits[3, E:] += 20  # its choices are all zero-computation experts
        expected = layer(x, logits)
        if broken == "nan":
            logits[3, 1] = NAN
        elif broken == "inf":
            logits[3, A - 1] = INF
        elif broken == "masked":
            logits[3] = -INF
        else:
            x[3, 2] = NAN
        out = layer(x, logits)
        assert out[3].isnan().all()
        others = torch.arange(11) != 3
        # Not bitwise: that token's choices have changed, and with them the number of rows of some products.
        torch.testing.assert_close(out[others], expected[others], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("shared", [0, 6])
    def test_in_a_block(self, shared):
        layer = moe(shared_intermediate_size=shared)
        x, _ = tokens()
        expected = layer(x)
        x[3, 2] = NAN
        out = layer(x)
        assert out[3].isnan().all()
        others = torch.arange(11) != 3
        torch.testing.assert_close(out[others], expected[others], rtol=1e-6, atol=1e-7)

    def test_every_token(self):
        x, logits = tokens()
        assert fused()(torch.full_like(x, NAN), logits).isnan().all()
        assert fused()(x, torch.full_like(logits, -INF)).isnan().all()


# ------------------------------------------------------------------------------------------------ row 5: a mask logit


class TestMasked:
    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    @pytest.mark.parametrize("renormalize", ["none", "all", "real", "nonnull"])
    def test_a_masked_expert_is_as_if_it_were_not_there(self, scoring_func, renormalize):
        layer = fused(scoring_func, renormalize)
        x, logits = tokens()
        logits[:, 2] = -INF
        out = layer(x, logits)
        with torch.no_grad():
            layer.w13_weight[2], layer.w2_weight[2] = NAN, NAN
        assert_bitwise(layer(x, logits), out)
        assert out.isfinite().all()

    @pytest.mark.parametrize("scoring_func", sorted(SCORES))
    def test_one_slot_left(self, scoring_func):
        """K = 4, one finite logit: the others weigh 0."""
        layer = fused(scoring_func, "all")
        x, _ = tokens()
        logits = torch.full((11, A), -INF)
        logits[:, E] = 1.0  # the first identity
        torch.testing.assert_close(layer(x, logits), x)


# ----------------------------------------------------------------------------------------------------- row 7: bitwise


@pytest.mark.parametrize("make", [fused, moe])
def test_the_same_bits_forward_and_backward(make):
    results = []
    for _ in range(3):
        layer = make()
        x, logits = tokens(200)
        x.requires_grad_()
        out = layer(x, logits) if make is fused else layer(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_bitwise(first, second)
