"""What the GPU scripts of this folder share: where their CSVs go, and what each row says of its origin."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import triton

from zemoe.bench.csv_files import write_csv
from zemoe.machine import commit


def add_options(parser: argparse.ArgumentParser) -> None:
    """--output and --commit."""
    parser.add_argument("--output", type=Path, help="folder for <device>/<name>.csv")
    parser.add_argument("--commit", help="what to write for the commit; default: what git says")


def write(name: str, rows: list[dict], args: argparse.Namespace) -> None:
    """Write `rows` with commit, device and versions to <output>/<device>/<name>.csv; nothing without --output."""
    if args.output is None or not rows:
        return
    device = torch.cuda.get_device_name()
    origin = {"commit": args.commit or commit(), "device": device}
    origin |= {"torch": torch.__version__, "triton": triton.__version__}
    path = args.output / device.split(" HBM")[0].lower().replace(" ", "-") / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, [row | origin for row in rows])
    print(path)
