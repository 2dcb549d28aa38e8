"""The loops that numba compiles for CPUs, and the layer without them.

N rows, T tokens, O and H rows and columns of a weight.
"""

from __future__ import annotations

import threading

import pytest
import torch

from judge import CASES, Case, assert_bitwise, judge, only_zero_experts
from zemoe import fused_experts, ops
from zemoe.kernels import products, topk

pytest.importorskip("numba")

NAN = float("nan")
# Experts, first rows (counted by the caller, unused here) and rows: one, a multiple of three, one more, one less, many.
EXPERTS = [(0, 0, 1), (2, 1, 3), (3, 4, 4), (4, 8, 2), (6, 10, 37)]
BEGINS = [0, 1, 4, 8, 10, 47]


def inputs(O: int, H: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(0, 11, (BEGINS[-1],), generator=generator)
    return torch.randn(11, H, generator=generator), token, torch.randn(7, O, H, generator=generator)


def expert_of_row() -> torch.Tensor:
    return torch.cat([torch.full((M,), e) for e, _, M in EXPERTS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("O", "H"), [(64, 48), (8, 16), (7, 3), (1, 1), (33, 17), (130, 260)])
def test_products(O: int, H: int, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, token, weight = inputs(O, H)
    weight = weight.to(dtype)
    rows = products.gather_products(x, token, weight, EXPERTS, BEGINS)
    wanted = torch.einsum("noh,nh->no", weight.double()[expert_of_row()], x.double()[token])
    torch.testing.assert_close(rows.double(), wanted, rtol=1e-5, atol=1e-4)
    y = torch.randn(11, O, generator=torch.Generator().manual_seed(1))
    wanted = y.double().index_add(
        0, token, torch.einsum("noh,nh->no", weight.double()[expert_of_row()], x[token].double())
    )
    products.scatter_products(x[token], token, weight, EXPERTS, BEGINS, y)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, token, weight = inputs(100, 70)
    found = []
    for threads in (1, 2, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y = torch.zeros(11, 100)
        products.scatter_products(x[token], token, weight, EXPERTS, BEGINS, y)
        found.append((products.gather_products(x, token, weight, EXPERTS, BEGINS), y))
    for rows, y in found[1:]:
        assert_bitwise(rows, found[0][0])
        assert_bitwise(y, found[0][1])


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_is_not_finite_stays_in_its_rows(value: float) -> None:
    x, token, weight = inputs(20, 30)
    clean = products.gather_products(x, token, weight, EXPERTS, BEGINS)
    x[3, 5] = value
    rows = products.gather_products(x, token, weight, EXPERTS, BEGINS)
    assert not rows[token == 3].isfinite().any()
    assert_bitwise(rows[token != 3], clean[token != 3])


def test_two_threads_of_python() -> None:
    x, token, weight = inputs(130, 260)
    wanted = products.gather_products(x, token, weight, EXPERTS, BEGINS)
    wrong = []

    def many() -> None:
        for _ in range(50):
            if not torch.equal(products.gather_products(x, token, weight, EXPERTS, BEGINS), wanted):
                wrong.append(1)

    threads = [threading.Thread(target=many) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_which_layers_take_them() -> None:
    x, w13, w2 = torch.randn(3, 8), torch.randn(2, 8, 8), torch.randn(2, 8, 4)
    assert products.loop_rows(x, w13, w2) == 64
    large = torch.empty(1, 1024, 1024, device="meta")
    assert products.loop_rows(x, large, large) == 48
    assert products.loop_rows(x[:1], large, large) == 0
    assert products.loop_rows(x[:1], w13, w2) == 64
    half = [tensor.bfloat16() for tensor in (x, w13, w2)]
    assert products.loop_rows(*half) == (8 if products.has_fast_bfloat16() else 64)
    assert products.loop_rows(x, *half[1:]) == products.loop_rows(half[0], w13, w2) == 0
    assert products.loop_rows(x.double(), w13.double(), w2.double()) == 0
    assert products.loop_rows(x, w13.mT, w2) == products.loop_rows(x.T, w13, w2) == 0


def test_a_lost_token_of_identities_alone() -> None:
    case = Case(
        "lost", "no FFN row carries the NaN to the other columns", T=3, ids=only_zero_experts, kinds=(("identity", 4),)
    )
    x, w13, w2, weights, ids, _ = case.inputs()
    assert ops.takes_few(x, ids, w13, w2, "silu")
    x[1, 5] = NAN
    out = fused_experts(x, w13, w2, weights, ids, num_experts=case.E, zero_expert_kinds=case.kinds)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_layer_without_numba(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (products, topk):
        monkeypatch.setattr(module, "HAS_NUMBA", False)
    given = case.inputs()
    out = fused_experts(*given[:5], num_experts=case.E, zero_expert_kinds=case.kinds, affine_params=given.affine)
    judge(out, case.reference(given), case.reference(given, torch.float32))
