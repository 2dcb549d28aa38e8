"""The compiled loops use torch's threads: as many as torch has, also after a change, a fork, or in other threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")

BEGIN = """
import os, sys, threading
import torch
from zemoe import MoE, MoEConfig

torch.manual_seed(0)
layer = MoE(MoEConfig(hidden_size=64, intermediate_size=48, num_experts=8, top_k=3))
x = torch.randn(50, 64)


def run():
    with torch.no_grad():
        return layer(x)


def threads():
    "Of this process, besides Python's own: tasks that the kernel lists."
    return len(os.listdir("/proc/self/task"))
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="counts /proc/self/task")


def output(program: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | variables
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@linux
def test_one_thread_is_one_thread():
    """Whatever numba was told: with one, not even its threads are started."""
    program = "run(); print(threads(), torch.get_num_threads())"
    assert output(program, OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="8").split() == ["1", "1"]


def test_as_many_as_torch_has_and_after_a_change():
    """numba's own number, for functions of the caller's, stays."""
    program = """
import numba
seen = []
real = numba.set_num_threads
numba.set_num_threads = lambda n: (seen.append(n), real(n))
for n in (3, 1, 2, 4):
    torch.set_num_threads(n)
    run()
    print(torch.get_num_threads(), numba.get_num_threads(), sorted(set(seen)))
    seen.clear()
"""
    lines = output(program, OMP_NUM_THREADS="4", NUMBA_NUM_THREADS="4").splitlines()
    assert lines == ["3 4 [3, 4]", "1 4 []", "2 4 [2, 4]", "4 4 []"]


def test_fewer_threads_of_numba_than_of_torch():
    """Then they take several parts each."""
    program = "print(run().double().sum().item())"
    assert output(program, OMP_NUM_THREADS="4", NUMBA_NUM_THREADS="2") == output(program, OMP_NUM_THREADS="1")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", [1, 2])
def test_a_child_of_a_fork(before):
    """As torch's own operators: on one thread, as data loaders set it. The loops need no such setting."""
    program = f"""
torch.set_num_threads({before})
from zemoe.kernels.topk import by_loops
y, wide = run(), torch.arange(2**16, dtype=torch.float32).view(2, -1)  # torch's own threads hang in a child
child = os.fork()
if not child:
    import signal
    signal.alarm(60)
    if {before} > 1:  # two parts, without the threads that were left behind
        assert torch.get_num_threads() == {before} and by_loops(wide, None, 1).tolist() == [[2**15 - 1]] * 2
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(run(), y) else 9)
print(os.waitpid(child, 0)[1])
"""
    assert output(program, OMP_NUM_THREADS="2") == "0\n"


def test_several_python_threads():
    """Each has its own number in numba; results are those of one alone."""
    program = """
torch.set_num_threads(2)
found = [None] * 4
def work(i):
    for _ in range(20):
        found[i] = run()
ys = [threading.Thread(target=work, args=(i,)) for i in range(4)]
[y.start() for y in ys]; [y.join() for y in ys]
print(all(torch.equal(y, run()) for y in found))
"""
    assert output(program, OMP_NUM_THREADS="2") == "True\n"
