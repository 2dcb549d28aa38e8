"""A terminal to write to, for tests of what people see."""

from __future__ import annotations

import io

import pytest


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def make_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, lines: int) -> Terminal:
    """One of that size, with all colours."""
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "truecolor"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def without_compiling(err: str) -> str:
    """What a command said on stderr, but for the note of the first run on a machine, that loops are being compiled."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("zemoe: compiling loops"))
