"""`zemoe doctor`: what is installed, which backend computes where, and whether each one computes what it should.

T tokens, H hidden size, I expert width, E FFN experts, K choices a token.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from . import reference
from .affine import AffineParams
from .backends import BACKENDS, resolve_backend
from .bench.check import allowed_error, rms
from .experts import fused_experts
from .kernels.triton import gpus
from .machine import device_name, usable_devices, versions
from .terminal import plain_table
from .versions import TESTED, is_tested, range_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A layer with every kind of zero-computation expert, an H and an I that no vector width divides, and an FFN expert that
# no token chooses.
_T, _H, _I, _E, _K = 8, 37, 19, 5, 4
_KINDS = (("constant", 2), ("identity", 1), ("scaled_identity", 1), ("zero", 1))


def _described(device: str) -> str:
    """Return a device's name, and whether the kernels of the triton backend were tuned on its kind."""
    name = device_name(device)
    return f"{name}; {gpus.about(torch.device(device))}" if device.startswith("cuda") else name


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found out about one backend on one device in one dtype.

    Attributes:
        chosen: whether this backend computes there unless another one is asked for.
        usable: whether it can compute there. why: the reason why it can't, or why it was chosen.
        error: the largest error of a tensor, over the error that is allowed; None if the backend is not usable.
        what: the tensor with that error. ok: whether `error` is at most 1.
    """

    device: str
    dtype: str
    backend: str
    chosen: bool
    usable: bool
    why: str
    error: float | None = None
    what: str = ""
    ok: bool = True


class _Layer:
    """A small layer: its differentiable inputs, its ids, and a gradient of its output to begin the backward with."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        scores = torch.rand(_T, _E + 5, generator=generator)
        scores[:, 1] = -1  # expert 1 gets no token
        self.ids_TK = scores.topk(_K, dim=1).indices
        self.inputs = {
            "hidden_states": normal(_T, _H).to(dtype),
            "w13": (normal(_E, 2 * _I, _H) / _H**0.5).to(dtype),
            "w2": (normal(_E, _H, _I) / _I**0.5).to(dtype),
            "topk_weights": 0.2 + torch.rand(_T, _K, generator=generator),
            "constant_router": normal(2, 2, _H) / _H**0.5,
            "constant_value": normal(2, _H),
            "scale": 0.5 + normal(1).abs(),
        }
        self.out_gradient = normal(_T, _H).to(dtype)

    def by_reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the output and the gradients as zemoe.reference computes them in `dtype`."""
        return self._both("cpu", reference.experts, {"dtype": dtype})

    def by_backend(self, device: str, backend: str) -> dict[str, Tensor]:
        """Return the output and the gradients of zemoe.fused_experts.

        Of a backend without gradients only the output.
        """
        trained = BACKENDS[backend].train is not None
        return self._both(device, fused_experts, {"backend": backend}, trained=trained)

    def _both(
        self, device: str, experts: Callable[..., Tensor], options: dict[str, Any], *, trained: bool = True
    ) -> dict[str, Tensor]:
        """Call `experts` with and without gradients; what it gives, by a name for people."""
        leaves = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in self.inputs.items()}
        x, w13, w2, weights, *affine = leaves.values()
        options = options | {"num_experts": _E, "zero_expert_kinds": _KINDS, "affine_params": AffineParams(*affine)}
        with torch.no_grad():  # a backend may compute in another way where nothing is trained
            untrained = experts(x, w13, w2, weights, self.ids_TK.to(device), **options)
        if not trained:
            return {"output without gradients": untrained}
        out = experts(x, w13, w2, weights, self.ids_TK.to(device), **options)
        gradients = torch.autograd.grad(out, list(leaves.values()), self.out_gradient.to(out))
        named = zip(leaves, gradients, strict=True)
        outputs = {"output": out.detach(), "output without gradients": untrained}
        return outputs | {f"gradient of {name}": gradient for name, gradient in named}


def _worst(result: dict[str, Tensor], exact: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest error, as a multiple of what is allowed, and the name of its tensor.

    An error is the root of a mean square; one that isn't finite counts as infinite. exact: the results of the reference
    in float64. own: its results in the backend's dtype, which say how much error that dtype costs.
    """

    def size(values: Tensor) -> float:
        return rms(values.flatten()).item()

    worst = (0.0, "output")
    for name, tensor in result.items():
        wanted = exact[name].double()
        allowed = allowed_error(size(own[name].double() - wanted), size(wanted), tensor.dtype)
        error = size(tensor.cpu().double() - wanted) / allowed
        worst = max(worst, (error if error == error else float("inf"), name))
    return worst


def _why_not(device: str, dtype: torch.dtype, backend: str) -> str:
    """Return the reason why a backend can't compute there, "" if it can."""
    try:
        resolve_backend(device, dtype, backend)
    except ValueError as error:
        return str(error)
    return ""


def self_test() -> list[Check]:
    """Compare every backend on every device in every dtype, forward and backward, with the reference in float64."""
    checks = []
    for dtype in _DTYPES:
        layer = _Layer(dtype)
        exact, own = layer.by_reference(torch.float64), layer.by_reference(dtype)
        for device in usable_devices():
            torch.empty(0, device=device)  # begins to use it: only then is a GPU asked what it can run
            chosen = resolve_backend(device, dtype).name
            for name in BACKENDS:
                where: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch."), "backend": name}
                why_not = _why_not(device, dtype, name)
                if why_not:
                    checks.append(Check(**where, chosen=False, usable=False, why=why_not))
                    continue
                error, what = _worst(layer.by_backend(device, name), exact, own)
                why = "chosen, the first that works" if name == chosen else "works too"
                known: dict[str, Any] = {"chosen": name == chosen, "usable": True, "why": why}
                checks.append(Check(**where, **known, error=error, what=what, ok=error <= 1))
    return sorted(checks, key=lambda check: check.device)


def examine() -> dict[str, Any]:
    """Find out all that `zemoe doctor --json` prints."""
    checks, installed = self_test(), versions()
    return {
        "ok": all(check.ok for check in checks),
        "versions": installed,
        "tested": {package: range_of(package) for package in TESTED},
        "untested": [name for name in TESTED if (version := installed[name]) and not is_tested(name, version)],
        "devices": {device: _described(device) for device in usable_devices()},
        "gpus": [
            {"capability": f"{gpu.capability[0]}.{gpu.capability[1]}", "examples": gpu.examples, "tuned": gpu.tuned}
            for gpu in gpus.GPUS
        ],
        "threads": {"torch": torch.get_num_threads(), "processors": os.cpu_count()},
        "backends": {name: backend.about for name, backend in BACKENDS.items()},
        "checks": [asdict(check) for check in checks],
    }


def findings(found: dict[str, Any]) -> list[Table]:
    """Make the tables of `zemoe doctor` out of what `examine` found."""
    installed = plain_table("versions")
    for name, version in found["versions"].items():
        tested = found["tested"].get(name)
        about = Text(f"tested: {tested}" if tested else "", style="dim")
        if name in found["untested"]:
            about = Text(f"untested: zemoe was tested with {tested}", style="bold yellow")
        installed.add_row(name, version or "not installed", about)
    devices = plain_table("devices")
    for name, about in found["devices"].items():
        devices.add_row(name, Text(about))
    for tuned, what in ((True, "tuned"), (False, "compiled, not tuned")):
        parts = [f"{gpu['capability']} ({gpu['examples']})" for gpu in found["gpus"] if gpu["tuned"] == tuned]
        devices.add_row("triton", Text(f"{what}: {', '.join(parts)}", style="dim"))
    results = plain_table("backends and their self-test")
    for check in found["checks"]:
        why, verdict = Text(check["why"], style="" if check["usable"] else "dim"), Text()
        if check["usable"]:
            verdict = Text("ok", style="green") if check["ok"] else Text("FAILED", style="bold red")
            verdict.append(f" {check['error']:.2f} of the allowed error", style="default")
            verdict.append("" if check["ok"] else f" in the {check['what']}", style="default")
        results.add_row(check["device"], check["dtype"], check["backend"], why, verdict)
    return [installed, devices, results]
