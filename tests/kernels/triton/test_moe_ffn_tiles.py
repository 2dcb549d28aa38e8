"""The Triton products and the sum, against the reference; over plans made by `plan_tiles`.

float16 without a GPU: Triton 3.6's interpreter multiplies the bits of bfloat16 numbers, not their values.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.judge import BY_NAME, CASES, Case, assert_bitwise, judge, rejects

pytest.importorskip("triton")
from zemoe.affine import kernel_kinds
from zemoe.config import expand_kinds
from zemoe.kernels.triton.moe_ffn_tiles import moe_ffn_tiles
from zemoe.kernels.triton.plan_tiles import plan_tiles
from zemoe.kernels.triton.tiles import Product, Schedule

pytestmark = pytest.mark.triton
DTYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]


def pointers(block_m: int, block_h: int = 64) -> Schedule:
    return Schedule(block_m, Product(block_m, 16, 32, 4, 2, False), Product(block_m, 32, 16, 4, 2, False), block_h)


def descriptors(block_m: int, block_h: int = 32) -> Schedule:
    gate_up = Product(block_m, 32, 32, 4, 2, True)
    return Schedule(block_m, gate_up, Product(block_m, 64, 32, 4, 2, True, 3, True), block_h)


TALL = Schedule(192, Product(192, 16, 32, 4, 2, True), Product(128, 32, 32, 4, 2, True), 64)
ONE_TOKEN = Schedule(1, Product(1, 8, 32, 4, 1, False), Product(1, 16, 8, 4, 1, False), 64)


def run(case: Case, inputs, how: Schedule, device: str, activation: str = "silu") -> torch.Tensor:
    x, w13, w2, weights, ids = (tensor.to(device) for tensor in inputs[:5])
    params = [None if p is None else p.to(device) for p in inputs.affine or (None, None, None)]
    constant_logits = None if params[0] is None else (x.float() @ params[0].flatten(0, 1).T).unflatten(1, (-1, 2))
    *plan, alpha, beta = plan_tiles(
        weights,
        ids,
        num_experts=case.E,
        num_slots=case.A,
        block_m=how.block_m,
        kinds=kernel_kinds(expand_kinds(case.kinds)),
        scale_S=params[2],
        constant_logits_TC2=constant_logits,
    )
    return moe_ffn_tiles(x, weights, *plan, w13, w2, (alpha, beta, params[1]), activation, how).cpu()


def check(case: Case, dtype: torch.dtype, how: Schedule, device: str, activation: str = "silu") -> None:
    inputs = case.inputs(dtype)
    exact, own = (case.reference(inputs, d, activation) for d in (torch.float64, dtype))
    judge(run(case, inputs, how, device, activation), exact, own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pointers(case: Case, dtype: torch.dtype, device: str) -> None:
    check(case, dtype, ONE_TOKEN if case.T == 1 else pointers(16), device)


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("T", [150, 330])  # about 100 and 220 rows an expert: below 128, and more than one tile
def test_tall_tiles(T: int, tma: bool, device: str) -> None:
    how = Schedule(192, replace(TALL.gate_up, tma=tma), replace(TALL.down, tma=tma), TALL.block_h)
    check(Case("tall", "192 rows a tile", T=T, H=40, I=24, E=2, kinds=(("identity", 1),), K=2), DTYPES[0], how, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "one_token", "empty_expert", "all_zero", "no_ffn_experts", "skips", "mixed"])
@pytest.mark.parametrize("block_m", [16, 64])
def test_descriptors(name: str, dtype: torch.dtype, block_m: int, device: str) -> None:
    check(BY_NAME[name], dtype, descriptors(block_m), device)


@pytest.mark.parametrize("how", [pointers(16), descriptors(32), ONE_TOKEN], ids=["pointers", "descriptors", "one"])
def test_width_that_no_block_divides(how: Schedule, device: str) -> None:
    case = Case("uneven", "blocks reach past H and I, into rows of somebody else", T=9, H=72, I=40, E=3)
    check(case if how.block_m > 1 else Case("uneven", case.why, T=1, H=72, I=40, E=3), torch.float16, how, device)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("how", [pointers(16), ONE_TOKEN], ids=["tokens", "one token"])
def test_activations(activation: str, how: Schedule, device: str) -> None:
    check(BY_NAME["one_token" if how.block_m == 1 else "plain"], torch.float16, how, device, activation)


def test_no_tokens(device: str) -> None:
    assert run(BY_NAME["no_tokens"], BY_NAME["no_tokens"].inputs(torch.float16), pointers(16), device).shape == (0, 32)


def test_x_with_rows_apart(device: str) -> None:
    case = BY_NAME["plain"]
    inputs = case.inputs(torch.float16)
    apart = torch.full((case.T, case.H + 8), float("nan"), dtype=torch.float16)
    apart[:, : case.H] = inputs.x_TH
    together = run(case, inputs, pointers(16), device)
    assert_bitwise(run(case, inputs._replace(x_TH=apart[:, : case.H]), pointers(16), device), together)
    across = inputs.x_TH.T.contiguous().T
    assert_bitwise(run(case, inputs._replace(x_TH=across), pointers(16), device), together)


@pytest.mark.parametrize("how", [pointers(16), ONE_TOKEN], ids=["tokens", "one token"])
def test_everything_strided(how: Schedule, device: str) -> None:
    """Whatever a kernel takes by pointer, with what must not be read between its numbers."""
    T = 1 if how.block_m == 1 else 9
    case = Case(
        "strided", "constants, so that beta and value are there", T=T, H=24, I=12, E=3, kinds=(("constant", 3),)
    )
    inputs = case.inputs(torch.float16)
    x, w13, w2, weights, ids = (tensor.to(device) for tensor in inputs[:5])
    generator = torch.Generator().manual_seed(0)
    alpha, beta, value = (torch.randn(*size, generator=generator).to(device) for size in ((T,), (T, 3), (3, case.H)))
    plan = plan_tiles(
        weights, ids, num_experts=case.E, num_slots=case.A, block_m=how.block_m, kinds=(), scale_S=None,
        constant_logits_TC2=None,
    )[:4]  # fmt: skip

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        memory = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype, device=device)
        memory[..., ::2] = tensor
        return memory[..., ::2]

    def out(x, weights, w13, w2, *affine) -> torch.Tensor:
        return moe_ffn_tiles(x, weights, *plan, w13, w2, affine, "silu", how)

    given = [x, weights, w13, w2, alpha, beta, value]
    assert_bitwise(out(*map(apart, given)), out(*given))
    turned = [tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor for tensor in given]
    assert_bitwise(out(*turned), out(*given))
    same = x[:1].expand_as(x)
    assert_bitwise(out(same, *given[1:]), out(same.contiguous(), *given[1:]))


@pytest.mark.parametrize("name", ["plain", "all_zero", "null", "one_token"])
def test_lost_token(name: str, device: str) -> None:
    case = BY_NAME[name]
    how = ONE_TOKEN if case.T == 1 else descriptors(16)
    inputs = case.inputs(torch.float16)
    clean = run(case, inputs, how, device)
    x = inputs.x_TH.clone()
    x[case.T - 1, 5] = float("nan")
    out = run(case, inputs._replace(x_TH=x), how, device)
    assert out[-1].isnan().all()
    assert_bitwise(out[:-1], clean[:-1])


def test_ids_that_name_no_slot(device: str) -> None:
    case = BY_NAME["plain"]
    inputs = case.inputs(torch.float16)
    wild = inputs.ids_TK.clone()
    wild[::2, 0] = torch.tensor([case.A, 2**31 - 1, -7, 2**62]).repeat(3)
    skipped = torch.where((wild < 0) | (wild >= case.A), -1, wild)
    for how in (pointers(16), descriptors(16)):
        ours, want = (run(case, inputs._replace(ids_TK=ids), how, device) for ids in (wild, skipped))
        assert_bitwise(ours, want)


def test_the_judge_sees_what_can_go_wrong(device: str) -> None:
    """A dropped choice, swapped rows and zeros must not pass at these shapes."""
    case = BY_NAME["plain"]
    inputs = case.inputs(torch.float16)
    exact, own = case.reference(inputs), case.reference(inputs, torch.float16)
    dropped = inputs.ids_TK.clone()
    dropped[3, 0] = -1
    out = run(case, inputs, pointers(16), device)
    assert not rejects(out, exact, own)
    for wrong in (
        run(case, inputs._replace(ids_TK=dropped), pointers(16), device),
        out[[1, 0, *range(2, case.T)]],
        torch.zeros_like(out),
    ):
        assert rejects(wrong, exact, own)
