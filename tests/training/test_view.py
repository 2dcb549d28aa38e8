"""What a training run shows: JSON lines, plain lines, and the picture on a terminal."""

from __future__ import annotations

import io
import json
import math
import re

import pytest

from helpers import training_records as records
from helpers.terminals import Terminal, make_terminal
from zemoe.terminal import open_console
from zemoe.training import view as view_module
from zemoe.training.view import JsonView, LineView, LiveView, gauge, number, open_view, span, sparkline

ESCAPE = "\x1b"


@pytest.fixture
def terminal(monkeypatch):
    return make_terminal(monkeypatch, 100, 40)


class Clock:
    """A second a look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rows(written: str) -> dict[str, str]:
    """The last picture, by the name at the left of a row."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.rsplit("\x1b[1A", 1)[-1])
    found = [re.match(r"(  by layer|\w[\w -]*?)  +(\S.*)", line) for line in text.splitlines()]
    return {match[1].strip(): match[2].strip() for match in found if match}


def show(view, given, clock=None, seconds=0.0) -> str:
    with view:
        for record in given:
            if clock is not None:
                clock.now += seconds
            view(record)
    return view_of(view)


def view_of(view) -> str:
    return (view._file if isinstance(view, JsonView) else view._console.file).getvalue()


# -------------------------------------------------------------------------------------------------------- the choice


def test_which_view(terminal, monkeypatch):
    assert type(open_view(open_console(terminal), as_json=False)) is LiveView
    assert type(open_view(open_console(terminal), as_json=True)) is JsonView
    assert type(open_view(open_console(io.StringIO()), as_json=False)) is LineView
    for variable, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert type(open_view(open_console(terminal), as_json=False)) is LineView


# -------------------------------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (5.4, "0:05"), (65, "1:05"), (3599.6, "1:00:00"), (36065, "10:01:05"), (-1, "0:00")],
)
def test_span(seconds, shown):
    assert span(seconds) == shown


def test_numbers():
    assert [number(x) for x in (None, math.nan, -math.inf, 0.00012345678, 12345.6)] == [
        "-",
        "nan",
        "-inf",
        "0.0001235",
        "12350",
    ]


def test_sparkline():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8, False) == "█▇▆▅▄▃▂▁"
    assert sparkline([4, 0, 2], 8, True) == "^_-"
    assert sparkline([2, 2], 8, False) == "▁▁" and sparkline([], 8, False) == ""
    assert sparkline([math.nan, 1, math.inf, 2], 8, False) == "▁█"
    falling = sparkline(list(range(1000, 0, -1)), 24, False)
    assert len(falling) == 24 and list(falling) == sorted(falling, reverse=True) and len(set(falling)) == 8


@pytest.mark.parametrize(
    ("used", "aim", "most"), [(4, 4, 6), (0, 4, 6), (6, 6, 6), (None, 2, 6), (3, None, 6), (9, 1, 6)]
)
def test_gauge(used, aim, most):
    shown = gauge(used, aim, most, ascii_only=True).plain
    assert len(shown) == 20
    cells = round(min(used or 0, most) / most * 20)
    expected = list("#" * cells + "." * (20 - cells))
    if aim is not None:
        expected[min(round(aim / most * 20), 19)] = "|"
    assert shown == "".join(expected)


# --------------------------------------------------------------------------------------------------------------- JSON


def test_json_is_the_records(terminal):
    given = list(records.whole())
    written = show(JsonView(open_console(terminal)), given)
    assert [json.loads(line) for line in written.splitlines()] == given


def test_json_has_no_nan():
    odd = records.train(10, loss=math.nan)
    odd["by_layer"][0]["bias_max"] = math.inf
    written = show(JsonView(open_console(io.StringIO())), [odd])
    read = json.loads(written, parse_constant=pytest.fail)
    assert read["loss"] is None and read["by_layer"][0]["bias_max"] is None and read["by_layer"][1]["bias_max"] == 0.0


# -------------------------------------------------------------------------------------------------------------- lines


def test_lines():
    clock = Clock()
    written = show(LineView(open_console(io.StringIO()), clock), records.whole(), clock, 2.0)
    assert written.splitlines() == [
        "7.9 M parameters, 5.1 M used by a token; 2 layers, 6 of 16 FFN and 8 zero experts a token; cpu, float32; "
        "12,345 tokens to train on, 678 held out, 512 a step",
        "step 10 of 40: loss 4.500, 1.750 bits/byte, FFN experts 5.50 ± 0.90 of 6 a token, K_e 4, zero share 8.3%, "
        "learning rate 0.0003, 3,211 tokens/s, 0:06 left",
        "step 20 of 40: loss 4.000, 1.500 bits/byte, FFN experts 5.00 ± 0.90 of 6 a token, K_e 4, zero share 16.7%, "
        "learning rate 0.0003, 3,211 tokens/s, 0:04 left",
        "step 20: held-out 1.625 bits/byte, loss 3.250 (the best so far)",
        "step 20: saved out/states/step-00000020",
        "step 30 of 40: loss 3.500, 1.250 bits/byte, FFN experts 4.50 ± 0.90 of 6 a token, K_e 4, zero share 25.0%, "
        "learning rate 0.0003, 3,211 tokens/s, 0:03 left",
        "step 40 of 40: loss 3.000, 1.000 bits/byte, FFN experts 4.00 ± 0.90 of 6 a token, K_e 4, zero share 33.3%, "
        "learning rate 0.0003, 3,211 tokens/s, 0:00 left",
        "step 40: held-out 1.750 bits/byte, loss 3.500",
        "step 40: saved out/states/step-00000040",
        "finished at step 40 after 1:05, best held-out 1.625 bits/byte at step 20; to write with it: "
        "zemoe generate --model out/export",
    ]


def test_lines_of_a_run_that_is_resumed_on_several_devices_without_an_aim():
    clock = Clock()
    given = [records.run(step=20, world=2, k_e=None), records.train(30, ffn_experts_std=None, zero_share=None)]
    given.append({"kind": "saved", "step": 30, "path": "[red]out"})
    given.append(records.end(31, reason="stopped", best_heldout_bits_per_byte=None, best_step=None, export=None))
    first, second, saved, last = show(LineView(open_console(io.StringIO()), clock), given, clock, 5.0).splitlines()
    assert "cpu x 2" in first and first.endswith("; goes on at step 20 of 40")
    assert "FFN experts 4.50 of 6 a token, zero share -" in second
    assert second.endswith("0:05 left"), "ten of the twenty steps that were left took five seconds"
    assert saved == "step 30: saved [red]out"
    assert last == "stopped at step 31 after 1:05; to go on: the same command with --resume"


def test_a_record_of_no_known_kind_is_a_bug():
    with pytest.raises(AssertionError, match="'poem'"):
        LineView(open_console(io.StringIO()))({"kind": "poem", "step": 0})


def test_a_start_that_stays_the_best():
    """A run that begins with a trained model is scored before the first step, and may make it worse."""
    best = {"best_step": 0, "best_heldout_bits_per_byte": 1.5, "start_is_best": True}
    given = [records.run(), records.evaluation(0, True, 1.5), records.evaluation(20, False, 1.75), records.end(**best)]
    _, first, second, last = show(LineView(open_console(io.StringIO())), given).splitlines()
    assert first == "step 0: held-out 1.500 bits/byte, loss 3.000 (the start)"
    assert second == "step 20: held-out 1.750 bits/byte, loss 3.500"
    assert last == (
        "finished at step 40 after 1:05, best held-out 1.500 bits/byte at the start: no step made it better, and the "
        "export has the weights that the run began with; to write with it: zemoe generate --model out/export"
    )


# --------------------------------------------------------------------------------------------------------- a terminal


def test_a_start_in_the_picture(terminal):
    view = LiveView(open_console(terminal))
    with view:
        view(records.run())
        view(records.evaluation(0, True, 1.5))
        shown = rows_now(view)
        assert shown["step"].startswith("0 of 40 ") and shown["held-out"] == "1.500 bits/byte, loss 3.000 at the start"
        view(records.evaluation(20, False, 1.75))
        assert rows_now(view)["held-out"] == "1.750 bits/byte, loss 3.500 at step 20; best 1.500 at the start"


def test_the_picture(terminal):
    clock = Clock()
    written = show(LiveView(open_console(terminal), clock), list(records.whole())[:-3], clock, 2.0)
    shown = rows(written)
    assert shown["step"] == "40 of 40 ████████████████████ 100%, 0:12 so far, 0:00 left"
    assert shown["tokens"] == "20,480 (1.66 times the text), 3,211 a second"
    assert shown["loss"] == "3.000 █▆▃▁ 1.000 bits/byte"
    assert shown["FFN experts"] == "█████████████┃······ 4.00 ± 0.90 of 6 a token, K_e 4"
    assert shown["zero share"].startswith("33.3% of all choices")
    assert shown["by layer"] == "29  38  %"
    assert shown["load"] == "busiest FFN expert 1.50 times the mean, 0 dead"
    assert shown["optimizer"] == "learning rate 0.0003, gradient norm 0.75, balance loss 1.10"
    assert shown["held-out"] == "1.625 bits/byte, loss 3.250 at step 20"
    assert shown["saved"] == "step 20"
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l"), "the cursor is shown again"


def test_the_picture_of_a_finished_run(terminal):
    written = show(LiveView(open_console(terminal)), records.whole())
    shown = rows(written)
    assert shown["step"].endswith("100%, finished after 1:05")
    assert shown["held-out"] == "1.750 bits/byte, loss 3.500 at step 40; best 1.625 at step 20"
    assert "\nfinished at step 40 after 1:05" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)


def test_the_time_left_runs_down(terminal):
    clock = Clock()
    view = LiveView(open_console(terminal), clock)
    with view:
        view(records.run())
        assert rows_now(view)["step"] == "0 of 40 ···················· 0%, 0:00 so far"
        clock.now = 10
        view(records.train(10))
        assert rows_now(view)["step"].endswith("25%, 0:10 so far, 0:30 left")
        clock.now = 14
        assert rows_now(view)["step"].endswith("25%, 0:14 so far, 0:26 left")
        clock.now = 60
        assert rows_now(view)["step"].endswith("0:00 left")


def test_a_resumed_run_goes_on_with_its_course(terminal):
    """What it did after the state that it goes on from, the first time, isn't shown twice."""
    given = list(records.whole())
    train = [record for record in given if record["kind"] == "train"]
    again = records.train(30, loss=2.0)
    view = LiveView(open_console(terminal))
    scores = (10, True, 1.625), (20, False, 1.75), (40, True, 0.5)
    view.remember(train, [records.evaluation(*score) for score in scores])
    shown = rows(show(view, [records.run(step=20), again, records.evaluation(30, False, 1.75)]))
    assert shown["loss"].startswith("2.000 █▇▁ ")
    assert shown["held-out"] == "1.750 bits/byte, loss 3.500 at step 30; best 1.625 at step 10"


def rows_now(view) -> dict[str, str]:
    console = open_console(Terminal())
    console.print(view._frame())
    return rows(console.file.getvalue())


def test_odd_records(terminal):
    odd = records.train(10, loss=math.nan, dead_experts=3, ffn_experts=None, ffn_experts_std=None, zero_share=None)
    odd["by_layer"][1]["zero_share"] = None
    written = show(LiveView(open_console(terminal)), [records.run(train_tokens=0), odd])
    shown = rows(written)
    assert shown["loss"] == "nan  1.750 bits/byte"
    assert "\x1b[1;31m3 dead" in written and shown["load"].endswith("3 dead") and shown["zero share"].startswith("- of")
    assert shown["by layer"] == "4   -  %"
    assert shown["FFN experts"] == "·············┃······ - of 6 a token, K_e 4"
    assert shown["tokens"].startswith("5,120 (0.00 times")


def test_many_layers_have_a_shade_each_and_the_range(terminal):
    many = records.train(10)
    many["by_layer"] = [many["by_layer"][0] | {"zero_share": i / 100} for i in range(40)]
    written = show(LiveView(open_console(terminal)), [records.run(layers=40), many])
    assert rows(written)["by layer"] == "0.0% to 39.0%"
    shades = set(re.findall(r"48;2;\d+;\d+;\d+m", written.rsplit("\x1b[1A", 1)[-1]))
    assert len(shades) == 3, "0 % to 39 %, in steps of a sixth: around 0, 1/6 and 2/6"


def test_an_error_before_the_run_leaves_nothing(terminal):
    view = LiveView(open_console(terminal))
    with pytest.raises(ValueError, match="too bad"), view:
        assert "reading the text" in view._frame().plain
        raise ValueError("too bad")
    assert "\x1b[2K" in terminal.getvalue().rsplit("reading", 1)[-1], "its line is wiped"
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l")


def test_it_is_drawn_without_new_records(terminal, monkeypatch):
    import time

    monkeypatch.setattr(view_module, "_FRAMES_PER_SECOND", 50)
    with LiveView(open_console(terminal)):
        end = time.monotonic() + 10
        while terminal.getvalue().count("reading the text") < 3:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_no_unicode(terminal):
    terminal.encoding = "ascii"
    written = show(LiveView(open_console(terminal)), [records.run(), records.train(20)])
    assert rows(written)["FFN experts"].startswith("#############|###... 5.00")
