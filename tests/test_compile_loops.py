"""Compiling the loops: announced in one line, done before anything is timed, and nothing is left for later."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")

NOTE = "zemoe: compiling loops for this CPU, once; it takes about ten seconds"
# Runs the command line, then says how often numba compiled one of our functions after `compile_loops` had ended.
PROGRAM = """
import sys
from numba.core import event
from zemoe import cli, compile_loops
from zemoe.bench import command as bench
from zemoe.generate import command as generate
from zemoe.training import run

late = []


class Count(event.Listener):
    def on_start(self, event):
        if late and event.data["dispatcher"].py_func.__module__.startswith("zemoe"):
            late.append(event.data["dispatcher"].py_func.__name__)

    def on_end(self, event):
        pass


def ready(*args, **kwargs):
    real(*args, **kwargs)
    late.append("begin")


real = compile_loops.compile_loops
bench.compile_loops = generate.compile_loops = run.compile_loops = ready
event.register("numba:compile", Count())
code = cli.main(sys.argv[1:])
print(late, file=sys.stderr)
sys.exit(code)
"""


def zemoe(cache, *arguments: str, threads: int = 2) -> tuple[str, list[str]]:
    """stdout and the lines of stderr of a command with its own cache of compiled loops."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "OMP_NUM_THREADS": f"{threads}"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr.splitlines()


@pytest.mark.slow
def test_generating_and_training(tmp_path):
    """The first command compiles for both; the second finds it all, and says nothing."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat by the sea. " * 400)
    train = ("train", "--data", str(text), "--out", str(tmp_path / "run"), "--set", "train.steps=2", "--json")
    sizes = ("hidden_size=32", "num_layers=1", "n_routed_experts=6", "zero_expert_num=3", "moe_topk=3")
    sizes = tuple(word for size in sizes for word in ("--set", f"model.{size}"))
    _, said = zemoe(tmp_path / "cache", *train, *sizes)
    assert said == [NOTE, "['begin']"]
    generate = ("generate", "--json", "--max-new-tokens", "3")
    made, said = zemoe(tmp_path / "cache", *generate, threads=1)  # takes other loops than two threads
    assert said[0] == NOTE and said[-1] == "['begin']" and len(json.loads(made)["tokens"]) == 3
    _, said = zemoe(tmp_path / "cache", *generate, threads=1)
    assert NOTE not in said and said[-1] == "['begin']"
