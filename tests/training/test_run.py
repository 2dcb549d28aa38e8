"""Training runs: what is learned, that killed runs go on to the same numbers, and what is left when something fails."""

from __future__ import annotations

import json
import math
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from helpers import training_worker
from helpers.training_worker import ended, one_run, records, settings_for, start
from zemoe.integrations.transformers import load_model
from zemoe.training import export, run, state
from zemoe.training.run import Diverged, train
from zemoe.training.settings import SettingsError
from zemoe.training.state import StateError

pytestmark = pytest.mark.usefixtures("on_one_thread")
on_one_thread, whole = training_worker.on_one_thread, training_worker.whole


def test_what_is_told_is_what_is_written(whole):
    lines = (whole.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.told
    kinds = [(record["kind"], record["step"]) for record in whole.told]
    steps = {step: [("train", step)] for step in range(1, 13)}
    for step in (6, 12):
        steps[step].append(("eval", step))
    for step in (4, 8, 12):
        steps[step].append(("saved", step))
    assert kinds == [("run", 0), *(entry for step in steps.values() for entry in step), ("end", 12)]


def test_the_first_and_the_last_record(whole):
    first = whole.told[0]
    E, Z, K, H, I, layers = 6, 3, 3, 32, 24, 2
    wanted = {"k_e": 2.0, "choices": K, "ffn_slots": E, "zero_slots": Z, "layers": layers, "world": 1, "steps": 12}
    assert wanted.items() <= first.items()
    model = load_model(whole.out / "export")
    total = sum(p.numel() for p in model.parameters())
    assert first["parameters"] == total and first["active_parameters"] == total - layers * (E - 2) * 3 * H * I
    assert first["tokens_per_step"] == 4 * 16 and first["dtype"] == "float32" and first["versions"]["torch"]
    assert whole.end == whole.told[-1] and whole.end["reason"] == "finished"
    evals = [record for record in whole.told if record["kind"] == "eval"]
    best = min(evals, key=lambda record: record["heldout_loss"])
    assert (whole.end["best_step"], whole.end["best_heldout_bits_per_byte"]) == (
        best["step"],
        best["heldout_bits_per_byte"],
    )
    assert [record["best"] for record in evals] == [True, evals[1] is best] and Path(whole.end["export"]).is_dir()


def test_a_step_in_numbers(whole):
    for record in (record for record in whole.told if record["kind"] == "train"):
        assert record["tokens"] == 64 * record["step"] and record["tokens_per_s"] > 0
        layers = record["by_layer"]
        assert len(layers) == 2 and record["ffn_experts"] == sum(layer["ffn_experts"] for layer in layers) / 2
        for layer in layers:
            assert layer["zero_share"] == pytest.approx(1 - layer["ffn_experts"] / 3)
            assert layer["bias_min"] <= layer["bias_ffn_mean"] <= layer["bias_max"] and layer["bias_zero_mean"] == 0
    rates = [record["learning_rate"] for record in whole.told if record["kind"] == "train"]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2]) and all(a > b for a, b in pairwise(rates[3:]))


def test_bits_a_byte(whole):
    """Of the held-out text: nats a token, by its tokens and bytes."""
    record = next(record for record in whole.told if record["kind"] == "eval")
    text = (whole.folder / "text.txt").read_text()
    held_bytes = len(text) - text.index("\n", round(len(text) * 0.95)) - 1
    tokens = whole.told[0]["heldout_tokens"]
    assert record["heldout_bits_per_byte"] == pytest.approx(record["heldout_loss"] * tokens / held_bytes / math.log(2))


def test_it_learns_and_is_steered(tmp_path):
    """Longer: the loss falls far below chance, and FFN experts a token go where they are asked to be."""
    for wanted in (1.25, 2.75):
        overrides = ("train.steps=50", "train.rows=8", "run.log_every=5", "run.eval_every=50", "run.save_every=50")
        overrides += (f"train.ffn_experts={wanted}", "train.final_rate=0.5")
        told: list[dict] = []
        train(settings_for(tmp_path, f"{wanted}", *overrides), resume=False, listener=told.append)
        steps = [record for record in told if record["kind"] == "train"]
        assert steps[0]["loss"] > 5.4 and steps[-1]["loss"] < 2.0
        last = sum(record["ffn_experts"] for record in steps[-5:]) / 5
        assert last == pytest.approx(wanted, abs=0.1)
        heldout = [record["heldout_loss"] for record in told if record["kind"] == "eval"]
        assert heldout[-1] < 2.1


# ------------------------------------------------------------------------------------------------- killed and resumed

KILLS = [
    ("train", 2),  # before there is a state
    ("in a step", 5),
    ("half an export", 6),
    ("half a state", 8),
    ("between two exports", 12),
    ("a state that replaces the older one", 12),
]


def test_killed_again_and_again(whole, tmp_path):
    """After SIGKILL at each of these moments, one after the other, every number is that of the run that wasn't."""
    shutil.copy(whole.folder / "text.txt", tmp_path)
    settings = settings_for(tmp_path, "out")
    seen = []
    for i, (moment, step) in enumerate(KILLS):
        assert ended(start(one_run, settings, i > 0, moment, step)) == -signal.SIGKILL, moment
        kept = state.steps(tmp_path / "out" / "states")
        seen.append(kept[-1] if kept else 0)
    assert seen == [0, 4, 4, 4, 8, 12]
    assert ended(start(one_run, settings, True, None, 0)) == 0
    for kind in ("train", "eval", "end"):
        assert records(tmp_path / "out", kind) == records(whole.out, kind)
    for folder in ("states/step-00000012", "export"):
        for path in (whole.out / folder).glob("*.safetensors"):
            mine, other = load_file(path), load_file(tmp_path / "out" / folder / path.name)
            assert mine.keys() == other.keys()
            assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == sorted(path.name for path in whole.out.iterdir())


def test_means_go_on_across_a_stop(whole, tmp_path):
    """A state between two lines of the log: the line after it has the mean of the steps on both sides."""
    shutil.copy(whole.folder / "text.txt", tmp_path)
    settings = settings_for(tmp_path, "out", "run.log_every=6", "run.save_every=4")
    assert ended(start(one_run, settings, False, "saved", 4)) == -signal.SIGKILL
    train(settings, resume=True, listener=lambda _: None)
    losses = [record["loss"] for record in records(whole.out, "train")]
    seen = [record["loss"] for record in records(tmp_path / "out", "train")]
    assert seen == [losses[0], pytest.approx(sum(losses[1:6]) / 5), pytest.approx(sum(losses[6:]) / 6)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(whole, tmp_path, number):
    shutil.copy(whole.folder / "text.txt", tmp_path)
    settings = settings_for(tmp_path, "out")
    before = signal.getsignal(number)

    def interrupt(record: dict) -> None:
        if (record["kind"], record["step"]) == ("train", 5):
            signal.raise_signal(number)

    end = train(settings, resume=False, listener=interrupt)
    assert (end["reason"], end["step"], end["export"]) == ("stopped", 6, str(tmp_path / "out" / "export"))
    assert state.steps(tmp_path / "out" / "states") == [4, 6] and signal.getsignal(number) is before
    end = train(settings, resume=True, listener=lambda _: None)
    assert end["reason"] == "finished"
    assert records(tmp_path / "out", "train", "eval") == records(whole.out, "train", "eval")


def test_a_second_ctrl_c(tmp_path):
    def interrupt(record: dict) -> None:
        if record["kind"] == "run":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(settings_for(tmp_path, "out"), resume=False, listener=interrupt)


def test_a_finished_run_is_finished(whole):
    told: list[dict] = []
    before = records(whole.out, "train", "eval")
    end = train(whole.settings, resume=True, listener=told.append)
    assert [record["kind"] for record in told] == ["run", "end"] and end["reason"] == "finished"
    assert end["best_step"] == whole.end["best_step"] and records(whole.out, "train", "eval") == before


@pytest.fixture
def begun(whole, tmp_path) -> SimpleNamespace:
    """A copy of the run, as it was after step 8."""
    shutil.copytree(whole.out, tmp_path / "out")
    shutil.copy(whole.folder / "text.txt", tmp_path)
    for step in ("step-00000004", "step-00000012"):
        shutil.rmtree(tmp_path / "out" / "states" / step)
    return SimpleNamespace(folder=tmp_path, out=tmp_path / "out", settings=settings_for(tmp_path, "out"))


def test_an_earlier_run_is_not_lost(begun):
    before = {path: path.read_bytes() for path in begun.out.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match=r"holds a run already \(a state of step 8\); go on with --resume"):
        train(begun.settings, resume=False, listener=lambda _: None)
    shutil.rmtree(begun.out / "states")
    with pytest.raises(SettingsError, match=r"holds a run already \(an export\)"):
        train(begun.settings, resume=False, listener=lambda _: None)
    assert all(path.read_bytes() == content for path, content in before.items() if "states" not in path.parts)


def test_another_run_is_not_resumed(begun):
    other = settings_for(begun.folder, "out", "train.steps=20")
    with pytest.raises(SettingsError, match=r"train\.steps can't be changed by --resume: .* has 12, got 20"):
        train(other, resume=True, listener=lambda _: None)
    with (begun.folder / "text.txt").open("a") as file:
        file.write(" And so on.")
    with pytest.raises(SettingsError, match=r"data\.paths: --resume needs the text that the run in .* was begun with"):
        train(begun.settings, resume=True, listener=lambda _: None)


def test_a_damaged_state(begun, whole):
    """Named, and nothing is touched; without it the run goes on from the one before."""
    shutil.copytree(begun.out / "states" / "step-00000008", begun.out / "states" / "step-00000009")
    path = begun.out / "states" / "step-00000009" / "tensors-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = (begun.out / "metrics.jsonl").read_bytes()
    with pytest.raises(StateError, match=r"tensors-00001\.safetensors: damaged .* to go on from step 8"):
        train(begun.settings, resume=True, listener=lambda _: None)
    assert (begun.out / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(path.parent)
    train(begun.settings, resume=True, listener=lambda _: None)
    assert records(begun.out, "train", "eval") == records(whole.out, "train", "eval")


@pytest.mark.parametrize("what", ["state", "export", "metrics"])
def test_a_full_disk(begun, monkeypatch, what, whole):
    """One sentence, the state before it whole, and with room again the same numbers."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        owner, name = {"state": (state, "save_file"), "export": (export, "save_tensors"), "metrics": (state, "sync")}[
            what
        ]
        patch.setattr(owner, name, full)
        shutil.rmtree(begun.out / "export")
        with pytest.raises(StateError) as caught:
            train(begun.settings, resume=True, listener=lambda _: None)
    assert "No space left on device" in str(caught.value) and "the state of step 8 is whole" in str(caught.value)
    assert state.steps(begun.out / "states") == [8] and not list(begun.out.glob("states/.*"))
    assert not list(begun.out.glob(".export*"))
    train(begun.settings, resume=True, listener=lambda _: None)
    assert records(begun.out, "train", "eval") == records(whole.out, "train", "eval")


@pytest.mark.parametrize("when", ["loss", "gradient"])
def test_not_a_number(begun, monkeypatch, when):
    """The step is named though nobody looks at each one, and the state before it stays the last."""
    if when == "loss":
        real = run.F.cross_entropy
        calls: list[int] = []

        def broken(*args: object, **kwargs: object) -> torch.Tensor:
            calls.append(1)
            return real(*args, **kwargs) * (math.nan if len(calls) == 2 else 1)

        monkeypatch.setattr(run.F, "cross_entropy", broken)
    else:
        step = run.Optimizer.step
        monkeypatch.setattr(run.Optimizer, "step", lambda self, n: step(self, n) * (math.inf if n == 9 else 1))
    settings = settings_for(begun.folder, "out", "run.log_every=12", "run.eval_every=12")
    told: list[dict] = []
    what = "loss is nan" if when == "loss" else "gradient's norm is inf"
    with pytest.raises(Diverged, match=rf"the {what} at step 10; the state of step 8 is kept; a smaller"):
        train(settings, resume=True, listener=told.append)
    assert told[-1]["kind"] == "end" and told[-1]["reason"] == "diverged"
    assert state.steps(begun.out / "states") == [8]


def test_one_process_a_folder(tmp_path):
    """The second one is refused while the first one trains, and leaves its run alone."""
    settings, refused = settings_for(tmp_path, "run"), []

    def meanwhile(record):
        if record["kind"] == "train" and record["step"] == 2:
            before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
            with pytest.raises(SettingsError, match=r"run\.out: another process is training in .*run"):
                train(settings, resume=True, listener=refused.append)
            assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    assert train(settings, resume=False, listener=meanwhile)["reason"] == "finished" and not refused
    train(settings, resume=True, listener=refused.append)  # free again


def test_a_budget_out_of_reach_changes_nothing(tmp_path):
    with pytest.raises(SettingsError, match=r"train\.ffn_experts must be above 0 and below K=3"):
        train(settings_for(tmp_path, "run", "train.ffn_experts=5"), resume=False, listener=print)
    assert not any((tmp_path / "run" / name).exists() for name in ("settings.json", "metrics.jsonl", "states"))
