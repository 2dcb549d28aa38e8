"""benchmarks/generation.py from end to end, on a tiny model on the CPU."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from zemoe.integrations import transformers_layers

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "generation.py"
SMALL = ["--tiny", "--layers", "1", "--prompt", "8", "--tokens", "4", "--stock-tokens", "3", "--prefill", "16"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generation_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def test_every_row(script, tmp_path, capsys):
    output = tmp_path / "new" / "generation.csv"
    arguments = ["--batches", "1", "2", "--compiled-batches", "2", "--commit", "abc", "--output", str(output)]
    script.main([*SMALL, *arguments])
    with output.open() as file:
        rows = {(row["side"], row["mode"], row["batch"]): row for row in csv.DictReader(file)}
    modes = [("prefill", "1"), ("eager", "1"), ("eager", "2"), ("compiled", "2")]
    assert list(rows) == [(side, *mode) for side in ("stock", "zemoe") for mode in modes]
    for key, row in rows.items():
        assert (row["layers"], row["E"], row["Z"], row["dtype"], row["commit"]) == ("1", "16", "8", "float32", "abc")
        assert row["torch"] and row["triton"] and row["transformers"] and row["seed"] == "0"
        assert float(row["layer_error"]) < 1e-5 and float(row["logits_error"]) < 1e-5
        if key == ("stock", "compiled", "2"):
            assert row["note"].startswith("does not compile: ") and not row["tokens_per_second"]
            continue
        tokens = int(row["batch"]) if row["mode"] != "prefill" else 16
        assert float(row["tokens_per_second"]) == pytest.approx(1e3 * tokens / float(row["ms_per_step"]), rel=2e-2)
        if row["side"] == "zemoe" and row["mode"] != "prefill":
            assert float(row["same_tokens"]) == 1
    assert rows["zemoe", "eager", "2"]["zero_share"]
    assert rows["zemoe", "compiled", "2"]["note"] == "graphs: 1, graph breaks: 0, CUDA graphs skipped: 0"
    assert "tokens per second" in capsys.readouterr().out


def test_layers_that_differ_from_stock_are_not_timed(script, monkeypatch, capsys):
    """A router that scales once too often: the layers are refused before any of their rows."""
    forward = transformers_layers.ZeroExpertLongcatExperts.forward
    monkeypatch.setattr(
        transformers_layers.ZeroExpertLongcatExperts,
        "forward",
        lambda self, x, ids, weights: forward(self, x, ids, 1.01 * weights),
    )
    with pytest.raises(SystemExit, match=r"our layers differ from stock's by 1\.0\de-02"):
        script.main([*SMALL, "--batches", "1", "--compiled-batches"])
    assert "side zemoe" not in capsys.readouterr().out


def test_steps_are_the_times_between_new_tokens(script):
    clock = script.Clock()
    clock.seconds = [0.0, 5.0, 6.0, 8.0]  # the prompt handed in, then three tokens
    assert clock.steps == [1.0, 2.0]


def test_layers_fill_the_free_memory(script, monkeypatch):
    """Full size, on paper: 6.8 GB a layer with stock's dead rows, 1.6 GB of embeddings."""
    for free, layers in ((80, 10), (140, 14), (20, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, free * 2**30))
        assert script.fitting_layers(script.LITE, torch.bfloat16) == layers
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    with pytest.raises(SystemExit, match="not even one layer"):
        script.fitting_layers(script.LITE, torch.bfloat16)


def test_a_batch_that_is_only_compiled_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main([*SMALL, "--batches", "1", "--compiled-batches", "2"])
    assert "--compiled-batches must be among --batches" in capsys.readouterr().err


def test_table_compares_compiled_with_stock_eager_where_stock_does_not_compile(script):
    report = script.Report(SimpleNamespace(print=lambda *args, **kwargs: None), None)
    report.add(side="stock", mode="eager", batch=1, tokens_per_second="10.0")
    report.add(side="stock", mode="compiled", batch=1, note="does not compile")
    report.add(side="zemoe", mode="compiled", batch=1, tokens_per_second="50.0")
    columns = [list(column.cells) for column in report.table().columns]
    assert columns == [["eager", "compiled"], ["1", "1"], ["10.0", "-"], ["-", "50.0"], ["-", "5.00"]]
