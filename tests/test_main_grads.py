"""Gradients of expert weights that are added to `main_grad`, as trainers that keep float32 gradients want them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.experts import run
from helpers.judge import BY_NAME, assert_bitwise

pytest.importorskip("triton")
from helpers.triton_training import DTYPE, _on_this_device, on, pointers  # noqa: F401
from zemoe import MoE, MoEConfig

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("pointers"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
CASE = BY_NAME["plain"]


def leaves(device: str):
    inputs = on(device, CASE.inputs(DTYPE))
    return inputs._replace(**{n: getattr(inputs, n).clone().requires_grad_() for n in ("x_TH", "w13", "w2")})


def upstream(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)


def trained(inputs, steps: int = 1, **how) -> Tensor:
    for _ in range(steps):
        out = run(CASE, inputs, "triton")
        out.backward(upstream(out), **how)
    return out


def test_sums_in_float32(device: str) -> None:
    """Two steps are added up without rounding in between; x has its gradient as ever."""
    usual, ours = leaves(device), leaves(device)
    trained(usual)
    before = {}
    for name in ("w13", "w2"):
        weight = getattr(ours, name)
        before[name] = torch.full_like(weight, 0.5, dtype=torch.float32)
        weight.main_grad = before[name].clone()
    trained(ours, steps=2)
    for name in ("w13", "w2"):
        weight, plain = getattr(ours, name), getattr(usual, name)
        assert weight.grad is None
        change, wanted = weight.main_grad - before[name], plain.grad.float()
        assert (change / 2 - wanted).norm() < torch.finfo(DTYPE).eps * wanted.norm()
        assert change.to(DTYPE).float().ne(change).any()  # it has more bits than the weight's dtype
    assert_bitwise(ours.x_TH.grad.cpu(), (2 * usual.x_TH.grad).cpu())


def test_one_of_two(device: str) -> None:
    usual, ours = leaves(device), leaves(device)
    ours.w2.main_grad = torch.zeros_like(ours.w2)
    for inputs in (usual, ours):
        trained(inputs)
    assert_bitwise(ours.w13.grad.cpu(), usual.w13.grad.cpu())
    assert ours.w2.grad is None
    assert_bitwise(ours.w2.main_grad.cpu(), usual.w2.grad.cpu())


def test_a_graph_that_is_kept(device: str) -> None:
    inputs = leaves(device)
    inputs.w13.main_grad = torch.zeros_like(inputs.w13, dtype=torch.float32)
    out = trained(inputs, retain_graph=True)
    once = inputs.w13.main_grad.clone()
    out.backward(upstream(out))
    assert_bitwise(inputs.w13.main_grad.cpu(), (2 * once).cpu())


def test_frozen_weights_stay_out(device: str) -> None:
    inputs = leaves(device)
    inputs.w13.requires_grad_(False)
    inputs.w13.main_grad = torch.zeros_like(inputs.w13, dtype=torch.float32)
    trained(inputs)
    assert not inputs.w13.main_grad.any() and inputs.w2.grad.any()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: torch.zeros(3, device=w.device),
        lambda w: torch.zeros_like(w, dtype=torch.int32),
        lambda w: torch.zeros_like(w, dtype=torch.float64),
        lambda w: torch.zeros_like(w).mT.contiguous().mT,
        lambda w: torch.zeros_like(w).requires_grad_(),
        lambda w: "here",
    ],
    ids=["shape", "dtype", "float64", "strides", "requires_grad", "no_tensor"],
)
def test_what_nothing_can_be_added_to(spoil, device: str) -> None:
    inputs = leaves(device)
    inputs.w2.main_grad = spoil(inputs.w2)
    with pytest.raises(ValueError, match=r"w2\.main_grad must be a contiguous tensor of shape .* of a dtype of"):
        run(CASE, inputs, "triton")


def test_who_does_not_know_them(device: str) -> None:
    inputs = leaves(device)
    inputs.w13.main_grad = torch.zeros_like(inputs.w13, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"filled by the backend 'triton' alone, and this layer runs on 'torch'"):
        run(CASE, inputs, "torch")
    with torch.no_grad():
        run(CASE, inputs, "torch")  # nothing is trained
    with pytest.raises(Exception, match="not in compiled code"):
        torch.compile(lambda: run(CASE, inputs, "triton"), backend="eager", fullgraph=True)()


def test_weights_made_of_others_are_refused(device: str) -> None:
    """What they were made of would miss its gradient, and nobody would be told."""
    inputs = leaves(device)
    inputs = inputs._replace(w13=2 * inputs.w13)
    inputs.w13.main_grad = torch.zeros_like(inputs.w13.detach(), dtype=torch.float32)
    with pytest.raises(ValueError, match="of parameters"):
        run(CASE, inputs, "triton")


def test_no_second_derivative(device: str) -> None:
    inputs = leaves(device)
    inputs.w13.main_grad = torch.zeros_like(inputs.w13, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(run(CASE, inputs, "triton").sum(), inputs.x_TH, create_graph=True)
    assert not inputs.w13.main_grad.any()


def test_used_twice(device: str) -> None:
    usual, ours = leaves(device), leaves(device)
    ours.w13.main_grad = torch.zeros_like(ours.w13, dtype=torch.float32)
    for inputs in (usual, ours):
        out = run(CASE, inputs, "triton")
        out = run(CASE, inputs._replace(x_TH=out), "triton")
        out.backward(upstream(out))
    wanted = usual.w13.grad.float()
    assert (ours.w13.main_grad - wanted).norm() < 2 * torch.finfo(DTYPE).eps * wanted.norm()
    assert_bitwise(ours.x_TH.grad.cpu(), usual.x_TH.grad.cpu())


def test_autocast_is_refused(device: str) -> None:
    kinds = (("identity", 2),)
    config = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, zero_expert_kinds=kinds)
    layer = MoE(config, backend="triton").to(device)
    layer.w13.main_grad = torch.zeros_like(layer.w13)
    with torch.autocast(device, dtype=DTYPE), pytest.raises(ValueError, match="autocast casts them"):
        layer(torch.randn(3, 16, device=device))
