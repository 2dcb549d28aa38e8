"""Which GPUs run the kernels, as what, and that `make check-arch` turns down what wouldn't run; needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers.paths import ROOT
from zemoe import doctor, resolve_backend
from zemoe.kernels.triton import gpus
from zemoe.kernels.triton.gpus import GPUS, HOPPER, gpu_of, taken_as, why_not
from zemoe.ops import library

KB = 1024
# NVIDIA's documentation: kilobytes that a block may opt in to.
DOCUMENTED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


def test_the_table_is_nvidias() -> None:
    assert {gpu.capability: gpu.shared_memory // KB for gpu in GPUS} == DOCUMENTED
    assert [gpu.capability for gpu in GPUS if gpu.descriptors] == [(9, 0), (10, 0), (12, 0)]
    assert [gpu.capability for gpu in GPUS if gpu.overlaps] == [(9, 0), (10, 0), (12, 0)]
    assert [gpu.capability for gpu in GPUS if gpu.takes_large_tiles] == [(9, 0), (10, 0)]
    assert [gpu for gpu in GPUS if gpu.tuned] == [HOPPER]


@pytest.mark.parametrize(
    ("capability", "kilobytes", "part"),
    [
        *((capability, kilobytes, capability) for capability, kilobytes in DOCUMENTED.items()),
        ((8, 7), 163, (8, 6)),  # Orin
        ((10, 3), 227, (10, 0)),  # B300
        ((12, 1), 99, (12, 0)),  # GB10
        ((11, 0), 227, (8, 9)),  # Thor: of no generation that is listed
        ((9, 0), 100, (8, 9)),  # no such H100: what is asked for is memory
        ((7, 5), 64, None),  # T4
        ((8, 9), 64, None),
    ],
)
def test_a_gpu_gets_the_tiles_of_a_part_that_was_checked(capability, kilobytes, part) -> None:
    found = taken_as(capability, kilobytes * KB)
    assert (None if found is None else found.capability) == part
    assert found is None or found.shared_memory <= kilobytes * KB


@pytest.fixture
def a_t4(monkeypatch):
    t4 = SimpleNamespace(major=7, minor=5, name="Tesla T4", shared_memory_per_block_optin=64 * KB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: t4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    gpus._installed.cache_clear()
    yield
    gpus._installed.cache_clear()


@pytest.mark.usefixtures("a_t4")
def test_what_cant_run_is_refused_by_name(monkeypatch) -> None:
    """And where nobody asked for it the torch backend takes its place."""
    monkeypatch.setattr(library, "HAS_TRITON", True)
    cuda = torch.device("cuda:0")
    why = "an NVIDIA GPU of compute capability 8.0 or newer with 99 KB .*, got Tesla T4 of 7.5 with 64"
    with pytest.raises(ValueError, match=f"backend 'triton' needs {why}; backend='torch' runs there"):
        gpu_of(cuda)
    with pytest.raises(ValueError, match=f"backend 'triton' needs {why}"):
        resolve_backend(cuda, torch.float16, "triton")
    assert resolve_backend("cuda", torch.float16).name == resolve_backend(cuda, torch.float16).name == "torch"
    assert resolve_backend(cuda, None).name == "torch", "routing alone"


@pytest.mark.parametrize(
    ("major", "minor", "kilobytes", "words"),
    [
        (9, 0, 227, r"kernels are tuned for compute capability 9\.0 \(H100, H200\)"),
        (8, 9, 99, r"kernels are compiled for compute capability 8\.9 \(.*\), not tuned"),
        (12, 1, 99, r"12\.1 is neither tuned nor compiled for: kernels run as on compute capability 12\.0 \(.*\)"),
        (7, 5, 64, "the triton backend needs an NVIDIA GPU of compute capability 8.0 .*, got Tesla T4 of 7.5 with 64"),
    ],
)
@pytest.mark.usefixtures("a_t4")
def test_doctor_says_what_was_tuned(monkeypatch, major, minor, kilobytes, words) -> None:
    found = SimpleNamespace(major=major, minor=minor, name="Tesla T4", shared_memory_per_block_optin=kilobytes * KB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "the card")
    assert re.fullmatch(f"the card; {words}", doctor._described("cuda:0"))


@pytest.mark.usefixtures("a_t4")
def test_another_makers_gpu_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_not(torch.device("cuda:0")) == "an NVIDIA GPU, got Tesla T4"
    assert why_not(torch.device("cpu")) == ""


def test_the_router_has_narrower_tiles_where_products_work_in_tensor_memory() -> None:
    pytest.importorskip("triton")
    from zemoe.kernels.triton.router_logits import router_schedule

    for dtype in (torch.bfloat16, torch.float16):
        wide, narrow = (router_schedule(16384, 768, 6144, dtype, True, wide) for wide in (True, False))
        assert (wide.path, wide.block_t, wide.block_r) == ("split", 128, 256)
        assert (narrow.path, narrow.block_t, narrow.block_r) == ("split", 64, 128)


PROGRAM = """
import functools
from dataclasses import replace
from unittest import mock
from tools import check_arch
from zemoe.kernels.triton import gpus, router_logits, tiles

part = {gpu.capability: gpu for gpu in check_arch.GPUS}
few = functools.partial(check_arch.check, kernels=["_scatter_weights"])
fits = few([part[8, 6]])
less = few([replace(part[8, 6], shared_memory=8191)])
wide = functools.partial(router_logits.router_schedule, wide=True)
with mock.patch.object(router_logits, "router_schedule", lambda *args: wide(*args[:5])):
    columns = check_arch.check([part[10, 0]], kernels=["_split"])
with mock.patch.object(gpus.Gpu, "takes_large_tiles", True):
    large = check_arch.check([part[12, 0]], kernels=["_grad_rows"])
print("fits:", fits, "less:", less, "columns:", columns, "large:", large, sep="\\n")
"""


@pytest.mark.slow
def test_check_arch_finds_what_does_not_fit(tmp_path) -> None:
    """A part with less memory, and tiles that are too large for a part, in shared memory or in tensor memory."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    _, found = done.stdout.split("fits:\n")
    fits, less, columns, large = (part.splitlines()[-1] for part in re.split("\n(?=less:|columns:|large:)", found))
    assert fits == "[]"
    assert "sm_86" in less and "_scatter_weights" in less
    assert "needs 8192 bytes of shared memory, and there are 8191" in less
    assert re.search(r"needs 5\d\d columns of tensor memory, and there are 512", columns)  # by the version of Triton
    assert "sm_120" in large and "bytes of shared memory, and there are 101376" in large
