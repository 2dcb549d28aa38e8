"""LongCat's MoE layer inside vLLM's own module tree on a GPU: vLLM's, zemoe's, and zemoe's around vLLM's experts.

    python benchmarks/gpu/vllm_layer.py --output benchmarks/results --shape lite flash \
        --tokens 1 8 64 512 1024 4096 16384

vLLM's configuration, one-rank process group, forward context, weight loaders and compiler; all sides share one set of
experts. Each side is checked against zemoe.reference in float64 before it is timed. Modes:

    eager            calls in a row between two events, Python's launches included
    replay           CUDA graphs of it, up to 512 tokens, with new inputs and so new routing before each replay
    compiled         as eager, compiled by vLLM's own `support_torch_compile`
    compiled-replay  CUDA graphs of that: what vLLM runs by default when it decodes
    threads          not timed: two threads, a stream each, at the same time, must give what one after the other gives
                     (harder than vLLM's dual-batch overlap, which lets its two threads run in turn)

T tokens, H hidden size.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # results_csv
import results_csv

os.environ |= {"VLLM_DISABLE_COMPILE_CACHE": "1", "VLLM_NO_USAGE_STATS": "1"}  # its cache would not tell sides apart

import torch
import vllm
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.profiler import ProfilerActivity, profile
from vllm.forward_context import set_forward_context
from vllm_sides import Compiled, Layers, engine

from zemoe.bench import check, timing
from zemoe.bench.cases import load_cases

TOKENS = (1, 8, 64, 512, 1024, 4096, 16384)
MODES = ("eager", "replay", "compiled", "compiled-replay", "threads")
MOST_REPLAYED = 512  # tokens, as many as vLLM captures by default
CALLS = 4  # in a row or in a graph, each with an input of its own
WARMUP = 2  # rounds
IN_THREADS = 8  # calls of each thread
RIGHT = "right"
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16

Calls = dict[str, Callable[[Tensor], Tensor]]


class Shape:
    """The sides at one shape, as they are and compiled, and the rows of the CSV that they make."""

    def __init__(self, layers: Layers, compiled: Calls, left_out: dict[str, str], rounds: int, start: float) -> None:
        self.layers, self.rounds, self.start = layers, rounds, start
        self.calls: dict[bool, Calls] = {False: dict(layers.sides), True: compiled}
        self.left_out = left_out  # why a side was not compiled
        self.rows: list[dict] = []

    def inputs(self, T: int, count: int) -> list[Tensor]:
        H = self.layers.case.hidden_size
        return [torch.randn(T, H, device=DEVICE).to(DTYPE) for _ in range(count)]

    def checked(self, T: int) -> tuple[Tensor, check.Expected]:
        """An input and what of the output is known to be right."""
        while True:
            (x_TH,) = self.inputs(T, 1)
            wanted = check.expected(self.layers.known, x_TH)
            if wanted.tokens:
                return x_TH, wanted

    def timed(self, T: int, modes: list[str]) -> None:
        x_TH, wanted = self.checked(T)
        for mode in modes:
            sides = self.calls[mode.startswith("compiled")]
            verdicts = dict(self.left_out) if mode.startswith("compiled") else {}
            counts: dict[str, float] = {}
            if not mode.endswith("replay"):
                verdicts |= {name: check.judge(call(x_TH), wanted) or RIGHT for name, call in sides.items()}
                right = {name: call for name, call in sides.items() if verdicts[name] == RIGHT}
                counts = {name: launches(call, x_TH) for name, call in right.items()}
                inputs = self.inputs(T, CALLS)
                ms = in_a_row(right, inputs * (1 if T > MOST_REPLAYED else 4), self.rounds)
            elif T <= MOST_REPLAYED:
                ms = self.replayed(sides, x_TH, wanted, verdicts)
            else:
                continue
            self.add(T, mode, ms, verdicts, counts)

    def threads(self, T: int) -> None:
        found = {name: in_threads(call, self.inputs(T, 2)) for name, call in self.calls[False].items()}
        self.add(T, "threads", {}, found, {})

    def replayed(self, sides: Calls, x_TH: Tensor, wanted: check.Expected, verdicts: dict) -> dict[str, float]:
        """Milliseconds a call of the sides whose graph, captured on other inputs, is right about x."""
        T, static = len(x_TH), self.inputs(len(x_TH), CALLS)
        replays = {}
        for name, call in sides.items():
            replay = timing.capture(call, static)
            for at, out_TH in enumerate(replay.outputs):
                kept = static[at].clone()
                static[at].copy_(x_TH)
                out_TH.fill_(float("nan"))
                replay.graph.replay()
                verdicts[name] = check.judge(out_TH, wanted) or RIGHT
                static[at].copy_(kept)
                if verdicts[name] != RIGHT:
                    break
            else:
                replays[name] = replay
        batches = [self.inputs(T, CALLS) for _ in range(WARMUP + self.rounds)]
        return medians(timing.cuda_replays(replays, {}, batches)) if replays else {}

    def add(self, T: int, mode: str, ms: dict[str, float], verdicts: dict[str, str], counts: dict[str, float]) -> None:
        """A row a side, and one line on the screen."""
        case, cells, notes = self.layers.case, [], []
        for name, verdict in verdicts.items():
            ratio = ms[name] / ms["zemoe"] if name in ms and "zemoe" in ms else None
            row = {"shape": case.name, "tokens": T, "mode": mode, "side": name}
            row |= {"ms": round(ms[name], 5) if name in ms else "-", "ratio": round(ratio, 3) if ratio else "-"}
            self.rows.append(row | {"launches": counts.get(name, "-"), "verdict": verdict, "vllm": vllm.__version__})
            cell = f"{name} {ms[name]:.4f} ms" if name in ms else f"{name} {RIGHT if verdict == RIGHT else '-'}"
            cell += f" ({ratio:.2f}x)" if ratio and name != "zemoe" else ""
            cells.append(cell + (f" {counts[name]:g} launches" if name in counts else ""))
            notes += [f"{name}: {verdict}"] if verdict != RIGHT else []
        spent = time.perf_counter() - self.start
        print(f"[{spent:5.1f} s] {case.name} T = {T} {mode}: {', '.join(cells)}", *notes, sep="\n    ", flush=True)


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds, without the first rounds."""
    return {name: 1e3 * statistics.median(values[WARMUP:]) for name, values in seconds.items()}


def in_a_row(sides: Calls, inputs: list[Tensor], rounds: int) -> dict[str, float]:
    """Milliseconds a call, the sides in turn, and in the opposite order every second time."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WARMUP + rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for x_TH in inputs:
                sides[name](x_TH)
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / len(inputs))
    return medians(seconds)


def launches(call: Callable[[Tensor], Tensor], x_TH: Tensor) -> float:
    """What the device does for one call: kernels, copies and fills, counted by the profiler."""
    call(x_TH)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            call(x_TH)
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.self_device_time_total > 0) / CALLS


def in_threads(call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> str:
    """Whether two threads with a stream each, at the same time, get what one call after the other gets: bits."""
    alone = [call(x_TH).clone() for x_TH in inputs]
    torch.cuda.synchronize()
    together = threading.Barrier(len(inputs))

    def work(x_TH: Tensor) -> list[Tensor]:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            together.wait()
            outs = [call(x_TH).clone() for _ in range(IN_THREADS)]
            torch.cuda.current_stream().synchronize()
        return outs

    with ThreadPoolExecutor(len(inputs)) as pool:
        futures = [pool.submit(work, x_TH) for x_TH in inputs]
    for error in filter(None, (future.exception() for future in futures)):
        return f"wrong: {type(error).__name__} in a thread"
    pairs = [(out_TH, alone[which]) for which, future in enumerate(futures) for out_TH in future.result()]
    wrong = sum(not torch.equal(*pair) for pair in pairs)
    return f"wrong: {wrong} of {len(pairs)} outputs differ" if wrong else RIGHT


def compile_all(layers: Layers, config: vllm.config.VllmConfig, T: int) -> tuple[Calls, dict[str, str]]:
    """The sides compiled by vLLM's own backend, and why the others are not."""
    compiled, left_out = {}, {}
    for name, side in layers.sides.items():
        call = Compiled(vllm_config=config, prefix=f"compiled.{name}", layer=side)
        try:
            call(torch.zeros(T, layers.case.hidden_size, device=DEVICE, dtype=DTYPE))
        except TorchDynamoException as error:
            left_out[name] = f"not compiled: {str(error).splitlines()[0]}"
            continue
        compiled[name] = call
    return compiled, left_out


def operators(layer: nn.Module, x_TH: Tensor) -> str:
    """The operators in the one graph that torch.compile makes of a layer."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    torch.compile(layer, fullgraph=True, backend=backend)(x_TH)
    return ", ".join(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["lite"], choices=list(load_cases()))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--repeats", type=int, default=11, help="rounds that are timed (default: %(default)s)")
    results_csv.add_options(parser)
    args = parser.parse_args()
    start, rows = time.perf_counter(), []
    torch.manual_seed(0)
    for name in args.shape:
        with engine(max(*args.tokens, 2048), DEVICE) as config:
            layers = Layers(load_cases()[name], config, DEVICE, DTYPE)
            print(f"[{time.perf_counter() - start:5.1f} s] {name}: loaded", flush=True)
            with torch.inference_mode(), set_forward_context(None, config):
                compiled, left_out = {}, {}
                if any(mode.startswith("compiled") for mode in args.modes):
                    compiled, left_out = compile_all(layers, config, max(args.tokens))
                shape = Shape(layers, compiled, left_out, args.repeats, start)
                for T in args.tokens:
                    shape.timed(T, [mode for mode in args.modes if mode != "threads"])
                    results_csv.write("vllm_layer", rows + shape.rows, args)
                print("in zemoe's graph:", operators(layers.sides["zemoe"], shape.inputs(64, 1)[0]), flush=True)
                for T in args.tokens if "threads" in args.modes else ():  # last: what goes wrong may end the process
                    shape.threads(T)
        rows += shape.rows
        results_csv.write("vllm_layer", rows, args)
        del layers, compiled, shape, config
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    if any(row["side"] == "zemoe" and row["verdict"] != RIGHT for row in rows):
        sys.exit("zemoe is wrong")


if __name__ == "__main__":
    main()
