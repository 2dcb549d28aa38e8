"""metrics.jsonl as a killed process leaves it, and what the plots of a run show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from helpers import training_records as records
from zemoe.cli import main
from zemoe.training import report
from zemoe.training.report import Metrics, ReportError, draw, read_metrics


def write(folder, given, tail: bytes = b"") -> None:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in given]
    (folder / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines) + tail)


def steps(found: list[dict]) -> list[int]:
    return [record["step"] for record in found]


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_whole_run(tmp_path):
    given = list(records.whole())
    write(tmp_path, given)
    found = read_metrics(tmp_path)
    assert found == Metrics(given[0], [r for r in given if r["kind"] == "train"], [given[3], given[7]], 0)


@pytest.mark.parametrize("cut", [1, 20, 100, -1])
def test_a_last_line_that_was_cut_is_left_out_and_counted(tmp_path, cut):
    write(tmp_path, [records.run(), records.train(10)], json.dumps(records.train(20)).encode()[:cut])
    found = read_metrics(tmp_path)
    assert (steps(found.train), found.unreadable) == ([10], 1)


def test_a_last_line_without_its_end_counts(tmp_path):
    write(tmp_path, [records.run(), records.train(10)], json.dumps(records.train(20)).encode())
    assert (steps(read_metrics(tmp_path).train), read_metrics(tmp_path).unreadable) == ([10, 20], 0)


def test_garbage_between_lines(tmp_path):
    torn = b'{"kind": "train", "st' + json.dumps(records.run()).encode()
    odd = [b"\x00" * 50, b"\xff\xfe", b"[1]", b"17", b'{"kind": "train"}', torn, b""]
    write(tmp_path, [records.run(), *odd[:3], records.train(10), *odd[3:], records.train(20)])
    found = read_metrics(tmp_path)
    assert (steps(found.train), found.unreadable) == ([10, 20], 6)


def broken(record: dict) -> Iterator[dict]:
    """Without one of its entries, or with one that is something else, also in a layer."""
    for key in record.keys() - {"kind", "versions", "balance_loss", "grad_norm", "max_over_mean_load", "dead_experts"}:
        yield {name: value for name, value in record.items() if name != key}
        for value in ([], {}, "x\x1b", 10**400, 1e300, True if key != "best" else 1):
            if not (isinstance(record[key], str) and isinstance(value, str)) and not (
                key == "by_layer" and value == []
            ):
                yield record | {key: value}
    for key in ("zero_share", "bias_min", "bias_max", "bias_ffn_mean", "bias_zero_mean"):
        for layer in record.get("by_layer", [])[:1]:
            yield record | {"by_layer": [layer, {name: value for name, value in layer.items() if name != key}]}
            yield record | {"by_layer": [layer | {key: "x"}]}


@pytest.mark.parametrize("kind", ["run", "train", "eval"])
def test_a_record_that_lacks_something_is_left_out_and_counted(tmp_path, kind):
    good = {"run": records.run(), "train": records.train(10), "eval": records.evaluation(10, True, 1.5)}
    whole = list(good.values())
    bad = list(broken(good[kind]))
    assert len(bad) > 20
    write(tmp_path, [*whole, *bad])
    assert read_metrics(tmp_path) == Metrics(whole[0], whole[1:2], whole[2:], len(bad))
    assert main(["report", str(tmp_path)]) == 0


def test_what_a_resumed_run_did_again_counts_once(tmp_path):
    first = [records.run(), records.train(10), records.train(20, loss=9.0), records.evaluation(20, True, 9.0)]
    again = [records.run(step=10, device="second"), records.train(20), records.evaluation(20, True, 1.5)]
    write(tmp_path, [*first, *again])
    found = read_metrics(tmp_path)
    assert steps(found.train) == [10, 20] and found.train[1]["loss"] == 4.0
    assert steps(found.evals) == [20] and found.evals[0]["heldout_bits_per_byte"] == 1.5
    assert found.run["device"] == "second"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "No such file"),
        ([], "holds no run yet"),
        ([records.train(1)], "holds no run yet"),
        ([records.run()], "holds no step of training yet"),
        ([b"poem"], "holds no run yet (1 lines unreadable)"),
    ],
)
def test_nothing_to_draw(tmp_path, given, said):
    if given is not None:
        write(tmp_path, given)
    with pytest.raises(ReportError) as caught:
        draw(tmp_path)
    assert said in str(caught.value) and "metrics.jsonl" in str(caught.value)
    assert not (tmp_path / "plots").exists()


# ------------------------------------------------------------------------------------------------------------ drawing


@pytest.fixture
def drawn(monkeypatch):
    """{file name: axes} of what is drawn, without writing pictures."""
    seen = {}
    real = report._axes

    @contextmanager
    def spy(metrics, path):
        with real(metrics, path) as axes:
            yield axes
        seen[path.name] = axes

    monkeypatch.setattr(report, "_axes", spy)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.touch())
    return seen


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.lines}


def test_ffn_experts(drawn, tmp_path):
    write(tmp_path, records.whole())
    draw(tmp_path)
    axes = drawn["ffn_experts.png"]
    assert lines(axes)["mean a token"] == [(10, 5.5), (20, 5.0), (30, 4.5), (40, 4.0)]
    assert [y for _, y in lines(axes)["K_e 4"]] == [4.0, 4.0]
    (band,) = axes.collections
    corners = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices}
    assert {(10, 5.5 + 0.9), (10, 5.5 - 0.9), (40, 4.0 + 0.9), (40, 4.0 - 0.9)} <= corners


def test_the_caption_fits(drawn, tmp_path):
    write(
        tmp_path, [records.run(device="a device with a very long name, of a very well known maker"), records.train(10)]
    )
    draw(tmp_path)
    figure = drawn["loss.png"].figure
    FigureCanvasAgg(figure).draw()
    box = figure._supxlabel.get_window_extent()
    assert "a very well known maker" in figure._supxlabel.get_text().replace("\n", " ")
    assert box.x0 > 0 and box.x1 < figure.bbox.width


def test_loss(drawn, tmp_path):
    write(tmp_path, records.whole())
    draw(tmp_path)
    axes = drawn["loss.png"]
    assert lines(axes)["training"] == [(10, 1.75), (20, 1.5), (30, 1.25), (40, 1.0)]
    assert lines(axes)["held out"] == [(20, 1.625), (40, 1.75)]
    assert lines(axes)["best: 1.625 at step 20"] == [(20, 1.625)]
    odd = [
        records.evaluation(step, True, bits) for step, bits in ((5, math.nan), (20, 1.5), (30, -math.inf), (40, 1.5))
    ]
    write(
        tmp_path,
        [*list(records.whole())[:-1], *odd, records.evaluation(41, False, 1.0) | {"heldout_bits_per_byte": None}],
    )
    draw(tmp_path)
    assert lines(drawn["loss.png"])["best: 1.5 at step 20"] == [(20, 1.5)]
    write(tmp_path, [*records.whole(), records.evaluation(0, True, 1.25)])
    draw(tmp_path)
    assert lines(drawn["loss.png"])["best: 1.25 at the start"] == [(0, 1.25)]


def test_layers(drawn, tmp_path):
    write(tmp_path, records.whole())
    draw(tmp_path)
    given = [record for record in records.whole() if record["kind"] == "train"]
    for name, key in (("zero_share.png", "zero_share"), ("bias.png", "bias_ffn_mean")):
        found = lines(drawn[name])
        for layer in (0, 1):
            assert found[f"layer {layer}"] == [(r["step"], r["by_layer"][layer][key]) for r in given], name
    assert lines(drawn["zero_share.png"])["33.3%, with K_e 4"][0][1] == pytest.approx(1 / 3)
    for layer, band in enumerate(drawn["bias.png"].collections):
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == min(r["by_layer"][layer]["bias_min"] for r in given)
        assert heights.max() == max(r["by_layer"][layer]["bias_max"] for r in given)
    colors = [to_hex(line.get_color()) for line in drawn["zero_share.png"].lines[:2]]
    assert len(set(colors)) == 2, "a colour a layer"


def test_no_aim_no_evaluation_and_gaps(drawn, tmp_path):
    hole = records.train(20, ffn_experts=None, ffn_experts_std=None, bits_per_byte=None)
    unscored = records.evaluation(20, False, 1.0) | {"heldout_bits_per_byte": None, "heldout_loss": None}
    write(tmp_path, [records.run(k_e=None), records.train(10), hole, unscored])
    draw(tmp_path)
    found = lines(drawn["ffn_experts.png"])
    assert list(found) == ["mean a token"] and math.isnan(found["mean a token"][1][1])
    assert len(drawn["zero_share.png"].lines) == 2
    write(tmp_path, [records.run(), records.train(10)])
    draw(tmp_path)
    assert list(lines(drawn["loss.png"])) == ["training"]


def test_many_layers_have_a_colour_bar(drawn, tmp_path):
    many = [records.train(step) for step in (10, 20)]
    for record in many:
        record["by_layer"] *= 10
    write(tmp_path, [records.run(layers=20), *many])
    draw(tmp_path)
    assert len(drawn["zero_share.png"].figure.axes) == 2
    assert [text.get_text() for text in drawn["zero_share.png"].get_legend().get_texts()] == ["33.3%, with K_e 4"]


def test_files(tmp_path):
    write(tmp_path, records.whole())
    paths, metrics = draw(tmp_path)
    names = ["bias.png", "ffn_experts.png", "loss.png", "zero_share.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names == sorted(p.name for p in paths)
    assert metrics.run["steps"] == 40
    for path in paths:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 400 and pixels.std() > 0.05, "something is drawn"
    draw(tmp_path)


def test_without_matplotlib(tmp_path, monkeypatch):
    write(tmp_path, records.whole())
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(ReportError, match=r"pip install 'zemoe\[report\]'"):
        draw(tmp_path)
    assert not (tmp_path / "plots").exists()
