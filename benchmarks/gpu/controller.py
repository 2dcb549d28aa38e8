"""How `zemoe train` reaches its budget of FFN experts: the example configuration at batches of 4 to 512 rows.

    python benchmarks/gpu/controller.py TEXT --output benchmarks/results

TEXT: a text file or a folder of them. Each run has 200 steps and all defaults; several run on the GPU at a time. Writes
controller.csv: the mean of FFN experts a token over the last 50 steps, how far any step after the 100th was from K_e,
in all layers together and in the layer where it was worst (shares of K_e), least and most FFN experts in any step,
the busiest expert's load over the mean one's in the last 50 steps, and the held-out score.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # results_csv
import results_csv

EXAMPLE = Path(__file__).parents[2] / "examples" / "train.toml"
ROWS = (4, 8, 16, 32, 64, 128, 256, 512)
SEEDS = (0, 1)


def run(text: str, rows: int, seed: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "zemoe", "train", "--config", str(EXAMPLE), "--data", text, "--out", folder]
        changed = {"train.steps": 200, "train.rows": rows, "train.seed": seed, "report.plots": "false"}
        changed |= {"run.log_every": 1, "run.eval_every": 200, "run.save_every": 200, "run.device": "cuda"}
        command += ["--json", *(part for key, value in changed.items() for part in ("--set", f"{key}={value}"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"rows {rows}: {done.stderr[-500:]}")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = records[0]["k_e"]
    steps = [record for record in records if record["kind"] == "train"]
    scores = [record for record in records if record["kind"] == "eval"]
    used = [step["ffn_experts"] for step in steps]
    layers = [abs(layer["ffn_experts"] - wanted) for step in steps[100:] for layer in step["by_layer"]]
    return {
        "rows": rows,
        "seed": seed,
        "k_e": wanted,
        "last_50": f"{sum(used[-50:]) / 50:.3f}",
        "worst_after_100": f"{max(abs(mean - wanted) for mean in used[100:]) / wanted:.3f}",
        "worst_layer_after_100": f"{max(layers) / wanted:.3f}",
        "least": f"{min(used):.2f}",
        "most": f"{max(used):.2f}",
        "load_last_50": f"{sum(step['max_over_mean_load'] for step in steps[-50:]) / 50:.2f}",
        "heldout_bits_per_byte": f"{scores[-1]['heldout_bits_per_byte']:.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--at-once", type=int, default=8, help="runs on the GPU at a time")
    results_csv.add_options(parser)
    args = parser.parse_args()
    with ThreadPoolExecutor(args.at_once) as pool:
        rows = list(pool.map(lambda case: run(args.text, *case), [(rows, seed) for rows in ROWS for seed in SEEDS]))
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    results_csv.write("controller", rows, args)


if __name__ == "__main__":
    main()
