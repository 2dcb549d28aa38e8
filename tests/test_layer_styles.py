"""MoE++ and Isaac-style layers, each one constructor call, against the papers' equations as loops in float64.

Nothing of zemoe is used in the restatements but the layer's parameters. The ids are the layer's own wherever values
are compared, and the choice is judged by itself. E FFN experts, Z zero-computation experts, A slots, K choices.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers.judge import assert_bitwise
from zemoe import MoE, MoEConfig, Router
from zemoe.routing import normalize_logits

pytestmark = pytest.mark.usefixtures("poisoned_empty")

H, I, E, T = 10, 7, 5, 40


def filled(layer: MoE, seed: int = 0) -> MoE:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
    return layer


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed))


def silu_ffn(x, gate_up, down):
    width = down.shape[-1]
    gate, up = gate_up[:width] @ x, gate_up[width:] @ x
    return down @ (gate / (1 + torch.exp(-gate)) * up)


def softmax(z):
    return torch.exp(z - z.max()) / torch.exp(z - z.max()).sum()


def leaves(layer: MoE) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}


def check_choice(scores_A, ids_K):
    """The ids are those of the largest scores, best first, unless the scores are too close to tell."""
    picked = [scores_A[i].item() for i in ids_K]
    rest = [scores_A[i].item() for i in range(len(scores_A)) if i not in ids_K]
    assert all(a >= b - 1e-6 for a, b in zip(picked, [*picked[1:], max(rest)], strict=True))


def shared(x, w):
    y = silu_ffn(x, w["shared_experts.gate_up_proj.weight"], w["shared_experts.down_proj.weight"])
    if "shared_experts.gate.weight" in w:
        y = y / (1 + torch.exp(-(w["shared_experts.gate.weight"][0] @ x)))
    return y


def moe_plus_plus(x_TH, w, ids_TK, previous_TA):
    """MoE++, equations 1 to 8, with 1 zero, 1 copy and 2 constant experts after the E FFN experts."""
    logits, outputs = [], []
    for t, x in enumerate(x_TH):
        z = w["router.classifier.weight"] @ x
        if previous_TA is not None:
            z = z + w["router.residual.weight"] @ previous_TA[t]
        logits.append(z)
        g = softmax(z)
        check_choice(g.detach(), ids_TK[t].tolist())
        nonnull = [i for i in ids_TK[t].tolist() if i != E]
        total = sum(g[i] for i in nonnull)
        y = torch.zeros(H, dtype=torch.float64)
        for i in nonnull:
            if i < E:
                value = silu_ffn(x, w["w13"][i], w["w2"][i])
            elif i == E + 1:
                value = x
            else:
                a = softmax(w["constant_router"][i - E - 2] @ x)
                value = a[0] * x + a[1] * w["constant_value"][i - E - 2]
            y = y + g[i] / total * value
        outputs.append(y)
    return torch.stack(outputs), torch.stack(logits)


def isaac(x_TH, w, ids_TK, null, scale):
    """One null logit, normalised with the others, stands for `null` slots; weights over the chosen FFN experts."""
    logits, outputs = [], []
    for t, x in enumerate(x_TH):
        z = w["router.classifier.weight"] @ x
        mean = sum(z) / (E + 1)
        z = scale * (z - mean) / (sum((v - mean) ** 2 for v in z) / (E + 1) + 1e-6) ** 0.5
        z = torch.stack([z[i] for i in range(E)] + [z[E]] * null)
        logits.append(z)
        g = softmax(z)
        check_choice(g.detach(), ids_TK[t].tolist())
        real = [i for i in ids_TK[t].tolist() if i < E]
        y = torch.zeros(H, dtype=torch.float64)
        for i in real:
            y = y + g[i] / sum(g[j] for j in real) * silu_ffn(x, w["w13"][i], w["w2"][i])
        outputs.append(y + shared(x, w) if "shared_experts.down_proj.weight" in w else y)
    return torch.stack(outputs), torch.stack(logits)


def compare(layer, call, restated, x):
    """All values and gradients; `call(x)` gives (output, routing), `restated(x, weights, ids)` (output, logits)."""
    x32 = x.clone().requires_grad_()
    out, routing = call(x32)
    w, x64 = leaves(layer), x.double().requires_grad_()
    exact, logits = restated(x64, w, routing.topk_ids_TK)
    torch.testing.assert_close(routing.logits_TA.double(), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    seeds = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    out.backward(seeds)
    exact.backward(seeds.double())
    torch.testing.assert_close(x32.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in layer.named_parameters():
        if w[name].grad is None:
            assert parameter.grad is None, name
            continue
        assert w[name].grad.abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad.double(), w[name].grad, rtol=1e-4, atol=1e-4, msg=lambda m: name + m)  # noqa: B023
    return routing


class TestMoEPlusPlus:
    def test_against_the_equations(self):
        """A chain of two: the second takes the first's logits, and its gradient reaches the first's router."""
        first, second = (filled(MoE.moe_plus_plus(H, I, E), seed) for seed in (0, 1))
        x = tokens()
        routing = compare(
            first,
            lambda x: first(x, return_routing=True),
            lambda x, w, ids: moe_plus_plus(x, w, ids, None),
            x,
        )
        previous = routing.logits_TA.detach()
        routing = compare(
            second,
            lambda x: second(x, previous, return_routing=True),
            lambda x, w, ids: moe_plus_plus(x, w, ids, previous.double()),
            tokens(2),
        )
        counts = routing.topk_ids_TK.flatten().bincount(minlength=E + 4)
        assert (counts > 0).all(), "every kind was chosen"

    def test_the_residual_reaches_the_layer_before(self):
        first, second = (filled(MoE.moe_plus_plus(H, I, E), seed) for seed in (0, 1))
        _, routing = first(tokens(), return_routing=True)
        first.zero_grad()
        second(tokens(2), routing.logits_TA).sum().backward()
        assert first.router.classifier.weight.grad.abs().sum() > 0

    def test_arguments(self):
        layer = MoE.moe_plus_plus(H, I, E, 3, zero=2, copy=0, constant=1, gating_residual=False, dtype=torch.bfloat16)
        assert layer.config.zero_expert_kinds == (("zero", 2), ("constant", 1)) and layer.config.top_k == 3
        assert layer.router.residual is None and layer.w13.dtype == torch.bfloat16
        assert MoE.moe_plus_plus(H, I, E).router.residual is not None

    def test_only_null_experts_chosen(self):
        """A token of which nothing is left to normalise gets zeros."""
        layer = filled(MoE.moe_plus_plus(H, I, E, 2, zero=2, copy=1, constant=1))
        layer.router.e_score_correction_bias[E : E + 2] = 10
        assert (layer(tokens()) == 0).all()


class TestIsaac:
    @pytest.mark.parametrize("scale", [1.0, 2.5])
    @pytest.mark.parametrize(
        "options", [{}, {"shared_intermediate_size": 6}, {"shared_intermediate_size": 6, "shared_gated": True}]
    )
    def test_against_the_equations(self, options, scale):
        layer = filled(MoE.isaac(H, I, E, 4, 3, logit_norm=scale, **options))
        routing = compare(
            layer,
            lambda x: layer(x, return_routing=True),
            lambda x, w, ids: isaac(x, w, ids, 4, scale),
            tokens(),
        )
        ffn = (routing.topk_ids_TK < E).sum(1)
        assert set(ffn.tolist()) >= {0, 2, 3}, "tokens with none, some and all of their choices real"

    def test_one_row_for_all_nulls(self):
        layer = MoE.isaac(H, I, E, 4, 3)
        assert layer.router.classifier.weight.shape == (E + 1, H) and layer.config.num_slots == E + 4
        assert MoE.isaac(H, I, E, 4, 3, tied_null=False).router.classifier.weight.shape == (E + 4, H)
        with pytest.raises(ValueError, match="tied_null"):
            MoE.isaac(H, I, E, 0, 3)


class TestLogitNorm:
    @staticmethod
    def router(**options) -> Router:
        config = MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=2, zero_expert_kinds=(("zero", 3),))
        router = Router(config, **options)
        with torch.no_grad():
            router.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
        return router

    def test_scale_and_offset_of_the_logits_play_no_part(self):
        logits = torch.randn(T, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        normal = normalize_logits(logits, 2.0)
        torch.testing.assert_close(normalize_logits(100 * logits + 7, 2.0), normal, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(normal.mean(-1), torch.zeros(T, dtype=torch.float64))
        torch.testing.assert_close(
            normal.std(-1, correction=0), torch.full((T,), 2.0, dtype=torch.float64), rtol=1e-5, atol=0
        )

    def test_gradcheck(self):
        logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        logits[0, 2] = -math.inf
        logits[2] = 1.0
        kept = logits.isfinite()
        free = logits[kept].requires_grad_()

        def rebuild(values):
            whole = torch.full((3, 6), -math.inf, dtype=torch.float64)
            return normalize_logits(whole.masked_scatter(kept, values), 1.5)

        # Where all are equal the curvature is 1e3: a step of 1e-6 is then no longer small.
        assert torch.autograd.gradcheck(lambda values: rebuild(values)[kept], free, eps=1e-8, atol=1e-4)

    def test_edges(self):
        """-inf stays a mask and does not count; NaN and +inf lose their token alone; equal logits tie."""
        logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        plain = normalize_logits(logits, 1.0)
        logits[0, 2], logits[1, 3], logits[2, 1] = -math.inf, math.nan, math.inf
        logits[3], logits[4] = -math.inf, 3.7
        out = normalize_logits(logits, 1.0)
        kept = [0, 1, 3, 4, 5]
        assert out[0, 2] == -math.inf
        torch.testing.assert_close(out[0, kept], normalize_logits(logits[:1, kept], 1.0)[0])
        assert (
            out[1].isnan().all()
            and out[2].isnan().all()
            and (out[3] == -math.inf).all()
            and (out[4] == out[4, 0]).all()
        )
        assert not torch.equal(out[0], plain[0])

    def test_order_of_the_steps(self):
        """Normalised first, then the null logit is repeated, then the residual is added."""
        router = self.router(tied_null=True, gating_residual=True, bias=True, logit_norm=1.5)
        with torch.no_grad():
            router.residual.weight.normal_(generator=torch.Generator().manual_seed(1))
        x, previous = tokens(), torch.randn(T, 8, generator=torch.Generator().manual_seed(2))
        z = normalize_logits(x @ router.classifier.weight.T + router.classifier.bias, 1.5)
        expected = torch.cat([z[:, :E], z[:, E:].expand(-1, 3)], 1) + previous @ router.residual.weight.T
        torch.testing.assert_close(router(x, previous).logits_TA, expected, rtol=1e-5, atol=1e-5)

    def test_none_changes_nothing(self):
        x = tokens()
        assert_bitwise(self.router(logit_norm=None)(x).logits_TA, self.router()(x).logits_TA)
        assert not torch.equal(self.router(logit_norm=1.0)(x).logits_TA, self.router()(x).logits_TA)

    def test_compiles_whole(self):
        layer = filled(MoE.isaac(H, I, E, 4, 3))
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens()), layer(tokens()), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("bad", [0, -1.0, math.inf, math.nan])
    def test_refused(self, bad):
        with pytest.raises(ValueError, match=f"logit_norm.*{bad}"):
            self.router(logit_norm=bad)
