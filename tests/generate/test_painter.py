"""What is written to a terminal, to a file and with NO_COLOR."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len

from helpers.terminals import make_terminal
from zemoe.generate.decoding import Generation, Token
from zemoe.generate.painter import Painter, Scale, summary
from zemoe.terminal import SHADES, bar, open_console

ESCAPE = "\x1b"
SCALE = Scale.of_chance(16, 8, 6, 4)


@pytest.fixture
def terminal(monkeypatch):
    return make_terminal(monkeypatch, 24, 20)


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def paint(file, pieces, prompt="") -> str:
    painter = Painter(open_console(file), SCALE)
    painter.prompt(prompt)
    for text, used in pieces:
        painter.token(text, used)
    painter.close()
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------ scale


def test_scale_centres_on_chance():
    """16 of 24 choices by chance: the middle shade; a number never has a smaller shade than a lower number."""
    order = [f"{text} on {background}" for background, text in SHADES]
    indices = [order.index(SCALE.shade(used)) for used in range(25)]
    assert indices[16] == len(SHADES) // 2
    assert indices == sorted(indices)
    assert (indices[0], indices[24]) == (0, len(SHADES) - 1)


@pytest.mark.parametrize(("E", "Z", "K", "layers"), [(512, 256, 12, 28), (16, 8, 6, 4), (5, 3, 4, 2), (4, 0, 2, 2)])
def test_legend_covers_every_number_once(E, Z, K, layers):
    scale = Scale.of_chance(E, Z, K, layers)
    covered = []
    for span in re.findall(r" (\d+(?:–\d+)?) ", scale.legend().plain.split(":")[1].replace("  ", " , ")):
        low, _, high = span.partition("–")
        covered += range(int(low), int(high or low) + 1)
    assert covered == list(range(layers * K + 1))
    for low in scale.lows:
        if 0 < low <= scale.most:
            assert scale.shade(low) != scale.shade(low - 1)


# ------------------------------------------------------------------------------------------------------------- text


def test_words_stay_whole(terminal):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "far", "away"]
    shown = visible(paint(terminal, [(f" {word[:2]}", 16) for word in words] + [("ly", 12)], prompt="once"))
    pieces = [(part, 16) for word in words for part in (f" {word[:2]}", word[2:]) if part]
    shown = visible(paint(terminal, pieces, prompt="once")).removeprefix(shown)
    assert " ".join(shown.split()) == " ".join(["once", *words])
    assert all(cell_len(line) <= 24 for line in shown.splitlines())
    assert all(line == line.lstrip() for line in shown.splitlines())


def test_the_last_column_is_used(terminal):
    shown = visible(paint(terminal, [("x" * 12, 16), (" " + "y" * 11, 16), (" z", 16), (" " + "w" * 23, 16)]))
    assert shown == f"{'x' * 12} {'y' * 11}\nz\n{'w' * 23}\n"


def test_lines_and_wide_characters(terminal):
    shown = visible(paint(terminal, [("one\n\n  two 界界界界界界界界界界 three\n", 16)]))
    assert shown == "one\n\n  two\n界界界界界界界界界界\nthree\n"


def test_a_word_longer_than_the_line(terminal):
    """It is left to the terminal, and what follows still knows the column."""
    shown = visible(paint(terminal, [("x" * 40, 16), (" abcdefg", 16), (" z", 16)]))
    assert shown == "x" * 40 + " abcdefg\nz\n"


def test_shades(terminal):
    written = paint(terminal, [(" low", 3), (" high", 24)], prompt="given")
    assert "\x1b[1mgiven\x1b[0m" in written
    dark, bright = (tuple(int(SHADES[i][0][j : j + 2], 16) for j in (1, 3, 5)) for i in (0, -1))
    for background, word in ((dark, "low"), (bright, "high")):
        for part in (" ", word):
            assert re.search(r"\x1b\[[0-9;]*48;2;{};{};{}m{}\x1b\[0m".format(*background, part), written)
    styles = re.findall(r"\x1b\[[0-9;]*m", written)
    assert all(reset == "\x1b[0m" != style for style, reset in zip(styles[::2], styles[1::2], strict=True))


def test_what_a_terminal_would_obey_is_shown_instead(terminal):
    written = paint(terminal, [(" a\x1b[2J\x1b]0;title\x07b\rc\x9b5mok", 16)])
    assert not re.search(r"\x1b(?!\[[0-9;]*m)|[\x07\r\x9b]", written)


def test_a_file_gets_the_text_as_it_is(terminal, monkeypatch):
    text = "a long line that no terminal of 24 columns holds\n\n  and another\ttab"
    assert paint(io.StringIO(), [(text, 16)], prompt="p ") == f"p {text}\n"
    assert paint(io.StringIO(), [("ends\n", 16)]) == "ends\n"


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_no_escapes_still_wrapped(terminal, monkeypatch, variable):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    written = paint(terminal, [(" word", 16)] * 10, prompt="p")
    assert ESCAPE not in written
    assert len(written.splitlines()) == 3


def test_an_empty_no_color_counts_for_nothing(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "")
    assert ESCAPE in paint(terminal, [(" word", 16)])


# ------------------------------------------------------------------------------------------------------------ table


def test_summary():
    made = Generation([Token(1, (3, 3))], [Token(7, (4, 1)), Token(8, (2, 0))], 0.5, 4.0, "length")
    console = open_console(io.StringIO())
    console.print(summary(made, 4, {"seed": "[red]5"}, ascii_only=False))
    lines = [line.split(maxsplit=1) for line in console.file.getvalue().splitlines()]
    table = {name: value.strip() for name, value in lines if name != "layer"}
    assert table["prompt"] == "1 tokens in 0.50 s, 2.0 tokens/s"
    assert table["decoding"] == "2 tokens in 4.00 s, 0.5 tokens/s"
    assert table["FFN"] == "experts  3.5 of 8 a token (2 to 5), 1.75 of 4 a layer"
    assert table["zero"].startswith("share   56.2%")
    assert table["seed"] == "[red]5"
    layers = [value.split() for name, value in lines if name == "layer"]
    assert layers == [["0", "25.0%", "█████"], ["1", "87.5%", "█" * 17 + "▌"]]


def test_summary_of_nothing():
    console = open_console(io.StringIO())
    console.print(summary(Generation(), 4, {}, ascii_only=True))
    rows = [line.strip() for line in console.file.getvalue().splitlines()]
    assert rows == ["prompt    0 tokens in 0.00 s", "decoding  0 tokens in 0.00 s"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.999, 1.0])
def test_bars(share):
    assert bar(share, ascii_only=True) == "#" * round(20 * share)
    cells = bar(share, ascii_only=False)
    eighths = sum(8 if cell == "█" else " ▏▎▍▌▋▊▉".index(cell) for cell in cells)
    assert eighths == round(160 * share)
