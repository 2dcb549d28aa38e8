"""`make check-arch`: every Triton kernel, at every tile size that may be chosen, compiles for every GPU that we name.

Without a GPU. A program must find the shared memory (and on sm_100 the tensor memory) that it needs. Says for each kind
of GPU how much the largest program takes. ALL=1 takes every launch, not one of each tile: minutes more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tools.arch_launches import Launch, launches
from zemoe.kernels.triton.gpus import GPUS, Gpu

WORK: list[tuple[Gpu, Launch]] = []  # filled before the processes are forked


def arch_of(gpu: Gpu) -> int:
    return 10 * gpu.capability[0] + gpu.capability[1]


def compiled(gpu: Gpu, launch: Launch) -> tuple[int, int]:
    """Bytes of shared memory and columns of tensor memory that a program of the launch takes."""
    target = GPUTarget("cuda", arch_of(gpu), 32)
    backend, kernel = make_backend(target), launch.kernel
    options = dict(launch.options, debug=False, instrumentation_mode="")
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, parsed = binder(*launch.args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, parsed)
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=parsed.__dict__).metadata
    return made.shared, getattr(made, "tmem_size", None) or 0


def judged(index: int) -> tuple[int, str]:
    """(bytes of shared memory, "" or what is wrong) of a piece of work."""
    gpu, launch = WORK[index]
    try:
        shared, columns = compiled(gpu, launch)
    except Exception as error:  # whatever a compiler may raise
        return 0, f"does not compile: {type(error).__name__}: {str(error)[:200]}"
    if shared > gpu.shared_memory:
        return shared, f"needs {shared} bytes of shared memory, and there are {gpu.shared_memory}"
    if columns > gpu.tensor_memory:
        return shared, f"needs {columns} columns of tensor memory, and there are {gpu.tensor_memory}"
    return shared, ""


def check(gpus: Sequence[Gpu], *, everything: bool = False, kernels: Sequence[str] = ()) -> list[str]:
    """Compile all launches of all these GPUs, or of the kernels that are named; what is wrong, a line each."""
    WORK[:] = [
        (gpu, launch)
        for gpu in gpus
        for launch in launches(gpu, everything=everything)
        if not kernels or launch.kernel.__name__ in kernels
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        results = list(pool.map(judged, range(len(WORK)), chunksize=4))
    for gpu in gpus:
        mine = [(shared, launch) for (other, launch), (shared, _) in zip(WORK, results, strict=True) if other == gpu]
        most, largest = max(mine, key=lambda pair: pair[0])
        print(
            f"sm_{arch_of(gpu)} ({gpu.examples}): {len(mine)} launches, at most {most} of {gpu.shared_memory} bytes, "
            f"by {largest.kernel.__name__}"
        )
    return [
        f"sm_{arch_of(gpu)} ({gpu.examples}): {launch.about()} {wrong}"
        for (gpu, launch), (_, wrong) in zip(WORK, results, strict=True)
        if wrong
    ]


if __name__ == "__main__":
    found = check(GPUS, everything=os.environ.get("ALL") == "1")
    print("\n".join(found), file=sys.stderr)
    sys.exit(1 if found else 0)
