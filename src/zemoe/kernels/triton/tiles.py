"""Tile sizes, computed from shape and device. dev/gpu.md has the measurements behind each choice. Needs no triton.

T tokens, H hidden size, I expert width, E FFN experts, A slots, K choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gpus import gpu_of

MOST_SLOTS, MOST_CHOICES = 1024, 32  # what one program of select_experts can hold


@dataclass(frozen=True)
class Product:
    """How a product runs: block_m rows by block_n columns (GEMM1: of gate and of up each) by block_k at a time.

    A block_m that is no power of two (GEMM1 only) is taken as two: 192 rows as 128 and, where a tile has more, 64.

    tma: weights come by tensor descriptor. processors: None for one program a tile, else the number of persistent
    programs; flatten: their loops over tiles and over k are one pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool
    processors: int | None = None
    flatten: bool = False

    def programs(self, bound: int) -> int:
        """Programs for at most `bound` pieces of work."""
        return max(1, bound if self.processors is None else min(bound, self.processors))


@dataclass(frozen=True)
class Schedule:
    """How the forward of a layer runs.

    block_m: rows of a tile of the plan; 1 for a single token, whose kernels differ. gate_up, down: both products.
    block_h: columns that a program of the sum takes.
    slices: parts of H in which the rows' outputs are made and summed, one after the other in the same memory.
    """

    block_m: int
    gate_up: Product
    down: Product
    block_h: int
    slices: int = 1


@dataclass(frozen=True)
class BackwardSchedule:
    """How the backward of a layer runs: its products, and the columns that its last launch takes at once (block_h).

    preact: rows of dout times w2. weight: block_m by block_n of a weight's gradient, the numbers of a token by those of
    a row, block_k rows at a time; never by descriptor.
    rows: rows of dpreact times w13.
    """

    preact: Product
    weight: Product
    rows: Product
    block_h: int


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """Return P: the most tiles of `block_m` rows that `num_rows` rows of `num_experts` experts can need."""
    return min(num_experts, num_rows) + num_rows // block_m


def rows_per_tile(num_tokens: int, top_k: int, num_slots: int) -> int:
    """Return block_m: rows of a tile of the first product.

    While reading weights is what takes the time, enough that nearly every expert needs one tile. With many rows an
    expert 192, so that weights leave the cache less often.
    """
    if num_tokens == 1:
        return 1
    rows = num_tokens * top_k / max(num_slots, 1)  # of an expert, if all slots were chosen alike
    for block_m, most in ((16, 12), (32, 26), (64, 56), (192, 160), (128, 320)):
        if rows <= most:
            return block_m
    return 192


def training_rows_per_tile(num_tokens: int, top_k: int, num_slots: int) -> int:
    """Return rows_per_tile where a backward follows, for which one token is not a case of its own."""
    return max(rows_per_tile(num_tokens, top_k, num_slots), 16)


def rows_of_products(block_m: int) -> tuple[int, int]:
    """Return the rows of a tile of the first product and of the second, for which 192 rows are too many."""
    return block_m, min(block_m, 128)


def _takes_descriptors(w13: Tensor, w2: Tensor) -> bool:
    """Return whether weights are read by descriptor: if rows are multiples of 16 bytes, and on a large enough GPU."""
    _, H, I = w2.shape
    aligned = H % 8 == 0 and I % 8 == 0 and w13.data_ptr() % 16 == 0 and w2.data_ptr() % 16 == 0
    return aligned and gpu_of(w13.device).takes_large_tiles


def schedule(block_m: int, num_tokens: int, top_k: int, w13: Tensor, w2: Tensor) -> Schedule:
    """Return the Schedule of a layer with weights w13 [E, 2I, H], w2 [E, H, I] on a CUDA device.

    block_m: what rows_per_tile returned.
    """
    E, two_i, H = w13.shape
    I = two_i // 2
    tma = _takes_descriptors(w13, w2)
    block_h = min(_power_of_2(H), 8192)
    if block_m == 1:
        # Dot products of single rows: many small programs read more at a time than few large ones.
        gate_up = Product(1, 1, min(_power_of_2(H), 1024), 8, 1, False)
        return Schedule(1, gate_up, Product(1, 1, min(_power_of_2(I), 512), 1, 1, False), block_h)
    if not tma:
        gate_up, down = (
            Product(m, 64, 64 if m <= 128 else 32, 4 if m < 128 else 8, 3, False) for m in rows_of_products(block_m)
        )
        return Schedule(block_m, gate_up, down, block_h)
    if block_m == 16:
        product = Product(16, 32, 256, 4, 3, True)
        return Schedule(16, product, product, block_h)
    if block_m == 32:
        product = Product(32, 64, 128, 4, 3, True)
        return Schedule(32, product, product, block_h)
    if block_m == 64:
        return Schedule(64, Product(64, 64, 128, 4, 3, True), Product(64, 128, 128, 4, 2, True), block_h)
    gate_up = Product(128, 128, 64, 8, 4, True) if block_m == 128 else Product(192, 128, 32, 8, 5, True)
    rows = num_tokens * top_k / max(E, 1)  # of an expert, if no choice were a zero-computation expert
    if rows <= 128:  # one tile an expert: reading weights takes the time
        down = Product(128, 128, 128, 8, 3, True)
    elif rows <= 320:
        down = Product(128, 256, 64, 8, 4, True)
    else:
        processors = torch.cuda.get_device_properties(w13.device).multi_processor_count
        down = Product(128, 256, 64, 8, 4, True, processors, True)
    return Schedule(block_m, gate_up, down, block_h)


def training_slices(num_rows: int, hidden_size: int) -> int:
    """Return Schedule.slices where the forward keeps [N, 2I] for the backward.

    With two it needs no more memory than that. They are two launches more, so not where a slice saves under 64 MiB.
    """
    return 2 if num_rows * hidden_size >= 2**26 and hidden_size % 16 == 0 else 1


def backward_schedule(block_m: int, w13: Tensor, w2: Tensor) -> BackwardSchedule:
    """Return the BackwardSchedule of a layer whose plan has tiles of block_m rows, 16 or more."""
    tma = _takes_descriptors(w13, w2)
    block_h = min(_power_of_2(w13.shape[2]), 8192)
    block_m = rows_of_products(block_m)[1]
    if not tma:
        product = Product(block_m, 64, 64, 4 if block_m < 128 else 8, 3, False)
        weight = Product(64, 64, 64 if block_m > 16 else 32, 4, 3, False)
        return BackwardSchedule(product, weight, product, block_h)
    if block_m < 64:
        product = Product(block_m, 64, 128, 4, 3, True)
        weight = Product(128, 128, block_m, 8, 3, False)
        return BackwardSchedule(product, weight, product, block_h)
    if block_m == 64:
        product = Product(64, 128, 64, 4, 3, True)
        weight = Product(128, 128, 64, 8, 3, False)
        return BackwardSchedule(product, weight, product, block_h)
    weight = Product(128, 256, 64, 8, 3, False)
    processors = torch.cuda.get_device_properties(w13.device).multi_processor_count
    rows = Product(128, 256, 64, 8, 4, True, processors, True)
    return BackwardSchedule(Product(128, 256, 64, 8, 4, True), weight, rows, block_h)


# triton's own two take microseconds a call, which adds up over the launches of a token.


def cdiv(n: int, size: int) -> int:
    """Return how many parts of `size` hold n."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is no smaller than n."""
    return 1 << max(n - 1, 0).bit_length()


def _power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is no smaller than n, at least 16."""
    return max(16, next_power_of_2(n))
