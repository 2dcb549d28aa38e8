"""A run's folder belongs to one process, and what a run wrote is trusted only as it was written."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import training_worker
from helpers.corpus_files import rewrite
from helpers.training_worker import (
    dies_in,
    ended,
    records,
    settings_for,
    start,
    train_until,
    with_small_files,
    write_text,
)
from zemoe.checkpoints.longcat import verify
from zemoe.cli import main
from zemoe.training import command
from zemoe.training.data import Corpus, read_cache
from zemoe.training.run import train
from zemoe.training.settings import Settings, SettingsError, read
from zemoe.training.state import Reader
from zemoe.training.view import View

whole, on_one_thread = training_worker.whole, training_worker.on_one_thread
pytestmark = pytest.mark.usefixtures("on_one_thread")  # as the whole run, to have its bits


def nothing(record: dict) -> None:
    pass


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def arguments(settings: Settings) -> list[str]:
    named = [(f"{name}.{key}", value) for name, table in settings.as_dict().items() for key, value in table.items()]
    return ["train", "--data", settings.data.paths[0], *(f"--set={key}={json.dumps(value)}" for key, value in named)]


# ------------------------------------------------------------------------------------------- a second process in it

SECOND = {
    "the same command": ((), ()),
    "another text": (("data.paths=other.txt",), ()),
    "another vocabulary": (("model.vocab_size=300", "data.heldout=0.2"), ()),
    "resume": ((), ("--resume",)),
    "resume with another text": (("data.paths=other.txt",), ("--resume",)),
}


def test_a_second_process_changes_nothing(whole, tmp_path, monkeypatch, capsys):
    """While a first one trains. What that one goes on to write, exports and can be resumed from is as if alone."""
    shutil.copy(whole.folder / "text.txt", tmp_path)
    write_text(tmp_path / "other.txt", seed=1)
    monkeypatch.chdir(tmp_path)
    first = start(train_until, settings_for(tmp_path, "out"), 5, tmp_path / "go")
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "go.waiting").exists():
            assert time.monotonic() < end and first.exitcode is None
            time.sleep(0.05)
        before = contents(tmp_path / "out")
        assert {"tokenizer.json", "corpus.safetensors", "settings.json", "metrics.jsonl"} <= before.keys()
        for sets, options in SECOND.values():
            code = main([*arguments(settings_for(tmp_path, "out", *sets)), *options])
            out, err = capsys.readouterr()
            assert (code, out, err.count("\n")) == (2, "", 1) and "another process is training in" in err, err
        assert main([*arguments(settings_for(tmp_path, "out", "model.vocab_size=300")), "--dry-run"]) == 0
        assert contents(tmp_path / "out") == before
    finally:
        (tmp_path / "go").touch()
        assert ended(first) == 0
    verify(tmp_path / "out" / "export")
    assert records(tmp_path / "out", "train") == records(whole.out, "train")[:6]
    assert train(settings_for(tmp_path, "out"), resume=True, listener=nothing)["reason"] == "finished"


# ---------------------------------------------------------------------------------------------- what a run trusts


@pytest.fixture
def begun(whole, tmp_path) -> SimpleNamespace:
    """A copy of the run, as it was after step 8."""
    shutil.copytree(whole.out, tmp_path / "out")
    shutil.copy(whole.folder / "text.txt", tmp_path)
    for step in ("step-00000004", "step-00000012"):
        shutil.rmtree(tmp_path / "out" / "states" / step)
    return SimpleNamespace(folder=tmp_path, out=tmp_path / "out", settings=settings_for(tmp_path, "out"))


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1) + "\n")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def another_weight(path: Path) -> None:
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)


def replace(path: Path, change) -> None:
    """With another corpus of the same text, whole by itself."""
    old = read_cache(path)
    new = Corpus(change(old.train), old.heldout, old.train_bytes, old.heldout_bytes, old.fingerprint)
    rewrite(path, lambda tokens: new.train if torch.equal(tokens, old.train) else tokens, sha256=new.sha256)


STATE = "states/step-00000008/state.json"
TENSORS = "states/step-00000008/tensors-00001.safetensors"
DAMAGE = {
    "tokens XOR 1": ("corpus.safetensors", lambda path: rewrite(path, lambda tokens: tokens ^ 1)),
    "tokens all zero": ("corpus.safetensors", lambda path: rewrite(path, torch.zeros_like)),
    "a cut corpus": ("corpus.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-5])),
    "other tokens with their digest": ("corpus.safetensors", lambda path: replace(path, lambda tokens: tokens ^ 1)),
    "a fourth step": (STATE, lambda path: change_json(path, lambda about: about["progress"].update(step=3))),
    "a better score": (STATE, lambda path: change_json(path, lambda about: about["progress"].update(best_bits=0.1))),
    "other settings": (
        STATE,
        lambda path: change_json(path, lambda about: about["settings"].update({"train.seed": 1})),
    ),
    "fewer metrics": (STATE, lambda path: change_json(path, lambda about: about.update(metrics_bytes=10))),
    "no digest": (STATE, lambda path: change_json(path, lambda about: about.pop("sha256"))),
    "a weight": (TENSORS, another_weight),
    "a tokenizer with other merges": (
        "tokenizer.json",
        lambda path: change_json(path, lambda content: content["model"]["merges"].reverse()),
    ),
    "a tokenizer in other bytes": ("tokenizer.json", lambda path: path.write_bytes(path.read_bytes() + b" ")),
    "no tokenizer": ("tokenizer.json", Path.unlink),
    "a record": ("metrics.jsonl", lambda path: flip(path, 40)),
    "no records": ("metrics.jsonl", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_refused(begun, capsys, damage):
    name, change = DAMAGE[damage]
    change(begun.out / name)
    before = contents(begun.out)
    code = main([*arguments(begun.settings), "--resume"])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("zemoe: error: ") and str(begun.out / name) in err and "damaged" in err
    after = contents(begun.out)
    assert after == before, "nothing is changed"


@pytest.mark.parametrize("change", ["another run.log_every", "no digest", "none of it"])
def test_damaged_settings_are_refused(begun, capsys, change):
    path = begun.out / "settings.json"
    if "log_every" in change:
        change_json(path, lambda content: content["run"].update(log_every=7))
    elif "digest" in change:
        change_json(path, lambda content: content.pop("sha256"))
    else:
        path.write_text("{}")
    before = contents(begun.out)
    assert main(["train", "--resume", "--out", str(begun.out)]) == 2
    err = capsys.readouterr().err
    assert f"{path}: not readable" in err and err.count("\n") == 1
    assert contents(begun.out) == before
    train(begun.settings, resume=True, listener=nothing)  # with the settings given again
    assert main(["train", "--resume", "--out", str(begun.out)]) == 0


def test_what_can_be_made_again_is(begun, whole):
    """The encoded text from the text; what a state says of it is the judge."""
    (begun.out / "corpus.safetensors").unlink()
    train(begun.settings, resume=True, listener=nothing)
    assert (begun.out / "corpus.safetensors").read_bytes() == (whole.out / "corpus.safetensors").read_bytes()
    assert records(begun.out, "train", "eval") == records(whole.out, "train", "eval")


def test_what_a_run_left_before_its_first_state_is_not_trusted(begun, whole):
    shutil.rmtree(begun.out / "states")
    shutil.rmtree(begun.out / "export")
    rewrite(begun.out / "corpus.safetensors", lambda tokens: tokens ^ 1)
    (begun.out / "tokenizer.json").write_text("{}")
    train(begun.settings, resume=True, listener=nothing)
    assert records(begun.out, "train", "eval") == records(whole.out, "train", "eval")


def test_another_text_is_refused_before_anything_is_written(begun):
    with (begun.folder / "text.txt").open("a") as file:
        file.write(" And so on.")
    before = contents(begun.out)
    with pytest.raises(SettingsError, match=r"data\.paths: --resume needs the text"):
        train(begun.settings, resume=True, listener=nothing)
    assert contents(begun.out) == before


# ------------------------------------------------------------------------------------------------- absurd settings

UNBOUNDED = ("seed", "steps", "warmup", "log_every", "eval_every", "save_every", "keep", "heldout_tokens")
HUGE = [
    f"{name}.{key}={2**31 - 1}"
    for name, table in read(None, ["data.paths=my.txt"]).as_dict().items()
    for key, value in table.items()
    if type(value) is int and key not in (*UNBOUNDED, "vocab_size")
]
OTHERS = [
    "train.seed=1000000000000000",
    f"train.seed={2**63}",
    "train.learning_rate=1e300",
    "train.rows=4000000",
    "data.heldout=1e-9",
    "model.routed_scaling_factor=nan",
    "train.bias_rate=nan",
    "train.ffn_experts=2.999e5",
]


@pytest.mark.parametrize("change", [*HUGE, *OTHERS])
def test_absurd_settings_write_nothing(tmp_path, capsys, change):
    settings = settings_for(tmp_path, "out")
    code = main([*arguments(settings), f"--set={change}"])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("zemoe: error: "), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [f"train.seed={2**31 - 1}", f"run.keep={2**31 - 1}", "model.vocab_size=2147483647"])
def test_large_settings_that_work(tmp_path, capsys, change):
    settings = settings_for(tmp_path, "out", "train.steps=1")
    assert main([*arguments(settings), f"--set={change}"]) == 0, capsys.readouterr().err


def test_the_largest_learning_rate(tmp_path, capsys):
    changes = ("train.learning_rate=1e30", "train.weight_decay=1e6", "train.warmup=0", "train.steps=3")
    code = main(arguments(settings_for(tmp_path, "out", *changes)))
    assert code in (0, 1) and capsys.readouterr().err.count("\n") <= 1


# ---------------------------------------------------------------------------------------- what ends it, phase by phase


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tokenizer.json", "the tokenizer or the encoded text"),
        ("corpus.safetensors", "the tokenizer or the encoded text"),
        ("export/model.safetensors", "the export"),
        ("states/step-00000004/tensors-00001.safetensors", "the state of step 4"),
    ],
)
def test_a_file_for_which_there_is_no_room(whole, tmp_path, name, what):
    shutil.copy(whole.folder / "text.txt", tmp_path)
    settings, stderr = settings_for(tmp_path, "out", "run.eval_every=2"), tmp_path / "stderr"
    most = (whole.out / name).stat().st_size - 1
    assert ended(start(with_small_files, arguments(settings), most, stderr)) == 1
    assert stderr.read_text().startswith(f"zemoe: error: {tmp_path / 'out'}") and stderr.read_text().count("\n") == 1
    said = f"{what} could not be written"
    assert said in stderr.read_text() and "begin anew with --resume when there is room" in stderr.read_text()
    assert not list((tmp_path / "out").rglob(".*"))
    train(settings_for(tmp_path, "out"), resume=True, listener=nothing)
    assert records(tmp_path / "out", "train", "eval") == records(whole.out, "train", "eval")


@pytest.mark.parametrize(
    "where",
    [("data", "train_tokenizer"), ("state", "write_bytes"), ("data", "save_file"), ("files", "recover"),
     ("state", "write_json"), ("run", "build"), ("run", "compile_loops")],
    ids="-".join,
)  # fmt: skip
def test_killed_before_the_first_step(whole, tmp_path, where):
    shutil.copy(whole.folder / "text.txt", tmp_path)
    settings = settings_for(tmp_path, "out")
    assert ended(start(dies_in, settings, *where)) == -signal.SIGKILL
    train(settings, resume=True, listener=nothing)
    assert records(tmp_path / "out", "train", "eval") == records(whole.out, "train", "eval")
    assert {*contents(tmp_path / "out")} == {*contents(whole.out)} - {
        f"states/step-00000004/{name}" for name in ("state.json", "tensors-00001.safetensors")
    }


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("kind", ["train", "eval", "saved"])
def test_the_exit_code_of_a_signal(whole, tmp_path, monkeypatch, capsys, number, code, kind):
    shutil.copy(whole.folder / "text.txt", tmp_path)

    class Stopper(View):
        sent = False

        def __call__(self, record: dict) -> None:
            if record["kind"] == kind and not self.sent:
                self.sent = True
                signal.raise_signal(number)

    settings = settings_for(tmp_path, "out")
    with monkeypatch.context() as patch:
        patch.setattr(command, "open_view", lambda *_: Stopper())
        assert main(arguments(settings)) == code
    stopped = Reader(tmp_path / "out" / "states").step
    assert stopped == {"train": 2, "eval": 7, "saved": 5}[kind]
    assert capsys.readouterr().err == ""
    assert main([*arguments(settings), "--resume"]) == 0
    assert records(tmp_path / "out", "train", "eval") == records(whole.out, "train", "eval")
