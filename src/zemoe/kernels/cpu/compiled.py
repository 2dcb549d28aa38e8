"""Shared by the files of functions that numba compiles. Only those import numba, and they are imported late.

A compiled function is kept on disk until its own file changes, so it calls only functions of its own file.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numba
import numpy as np
import torch
from numba.core import config, event
from torch import Tensor

from ...versions import warn_if_untested
from .loop_cache import LoopCache

warn_if_untested("numba", numba.__version__)
_numba_config: Any = config


class _Told(event.Listener):
    """Writes a line to zemoe's log when the first of our loops is compiled, rather than found on disk."""

    def __init__(self) -> None:
        self.told = False

    def on_start(self, event: Any) -> None:
        if not self.told and event.data["dispatcher"].py_func.__module__.startswith(__package__):
            self.told = True
            logging.getLogger("zemoe").info("compiling loops for this CPU, once; it takes about ten seconds")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Told())


def _has_safe_threads() -> bool:
    """Return whether numba has threads that several Python threads may use at once; its own end the process then."""
    for pool in ("tbbpool", "omppool"):
        try:
            import_module(f"numba.np.ufunc.{pool}")
        except ImportError:
            continue
        return True
    return False


_FORMS = {"float32": "<f4", "bfloat16": "<u2", "int64": "<i8"}


class _Memory:
    """A tensor's memory in the form that numpy looks for."""

    def __init__(self, tensor: Tensor, form: str) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": form,
            "shape": tuple(tensor.shape),
            "data": (tensor.data_ptr(), False),
        }


def array(tensor: Tensor) -> np.ndarray:
    """Return the values of a contiguous float32 or int64 tensor, or the bits of a bfloat16 one.

    The tensor must outlive the array.

    Raises ValueError for a tensor that isn't contiguous: the loops know no strides and would read what lies beside it.
    Not by tensor.numpy(): torch never again resizes a storage that numpy has seen, which fully sharded training does.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"tensor must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")
    form = _FORMS[str(tensor.dtype).removeprefix("torch.")]
    if not tensor.numel():  # without memory, which numpy insists on
        return np.empty(tuple(tensor.shape), form)
    return np.asarray(_Memory(tensor, form))


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """Compile by numba.njit, and keep the code on disk from one process to the next where that can be written to."""

    def decorate(loop: Callable) -> Callable:
        dispatcher: Any = numba.njit(**options)(loop)
        dispatcher._cache = LoopCache(loop)
        return dispatcher

    return decorate


THREADS = _has_safe_threads()
_forked = False  # since numba's threads were started: they are not there in the child, and calling them ends it


@cache
def _start_threads() -> None:
    """Start them from a thread that ends at once: numba sets its caller's OpenMP threads, which are torch's too."""
    starter = threading.Thread(target=numba.get_num_threads)
    starter.start()
    starter.join()
    os.register_at_fork(after_in_child=_mark_forked)


def _mark_forked() -> None:
    global _forked
    _forked = True


def run_parts(part: Callable, all_parts: Callable, *arguments: Any) -> None:
    """Run `part(*arguments, n, parts)` for each n below `parts`, as many as torch has threads.

    all_parts(*arguments, parts): the same by numba's threads, compiled with parallel=THREADS. They are not used for
    one part, nor in a process that was forked from one that did. No more of them run than NUMBA_NUM_THREADS allows.
    """
    parts = torch.get_num_threads()
    if parts == 1 or _forked or not THREADS:
        for n in range(parts):
            part(*arguments, n, parts)
        return
    _start_threads()
    wanted, others = min(parts, _numba_config.NUMBA_NUM_THREADS), numba.get_num_threads()
    if wanted == others:
        all_parts(*arguments, parts)
        return
    numba.set_num_threads(wanted)
    try:
        all_parts(*arguments, parts)
    finally:
        numba.set_num_threads(others)  # as the caller's own compiled functions expect it
