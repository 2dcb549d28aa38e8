"""Tile sizes, from the shape and the device. See docs/gpu.md for the measurements behind each choice.

T tokens, H hidden size, I expert width, E FFN experts, A slots, K choices.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """How one of the two products runs.

    block_m rows by block_n columns (of gate and of up each, in GEMM1) by block_k. processors: None for one program a
    tile, else the number of persistent programs.
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
    """How a layer runs: rows a tile in the plan, both products, columns a program of the sum. block_m 1: one token."""

    block_m: int
    gate_up: Product
    down: Product
    block_h: int
