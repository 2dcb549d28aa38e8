"""`zemoe bench`: what is asked, checked before it is timed, counted, and written."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from rich.console import Console

import zemoe
from helpers.terminals import without_compiling
from zemoe import MoE, machine
from zemoe.bench import cases, check, command, request, table, timing
from zemoe.bench.baselines import BASELINES
from zemoe.bench.csv_files import write_csv
from zemoe.bench.row import _WARMUP
from zemoe.bench.timing import Ceilings, moe_floor, router_floor
from zemoe.cli import main
from zemoe.terminal import CommandError, figures

TINY = cases.Case(
    name="tiny",
    about="for these tests",
    hidden_size=32,
    intermediate_size=16,
    num_experts=8,
    num_zero_experts=6,
    top_k=4,
    routed_scaling_factor=2.0,
    tokens=(1, 5),
    devices=("cpu",),
)
AT = Ceilings(bytes_per_second=1e9, flops_per_second=1e10)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two small cases, a machine whose ceilings are known, and one thread: two only wait for each other here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    known = {"tiny": TINY, "other": replace(TINY, name="other", num_experts=12, devices=())}
    monkeypatch.setattr(cases, "load_cases", lambda: known)
    for name in ("cpu_ceilings", "cuda_ceilings"):
        monkeypatch.setattr(timing, name, lambda dtype: AT)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def call(capsys):
    """Run `zemoe bench` on the CPU with few rounds; the exit code, stdout and stderr."""

    def run(*arguments):
        code = main(["bench", "--device", "cpu", "--repeats", "2", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def result(call):
    """The JSON of a run that went well."""

    def run(*arguments):
        code, out, err = call("--json", *arguments)
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return run


# ------------------------------------------------------------------------------------------------------------- cases


def test_the_cases_that_are_shipped(monkeypatch):
    monkeypatch.undo()
    shipped = cases.load_cases()
    sizes = {
        name: (case.hidden_size, case.intermediate_size, case.num_experts, case.num_zero_experts, case.top_k)
        for name, case in shipped.items()
    }
    assert sizes == {
        "lite": (3072, 1024, 256, 128, 12),
        "research": (2048, 1024, 64, 32, 12),
        "flash": (6144, 2048, 512, 256, 12),
        "first": (1024, 512, 64, 32, 12),
        "second": (256, 128, 512, 256, 12),
    }
    for case in shipped.values():
        assert case.config.num_slots == case.num_experts + case.num_zero_experts
        assert case.tokens == tuple(sorted(case.tokens)) and case.tokens[0] == 1
        assert case.routed_scaling_factor == 6.0
    assert shipped["flash"].weight_bytes(2) == 2 * 512 * 3 * 2048 * 6144 + 4 * 768 * 6144
    for device in ("cpu", "cuda"):
        assert any(device in case.devices for case in shipped.values())
    assert cases.CASES_FILE.parent.name == "bench", "inside of the package, so that a wheel has it"


# ------------------------------------------------------------------------------------------------------------ asking


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["third"], "CASE must be one of tiny, other, got 'third'"),
        (["--tokens", "1,x"], "--tokens must be whole numbers from 1, with commas between them, got '1,x'"),
        (["--tokens", "0"], "--tokens must be whole numbers from 1"),
        (["--tokens", ""], "--tokens must be"),
        (["--zero-share", "0.5,1.5"], "--zero-share must be numbers from 0 to 1"),
        (["--zero-share", "nan"], "--zero-share must be"),
        (["--skew", "0"], "--skew must be more than 0 and at most 1"),
        (["--baseline", "torch,tensorflow"], "--baseline must list some of torch, eager, grouped, vllm, sonicmoe"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--device", "tpu"], "--device must be one that bench can use here (cpu"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--csv", "/no/such/folder/x.csv"], "--csv must be a file in a folder that exists"),
        (["--csv", "/dev/full"], "--csv must be a file in a folder that exists, got /dev/full: a device"),
        (["--csv", "n" * 300], "File name too long"),
        (["--plot", "n" * 300 + ".png"], "File name too long"),
        (["--plot", "layer.gif"], "--plot must end in one of .png, .svg, .pdf"),
        (["--faster"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_asked_wrongly(call, monkeypatch, arguments, message):
    monkeypatch.setattr(command, "_measure_case", lambda *_: pytest.fail("measured"))
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("zemoe: error: ") and err.count("\n") == 1
    assert message in err


def test_memory_is_checked_first(call, monkeypatch):
    monkeypatch.setattr(request, "free_bytes", lambda device: 40_000)
    monkeypatch.setattr(cases, "build", lambda *_: pytest.fail("allocated"))
    code, _, err = call()
    assert code == 1
    assert "tiny needs 0.0 GB of weights and up to" in err and "but cpu has 0.0 GB left" in err
    monkeypatch.setattr(request, "free_bytes", lambda device: None)
    with pytest.raises(pytest.fail.Exception, match="allocated"):
        call()


def test_free_memory_is_known_on_linux():
    free = machine.free_bytes(torch.device("cpu"))
    assert free is None or 10**7 < free < 10**14


def test_a_plot_without_matplotlib(call, monkeypatch, tmp_path):
    monkeypatch.setattr(request, "find_spec", lambda name: None)
    code, _, err = call("--plot", tmp_path / "layer.png")
    assert code == 1 and "pip install 'zemoe[report]'" in err


# ---------------------------------------------------------------------------------------------------------- baselines


def test_absent_baselines_are_named(call, monkeypatch):
    asked = ("--tokens", 1, "--baseline", "torch,vllm,sonicmoe,liger")
    code, out, _ = call(*asked)
    assert code == 0
    for name in ("vllm", "sonicmoe", "liger"):
        assert f"{name}: not installed" in out
        assert f"{name} ms" not in out
    monkeypatch.setattr("zemoe.bench.baselines.find_spec", lambda name: object())
    assert "vllm: runs on cuda only" in call(*asked)[1]


def test_none_is_a_baseline(result):
    row = result("--baseline", "none", "--tokens", 3)["rows"][0]
    assert not [key for key in row if key.startswith(("torch", "eager"))]


def test_a_baseline_out_of_memory_is_left_out(call, monkeypatch):
    def adapt(layer):
        def side(x):
            if x.shape[0] > 1:
                raise torch.OutOfMemoryError("no")
            return layer(x)

        return side

    monkeypatch.setitem(BASELINES, "eager", replace(BASELINES["eager"], parts=(), adapt=adapt))
    code, out, _ = call()
    assert code == 0
    assert re.search(r"^5 .* - +-\s*$", out.replace("\n 5", "\n5"), re.M)
    assert "eager does not fit into memory at T = 5" in out


# ------------------------------------------------------------------------------------------------- checked before timed


def dropped_choice(self, x):
    ids = self.router(x).topk_ids_TK
    full = FORWARD(self, x)
    weight = self.router(x).topk_weights_TK[:, 0, None]
    gate, up = torch.einsum("th,toh->to", x, self.w13[ids[:, 0].clamp(max=7)]).chunk(2, -1)
    value = torch.einsum("ti,thi->th", torch.nn.functional.silu(gate) * up, self.w2[ids[:, 0].clamp(max=7)])
    return full - weight * torch.where(ids[:, :1] < 8, value, x)


FORWARD = MoE.forward
BROKEN = {
    "zeros": lambda self, x: torch.zeros_like(x),
    "one NaN": lambda self, x: FORWARD(self, x).index_fill(1, torch.tensor([3]), float("nan")),
    "last token": lambda self, x: torch.cat([FORWARD(self, x)[:-1], x[-1:]]),
    "one choice dropped": dropped_choice,
    "scaling forgotten": lambda self, x: FORWARD(self, x) / 2,
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_layer_is_not_timed(call, monkeypatch, tmp_path, how, dtype):
    monkeypatch.setattr(MoE, "forward", BROKEN[how])
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("timed"))
    code, out, err = call("--dtype", dtype, "--tokens", 30, "--csv", tmp_path / "rows.csv")
    assert code == 1
    assert err.startswith("zemoe: error: zemoe is wrong, tiny at T = 30: ") and err.count("\n") == 1
    assert "floor ms" not in out
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_baseline_is_named_and_not_timed(call, monkeypatch, tmp_path, how, dtype):
    def adapt(layer):
        return lambda x: BROKEN[how](layer, x) if len(x) == 30 else layer(x)

    timed, interleaved = [], timing.interleaved
    monkeypatch.setitem(BASELINES, "eager", replace(BASELINES["eager"], parts=(), adapt=adapt))
    monkeypatch.setattr(timing, "interleaved", lambda sides, *rest: timed.append([*sides]) or interleaved(sides, *rest))
    path = tmp_path / "rows.csv"
    code, out, err = call("--tokens", "5,30", "--dtype", dtype, "--csv", path)
    assert (code, err) == (1, "")
    assert timed == [["zemoe", "torch", "eager"], ["zemoe", "torch"]]
    assert re.search(r"^eager is wrong: .*; not timed for tiny at T = 30$", out, re.M)
    assert re.search(r"^ *30 .* - +- *$", out, re.M)
    with path.open(newline="") as file:
        right, wrong = csv.DictReader(file)
    assert right["eager_method"] == "clock" and float(right["eager_ms"]) > 0
    assert wrong["eager_method"].startswith("wrong: ") and wrong["eager_ms"] == wrong["eager_ratio"] == ""
    assert call("--tokens", "5")[0] == 0


def test_tokens_whose_choice_is_a_matter_of_rounding_are_not_checked():
    torch.manual_seed(0)
    layer = cases.build(TINY, torch.float32, torch.device("cpu"))
    x = torch.randn(3, 32)
    layer.router.classifier.weight[1:] = layer.router.classifier.weight[0]  # all slots are equal
    assert check.expected(layer, x).tokens == []


# -------------------------------------------------------------------------------------------------------- the routing


@pytest.mark.parametrize("asked", [0.0, 0.33, 0.67, 0.9, 1.0])
def test_zero_share_is_what_was_asked(asked):
    torch.manual_seed(0)
    layer = cases.build(TINY, torch.float32, torch.device("cpu"))
    x = torch.randn(4000, 32)
    free = layer.router(x)
    cases.steer(layer, asked, None)
    found = layer.router(x)
    zero = (found.topk_ids_TK >= 8).float().mean().item()
    assert zero == pytest.approx(asked, abs=0 if asked in (0, 1) else 0.02)
    assert torch.equal(found.logits_TA, free.logits_TA), "only the selection changes"


@pytest.mark.parametrize(("zero_share", "skew"), [(None, 0.3), (0.75, 0.6), (0.0, 0.2)])
def test_skew_is_what_was_asked(zero_share, skew):
    torch.manual_seed(0)
    layer = cases.build(TINY, torch.float32, torch.device("cpu"))
    cases.steer(layer, zero_share, skew)
    ids = layer.router(torch.randn(4000, 32)).topk_ids_TK
    real = ids[ids < 8]
    assert (real == 0).float().mean().item() == pytest.approx(skew, abs=0.02)
    assert real.bincount().argmax() == 0
    if zero_share is not None:
        assert (ids >= 8).float().mean().item() == pytest.approx(zero_share, abs=0.02)


def test_shares_out_of_reach_are_refused(call):
    code, _, err = call("--skew", 0.9, "--tokens", 3)
    assert code == 2 and "tiny: --skew 0.9 is out of reach: a token makes" in err and "larger --zero-share" in err
    few = replace(TINY, num_zero_experts=2)
    layer = cases.build(few, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"zero-share 0\.9 is out of reach: .* get to 0\.50"):
        cases.steer(layer, 0.9, None)


def test_realised_shares_are_reported(call, result):
    rows = result("--tokens", 400, "--zero-share", "0.3,0.5", "--skew", 0.3)["rows"]
    assert [row["zero_share_asked"] for row in rows] == [0.3, 0.5]
    for row in rows:
        assert row["zero_share"] == pytest.approx(row["zero_share_asked"], abs=0.03)
        assert row["skew_asked"] == 0.3
        assert row["skew"] == pytest.approx(0.3, abs=0.03)
    assert "top expert" in call("--tokens", 40, "--skew", 0.2)[1]


# --------------------------------------------------------------------------------------------------- counts and floors


def test_router_floor_by_hand():
    sizes = {"tokens": 10, "slots": 6, "hidden_size": 4}
    assert router_floor(Ceilings(1.0, 1e9), **sizes, itemsize=4) == 4 * 6 * 4
    assert router_floor(Ceilings(1e9, 1.0), **sizes, itemsize=4) == 2 * 10 * 6 * 4
    assert router_floor(Ceilings(1e9, 1.0), **sizes, itemsize=2) == 2 * 2 * 10 * 6 * 4


def test_the_row_of_a_layer_without_ffn_choices(result):
    (row,) = result("--zero-share", 1, "--tokens", 5)["rows"]
    assert (row["zero_share"], row["experts_hit"], row["tflop_s"], row["skew"]) == (1, 0, 0, 0)
    weight, x = 4 * 14 * 32, 2 * 5 * 32 * 4
    assert row["floor_ms"] == pytest.approx(1e3 * (x + weight) / 1e9)


def test_the_row_of_a_layer_with_all_choices_real(result):
    (row,) = result("--zero-share", 0, "--tokens", 200)["rows"]
    assert (row["zero_share"], row["experts_hit"]) == (0, 8)
    flops, router = 2 * 200 * 4 * 3 * 16 * 32, 2 * 200 * 32 * 14
    assert row["floor_ms"] == pytest.approx(1e3 * (flops + router) / 1e10)
    assert row["floor_ratio"] == pytest.approx(row["ms"] / row["floor_ms"])
    assert row["tflop_s"] == pytest.approx(flops / row["ms"] / 1e9)
    at = {"tokens": 200, "ffn_rows": 800, "experts_hit": 8, "hidden_size": 32, "intermediate_size": 16, "itemsize": 4}
    whole = moe_floor(AT, **at) + router_floor(AT, tokens=200, slots=14, hidden_size=32, itemsize=4)
    assert row["floor_ms"] == pytest.approx(1e3 * whole)


def test_medians_and_ratios(result, monkeypatch):
    def spent(sides, inputs, after):
        assert list(sides) == ["zemoe", "torch", "eager"]
        assert len(inputs) == 3 + _WARMUP["cpu"]
        assert len({x.data_ptr() for x in inputs}) == len(inputs) and all(x.std() > 0.5 for x in inputs)
        return {name: [99.0] * 2 + [9 * scale, scale, 2 * scale] for scale, name in zip((1, 3, 8), sides, strict=True)}

    monkeypatch.setattr(timing, "interleaved", spent)
    (row,) = result("--tokens", 50, "--repeats", 3)["rows"]
    assert (row["ms"], row["best_ms"]) == (2000, 1000)
    assert (row["torch_ms"], row["torch_ratio"], row["torch_best_ms"]) == (6000, 3, 3000)
    assert (row["eager_ms"], row["eager_ratio"]) == (16000, 8)


def test_seed(result):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (result("--tokens", 9, "--seed", seed)["rows"][0] for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected), "the caller's random numbers are its own"
    same = ("zero_share", "floor_ms", "experts_hit", "skew")
    assert [first[key] for key in same] == [again[key] for key in same] != [other[key] for key in same]


# ------------------------------------------------------------------------------------------------------------- output


def test_table(call):
    code, out, err = call("tiny", "other", "--tokens", "1,20")
    assert (code, without_compiling(err)) == (0, "")
    titles = re.findall(
        r"^(tiny|other): H 32, I 16, (8|12) FFN and 6 zero experts, 4 choices; backend (\w+)", out, re.M
    )
    assert titles == [("tiny", "8", "cpu"), ("other", "12", "cpu")]
    header = "T  zero share  ms  floor ms  x floor  TFLOP/s  torch ms  torch x  eager ms  eager x"
    assert len(re.findall(r"^ *" + header.replace("  ", " +"), out, re.M)) == 2
    for tokens in (1, 20):
        assert len(re.findall(rf"^ *{tokens}  +\d+\.\d%(  +[\d.]+){{8}} *$", out, re.M)) == 2
    assert "reads 1.00 GB/s, multiplies 0.01 TFLOP/s" in out
    assert "\x1b" not in out


def test_json(result):
    found = result("--tokens", "1,3", "--baseline", "torch,vllm", "--seed", 4)
    assert (found["finish"], found["zemoe"]) == ("done", zemoe.__version__)
    assert found["baselines"] == {"torch": "timed", "vllm": "not installed"}
    assert found["notes"] == ["vllm: not installed"]
    assert [case["name"] for case in found["cases"]] == ["tiny"]
    about = found["about"]
    assert (about["seed"], about["repeats"], about["read_gb_s"], about["product_tflop_s"]) == (4, 2, 1, 0.01)
    assert about["torch"] == metadata.version("torch") and about["device"] and about["commit"] == machine.commit()
    assert [row["T"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert (row["case"], row["dtype"], row["backend"], row["method"]) == ("tiny", "float32", "cpu", "clock")
        assert 0 < row["best_ms"] <= row["ms"] and row["torch_ms"] > 0


def test_csv(call, tmp_path):
    path = tmp_path / "rows.csv"
    assert call("--csv", path, "--baseline", "eager", "--commit", "0123abc")[0] == 0
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    columns = """case H I E Z K dtype backend T zero_share_asked zero_share skew_asked skew experts_hit
        method ms best_ms floor_ms floor_ratio tflop_s eager_method eager_ms eager_best_ms eager_ratio
        repeats seed commit device read_gb_s product_tflop_s zemoe torch triton transformers"""
    assert reader.fieldnames == columns.split()
    assert [row["T"] for row in rows] == ["1", "5"]
    for row in rows:
        assert float(row["eager_ratio"]) == pytest.approx(float(row["eager_ms"]) / float(row["ms"]), rel=1e-4)
        assert (row["zero_share_asked"], row["torch"]) == ("", metadata.version("torch"))
        assert row["commit"] == "0123abc"


def test_a_csv_has_a_column_for_each_key_of_any_row_and_no_cell_where_a_row_lacks_it(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"T": 1, "ms": "0.10"}, {"T": 2, "note": "a, b"}])
    assert (tmp_path / "rows.csv").read_bytes() == b'T,ms,note\n1,0.10,\n2,,"a, b"\n'


def test_commit(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", machine.commit())
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == "unknown"


def test_plot(call, tmp_path):
    path = tmp_path / "layer.png"
    assert call("tiny", "other", "--baseline", "torch", "--zero-share", "0,0.5", "--plot", path)[0] == 0
    both = path.read_bytes()
    assert both[:8] == b"\x89PNG\r\n\x1a\n" and len(both) > 20_000
    width, height = struct.unpack(">II", both[16:24])
    assert width > height > 1000, "two panels beside each other, two cases"
    call("tiny", "--plot", path)
    assert struct.unpack(">I", path.read_bytes()[16:20])[0] < width, "no second panel without a sweep"
    call("tiny", "--tokens", 3, "--zero-share", "0,1", "--plot", path)
    assert struct.unpack(">I", path.read_bytes()[16:20])[0] < width, "nor one over T for a single T"


def test_progress(call, monkeypatch):
    said, reached = [], []
    monkeypatch.setattr(table.Progress, "say", lambda self, text: said.append(text))
    monkeypatch.setattr(table.Progress, "reached", lambda self, rows: reached.append(rows))
    call("--tokens", "1,5", "--zero-share", "0.5")
    assert said == ["tiny: making the weights", "tiny, T = 1, zero share 0.5", "tiny, T = 5, zero share 0.5"]
    assert reached == [0.25, 0.5, 0.75, 1, 1, 1.25, 1.5, 1.75, 2, 2]


def test_interrupted(call, monkeypatch, tmp_path):
    timed = timing.interleaved

    def spent(sides, inputs, after):
        if inputs[0].shape[0] == 5:
            raise KeyboardInterrupt
        return timed(sides, inputs, after)

    monkeypatch.setattr(timing, "interleaved", spent)
    path = tmp_path / "rows.csv"
    code, out, err = call("--tokens", "1,5,9", "--csv", path)
    assert (code, err) == (130, "")
    assert "interrupted: 1 of 3 rows were measured" in out
    assert re.search(r"^ *1  +\d", out, re.M) and not re.search(r"^ *9  +\d", out, re.M)
    assert len(path.read_text().splitlines()) == 2
    code, out, _ = call("--tokens", "5,9", "--json")
    assert code == 130 and json.loads(out)["finish"] == "interrupted"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0, "0"), (1234.5, "1230"), (99.96, "100"), (12.34, "12.3"), (1.0, "1.00"), (0.01234, "0.0123")],
)
def test_figures(value, shown):
    assert figures(value) == shown


# ---------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    """Replays up to T = 512, events above and for what waits for the device."""
    console = Console(file=io.StringIO())
    asked = request.BenchRequest(device="cuda", tokens=(1, 64, 600), cases=("tiny",), repeats=3)
    code, found = command.run(asked, console, console)
    assert (code, found["finish"]) == (0, "done")
    assert [row["method"] for row in found["rows"]] == ["replay", "replay", "events"]
    assert [row["torch_method"] for row in found["rows"]] == ["replay", "replay", "events"]
    assert [row["eager_method"] for row in found["rows"]] == ["events"] * 3
    assert any(note.startswith("eager waits for the device") for note in found["notes"])
    assert any("no larger than the cache" in note for note in found["notes"])
    monkeypatch.setattr(MoE, "forward", lambda self, x: torch.zeros_like(x))
    with pytest.raises(CommandError, match="zemoe is wrong"):
        command.run(asked, console, console)


@pytest.mark.gpu
def test_ceilings_of_a_gpu(monkeypatch):
    monkeypatch.undo()
    at = timing.cuda_ceilings(read_bytes=2**28, matrix_size=1024, repeats=2)
    assert 1e10 < at.bytes_per_second < 2e13
    assert 1e11 < at.flops_per_second < 5e15
