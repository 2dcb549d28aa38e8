"""Timing, this machine's ceilings, and the floor that a zero-expert layer cannot go below.

T tokens, H hidden size, I expert width, E FFN experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches at best: bytes read per second from memory, float operations per second in products."""

    bytes_per_second: float
    flops_per_second: float


def interleaved(sides: Mapping[str, Callable[[Tensor], object]], inputs: Iterable[Tensor]) -> dict[str, list[float]]:
    """Seconds that each side takes for each input, the sides in turn, and in the opposite order every second time.

    For the CPU: the clock is read right after each call, with no synchronisation.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for inputs_done, x in enumerate(inputs):
        for name in names if inputs_done % 2 == 0 else reversed(names):
            start = time.perf_counter()
            sides[name](x)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _best(call: Callable[[], object], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def cpu_ceilings(
    dtype: torch.dtype = torch.float32, *, read_bytes: int = 2**28, matrix_size: int = 2048, repeats: int = 5
) -> Ceilings:
    """Measure the ceilings of the CPU with the threads that torch uses now.

    Reading: the sum of one float32 tensor of `read_bytes`, which should exceed every cache. Products: the faster one of
    torch.mm and, where torch has it, oneDNN's product, for square matrices of `matrix_size`.
    """
    memory = torch.randn(read_bytes // 4)
    a, b = (torch.randn(matrix_size, matrix_size).to(dtype) for _ in range(2))
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
    if torch.backends.mkldnn.is_available() and dtype == torch.float32:
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return Ceilings(
        bytes_per_second=read_bytes / _best(memory.sum, repeats),
        flops_per_second=2 * matrix_size**3 / min(_best(product, repeats) for product in products),
    )


def moe_floor(
    at: Ceilings,
    *,
    tokens: int,
    ffn_rows: int,
    experts_hit: int,
    hidden_size: int,
    intermediate_size: int,
    itemsize: int,
) -> float:
    """Seconds below which no layer can go: its bytes read or its products computed, whichever takes longer.

    ffn_rows: (token, FFN expert) pairs. experts_hit: FFN experts that have at least one. itemsize: bytes an element.
    """
    weight_elements = 3 * hidden_size * intermediate_size
    moved = itemsize * (experts_hit * weight_elements + 2 * tokens * hidden_size)
    return max(moved / at.bytes_per_second, 2 * ffn_rows * weight_elements / at.flops_per_second)
