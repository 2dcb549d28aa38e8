"""A picture of a command's real output: runs it in a terminal of its own and renders what it wrote as SVG.

    python dev/record.py docs/images/generate.svg                  # make run
    python dev/record.py doctor.svg zemoe doctor

Standard error (make's own lines, the spinner) is left out, everything else is as the command wrote it. Of what it draws
anew again and again, the last picture counts.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.ansi import AnsiDecoder
from rich.console import Console, Group
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS, ROWS = 100, 60
THEME = TerminalTheme(
    (18, 16, 28),
    (214, 210, 228),
    [
        (46, 42, 64),
        (236, 95, 103),
        (126, 192, 120),
        (234, 178, 90),
        (110, 160, 230),
        (190, 120, 220),
        (90, 190, 200),
        (214, 210, 228),
    ],
)
# rich's own template fetches a font from the web; a picture in a repository must need nothing.
TEMPLATE = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font: {char_height}px/{line_height}px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def capture(command: list[str]) -> str:
    """What `command` writes to a terminal of COLUMNS x ROWS with all colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        written += chunk
    if process.wait() != 0:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return written.decode().replace("\r\n", "\n")


def without_wiped(written: str) -> str:
    """What is left on the terminal: rich wipes the lines of a live picture, from the last one up, to draw it anew."""
    kept = ""
    for text, wiped in re.findall(r"(.*?)(\r\x1b\[2K(?:\x1b\[1A\x1b\[2K)*|\Z)", written, re.DOTALL):
        lines = (kept + text).split("\n")
        if wiped:
            lines = [*lines[: len(lines) - 1 - wiped.count("\x1b[1A")], ""]
        kept = "\n".join(lines)
    return kept


def main() -> None:
    path, command = Path(sys.argv[1]), sys.argv[2:] or ["make", "--silent", "run"]
    title = " ".join(word for word in command if word != "--silent")
    lines = [Text.assemble(("$ ", "bold green"), title), *AnsiDecoder().decode(without_wiped(capture(command)))]
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Group(*lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    svg = console.export_svg(title="", theme=THEME, code_format=TEMPLATE, unique_id="zemoe")
    path.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
