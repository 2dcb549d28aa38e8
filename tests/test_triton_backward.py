"""Gradients of the Triton kernels: through the whole backend, operator by operator, and launcher by launcher.

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

from judge import BY_NAME, CASES, Case, judge
from test_experts import Reference, gradients, run

pytest.importorskip("triton")
from zemoe import AffineParams, experts, ops_triton
from zemoe.kernels.triton import tiles
from zemoe.kernels.triton.tiles import Backward, Product, Schedule

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes NaN with numpy
]
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def small(block_m: int, tma: bool, size: int = 16) -> tuple[Schedule, Backward]:
    """Tiles of which a Case takes several in each direction, and few fit."""
    m = min(block_m, 128)

    def product(*size: int, persistent: bool = False) -> Product:
        return Product(*size, 4, 2, tma, 3 if persistent else None, persistent)

    forward = Schedule(block_m, product(block_m, size, 2 * size), product(m, 2 * size, size, persistent=True), 64)
    weights = product(size, 2 * size, 16), product(2 * size, size, 16)
    back = Backward(product(m, 2 * size, size), *weights, product(m, size, 2 * size, persistent=True), 2 * size)
    return forward, back


@pytest.fixture(autouse=True)
def _on_this_device(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend runs on the CPU too where there is no GPU."""
    if device == "cuda":
        yield
        return
    takes_cpu = replace(experts.BACKENDS["triton"], devices=("cpu",), dtypes=(torch.float16,))
    monkeypatch.setitem(experts.BACKENDS, "triton", takes_cpu)
    with torch.library._scoped_library("zemoe", "IMPL") as library:
        library.impl("prepare", ops_triton._prepare_cuda, "CPU")
        library.impl("moe_ffn_tiles_train", ops_triton._moe_ffn_tiles_train_cuda, "CPU")
        library.impl("moe_ffn_tiles_backward", ops_triton._moe_ffn_tiles_backward_cuda, "CPU")
        library.impl("moe_ffn_tiles_backward_", ops_triton._moe_ffn_tiles_backward_in_place_cuda, "CPU")
        yield


def take(monkeypatch: pytest.MonkeyPatch, block_m: int, tma: bool, size: int = 16) -> None:
    forward, back = small(block_m, tma, size)
    monkeypatch.setattr(ops_triton, "training_rows_per_tile", lambda *_: block_m)
    monkeypatch.setattr(tiles, "schedule", lambda *_: forward)
    monkeypatch.setattr(tiles, "backward_schedule", lambda *_: back)


@pytest.fixture
def pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 16, False)


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


# --------------------------------------------------------------------------------------------- values, by the backend


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pointers(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 16, False, 64 if case.name == "wide" else 16)
    check(case, device)


@pytest.mark.parametrize(
    "name", ["plain", "empty_expert", "all_zero", "no_ffn_experts", "skips", "mixed", "all_on_one"]
)
def test_descriptors(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 32, True)
    check(BY_NAME[name], device)


@pytest.mark.parametrize("tma", [True, False])
def test_width_that_no_block_divides(tma: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 16, tma)
    check(Case("uneven", "blocks reach past H and I, into rows of somebody else", T=9, H=72, I=40, E=3), device)


@pytest.mark.parametrize("tma", [True, False])
def test_tall_tiles(tma: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 192, tma)
    check(Case("tall", "192 rows a tile", T=230, H=24, I=16, E=2, kinds=(("identity", 1),), K=2), device)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(activation: str, device: str, pointers: None) -> None:
    check(BY_NAME["plain"], device, activation)
