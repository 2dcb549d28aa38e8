"""Every Triton launcher inside fences: nothing is written and nothing that counts is read outside of what it was given.

Inputs, outputs and workspaces lie in larger allocations, between guard bands. Each layer runs twice, with other values
around (and in memory that is not initialised): NaN and the largest integers, then numbers that would pass as data, such
as the id of an expert. The bands must stay as they were, inputs too, and both runs must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from helpers.judge import Case, Inputs, all_on_one, assert_bitwise, only_zero_experts, with_skips, without_expert_1
from helpers.memory import pretend_hopper

pytest.importorskip("triton")
from helpers.fences import NAN, POISONS, Fence, bits, on_the_last, same_in_both, wild_ids
from zemoe.affine import AffineParams, kernel_kinds
from zemoe.config import expand_kinds
from zemoe.kernels.triton.combine import combine
from zemoe.kernels.triton.moe_ffn_tiles import down, gate_up, moe_ffn_tiles, one_token
from zemoe.kernels.triton.plan_tiles import plan_tiles
from zemoe.kernels.triton.router_logits import RouterSchedule, router_logits
from zemoe.kernels.triton.select_experts import select_experts
from zemoe.kernels.triton.tiles import schedule

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes infinities and NaN with numpy
]

# bfloat16 on a GPU only: Triton 3.6's interpreter multiplies the bits of bfloat16 numbers, not their values.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


# --- the experts and their plan: docs/specification.md, "NaN and infinities"


@pytest.fixture(autouse=True)
def _a_hopper(device, monkeypatch):
    pretend_hopper(device, monkeypatch)


KINDS = (("constant", 1), ("identity", 1), ("scaled_identity", 1), ("zero", 1))


@dataclass(frozen=True)
class Shape:
    """A Case with its tiles. tokens: what the schedule is told, for kernels that are meant for more of them."""

    case: Case
    block_m: int
    tokens: int = 0
    shift: int = 0

    @property
    def name(self) -> str:
        return self.case.name


DESCRIPTORS = Shape(Case("descriptors", "blocks reach past H and I", T=6, H=40, I=40, E=5, kinds=KINDS), 16)
POINTERS = Shape(Case("pointers", "odd H and I", T=6, H=37, I=19, E=5, kinds=KINDS), 16)
ONE_TOKEN = Shape(Case("one_token", "a path of its own", T=1, H=40, I=24, E=5, kinds=KINDS), 1)
SHAPES = [
    DESCRIPTORS,
    POINTERS,
    ONE_TOKEN,
    Shape(Case("one_odd_token", "odd H and I, top 1", T=1, H=37, I=19, E=2, kinds=(), K=1), 1),
    Shape(Case("persistent", "as for many tokens", T=12, H=72, I=40, E=2, kinds=KINDS), 128, tokens=10**6),
    Shape(Case("tall", "192 rows a tile", T=210, H=24, I=16, E=2, kinds=KINDS, K=4), 192),
    Shape(Case("choose_all", "K = A", T=5, H=40, I=24, E=4, kinds=KINDS, K=8), 32),
    Shape(Case("no_experts", "E = 0", T=5, E=0, kinds=(("identity", 4),)), 128, tokens=10**6),
    Shape(replace(DESCRIPTORS.case, name="unaligned"), 64, shift=1),
    Shape(replace(DESCRIPTORS.case, name="no_tokens", T=0), 16),
    Shape(replace(DESCRIPTORS.case, name="no_choices", K=0), 16),
    Shape(replace(DESCRIPTORS.case, name="no_width", I=0), 16),
]  # fmt: skip


def plan_of(shape: Shape, inputs: Inputs, fence: Fence, **ways: int) -> list[Tensor | None]:
    """What `plan_tiles` makes of the routing, and the constants' values."""
    case, affine = shape.case, inputs.affine or AffineParams()
    constant_logits = None
    if affine.constant_router is not None:
        constant_logits = (inputs.x_TH.nan_to_num().float() @ affine.constant_router.flatten(0, 1).T).unflatten(
            1, (-1, 2)
        )
    made = plan_tiles(
        fence.around(inputs.weights_TK),
        fence.around(inputs.ids_TK),
        num_experts=case.E,
        num_slots=case.A,
        block_m=shape.block_m,
        kinds=kernel_kinds(expand_kinds(case.kinds)),
        scale_S=fence.around(affine.scale),
        constant_logits_TC2=fence.around(constant_logits),
        **ways,
    )
    fence.check("plan_tiles", *made)
    return [*made, fence.around(affine.constant_value)]


def layer(shape: Shape, inputs: Inputs, at_once: bool = False) -> Callable[[Fence], list[Tensor | None]]:
    """Every launcher of a layer in turn, checked after each; at_once: then as moe_ffn_tiles calls them, too."""
    case = shape.case

    def run(fence: Fence) -> list[Tensor | None]:
        row_token, slot_row, offsets, tiles, *affine = plan = plan_of(shape, inputs, fence)
        x, w13, w2, weights = (fence.around(inputs[i], gap=8 * (i == 0)) for i in range(4))
        how = schedule(shape.block_m, shape.tokens or case.T, case.K, w13, w2)

        def whole() -> Tensor:
            out = moe_ffn_tiles(x, weights, row_token, slot_row, offsets, tiles, w13, w2, tuple(affine), "silu", how)
            fence.check("moe_ffn_tiles", out)
            return out

        if not (case.T and case.K and w13.numel()):
            return [*plan, whole()]
        if shape.block_m == 1:
            out = one_token(x, weights, slot_row, tiles[0], w13, w2, tuple(affine), "silu", how)
            fence.check("one_token", out)
        else:
            inner = gate_up(x, row_token, offsets, tiles[0], w13, "silu", how.gate_up)
            fence.check("gate_up", inner)
            rows = down(inner, offsets, tiles[-1], w2, how.down, len(x))
            fence.check("down", rows)
            out = combine(rows, slot_row, weights, x, *affine, how.block_h)
            fence.check("combine", out)
            used = int(offsets[-1])
            for name, made in (("gate_up", inner), ("down", rows)):
                untouched = bits(made[used:]) == bits(torch.full_like(made[used:], fence.poison(made.dtype)))
                assert untouched.all(), f"{name} wrote rows that belong to nobody"
            plan += [inner[:used], rows[:used]]
        if at_once:
            assert_bitwise(whole(), out)
        return [*plan, out]

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_shapes(shape: Shape, device: str) -> None:
    *_, out = same_in_both(layer(shape, shape.case.inputs(DTYPE), at_once=True), device, shape.shift)
    assert out.isfinite().all()


EDGES = {
    "skips": with_skips,
    "wild": wild_ids,
    "only_zero_experts": only_zero_experts,
    "empty_expert": without_expert_1,
    "all_on_one": all_on_one,
    "on_the_last": on_the_last,
}


@pytest.mark.parametrize(
    ("shape", "edge"),
    [(DESCRIPTORS, edge) for edge in EDGES]
    + [(POINTERS, "wild"), (POINTERS, "on_the_last"), (ONE_TOKEN, "wild"), (ONE_TOKEN, "only_zero_experts")],
    ids=lambda given: given if isinstance(given, str) else given.name,
)
def test_ids(edge: str, shape: Shape, device: str) -> None:
    shape = replace(shape, case=replace(shape.case, ids=EDGES[edge]))
    inputs = shape.case.inputs(DTYPE)
    skipped = (inputs.ids_TK < 0) | (inputs.ids_TK >= shape.case.A)
    inputs.weights_TK[skipped] = NAN
    _, slot_row, *_, out = same_in_both(layer(shape, inputs), device)
    assert (slot_row[skipped] == -1).all() and out.isfinite().all()


@pytest.mark.parametrize("edge", EDGES)
def test_ids_planned_in_two_launches(edge: str, device: str) -> None:
    shape = replace(DESCRIPTORS, case=replace(DESCRIPTORS.case, T=21, ids=EDGES[edge]))
    inputs = shape.case.inputs(DTYPE)
    few = {"most_compared": 0, "part": 8, "most_blocks": 3}
    same_in_both(lambda fence: plan_of(shape, inputs, fence, **few), device)


@pytest.mark.parametrize("shape", [DESCRIPTORS, POINTERS, ONE_TOKEN], ids=lambda shape: shape.name)
def test_lost_tokens(shape: Shape, device: str) -> None:
    inputs = shape.case.inputs(DTYPE)
    inputs.x_TH[-1, -1] = NAN
    inputs.weights_TK[0] = NAN
    *_, out = same_in_both(layer(shape, inputs), device)
    assert out[[0, -1]].isnan().all() and out[1:-1].isfinite().all()


# --- the router and its choice

ROUTER_WAYS = {
    "one": RouterSchedule("one", 4, 2, 16, 1, 4, 1),
    "direct": RouterSchedule("direct", 16, 16, 16, 1, 4, 2),
    "slices": RouterSchedule("direct", 16, 64, 16, 3, 4, 2),
    "split": RouterSchedule("split", 32, 16, 16, 1, 4, 2),
    "split_slices": RouterSchedule("split", 32, 16, 16, 2, 4, 2),
    "chosen": None,
}


# The split way takes aligned rows only.
ROUTED = [(way, 3, 5, 40) for way in ROUTER_WAYS] + [(w, 1, 21, 37) for w in ROUTER_WAYS if not w.startswith("split")]


@pytest.mark.parametrize(("way", "T", "R", "H"), ROUTED)
def test_router(way: str, T: int, R: int, H: int, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # float16 for the interpreter, see above.
    x, weight = torch.randn(T, H, generator=generator).to(DTYPE), torch.randn(R, H, generator=generator)
    x[-1, 0] = NAN

    def run(fence: Fence) -> list[Tensor | None]:
        logits = router_logits(fence.around(x, gap=8), fence.around(weight, gap=3), ROUTER_WAYS[way])
        fence.check("router_logits", logits)
        return [logits]

    (logits,) = same_in_both(run, device)
    assert logits[-1].isnan().all() and logits[:-1].isfinite().all()


@pytest.mark.parametrize(
    ("A", "K", "rules"),
    [
        (5, 5, {}),
        (21, 6, {"bias": 13, "scoring": "sigmoid", "renormalize": "real"}),
        (24, 4, {"bias": 24, "num_expert_group": 3, "topk_group": 2, "scoring": "sqrtsoftplus"}),
        (300, 12, {"bias": 300, "renormalize": "nonnull", "null_ranges": ((290, 300),)}),
    ],
    ids=["choose_all", "short_bias", "groups", "chunks"],
)
def test_route(A: int, K: int, rules: dict, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, A, generator=generator)
    logits[1, 2], logits[2, A - 1] = NAN, float("inf")
    logits[3] = float("-inf")
    logits[4, 1:] = float("-inf")
    bias = torch.randn(rules.get("bias", 0), generator=generator) if rules.get("bias") else None

    def run(fence: Fence) -> list[Tensor | None]:
        given = rules | {"bias": fence.around(bias)}
        weights, ids = select_experts(fence.around(logits, gap=5), K, num_experts=A - A // 3, **given)
        fence.check("select_experts", weights, ids)
        return [weights, ids]

    weights, ids = same_in_both(run, device)
    assert (ids >= 0).all() and (ids < A).all()
    assert weights[1:4].isnan().all() and weights[[0, 4, 5]].isfinite().all()


def test_no_tokens(device: str) -> None:
    def run(fence: Fence) -> list[Tensor | None]:
        x, weight = fence.around(torch.empty(0, 40, dtype=DTYPE)), fence.around(torch.ones(7, 40))
        logits = router_logits(x, weight)
        results = [logits, *select_experts(logits, 3, num_experts=5)]
        fence.check("router and route", *results)
        return results

    logits, weights, ids = same_in_both(run, device)
    assert logits.shape == (0, 7) and weights.shape == ids.shape == (0, 3)


# --- the fences themselves


@pytest.mark.parametrize("at", [-1, 6])
@pytest.mark.parametrize("poison", POISONS)
def test_a_fence_sees_what_crosses_it(at: int, poison: str, device: str) -> None:
    fence = Fence(device, poison)
    out = fence.empty(torch.empty(2, 3))
    out.fill_(1.0)
    fence.check("nothing")
    memory = out.as_strided((1,), (1,), out.storage_offset() + at)
    memory.fill_(2.0)
    with pytest.raises(AssertionError, match=rf"wrote at \[{at}\]"):
        fence.check("a kernel")


def test_a_fence_sees_an_input_that_changes(device: str) -> None:
    fence = Fence(device, "extreme")
    data = fence.around(torch.zeros(2, 3), gap=1)
    fence.check("nothing")
    data[1, 2] = 1.0
    with pytest.raises(AssertionError, match="wrote"):
        fence.check("a kernel")
    with pytest.raises(AssertionError, match="no fence"):
        Fence(device, "extreme").check("a kernel", data)
