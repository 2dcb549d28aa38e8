"""What was asked of `zemoe bench`, checked as far as it can be before anything is measured.

T tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..machine import free_bytes, usable_devices
from ..regular_files import kind_of
from ..terminal import CommandError
from . import cases
from .baselines import BASELINES
from .cases import Case

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_BASELINES = ("torch", "eager")
_REPEATS = {"cpu": 7, "cuda": 20}
_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What was asked for; None or () for the default. skew: share of one expert among the FFN choices.

    commit: of this code, where git cannot say it.
    """

    cases: tuple[str, ...] = ()
    baselines: tuple[str, ...] = DEFAULT_BASELINES
    tokens: tuple[int, ...] = ()
    dtype: str | None = None
    device: str | None = None
    zero_shares: tuple[float, ...] = ()
    skew: float | None = None
    repeats: int | None = None
    seed: int = 0
    csv: Path | None = None
    plot: Path | None = None
    commit: str | None = None


class BenchSettings(NamedTuple):
    """A request with all defaults filled in. absent: baselines that can't be timed here, and why."""

    request: BenchRequest
    cases: list[Case]
    device: torch.device
    dtype: torch.dtype
    repeats: int
    zero_shares: tuple[float | None, ...]
    baselines: list[str]
    absent: dict[str, str]

    def tokens(self, case: Case) -> tuple[int, ...]:
        return self.request.tokens or case.tokens


def numbers(option: str, text: str | None, kind: Callable[[str], Any], least: float, most: float) -> tuple[Any, ...]:
    """Return what `option` lists with commas between, () for None. Raises CommandError for anything else."""
    if text is None:
        return ()
    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(least <= number <= most for number in found):
        what = "whole numbers" if kind is int else "numbers"
        range_ = f"from {least:g}" + (f" to {most:g}" if most < float("inf") else "")
        raise CommandError(f"{option} must be {what} {range_}, with commas between them, got {text!r}")
    return found


def _full_device(name: str | None) -> torch.device:
    usable = [device for device in usable_devices() if device.split(":")[0] in _REPEATS]
    wanted = usable[-1].split(":")[0] if name is None else name
    wanted = wanted if wanted == "cpu" or ":" in wanted else f"{wanted}:0"
    if wanted not in usable:
        raise CommandError(f"--device must be one that bench can use here ({', '.join(usable)}), got {name!r}")
    return torch.device(wanted)


def _check_file(option: str, path: Path | None) -> None:
    if path is not None and (kind_of(path) not in ("nothing", "a file") or kind_of(path.parent) != "a folder"):
        raise CommandError(f"{option} must be a file in a folder that exists, got {path}: {kind_of(path)}")
    if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"{option}: {path} can't be written", 1)


def _check_memory(settings: BenchSettings) -> None:
    free = free_bytes(settings.device)
    for case in settings.cases:
        weights = case.weight_bytes(settings.dtype.itemsize)
        inputs = settings.repeats * case.hidden_size * settings.dtype.itemsize
        work = max(case.work_bytes(T, settings.dtype.itemsize) + T * inputs for T in settings.tokens(case))
        if free is not None and weights + work > free:
            raise CommandError(
                f"{case.name} needs {weights / 1e9:.1f} GB of weights and up to {work / 1e9:.1f} GB to work in, but "
                f"{settings.device} has {free / 1e9:.1f} GB left; take a smaller case or fewer --tokens",
                1,
            )


def settings_of(request: BenchRequest) -> BenchSettings:
    """Fill in the defaults, and check all that can be checked before anything is measured. Raises CommandError."""
    known = cases.load_cases()
    device = _full_device(request.device)
    names = request.cases or tuple(name for name, case in known.items() if device.type in case.devices)
    for name in names:
        if name not in known:
            raise CommandError(f"CASE must be one of {', '.join(known)}, got {name!r}")
    for name in request.baselines:
        if name not in BASELINES:
            raise CommandError(f"--baseline must list some of {', '.join(BASELINES)}, or be none, got {name!r}")
    default = "float32" if device.type == "cpu" else "bfloat16"
    dtype = default if request.dtype is None else request.dtype
    if dtype not in DTYPES:
        raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if request.skew is not None and not 0 < request.skew <= 1:
        raise CommandError(f"--skew must be more than 0 and at most 1, got {request.skew:g}")
    if request.repeats is not None and request.repeats < 1:
        raise CommandError(f"--repeats must be at least 1, got {request.repeats}")
    if not 0 <= request.seed < 2**63:
        raise CommandError(f"--seed must be at least 0 and below 2**63, got {request.seed}")
    _check_file("--csv", request.csv)
    _check_file("--plot", request.plot)
    if request.plot is not None:
        if request.plot.suffix not in _SUFFIXES:
            raise CommandError(f"--plot must end in one of {', '.join(_SUFFIXES)}, got {request.plot}")
        if find_spec("matplotlib") is None:
            raise CommandError("--plot needs matplotlib, which is not installed: pip install 'zemoe[report]'", 1)
    absent = {name: BASELINES[name].why_absent(device.type) for name in dict.fromkeys(request.baselines)}
    settings = BenchSettings(
        request=request,
        cases=[known[name] for name in dict.fromkeys(names)],
        device=device,
        dtype=getattr(torch, dtype),
        repeats=request.repeats or _REPEATS[device.type],
        zero_shares=request.zero_shares or (None,),
        baselines=[name for name, why in absent.items() if not why],
        absent={name: why for name, why in absent.items() if why},
    )
    _check_memory(settings)
    return settings
