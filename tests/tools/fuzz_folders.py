"""Damaged folders through everything that reads them: `make fuzz N=2000 SEED=1`, or `python -m tools.fuzz_folders`.

Each case copies a good checkpoint or run, damages one thing of it (fuzz_mutations.py) and hands it to one reader.
Either the reader refuses: exit code 1 or 2, and one line of at most 500 plain characters that names the file, tensor
or key. Or it gives what the files say, which is computed here another way, with transformers' own layers and tensors
read one by one.
No case may end in a traceback, run code of the folder, hang, or take much more memory than the folder has bytes.

Cases run one after the other in a worker process, so that imports are paid once; it is killed where a case hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from helpers.paths import ROOT
from tools.fuzz_readers import READERS, TOML, make_good_folders

SOURCE = ROOT / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(ROOT / "tests")]), "HF_HUB_OFFLINE": "1"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
SECONDS = 60  # a case that takes longer hangs
MEMORY = 10**9  # beside the folder's size, above what the worker held before
# What an error may name: a file of a folder or of the command line.
NAMES = re.compile(
    r"config\.json|model[\w.-]*\.safetensors|index\.json|part[\w.-]*\.safetensors|tokenizer\.json|metrics\.jsonl|"
    r"settings\.json|state\.json|tensors-\d+\.safetensors|corpus\.safetensors|text\.txt|pytorch_model\.bin|/case\b|"
    r"data\.\w+|train\.\w+|model\.\w+|model: \w+ must|run\.\w+|settings\.toml|report\.\w+|--prompt"
)

# -------------------------------------------------------------------------------------------------------------- worker


def prepare(base: Path, folder: Path, seed: int, number: int) -> tuple[str, Path, str]:
    """The reader of a case, what it reads and what is wrong with that."""
    from tools.fuzz_mutations import mutate, mutate_safetensors

    draw = random.Random(f"{seed}/{number}")
    reader = draw.choices(list(READERS), [weight for weight, _ in READERS.values()])[0]
    case, text = folder / "case", folder / "text.txt"
    shutil.copy(base / "text.txt", text)
    if reader in ("resume", "report"):
        source = "run"
        shutil.copytree(base / source, case)
        names = ["settings.json", "tokenizer.json", "corpus.safetensors", "metrics.jsonl"]
        state = case / "states" / "step-00000004"
        parts = sorted(state.glob("tensors-*"))
        targets = [case / name for name in names] + [state / "state.json", draw.choice(parts)]
        target = case / "metrics.jsonl" if reader == "report" else draw.choice(targets)
        if target in parts and draw.random() < 0.5:
            for other in draw.sample(parts, draw.randint(1, len(parts))):
                if other != target:
                    mutate_safetensors(other, draw)
    elif reader == "toml":
        source = "toml"
        case.mkdir()
        target = case / "settings.toml"
        target.write_text(TOML)
    else:
        of_others = {"moepp": ["moepp", "moepp-shards"], "zeda": ["qwen", "glm"]}
        source = draw.choice(of_others.get(reader, ["plain", "plain", "shards", "packed", "tied", "fp8"]))
        shutil.copytree(base / source, case)
        weights = [path for path in case.iterdir() if path.suffix == ".safetensors" or "index" in path.name]
        targets = [case / "config.json"] * (12 if reader in of_others else 4) + sorted(weights) * 3
        targets += [case / "tokenizer.json"] * 2
        targets += [text] * (reader in ("start", "dry_run")) + [case / "generation_config.json"]
        target = draw.choice([path for path in targets if path.exists()])
    return reader, case, f"{source}: {mutate(target, draw)}"


def one_case(base: Path, folder: Path, seed: int, number: int) -> dict[str, Any]:
    """Run a case in `folder`, with both output streams in files there."""
    reader, case, damage = prepare(base, folder, seed, number)
    size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink())
    os.chdir(folder)
    kept = os.dup(1), os.dup(2), sys.stdout, sys.stderr
    for number_of, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number_of)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(number_of, "w", closefd=False) for number_of in (1, 2))  # noqa: SIM115
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begin = memory("VmRSS"), time.monotonic()
    try:
        code, wrong = READERS[reader][1](case)
    except BaseException:
        code, wrong = -1, "traceback: " + traceback.format_exc()[-1500:]
    seconds, peak = time.monotonic() - begin, memory("VmHWM") - before
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(kept[0], 1)
    os.dup2(kept[1], 2)
    sys.stdout, sys.stderr = kept[2:]
    os.close(kept[0])
    os.close(kept[1])
    told = (folder / "stderr").read_bytes()[:5000].decode(errors="replace")
    if not wrong and peak > size + MEMORY:
        wrong = f"took {peak / 1e6:.0f} MB"
    if not wrong and any(path.name == "executed" for path in folder.rglob("executed")):
        wrong = "code of the folder was executed"
    about = {"reader": reader, "damage": damage, "code": code, "told": told, "seconds": seconds, "peak": peak}
    return about | {"wrong": wrong or wrong_words(code, told, reader)}


def wrong_words(code: int, told: str, reader: str) -> str:
    """What is wrong with the standard error stream."""
    if "Traceback" in told or "panicked" in told:
        return f"a traceback: {told}"
    if code == 0:
        return ""
    begin = "" if reader in ("load_model", "moepp", "zeda") else "zemoe: error: "
    if reader == "generate" and begin in told:  # what it had written by then goes there too
        told = told[told.index(begin) :]
    if code not in (1, 2):
        return f"exit code {code}"
    line = told.removesuffix("\n")
    if not told.endswith("\n") or not line.startswith(begin) or len(line) > 500 or not line.isprintable():
        return f"not one plain line of at most 500 characters: {line!r}"
    return "" if NAMES.search(line) else f"names neither file nor tensor nor key: {line}"


def memory(key: str) -> int:
    """In bytes, of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def work(base: Path) -> None:
    """Read lines of seed and number, write a line of JSON for each."""
    import torch

    answers = os.fdopen(os.dup(1), "w")
    torch.set_num_threads(1)
    for line in sys.stdin:
        seed, number = map(int, line.split())
        folder = base.parent / f"{seed}-{number}"
        folder.mkdir()
        answers.write(json.dumps(one_case(base, folder, seed, number)) + "\n")
        answers.flush()
        os.chdir(base)
        shutil.rmtree(folder)


# -------------------------------------------------------------------------------------------------------------- driver


class Worker:
    """A process that runs cases; a new one after each that hangs or dies."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, seed: int, number: int) -> dict[str, Any]:
        if self.process is None:
            command = [sys.executable, "-m", "tools.fuzz_folders", "--worker", str(self.base)]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{seed} {number}\n".encode())
        self.process.stdin.flush()
        end = time.monotonic() + SECONDS + 60 * (number == 0)
        while time.monotonic() < end:
            if select.select([self.process.stdout], [], [], 0.1)[0]:
                if line := self.process.stdout.readline():
                    return json.loads(line)
                break
            if self._memory() > 8 * 10**9:
                break
        wrong = "died" if self.process.poll() is not None else f"hangs, or takes {self._memory() / 1e9:.1f} GB"
        self.close()
        return {"reader": "?", "damage": "?", "code": -1, "told": "", "seconds": SECONDS, "peak": 0, "wrong": wrong}

    def _memory(self) -> int:
        assert self.process is not None
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096
        except (OSError, IndexError):
            return 0

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def fuzz(count: int, seed: int, first: int = 0) -> list[dict[str, Any]]:
    """Run `count` cases from number `first` on; what was found of each."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        quiet: Any = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": ENVIRONMENT}
        subprocess.run([sys.executable, "-m", "tools.fuzz_folders", "--make", str(base)], **quiet)
        worker = Worker(base)
        try:
            return [{"number": number} | worker.run(seed, number) for number in range(first, first + count)]
        finally:
            worker.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to run one again")
    parser.add_argument("--show", action="store_true", help="print every case")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        make_good_folders(asked.make)
        return 0
    if asked.worker:
        work(asked.worker)
        return 0
    begin = time.monotonic()
    found = fuzz(asked.cases, asked.seed, asked.first)
    for case in found:
        if case["wrong"] or asked.show:
            print(f"{case['number']} {case['reader']}, {case['damage']}: {case['wrong'] or case['told'] or 'accepted'}")
    wrong, refused = sum(bool(case["wrong"]) for case in found), sum(case["code"] in (1, 2) for case in found)
    slow, large = max(case["seconds"] for case in found), max(case["peak"] for case in found)
    print(
        f"seed {asked.seed}: {len(found)} cases in {time.monotonic() - begin:.0f} s, {refused} refused, {wrong} wrong; "
        f"the slowest {slow:.1f} s, the largest {large / 1e6:.0f} MB"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
