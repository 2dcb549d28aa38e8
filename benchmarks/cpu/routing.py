"""`zemoe.select_experts` on a CPU beside plain `softmax` + `topk`, which neither breaks ties nor masks nor scales.

    python benchmarks/cpu/routing.py --output benchmarks/results

Medians of interleaved runs on fresh random logits, microseconds. Writes routing.csv into cpu-<capability>.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from zemoe import select_experts
from zemoe.bench.csv_files import write_csv
from zemoe.bench.timing import interleaved
from zemoe.machine import commit

SLOTS = ((64, 32), (512, 256))  # E, Z
TOKENS = (1, 64, 1024, 4096)
K = 12


@torch.inference_mode()
def run() -> list[dict[str, object]]:
    rows = []
    for E, Z in SLOTS:
        rules = {"num_experts": E, "zero_expert_kinds": (("identity", Z),), "routed_scaling_factor": 6.0}
        sides = {
            "plain": lambda logits: logits.softmax(-1).topk(K, -1),
            "ours": lambda logits, rules=rules: select_experts(logits, K, **rules),
        }
        for T in TOKENS:
            logits = torch.randn(T, E + Z)
            assert torch.equal(sides["ours"](logits)[1], sides["plain"](logits)[1])
            repeats = 300 if T <= 64 else 15
            seconds = interleaved(sides, [torch.randn(T, E + Z) for _ in range(repeats + 2)])
            plain, ours = (1e6 * statistics.median(seconds[name][2:]) for name in ("plain", "ours"))
            rows.append(
                {"A": E + Z, "K": K, "T": T, "plain_us": f"{plain:.0f}", "ours_us": f"{ours:.0f}",
                 "ratio": f"{ours / plain:.2f}"}
            )  # fmt: skip
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder of results; a folder cpu-<capability> is made in it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = run()
    if args.output is None:
        return
    about = {"threads": args.threads, "seed": args.seed, "commit": commit(), "torch": torch.__version__}
    folder = args.output / f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "routing.csv", [row | about for row in rows])


if __name__ == "__main__":
    main()
