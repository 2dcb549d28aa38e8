"""What the commands show on a terminal has in common: consoles, colours, figures, and errors that end a command."""

from __future__ import annotations

import os
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from .messages import one_line

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


def bar(share: float, ascii_only: bool) -> str:
    """A bar of up to 20 cells for a share of 1, in eighths of a cell."""
    eighths = round(share * _BAR_CELLS * 8)
    if ascii_only:
        return "#" * round(share * _BAR_CELLS)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def plain_table(title: str | None = None) -> Table:
    """A table without lines and headers."""
    look: dict[str, Any] = {"box": None, "show_header": False, "padding": (0, 1), "pad_edge": False}
    return Table(title=title, title_justify="left", title_style="bold", **look)


def figures(value: float | None, digits: int = 3) -> str:
    """`value` with so many significant digits and never an exponent; a dash for None."""
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
    """What ends a command: one line that says what to do, and the exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(one_line(message))
        self.code = code
