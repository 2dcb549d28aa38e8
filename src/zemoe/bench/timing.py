"""Timing, this machine's ceilings, and the floor that a zero-expert layer cannot go below.

T tokens, H hidden size, I expert width, E FFN experts, A slots.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._compat import onednn_linear

Sides = Mapping[str, Callable[[Tensor], Tensor]]
# Before each timed call a GPU overwrites so many bytes so many times: that empties its cache, and takes it long enough
# (about 2 ms on an H100) for Python to have the whole call queued when the first timestamp is taken.
_FLUSH_BYTES, _FLUSHES = 2**30, 6


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches at best: bytes read per second from memory, float operations per second in products."""

    bytes_per_second: float
    flops_per_second: float


# ------------------------------------------------------------------------------------------------------------ timing


def _in_turn(names: Sequence[str], turn: int) -> list[tuple[int, str]]:
    """Return names with their places, in the opposite order every second time."""
    order = list(enumerate(names))
    return order if turn % 2 == 0 else order[::-1]


def interleaved(
    sides: Mapping[str, Callable[[Tensor], object]],
    inputs: Sequence[Tensor],
    after: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return the seconds of each side for each input: sides run in turn, in the opposite order every second time.

    For the CPU: the clock is read right after each call, with no synchronisation. Sides that share weights must not
    find them in the cache, so no two of them get the same input in the same round (where there are inputs enough).
    `after` is called after each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(len(inputs)):
        for place, name in _in_turn(list(sides), turn):
            x = inputs[(turn + place) % len(inputs)]
            start = time.perf_counter()
            sides[name](x)
            seconds[name].append(time.perf_counter() - start)
        after()
    return seconds


def waits_for_device(call: Callable[[], object]) -> bool:
    """Return whether `call` makes Python wait for the current CUDA device, so that no CUDA graph can hold it."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says that it may overlook some; capturing doesn't
            torch.cuda.set_sync_debug_mode("error")
        call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _event_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def cuda_events(
    sides: Sides, inputs: Sequence[Tensor], after: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Time as `interleaved` does, on the current CUDA device: between two events, with its cache emptied before."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn, x in enumerate(inputs):
        for _, name in _in_turn(list(sides), turn):
            for _ in range(_FLUSHES):
                flush.zero_()
            seconds[name].append(_event_seconds(lambda name=name, x=x: sides[name](x)))
        after()
    return seconds


class Replay(NamedTuple):
    """A CUDA graph of one call for each of `inputs`, which stay where they are; `outputs` are what it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]


def capture(call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Replay:
    """Capture `call` on each of `inputs`, one after the other, in one CUDA graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        call(inputs[0])  # what is compiled or allocated once must not be captured
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(x) for x in inputs]
    return Replay(graph, inputs, outputs)


def cuda_replays(
    replays: Mapping[str, Replay],
    others: Sides,
    batches: Sequence[Sequence[Tensor]],
    after: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds a call: `replays` (captured on the same inputs) by replaying them, `others` call by call between events.

    Before each round the inputs of the graphs are overwritten with one of `batches`.
    """
    static = next(iter(replays.values())).inputs
    seconds: dict[str, list[float]] = {name: [] for name in [*replays, *others]}
    for turn, batch in enumerate(batches):
        for x, fresh in zip(static, batch, strict=True):
            x.copy_(fresh)
        for _, name in _in_turn(list(seconds), turn):
            if name in replays:
                seconds[name].append(_event_seconds(replays[name].graph.replay) / len(static))
            else:
                spent = [_event_seconds(lambda name=name, x=x: others[name](x)) for x in static]
                seconds[name].append(sum(spent) / len(static))
        after()
    return seconds


# ---------------------------------------------------------------------------------------------------------- ceilings


def _best(call: Callable[[], object], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def cpu_ceilings(
    dtype: torch.dtype = torch.float32, *, read_bytes: int = 2**28, matrix_size: int = 2048, repeats: int = 10
) -> Ceilings:
    """Measure the ceilings of the CPU with the threads that torch uses now.

    Reading: the sum of one float32 tensor of `read_bytes`, which should exceed every cache. Products: the faster one of
    torch.mm and, where torch has it, oneDNN's product, for square matrices of `matrix_size`.
    """
    memory = torch.randn(read_bytes // 4)
    a, b = (torch.randn(matrix_size, matrix_size).to(dtype) for _ in range(2))
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
    if torch.backends.mkldnn.is_available() and dtype == torch.float32:
        products.append(lambda: onednn_linear(a, b))
    return Ceilings(
        bytes_per_second=read_bytes / _best(memory.sum, 3 * repeats),
        flops_per_second=2 * matrix_size**3 / min(_best(product, repeats) for product in products),
    )


def cuda_ceilings(
    dtype: torch.dtype = torch.bfloat16, *, read_bytes: int = 2**32, matrix_size: int = 8192, repeats: int = 10
) -> Ceilings:
    """Measure the ceilings of the current CUDA device, on random numbers: zeros need less power and run faster.

    Reading: the fastest of three reductions of one tensor of `read_bytes`, far more than its cache. Products: square
    matrices of `matrix_size` in `dtype`.
    """
    memory = torch.randn(read_bytes // 4, device="cuda")
    rows = memory.view(-1, 2**14)
    vector = torch.randn(rows.shape[1], device="cuda")
    reads = [memory.sum, memory.amax, lambda: torch.mv(rows, vector)]

    def fastest(call: Callable[[], object]) -> float:
        call()
        return min(_event_seconds(call) for _ in range(repeats))

    bytes_per_second = read_bytes / min(fastest(read) for read in reads)
    a, b = (torch.randn(matrix_size, matrix_size, device="cuda").to(dtype) for _ in range(2))
    return Ceilings(bytes_per_second, 2 * matrix_size**3 / fastest(lambda: torch.mm(a, b)))


# ------------------------------------------------------------------------------------------------------------ floors


def moe_floor(
    ceilings: Ceilings,
    *,
    tokens: int,
    ffn_rows: int,
    experts_hit: int,
    hidden_size: int,
    intermediate_size: int,
    itemsize: int,
) -> float:
    """Return the seconds that no layer can go below: the time to read its bytes or to compute its products, if longer.

    ffn_rows: (token, FFN expert) pairs. experts_hit: FFN experts that have at least one. itemsize: bytes an element.
    """
    weight_elements = 3 * hidden_size * intermediate_size
    moved = itemsize * (experts_hit * weight_elements + 2 * tokens * hidden_size)
    return max(moved / ceilings.bytes_per_second, 2 * ffn_rows * weight_elements / ceilings.flops_per_second)


def router_floor(ceilings: Ceilings, *, tokens: int, slots: int, hidden_size: int, itemsize: int) -> float:
    """Return the seconds that the router adds to `moe_floor`: to read its float32 weight or compute its product.

    Where the hidden states have 16 bits, the product needs the weight in two parts of 16 bits each to be as good as a
    float32 one, so it counts twice. The hidden states are read once, in `moe_floor`.
    """
    parts = 2 if itemsize < 4 else 1
    flops = parts * 2 * tokens * hidden_size * slots
    return max(4 * hidden_size * slots / ceilings.bytes_per_second, flops / ceilings.flops_per_second)
