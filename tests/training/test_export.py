"""What a training run leaves: a checkpoint that computes what was trained; and models that begin as a checkpoint."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LongcatFlashForCausalLM

from helpers import training_worker
from helpers.tiny_checkpoint import write_checkpoint
from helpers.training_worker import settings_for
from zemoe.checkpoints.longcat import verify
from zemoe.cli import main
from zemoe.generate.command import EMBEDDED
from zemoe.integrations.transformers import load_model
from zemoe.training import export, run
from zemoe.training.model import start_folder
from zemoe.training.run import train
from zemoe.training.settings import SettingsError, make

pytestmark = pytest.mark.usefixtures("on_one_thread")
on_one_thread, whole = training_worker.on_one_thread, training_worker.whole


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_the_export_computes_what_was_trained(tmp_path, monkeypatch, layout):
    trainers: list[run.Trainer] = []
    loop = run.Trainer.run
    monkeypatch.setattr(run.Trainer, "run", lambda self, stop: trainers.append(self) or loop(self, stop))
    settings = settings_for(tmp_path, "out", f"run.layout={layout}", "run.eval_every=12")
    train(settings, resume=False, listener=lambda _: None)
    folder = tmp_path / "out" / "export"
    manifest = verify(folder)
    assert manifest.layout == layout
    ids = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = trainers[0].model.eval()(ids).logits
        assert torch.equal(load_model(folder)(ids).logits, wanted)
        if layout == "transformers":
            stock = LongcatFlashForCausalLM.from_pretrained(folder)
            assert type(stock.model.layers[0].mlp).__module__.startswith("transformers.")
            torch.testing.assert_close(stock(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "out" / "tokenizer.json").read_bytes()


def test_the_best_model_is_exported(tmp_path, monkeypatch):
    """Not the last one: the held-out loss is made to rise after step 6."""
    real = run.Trainer._heldout_loss
    monkeypatch.setattr(run.Trainer, "_heldout_loss", lambda self: real(self) + (self.progress.step > 6) * 10)
    end = train(settings_for(tmp_path, "out", "run.save_every=6", "run.keep=5"), resume=False, listener=lambda _: None)
    assert end["best_step"] == 6
    saved = load_file(tmp_path / "out" / "states" / "step-00000006" / "tensors-00001.safetensors")
    exported = load_file(tmp_path / "out" / "export" / "model.safetensors")
    assert torch.equal(saved["weight/model.embed_tokens.weight"], exported["model.embed_tokens.weight"])
    assert torch.equal(
        saved["bias/model.layers.0.mlp.router"], exported["model.layers.0.mlp.router.e_score_correction_bias"]
    )


def test_bfloat16_export_keeps_the_router(tmp_path):
    settings = settings_for(tmp_path, "out", "run.export_dtype=bfloat16", "train.steps=2")
    train(settings, resume=False, listener=lambda _: None)
    tensors = load_file(tmp_path / "out" / "export" / "model.safetensors")
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in tensors if ".router." in name} and len(wide) == 4
    assert load_model(tmp_path / "out" / "export").dtype == torch.bfloat16


def test_an_export_is_not_lost(whole, tmp_path, monkeypatch):
    """A process may end when the old one has been moved away and the new one is not in its place."""
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    shutil.copy(whole.folder / "text.txt", tmp_path)
    rename = Path.rename

    def dies(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", dies)
        export._swap(out / "new.part", out / "export")
    assert not (out / "export").exists()
    end = train(settings_for(tmp_path, "out"), resume=True, listener=lambda _: None)
    assert end["export"] is not None and verify(end["export"])


def test_generate_reads_the_export(whole, capsys):
    assert main(["generate", "--model", str(whole.out / "export"), "--prompt", "my aunt", "--max-new-tokens", "5"]) == 0
    assert "my aunt" in capsys.readouterr().out


def test_from_a_checkpoint(tmp_path):
    """Its weights, its tokenizer, its end of text; nothing of the sizes that a new model would have."""
    start_from = write_checkpoint(tmp_path / "start", eos_token_id=0, bos_token_id=None)
    settings = settings_for(tmp_path, "out").as_dict()
    settings["model"] = {"start": str(start_from)}
    settings["train"] |= {"steps": 2, "learning_rate": 1e-9, "bias_rate": 0.0}
    told: list[dict] = []
    train(make(settings, "test"), resume=False, listener=told.append)
    before, after = (
        dict(load_model(folder).named_parameters()) for folder in (start_from, tmp_path / "out" / "export")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-7)
    assert (start_from / "tokenizer.json").read_bytes() == (tmp_path / "out" / "export" / "tokenizer.json").read_bytes()
    assert told[0]["ffn_slots"] == 5 and told[0]["k_e"] == pytest.approx(8 / 3)


def test_an_export_is_never_worse_than_the_start(tmp_path, monkeypatch):
    """The held-out loss is made to rise: the export is what the run began with, also if it was stopped and resumed."""
    real = run.Trainer._heldout_loss
    monkeypatch.setattr(run.Trainer, "_heldout_loss", lambda self: real(self) + self.progress.step)
    start_from = write_checkpoint(tmp_path / "start", eos_token_id=0, bos_token_id=None)
    plain = settings_for(tmp_path, "whole", "run.eval_every=2").as_dict() | {"model": {"start": str(start_from)}}
    told: dict[str, list[dict]] = {"whole": [], "stopped": []}
    for out, records in told.items():
        plain["run"]["out"] = str(tmp_path / out)

        def listen(record: dict, stop: bool = out == "stopped", records: list[dict] = records) -> None:
            records.append(record)
            if stop and (record["kind"], record["step"]) == ("train", 3):
                signal.raise_signal(signal.SIGTERM)

        end = train(make(plain, "test"), resume=False, listener=listen)
        if out == "stopped":
            assert (end["reason"], end["step"], end["start_is_best"]) == ("stopped", 4, True)
            end = train(make(plain, "test"), resume=True, listener=listen)
        assert (end["best_step"], end["start_is_best"], end["reason"]) == (0, True, "finished")
        start, exported = load_model(start_from).state_dict(), load_model(tmp_path / out / "export").state_dict()
        assert start.keys() == exported.keys()
        assert all(torch.equal(tensor, exported[name]) for name, tensor in start.items())
    scores, resumed = ([r for r in records if r["kind"] == "eval"] for records in told.values())
    assert [(r["step"], r["best"]) for r in scores] == [(0, True), *((step, False) for step in range(2, 13, 2))]
    assert resumed == scores


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"start": "nowhere"}}, "model.start must be a checkpoint folder, or models/tiny, got 'nowhere'"),
        ({"data": {"context": 97}}, "data.context must be at most the model's 96, got 97"),
        ({"train": {"ffn_experts": 4}}, "train.ffn_experts must be above 1 and below K=4, and at most E=5, got 4"),
    ],
)
def test_what_a_checkpoint_refuses(tmp_path, changes, message):
    start_from = write_checkpoint(tmp_path / "start")
    settings = settings_for(tmp_path, "out").as_dict()
    settings["model"] = {"start": str(start_from)}
    for section, table in changes.items():
        settings[section] |= table
    with pytest.raises(SettingsError) as caught:
        train(make(settings, "test"), resume=False, listener=lambda _: None)
    assert message in str(caught.value)


def test_a_damaged_checkpoint(tmp_path):
    start_from = write_checkpoint(tmp_path / "start")
    path = start_from / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    settings = settings_for(tmp_path, "out").as_dict() | {"model": {"start": str(start_from)}}
    with pytest.raises(SettingsError, match=r"model\.start: .*model\.safetensors: tensor .* truncated"):
        train(make(settings, "test"), resume=False, listener=lambda _: None)


def test_the_embedded_model_has_a_name():
    assert start_folder("models/tiny") == EMBEDDED
