"""Tile sizes of the two products on a GPU: every variant checked against the chosen one, and timed by graph replays.

    python benchmarks/gpu/tiles.py lite:64 research:4096 --output benchmarks/results

What `zemoe.kernels.triton.tiles` would take is marked. Variants are compiled by as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tomllib
from dataclasses import astuple, fields
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
import triton

from zemoe.kernels.triton.coefficients import IDENTITY
from zemoe.kernels.triton.moe_ffn_tiles import down, gate_up
from zemoe.kernels.triton.plan_tiles import plan_tiles
from zemoe.kernels.triton.tiles import Product, rows_per_tile, schedule

sys.path.insert(0, str(Path(__file__).parents[1]))  # results_csv
import results_csv

PROCESSORS = 132
# block_n, block_k, warps, stages of one program a tile, by block_m.
SIZES = {
    16: [(16, 256, 4, 4), (32, 128, 4, 4), (32, 256, 4, 2), (32, 256, 4, 3), (64, 128, 4, 3)],
    32: [(32, 128, 4, 4), (32, 256, 4, 2), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 8, 3), (128, 64, 8, 3)],
    64: [(64, 64, 4, 5), (64, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 4), (128, 128, 4, 2), (256, 64, 4, 3)],
    128: [(64, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (256, 64, 8, 3), (256, 64, 8, 4)],
    192: [(128, 32, 8, 4), (128, 32, 8, 5), (128, 32, 8, 6), (128, 64, 8, 3)],  # gate_up only
}


def variants(launch: str, block_m: int) -> list[Product]:
    """By pointers and by descriptors, and for 128 rows persistent too."""
    found = [
        Product(block_m, *size, tma) for size in SIZES[block_m] for tma in ((True,) if block_m > 64 else (True, False))
    ]
    if block_m >= 128:
        flat = launch == "down"
        found += [Product(block_m, *size, True, PROCESSORS, flat) for size in SIZES[block_m]]
    if launch == "down" and block_m > 128:
        return []
    return [product for product in found if launch == "down" or product.block_n <= 128]


def shapes(case: str) -> dict:
    return tomllib.loads(files("zemoe").joinpath("cases.toml").read_text(encoding="utf-8"))[case]


def variants_of(case: str, tokens: int) -> list[tuple[str, Product]]:
    """(launch, product) with the rows a tile that the schedule takes, half and twice as many."""
    shape = shapes(case)
    block_m = rows_per_tile(tokens, shape["top_k"], shape["num_experts"] + shape["num_zero_experts"])
    sizes = [size for size in SIZES if block_m // 2 <= size <= 2 * block_m]
    return [(launch, product) for launch in ("gate_up", "down") for size in sizes for product in variants(launch, size)]


class Layer:
    """Weights of a case, or of its first experts alone, and what one launch needs."""

    def __init__(self, case: str, tokens: int, experts: int | None = None) -> None:
        shape = shapes(case)
        self.H, self.I, self.K = shape["hidden_size"], shape["intermediate_size"], shape["top_k"]
        self.E = experts or shape["num_experts"]
        self.A = self.E + (0 if experts else shape["num_zero_experts"])
        self.T = tokens
        make = {"device": "cuda", "dtype": torch.bfloat16}
        self.w13 = torch.empty(self.E, 2 * self.I, self.H, **make).normal_(std=self.H**-0.5)
        self.w2 = torch.empty(self.E, self.H, self.I, **make).normal_(std=self.I**-0.5)
        self.x = torch.randn(tokens, self.H, **make)
        self.ids = [torch.rand(tokens, self.A, device="cuda").topk(min(self.K, self.A)).indices for _ in range(3)]

    def plans(self, block_m: int) -> list[tuple[torch.Tensor, ...]]:
        kinds = ((IDENTITY, self.A - self.E),)
        rules = {"num_experts": self.E, "num_slots": self.A, "block_m": block_m, "kinds": kinds}
        return [plan_tiles(torch.ones(ids.shape, device="cuda"), ids, **rules) for ids in self.ids]

    def run(self, launch: str, plan: tuple[torch.Tensor, ...], product: Product, inner: torch.Tensor | None):
        row_token, _, offsets, tiles, *_ = plan
        if launch == "gate_up":
            return gate_up(self.x, row_token, offsets, tiles[0], self.w13, "silu", product)
        return down(inner, offsets, tiles[-1], self.w2, product, len(self.x))


def compile_one(job: tuple[str, str, Product]) -> str:
    """Compile by running on one expert; what is wrong with the variant, or nothing."""
    case, launch, product = job
    layer = Layer(case, 16, experts=1)
    inner = torch.randn(16, layer.I, device="cuda", dtype=torch.bfloat16)
    try:
        layer.run(launch, layer.plans(product.block_m)[0], product, inner)
    except triton.runtime.errors.OutOfResources as error:
        return str(error)
    return ""


def replay_ms(calls: list) -> float:
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    spent = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end) / len(calls))
    return statistics.median(spent)


def measure(case: str, tokens: int, broken: set) -> list[dict]:
    layer, rows = Layer(case, tokens), []
    block_m = rows_per_tile(tokens, layer.K, layer.A)
    taken = schedule(block_m, tokens, layer.K, layer.w13, layer.w2)
    plans = {size: layer.plans(size) for size in SIZES}
    real = int(plans[16][0][2][-1])
    inner = layer.run("gate_up", plans[block_m][0], taken.gate_up, None)
    judges = {"gate_up": inner, "down": layer.run("down", plans[taken.down.block_m][0], taken.down, inner)}
    for launch, product in variants_of(case, tokens):
        if (case, launch, product) in broken:
            continue
        out = layer.run(launch, plans[product.block_m][0], product, inner)
        wanted = judges[launch][:real].float()
        error = ((out[:real].float() - wanted).norm() / wanted.norm()).item()
        assert error < 1e-2, f"{launch} {product} is wrong by {error}"
        ms = replay_ms([partial(layer.run, launch, plan, product, inner) for plan in plans[product.block_m]])
        flops = real * layer.H * layer.I * (4 if launch == "gate_up" else 2)
        rows.append(
            {"case": case, "tokens": tokens, "product": launch}
            | dict(zip([field.name for field in fields(product)], astuple(product), strict=True))
            | {"ms": round(ms, 5), "tflops": round(flops / ms / 1e9, 1), "chosen": product == getattr(taken, launch)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="+", metavar="CASE:TOKENS")
    results_csv.add_options(parser)
    args = parser.parse_args()
    layers = [(case, int(tokens)) for case, tokens in (layer.split(":") for layer in args.layers)]
    jobs = sorted({(case, *job) for case, tokens in layers for job in variants_of(case, tokens)}, key=str)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        broken = {job for job, error in zip(jobs, pool.map(compile_one, jobs, chunksize=1), strict=True) if error}
    print(f"{len(jobs)} variants compiled, {len(broken)} need more shared memory than there is")
    rows = []
    for case, tokens in layers:
        found = measure(case, tokens, broken)
        rows += found
        for launch in ("gate_up", "down"):
            ordered = sorted((row for row in found if row["product"] == launch), key=lambda row: row["ms"])
            best, chosen = ordered[0], next((row for row in ordered if row["chosen"]), None)
            print(
                f"{case} T = {tokens} {launch}: best {best['ms']:.4f} ms", *list(best.values())[3:11], end="; chosen "
            )
            print(chosen and f"{chosen['ms']:.4f} ms")
    results_csv.write("tiles", rows, args)


if __name__ == "__main__":
    main()
