"""What all tests share: poisoned memory, and the rule for GPU tests."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch.utils import _device  # not imported by every torch

from helpers.processes import on_terminal  # noqa: F401, a fixture

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any test imports one


# Started in the background of a shell, or by something that blocks them, the tests and the processes that they start
# would not see these.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail, instead of skipping, gpu tests without a GPU")


@functools.cache
def _mend_the_interpreter() -> None:
    """Triton 3.9's interpreter loads and stores by masks of bools alone, but ands a block and a scalar to integers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def of_bools(mask):  # of a descriptor it is an array of bools
        return TensorHandle(mask.data.astype(bool), mask.dtype) if isinstance(mask, TensorHandle) else mask

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self, ptrs, mask, *rest, **named):
        return load(self, ptrs, of_bools(mask), *rest, **named)

    def masked_store(self, ptrs, value, mask, *rest, **named):
        return store(self, ptrs, value, of_bools(mask), *rest, **named)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("triton") and not torch.cuda.is_available() and find_spec("triton"):
        _mend_the_interpreter()
    if torch.cuda.is_available():
        return
    if item.config.getoption("--require-gpu"):
        pytest.fail("--require-gpu was given, but torch sees no CUDA device")
    if item.get_closest_marker("gpu"):
        pytest.skip("torch sees no CUDA device")


@pytest.fixture(scope="session")
def device() -> str:
    """Where the Triton kernels run: on the GPU, or on CPU tensors in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _poisoned(make):
    def wrapper(*args, **kwargs):
        memory = make(*args, **kwargs)
        if memory.dtype.is_floating_point:
            with torch.no_grad():
                memory.fill_(float("nan"))
        elif memory.dtype in (torch.int32, torch.int64):
            memory.fill_(torch.iinfo(memory.dtype).max)
        return memory

    return wrapper


@pytest.fixture(scope="module")
def poisoned_empty() -> Iterator[None]:
    """Memory that is not initialised holds NaN (integers: the largest value) instead of whatever was there.

    Patching beats `torch.utils.deterministic.fill_uninitialized_memory`, which works only together with
    `use_deterministic_algorithms` and would so test other code paths than those that users run.
    """
    # `with torch.device(..)` looks the constructors up once for all, so not while they are others.
    _device._device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
        yield
