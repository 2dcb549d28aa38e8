"""The command as a process of its own: clean streams, a reader that goes away, Ctrl-C on a real terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

from helpers.processes import PROGRAM, assert_clean, environment
from helpers.tiny_checkpoint import CONTEXT, write_checkpoint
from zemoe.generate.command import OPENINGS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A checkpoint with a context that nobody fills before pressing Ctrl-C."""
    return write_checkpoint(tmp_path_factory.mktemp("endless") / "model", max_position_embeddings=10**6)


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
