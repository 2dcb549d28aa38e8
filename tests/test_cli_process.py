"""The command as a process of its own: clean streams, a reader that goes away, Ctrl-C on a real terminal."""

from __future__ import annotations

import json
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

from tiny_checkpoint import CONTEXT, write_checkpoint
from zemoe.generate.command import OPENINGS

PROGRAM = [sys.executable, "-c", "import sys; from zemoe_main import main; sys.exit(main())"]
# The same with the pseudo-terminal as controlling terminal, so that a typed Ctrl-C becomes a signal, and with that
# signal as a terminal's shell leaves it: a test run that was started in the background ignores it, and hands that down.
PROGRAM_ON_TERMINAL = [
    sys.executable,
    "-c",
    "import fcntl, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); from zemoe_main import main; sys.exit(main())",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A checkpoint with a context that nobody fills before pressing Ctrl-C."""
    return write_checkpoint(tmp_path_factory.mktemp("endless") / "model", max_position_embeddings=10**6)


def environment(**changes) -> dict[str, str]:
    drop = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES", "PYTHONUNBUFFERED")
    return {k: v for k, v in os.environ.items() if k not in drop} | changes


def test_json_of_a_process_is_clean(checkpoint):
    arguments = ["generate", "--model", str(checkpoint), "--json", "--seed", "3", "--prompt", "the sea — 海"]
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, env=environment(), timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["prompt"] == "the sea — 海" and len(result["tokens"]) == CONTEXT - len(result["prompt_tokens"])
    assert b"\x1b" not in done.stderr and b"Loading" not in done.stderr


def test_python_m_has_the_same_exit_codes(checkpoint):
    for arguments, code in ((["--version"], 0), (["generate", "--model", str(checkpoint), "--prompt", ""], 2)):
        program = [sys.executable, "-m", "zemoe", *arguments]
        assert subprocess.run(program, capture_output=True, timeout=120, check=False).returncode == code


def test_a_terminal_without_unicode(checkpoint):
    arguments = ["generate", "--model", str(checkpoint), "--seed", "1"]
    ascii_only = environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, env=ascii_only, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout and b"#" in done.stdout
    assert done.stdout.isascii()


@pytest.mark.parametrize("when", ["after a line", "before the JSON"])
def test_a_reader_that_goes_away(checkpoint, when):
    arguments = ["generate", "--model", str(checkpoint), *(["--json"] if "JSON" in when else [])]
    process = subprocess.Popen(
        [*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None and process.stderr is not None
    if when == "after a line":
        process.stdout.readline()
    process.stdout.close()
    complaints = process.stderr.read().decode(errors="replace")
    assert process.wait(timeout=120) == 141
    assert "Broken" not in complaints and "Traceback" not in complaints


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


def test_ctrl_c_while_writing(on_terminal, endless):
    session = on_terminal("generate", "--model", endless, "--max-new-tokens", 10**6, "--seed", 1)
    session.read_until(r"48;2;\d+;\d+;\d+m\w")
    time.sleep(0.3)
    os.write(session.fd, b"\x03")
    assert session.finish() == 130
    assert_clean(session)
    assert "\x1b[?25l" in session.written, "there was a spinner, which hides the cursor"
    table = session.written[session.written.index("\x1b[1mdecoding") :]
    assert re.search(r"stopped by.*Ctrl-C", table) and re.search(r"layer 1.*%", table)
    assert int(re.search(r"decoding\D*(\d+) tokens", re.sub(r"\x1b\[[0-9;]*m", "", table))[1]) > 0
    assert session.written.endswith("\n")


def test_ctrl_c_while_loading(on_terminal, endless):
    session = on_terminal("generate", "--model", endless, "--max-new-tokens", 10**6)
    session.read_until("loading the model")
    os.write(session.fd, b"\x03")
    assert session.finish() == 130
    assert_clean(session)
    assert "decoding" not in session.written


def test_no_color_on_a_terminal(on_terminal, checkpoint):
    session = on_terminal("generate", "--model", checkpoint, "--seed", 1, NO_COLOR="1")
    assert session.finish() == 0
    assert "\x1b" not in session.written
    assert "stopped by" in session.written and OPENINGS["austen"] in session.written
