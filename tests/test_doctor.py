"""zemoe doctor: what it finds is so, and its self-test catches a backend that computes something else."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import zemoe
from helpers.terminals import without_compiling
from zemoe import doctor, machine
from zemoe.backends import BACKENDS, resolve_backend
from zemoe.cli import main

GPU = pytest.param("cuda:0", marks=pytest.mark.gpu)


def break_backend(monkeypatch, name, change):
    right = BACKENDS[name]
    wrong = {field: partial(change, getattr(right, field)) for field in ("infer", "train")}
    monkeypatch.setitem(BACKENDS, name, replace(right, **wrong))


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert without_compiling(err) == ""
    assert found["ok"] is True
    assert found["versions"]["zemoe"] == zemoe.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"transformers", "triton", "numpy"} <= set(found["versions"])
    assert found["untested"] == [] and set(found["tested"]) < set(found["versions"])
    assert found["threads"] == {"torch": torch.get_num_threads(), "processors": os.cpu_count()}
    assert list(found["devices"]) == machine.usable_devices()
    seen = {(check["device"], check["dtype"], check["backend"]) for check in found["checks"]}
    dtypes = ("float32", "bfloat16", "float16")
    assert seen == {(d, t, b) for d in found["devices"] for t in dtypes for b in BACKENDS}
    for check in found["checks"]:
        chosen = resolve_backend(check["device"], getattr(torch, check["dtype"])).name
        assert check["chosen"] == (check["backend"] == chosen)
        assert check["ok"] and check["usable"] == (check["error"] is not None)
        assert check["why"]
        if check["usable"]:
            assert 0 < check["error"] <= 1, "an error of exactly zero means that nothing was compared"


def test_text(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert without_compiling(err) == "" and "\x1b" not in out
    for line in ("versions", "devices", f"zemoe         {zemoe.__version__}"):
        assert line in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "triton tuned: 9.0 (H100, H200)" in lines
    assert any(line.startswith("triton compiled, not tuned: 8.0 (A100), 8.6 (A10, RTX 30), 8.9") for line in lines)
    assert out.count("chosen, the first that works") == 3 * len(machine.usable_devices())
    assert "FAILED" not in out


def test_an_untested_version_is_told(monkeypatch, capsys):
    """It fails nothing: what the self-test finds is what counts."""
    real = machine.metadata.version
    monkeypatch.setattr(machine.metadata, "version", lambda name: "9.1.2" if name == "transformers" else real(name))
    assert main(["doctor"]) == 0
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if "untested" in line]
    assert told == ["transformers 9.1.2 untested: zemoe was tested with 5.17 to 5.24"]
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["untested"] == ["transformers"] and found["tested"]["transformers"] == "5.17 to 5.24"


WRONG = {
    "zeros": lambda right, given: right(given) * 0,
    "a hundredth too much": lambda right, given: right(given) * 1.01,
    "NaN": lambda right, given: right(given) * float("nan"),
    "one choice dropped": lambda right, given: right(given._replace(weights_TK=drop_one(given))),
    "no gradient of the weights": lambda right, given: right(
        given._replace(weights_TK=given.weights_TK.detach() + 0 * given.weights_TK)
    ),
    "a gradient of twice the size": lambda right, given: right(
        given._replace(x_TH=2 * given.x_TH - given.x_TH.detach())
    ),
}


def drop_one(given):
    """The weights without the first choice of an FFN expert that there is."""
    keep = torch.ones_like(given.weights_TK)
    keep.view(-1)[int((given.ids_TK.flatten() < given.num_experts).nonzero()[0])] = 0
    return given.weights_TK * keep


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_backend_is_found(monkeypatch, name, wrong):
    break_backend(monkeypatch, name, WRONG[wrong])
    failed = {(check.backend, check.dtype) for check in doctor.self_test() if not check.ok}
    assert {backend for backend, _ in failed} == {name}
    assert (name, "float32") in failed
    if wrong != "a hundredth too much":  # that is what a bfloat16 result is off by
        assert {dtype for _, dtype in failed} == {"float32", "bfloat16", "float16"}


def test_a_wrong_inference_is_found(monkeypatch):
    """What is trained is right here, what is only computed is not."""
    infer = BACKENDS["cpu"].infer
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], infer=lambda call: infer(call) * 1.1))
    failed = {(check.backend, check.dtype) for check in doctor.self_test() if not check.ok}
    assert failed == {("cpu", dtype) for dtype in ("float32", "bfloat16", "float16")}


def test_failure_is_told(monkeypatch, capsys):
    break_backend(monkeypatch, "torch", WRONG["zeros"])
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if "FAILED" in line]
    assert len(failed) == 3 and all(line.split()[2] == "torch" for line in failed)
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_a_backend_that_cant_work_here(monkeypatch, capsys):
    """It is listed with the reason, and that is no failure."""
    monkeypatch.setitem(BACKENDS, "abacus", replace(BACKENDS["cpu"], name="abacus", devices=("mps",)))
    assert main(["doctor"]) == 0
    assert "backend 'abacus' needs a device of ('mps',)" in capsys.readouterr().out
    checks = [check for check in doctor.self_test() if check.backend == "abacus"]
    assert checks and not any(check.usable or check.chosen for check in checks)


def test_what_isnt_installed(monkeypatch):
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "no-such-package-anywhere"))
    assert machine.versions()["no-such-package-anywhere"] is None


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_device(device):
    assert device in machine.usable_devices()
    assert machine.device_name(device)


@pytest.mark.gpu
def test_self_test_on_a_gpu():
    checks = [check for check in doctor.self_test() if check.device.startswith("cuda")]
    assert {check.backend for check in checks if check.usable and check.ok} == {"torch", "triton"}
    assert all(check.ok for check in checks if check.usable)
    assert {check.dtype for check in checks if check.chosen and check.backend == "triton"} == {"bfloat16", "float16"}


def test_a_device_without_a_name(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: torch.mps)
    assert machine.device_name("mps:0") == "mps:0"
