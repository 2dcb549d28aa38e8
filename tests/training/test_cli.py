"""`zemoe train` and `zemoe report` as people and programs use them, from a text file to a model that writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.judge import one_thread
from helpers.processes import assert_clean
from helpers.terminals import without_compiling
from helpers.tiny_checkpoint import write_checkpoint, write_fp8
from zemoe.cli import main
from zemoe.training import report
from zemoe.training.command import FINE_TUNE, TrainRequest, settings_of
from zemoe.training.settings import Settings, SettingsError
from zemoe.training.state import sealed
from zemoe.training.view import View

TEXT = "In the morning the sea was still, and in the evening the wind came over it.\n" * 60
SMALL = ["train.steps=4", "train.rows=2", "data.context=16", "run.log_every=2", "run.eval_every=2", "run.save_every=2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "my.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def train(checkpoint, text, tmp_path, capsys):
    """Run `zemoe train` on the random checkpoint and the text, into `out`; exit code, stdout and stderr."""

    def run(*arguments, out=tmp_path / "run", start=checkpoint, data=text, sets=()):
        named = [*(["--from", start] if start else []), *(["--data", data] if data else []), "--out", out]
        changes = [part for change in [*SMALL, *sets] for part in ("--set", change)]
        with one_thread():
            code = main(["train", *map(str, [*named, *changes, *arguments])])
        return code, *capsys.readouterr()

    return run


# --------------------------------------------------------------------------------------------------------- one command


def test_from_a_text_to_a_model_that_writes(train, tmp_path, capsys):
    code, out, err = train()
    assert (code, without_compiling(err)) == (0, "")
    head, *lines, last = out.splitlines()
    assert "2 layers, 4 of 5 FFN and 3 zero experts a token; " in head and "32 a step" in head
    assert [re.match(r"step \d+( of 4)?: (loss|held-out|saved)", line)[0] for line in lines] == [
        "step 0: held-out",
        "step 1 of 4: loss",
        "step 2 of 4: loss",
        "step 2: held-out",
        "step 2: saved",
        "step 4 of 4: loss",
        "step 4: held-out",
        "step 4: saved",
    ]
    assert last.startswith("finished at step 4") and last.endswith(f"zemoe generate --model {tmp_path}/run/export")
    with one_thread():
        assert main(["generate", *f"--model {tmp_path}/run/export --json --max-new-tokens 5 --seed 1".split(" ")]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 5


def test_json_is_metrics_jsonl(train, tmp_path):
    code, out, err = train("--json")
    assert (code, without_compiling(err)) == (0, "")
    assert out == (tmp_path / "run" / "metrics.jsonl").read_text()
    kinds = [json.loads(line)["kind"] for line in out.splitlines()]
    assert kinds == ["run", "eval", "train", "train", "eval", "saved", "train", "eval", "saved", "end"]


def test_a_new_model_from_text_alone(train, tmp_path):
    sizes = "hidden_size=16 num_layers=1 ffn_hidden_size=16 expert_ffn_hidden_size=8 q_lora_rank=8 kv_lora_rank=8 "
    sizes += "qk_nope_head_dim=8 qk_rope_head_dim=8 v_head_dim=8 n_routed_experts=4 zero_expert_num=2 moe_topk=3"
    sets = [f"model.{size}" for size in sizes.split()] + ["model.vocab_size=300"]
    code, out, _ = train(start=None, sets=sets)
    assert code == 0 and "1 layers, 3 of 4 FFN and 2 zero experts" in out
    assert json.loads((tmp_path / "run" / "export" / "config.json").read_text())["hidden_size"] == 16


@pytest.mark.parametrize("number", ["model.num_layers=1000000000", "model.n_routed_experts=1000000000"])
def test_a_model_that_fits_into_no_memory(train, number):
    """It isn't trained; a dry run, which may be about another machine, says how large it is."""
    sets = [number, "model.vocab_size=300"]
    code, out, err = train(start=None, sets=sets)
    assert (code, out) == (2, "")
    refusal = r"model: [\d,]+ GB of weights don't fit into this machine's memory of \d+"
    assert re.match(f"zemoe: error: {refusal}", err)
    code, out, err = train("--dry-run", start=None, sets=sets)
    assert (code, without_compiling(err)) == (0, "")
    assert re.search(rf"^# model: [\d,.]+ B parameters, .*^# this machine can't train it: {refusal}", out, re.M | re.S)
    planned = json.loads(train("--dry-run", "--json", start=None, sets=sets)[1])
    assert planned["parameters"] > 10**11 and re.match(refusal, planned["refused_here"])


def test_a_start_that_fits_into_no_memory(train, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("zemoe.training.model.total_bytes", lambda: 10_000)
    code, out, err = train()
    assert (code, out) == (2, "") and "GB of weights don't fit into this machine's memory" in err
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    assert json.loads(train("--dry-run", "--json")[1])["refused_here"] is None


def test_more_tokens_than_the_text_can_have(train, tmp_path):
    """The library that trains the tokenizer would set memory aside for all of them."""
    assert train(start=None, sets=["model.vocab_size=2000000000", "train.steps=1"], data=text_of(tmp_path))[0] == 0
    assert json.loads((tmp_path / "run" / "export" / "config.json").read_text())["vocab_size"] < 1000


def text_of(folder: Path) -> Path:
    (folder / "words.txt").write_text(TEXT, encoding="utf-8")
    return folder / "words.txt"


def test_an_fp8_checkpoint_is_a_start_and_writes_text(train, checkpoint, tmp_path, capsys):
    meant = write_fp8(checkpoint, tmp_path / "fp8")
    code, _, err = train("--set", "train.steps=1", "--set", "train.learning_rate=1e-30", start=tmp_path / "fp8")
    assert (code, without_compiling(err)) == (0, "")
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    for name, tensor in meant.items():
        if not name.endswith("bias"):  # which the controller moves
            torch.testing.assert_close(exported[name], tensor, rtol=1e-5, atol=1e-6)
    plain = shutil.copytree(checkpoint, tmp_path / "plain")
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    texts = []
    for folder in (tmp_path / "fp8", plain):
        arguments = f"generate --model {folder} --dtype float32 --json --max-new-tokens 9 --seed 1"
        assert main(arguments.split(" ")) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]
    assert train("--dry-run", start=tmp_path / "fp8", out=tmp_path / "other")[0] == 0


def test_what_belongs_to_a_checkpoint_stays_with_it(train, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    beside = {"chat_template.jinja": "{{ messages }}", "special_tokens_map.json": "{}", "tokenizer_config.json": "{}"}
    beside |= {"generation_config.json": "{}", "additional_chat_templates/tool.jinja": "{{ tools }}", "LICENSE": "mine"}
    (folder / "additional_chat_templates").mkdir()
    for name, content in beside.items():
        (folder / name).write_text(content)
    (folder / "optimizer.pt").write_text("not of the model")
    assert train("--set", "train.steps=1", start=folder)[0] == 0
    export = tmp_path / "run" / "export"
    assert {name: (export / name).read_text() for name in beside} == beside
    assert not (export / "optimizer.pt").exists()


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TimeoutError in what waits longer, for example to open a pipe."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


IN_A_RUN = ["lock", "metrics.jsonl", "settings.json", "tokenizer.json", "states/step-00000004/state.json"]


def test_pipes_in_the_folder_of_a_run(train, tmp_path, capsys):
    assert train()[0] == 0
    for name in [*IN_A_RUN, "states/step-00000004/tensors-00001.safetensors"]:
        folder = shutil.copytree(tmp_path / "run", tmp_path / name.replace("/", "-"))
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with one_thread(), at_most(60):
            code = main(["train", "--resume", "--out", str(folder)])
        err = capsys.readouterr().err
        assert code in (1, 2) and err.count("\n") == 1, err
        assert name in err or (name == "lock" and "file lock" in err)


def test_long_and_odd_paths(train, text, tmp_path, capsys):
    """One line each, and the exit code for what was asked wrongly or could not be written."""
    long, pipe = "n" * 300, tmp_path / "pipe"
    os.mkfifo(pipe)
    data = ["--data", str(text)]
    out = ["--out", str(tmp_path / "run")]
    asked = [["generate", "--model"], ["train", *data, *out, "--from"], ["train", *out, "--data"], ["report"]]
    asked += [["train", *data, *out, "--config"], ["train", *data, *out, "--set", "model.tokenizer="]]
    for arguments in asked:
        for path in (long, str(tmp_path / long / "x"), str(pipe), "/dev/zero", "a\0b"):
            joined = [*arguments[:-1], arguments[-1] + path] if arguments[-1].endswith("=") else [*arguments, path]
            with at_most(60):
                code = main(joined)
            err = capsys.readouterr().err
            assert code == 2 and err.count("\n") == 1 and len(err) <= 501 and err[:-1].isprintable(), joined
    assert main(["train", *data, "--from", str(tmp_path), "--out", long]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_the_folder_of_a_run_is_kept(train, tmp_path):
    assert train()[0] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, out, err = train()
    assert (code, out) == (2, "")
    assert err.startswith("zemoe: error: run.out") and "--resume" in err and err.count("\n") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_with_the_folder_alone(train, tmp_path, capsys):
    assert train()[0] == 0
    with one_thread():
        code = main(["train", "--resume", "--out", str(tmp_path / "run"), "--set", "run.log_every=1", "--json"])
    out = capsys.readouterr().out
    assert code == 0
    first, end = map(json.loads, out.splitlines())
    assert (first["kind"], first["step"], first["steps"], end["reason"]) == ("run", 4, 4, "finished")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["run"]["log_every"] == 1


def test_resume_shows_what_was_before(train, tmp_path, monkeypatch):
    remembered = []
    monkeypatch.setattr(View, "remember", lambda self, train, evals: remembered.extend([*train, *evals]))
    assert train("--resume")[0] == 0, "there is nothing before, and that is fine"
    (tmp_path / "new").mkdir()
    shutil.copy(tmp_path / "run" / "metrics.jsonl", tmp_path / "new")
    assert train(out=tmp_path / "new")[0] == 0, "this begins anew: there is no state"
    assert remembered == []
    assert train("--resume")[0] == 0
    assert [(record["kind"], record["step"]) for record in remembered] == [
        ("train", 1),
        ("train", 2),
        ("train", 4),
        ("eval", 0),
        ("eval", 2),
        ("eval", 4),
    ]


def test_plots_of_the_run(train, tmp_path, monkeypatch):
    assert train(sets=["report.plots=true"])[0] == 0
    assert len(list((tmp_path / "run" / "plots").glob("*.png"))) == 4
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    code, out, err = train(out=tmp_path / "other", sets=["report.plots=true"])
    assert (code, out) == (1, "") and "pip install 'zemoe[report]'" in err
    assert not (tmp_path / "other").exists(), "that is said before hours of training"


def test_other_processes_of_torchrun_show_errors_alone(train, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert train(sets=["report.plots=true"]) == (0, "", "")
    assert not (tmp_path / "run" / "plots").exists()
    code, out, err = train(sets=["train.steps=0"])
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("zemoe: error: process 1: train.steps must")
    monkeypatch.setenv("RANK", "0")
    assert train(out=tmp_path / "other")[1] != ""


# ------------------------------------------------------------------------------------------------------------ settings


def test_what_stands_above_what(tmp_path, checkpoint):
    config = tmp_path / "run.toml"
    config.write_text('[train]\nsteps = 7\nrows = 6\n[run]\nout = "file"\n[data]\npaths = ["file.txt"]\n')
    plain = settings_of(TrainRequest(config=config))
    assert (plain.train.steps, plain.train.rows, plain.run.out, plain.data.paths) == (7, 6, "file", ("file.txt",))
    assert plain.train.learning_rate == Settings(data=plain.data).train.learning_rate
    above = settings_of(
        TrainRequest(config=config, data=("a", "b"), out="named", overrides=("train.rows=4", 'run.out="set"'))
    )
    assert (above.train.steps, above.train.rows, above.run.out, above.data.paths) == (7, 4, "named", ("a", "b"))


def test_a_fine_tune_has_defaults_of_its_own(tmp_path):
    new = settings_of(TrainRequest(data=("a",)))
    tuned = settings_of(TrainRequest(data=("a",), start="models/tiny"))
    for section, table in FINE_TUNE.items():
        for key, value in table.items():
            assert getattr(getattr(tuned, section), key) == value != getattr(getattr(new, section), key)
    assert tuned.train.clip == new.train.clip
    config = tmp_path / "run.toml"
    config.write_text('[model]\nstart = "models/tiny"\n[train]\nlearning_rate = 1e-3\n[data]\npaths = ["a"]\n')
    said = settings_of(TrainRequest(config=config, overrides=("train.steps=9",)))
    assert (said.train.learning_rate, said.train.steps, said.train.rows) == (1e-3, 9, FINE_TUNE["train"]["rows"])


def test_settings_of_a_run_come_back(tmp_path, monkeypatch):
    odd = settings_of(TrainRequest(data=('a "quoted" é 🌊\\n', "b"), overrides=("train.learning_rate=1e-7",), out="x"))
    (tmp_path / "settings.json").write_text(json.dumps(sealed(odd.as_dict())))
    again = settings_of(TrainRequest(resume=True, out=str(tmp_path)))
    assert again.as_dict() == odd.as_dict() | {"run": odd.as_dict()["run"] | {"out": str(tmp_path)}}
    named = settings_of(TrainRequest(resume=True, out=str(tmp_path), data=("c",)))
    assert named.train.learning_rate == settings_of(TrainRequest(data=("c",))).train.learning_rate
    default = tmp_path / settings_of(TrainRequest(data=("c",))).run.out
    default.mkdir(parents=True)
    (tmp_path / "settings.json").rename(default / "settings.json")
    monkeypatch.chdir(tmp_path)
    assert settings_of(TrainRequest(resume=True)) == odd
    no_section = json.dumps(sealed({"train": 1}))
    for content, said in (("[]", "no digest"), (no_section, "must be a section"), ("{", "--resume needs")):
        (default / "settings.json").write_text(content)
        with pytest.raises(SettingsError, match=f"settings.json: .*{said}"):
            settings_of(TrainRequest(resume=True))
    with pytest.raises(SettingsError, match="--resume needs"):
        settings_of(TrainRequest(resume=True, out=str(tmp_path / "nowhere")))


def test_dry_run(train, checkpoint, text, tmp_path, capsys):
    code, out, err = train("--dry-run")
    assert (code, without_compiling(err)) == (0, "") and not (tmp_path / "run").exists()
    code, planned, told = train("--dry-run", "--json")
    assert code == 0 and told == out, "the same, beside the JSON"
    planned = json.loads(planned)
    assert tomllib.loads(out) == planned["settings"]
    assert planned["settings"]["train"]["steps"] == 4 and planned["settings"]["run"]["out"] == str(tmp_path / "run")
    assert (planned["tokens_per_step"], planned["tokens"], planned["text_bytes"]) == (32, 128, len(TEXT))
    assert planned["logits_bytes"] == 32 * 275 * 4
    assert f"# text: {len(TEXT):,} bytes in 1 file, about {planned['train_tokens']:,} tokens to train on" in out

    (tmp_path / "again.toml").write_text(out)
    with one_thread():
        assert main(["train", "--config", str(tmp_path / "again.toml"), "--json"]) == 0
    run = json.loads(capsys.readouterr().out.splitlines()[0])
    same = ("parameters", "active_parameters", "k_e", "layers", "choices", "ffn_slots", "zero_slots", "tokens_per_step")
    assert {key: run[key] for key in same} == {key: planned[key] for key in same}
    for key in ("train_tokens", "heldout_tokens"):
        assert planned[key] == pytest.approx(run[key], abs=60), "the text is cut between lines"
    states = tmp_path / "run" / "states"
    stored = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    assert len(list(states.iterdir())) == 2 and stored < planned["disk_bytes"] < 2 * stored


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["train.poem=1"], "unknown key train.poem"),
        (["poem.steps=1"], "unknown section [poem]"),
        (["steps=1"], "--set must look like train.steps=200, got 'steps=1'"),
        (["train.steps=many"], "train.steps must be a whole number, got 'many'"),
        (["train.rows=0"], "train.rows must be at least 1, got 0"),
        (["run.device=abacus"], "run.device must be one that torch can use here (cpu"),
        (["data.context=97"], "data.context must be at most the model's 96, got 97"),
        (["train.ffn_experts=4"], "train.ffn_experts must be above 1 and below K=4"),
        (["model.hidden_size=8"], "model.hidden_size can't be set beside model.start"),
    ],
)
def test_what_is_asked_wrongly(train, tmp_path, sets, said):
    code, out, err = train(sets=sets)
    assert (code, out) == (2, "")
    assert err.startswith("zemoe: error: ") and said in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "states").exists()


def test_wrong_paths(train, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "poem.toml").write_text("[train\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for arguments, given, said in (
        ([], {"data": None}, "data.paths must be at least one text file or folder (--data)"),
        ([], {"data": tmp_path / "nowhere"}, "nowhere does not exist"),
        ([], {"data": tmp_path / "empty"}, "no *.txt in the folder"),
        ([], {"data": tmp_path / "latin"}, "latin is not readable as UTF-8 text"),
        ([], {"start": tmp_path / "nowhere"}, "model.start must be a checkpoint folder"),
        ([], {"start": tmp_path / "empty"}, "config.json"),
        (["--config", tmp_path / "poem.toml"], {}, "poem.toml: not readable as TOML"),
        (["--config", tmp_path / "none.toml"], {}, "none.toml: not readable as TOML"),
    ):
        code, out, err = train(*arguments, **given)
        assert (code, out) == (2, ""), err
        assert err.startswith("zemoe: error: ") and said in err and err.count("\n") == 1


def test_a_folder_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").touch()
    code, out, err = train(out=tmp_path / "file" / "run")
    assert (code, out) == (1, "") and err.startswith("zemoe: error: ") and err.count("\n") == 1 and "file/run" in err


def test_a_run_that_diverges(train, tmp_path):
    code, out, err = train("--json", sets=["train.learning_rate=1e30", "train.warmup=0", "train.steps=20"])
    assert code == 1 and "train.learning_rate" in err and err.count("\n") == 1
    assert json.loads(out.splitlines()[-1])["reason"] == "diverged"


def test_a_damaged_state(train, tmp_path):
    assert train()[0] == 0
    damaged = next((tmp_path / "run" / "states" / "step-00000004").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-10])
    code, out, err = train("--resume")
    assert (code, out) == (1, "") and str(damaged) in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't allocate memory: 1"), OSError(28, "No space left")]
)
def test_the_machine_fails(train, monkeypatch, error):
    def fail(*arguments, **named):
        raise error

    monkeypatch.setattr("zemoe.training.run.train", fail)
    code, _, err = train()
    assert code == 1 and re.search("emory|space", err) and err.count("\n") == 1


def test_other_errors_are_not_hidden(train, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("zemoe.training.run.train", fail)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        train()


# ---------------------------------------------------------------------------------------------------------- a terminal


def test_the_live_view_and_ctrl_c(on_terminal, checkpoint, text, tmp_path, capsys):
    sets = [part for change in (*SMALL[1:3], "run.log_every=1") for part in ("--set", change)]
    arguments = ["--from", checkpoint, "--data", text, "--out", tmp_path / "run", *sets]
    session = on_terminal("train", *arguments, "--set", "train.steps=100000", OMP_NUM_THREADS="1")
    session.read_until(r"FFN experts.*K_e")
    os.write(session.fd, b"\x03")
    assert session.finish() == 130
    assert_clean(session)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", session.written)
    step = int(re.search(r"stopped at step (\d+)", shown)[1])
    assert "to go on: the same command with --resume" in " ".join(shown.split())
    assert [path.name for path in (tmp_path / "run" / "states").iterdir()] == [f"step-{step:08d}"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["reason"], last["step"]) == ("end", "stopped", step)
