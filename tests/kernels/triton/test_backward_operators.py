"""The operators of the Triton backend's training one by one, and its launchers inside fences."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.fences import Fence, bits, on_the_last, same_in_both, wild_ids
from helpers.judge import Case, assert_bitwise
from helpers.memory import pretend_hopper

pytest.importorskip("triton")
from helpers.triton_training import (  # noqa: F401
    DTYPE,
    _on_this_device,
    compute,
    leaves_of,
    on,
    pointers,
    small,
    upstream,
)
from zemoe.kernels.triton import tiles
from zemoe.kernels.triton.combine import grad_tokens
from zemoe.kernels.triton.grad_weight import grad_weight
from zemoe.kernels.triton.moe_ffn_tiles import gate_up, moe_ffn_tiles
from zemoe.kernels.triton.moe_ffn_tiles_backward import grad_preact, grad_rows, moe_ffn_tiles_backward, row_weights
from zemoe.kernels.triton.plan_tiles import plan_tiles
from zemoe.kernels.triton.tiles import Product

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes NaN with numpy
]
OPS = torch.ops.zemoe
NAN = float("nan")
ROUNDINGS = 4 * torch.finfo(DTYPE).eps


# ------------------------------------------------------------------------------------------------------ the operators


def operator_arguments(case: Case, device: str, block_m: int = 16) -> list:
    inputs = on(device, case.inputs(DTYPE))
    plan = plan_tiles(
        inputs.weights_TK, inputs.ids_TK, num_experts=case.E, num_slots=case.A, block_m=block_m, kinds=()
    )[:4]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    alpha, beta, value = (
        torch.randn(*s, generator=generator).to(device) for s in ((case.T,), (case.T, 2), (2, case.H))
    )
    trained = [inputs.x_TH, inputs.weights_TK, *plan, block_m, inputs.w13, inputs.w2, alpha, beta, value]
    return [t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in trained]


SMALL = Case(
    "small", "every row is somebody's: opcheck compares all of what is saved", T=3, H=16, I=8, E=2, kinds=(), K=2
)


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("save_preact", [True, False])
def test_opcheck_forward(save_preact: bool, device: str) -> None:
    args = operator_arguments(SMALL, device)
    if not save_preact:
        for tensor in (args[0], args[1], args[7], args[8]):
            tensor.requires_grad_(False)
    which = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if (
        not save_preact
    ):  # else it compares, after a backward, what that backward has overwritten; see test_compiled_whole
        which.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.moe_ffn_tiles_train.default, (*args, None, None, "silu", save_preact), test_utils=which)


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("moe_ffn_tiles_backward", [True] * 7),
        ("moe_ffn_tiles_backward", [False] * 7),
        ("moe_ffn_tiles_backward_", [True, False, False, True, True, False, True]),
    ],
)
def test_opcheck_backward(name: str, needs: list[bool], device: str) -> None:
    args = [t.detach() if isinstance(t, Tensor) else t for t in operator_arguments(SMALL, device)]
    out, preact = OPS.moe_ffn_tiles_train(*args, None, None, "silu", True)
    main_grads = (torch.zeros_like(args[7], dtype=torch.float32), None, True) if name.endswith("_") else ()
    torch.library.opcheck(
        getattr(OPS, name).default, (torch.randn_like(out), *args, preact, "silu", needs, *main_grads)
    )


@pytest.mark.usefixtures("pointers")
def test_compiled_whole(device: str) -> None:
    case, results = Case("few", "an affine part", T=5, kinds=(("constant", 1), ("identity", 1)), K=4), []
    for compiled in (False, True):
        leaves, rest = leaves_of(case, device)
        function = functools.partial(compute, case, rest=rest)
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        function(leaves).backward(upstream(case, device))
        results.append([leaf.grad for leaf in leaves.values()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ the launchers


KINDS = (("identity", 2),)
FENCED = {
    "descriptors": (Case("d", "blocks reach past H and I", T=6, H=40, I=40, E=5, kinds=KINDS, K=4), 16, 0),
    "pointers": (Case("p", "odd H and I", T=6, H=37, I=19, E=5, kinds=KINDS, K=4), 16, 0),
    "unaligned": (Case("u", "memory off any alignment", T=6, H=40, I=40, E=5, kinds=KINDS, K=4), 64, 1),
    "two": (Case("t", "two tiles of an expert", T=70, H=24, I=16, E=1, kinds=(), K=1), 64, 0),
    "wild": (Case("w", "ids of no slot", T=6, H=40, I=24, E=5, kinds=KINDS, K=4, ids=wild_ids), 32, 0),
    "last": (Case("l", "all on the last", T=6, H=40, I=24, E=3, kinds=KINDS, K=3, ids=on_the_last), 16, 0),
}


@pytest.mark.parametrize("shape", FENCED)
def test_inside_fences(shape: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launcher between guard bands: see test_triton_guard. What padding rows hold differs between both runs."""
    pretend_hopper(device, monkeypatch)
    case, block_m, shift = FENCED[shape]
    inputs = case.inputs(DTYPE)
    alpha = torch.rand(case.T, generator=torch.Generator().manual_seed(1))

    def launch(fence: Fence) -> list[Tensor | None]:
        x, w13, w2, weights = (fence.around(inputs[i], gap=8 * (i == 0)) for i in range(4))
        dout, alpha_T = fence.around(upstream(case, "cpu"), gap=16), fence.around(alpha)
        made = plan_tiles(
            weights, fence.around(inputs.ids_TK), num_experts=case.E, num_slots=case.A, block_m=block_m, kinds=()
        )
        row_token, slot_row, offsets, tile_lists = made[:4]
        how, back = tiles.schedule(block_m, case.T, case.K, w13, w2), tiles.backward_schedule(block_m, w13, w2)
        used, N = int(offsets[-1]), len(row_token)

        def untouched(what: str, *rows: Tensor) -> None:
            for made in rows:
                poison = torch.full_like(made[used:], fence.poison(made.dtype))
                assert torch.equal(bits(made[used:]), bits(poison)), f"{what} wrote rows that belong to nobody"

        preact = fence.empty(torch.empty(N, 2 * case.I, dtype=DTYPE))
        gate_up(x, row_token, offsets, tile_lists[0], w13, "silu", how.gate_up, preact)
        fence.check("gate_up", preact)
        kept, dpreact = preact.clone(), fence.empty(torch.empty(N, 2 * case.I, dtype=DTYPE))
        weight = row_weights(slot_row, weights)
        fence.check("row_weights", weight)
        rule = (dout, row_token, weight, offsets, tile_lists[-1], w2, preact)
        inner, partial = grad_preact(*rule, dpreact, "silu", back.preact, want_inner=True)
        fence.check("grad_preact", inner, partial)
        assert_bitwise(preact.cpu(), kept.cpu())
        untouched("grad_preact", preact, dpreact, inner, partial, weight)
        dw2 = grad_weight(inner, dout, row_token, offsets, back.weight, tokens_first=True)
        dw13 = grad_weight(dpreact, x, row_token, offsets, back.weight, tokens_first=False)
        fence.check("grad_weight", dw2, dw13)
        rows = grad_rows(dpreact, offsets, tile_lists[-1], w13, back.rows, len(x))
        fence.check("grad_rows", rows)
        untouched("grad_rows", rows)
        last = grad_tokens(
            rows, slot_row, partial, dout, x, alpha_T, back.block_h, want_x=True, want_alpha=True
        )  # fmt: skip
        fence.check("grad_tokens", *last)
        at_once = moe_ffn_tiles_backward(
            dout, x, weights, row_token, slot_row, offsets, tile_lists[-1], w13, w2, alpha_T, preact, "silu",
            (True,) * 5, back, overwrite=True,
        )  # fmt: skip
        fence.check("moe_ffn_tiles_backward", *(grad for grad in at_once if grad is not None))
        untouched("moe_ffn_tiles_backward", preact)
        for one, other in zip(at_once, (last[0], last[1], dw13, dw2, last[2]), strict=True):
            assert_bitwise(one.cpu(), other.cpu())
        assert_bitwise(preact[:used].cpu(), dpreact[:used].cpu())
        return [preact[:used], *at_once]

    for result in same_in_both(launch, device, shift):
        assert result.isfinite().all()


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, DTYPE], ids=str)
def test_weight_gradients_add_up(tokens_first: bool, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(41, 24, generator=generator).to(DTYPE).to(device)
    tokens = torch.randn(9, 40, generator=generator).to(DTYPE).to(device)
    rows[37:] = NAN  # of nobody
    row_token = torch.randint(0, 9, (41,), generator=generator, dtype=torch.int32).to(device)
    offsets = torch.tensor([0, 20, 20, 37], dtype=torch.int32, device=device)
    before = torch.randn(3, *((40, 24) if tokens_first else (24, 40)), generator=generator).to(dtype).to(device)
    into = before.clone()
    how = Product(16, 32, 16, 4, 2, False)
    assert grad_weight(rows, tokens, row_token, offsets, how, tokens_first=tokens_first, into=into) is into
    tolerance = 1e-4 if dtype == torch.float32 else ROUNDINGS
    for e, (start, stop) in enumerate(((0, 20), (20, 20), (20, 37))):
        sides = rows[start:stop].double(), tokens[row_token[start:stop].long()].double()
        want = before[e].double() + (sides[1].T @ sides[0] if tokens_first else sides[0].T @ sides[1])
        torch.testing.assert_close(into[e].double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("tma", [True, False])
def test_forward_is_the_same_with_what_it_saves(tma: bool, slices: int, device: str) -> None:
    """And in slices of H."""
    case = Case("sliced", "slices that blocks reach out of", T=7, H=48, I=16, kinds=(("identity", 2),))
    forward, _ = small(16, tma)
    x, weights, *plan, _, w13, w2, alpha, beta, value = (
        t.detach() if isinstance(t, Tensor) else t for t in operator_arguments(case, device)
    )
    preact = x.new_full((len(plan[0]), 2 * case.I), NAN)
    x[3, 5], plan[1][3] = NAN, -1  # seen in every slice, and without a row's help
    outs = [
        moe_ffn_tiles(x, weights, *plan, w13, w2, (alpha, beta, value), "silu", how, saved)
        for how, saved in ((replace(forward, slices=slices), preact), (forward, None))
    ]
    assert outs[0][3].isnan().all() and outs[0][4:].isfinite().all()
    assert_bitwise(outs[0].cpu(), outs[1].cpu())
    used = int(plan[2][-1])
    experts_N = torch.arange(case.E, device=device).repeat_interleave(plan[2].diff())
    want = (w13[experts_N].double() @ x[plan[0][:used].long()].double()[:, :, None]).squeeze(2)
    torch.testing.assert_close(preact[:used].double(), want, rtol=ROUNDINGS, atol=ROUNDINGS, equal_nan=True)
    assert preact[used:].isnan().all()
