"""The public names and their signatures are those of public_api.txt (tools/public_api.py writes it anew)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import transformers

import zemoe
from helpers.paths import ROOT
from tools import public_api
from zemoe.versions import TESTED


def test_names_and_signatures_change_on_purpose_only() -> None:
    if tuple(map(int, transformers.__version__.split(".")[:2])) != TESTED["transformers"][1]:
        pytest.skip("annotations name classes of the newest transformers")
    assert "\n".join(public_api.lines()) + "\n" == (ROOT / "tests" / "public_api.txt").read_text(encoding="utf-8")


def test_a_changed_argument_is_seen(monkeypatch) -> None:
    before = list(public_api.lines())
    monkeypatch.setattr(zemoe, "fused_experts", lambda hidden_states, *, backend=None: hidden_states)
    assert [line for line in public_api.lines() if line not in before] == [
        "zemoe.fused_experts(hidden_states, *, backend=None)"
    ]


def test_nothing_appears_when_it_is_asked_for() -> None:
    assert "__getattr__" not in vars(zemoe)
    assert len([name for name in zemoe.__all__ if name[:1].isupper() or name[:1].islower()]) <= 16


def test_importing_zemoe_takes_little_longer_than_torch() -> None:
    """By what is imported, for seconds depend on the load: nothing of torch that takes long, and nobody else's."""
    program = (
        "import sys, torch; before = set(sys.modules); import zemoe; "
        "print(*(name for name in sys.modules if name not in before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    others = {name for name in done.stdout.split() if name.split(".")[0] not in {"zemoe", *sys.stdlib_module_names}}
    assert not {name for name in others if not name.startswith("torch.")}, others
    assert len(others) < 30 and not {"torch._dynamo", "torch.distributed.tensor"} & others, others
