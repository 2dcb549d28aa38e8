"""What the tests of the Triton backend's gradients share: small tiles, the backend on this device, who judges.

float16 without a GPU: Triton 3.6's interpreter multiplies the bits of bfloat16 numbers, not their values. There the
operators of the backend are registered for the CPU as well, so that autograd, opcheck and torch.compile see them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.experts import Reference, gradients, run
from helpers.judge import Case, judge

pytest.importorskip("triton")
from zemoe import AffineParams, backends, fused_experts
from zemoe.kernels.triton import tiles
from zemoe.kernels.triton.tiles import BackwardSchedule, Product, Schedule
from zemoe.ops import triton_experts, triton_routing

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def small(block_m: int, tma: bool, size: int = 16) -> tuple[Schedule, BackwardSchedule]:
    """Tiles of which a Case takes several in each direction, and few fit."""
    m = min(block_m, 128)

    def product(*size: int, persistent: bool = False) -> Product:
        return Product(*size, 4, 2, tma, 3 if persistent else None, persistent)

    forward = Schedule(block_m, product(block_m, size, 2 * size), product(m, 2 * size, size, persistent=True), 64)
    weight = Product(size, 2 * size, 16, 4, 2, False)
    back = BackwardSchedule(product(m, 2 * size, size), weight, product(m, size, 2 * size, persistent=True), 2 * size)
    return forward, back


@pytest.fixture(autouse=True)
def _on_this_device(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend runs on the CPU too where there is no GPU."""
    if device == "cuda":
        yield
        return
    takes_cpu = replace(backends.BACKENDS["triton"], devices=("cpu",), dtypes=(torch.float16,))
    monkeypatch.setitem(backends.BACKENDS, "triton", takes_cpu)
    with torch.library._scoped_library("zemoe", "IMPL") as library:
        library.impl("plan_tiles", triton_experts._plan_tiles_cuda, "CPU")
        library.impl("moe_ffn_tiles_train", triton_experts._moe_ffn_tiles_train_cuda, "CPU")
        library.impl("moe_ffn_tiles_backward", triton_experts._gradients, "CPU")
        library.impl("moe_ffn_tiles_backward_", triton_experts._gradients, "CPU")
        for name in ("router_logits", "router_logits_backward", "select_experts", "select_experts_backward"):
            library.impl(name, getattr(triton_routing, f"_{name}_cuda"), "CPU")
        yield


def take(monkeypatch: pytest.MonkeyPatch, block_m: int, tma: bool, size: int = 16) -> None:
    forward, back = small(block_m, tma, size)
    monkeypatch.setattr(triton_experts, "training_rows_per_tile", lambda *_: block_m)
    monkeypatch.setattr(tiles, "schedule", lambda *_: forward)
    monkeypatch.setattr(tiles, "backward_schedule", lambda *_: back)


@pytest.fixture
def pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 16, False, 64)


def on(device: str, inputs):
    affine = inputs.affine and AffineParams(*(None if p is None else p.to(device) for p in inputs.affine))
    return inputs._replace(**{name: getattr(inputs, name).to(device) for name in inputs._fields[:5]}, affine=affine)


class Triton:
    dtype = None

    def __init__(self, case: Case, device: str, activation: str = "silu") -> None:
        self.case, self.device, self.activation = case, device, activation

    def __call__(self, inputs) -> Tensor:
        return run(self.case, on(self.device, inputs), "triton", activation=self.activation).cpu()


class OfActivation(Reference):
    activation = "silu"

    def __call__(self, inputs) -> Tensor:
        return self.case.reference(inputs, self.dtype, self.activation)


@functools.cache
def expected(case: Case, activation: str = "silu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sides = []
    for dtype in (torch.float64, DTYPE):
        compute = OfActivation(case, dtype)
        compute.activation = activation
        sides.append(gradients(case, DTYPE, compute))
    return sides[0], sides[1]


def check(case: Case, device: str, activation: str = "silu") -> None:
    exact, own = expected(case, activation)
    for name, grad in gradients(case, DTYPE, Triton(case, device, activation)).items():
        judge(grad, exact[name], own[name].to(grad.dtype), f"gradient of {name}")


FEW = Case("few", "quick, for values are judged elsewhere", T=5, H=20, I=12, E=3)


def leaves_of(
    case: Case, device: str, names: str = "x w13 w2 weights constant_value"
) -> tuple[dict[str, Tensor], dict]:
    """Leaves by name, those in `names` trained, and the other arguments of fused_experts."""
    inputs = on(device, case.inputs(DTYPE))
    leaves = {"x": inputs.x_TH, "w13": inputs.w13, "w2": inputs.w2, "weights": inputs.weights_TK}
    rest = {"ids": inputs.ids_TK, "affine": inputs.affine}
    if inputs.affine is not None:
        leaves["constant_value"] = inputs.affine.constant_value
    for name in names.split():
        if name in leaves:
            leaves[name].requires_grad_()
    return leaves, rest


def compute(case: Case, leaves: dict[str, Tensor], rest: dict, backend: str = "triton") -> Tensor:
    return fused_experts(
        leaves["x"], leaves["w13"], leaves["w2"], leaves["weights"], rest["ids"], num_experts=case.E,
        zero_expert_kinds=case.kinds, affine_params=rest["affine"], backend=backend,
    )  # fmt: skip


def upstream(case: Case, device: str) -> Tensor:
    return torch.randn(case.T, case.H, generator=torch.Generator().manual_seed(5)).to(DTYPE).to(device)
