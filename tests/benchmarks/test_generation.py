"""benchmarks/gpu/generation.py from end to end, on a tiny model on the CPU."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from helpers.paths import ROOT
from zemoe.integrations.transformers import layers

SCRIPT = ROOT / "benchmarks" / "gpu" / "generation.py"
SMALL = ["--tiny", "--layers", "1", "--prompt", "8", "--tokens", "4", "--stock-tokens", "3", "--prefill", "16"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("generation_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as for a script that is run
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def rows_of(script: ModuleType, output: Path, *arguments: str) -> dict[tuple[str, str, str], dict[str, str]]:
    script.main([*SMALL, "--commit", "abc", "--output", str(output), *arguments])
    with output.open() as file:
        return {(row["side"], row["mode"], row["batch"]): row for row in csv.DictReader(file)}


def test_every_row(script, tmp_path, capsys):
    arguments = ["--batches", "1", "2", "--compiled-batches", "2"]
    rows = rows_of(script, tmp_path / "new" / "generation.csv", *arguments)
    modes = [("prefill", "1"), ("eager", "1"), ("eager", "2"), ("compiled", "2")]
    assert list(rows) == [(side, *mode) for side in ("stock", "masked", "zemoe") for mode in modes]
    for key, row in rows.items():
        assert (row["layers"], row["E"], row["Z"], row["dtype"], row["commit"]) == ("1", "16", "8", "float32", "abc")
        assert row["torch"] and row["triton"] and row["transformers"] and row["seed"] == "0"
        if row["side"] == "stock":
            assert not row["layer_error"] and not row["backend"]
        else:
            assert float(row["layer_error"]) < 1e-5 and float(row["logits_error"]) < 1e-5 and row["backend"]
        if key == ("stock", "compiled", "2"):
            assert row["note"].startswith("does not compile: ") and not row["tokens_per_second"]
            continue
        tokens = int(row["batch"]) if row["mode"] != "prefill" else 16
        assert float(row["tokens_per_second"]) == pytest.approx(1e3 * tokens / float(row["ms_per_step"]), rel=2e-2)
        if row["side"] != "stock" and row["mode"] != "prefill":
            assert float(row["same_tokens"]) == 1
    assert rows["zemoe", "eager", "2"]["zero_share"]
    for side in ("masked", "zemoe"):
        assert rows[side, "compiled", "2"]["note"] == "graphs: 1, graph breaks: 0, CUDA graphs skipped: 0"
    assert "tokens per second" in capsys.readouterr().out


def test_some_sides(script, tmp_path):
    """Without stock's rows the layers are checked against stock's all the same, and patched at the end."""
    arguments = ["--sides", "zemoe", "batched", "--batches", "2", "--compiled-batches"]
    rows = rows_of(script, tmp_path / "generation.csv", *arguments)
    assert list(rows) == [(side, *mode) for side in ("batched", "zemoe") for mode in (("prefill", "1"), ("eager", "2"))]
    assert rows["batched", "eager", "2"]["backend"] == "batched_mm"
    assert not rows["batched", "eager", "2"]["same_tokens"]  # the first side
    assert rows["zemoe", "eager", "2"]["same_tokens"] == "1.000"


def test_masked_experts_share_stocks_weights_and_leave_them(script):
    """Rows of zero choices cost no product: with weights of NaN nothing of them is left."""
    torch.manual_seed(0)
    model = script.build(script.TINY, torch.device("cpu"), torch.float32)
    layer = model.model.layers[1].mlp
    stock = layer.experts
    x_TH, zero = torch.randn(5, 64), torch.full((5, 4), 16)
    with script.masked(model, "grouped_mm"):
        assert layer.experts.ffn.gate_up_proj.data_ptr() == stock.gate_up_proj.data_ptr()
        assert layer.experts.ffn.down_proj.data_ptr() == stock.down_proj.data_ptr()
        assert layer.experts.ffn.gate_up_proj.shape[0] == 16
        stock.gate_up_proj.data.fill_(float("nan"))
        torch.testing.assert_close(layer.experts(x_TH, zero, torch.full((5, 4), 0.25)), x_TH)
    assert layer.experts is stock and stock.gate_up_proj.shape[0] == 24


@pytest.mark.parametrize(("error", "note"), [(torch.OutOfMemoryError, "out of memory"), (None, None)])
def test_what_does_not_fit_is_a_row_that_says_so(script, tmp_path, monkeypatch, error, note):
    def fails(*arguments):
        raise error or ValueError

    monkeypatch.setattr(script, "prefill", fails)
    arguments = ["--sides", "masked", "--batches", "1", "--compiled-batches"]
    if note is None:  # anything else ends the run
        with pytest.raises(ValueError):
            rows_of(script, tmp_path / "generation.csv", *arguments)
    else:
        rows = rows_of(script, tmp_path / "generation.csv", *arguments)
        assert rows["masked", "prefill", "1"]["note"] == note
        assert rows["masked", "eager", "1"]["tokens_per_second"]


def test_layers_that_differ_from_stock_are_not_timed(script, monkeypatch, capsys):
    """Weights a hundredth too large: the layers are refused before any of their rows."""
    forward = layers.ZeroExpertLongcatExperts.forward
    monkeypatch.setattr(
        layers.ZeroExpertLongcatExperts,
        "forward",
        lambda self, x, ids, weights: forward(self, x, ids, 1.01 * weights),
    )
    with pytest.raises(SystemExit, match=r"layers differ from stock's by 1\.0\de-02"):
        script.main([*SMALL, "--sides", "zemoe", "--batches", "1", "--compiled-batches"])
    assert "side zemoe" not in capsys.readouterr().out


def test_steps_are_the_times_between_new_tokens(script):
    clock = script.Clock()
    clock.seconds = [0.0, 5.0, 6.0, 8.0]  # the prompt handed in, then three tokens
    assert clock.steps == [1.0, 2.0]


def test_layers_fill_the_free_memory(script, monkeypatch):
    """Full size, on paper: 6.8 GB a layer with stock's dead rows, 1.6 GB of embeddings."""
    for free, fitting in ((80, 10), (140, 14), (20, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, free * 2**30))
        assert script.fitting_layers(script.LITE, torch.bfloat16) == fitting
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
    report.add(side="masked", mode="compiled", batch=1, tokens_per_second="40.0")  # the better one
    assert list(report.table().columns[-1].cells) == ["-", "1.25"]
