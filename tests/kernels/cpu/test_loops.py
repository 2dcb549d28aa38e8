"""The loops that numba compiles for CPUs, and the layer without them.

T tokens, N rows of all experts, M rows of one, E experts, H hidden size, I expert width, A slots, K choices.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import NamedTuple

import pytest
import torch

from helpers.judge import CASES, Case, assert_bitwise, judge, only_zero_experts
from zemoe import fused_experts
from zemoe.kernels import topk
from zemoe.kernels.cpu import experts as cpu_experts
from zemoe.kernels.cpu import products
from zemoe.ops import experts as ops
from zemoe.ops.routing import takes_select_few
from zemoe.routing import select_experts

pytest.importorskip("numba")

NAN, INF = float("nan"), float("inf")
# Rows of each expert: none, one, around the width of a vector and of two, around a group of 64, several groups.
ROWS = [0, 1, 3, 0, 8, 9, 17, 24, 40, 56, 63, 64, 65, 130, 0]
OFFSETS = torch.tensor([0, *ROWS]).cumsum(0)
TOKENS = 11


class Given(NamedTuple):
    x: torch.Tensor
    token: torch.Tensor
    weight: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor

    def wanted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What gate and up yield for each row, and the sums of the tokens; in float64."""
        N, expert = len(self.token), torch.repeat_interleave(torch.tensor(ROWS))
        both, y = torch.empty(N, self.w13.shape[1], dtype=torch.float64), torch.zeros(TOKENS, self.w2.shape[1]).double()
        for n, (e, t) in enumerate(zip(expert.tolist(), self.token.tolist(), strict=True)):
            both[n] = self.w13[e].double() @ self.x[t].double()
            gate, up = both[n].chunk(2)
            y[t] += self.weight[n].double() * (self.w2[e].double() @ (torch.nn.functional.silu(gate) * up))
        return both, y

    def by_loops(self, most: int = sys.maxsize) -> tuple[torch.Tensor, torch.Tensor]:
        both, y = torch.full((len(self.token), self.w13.shape[1]), NAN), torch.zeros(TOKENS, self.w2.shape[1])
        rest = self.w13, self.w2, "silu", both
        products.add_by_loops(y, self.x, self.token, self.weight[:, None], OFFSETS, most, *rest)
        return both, y


def given(H: int, I: int, dtype: torch.dtype = torch.float32) -> Given:
    generator = torch.Generator().manual_seed(0)
    E, N = len(ROWS), sum(ROWS)
    x, weight = torch.randn(TOKENS, H, generator=generator), torch.rand(N, generator=generator)
    token = torch.randint(0, TOKENS, (N,), generator=generator)
    w13, w2 = torch.randn(E, 2 * I, H, generator=generator), torch.randn(E, H, I, generator=generator)
    return Given(x.to(dtype), token, weight, w13.to(dtype), w2.to(dtype))


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether each is as near as float32 sums of the size of the largest can be expected to be."""
    return bool((got.double() - wanted).abs().max() <= 3e-6 * wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("H", "I"), [(48, 24), (16, 8), (7, 3), (1, 1), (6, 12), (33, 17), (130, 260), (300, 50)])
def test_layer(H: int, I: int, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths that are no multiple of a tile, of a vector, of a strip; and more columns than are summed at a time."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = given(H, I, dtype)
    for got, wanted in zip(case.by_loops(), case.wanted(), strict=True):
        assert close(got, wanted)


@pytest.mark.parametrize("panels", [1, 10_000])
def test_batches_of_groups(panels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is computed before the activation takes it: the same bits."""
    whole = given(33, 17).by_loops()
    monkeypatch.setattr(products, "_PANELS", panels)
    for got, wanted in zip(given(33, 17).by_loops(), whole, strict=True):
        assert_bitwise(got, wanted)


def test_experts_with_many_rows_are_left_out() -> None:
    case = given(20, 30)
    both, y = case.by_loops(24)
    many = torch.repeat_interleave(torch.tensor(ROWS), torch.tensor(ROWS)) > 24
    assert both[many].isnan().all() and close(both[~many], case.wanted()[0][~many])
    assert close(y, case._replace(weight=case.weight.masked_fill(many, 0)).wanted()[1])


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (1, 2, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(given(100, 70).by_loops())
    for results in found[1:]:
        for got, wanted in zip(results, found[0], strict=True):
            assert_bitwise(got, wanted)


def test_a_token_does_not_feel_the_others() -> None:
    """Its row has the same bits alone and among many, wherever in a panel it stands."""
    case = given(300, 50)
    both, _ = case.by_loops()
    for n in (0, 5, 100, sum(ROWS) - 1):
        e = int((n >= OFFSETS).sum()) - 1
        alone = torch.full_like(both[:1], NAN)
        offsets = (torch.arange(len(ROWS) + 1) > e).long()
        rows = case.token[n : n + 1], case.weight[n : n + 1, None]
        y = torch.zeros(TOKENS, 300)
        products.add_by_loops(y, case.x, *rows, offsets, sys.maxsize, case.w13, case.w2, "silu", alone)
        assert_bitwise(alone[0], both[n])


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_stays_in_its_rows(value: float) -> None:
    case = given(20, 30)
    clean, clean_y = case.by_loops()
    case.x[3, 5] = value
    both, y = case.by_loops()
    assert not both[case.token == 3].isfinite().any() and not y[3].isfinite().any()
    assert_bitwise(both[case.token != 3], clean[case.token != 3])
    others = torch.arange(TOKENS) != 3
    assert_bitwise(y[others], clean_y[others])


def test_two_threads_of_python() -> None:
    case = given(130, 260)
    wanted = case.by_loops()[1]
    wrong = []

    def many() -> None:
        for _ in range(20):
            if not torch.equal(case.by_loops()[1], wanted):
                wrong.append(1)

    threads = [threading.Thread(target=many) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_which_layers_take_them() -> None:
    x, w13, w2 = torch.randn(3, 8), torch.randn(2, 8, 8), torch.randn(2, 8, 4)
    large = torch.empty(1, 1024, 1024, device="meta")
    assert products.loop_rows(x, w13, w2) == products.loop_rows(x, large, large) == sys.maxsize
    half = [tensor.bfloat16() for tensor in (x, w13, w2)]
    fast = products.FAST_BFLOAT16
    assert products.loop_rows(*half) == (64 if fast else sys.maxsize)
    assert products.loop_rows(half[0], large.bfloat16(), large.bfloat16()) == (24 if fast else sys.maxsize)
    assert products.loop_rows(x, *half[1:]) == products.loop_rows(half[0], w13, w2) == 0
    assert products.loop_rows(x.double(), w13.double(), w2.double()) == 0
    assert products.loop_rows(x, w13.mT, w2) == products.loop_rows(x.T, w13, w2) == 0
    assert products.loop_rows(x, w13[:0], w2[:0]) == products.loop_rows(x[:, :0], w13[:, :, :0], w2[:, :0]) == 0


@pytest.mark.parametrize("layout", ["x", "w13", "w2"])
def test_inputs_not_in_one_piece(layout: str) -> None:
    case = given(12, 6)
    weights, ids = torch.rand(TOKENS, 4), torch.randint(0, len(ROWS), (TOKENS, 4))
    tensors = {"x": case.x, "w13": case.w13, "w2": case.w2}
    kinds = {"num_experts": len(ROWS), "zero_expert_kinds": (("identity", 1),)}
    wanted = fused_experts(*(tensor.double() for tensor in tensors.values()), weights, ids, **kinds)
    tensors[layout] = tensors[layout].mT.contiguous().mT
    assert close(fused_experts(*tensors.values(), weights, ids, **kinds), wanted)
    assert close(
        fused_experts(case.x, case.w13, case.w2, weights.T.contiguous().T, ids.T.contiguous().T, **kinds), wanted
    )


@pytest.mark.parametrize(("num_slots", "wrong"), [(9, -2), (9, 9), (-1, -7)])
def test_choices_by_expert(num_slots: int, wrong: int) -> None:
    ids = torch.randint(-1, 9, (50, 12), generator=torch.Generator().manual_seed(0))
    choices, offsets = cpu_experts._choices_by_loop(ids, 5, num_slots)
    flat = ids.flatten()
    assert offsets.tolist() == [0, *torch.stack([flat == e for e in range(5)]).sum(1).cumsum(0).tolist()]
    for e in range(5):
        assert choices[offsets[e] : offsets[e + 1]].tolist() == (flat == e).nonzero().view(-1).tolist()
    ids[40, 3] = wrong
    with pytest.raises(ValueError, match=f"topk_ids must be .*; got {wrong}"):
        cpu_experts._choices_by_loop(ids, 5, num_slots)


def test_a_lost_token_of_identities_alone() -> None:
    case = Case(
        "lost", "no FFN row carries the NaN to the other columns", T=3, ids=only_zero_experts, kinds=(("identity", 4),)
    )
    x, w13, w2, weights, ids, _ = case.inputs()
    assert ops.takes_moe_ffn_few(x, ids, w13, w2, "silu")
    x[1, 5] = NAN
    out = fused_experts(x, w13, w2, weights, ids, num_experts=case.E, zero_expert_kinds=case.kinds)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


class TestSelectingFew:
    """One loop for few tokens against the operators that take many, or gradients."""

    RULES = (
        {},
        {"renormalize": "all", "routed_scaling_factor": 2.5},
        {"renormalize": "real", "e_score_correction_bias": torch.linspace(-0.1, 0.1, 20)},
        {"e_score_correction_bias": torch.linspace(0.1, -0.1, 16), "routed_scaling_factor": 6.0},
    )

    @staticmethod
    def both_ways(logits: torch.Tensor, **rules) -> list[tuple[torch.Tensor, torch.Tensor]]:
        assert takes_select_few(logits) and not takes_select_few(logits.clone().requires_grad_())
        rules = {"num_experts": 16, "zero_expert_kinds": (("identity", 4),), **rules}
        few = select_experts(logits, 5, **rules)
        weights, ids = select_experts(logits.clone().requires_grad_(), 5, **rules)
        return [few, (weights.detach(), ids)]

    @pytest.mark.parametrize("rules", RULES, ids=str)
    def test_the_same(self, rules: dict) -> None:
        logits = 3 * torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
        logits[3] = logits[3].round()  # ties
        logits[4, 2:] = -INF  # fewer than K are left
        logits[5, :17] = -INF
        (weights, ids), (wanted_weights, wanted_ids) = self.both_ways(logits, **rules)
        assert torch.equal(ids, wanted_ids)
        torch.testing.assert_close(weights, wanted_weights, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("rules", RULES, ids=str)
    @pytest.mark.parametrize("lost", [[NAN], [INF], [INF, INF], [NAN, INF], [-INF] * 20])
    def test_lost_tokens(self, lost: list[float], rules: dict) -> None:
        logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
        logits[1, -len(lost) :] = torch.tensor(lost)
        (weights, ids), (wanted, _) = self.both_ways(logits, **rules)
        assert weights[1].isnan().all() and wanted[1].isnan().all() and ((ids >= 0) & (ids < 20)).all()
        torch.testing.assert_close(weights[::2], wanted[::2], rtol=1e-6, atol=1e-7)

    def test_others_do_not_take_it(self) -> None:
        logits = torch.randn(3, 20)
        assert not takes_select_few(logits[:0]) and not takes_select_few(logits.to("meta"))
        assert not takes_select_few(torch.randn(300, 20))
        assert not torch.compile(takes_select_few, backend="eager")(logits)
        with torch.autograd.forward_ad.dual_level():
            assert not takes_select_few(logits)

    def test_operator(self) -> None:
        logits = torch.randn(3, 20)
        for bias in (None, torch.randn(16)):
            torch.library.opcheck(torch.ops.zemoe.select_few, (logits, bias, 5, 16, True, math.pi))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_layer_without_numba(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (products, topk):
        monkeypatch.setattr(module, "HAS_NUMBA", False)
    given = case.inputs()
    out = fused_experts(*given[:5], num_experts=case.E, zero_expert_kinds=case.kinds, affine_params=given.affine)
    judge(out, case.reference(given), case.reference(given, torch.float32))
