"""What this machine is: its devices, the versions of what is installed, and the commit of our code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from ._version import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "triton", "numba", "numpy", "vllm", "sglang")


def usable_devices() -> list[str]:
    """Return the names of the devices that torch can compute on here: "cpu", and each accelerator with its number."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]


def versions() -> dict[str, str | None]:
    """Return the version of each package by its name, None for one that isn't installed."""
    found: dict[str, str | None] = {"zemoe": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: str) -> str:
    """Return what the machine calls a device, or `device` itself where torch can't say."""
    if device == "cpu":
        threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
        return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads}"
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    return name_of(device) if name_of else device  # torch.mps has no names


def processor_model() -> str | None:
    """Return the name of the CPU's model that Linux gives, None where it gives none."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def commit() -> str:
    """Return the commit that this code comes from, with "-dirty" if files differ from it, "unknown" outside of git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # zemoe may be installed in a folder inside of another repository. Only our own has this file among its own.
    if git("ls-files", "--error-unmatch", str(here)) is None:
        return "unknown"
    return git("describe", "--always", "--dirty", "--exclude=*") or "unknown"


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had there, None where nothing tells."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _main_memory("MemAvailable")


def total_bytes() -> int | None:
    """Main memory of this machine, None where nothing tells."""
    return _main_memory("MemTotal")


def _main_memory(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)
