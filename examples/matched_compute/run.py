"""Run the experiment: every arm with every seed, one line of JSON each: see README.md in this folder.

    python examples/matched_compute/run.py --out runs/matched.jsonl

A run that is in the file already is skipped, so the same command goes on after any interruption. Seeds are the outer
loop: what is there at any time is whole comparisons. No file that is read can hold code.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # decoder, corpus and tiny_model
from arms import ARMS, Settings
from evaluation import Readings, brief, routing_numbers, score
from kinds import read_vocabulary

from tiny_model import Corpus, smoke_corpus
from training import Training

SMOKE = {
    "width": 16,
    "layers": 2,
    "heads": 2,
    "expert_width": 8,
    "context": 64,
    "batch_rows": 16,
    "warmup": 2,
    "calibration": 2,
}


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs in a file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def add_run(path: Path, record: dict[str, Any]) -> None:
    """Append a line; a part of a line that a killed run left behind goes first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def check_settings(runs: list[dict[str, Any]], settings: Settings, device: str, path: Path) -> None:
    """SystemExit if the file holds runs that can't be compared with the new ones."""
    for run in runs:
        changed = {key for key, value in settings.to_dict().items() if run["settings"].get(key) != value}
        if run["device"] != device:
            changed.add("device")
        if changed:
            raise SystemExit(f"{path}: holds runs that differ in {', '.join(sorted(changed))}; choose another --out")


def one_run(training: Training, readings: Readings, advance: Any) -> dict[str, Any]:
    """Train, score as trained, calibrate, score again."""
    settings, arm = training.settings, training.arm
    begin = time.perf_counter()
    validation: list[dict[str, Any]] = []
    milliseconds = training.train(
        lambda step: validation.append({"step": step, **brief(training, "val", score(training, "val"))}), advance
    )
    train_seconds = time.perf_counter() - begin
    as_trained = score(training, "heldout")
    training.calibrate()
    calibrated = score(training, "heldout")
    return {
        "parameters": sum(parameter.numel() for parameter in training.parameters),
        "tokens_seen": settings.steps * settings.batch_rows * settings.context,
        "epochs": settings.steps * settings.batch_rows / training.corpus.rows_an_epoch(settings.context),
        "graph": training.captures,
        "step_ms": sorted(milliseconds)[len(milliseconds) // 2] if milliseconds else None,
        "step_ms_blocks": [round(value, 4) for value in milliseconds],
        "train_seconds": train_seconds,
        "curve": training.curve(),
        "validation": validation,
        "heldout_as_trained": brief(training, "heldout", as_trained),
        "heldout": brief(training, "heldout", calibrated) | routing_numbers(training, calibrated),
        "readings": readings.describe(calibrated, settings.context),
        "ffn_target": arm.ffn_target,
        "seconds": time.perf_counter() - begin,
    }


def sentence(record: dict[str, Any]) -> str:
    """A run in a line, the held-out text before calibration in brackets."""
    now, before = record["heldout"], record["heldout_as_trained"]
    step_ms = "" if record["step_ms"] is None else f", {record['step_ms']:.2f} ms a step"
    return (
        f"{record['arm']:10} seed {record['seed']}: "
        f"{now['bits_per_byte']:.4f} ({before['bits_per_byte']:.4f}) bits/byte, "
        f"{now['ffn_experts']:.3f} ({before['ffn_experts']:.3f}) FFN experts a token{step_ms}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Zero experts beside plain top-k at equal FFN compute a token.")
    parser.add_argument("--out", type=Path, required=True, help="a file of runs; finished ones in it are skipped")
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="what examples/corpus.py wrote")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of the arms, with commas")
    parser.add_argument("--seeds", default="1,2,3", help="with commas")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run that would end after this much time")
    parser.add_argument("--epochs", type=float, default=4.0, help="of the training text, if --steps isn't given")
    parser.add_argument("--steps", type=int, help="of the optimizer")
    for name in ("width", "layers", "expert_width", "context", "batch_rows", "warmup", "calibration"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {getattr(Settings, name)}")
    for name in ("learning_rate", "balance", "bias_rate", "weight_decay"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=f"default: {getattr(Settings, name)}")
    parser.add_argument("--backend", help="of the experts: torch, triton or cpu (default: the first that works)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-graph", action="store_true", help="launch by launch instead of one CUDA graph a step")
    parser.add_argument("--smoke", action="store_true", help="a toy size on made-up text, to see that it works")
    parsed = parser.parse_args(arguments)
    parsed.arms, parsed.seeds = parsed.arms.split(","), [int(seed) for seed in parsed.seeds.split(",")]
    unknown = set(parsed.arms) - set(ARMS)
    if unknown:
        parser.error(f"--arms: {sorted(unknown)} are not among {list(ARMS)}")
    return parsed


def make_settings(parsed: argparse.Namespace, corpus: Corpus) -> Settings:
    changes = {
        key: value for key, value in vars(parsed).items() if key in Settings.__annotations__ and value is not None
    }
    if parsed.smoke:
        changes = SMOKE | changes
    if "steps" not in changes:
        context, rows = changes.get("context", Settings.context), changes.get("batch_rows", Settings.batch_rows)
        changes["steps"] = int(parsed.epochs * (corpus.rows_an_epoch(context) // rows))
    return Settings(**changes)


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    begin = time.perf_counter()
    device = torch.device(parsed.device)
    cuda = device.type == "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        folder = smoke_corpus(Path(scratch)) if parsed.smoke else parsed.corpus
        corpus = Corpus(folder, device)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = make_settings(parsed, corpus)
    device_name = torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu"
    runs = read_runs(parsed.out)
    check_settings(runs, settings, device_name, parsed.out)
    done = {(run["arm"], run["seed"]) for run in runs}
    waiting = [(arm, seed) for seed in parsed.seeds for arm in parsed.arms if (arm, seed) not in done]
    words = read_vocabulary(tokenizer, set(corpus.manifest["special_tokens"].values()))
    readings = Readings(corpus, words)
    about = {
        "settings": settings.to_dict(),
        "device": device_name,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "corpus_sha256": corpus.manifest["sha256"],
    }
    longest = 0.0
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("steps", total=len(waiting) * settings.steps)
        for number, (arm, seed) in enumerate(waiting):
            started = time.perf_counter()
            if started - begin + 1.1 * longest > parsed.minutes * 60:
                print(
                    f"{number} of {len(waiting)} runs done: no time for another; the same command goes on", flush=True
                )
                return
            progress.update(task, description=f"{arm}, seed {seed}")
            training = Training(settings, arm, seed, corpus, device, cuda and not parsed.no_graph)
            try:
                record = {"arm": arm, "seed": seed, **about}
                record |= one_run(training, readings, lambda steps: progress.advance(task, steps))
            finally:
                training.close()
            add_run(parsed.out, record)
            longest = max(longest, time.perf_counter() - started)
            print(f"{sentence(record)}, {time.perf_counter() - started:.1f} s", flush=True)
    print(f"all of {len(parsed.arms) * len(parsed.seeds)} runs are in {parsed.out}", flush=True)


if __name__ == "__main__":
    main()
