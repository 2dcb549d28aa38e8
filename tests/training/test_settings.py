"""Settings of `zemoe train`: what is read, what is refused, and with which words."""

from __future__ import annotations

import math

import pytest
import torch

from zemoe.training.settings import SettingsError, make, read

DATA = {"data": {"paths": ["a.txt"]}}


def test_a_file_then_overrides_then_options(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nhidden_size = 64\n[data]\npaths = ["a.txt", "texts"]\n[train]\nsteps = 7\nlearning_rate = 1\n'
        "[report]\nplots = true\n"
    )
    overrides = ["train.steps=8", "train.rows = 4", "model.tokenizer=my tokens.json", 'run.out="x"', "train.clip=2"]
    settings = read(path, overrides, {"train": {"rows": 6}, "run": {"device": "cpu"}})
    assert settings.model.hidden_size == 64 and settings.model.num_layers == 4
    assert settings.data.paths == ("a.txt", "texts")
    assert (settings.train.steps, settings.train.rows, settings.train.clip) == (8, 6, 2.0)
    assert settings.train.learning_rate == 1.0 and isinstance(settings.train.learning_rate, float)
    assert (settings.model.tokenizer, settings.run.out, settings.run.device) == ("my tokens.json", "x", "cpu")
    assert settings.report.plots


def test_paths_may_be_one_string():
    assert read(None, ["data.paths=my.txt"]).data.paths == ("my.txt",)
    assert read(None, ['data.paths=["a", "b"]']).data.paths == ("a", "b")


def test_plain_values_and_back():
    settings = read(None, ["data.paths=my.txt", "train.steps=3"])
    assert make(settings.as_dict(), "again") == settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "train.steps must be at least 1, got 0"),
        ("train.steps=1.5", "train.steps must be a whole number, got 1.5"),
        ("train.steps=true", "train.steps must be a whole number, got True"),
        ("train.steps=many", "train.steps must be a whole number, got 'many'"),
        ("train.learning_rate=0", "train.learning_rate must be above 0, got 0.0"),
        ("train.learning_rate=nan", "train.learning_rate must be above 0, got nan"),
        ("train.balance=nan", "train.balance must be at least 0, got nan"),
        ("train.weight_decay=inf", "train.weight_decay must be at most 1000000, got inf"),
        ("train.final_rate=2", "train.final_rate must be between 0 and 1, got 2.0"),
        ("train.accumulate=3", "train.rows must be a multiple of train.accumulate=3, got 16"),
        ("train.dtype=float16", "train.dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ("run.parallel=tp", "run.parallel must be one of ddp, fsdp, got 'tp'"),
        ("run.layout=mine", "run.layout must be one of original, transformers, got 'mine'"),
        ("run.export_dtype=auto", "run.export_dtype must be one of float32, bfloat16, got 'auto'"),
        ("run.keep=0", "run.keep must be at least 1, got 0"),
        ("run.out=", "run.out must be a folder, got ''"),
        ("data.heldout=1", "data.heldout must be between 0 and 1, got 1.0"),
        ("data.paths=[1]", "data.paths must be a list of strings, got [1]"),
        ("data.paths=[]", "data.paths must be at least one text file or folder"),
        ("model.hidden_size=0", "model.hidden_size must be at least 1, got 0"),
        ("model.zero_expert_num=-1", "model.zero_expert_num must be at least 0, got -1"),
        ("report.plots=1", "report.plots must be true or false, got 1"),
        ("train.stepz=1", "unknown key train.stepz; there are steps, rows"),
        ("training.steps=1", "unknown section [training]; there are model, data, train, run, report"),
        ("steps=1", "--set must look like train.steps=200, got 'steps=1'"),
        ("train.steps", "--set must look like train.steps=200, got 'train.steps'"),
        ("train.steps=1\nclip=2", "train.steps must be a whole number"),
    ],
)
def test_refused(override, message):
    with pytest.raises(SettingsError) as caught:
        read(None, ["data.paths=my.txt", override])
    assert message in str(caught.value)


def test_no_data():
    with pytest.raises(SettingsError, match=r"data\.paths must be at least one text file or folder \(--data\)"):
        read(None)


@pytest.mark.parametrize("text", ["train = 3", "[train\n", "\xff"])
def test_bad_file(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError, match=r"run\.toml: (train must be a section, got 3|not readable as TOML)"):
        read(path, ["train.steps=3"])


def test_missing_file(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.toml: not readable"):
        read(tmp_path / "none.toml")


def test_a_start_brings_its_own_sizes():
    with pytest.raises(SettingsError, match=r"model\.hidden_size can't be set beside model\.start"):
        make({**DATA, "model": {"start": "models/tiny", "hidden_size": 64}}, "settings")
    make({**DATA, "model": {"start": "models/tiny", "hidden_size": 256}}, "settings")


def test_what_decides():
    base = read(None, ["data.paths=my.txt"])
    same = ["run.out=b", "run.log_every=3", "train.accumulate=2", "data.paths=other.txt", "report.plots=true"]
    assert read(None, ["data.paths=my.txt", *same, "train.checkpoint_activations=true"]).that_decide() == (
        base.that_decide()
    )
    for other in ("train.steps=3", "train.seed=1", "model.num_layers=2", "data.context=8", "train.dtype=float32"):
        assert read(None, ["data.paths=my.txt", other]).that_decide() != base.that_decide()


ABSURD = [
    math.nan,
    math.inf,
    -math.inf,
    0,
    -1,
    10**15,
    2**31,
    -(2**63),
    2**64,
    10**400,
    1e300,
    1e15,
    0.5,
    "",
    "x",
    [],
    True,
]
NUMBERS = [
    (f"{section}.{key}", value)
    for section, table in read(None, ["data.paths=my.txt"]).as_dict().items()
    for key, value in table.items()
    if type(value) in (int, float)
]


@pytest.mark.parametrize(("key", "default"), NUMBERS)
def test_absurd_numbers(key, default):
    """Refused in a line that names the key, or a number with which all that is derived of it fits."""
    section, name = key.split(".")
    for value in ABSURD:
        said = None
        try:
            settings = make({"data": DATA["data"]} | {section: DATA.get(section, {}) | {name: value}}, "test")
        except SettingsError as error:
            said = str(error)
        if said is not None:
            assert (key in said or "train.rows" in said) and "\n" not in said, value
            continue
        taken = settings.get(key)
        assert type(taken) is type(default) and math.isfinite(taken) and taken >= 0
        train = settings.train
        assert train.rows * settings.data.context < 2**31
        assert (train.seed * 1_000_003 + train.steps) * 1000 < 2**63  # as run.py has it, on as many processes
        assert train.learning_rate * train.weight_decay < torch.finfo(torch.float32).max


@pytest.mark.parametrize("text", ["9" * 5000, "0x" + "f" * 5000, "1e999999", "-" + "9" * 5000])
def test_numbers_that_python_does_not_write(tmp_path, text):
    for key in ("train.seed", "train.learning_rate", "train.dtype"):
        with pytest.raises(SettingsError, match=key):
            read(None, ["data.paths=my.txt", f"{key}={text}"])
    (tmp_path / "a.toml").write_text(f"[train]\nseed = {text}\n")
    with pytest.raises(SettingsError, match=r"a\.toml: not readable|train\.seed must be"):
        read(tmp_path / "a.toml")
