"""What `zemoe generate` shows: words shaded by the FFN experts they used, and the table below them.

E FFN experts, Z zero experts, K choices a token, L layers.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..terminal import BAR_COLOR, SHADES, bar, plain_table
from .decoding import Generation

# What a terminal would obey instead of show; a model may write anything.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


_RUNS = re.compile(r"\n|[^\S\n]+|\S+")


class Scale(NamedTuple):
    """Turns numbers of FFN experts into shades: `lows[i]` is the least number that gets shade i + 1."""

    lows: tuple[int, ...]
    most: int

    @classmethod
    def of_chance(cls, num_experts: int, num_zero_experts: int, top_k: int, layers: int) -> Scale:
        """Make the scale whose middle is what chance gives, and whose shades are 0.8 standard deviations apart.

        That needs no look at the text, so a number has the same shade from the first token to the last.
        """
        share = num_experts / (num_experts + num_zero_experts)
        mean = layers * top_k * share
        step = max(1.0, 0.8 * (layers * top_k * share * (1 - share)) ** 0.5)
        half = (len(SHADES) - 1) / 2
        return cls(tuple(round(mean + (i - half + 0.5) * step) for i in range(len(SHADES) - 1)), layers * top_k)

    def shade(self, used: float) -> str:
        """Return the rich style for a number of FFN experts."""
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
        """Write the prompt, in bold and without a shade."""
        self._add(text, "bold")

    def token(self, text: str, used: float) -> None:
        """Write a piece of text that was made, in the shade of its FFN experts."""
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


def rate(tokens: int, seconds: float) -> str:
    """Return how many tokens were made in how long, and how many a second."""
    text = f"{tokens} tokens in {seconds:.2f} s"
    if tokens and seconds:
        speed = tokens / seconds
        text += f", {speed:.{0 if speed >= 10 else 1}f} tokens/s"
    return text


def summary(made: Generation, top_k: int, rows: dict[str, str], ascii_only: bool) -> Table:
    """Make the table of a generation: speed, experts and zero share by layer, then `rows`."""
    table = plain_table()
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
