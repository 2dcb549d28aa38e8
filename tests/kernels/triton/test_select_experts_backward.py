"""Gradients of routing on the triton backend: of the chosen weights, and of the router's product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import zemoe
from helpers.judge import assert_bitwise
from zemoe import backends, reference
from zemoe.routing import router_logits

pytest.importorskip("triton")
from helpers.fences import Fence, same_in_both
from zemoe.kernels.triton.router_logits_backward import bfloat16_parts
from zemoe.kernels.triton.select_experts_backward import select_experts_backward
from zemoe.ops import triton_routing

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes infinities and NaN with numpy
]
NAN, INF = float("nan"), float("inf")
OPS = torch.ops.zemoe
SCORINGS = ["softmax", "sigmoid", "sqrtsoftplus"]
KINDS = (("zero", 2), ("identity", 3), ("zero", 1))
E, A, K = 16, 22, 6
# The interpreter multiplies the bits of bfloat16 numbers: there the forward takes float16.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@pytest.fixture(autouse=True)
def _on_this_device(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators run on the CPU too where there is no GPU."""
    if device == "cuda":
        yield
        return
    takes_cpu = replace(backends.BACKENDS["triton"], devices=("cpu",))
    monkeypatch.setitem(backends.BACKENDS, "triton", takes_cpu)
    monkeypatch.setattr(triton_routing, "_product", lambda left, right: left.float() @ right.float())
    with torch.library._scoped_library("zemoe", "IMPL") as library:
        for name in ("router_logits", "router_logits_backward", "select_experts", "select_experts_backward"):
            library.impl(name, getattr(triton_routing, f"_{name}_cuda"), "CPU")
        yield


def select(logits: Tensor, **rules) -> tuple[Tensor, Tensor]:
    kinds = KINDS if rules.get("renormalize") == "nonnull" else (("identity", logits.shape[1] - E),)
    return zemoe.select_experts(logits, K, num_experts=E, zero_expert_kinds=kinds, backend="triton", **rules)


def grad_of(logits: Tensor, dweights: Tensor, **rules) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    weights, ids = select(leaf, **rules)
    assert weights.grad_fn is not None and "select_experts" in weights.grad_fn.name()
    return torch.autograd.grad(weights, leaf, dweights)[0], ids


def check(logits: Tensor, device: str, **rules) -> None:
    dweights = torch.randn(len(logits), K, generator=torch.Generator().manual_seed(5))
    found, ids = grad_of(logits.to(device), dweights.to(device), **rules)
    kinds = KINDS if rules.get("renormalize") == "nonnull" else (("identity", logits.shape[1] - E),)
    leaf = logits.double().requires_grad_()
    selection = reference.select(leaf, K, num_experts=E, zero_expert_kinds=kinds, ids_TK=ids.cpu(), **rules)
    exact = torch.autograd.grad(selection.topk_weights_TK, leaf, dweights.double())[0]
    error = (found.cpu().double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(torch.float32).eps, f"gradient of logits is wrong by {error}"
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-4, atol=1e-6)


def random_logits(T: int, slots: int = A, seed: int = 0) -> Tensor:
    return 2 * torch.randn(T, slots, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize("renormalize", ["none", "all", "real", "nonnull"])
def test_modes(scoring_func: str, renormalize: str, device: str) -> None:
    bias = torch.randn(A, generator=torch.Generator().manual_seed(1)).to(device)
    logits = random_logits(5)
    dweights = torch.randn(5, K, generator=torch.Generator().manual_seed(5)).to(device)
    check(logits, device, scoring_func=scoring_func, renormalize=renormalize, routed_scaling_factor=2.5)
    # A bias has no part in the gradient, but for which slots it is of.
    rules = {"scoring_func": scoring_func, "renormalize": renormalize}
    found, ids = grad_of(logits.to(device), dweights, e_score_correction_bias=bias, **rules)
    moved = grad_of(logits.to(device), dweights, **rules)[1]
    assert (ids != moved).any()
    if scoring_func != "softmax":
        outside = torch.ones(5, A, dtype=torch.bool, device=device).scatter(1, ids, False)
        assert not found[outside].any() and found[~outside].any()


@pytest.mark.parametrize(("T", "slots"), [(1, 17), (40, 64), (3, 300)])
@pytest.mark.parametrize("scoring_func", SCORINGS)
def test_sizes(T: int, slots: int, scoring_func: str, device: str) -> None:
    check(random_logits(T, slots), device, scoring_func=scoring_func, renormalize="all")


def test_rows_apart_and_columns_apart(device: str) -> None:
    dweights = torch.randn(5, K, generator=torch.Generator().manual_seed(5)).to(device)
    logits = random_logits(5).to(device)
    expected = grad_of(logits, dweights)[0]
    for given in (
        torch.cat([logits, logits], 1)[:, :A],
        logits.T.contiguous().T,
    ):
        ids = OPS.select_experts(given, None, K, E, "softmax", "none", 1.0, 0, 0, [])[1]
        assert_bitwise(OPS.select_experts_backward(dweights, given, ids, E, "softmax", "none", 1.0, []), expected)
        spread = dweights.T.contiguous().T
        assert_bitwise(OPS.select_experts_backward(spread, given, ids, E, "softmax", "none", 1.0, []), expected)


@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize("renormalize", ["none", "real"])
def test_masked_slots_and_lost_tokens(scoring_func: str, renormalize: str, device: str) -> None:
    """As the torch backend has it; what is lost or masked reaches nobody else."""
    logits = random_logits(7)
    logits[1, 3:] = -INF  # fewer than K left
    logits[2, ::2] = -INF
    logits[3, 5], logits[4, 20], logits[5] = NAN, INF, -INF
    dweights = torch.randn(7, K, generator=torch.Generator().manual_seed(5))
    rules = {"scoring_func": scoring_func, "renormalize": renormalize}
    found, ids = grad_of(logits.to(device), dweights.to(device), **rules)
    scores_of, leaf = zemoe.scores.SCORES[scoring_func], logits.clone().requires_grad_()
    weights = zemoe.scores.renormalized(scores_of(leaf).gather(1, ids.cpu()), ids.cpu(), renormalize, E, ())
    expected = torch.autograd.grad(weights, leaf, dweights)[0]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert found[[0, 1, 2, 6]].isfinite().all()


@pytest.mark.parametrize("renormalize", ["real", "nonnull"])
def test_nothing_to_normalise(renormalize: str, device: str) -> None:
    """Only dropped choices weigh 0, whatever the logits: no gradient, and no division by zero."""
    logits = random_logits(3)
    logits[:, :E] -= 50.0
    logits[:, E:] += torch.tensor([9.0, 9, -50, -50, -50, 9]) if renormalize == "nonnull" else 0.0
    leaf = logits.to(device).requires_grad_()
    weights, ids = zemoe.select_experts(
        leaf, 3, num_experts=E, zero_expert_kinds=KINDS, renormalize=renormalize, backend="triton"
    )
    assert (ids >= E).all() and not weights.any()
    dlogits = torch.autograd.grad(weights, leaf, torch.ones_like(weights))[0]
    assert not dlogits.any() and dlogits.isfinite().all()


def test_ids_of_nobody(device: str) -> None:
    """Ids outside of 0..A-1 read nothing and get nothing."""
    logits, dweights = random_logits(4).to(device), torch.ones(4, K, device=device)
    ids = OPS.select_experts(logits, None, K, E, "softmax", "none", 1.0, 0, 0, [])[1]
    masked, fewer = ids.clone(), dweights.clone()
    masked[:, 2], masked[:, 4], fewer[:, 2], fewer[:, 4] = -1, 2**40, 0.0, 0.0
    found = OPS.select_experts_backward(dweights, logits, masked, E, "softmax", "none", 1.0, [])
    assert_bitwise(found, OPS.select_experts_backward(fewer, logits, ids, E, "softmax", "none", 1.0, []))


@pytest.mark.parametrize(("T", "slots", "k"), [(3, 1, 1), (7, 24, 5), (2, 300, 32), (0, 5, 2)])
@pytest.mark.parametrize("renormalize", ["none", "nonnull"])
def test_inside_fences(T: int, slots: int, k: int, renormalize: str, device: str) -> None:
    """See test_triton_guard: between guard bands, with rows apart and ids that lead outside."""
    generator = torch.Generator().manual_seed(0)
    logits, grad = torch.randn(T, slots, generator=generator), torch.randn(T, k, generator=generator)
    ids = (
        torch.stack([torch.randperm(max(slots, k), generator=generator)[:k] for _ in range(T)])
        if T
        else torch.empty(0, k, dtype=torch.int64)
    )
    wild = torch.tensor([-1, slots, 2**31, -(2**63), 2**63 - 1, 2**32])
    ids.view(-1)[: len(wild)] = wild[: ids.numel()]

    def run(fence: Fence) -> list[Tensor | None]:
        made = select_experts_backward(
            fence.around(grad),
            fence.around(logits, gap=3),
            fence.around(ids),
            num_experts=slots // 2,
            scoring="softmax",
            renormalize=renormalize,
            scaling=2.0,
            null_ranges=((slots // 2, slots // 2 + 1),),
        )
        fence.check("select_experts_backward", made)
        return [made]

    (made,) = same_in_both(run, device)
    assert made.isfinite().all()


def test_selection_opcheck(device: str) -> None:
    logits = random_logits(3).to(device).requires_grad_()
    args = (logits, None, K, E, "sigmoid", "nonnull", 2.0, 0, 0, [E, E + 2])
    torch.library.opcheck(OPS.select_experts.default, args)
    ids = OPS.select_experts(*args)[1]
    grad = torch.randn(3, K, device=device)
    torch.library.opcheck(OPS.select_experts_backward.default, (grad, logits.detach(), ids, *args[3:7], [E, E + 2]))


# ------------------------------------------------------------------------------------------------------- the product


@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (37, 20), (5, 1030), (0, 4), (4, 0)])
@pytest.mark.parametrize("beside", [True, False])
def test_parts_inside_fences(rows: int, columns: int, beside: bool, device: str) -> None:
    whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))

    def run(fence: Fence) -> list[Tensor | None]:
        made = [bfloat16_parts(fence.around(whole, gap=3), low=i, beside=beside) for i in (1, 2)]
        fence.check("bfloat16_parts", *made)
        return [*made]

    for at, made in zip((1, 2), same_in_both(run, device), strict=True):
        assert made.shape == ((rows, 3 * columns) if beside else (3 * rows, columns)) and made.dtype == torch.bfloat16
        high, *parts = made.double().chunk(3, 1 if beside else 0)
        low = parts.pop(at - 1)
        assert torch.equal(parts[0], high)
        # Triton's interpreter cuts bits off where a GPU rounds.
        assert ((high - whole).abs() <= 2**-7 * whole.abs()).all()
        assert ((high + low - whole).abs() <= 2**-14 * whole.abs()).all()


@pytest.mark.parametrize(("T", "R", "H"), [(1, 5, 24), (37, 20, 70), (130, 96, 40)])
def test_router_gradients(T: int, R: int, H: int, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=generator).to(DTYPE)
    weight = torch.randn(R, H, generator=generator) * H**-0.5
    dlogits = torch.randn(T, R, generator=generator) * 1e-3
    mine, own = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
    logits = router_logits(mine, own, "triton")
    assert logits.grad_fn is not None and "router_logits" in logits.grad_fn.name()
    dx, dweight = torch.autograd.grad(logits, (mine, own), dlogits.to(device))
    assert dx.dtype == DTYPE and dweight.dtype == torch.float32
    exact = dlogits.double() @ weight.double()
    error = (dx.cpu().double() - exact).norm() / exact.norm()
    assert error < 0.6 * torch.finfo(DTYPE).eps, error  # of rounding it once
    exact = dlogits.double().T @ x.double()
    error = (dweight.cpu().double() - exact).norm() / exact.norm()
    assert error < 2e-5, error  # 16 bits; bfloat16 alone has 2e-3


def test_router_gradients_where_wanted(device: str) -> None:
    x, weight = torch.randn(3, 16, device=device).to(DTYPE), torch.randn(5, 16, device=device)
    for i in (0, 1):
        leaves = [x.clone(), weight.clone()]
        leaves[i].requires_grad_()
        router_logits(*leaves, "triton").sum().backward()
        assert leaves[i].grad is not None and leaves[1 - i].grad is None


def test_router_opcheck(device: str) -> None:
    x, weight = torch.randn(3, 16, device=device).to(DTYPE), torch.randn(5, 16, device=device)
    torch.library.opcheck(OPS.router_logits.default, (x.requires_grad_(), weight.requires_grad_()))
    grad = torch.randn(3, 5, device=device)
    torch.library.opcheck(OPS.router_logits_backward.default, (grad, x.detach(), weight.detach(), [True, False]))


@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize("renormalize", ["none", "real", "nonnull"])
def test_second_derivatives(scoring_func: str, renormalize: str, device: str) -> None:
    """Of the selection and of the product, as the layer's other backends have them: by torch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, generator=generator).to(device, DTYPE)
    weight = 0.5 * torch.randn(A, 16, generator=generator).to(device)
    rules = {"scoring_func": scoring_func, "renormalize": renormalize, "routed_scaling_factor": 2.5}
    kinds = KINDS if renormalize == "nonnull" else (("identity", A - E),)

    def second(x: Tensor, weight: Tensor, ids: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if ids is None:
            weights, ids = select(router_logits(*leaves, "triton"), **rules)
        else:
            logits = leaves[0] @ leaves[1].T
            chosen = reference.select(logits, K, num_experts=E, zero_expert_kinds=kinds, ids_TK=ids, **rules)
            weights = chosen.topk_weights_TK
        first = torch.autograd.grad(weights.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), leaves), ids

    found, ids = second(x, weight, None)
    exact, _ = second(x.cpu().double(), weight.cpu().double(), ids.cpu())
    for grad, wanted in zip(found, exact, strict=True):
        assert (grad.cpu().double() - wanted).norm() < 4 * torch.finfo(DTYPE).eps * wanted.norm()
