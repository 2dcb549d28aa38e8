"""How operators are defined and registered, and what several of them share.

Operators are `torch.ops.zemoe.*`, with shapes for tracing and hand-written gradients; the other files of this folder
define them, by subject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._compat import inside_forward_mode, inside_function_transform, tracked_by_function_transform
from ..kernels.triton.gpus import gpu_of, why_not
from ..versions import warn_if_untested

warn_if_untested("torch", torch.__version__)

HAS_TRITON = find_spec("triton") is not None
_LIBRARY = torch.library.Library("zemoe", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast, so that a float32 product stays float32; the meta device has no autocast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()  # torch.autocast takes as long to enter as a few operators
    return torch.autocast(device.type, enabled=False)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise RuntimeError for a tensor inside of torch.func.grad, vjp or jvp, or of forward-mode differentiation.

    Our operators would drop a tangent silently. Operators refuse torch.vmap by themselves, see `define`.
    """
    if inside_forward_mode() and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise RuntimeError("zemoe's layers have no forward-mode derivative; use backward() or torch.autograd.grad")
    if torch.compiler.is_compiling() or not inside_function_transform():
        return
    if any(tensor is not None and tracked_by_function_transform(tensor) for tensor in tensors):
        raise RuntimeError(
            "zemoe's layers take no part in torch.func.grad, vjp or jacrev; use backward() or torch.autograd.grad"
        )


def _no_vmap(*args: object) -> NoReturn:
    """Raise: under vmap `requires_grad` is False even if a gradient is wanted, and a layer would drop the gradient."""
    raise RuntimeError("zemoe's layers do not run under torch.vmap; give them the whole batch, of any leading sizes")


def define(schema: str, *, vmap: bool = True) -> None:
    """Define an operator. Under torch.vmap it runs once for each entry of the batch, or raises if `vmap` is False."""
    _LIBRARY.define(schema, tags=_TAGS)
    if not vmap:
        torch.library.impl("zemoe::" + schema.partition("(")[0], "FuncTorchBatched", _no_vmap)


def implement(name: str, key: str, kernel: Callable) -> None:
    """Register `kernel` to compute zemoe::name for a dispatch key of torch, such as "CPU"; autocast is off in it."""

    def in_its_dtypes(first: Tensor, *args: object) -> object:
        with without_autocast(first.device):
            return kernel(first, *args)

    torch.library.impl("zemoe::" + name, key, in_its_dtypes)


def rows_like(tensor: Tensor) -> Tensor:
    """Return an empty tensor of this shape and dtype; contiguous, whatever the strides of the argument."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# --- for the operators of the `triton` backend, which run on CUDA devices only ---


def lacks_for_triton(device: torch.device) -> str:
    """Return what a CUDA device lacks to run these operators, "" for nothing.

    "" also before CUDA is initialised and while code is traced: then an operator raises when it runs.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return ""  # asking would initialise CUDA, and a process that did may not fork
    return why_not(device)


def implement_on_cuda(name: str) -> Callable[[Callable], Callable]:
    """Register what is decorated as the CUDA implementation of zemoe::name, run on the device of its first tensor.

    Triton launches on the current device, which need not be the one that holds the tensors, and it takes a pointer to
    any device's memory.
    """

    def register(kernel: Callable) -> Callable:
        def on_its_device(first: Tensor, *args):
            gpu_of(first.device)  # refuses one that can't run them
            index = first.get_device()
            for other in args:
                if isinstance(other, Tensor) and other.get_device() != index:
                    raise ValueError(
                        f"zemoe::{name} takes tensors of one device, got {first.device} and {other.device}"
                    )
            if index == torch.cuda.current_device():
                return kernel(first, *args)
            with torch.cuda.device(first.device):
                return kernel(first, *args)

        torch.library.impl(f"zemoe::{name}", "CUDA", on_its_device)
        return kernel

    return register


def no_second_derivative(ctx, *grads: Tensor) -> NoReturn:
    """Raise RuntimeError, as the backward of a backward that has none."""
    raise RuntimeError("the triton backend has no second derivative, its backward is written out; use backend='torch'")


def with_rows(matrix: Tensor) -> Tensor:
    """Return the matrix, or a copy, with stride 1 along its rows and rows that don't overlap, as descriptors need it.

    contiguous() would not do: it lets a row of one element have any stride.
    """
    apart = len(matrix) < 2 or matrix.stride(0) >= matrix.shape[1]
    return matrix if matrix.stride(1) == 1 and apart else matrix.clone(memory_format=torch.contiguous_format)


def pairs(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Return what `flat` was given: an operator's argument can be a list of numbers, not of pairs."""
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def flat(of_pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return the numbers of pairs one after the other."""
    return [number for pair in of_pairs for number in pair]
