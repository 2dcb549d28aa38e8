"""What `zemoe generate` shows: words shaded by the FFN experts they used, and the table below them.

E FFN experts, Z zero experts, K choices a token, L layers.
"""

from __future__ import annotations

import os
import re
from itertools import pairwise
from typing import IO, Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .decoding import Generation

# From little to much work; text in the colour that stands out on it.
SHADES = (
    ("#201a36", "#b9b4d0"),
    ("#43255e", "#d9cfe8"),
    ("#70296a", "#f3dff0"),
    ("#9f3260", "#ffeef2"),
    ("#cb4b48", "#ffffff"),
    ("#ea7a2c", "#1d0e03"),
    ("#fbb62f", "#1d1303"),
)
# What a terminal would obey instead of show; a model may write anything.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_RUNS = re.compile(r"\n|[^\S\n]+|\S+")
BAR_COLOR = "#ea7a2c"
_BAR_CELLS = 20
_NO_WIDTH = 1000  # of a file or a pipe: nothing is wrapped


def open_console(file: IO[str]) -> Console:
    """A rich console; it writes no escape code at all with NO_COLOR, or if `file` is not a terminal."""
    no_color = bool(os.environ.get("NO_COLOR"))  # set and not empty; rich 13 looks only whether it is set
    console = Console(file=file, highlight=False, no_color=no_color)
    if no_color or not console.is_terminal or console.is_dumb_terminal:
        width = console.width if file.isatty() else _NO_WIDTH
        console = Console(file=file, highlight=False, color_system=None, force_terminal=False, width=width)
    return console


class Scale(NamedTuple):
    """Numbers of FFN experts to shades: `lows[i]` is the least number that gets shade i + 1."""

    lows: tuple[int, ...]
    most: int

    @classmethod
    def of_chance(cls, num_experts: int, num_zero_experts: int, top_k: int, layers: int) -> Scale:
        """The middle shade is what random choice would give, each other one is 0.8 standard deviations of it away.

        That needs no look at the text, so a number has the same shade from the first token to the last.
        """
        share = num_experts / (num_experts + num_zero_experts)
        mean = layers * top_k * share
        step = max(1.0, 0.8 * (layers * top_k * share * (1 - share)) ** 0.5)
        half = (len(SHADES) - 1) / 2
        return cls(tuple(round(mean + (i - half + 0.5) * step) for i in range(len(SHADES) - 1)), layers * top_k)

    def shade(self, used: float) -> str:
        """A rich style."""
        background, text = SHADES[sum(used >= low for low in self.lows)]
        return f"{text} on {background}"

    def legend(self) -> Text:
        legend = Text.assemble(("FFN experts a token used, all layers together: ", "dim"))
        bounds = [0, *(min(low, self.most + 1) for low in self.lows), self.most + 1]
        for low, high in pairwise(bounds):
            if low <= high - 1:
                legend.append(f" {low}–{high - 1} " if low < high - 1 else f" {low} ", self.shade(low))
        return legend


class Painter:
    """Writes text as it comes. On a terminal it wraps at words, so a word is written when the next one begins."""

    def __init__(self, console: Console, scale: Scale) -> None:
        self._console, self._scale = console, scale
        self._wraps = console.file.isatty()
        self._column = 0
        self._space: list[tuple[str, str]] = []
        self._word: list[tuple[str, str]] = []

    def prompt(self, text: str) -> None:
        """What was given, in bold and without a shade."""
        self._add(text, "bold")

    def token(self, text: str, used: float) -> None:
        """What was made."""
        self._add(text, self._scale.shade(used))

    def close(self) -> None:
        """Write what is held back and end the line."""
        self._flush()
        self._space = []
        if self._column:
            self._newline()

    def _add(self, text: str, style: str) -> None:
        if not self._wraps:
            self._write([(text, style)])
            self._column = 0 if text.endswith("\n") else 1
            return
        for run in _RUNS.findall(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text.expandtabs(4))):
            if run == "\n":
                self._flush()
                self._space = []
                self._newline()
            elif run.isspace():
                self._flush()
                self._space.append((run, style))
            else:
                self._word.append((run, style))

    def _flush(self) -> None:
        if not self._word:
            return
        space, word = (sum(cell_len(text) for text, _ in part) for part in (self._space, self._word))
        width = self._console.width
        if self._column and self._column + space + word > width:
            self._newline()
            self._space, space = [], 0
        self._write(self._space + self._word)
        self._column = (self._column + space + word - 1) % width + 1
        self._space, self._word = [], []

    def _newline(self) -> None:
        self._console.print()
        self._column = 0

    def _write(self, parts: list[tuple[str, str]]) -> None:
        if self._console.color_system is None:
            self._console.file.write("".join(text for text, _ in parts))
        else:
            self._console.print(Text.assemble(*parts, end=""), end="", soft_wrap=True)
        self._console.file.flush()


def bar(share: float, ascii_only: bool) -> str:
    """A bar of up to 20 cells for a share of 1, in eighths of a cell."""
    eighths = round(share * _BAR_CELLS * 8)
    if ascii_only:
        return "#" * round(share * _BAR_CELLS)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def rate(tokens: int, seconds: float) -> str:
    """How many in how long, and how many a second."""
    text = f"{tokens} tokens in {seconds:.2f} s"
    if tokens and seconds:
        speed = tokens / seconds
        text += f", {speed:.{0 if speed >= 10 else 1}f} tokens/s"
    return text


def _table(title: str | None = None) -> Table:
    look: dict[str, Any] = {"box": None, "show_header": False, "padding": (0, 1), "pad_edge": False}
    return Table(title=title, title_justify="left", title_style="bold", **look)


def summary(made: Generation, top_k: int, rows: dict[str, str], ascii_only: bool) -> Table:
    """The table of a generation: speed, experts and zero share by layer, then `rows`."""
    table = _table()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("prompt", rate(len(made.prompt), made.prompt_seconds))
    table.add_row("decoding", rate(len(made.tokens), made.decode_seconds))
    means = made.mean_ffn_by_layer
    if means:
        total, most = sum(means), top_k * len(means)
        used = [token.ffn_experts for token in made.tokens]
        table.add_row(
            "FFN experts",
            f"{total:.1f} of {most} a token ({min(used)} to {max(used)}), {total / len(means):.2f} of {top_k} a layer",
        )
        table.add_row("zero share", f"{1 - total / most:.1%} of all choices, which cost no FFN expert")
        for layer, mean in enumerate(means):
            share = 1 - mean / top_k
            table.add_row(f"  layer {layer}", Text.assemble(f"{share:6.1%} ", (bar(share, ascii_only), BAR_COLOR)))
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def findings(found: dict[str, Any]) -> list[Table]:
    """The tables of `zemoe doctor`, from `zemoe.doctor.examine`."""
    installed = _table("versions")
    for name, version in found["versions"].items():
        tested = found["tested"].get(name)
        about = Text(f"tested: {tested}" if tested else "", style="dim")
        if name in found["untested"]:
            about = Text(f"untested: zemoe was tested with {tested}", style="bold yellow")
        installed.add_row(name, version or "not installed", about)
    devices = _table("devices")
    for name, about in found["devices"].items():
        devices.add_row(name, Text(about))
    for tuned, what in ((True, "tuned"), (False, "compiled, not tuned")):
        parts = [f"{gpu['capability']} ({gpu['examples']})" for gpu in found["gpus"] if gpu["tuned"] == tuned]
        devices.add_row("triton", Text(f"{what}: {', '.join(parts)}", style="dim"))
    results = _table("backends and their self-test")
    for check in found["checks"]:
        why, verdict = Text(check["why"], style="" if check["usable"] else "dim"), Text()
        if check["usable"]:
            verdict = Text("ok", style="green") if check["ok"] else Text("FAILED", style="bold red")
            verdict.append(f" {check['error']:.2f} of the allowed error", style="default")
            verdict.append("" if check["ok"] else f" in the {check['what']}", style="default")
        results.add_row(check["device"], check["dtype"], check["backend"], why, verdict)
    return [installed, devices, results]
