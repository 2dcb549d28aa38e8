"""Forward and backward of a layer on a GPU: against the torch backend and grouped_mm by hand, by launch and by tiles.

    python benchmarks/gpu/training.py --output benchmarks/results

First, by as many processes as there are cores, kernels are compiled and the gradients of small layers judged against
float64; a wrong one ends the run. Then, in this order, each on request alone with --only: "layers" (milliseconds, also
as a CUDA graph; saved and peak bytes; at several shares of zero choices), "launches" (a profile), "tiles" (the four
products of the backward).
Gradients count as given: peak bytes are less those of x and of the parameters.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from tiles import replay_ms, shapes
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from zemoe import MoE, fused_experts
from zemoe.bench.baselines import Forward, by_backend
from zemoe.bench.cases import build, load_cases, shares, steer
from zemoe.kernels.triton import launch
from zemoe.kernels.triton.grad_weight import grad_weight
from zemoe.kernels.triton.moe_ffn_tiles import gate_up
from zemoe.kernels.triton.moe_ffn_tiles_backward import grad_preact, grad_rows, row_weights
from zemoe.kernels.triton.plan_tiles import plan_tiles
from zemoe.kernels.triton.tiles import Product, backward_schedule, schedule, training_rows_per_tile
from zemoe.ops.triton_experts import moe_ffn_tiles_train

sys.path.insert(0, str(Path(__file__).parents[1]))  # results_csv
import results_csv

LAYERS = [("research", 4096), ("research", 16384), ("lite", 16384)]
ZERO_SHARES = [0.0, None, 0.5, 0.9]  # None: what chance makes of it, here a third
REPEATS, STEPS = 7, 4  # steps without a wait between them, as in training
PROCESSORS = 132
DTYPE = torch.bfloat16


# --- the sides


def by_hand(layer: MoE) -> Forward:
    """Sort and grouped_mm over the real pairs, as one writes it; torch's own gradients. It waits for the device."""
    E = layer.config.num_experts

    def call(x_TH: Tensor) -> Tensor:
        routing = layer.router(x_TH)
        weights_TK, ids_N = routing.topk_weights_TK, routing.topk_ids_TK.flatten()
        K, zero_TK = weights_TK.shape[1], routing.topk_ids_TK >= E
        pair_P = (ids_N < E).nonzero().squeeze(1)
        pair_P = pair_P[ids_N[pair_P].sort(stable=True).indices]
        ends_E = torch.bincount(ids_N[pair_P], minlength=E).cumsum(0, dtype=torch.int32)
        token_P = pair_P // K
        rows_PH = x_TH.index_select(0, token_P)
        gate_PI, up_PI = F.grouped_mm(rows_PH, layer.w13.mT, offs=ends_E).chunk(2, dim=-1)
        out_PH = F.grouped_mm(F.silu(gate_PI) * up_PI, layer.w2.mT, offs=ends_E)
        out_PH = out_PH * weights_TK.flatten()[pair_P, None].to(x_TH.dtype)
        y_TH = x_TH * torch.where(zero_TK, weights_TK, 0.0).sum(-1, keepdim=True).to(x_TH.dtype)
        return y_TH.index_add(0, token_P, out_PH)

    return call


def router_alone(layer: MoE) -> Forward:
    """What all sides share: the router, forward and backward, as zemoe trains it."""
    return lambda x_TH: layer.router(x_TH).topk_weights_TK


SIDES: dict[str, Callable[[MoE], Forward]] = {
    "triton": partial(by_backend, backend="triton"),
    "torch": partial(by_backend, backend="torch"),
    "grouped": by_hand,
    "router": router_alone,
}


def trained(case: str) -> tuple[MoE, list[Tensor]]:
    layer = build(load_cases()[case], DTYPE, torch.device("cuda"))
    parameters = [layer.w13, layer.w2, layer.router.classifier.weight]
    for parameter in parameters:
        parameter.requires_grad_()
    return layer, parameters


# --- right or wrong


# T, H, I, E, Z, K: tiles of 16, 32, 64 and 192 rows; odd sizes; many rows an expert.
CHECKS = [
    (20, 264, 136, 8, 4, 4), (60, 264, 136, 8, 4, 4), (120, 264, 136, 8, 4, 4), (200, 264, 136, 8, 4, 4),
    (100, 131, 67, 8, 4, 4), (4096, 512, 256, 6, 3, 4),
]  # fmt: skip


def check(index: int) -> None:
    """Gradients of a small layer against float64; AssertionError if they are wrong."""
    T, H, I, E, Z, K = CHECKS[index]
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float64)

    ids = torch.rand(T, E + Z, device="cuda", generator=generator).topk(K).indices
    dout = normal(T, H).to(DTYPE)
    leaves = {
        "x": normal(T, H).to(DTYPE),
        "w13": (normal(E, 2 * I, H) * H**-0.5).to(DTYPE),
        "w2": (normal(E, H, I) * I**-0.5).to(DTYPE),
        "weights": torch.rand(T, K, device="cuda", generator=generator),
    }
    found: dict[str, list[Tensor]] = {}
    for side, backend, dtype in (
        ("exact", "torch", torch.float64),
        ("torch", "torch", DTYPE),
        ("triton", "triton", DTYPE),
        ("again", "triton", DTYPE),
    ):
        mine = [
            (leaf.double() if dtype == torch.float64 else leaf).detach().clone().requires_grad_()
            for leaf in leaves.values()
        ]
        y = fused_experts(
            mine[0], mine[1], mine[2], mine[3], ids, num_experts=E, zero_expert_kinds=(("identity", Z),),
            backend=backend,
        )  # fmt: skip
        found[side] = [y.detach(), *torch.autograd.grad(y, mine, dout.to(y.dtype))]
    lines = [f"checked {CHECKS[index]}:"]
    for i, name in enumerate(("y", *leaves)):
        exact = found["exact"][i].double()
        ours, theirs = (
            ((found[side][i].double() - exact).norm() / exact.norm()).item() for side in ("triton", "torch")
        )
        lines.append(f"{name} {ours:.1e} (torch backend {theirs:.1e})")
        assert ours <= max(2 * theirs, 1e-3), f"{CHECKS[index]}: the gradient of {name} is wrong by {ours}"
        assert torch.equal(found["triton"][i], found["again"][i]), f"{name} differs from run to run"
    print(*lines, flush=True)


# --- layers


def step(call: Forward, x_TH: Tensor, dout: Tensor, parameters: list[Tensor]) -> None:
    x_TH.grad = None
    for parameter in parameters:
        parameter.grad = None
    out = call(x_TH)
    out.backward(dout if out.shape == dout.shape else dout[:, : out.shape[1]].to(out.dtype))


def bytes_of(call: Forward, x_TH: Tensor, dout: Tensor, parameters: list[Tensor]) -> tuple[int, int, int]:
    """(saved for the backward beyond x and parameters, peak of the forward, peak of both less all gradients)."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x_TH, *parameters)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    step(call, x_TH, dout, parameters)
    x_TH.grad = None
    for parameter in parameters:
        parameter.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(x_TH)
    forward = torch.cuda.max_memory_allocated() - before
    out.backward(dout if out.shape == dout.shape else dout[:, : out.shape[1]].to(out.dtype))
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(tensor.grad.nbytes for tensor in (x_TH, *parameters) if tensor.grad is not None)
    return sum(saved.values()), forward, max(forward, peak - gradients)


def replayed_ms(call: Forward, x_TH: Tensor, dout: Tensor, parameters: list[Tensor]) -> float:
    """Of a step as a CUDA graph, so that the host plays no part."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(call, x_TH, dout, parameters)
    torch.cuda.current_stream().wait_stream(aside)
    return replay_ms([partial(step, call, x_TH, dout, parameters)])


def measure_layers(layers: list[tuple[str, int]]) -> list[dict]:
    rows, built = [], None
    for case, T in layers:
        if built is None or built[0] != case:
            built = None
            torch.cuda.empty_cache()
            built = case, *trained(case)
        _, layer, parameters = built
        config = layer.config
        x_TH = torch.randn(T, config.hidden_size, device="cuda").to(DTYPE).requires_grad_()
        dout = torch.randn(T, config.hidden_size, device="cuda").to(DTYPE)
        for share in ZERO_SHARES:
            with torch.no_grad():
                steer(layer, share, None)
                zero = shares(layer.router(x_TH).topk_ids_TK, config.num_experts).zero
            real = round((1 - zero) * T * config.top_k)
            calls = {name: make(layer) for name, make in SIDES.items()}
            sizes = {name: bytes_of(call, x_TH, dout, parameters) for name, call in calls.items()}
            spent: dict[str, list[float]] = {name: [] for name in calls}
            for repeat in range(REPEATS + 1):
                for name, call in calls.items():
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    for _ in range(STEPS):
                        step(call, x_TH, dout, parameters)
                    end.record()
                    end.synchronize()
                    if repeat:
                        spent[name].append(start.elapsed_time(end) / STEPS)
            graphs = {name: replayed_ms(calls[name], x_TH, dout, parameters) for name in ("triton", "router")}
            flops = 18 * real * config.hidden_size * config.intermediate_size
            for name, times in spent.items():
                ms = statistics.median(times)
                saved, forward, peak = sizes[name]
                row = {"case": case, "tokens": T, "zero_share": round(zero, 3), "side": name, "ms": round(ms, 3)}
                row |= {"tflops": 0 if name == "router" else round(flops / ms / 1e9, 1)}
                row |= {"graph_ms": round(graphs[name], 3) if name in graphs else None, "saved_mb": round(saved / 1e6)}
                rows.append(row | {"forward_peak_mb": round(forward / 1e6), "peak_mb": round(peak / 1e6)})
                print(*(f"{key} {value}" for key, value in rows[-1].items()), sep="  ", flush=True)
    return rows


@contextmanager
def one_after_the_other() -> Iterator[None]:
    """No launch begins before the one before it ends; else the time of a launch holds that of waiting for others."""
    can_overlap = launch._can_overlap
    launch._can_overlap = lambda device: False
    yield
    launch._can_overlap = can_overlap


def measure_launches(layers: list[tuple[str, int]]) -> list[dict]:
    rows, calls = [], 8
    for case, T in layers:
        torch.cuda.empty_cache()
        layer, parameters = trained(case)
        x_TH = torch.randn(T, layer.config.hidden_size, device="cuda").to(DTYPE).requires_grad_()
        dout = torch.randn_like(x_TH)
        call = by_backend(layer, "triton")
        with one_after_the_other():
            step(call, x_TH, dout, parameters)
        with one_after_the_other(), profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(calls):
                step(call, x_TH, dout, parameters)
            torch.cuda.synchronize()
        spent = {event.key: event.self_device_time_total / calls for event in seen.key_averages()}
        found = sorted(((us, name) for name, us in spent.items() if us > 0), reverse=True)
        print(f"{case} T = {T}: {sum(us for us, _ in found):.0f} us in launches", flush=True)
        for us, name in found:
            print(f"  {us:8.1f}  {name[:100]}", flush=True)
            rows.append({"case": case, "tokens": T, "launch": name, "microseconds": round(us, 2)})
    return rows


# --- tiles

# block_m, block_n, block_k, warps, stages; gate_up's and the rows' products are those of benchmarks/gpu/tiles.py.
GRAD_PREACT = [
    (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 6), (128, 128, 64, 4, 3),
]  # fmt: skip
AT_ONCE = (16, 32, 64)
GRAD_ROWS = [
    (128, 256, 64, 8, 4, True, PROCESSORS, True), (128, 256, 64, 8, 3, True, PROCESSORS, True),
    (128, 256, 64, 8, 4, True), (128, 256, 64, 8, 3, True), (128, 128, 64, 8, 3, True), (128, 128, 128, 8, 3, True),
    (128, 128, 64, 4, 3, True),
]  # fmt: skip
GRAD_WEIGHT = [
    (128, 256, 64, 8, 3, False), (128, 256, 64, 8, 4, False), (256, 128, 64, 8, 3, False), (128, 128, 64, 8, 3, False),
    (128, 128, 64, 4, 3, False), (128, 256, 32, 8, 6, False),
]  # fmt: skip
GATE_UP = [(192, 128, 32, 8, 5, True), (128, 128, 64, 8, 4, True), (128, 128, 64, 8, 3, True)]

Job = tuple[str, Product, int]  # which launch, its tiles, columns that grad_preact turns into gradients at once


def jobs_of() -> list[Job]:
    found = [("preact", Product(*size, True), n) for size in GRAD_PREACT for n in AT_ONCE if n <= size[1]]
    found += [("rows", Product(*size), 0) for size in GRAD_ROWS]
    found += [(name, Product(*size), 0) for name in ("w13", "w2") for size in GRAD_WEIGHT]
    return found + [("gate_up", Product(*size), 0) for size in GATE_UP]


class Backward:
    """Weights of a case, or of one expert alone, and what each launch of the backward needs."""

    def __init__(self, case: str, T: int, experts: int | None = None) -> None:
        shape = shapes(case)
        self.H, self.I, self.K = shape["hidden_size"], shape["intermediate_size"], shape["top_k"]
        self.E = experts or shape["num_experts"]
        A = self.E + (0 if experts else shape["num_zero_experts"])
        make = {"device": "cuda", "dtype": DTYPE}
        self.w13 = torch.empty(self.E, 2 * self.I, self.H, **make).normal_(std=self.H**-0.5)
        self.w2 = torch.empty(self.E, self.H, self.I, **make).normal_(std=self.I**-0.5)
        self.x, self.dout = torch.randn(T, self.H, **make), torch.randn(T, self.H, **make)
        if experts:
            self.ids = torch.zeros(T, self.K, dtype=torch.int64, device="cuda")
        else:
            self.ids = torch.rand(T, A, device="cuda").topk(self.K).indices
        self.weights = torch.rand(T, self.K, device="cuda")
        self.plans = {}
        for block_m in (128, 192):
            rules = {"num_experts": self.E, "num_slots": -1, "block_m": block_m, "kinds": ()}
            self.plans[block_m] = plan_tiles(self.weights, self.ids, **rules)
        self.row_token, slot_row, self.offsets, self.tiles, *_ = self.plans[128]
        self.row_weight = row_weights(slot_row, self.weights)
        self.preact = torch.randn(T * self.K, 2 * self.I, **make)
        self.dpreact = torch.randn(T * self.K, 2 * self.I, **make)
        self.inner = torch.randn(T * self.K, self.I, **make)

    def run(self, job: Job) -> Tensor:
        name, product, at_once = job
        if name == "preact":
            out = torch.empty_like(self.preact)
            plan = self.offsets, self.tiles[0], self.w2
            grad_preact(
                self.dout, self.row_token, self.row_weight, *plan, self.preact, out, "silu", product, want_inner=True,
                columns_at_once=at_once,
            )  # fmt: skip
            return out
        if name == "rows":
            return grad_rows(self.dpreact, self.offsets, self.tiles[0], self.w13, product, len(self.x))
        if name == "gate_up":
            row_token, _, offsets, tiles, *_ = self.plans[product.block_m]
            out = torch.empty_like(self.preact)
            gate_up(self.x, row_token, offsets, tiles[0], self.w13, "silu", product, out)
            return out
        left = name == "w2"
        rows, tokens = (self.inner, self.dout) if left else (self.dpreact, self.x)
        return grad_weight(rows, tokens, self.row_token, self.offsets, product, tokens_first=left)


def compile_one(job: tuple[str, Job | int | None]) -> str:
    """Compile by running on one expert; what is wrong with it, or nothing. None: the whole layer. A number: a check."""
    case, variant = job
    if isinstance(variant, int):
        check(variant)
        return ""
    few = Backward(case, 256, experts=1)
    if variant is None:
        plan, T = few.plans[192][:4], 256
        x, w13, w2, weights = (t.clone().requires_grad_() for t in (few.x, few.w13, few.w2, few.weights))
        affine = torch.zeros(T, device="cuda"), None, None
        moe_ffn_tiles_train(x, weights, plan, 192, w13, w2, affine, "silu").backward(few.dout)
        torch.cuda.synchronize()
        return ""
    try:
        few.run(variant)
        torch.cuda.synchronize()
    except triton.runtime.errors.OutOfResources as error:
        return str(error)
    return ""


def measure_tiles(layers: list[tuple[str, int]], broken: set) -> list[dict]:
    rows = []
    for case, T in layers:
        torch.cuda.empty_cache()
        layer = Backward(case, T)
        real = int(layer.offsets[-1])
        forward = schedule(training_rows_per_tile(T, layer.K, layer.E * 3 // 2), T, layer.K, layer.w13, layer.w2)
        back = backward_schedule(forward.block_m, layer.w13, layer.w2)
        taken = {"preact": (back.preact, 32), "rows": (back.rows, 0), "w13": (back.weight, 0), "w2": (back.weight, 0)}
        taken["gate_up"] = forward.gate_up, 0
        judges: dict[str, Tensor] = {}
        for name, (product, at_once) in taken.items():
            out = layer.run((name, product, at_once))
            judges[name] = (out if name in ("w13", "w2") else out[:real]).float()
        found: dict[str, list[dict]] = {name: [] for name in taken}
        for job in jobs_of():
            name, product, at_once = job
            if (case, job) in broken:
                continue
            out = layer.run(job)
            wanted = judges[name]
            error = (((out if name in ("w13", "w2") else out[:real]).float() - wanted).norm() / wanted.norm()).item()
            assert error < 1e-2, f"{name} {product} is wrong by {error}"
            del out
            ms = replay_ms([partial(layer.run, job)])
            flops = real * layer.H * layer.I * (2 if name in ("preact", "w2") else 4)
            row = {"case": case, "tokens": T, "product": name}
            row |= dict(zip([field.name for field in fields(product)], astuple(product), strict=True))
            row |= {"at_once": at_once, "ms": round(ms, 4), "tflops": round(flops / ms / 1e9, 1)}
            found[name].append(row | {"chosen": (product, at_once) == taken[name]})
        for name, times in found.items():
            times.sort(key=lambda row: row["ms"])
            print(f"{case} T = {T} {name}:", flush=True)
            for row in times[:4] + [row for row in times[4:] if row["chosen"]]:
                print("  ", *(f"{key} {value}" for key, value in list(row.items())[3:]), flush=True)
            rows += times
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="layers,launches,tiles", help="parts, with commas")
    parser.add_argument("--case", choices=sorted({case for case, _ in LAYERS}), help="this one alone")
    results_csv.add_options(parser)
    args = parser.parse_args()
    parts, started = args.only.split(","), time.time()

    def write(name: str, rows: list[dict]) -> None:
        print(f"{name}: {time.time() - started:.0f} s since the start", flush=True)
        results_csv.write(name, rows, args)

    layers = [(case, T) for case, T in LAYERS if args.case in (None, case)]
    large = [(case, T) for case, T in layers if T == 16384]
    jobs: list[tuple[str, Job | int | None]] = [("check", index) for index in range(len(CHECKS))]
    jobs += [(case, None) for case, _ in large]
    if "tiles" in parts:
        jobs += [(case, job) for case, _ in large for job in jobs_of()]
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(jobs))) as pool:
        errors = pool.map(compile_one, jobs, chunksize=1)
    broken = {job for job, error in zip(jobs, errors, strict=True) if error}
    print(
        f"{len(jobs)} compiled or checked in {time.time() - started:.0f} s, {len(broken)} need more than there is",
        flush=True,
    )
    if "layers" in parts:
        write("training", measure_layers(layers))
    if "launches" in parts:
        write("training_launches", measure_launches(large))
    if "tiles" in parts:
        write("training_tiles", measure_tiles(large, broken))


if __name__ == "__main__":
    main()
