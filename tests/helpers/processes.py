"""The command line as a process of its own, also on a pseudo terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

PROGRAM = [sys.executable, "-c", "import sys; from zemoe_main import main; sys.exit(main())"]


# The same with the pseudo-terminal as controlling terminal, so that a typed Ctrl-C becomes a signal, and with that
# signal as a terminal's shell leaves it: a test run that was started in the background ignores it, and hands that down.
PROGRAM_ON_TERMINAL = [
    sys.executable,
    "-c",
    "import fcntl, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); from zemoe_main import main; sys.exit(main())",
]


def environment(**changes) -> dict[str, str]:
    drop = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES", "PYTHONUNBUFFERED")
    return {k: v for k, v in os.environ.items() if k not in drop} | changes


class TerminalSession:
    """A process on a pseudo-terminal of its own, both output streams on it."""

    def __init__(self, arguments, env) -> None:
        self.fd, inside = pty.openpty()
        self.before = termios.tcgetattr(inside)
        self.inside = inside
        streams = {"stdin": inside, "stdout": inside, "stderr": inside}
        self.process = subprocess.Popen([*PROGRAM_ON_TERMINAL, *arguments], **streams, env=env, start_new_session=True)
        self.written = ""

    def read_until(self, pattern: str, seconds: float = 100) -> None:
        end = time.monotonic() + seconds
        while not re.search(pattern, self.written):
            assert time.monotonic() < end, f"{pattern!r} didn't come: {self.written!r}"
            self._read(1.0)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.fd], [], [], seconds)[0]:
            return False
        self.written += os.read(self.fd, 65536).decode(errors="replace")
        return True

    def finish(self) -> int:
        end = time.monotonic() + 100
        while self.process.poll() is None:
            assert time.monotonic() < end, self.written
            self._read(0.2)
        while self._read(0.0):
            pass
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self.fd)
        os.close(self.inside)


@pytest.fixture
def on_terminal():
    sessions = []

    def start(*arguments, **changes) -> TerminalSession:
        settings = {"TERM": "xterm-256color", "COLORTERM": "truecolor"} | changes
        sessions.append(TerminalSession([str(argument) for argument in arguments], environment(**settings)))
        return sessions[-1]

    yield start
    for session in sessions:
        session.close()


def assert_clean(session: TerminalSession) -> None:
    """Cursor shown, colours reset, the last line ended, the terminal's own settings untouched, no traceback."""
    written = session.written
    assert written.rfind("\x1b[?25h") >= written.rfind("\x1b[?25l")
    styles = re.findall(r"\x1b\[[0-9;]*m", written)
    assert not styles or styles[-1] == "\x1b[0m"
    assert termios.tcgetattr(session.inside) == session.before
    assert "Traceback" not in written
