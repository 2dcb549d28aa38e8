"""Ways to compute the same step: micro-batches, activations computed again, bfloat16, several processes; AdamW."""

from __future__ import annotations

import math
import shutil
import signal
import socket
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from helpers import training_worker
from helpers.tiny_checkpoint import write_checkpoint
from helpers.training_worker import ended, losses, one_rank, records, settings_for, start
from zemoe.checkpoints.longcat import verify
from zemoe.integrations.transformers.layers import ZeroExpertLongcatMoE
from zemoe.training import parallel, state
from zemoe.training.files import Files, prepare_run
from zemoe.training.optimizer import Optimizer, rate
from zemoe.training.parallel import Ranks
from zemoe.training.run import train
from zemoe.training.settings import SettingsError, TrainSettings, make

pytestmark = pytest.mark.usefixtures("on_one_thread")
on_one_thread, whole = training_worker.on_one_thread, training_worker.whole


# A step is the same step however its rows are shared out, but for two things: sums are rounded in another order, and
# the balance loss is that of a micro-batch, which is not additive. So runs are compared without it. What is left is a
# token whose choice was a near tie and went another way, which moves a loss by less than LOSS; without one, losses and
# norms agree to 1e-6 at every step. A missing share, or a mean in place of a sum, moves a norm by more than NORM.
LOSS, NORM, EXACT = 1e-3, 2e-2, 1e-5


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A whole run without a balance loss."""
    return training_worker.whole_run(tmp_path_factory.mktemp("plain"), "train.balance=0")


def assert_same_curve(out: Path, wanted: Path, since: int = 0) -> None:
    """The records of `out` are those of `wanted`: step `since` + 1 to rounding, the later ones but for near ties."""
    mine, theirs = (records(folder, "train") for folder in (out, wanted))
    assert len(mine) == len(theirs) == 12
    for key, tolerance in (("loss", LOSS), ("grad_norm", NORM)):
        assert mine[since][key] == pytest.approx(theirs[since][key], rel=EXACT), key
        assert [one[key] for one in mine] == pytest.approx([one[key] for one in theirs], rel=tolerance), key
    for one, other in zip(mine, theirs, strict=True):
        for key in ("bias_min", "bias_max", "bias_ffn_mean"):  # all choices of the step were counted
            assert [at[key] for at in one["by_layer"]] == pytest.approx([at[key] for at in other["by_layer"]], abs=2e-3)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches(plain, tmp_path, parts):
    """Parts of a batch are the whole of it."""
    shutil.copy(plain.folder / "text.txt", tmp_path)
    settings = settings_for(tmp_path, "out", f"train.accumulate={parts}", "train.balance=0")
    train(settings, resume=False, listener=lambda _: None)
    assert_same_curve(tmp_path / "out", plain.out)


def test_the_balance_loss_of_micro_batches(tmp_path):
    """It is their mean, and weighs as much as that of the whole batch; before the first update choices are the same."""
    steps = []
    for parts in (1, 2):
        overrides = (f"train.accumulate={parts}", "train.balance=1", "train.steps=1")
        train(settings_for(tmp_path, f"{parts}", *overrides), resume=False, listener=lambda _: None)
        steps.append(records(tmp_path / f"{parts}", "train")[0])
    mine, wanted = steps
    assert mine["by_layer"] == wanted["by_layer"]
    for key, tolerance in (("loss", EXACT), ("balance_loss", 1e-2), ("grad_norm", 1e-3)):
        assert mine[key] == pytest.approx(wanted[key], rel=tolerance), key


def test_checkpointed_activations(whole, tmp_path, monkeypatch):
    """Each layer runs twice a step, once in an evaluation, and no number changes."""
    calls: list[bool] = []
    forward = ZeroExpertLongcatMoE.forward
    monkeypatch.setattr(
        ZeroExpertLongcatMoE, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x)
    )
    shutil.copy(whole.folder / "text.txt", tmp_path)
    train(settings_for(tmp_path, "out", "train.checkpoint_activations=true"), resume=False, listener=lambda _: None)
    assert records(tmp_path / "out", "train", "eval", "end") == records(whole.out, "train", "eval", "end")
    assert sum(calls) == 12 * 2 * 2  # steps, layers


def test_bfloat16(whole, tmp_path):
    """Products in bfloat16: near the same curve and not the same; what is kept is float32."""
    shutil.copy(whole.folder / "text.txt", tmp_path)
    told: list[dict] = []
    train(settings_for(tmp_path, "out", "train.dtype=bfloat16"), resume=False, listener=told.append)
    assert told[0]["dtype"] == "bfloat16"
    assert losses(tmp_path / "out") == pytest.approx(losses(whole.out), rel=0.05)
    assert losses(tmp_path / "out") != pytest.approx(losses(whole.out), rel=1e-6)
    saved = load_file(tmp_path / "out" / "states" / "step-00000012" / "tensors-00001.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize(("parallel", "first", "last"), [("ddp", 0, 6), ("fsdp", 4, 6)])
def test_two_ranks(plain, tmp_path, parallel, first, last):
    """The same numbers from step `first`, if need be from the state of one process, to step `last`, where one of the
    two is asked to stop and both do; one process goes on from there.
    """
    shutil.copy(plain.folder / "text.txt", tmp_path)
    out = tmp_path / "out"
    if first:
        shutil.copytree(plain.out, out)
        for folder in ("export", "states/step-00000008", "states/step-00000012"):
            shutil.rmtree(out / folder)
    settings = settings_for(tmp_path, "out", f"run.parallel={parallel}", "train.accumulate=2", "train.balance=0")
    ranks = [start(one_rank, rank, 2, str(tmp_path / "meet"), settings, first > 0, last) for rank in range(2)]
    assert [ended(process) for process in ranks] == [0, 0]
    assert state.steps(out / "states")[-1] == last and losses(out)[:first] == losses(plain.out)[:first]
    verify(out / "export")  # made after step `last` too, and of the same weights
    saved = load_file(out / "states" / f"step-{last:08d}" / "tensors-00001.safetensors")
    exported = load_file(out / "export" / "model.safetensors")
    gate_up = saved["weight/model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(gate_up[3, :24], exported["model.layers.1.mlp.experts.3.gate_proj.weight"])
    assert torch.equal(saved["weight/model.embed_tokens.weight"], exported["model.embed_tokens.weight"])
    train(settings_for(tmp_path, "out", "train.balance=0"), resume=True, listener=lambda _: None)
    assert_same_curve(out, plain.out, since=first)
    heldout, wanted = ([record["heldout_loss"] for record in records(o, "eval")] for o in (out, plain.out))
    assert heldout == pytest.approx(wanted, rel=LOSS)


@pytest.mark.parametrize("parallel_mode", ["ddp", "fsdp"])
def test_torchrun_leaves_when_nothing_holds_the_group(tmp_path, monkeypatch, parallel_mode):
    """DDP's reducer, were it the last to let go, would wait for gloo's threads with Python's lock, perhaps for ever."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**names, "TORCHELASTIC_RUN_ID": "one"}.items():
        monkeypatch.setenv(name, value)
    made: list[weakref.ref] = []
    held: list[int] = []
    wrap, leave = Ranks.wrap, parallel.dist.destroy_process_group

    def wrapped(self: Ranks, model: torch.nn.Module) -> torch.nn.Module:
        made.append(weakref.ref(module := wrap(self, model)))
        return module

    monkeypatch.setattr(Ranks, "wrap", wrapped)
    monkeypatch.setattr(
        parallel.dist, "destroy_process_group", lambda: (held.append(sum(ref() is not None for ref in made)), leave())
    )
    settings = settings_for(tmp_path, "out", "train.steps=1", f"run.parallel={parallel_mode}")
    train(settings, resume=False, listener=lambda _: None)
    assert len(made) == 1 and held == [0]
    assert not parallel.dist.is_initialized()


def test_rows_that_cannot_be_shared(tmp_path, monkeypatch):
    three = Ranks(0, 3, "alone", torch.device("cpu"))  # of three, but without the group that would tell the others
    settings = settings_for(tmp_path, "out")
    with pytest.raises(SettingsError, match=r"multiple of train\.accumulate=1 times 3 processes, got 4"):
        prepare_run(settings, three, Files(tmp_path / "out", writes=True), resume=False)


def test_the_optimizer():
    """Norms, biases and routers don't decay; the rate is that of the step; gradients are clipped together."""
    layer = torch.nn.Module()
    layer.proj = torch.nn.Linear(2, 2)
    layer.norm = torch.nn.LayerNorm(2)
    layer.router = torch.nn.Module()
    layer.router.classifier = torch.nn.Linear(2, 3, bias=False)
    model = torch.nn.ModuleDict({"0": layer})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = TrainSettings(steps=10, warmup=2, learning_rate=0.5, weight_decay=0.1, clip=2.0, final_rate=0.2)
    optimizer = Optimizer(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert float(optimizer.step(0)) == 0
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 / 2 * 0.1 if name == "0.proj.weight" else 1
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
        assert parameter.grad is None
        parameter.grad = torch.full_like(parameter, 3.0)
    norm = float(optimizer.step(1))
    assert norm == pytest.approx(3 * math.sqrt(16))
    averages = [value for name, value in optimizer.tensors() if name.startswith("exp_avg/")]
    assert float(torch.cat([value.flatten() for value in averages]).norm()) == pytest.approx(0.1 * 2.0, rel=1e-4)
    shares = [rate(settings, step) for step in (0, 1, 2, 6, 10, 99)]
    assert shares == pytest.approx([0.5, 1, 1, 0.6, 0.2, 0.2])


def test_dropout_goes_on_too(tmp_path):
    """A model that has it draws the same after a stop, whatever was drawn in between."""
    write_checkpoint(tmp_path / "start", attention_dropout=0.3)
    curves = []
    for out, stop in (("whole", 0), ("stopped", 2)):
        plain = settings_for(tmp_path, out).as_dict() | {"model": {"start": str(tmp_path / "start")}}
        settings = make(plain, "test")
        for resume in (False, True):
            torch.manual_seed(resume)
            train(
                settings,
                resume=resume,
                listener=lambda r, stop=stop: (
                    signal.raise_signal(signal.SIGTERM) if (r["kind"], r["step"]) == ("train", stop) else None
                ),
            )
        curves.append(losses(tmp_path / out))
    assert curves[0] == curves[1] and len(curves[0]) == 12
