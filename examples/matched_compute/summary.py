"""Sum up what run.py wrote: CSV files, plots, and the tables of the page: see README.md in this folder.

    python examples/matched_compute/summary.py runs/matched.jsonl

Confidence intervals are over seeds by Student's t; differences are paired by seed, and by held-out document for the
share of chance that lies in the text. Needs numpy and matplotlib.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arms import ARMS
from kinds import KINDS
from plots import draw
from run import read_runs

from zemoe.bench.csv_files import write_csv

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Student's t, two-sided 95 %, by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
PAIRS = [(name, arm.plain) for name, arm in ARMS.items() if arm.zero] + [
    ("null4", "identity4"),
    ("moepp4", "identity4"),
]
PAIRS += [("plain3", "plain4"), ("plain5", "plain4")]
AVERAGED = "bits_per_byte", "ffn_experts", "ffn_std", "bits_per_byte_as_trained", "ffn_experts_as_trained"
AVERAGED += "ffn_experts_in_training", "step_ms"
RESAMPLES = 10_000

Rows = list[dict[str, Any]]


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval); NaN for the latter with one value."""
    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        return float(data.mean()), math.nan
    return float(data.mean()), T_95[len(data) - 1] * float(data.std(ddof=1)) / math.sqrt(len(data))


def of_arm(runs: Rows, arm: str) -> Rows:
    return sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])


def run_rows(runs: Rows) -> Rows:
    """One row a run."""
    return [
        {
            "arm": run["arm"],
            "seed": run["seed"],
            "ffn_target": run["ffn_target"],
            "bits_per_byte": run["heldout"]["bits_per_byte"],
            "ffn_experts": run["heldout"]["ffn_experts"],
            "ffn_std": run["heldout"]["ffn_std"],
            "bits_per_byte_as_trained": run["heldout_as_trained"]["bits_per_byte"],
            "ffn_experts_as_trained": run["heldout_as_trained"]["ffn_experts"],
            "ffn_experts_in_training": float(np.mean(run["curve"]["ffn_by_layer"])),
            "train_bits_per_token": run["curve"]["loss"][-1] / math.log(2),
            "step_ms": run["step_ms"],
            "max_over_mean_load": max(run["heldout"]["max_over_mean_load_by_layer"]),
            "dead_experts": run["heldout"]["dead_experts"],
            "parameters": run["parameters"],
            "tokens_seen": run["tokens_seen"],
            "learning_rate": run["settings"]["learning_rate"],
            "seconds": run["seconds"],
            "backend": run["settings"]["backend"],
            "device": run["device"],
            "torch": run["versions"]["torch"],
        }
        for run in runs
    ]


def arm_rows(runs: Rows) -> Rows:
    """One row an arm: means over seeds with their intervals."""
    rows = []
    for name, arm in ARMS.items():
        mine = run_rows(of_arm(runs, name))
        if not mine:
            continue
        row: dict[str, Any] = {"arm": name, "label": arm.label, "seeds": len(mine)}
        for key in AVERAGED:
            row[key], row[f"{key}_ci95"] = interval([run[key] for run in mine])
        row["parameters"], row["dead_experts"] = mine[0]["parameters"], sum(run["dead_experts"] for run in mine)
        row["max_over_mean_load"] = max(run["max_over_mean_load"] for run in mine)
        rows.append(row)
    return rows


def over_documents(mine: Rows, theirs: Rows) -> tuple[float, float]:
    """95 % bootstrap interval over held-out documents of the difference in bits a byte, averaged over seeds."""
    sizes = np.asarray(mine[0]["readings"]["bytes_by_document"], dtype=float)
    nats = [np.mean([run["readings"]["nats_by_document"] for run in runs], axis=0) for runs in (mine, theirs)]
    drawn = np.random.default_rng(0).integers(len(sizes), size=(RESAMPLES, len(sizes)))
    differences = (nats[0] - nats[1])[drawn].sum(1) / sizes[drawn].sum(1) / math.log(2)
    return tuple(float(value) for value in np.quantile(differences, [0.025, 0.975]))


def pair_rows(runs: Rows) -> Rows:
    """One row a comparison: the first arm less the second, seeds that both have. Negative: the first is better."""
    rows = []
    for first, second in PAIRS:
        seeds = {run["seed"] for run in of_arm(runs, first)} & {run["seed"] for run in of_arm(runs, second)}
        if not seeds:
            continue
        mine, theirs = ([r for r in of_arm(runs, name) if r["seed"] in seeds] for name in (first, second))
        row: dict[str, Any] = {"arm": first, "against": second, "seeds": len(seeds)}
        for key, where in (("bits_per_byte", "heldout"), ("bits_per_byte_as_trained", "heldout_as_trained")):
            both = zip(mine, theirs, strict=True)
            differences = [a[where]["bits_per_byte"] - b[where]["bits_per_byte"] for a, b in both]
            row[key], row[f"{key}_ci95"] = interval(differences)
        row["document_low"], row["document_high"] = over_documents(mine, theirs)
        ratios = [a["step_ms"] / b["step_ms"] for a, b in zip(mine, theirs, strict=True)]
        row["step_time_ratio"], row["step_time_ratio_ci95"] = interval(ratios)
        rows.append(row)
    return rows


def kind_rows(runs: Rows) -> Rows:
    """FFN experts a token by the kind of token read: all layers, each layer."""
    rows = []
    for name in ARMS:
        mine = of_arm(runs, name)
        for kind in KINDS if mine and ARMS[name].zero else ():
            entries = [run["readings"]["kinds"][kind] for run in mine]
            if any(entry["ffn_by_layer"] is None for entry in entries):
                continue
            by_layer = np.mean([entry["ffn_by_layer"] for entry in entries], axis=0)
            mean, half = interval([float(np.mean(entry["ffn_by_layer"])) for entry in entries])
            row = {"arm": name, "kind": kind, "tokens": entries[0]["tokens"], "ffn_experts": mean, "ci95": half}
            rows.append(row | {f"layer_{i}": float(value) for i, value in enumerate(by_layer)})
    return rows


def fifth_rows(runs: Rows) -> Rows:
    """FFN experts a token by how hard the next token was for the same model, easiest fifth first."""
    rows = []
    for name in ARMS:
        mine = of_arm(runs, name)
        for i in range(len(mine[0]["readings"]["fifths_of_loss"]) if mine and ARMS[name].zero else 0):
            entries = [run["readings"]["fifths_of_loss"][i] for run in mine]
            mean, half = interval([float(np.mean(entry["ffn_by_layer"])) for entry in entries])
            nats = float(np.mean([entry["nats"] for entry in entries]))
            rows.append({"arm": name, "fifth": i + 1, "nats": nats, "ffn_experts": mean, "ci95": half})
    return rows


def layer_rows(runs: Rows) -> Rows:
    rows = []
    for name in ARMS:
        mine = of_arm(runs, name)
        for i in range(len(mine[0]["heldout"]["ffn_by_layer"]) if mine else 0):
            mean, half = interval([run["heldout"]["ffn_by_layer"][i] for run in mine])
            std = float(np.mean([run["heldout"]["ffn_std_by_layer"][i] for run in mine]))
            rows.append({"arm": name, "layer": i, "ffn_experts": mean, "ci95": half, "std_over_tokens": std})
    return rows


def token_rows(runs: Rows, ends: int = 15) -> Rows:
    """The cheapest and the dearest of the tokens that occur often, mean over seeds."""
    rows = []
    for name, arm in ARMS.items():
        mine = of_arm(runs, name)
        if not mine or not arm.zero:
            continue
        found: dict[str, tuple[int, list[float]]] = {}
        for run in mine:
            for text, count, ffn in run["readings"]["tokens"]:
                found.setdefault(text, (count, []))[1].append(ffn)
        ranked = sorted((float(np.mean(values)), text, count) for text, (count, values) in found.items())
        kept = ranked if len(ranked) <= 2 * ends else ranked[:ends] + ranked[-ends:]
        rows += [{"arm": name, "token": text, "count": count, "ffn_experts": ffn} for ffn, text, count in kept]
    return rows


def curve_rows(runs: Rows) -> Rows:
    """Training loss and FFN experts a token by step; validation in rows of its own."""
    rows = []
    for run in runs:
        head, curve = {"arm": run["arm"], "seed": run["seed"]}, run["curve"]
        for i, step in enumerate(curve["step"]):
            ffn, std = float(np.mean(curve["ffn_by_layer"][i])), float(np.mean(curve["ffn_std_by_layer"][i]))
            rows.append({**head, "step": step, "loss": curve["loss"][i], "ffn_experts": ffn, "ffn_std": std})
        for entry in run["validation"]:
            rows.append({**head, "step": entry["step"], "validation_bits_per_byte": entry["bits_per_byte"]})
    return rows


def rounded(rows: Rows) -> Rows:
    """Return rows with their numbers rounded to six significant digits, as the CSVs have them."""
    return [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]


# ---- the page -------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plus_minus(value: float, half: float, digits: int = 4, sign: bool = False) -> str:
    shown = f"{value:{'+' if sign else ''}.{digits}f}"
    return shown if math.isnan(half) else f"{shown} ± {half:.{digits}f}"


def result_table(runs: Rows) -> str:
    head = [
        "arm",
        "seeds",
        "held-out bits/byte",
        "FFN experts",
        "std over tokens",
        "before calibration",
        "in training",
        "ms a step",
    ]
    rows = [
        [
            row["label"],
            str(row["seeds"]),
            plus_minus(row["bits_per_byte"], row["bits_per_byte_ci95"]),
            f"{row['ffn_experts']:.3f}",
            f"{row['ffn_std']:.2f}",
            f"{row['bits_per_byte_as_trained']:.4f} at {row['ffn_experts_as_trained']:.3f}",
            f"{row['ffn_experts_in_training']:.3f}",
            plus_minus(row["step_ms"], row["step_ms_ci95"], 2),
        ]
        for row in arm_rows(runs)
    ]
    return table(head, rows)


def pair_table(runs: Rows) -> str:
    head = ["arm", "less", "difference in bits/byte, 95 % over seeds", "95 % over documents", "time of a step"]
    rows = [
        [
            ARMS[row["arm"]].label,
            ARMS[row["against"]].label,
            plus_minus(row["bits_per_byte"], row["bits_per_byte_ci95"], sign=True),
            f"{row['document_low']:+.4f} to {row['document_high']:+.4f}",
            f"{row['step_time_ratio']:.3f} x",
        ]
        for row in pair_rows(runs)
    ]
    return table(head, rows)


def kind_table(rows: Rows, key: str) -> str:
    """A column an arm, a line a value of `key`."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = []
    for value in dict.fromkeys(row[key] for row in rows):
        mine = {row["arm"]: row for row in rows if row[key] == value}
        cells = [plus_minus(mine[a]["ffn_experts"], mine[a]["ci95"], 2) if a in mine else "" for a in arms]
        first = next(iter(mine.values()))
        about = f"{first['tokens']:,}" if "tokens" in first else f"{first['nats']:.2f}"
        lines.append([str(value), about, *cells])
    about = "tokens" if rows and "tokens" in rows[0] else "nats"
    return table([key, about, *(ARMS[arm].label for arm in arms)], lines)


def token_table(runs: Rows, ends: int = 8) -> str:
    """Two tables with a column an arm: the cheapest tokens, the cheapest first, and the dearest, the dearest last."""
    columns: dict[str, list[str]] = {}
    for row in token_rows(runs, ends):
        cell = f"`{row['token']!r}` {row['ffn_experts']:.2f}".replace("|", "\\|")
        columns.setdefault(ARMS[row["arm"]].label, []).append(cell)
    half = min((len(cells) // 2 for cells in columns.values()), default=0)
    parts = []
    for title, last in (("The cheapest", False), ("The dearest", True)):
        kept = [cells[len(cells) - half :] if last else cells[:half] for cells in columns.values()]
        rows = [list(line) for line in zip(*kept, strict=True)]
        parts.append(f"{title}:\n\n{table(list(columns), rows)}")
    return "\n\n".join(parts)


def rate_table(runs: Rows, others: Rows) -> str:
    """The first seed at other learning rates, beside the same seed at the chosen one."""
    arms = {run["arm"] for run in others}
    seeds = {run["seed"] for run in others}
    rows = others + [run for run in runs if run["arm"] in arms and run["seed"] in seeds]
    rows.sort(key=lambda run: (run["learning_rate"], list(ARMS).index(run["arm"]), run["seed"]))
    lines = [
        [f"{r['learning_rate']:g}", ARMS[r["arm"]].label, str(r["seed"]), f"{r['bits_per_byte']:.4f}"] for r in rows
    ]
    return table(["learning rate", "arm", "seed", "held-out bits/byte"], lines) if others else "Not run."


def fill_lines(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def about(runs: Rows) -> str:
    first, versions = runs[0], runs[0]["versions"]
    minutes, settings = sum(run["seconds"] for run in runs) / 60, first["settings"]
    seeds = len({run["seed"] for run in runs})
    device, backend = first["device"], settings["backend"] or "default"
    return fill_lines(
        f"{len(runs)} runs ({seeds} seeds) in **{minutes:.1f} minutes** of one {device}, torch {versions['torch']}, "
        f"backend `{backend}`; {settings['steps']:,} steps and {first['tokens_seen']:,} tokens a run "
        f"({first['epochs']:.2f} epochs), {first['parameters']:,} parameters in {ARMS[first['arm']].label}."
    )


def picture(about: str, name: str) -> str:
    """One of the plots, for the page."""
    return f"\n\n![{about}](images/matched-{name}.png)"


def fill(page: Path, parts: dict[str, str]) -> None:
    """Put each part between its two marks, `<!-- name -->` and `<!-- /name -->`."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.S
        )
        if found != 1:
            raise SystemExit(f"{page}: expected one pair of marks <!-- {name} -->, found {found}")
    page.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="CSV files, plots and tables of the experiment at matched compute.")
    parser.add_argument("runs", type=Path, help="what run.py wrote")
    parser.add_argument("--other-rates", type=Path, nargs="*", default=[], help="files of runs at other learning rates")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the CSV files")
    parser.add_argument("--images", type=Path, default=ROOT / "dev" / "images", help="folder for the plots")
    parser.add_argument("--page", type=Path, default=ROOT / "dev" / "matched_compute.md", help="its tables are renewed")
    parsed = parser.parse_args(arguments)
    runs = read_runs(parsed.runs)
    if not runs:
        raise SystemExit(f"{parsed.runs}: no runs in it")
    others = [run for path in parsed.other_rates for run in read_runs(path)]
    kinds, fifths = kind_rows(runs), fifth_rows(runs)
    files = {
        "runs": run_rows(runs),
        "arms": arm_rows(runs),
        "differences": pair_rows(runs),
        "kinds": kinds,
        "loss_fifths": fifths,
        "layers": layer_rows(runs),
        "tokens": token_rows(runs),
        "curves": curve_rows(runs),
    }
    if others:
        files["learning_rates"] = run_rows(others)
    for folder in (parsed.results, parsed.images):
        folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_csv(parsed.results / f"{name}.csv", rounded(rows))
    draw(files, parsed.images)
    parts = {
        "about": about(runs),
        "results": result_table(runs) + picture("Held-out bits/byte by arm", "bits"),
        "differences": pair_table(runs),
        "kinds": kind_table(kinds, "kind") + picture("FFN experts by kind of token", "kinds"),
        "fifths": kind_table(fifths, "fifth"),
        "tokens": token_table(runs),
        "curves": picture("FFN experts a token over training", "experts")
        + picture("Validation bits/byte", "validation"),
        "rates": rate_table(run_rows(runs), run_rows(others)),
    }
    fill(parsed.page, parts)
    print(table(["part", ""], [[name, f"{len(rows)} rows"] for name, rows in files.items()]))


if __name__ == "__main__":
    main()
