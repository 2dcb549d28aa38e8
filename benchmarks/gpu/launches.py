"""What each launch of a layer takes on a GPU, from a profile.

python benchmarks/gpu/launches.py lite:1,64,4096 research:16384 --output benchmarks/results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from zemoe.bench.cases import build, load_cases

sys.path.insert(0, str(Path(__file__).parents[1]))  # results_csv
import results_csv

CALLS = 16  # profiled, after one that compiles
INPUTS = 4


def launches(layer: torch.nn.Module, tokens: int) -> dict[str, float]:
    """Microseconds of each kernel in one call, the mean of CALLS on several inputs, longest first."""
    x = [torch.randn(tokens, layer.config.hidden_size, device="cuda").bfloat16() for _ in range(INPUTS)]
    layer(x[0])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for call in range(CALLS):
            layer(x[call % INPUTS])
        torch.cuda.synchronize()
    spent = {event.key: event.self_device_time_total / CALLS for event in seen.key_averages()}
    return {name: us for name, us in sorted(spent.items(), key=lambda item: -item[1]) if us > 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="+", metavar="CASE:TOKENS,..")
    results_csv.add_options(parser)
    args = parser.parse_args()
    cases, rows = load_cases(), []
    torch.manual_seed(0)
    for case, tokens in (layer.split(":") for layer in args.layers):
        layer = build(cases[case], torch.bfloat16, torch.device("cuda"))
        for T in map(int, tokens.split(",")):
            with torch.inference_mode():
                spent = launches(layer, T)
            print(
                f"{case} T = {T}: {sum(spent.values()):.1f} us;", ", ".join(f"{n} {us:.1f}" for n, us in spent.items())
            )
            rows += [
                {"case": case, "tokens": T, "launch": name, "microseconds": round(us, 2)} for name, us in spent.items()
            ]
        del layer
        torch.cuda.empty_cache()
    results_csv.write("launches", rows, args)


if __name__ == "__main__":
    main()
