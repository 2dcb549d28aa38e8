"""Whether it pays to let launches overlap (programmatic dependent launch), by case and number of tokens.

    python benchmarks/gpu/overlap.py --output benchmarks/results

The same CUDA graph with all launches overlapping and with none, in turn: of the layer without gradients, and, at 16384
tokens, of forward and backward. `kernels/triton/launch.py` takes its bound from here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from training import step, trained
from zemoe.bench.baselines import by_backend
from zemoe.bench.cases import build, load_cases
from zemoe.kernels.triton import launch

sys.path.insert(0, str(Path(__file__).parents[1]))  # results_csv
import results_csv

TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
REPEATS = 15


@contextmanager
def most_tokens(bound: int) -> Iterator[None]:
    """Launches overlap for up to `bound` tokens."""
    taken = launch._MOST_TOKENS
    launch._MOST_TOKENS = bound
    yield
    launch._MOST_TOKENS = taken


def compare(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of `call`, overlapping and not."""
    graphs = {}
    for name, bound in (("overlapping_ms", 2**31), ("plain_ms", 0)):
        with most_tokens(bound):
            call()
            torch.cuda.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                call()
    spent: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPEATS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            spent[name].append(start.elapsed_time(end))
    return {name: round(statistics.median(times), 4) for name, times in spent.items()}


def training_step(case: str, T: int) -> Callable[[], None]:
    layer, parameters = trained(case)
    x_TH = torch.randn(T, layer.config.hidden_size, device="cuda").bfloat16().requires_grad_()
    return partial(step, by_backend(layer, "triton"), x_TH, torch.randn_like(x_TH), parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results_csv.add_options(parser)
    args = parser.parse_args()
    rows: list[dict] = []

    def add(case: str, what: str, T: int, times: dict[str, float]) -> None:
        rows.append({"case": case, "what": what, "tokens": T} | times)
        print(*(f"{key} {value}" for key, value in rows[-1].items()), sep="  ", flush=True)

    for case in ("lite", "research"):
        layer = build(load_cases()[case], torch.bfloat16, torch.device("cuda"))
        for T in TOKENS:
            x_TH = torch.randn(T, layer.config.hidden_size, device="cuda").bfloat16()
            with torch.no_grad():
                add(case, "inference", T, compare(partial(layer, x_TH)))
        del layer
        torch.cuda.empty_cache()
        add(case, "training", TOKENS[-1], compare(training_step(case, TOKENS[-1])))
        torch.cuda.empty_cache()
    results_csv.write("overlap", rows, args)


if __name__ == "__main__":
    main()
