"""Gradients through the whole Triton backend, against float64, and what autograd may do with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.judge import BY_NAME, CASES, Case, assert_bitwise
from helpers.memory import moved, pretend_hopper, strided

pytest.importorskip("triton")
from helpers.triton_training import (  # noqa: F401
    DTYPE,
    FEW,
    Triton,
    _on_this_device,
    check,
    compute,
    leaves_of,
    on,
    pointers,
    small,
    take,
    upstream,
)
from zemoe import backends, resolve_backend
from zemoe.kernels.triton import tiles

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes NaN with numpy
]
OPS = torch.ops.zemoe
NAN = float("nan")
ROUNDINGS = 4 * torch.finfo(DTYPE).eps


# --------------------------------------------------------------------------------------------- values, by the backend


# The interpreter takes seconds for these, and others here are like them.
SLOW = ("wide", "many_rows", "many_experts", "constants", "scaled", "null", "no_zero_experts", "one_expert", "mixed")


@pytest.mark.parametrize(
    "case", [case for case in CASES if torch.cuda.is_available() or case.name not in SLOW], ids=lambda case: case.name
)
def test_pointers(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 16, False, 16 if case.name == "odd" else 64)
    check(case, device)


@pytest.mark.parametrize("name", ["plain", "empty_expert", "all_zero", "mixed"])
def test_descriptors(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 32, True, 32)
    check(BY_NAME[name], device)


@pytest.mark.parametrize("tma", [True, False])
def test_width_that_no_block_divides(tma: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 16, tma)
    check(Case("uneven", "blocks reach past H and I, into rows of somebody else", T=9, H=72, I=40, E=3), device)


@pytest.mark.parametrize("tma", [True, False])
def test_tall_tiles(tma: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 192, tma, 32)
    check(Case("tall", "192 rows a tile", T=140, H=24, I=16, E=1, kinds=(), K=1), device)


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(activation: str, device: str) -> None:
    check(BY_NAME["plain"], device, activation)


# ---------------------------------------------------------------------------------------- what the backend does with it


@pytest.mark.usefixtures("pointers")
def test_the_same_bits_again(device: str) -> None:
    results = []
    for _ in range(2):
        leaves, rest = leaves_of(FEW, device)
        compute(FEW, leaves, rest).backward(upstream(FEW, device))
        results.append([leaf.grad for leaf in leaves.values()])
    for first, second in zip(*results, strict=True):
        assert_bitwise(first.cpu(), second.cpu())


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("trained", ["x", "w13", "w2", "weights", "constant_value", "x weights", "w13 w2"])
def test_frozen_parts(trained: str, device: str) -> None:
    """They get no gradient, and what the others get does not depend on them; no pre-activation is kept for nothing."""
    case = Case("kinds", "every affine kind", T=4, E=2, kinds=(("constant", 1), ("identity", 1), ("zero", 1)), K=5)
    whole, rest = leaves_of(case, device)
    compute(case, whole, rest).backward(upstream(case, device))
    leaves, rest = leaves_of(case, device, trained)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = compute(case, leaves, rest)
    assert any(t.shape == (case.T * case.K, 2 * case.I) for t in saved) == (trained != "constant_value")
    out.backward(upstream(case, device))
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name not in trained.split())
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, whole[name].grad, rtol=ROUNDINGS, atol=ROUNDINGS)


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("how", ["expanded", "transposed", "apart"])
def test_gradients_with_strides(how: str, device: str) -> None:
    case = FEW
    given = {
        "expanded": lambda: torch.ones((), dtype=DTYPE, device=device).expand(case.T, case.H),
        "transposed": lambda: upstream(case, device).T.contiguous().T,
        "apart": lambda: strided(upstream(case, device)),
    }[how]()
    results = []
    for grad in (given, given.contiguous()):
        leaves, rest = leaves_of(case, device)
        compute(case, leaves, rest).backward(grad)
        results.append([leaf.grad for leaf in leaves.values()])
    for first, second in zip(*results, strict=True):
        assert_bitwise(first.cpu(), second.cpu())


def test_tensors_elsewhere_in_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off alignment, with strides: the sizes that a GPU would take."""
    pretend_hopper(device, monkeypatch)
    case = Case("few", "small enough for large tiles", T=5, H=24, I=16, E=3)
    results = []
    for change in (lambda t: t, moved, strided):
        leaves, rest = leaves_of(case, device, "")
        leaves = {name: change(leaf).requires_grad_() for name, leaf in leaves.items()}
        grads = torch.autograd.grad(compute(case, leaves, rest), list(leaves.values()), upstream(case, device))
        results.append(grads)
    for grads in results[1:]:
        for grad, plain in zip(grads, results[0], strict=True):
            torch.testing.assert_close(grad, plain, rtol=ROUNDINGS, atol=ROUNDINGS)


@pytest.mark.usefixtures("pointers")
def test_a_graph_that_is_kept(device: str) -> None:
    """What is saved may be overwritten by the last backward only."""
    case = FEW
    leaves, rest = leaves_of(case, device)
    out = compute(case, leaves, rest)
    want = list(leaves.values())
    first = torch.autograd.grad(out, want, upstream(case, device), retain_graph=True)
    second = torch.autograd.grad(out, want, upstream(case, device))
    for left, right in zip(first, second, strict=True):
        assert_bitwise(left.cpu(), right.cpu())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, want, upstream(case, device))


@pytest.mark.usefixtures("pointers")
def test_checkpointing(device: str) -> None:
    case = FEW
    results = []
    for again in (False, True):
        leaves, rest = leaves_of(case, device)
        if again:
            out = torch.utils.checkpoint.checkpoint(compute, case, leaves, rest, use_reentrant=False)
        else:
            out = compute(case, leaves, rest)
        out.backward(upstream(case, device))
        results.append([leaf.grad for leaf in leaves.values()])
    for first, second in zip(*results, strict=True):
        assert_bitwise(first.cpu(), second.cpu())


@pytest.mark.usefixtures("pointers")
def test_autocast(device: str) -> None:
    """float32 leaves, products in 16 bits, gradients in float32; the constants' own products stay in float32."""
    case, results = replace(FEW, kinds=(("constant", 2),)), []
    for cast in (True, False):
        leaves, rest = leaves_of(case, device, "")
        if cast:
            leaves = {name: leaf.float() for name, leaf in leaves.items()}
            rest["affine"] = rest["affine"]._replace(constant_value=leaves["constant_value"])
        for leaf in leaves.values():
            leaf.requires_grad_()
        with torch.autocast(device, DTYPE, enabled=cast):
            compute(case, leaves, rest).backward(upstream(case, device))
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
        results.append([leaf.grad.to(DTYPE) for leaf in leaves.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDINGS, atol=ROUNDINGS)


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("where", ["x", "weight"])
def test_lost_tokens(where: str, device: str) -> None:
    """NaN in the same gradients as the torch backend's, and in no other."""
    kinds = (("identity", 3),) if where == "x" else (("constant", 1), ("identity", 2))  # a constant is NaN by itself
    case = Case("lost", "experts that no token with a NaN chose", T=9, E=12, kinds=kinds, K=4)
    found = {}
    for backend in ("triton", "torch"):
        leaves, rest = leaves_of(case, device)
        with torch.no_grad():
            leaves["x" if where == "x" else "weights"][3, 1] = NAN
            leaves["x"][0] = NAN
            rest["ids"][5], leaves["x"][5, 4] = torch.tensor([-1, -1, case.A - 1, case.A - 2]), NAN  # identities alone
        compute(case, leaves, rest, backend).backward(upstream(case, device))
        found[backend] = {name: leaf.grad.cpu().float() for name, leaf in leaves.items()}
    for name, theirs in found["torch"].items():
        assert theirs.isnan().any() and (name == "constant_value" or not theirs.isnan().all()), name
        torch.testing.assert_close(
            found["triton"][name], theirs, rtol=4 * ROUNDINGS, atol=4 * ROUNDINGS, equal_nan=True
        )


@pytest.mark.usefixtures("pointers")
def test_no_second_derivative(device: str) -> None:
    leaves, rest = leaves_of(FEW, device)
    out = compute(FEW, leaves, rest)
    (first,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.sum(), leaves["x"])
    # Also where the graph of the first is not kept: then nobody may just be told that there is nothing.
    leaves, rest = leaves_of(FEW, device)
    out = compute(FEW, leaves, rest)
    (first,) = torch.autograd.grad(out.sum(), leaves["x"], create_graph=True, retain_graph=False)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


@pytest.mark.usefixtures("pointers")
def test_no_gradient_comes(device: str) -> None:
    class Blocks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, *grads):
            return None

    leaves, rest = leaves_of(FEW, device)
    Blocks.apply(compute(FEW, leaves, rest)).sum().backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves.values())


@pytest.mark.usefixtures("pointers")
def test_large_layers_are_summed_in_slices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [tiles.training_slices(*size) for size in ((16384 * 12, 2048), (2048, 2048), (2**26, 24))] == [2, 1, 1]
    case, results = FEW, []
    for slices in (1, 2):
        monkeypatch.setattr(tiles, "training_slices", lambda *_, slices=slices: slices)
        leaves, rest = leaves_of(case, device)
        out = compute(case, leaves, rest)
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), upstream(case, device))])
    for one, two in zip(*results, strict=True):
        assert_bitwise(one.cpu(), two.cpu())


def test_who_gets_gradients_from_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend(device, DTYPE, "triton", gradients=True).name == "triton"
    if device == "cuda":
        assert resolve_backend(device, DTYPE, gradients=True).name == "triton"
    monkeypatch.setitem(backends.BACKENDS, "triton", replace(backends.BACKENDS["triton"], train=None))
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\).* no backward pass"):
        resolve_backend(device, DTYPE, "triton", gradients=True)
