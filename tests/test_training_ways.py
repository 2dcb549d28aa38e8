"""Ways to compute the same step: micro-batches, activations computed again, bfloat16, several processes; AdamW."""

from __future__ import annotations

import math
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

import training_worker
from tiny_checkpoint import write_checkpoint
from training_worker import ended, losses, one_rank, records, settings_for, start
from zemoe.checkpoint import verify
from zemoe.integrations.transformers_layers import ZeroExpertLongcatMoE
from zemoe.training import state, train
from zemoe.training.files import Files, prepare
from zemoe.training.optimizer import Optimizer, rate
from zemoe.training.parallel import Ranks
from zemoe.training.settings import SettingsError, TrainSettings, make

pytestmark = pytest.mark.usefixtures("on_one_thread")
on_one_thread, whole = training_worker.on_one_thread, training_worker.whole


def test_micro_batches(whole, tmp_path):
    """Two of two rows are one of four, to rounding; a token whose choice was a near tie may go another way."""
    shutil.copy(whole.folder / "text.txt", tmp_path)
    train(settings_for(tmp_path, "out", "train.accumulate=2"), resume=False, listener=lambda _: None)
    mine, wanted = (records(out, "train") for out in (tmp_path / "out", whole.out))
    for key, tolerance in (("loss", 1e-3), ("grad_norm", 2e-2), ("balance_loss", 3e-2)):
        assert [one[key] for one in mine] == pytest.approx([one[key] for one in wanted], rel=tolerance), key
    assert mine[0]["by_layer"] == wanted[0]["by_layer"]  # before the first update: the very same choices


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
def test_two_ranks(whole, tmp_path, parallel, first, last):
    """The same numbers to rounding from step `first`, if need be from the state of one process, to step `last`, where
    one of the two is asked to stop and both do; one process goes on from there.
    """
    shutil.copy(whole.folder / "text.txt", tmp_path)
    out = tmp_path / "out"
    if first:
        shutil.copytree(whole.out, out)
        for folder in ("export", "states/step-00000008", "states/step-00000012"):
            shutil.rmtree(out / folder)
    settings = settings_for(tmp_path, "out", f"run.parallel={parallel}", "train.accumulate=2")
    ranks = [start(one_rank, rank, 2, str(tmp_path / "meet"), settings, first > 0, last) for rank in range(2)]
    assert [ended(process) for process in ranks] == [0, 0]
    assert state.steps(out / "states")[-1] == last and losses(out)[:first] == losses(whole.out)[:first]
    verify(out / "export")  # made after step `last` too, and of the same weights
    saved = load_file(out / "states" / f"step-{last:08d}" / "tensors-00001.safetensors")
    exported = load_file(out / "export" / "model.safetensors")
    gate_up = saved["weight/model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(gate_up[3, :24], exported["model.layers.1.mlp.experts.3.gate_proj.weight"])
    assert torch.equal(saved["weight/model.embed_tokens.weight"], exported["model.embed_tokens.weight"])
    train(settings_for(tmp_path, "out"), resume=True, listener=lambda _: None)
    assert losses(out) == pytest.approx(losses(whole.out), rel=1e-3) and len(losses(out)) == 12
    mine, wanted = (records(o, "train")[first]["by_layer"] for o in (out, whole.out))
    assert [one["ffn_experts"] for one in mine] == pytest.approx([one["ffn_experts"] for one in wanted], abs=0.02)
    norms, wanted = ([record["grad_norm"] for record in records(o, "train")] for o in (out, whole.out))
    assert norms[:last] == pytest.approx(wanted[:last], rel=2e-2)
    heldout, wanted = ([record["heldout_loss"] for record in records(o, "eval")] for o in (out, whole.out))
    assert heldout == pytest.approx(wanted, rel=1e-3)


def test_rows_that_cannot_be_shared(tmp_path, monkeypatch):
    three = Ranks(0, 3, "alone", torch.device("cpu"))  # of three, but without the group that would tell the others
    settings = settings_for(tmp_path, "out")
    with pytest.raises(SettingsError, match=r"multiple of train\.accumulate=1 times 3 processes, got 4"):
        prepare(settings, three, Files(tmp_path / "out", writes=True), resume=False)


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
