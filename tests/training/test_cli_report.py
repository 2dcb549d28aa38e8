"""`zemoe report` on a run, and the commands that the pages show."""

from __future__ import annotations

import json
import os
import re

from helpers import training_records as records
from helpers.judge import one_thread
from helpers.paths import ROOT
from helpers.terminals import without_compiling
from zemoe.cli import main
from zemoe.training.command import TrainRequest, settings_of
from zemoe.training.state import sealed

# -------------------------------------------------------------------------------------------------------------- report


def test_report(tmp_path, capsys):
    folder = tmp_path / "[red]run"
    folder.mkdir()
    given = list(records.whole())
    given.insert(2, records.evaluation(10, best=True, bits=1.9))
    lines = [json.dumps(record) for record in given]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tr']))
    assert main(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert without_compiling(err) == ""
    assert out.splitlines() == [
        "7.9 M parameters, 5.1 M used by a token; 2 layers, 6 of 16 FFN and 8 zero experts a token; cpu, float32; "
        "12,345 tokens to train on, 678 held out, 512 a step",
        "step 40 of 40: loss 3.000, 1.000 bits/byte, FFN experts 4.00 ± 0.90 of 6 a token, K_e 4, zero share 33.3%, "
        "learning rate 0.0003, 3,211 tokens/s",
        "best held-out 1.625 bits/byte at step 20",
        "lines of metrics.jsonl that are unreadable and left out: 1",
        *(f"{folder}/plots/{name}.png" for name in ("ffn_experts", "loss", "zero_share", "bias")),
    ]
    assert main(["report", str(folder), "--json"]) == 0
    result, told = capsys.readouterr()
    assert told == out
    result = json.loads(result)
    assert result["best"]["step"] == 20 and result["last"]["step"] == 40 and result["unreadable_lines"] == 1
    assert all(os.path.getsize(path) > 1000 for path in result["plots"]) and len(result["plots"]) == 4


def test_report_of_nothing(tmp_path, capsys):
    (tmp_path / "file").touch()
    for name, code, said in (
        ("nowhere", 2, "found nothing at"),
        ("file", 2, "found a file at"),
        ("", 1, "metrics.jsonl"),
    ):
        assert main(["report", str(tmp_path / name)]) == code
        err = capsys.readouterr().err
        assert err.startswith("zemoe: error: ") and said in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------- pages


def test_the_commands_of_the_pages_are_understood(tmp_path, monkeypatch, capsys):
    """All of them but for what they would train: that takes minutes."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/train.md")]
    commands = re.findall(r"^(?:torchrun .*)?(zemoe (?:train|report) [^#\n]*)", "\n".join(_blocks(pages)), re.MULTILINE)
    assert len(commands) == 8
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my.txt").write_text("the sea and the wind\n" * 500, encoding="utf-8")
    new = settings_of(TrainRequest(config=ROOT / "examples" / "train.toml", data=("my.txt",), out="runs/new"))
    (tmp_path / "runs" / "new").mkdir(parents=True)
    (tmp_path / "runs" / "new" / "settings.json").write_text(json.dumps(sealed(new.as_dict())))
    (tmp_path / "runs" / "new" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records.whole()))
    monkeypatch.chdir(tmp_path)
    with one_thread():
        for line in commands:
            program, *arguments = line.split()
            assert main([*arguments, *(["--dry-run"] if arguments[0] == "train" else [])]) == 0, line
            assert program == "zemoe" and capsys.readouterr().err == ""


def _blocks(pages: list[str]) -> list[str]:
    return [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
