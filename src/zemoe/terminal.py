"""What all commands use to show something on a terminal: consoles, colours, figures, and errors that end a command."""

from __future__ import annotations

import os
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from .messages import one_line

# Backgrounds from little to much work, each with a colour in which text stands out on it.
SHADES = (
    ("#201a36", "#b9b4d0"),
    ("#43255e", "#d9cfe8"),
    ("#70296a", "#f3dff0"),
    ("#9f3260", "#ffeef2"),
    ("#cb4b48", "#ffffff"),
    ("#ea7a2c", "#1d0e03"),
    ("#fbb62f", "#1d1303"),
)
BAR_COLOR = "#ea7a2c"
_BAR_CELLS = 20
_NO_WIDTH = 1000  # the width of a file or a pipe, so that no line is wrapped there


def open_console(file: IO[str]) -> Console:
    """Make a rich console. With NO_COLOR, or if `file` is not a terminal, it writes no escape code at all."""
    no_color = bool(os.environ.get("NO_COLOR"))  # set and not empty; rich 13 looks only whether it is set
    console = Console(file=file, highlight=False, no_color=no_color)
    if no_color or not console.is_terminal or console.is_dumb_terminal:
        width = console.width if file.isatty() else _NO_WIDTH
        console = Console(file=file, highlight=False, color_system=None, force_terminal=False, width=width)
    return console


def bar(share: float, ascii_only: bool) -> str:
    """Draw a share from 0 to 1 as a bar of up to 20 cells, to an eighth of a cell (to a cell, in ASCII)."""
    eighths = round(share * _BAR_CELLS * 8)
    if ascii_only:
        return "#" * round(share * _BAR_CELLS)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def plain_table(title: str | None = None) -> Table:
    """Make a table without lines and headers."""
    look: dict[str, Any] = {"box": None, "show_header": False, "padding": (0, 1), "pad_edge": False}
    return Table(title=title, title_justify="left", title_style="bold", **look)


def figures(value: float | None, digits: int = 3) -> str:
    """Write `value` with so many significant digits, and never with an exponent; a dash for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    shown = float(f"{value:.{digits}g}")
    whole = len(f"{abs(int(shown))}") if abs(shown) >= 1 else 0
    if whole:
        return f"{shown:.{max(digits - whole, 0)}f}"
    text = f"{shown:.12f}".rstrip("0")
    return text if text != "0." else f"{value:.{digits}g}"


class CommandError(Exception):
    """Ends a command with one line that says what to do, and with an exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(one_line(message))
        self.code = code
