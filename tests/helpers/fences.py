"""Memory around tensors that must not be read or written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from helpers.judge import Case, assert_bitwise, with_skips

NAN = float("nan")


BAND = 1 << 14  # bytes, a multiple of every alignment


POISONS = {"extreme": (NAN, None), "plausible": (-3.0, 1)}  # of floats, of integers (None: the largest)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


class Fence:
    """Memory between guard bands; `shift` moves all of it by so many elements, off any alignment."""

    def __init__(self, device: str, poison: str, shift: int = 0) -> None:
        self.device, self.shift = device, shift
        self.float, self.int = POISONS[poison]
        self.held: list[tuple[Tensor, Tensor, slice]] = []  # memory, what it held, what may have changed since

    def poison(self, dtype: torch.dtype) -> float:
        if dtype.is_floating_point:
            return self.float
        return torch.iinfo(dtype).max if self.int is None else self.int

    def _cut(self, count: int, dtype: torch.dtype) -> tuple[Tensor, slice]:
        band = BAND // dtype.itemsize
        memory = torch.full((count + 2 * band,), self.poison(dtype), dtype=dtype, device=self.device)
        return memory, slice(band + self.shift, band + self.shift + count)

    def empty(self, like: Tensor) -> Tensor:
        """Memory for an output or a workspace."""
        memory, inside = self._cut(like.numel(), like.dtype)
        self.held.append((memory, memory.clone(), inside))
        return memory[inside].view(like.shape)

    def around(self, data: Tensor | None, gap: int = 0) -> Tensor | None:
        """An input, its rows `gap` elements apart."""
        if data is None:
            return None
        shape = (*data.shape[:-1], data.shape[-1] + gap)
        memory, inside = self._cut(torch.Size(shape).numel(), data.dtype)
        tensor = memory[inside].view(shape)[..., : data.shape[-1]]
        tensor.copy_(data)
        self.held.append((memory, memory.clone(), slice(0, 0)))
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        where = tensor.untyped_storage().data_ptr()
        return any(where == memory.untyped_storage().data_ptr() for memory, _, _ in self.held)

    def check(self, what: str, *results: Tensor | None) -> None:
        for memory, before, inside in self.held:
            for outside in (slice(0, inside.start), slice(inside.stop, None)):
                now, then = bits(memory[outside]), bits(before[outside])
                if not torch.equal(now, then):
                    at = (now != then).nonzero().flatten()[:5] + (outside.start - inside.start)
                    raise AssertionError(f"{what} wrote at {at.tolist()} of {inside.stop - inside.start}")
        for result in results:
            assert result is None or self.holds(result), f"{what} allocated memory that no fence is around"


@contextmanager
def fenced(device: str, poison: str, shift: int = 0) -> Iterator[Fence]:
    """What the kernels' modules allocate meanwhile lies in the Fence."""
    fence = Fence(device, poison, shift)

    def replaced(make: Callable[..., Tensor], *, fill: bool) -> Callable[..., Tensor]:
        def wrapper(*args, **kwargs) -> Tensor:
            made = make(*args, **kwargs)
            if not sys._getframe(1).f_globals["__name__"].startswith("zemoe.kernels.triton"):
                return made
            memory = fence.empty(made)
            return memory.copy_(made) if fill else memory

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "zeros"),
            (Tensor, "new_empty"),
            (Tensor, "new_zeros"),
        ):
            patch.setattr(owner, name, replaced(getattr(owner, name), fill="zeros" in name))
        yield fence


def same_in_both(run: Callable[[Fence], list[Tensor | None]], device: str, shift: int = 0) -> list[Tensor]:
    """The results of `run`, which must not depend on what lies around its memory."""
    results = []
    for poison in POISONS:
        with fenced(device, poison, shift) as fence:
            results.append([None if result is None else result.clone() for result in run(fence)])
    for left, right in zip(*results, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            assert_bitwise(left, right)
    return [result.cpu() for result in results[0] if result is not None]


def on_the_last(case: Case, generator: torch.Generator) -> Tensor:
    """All tokens on the last expert, twice: behind it there is nothing more."""
    ids = torch.full((case.T, case.K), case.E - 1)
    ids[:, -1] = -1
    return ids


def wild_ids(case: Case, generator: torch.Generator) -> Tensor:
    ids = with_skips(case, generator)
    wild = [-(2**63), 2**63 - 1, 2**32 + 1, -(2**32) + 1, 2**31, case.A, -2]
    ids.view(-1)[: min(len(wild), ids.numel())] = torch.tensor(wild)[: ids.numel()]
    return ids
