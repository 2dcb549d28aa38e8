"""Every launch of the Triton kernels that a GPU of some kind would see, collected without one; for check_arch.py.

The launchers run on tensors without memory, told that they are on the GPU in question; what they would launch is kept
instead. Import this before any kernel, and with TRITON_INTERPRET unset.

T tokens, H hidden size, I expert width, E FFN experts, Z zero experts, A slots, K choices, N = T * K.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from zemoe.kernels.triton import (
    combine,
    gpus,
    grad_weight,
    moe_ffn_tiles,
    moe_ffn_tiles_backward,
    plan_tiles,
    router_logits,
    router_logits_backward,
    select_experts,
    select_experts_backward,
    tiles,
)
from zemoe.kernels.triton.coefficients import CONSTANT, IDENTITY, SCALED, ZERO
from zemoe.kernels.triton.launch import _MOST_TOKENS

MODULES = (
    moe_ffn_tiles_backward,
    combine,
    moe_ffn_tiles,
    grad_weight,
    plan_tiles,
    select_experts,
    select_experts_backward,
    router_logits,
    router_logits_backward,
)
KINDS = ((CONSTANT, 2), (IDENTITY, 3), (SCALED, 1), (ZERO, 1))
SCORING = ("softmax", "sigmoid", "sqrtsoftplus")
RENORMALIZE = ("none", "all", "real", "nonnull")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class Shape(NamedTuple):
    """Sizes of a layer."""

    H: int
    I: int
    E: int
    Z: int
    K: int


# Where tiles.py and the launchers branch: rows by descriptor or not (odd sizes), one slice of H or two, narrow and wide
# rows (block_h), few and many experts. Published: LongCat-Flash-Lite and LongCat-Flash.
SHAPES = (
    Shape(3072, 1024, 256, 128, 12),
    Shape(6144, 2048, 512, 256, 12),
    Shape(2048, 1024, 64, 32, 8),
    Shape(1536, 4096, 16, 4, 2),
    Shape(111, 37, 8, 7, 3),
    Shape(20, 12, 3, 7, 1),
    Shape(16384, 8, 1024, 0, 32),
)
# Of each branch of rows_per_tile, schedule and router_schedule at least one, whatever the slots.
TOKENS = (1, 2, 3, 5, 8, 16, 40, 64, 100, 128, 300, 512, 1000, 1024, 1500, 2048, 4096, 6000, 8192, 16384, 40000, 65536)


@dataclass(frozen=True)
class Launch:
    """A kernel, with what it was called with."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]

    def named(self) -> dict[str, Any]:
        """Arguments by name, launch options among them."""
        names = list(self.kernel.arg_names)
        return dict(zip(names, self.args, strict=False)) | self.options

    def about(self) -> str:
        """Kernel, tile and options in a line."""
        shown = {
            name: value
            for name, value in self.named().items()
            if name.isupper() or name.startswith("num_")
            if not isinstance(value, Tensor | TensorDescriptor)
        }
        return f"{self.kernel.__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"


def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


@contextlib.contextmanager
def recording(gpu: gpus.Gpu) -> Iterator[list[Launch]]:
    """Inside, tensors are on a GPU of this kind, and launches go into the list."""
    seen: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append(Launch(self, args, options))

    def options(tensor: Tensor, num_tokens: int) -> dict[str, bool]:
        overlaps = gpu.overlaps and num_tokens <= _MOST_TOKENS
        return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}

    properties = SimpleNamespace(multi_processor_count=100)
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "launch_options", options))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(gpus, "_gpu", return_value=gpu))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=properties))
        yield seen


def layer(shape: Shape, T: int, dtype: torch.dtype, activation: str, *, trained: bool) -> None:
    """Launch what the experts of a layer launch, without gradients or with all of them."""
    H, I, E, Z, K = shape
    N = T * K
    block_m = (tiles.training_rows_per_tile if trained else tiles.rows_per_tile)(T, K, E + Z)
    kinds = () if trained or Z < 7 else KINDS
    *planned, alpha, beta = plan_tiles.plan_tiles(
        empty(T, K), empty(T, K, dtype=torch.int64), num_experts=E, num_slots=-1, block_m=block_m, kinds=kinds,
        scale_S=empty(1), constant_logits_TC2=empty(T, 2, 2),
    )  # fmt: skip
    x, w13, w2 = empty(T, H, dtype=dtype), empty(E, 2 * I, H, dtype=dtype), empty(E, H, I, dtype=dtype)
    affine = alpha, beta, None if beta is None else empty(2, H)
    how = tiles.schedule(block_m, T, K, w13, w2)
    preact = empty(N, 2 * I, dtype=dtype) if trained else None
    if trained:
        how = replace(how, slices=tiles.training_slices(N, H))
    moe_ffn_tiles.moe_ffn_tiles(x, empty(T, K), *planned, w13, w2, affine, activation, how, preact)
    if preact is None:
        return
    for into in ((None, None), (empty(E, 2 * I, H), empty(E, H, I))):
        moe_ffn_tiles_backward.moe_ffn_tiles_backward(
            empty(T, H, dtype=dtype), x, empty(T, K), *planned[:3], planned[3][-1], w13, w2, alpha, preact, activation,
            (True,) * 5, tiles.backward_schedule(block_m, w13, w2), into, overwrite=True,
        )  # fmt: skip


def routing(shape: Shape, T: int, dtype: torch.dtype, scoring: str, renormalize: str, groups: int | None) -> None:
    """Launch what a layer's router launches, forward and backward."""
    A, constants = shape.E + shape.Z, 4 if shape.Z >= 7 else 0
    x, weight = empty(T, shape.H, dtype=dtype), empty(A + constants, shape.H)
    router_logits.router_logits(x, weight)
    logits, nulls = empty(T, A), ((A - 1, A),) if shape.Z else ()
    rules = {"num_experts": shape.E, "scoring": scoring, "renormalize": renormalize, "null_ranges": nulls}
    limit = {"num_expert_group": groups, "topk_group": None if groups is None else max(groups // 2, 1)}
    _, ids = select_experts.select_experts(logits, shape.K, bias=empty(A), **rules, **limit)
    select_experts_backward.select_experts_backward(empty(T, shape.K), logits, ids, scaling=1.0, **rules)
    router_logits_backward.bfloat16_parts(logits, low=1, beside=True)
    router_logits_backward.bfloat16_parts(weight, low=2, beside=False)


# Kernels with products, whose tiles fill the shared memory; of the others the largest and the smallest tile will do.
PRODUCTS = ("_gate_up", "_down", "_grad_preact", "_grad_rows", "_grad_weight", "_direct", "_split")
# Sizes of the problem: of these only whether they are multiples of 8 makes another program of the same tile.
SIZES = frozenset(("H", "I", "E", "A", "S", "O", "J", "K", "C", "B", "N", "P", "R", "T", "TWO_I", "WIDTH", "FIRST"))


def key(launch: Launch, *, everything: bool) -> tuple[Any, ...]:
    """What makes a launch another one: kernel, dtypes, tile and options, and whether sizes are multiples of 8.

    Unless `everything`, whether it overlaps with the one before is no difference.
    """
    parts: list[Any] = [launch.kernel.__name__]
    for name, value in sorted(launch.named().items()):
        if isinstance(value, TensorDescriptor):
            parts.append((name, value.base.dtype, tuple(value.block_shape)))
        elif isinstance(value, Tensor):
            parts.append((name, value.dtype))
        elif name in SIZES:
            parts.append((name, value % 8 == 0) if name in "HIOJ" else ())
        elif (name.isupper() or name.startswith("num_")) and (everything or name != "OVERLAP"):
            parts.append((name, value))
    return tuple(parts)


def tile(launch: Launch) -> int:
    """Numbers in a tile."""
    return math.prod(value for name, value in launch.named().items() if name.startswith("BLOCK_") and name[-2] == "_")


def launches(gpu: gpus.Gpu, *, everything: bool) -> list[Launch]:
    """The launches of `gpu`, those with the same tile and options once.

    everything: with every activation, score and way to renormalise, in both dtypes, and all tiles of all kernels.
    """
    some = slice(None) if everything else slice(1)
    with recording(gpu) as seen:
        for dtype in (torch.bfloat16, torch.float16)[some]:
            for shape, T in itertools.product(SHAPES, TOKENS):
                for activation in ACTIVATIONS[some]:
                    layer(shape, T, dtype, activation, trained=False)
                    layer(shape, T, dtype, activation, trained=True)
                for scoring, renormalize in itertools.product(SCORING[some], RENORMALIZE[some]):
                    routing(shape, T, dtype, scoring, renormalize, None)
                if (shape.E + shape.Z) % 8 == 0:
                    routing(shape, T, dtype, "sigmoid", "all", 8)
    found = list({key(launch, everything=everything): launch for launch in reversed(seen)}.values())
    if everything:
        return found
    few = [launch for launch in found if launch.kernel.__name__ in PRODUCTS]
    for name in sorted({launch.kernel.__name__ for launch in found} - set(PRODUCTS)):
        group = sorted((launch for launch in found if launch.kernel.__name__ == name), key=tile)
        few += group[-1:] if len(group) == 1 else [group[0], group[-1]]
    return few
