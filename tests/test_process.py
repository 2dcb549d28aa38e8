"""The process from its first line: signals while it imports, streams that take nothing, folders to read only."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from helpers.paths import ROOT
from helpers.processes import PROGRAM, environment
from zemoe.training.stopping import stopping

# Says on its standard error when the import of zemoe begins, which is after the first lines.
PROGRAM_THAT_SAYS_WHEN = [
    sys.executable,
    "-c",
    "import os, sys; sys.addaudithook(lambda event, given: "
    "os.write(2, b'!') if event == 'import' and given[0] == 'zemoe' else None); "
    "from zemoe_main import main; sys.exit(main())",
]


def default_signals() -> None:
    """As a terminal's shell leaves them, whatever the tests were started by."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))


def ignored_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def begin(*arguments: str, prepare=default_signals) -> subprocess.Popen[bytes]:
    """A process that is at the beginning of its imports."""
    process = subprocess.Popen(
        [*PROGRAM_THAT_SAYS_WHEN, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=prepare,
        env=environment(),
    )
    assert process.stderr is not None and os.read(process.stderr.fileno(), 1) == b"!"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("seconds", [0, 0.1, 0.3, 0.7, 1.5])
def test_a_signal_while_it_imports(number, code, seconds):
    process = begin("generate", "--max-new-tokens", "100000")
    time.sleep(seconds)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, b"")
    assert seconds > 0.5 or out == b""


def test_two_at_once():
    process = begin("generate")
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    assert process.communicate(timeout=60) == (b"", b"") and process.returncode in (130, 143)


SWALLOWED = {
    "by compiled code": "import ctypes; call = ctypes.CFUNCTYPE(None)(lambda: time.sleep(60)); call(); time.sleep(60)",
    "by a library": "try:\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)",
}


@pytest.mark.parametrize("swallowed", SWALLOWED)
def test_a_signal_that_someone_swallows(swallowed):
    program = (
        "import os, sys, time, zemoe_main, zemoe.cli\n"
        f"def main():\n    os.write(2, b'!')\n    exec({SWALLOWED[swallowed]!r})\n"
        "zemoe_main._SECONDS = 0.5\nzemoe.cli.main = main\nsys.exit(zemoe_main.main())"
    )
    command = [sys.executable, "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, preexec_fn=default_signals, env=environment())
    assert process.stderr is not None and os.read(process.stderr.fileno(), 1) == b"!"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50) == (b"", b"") and process.returncode == 143


def test_a_signal_that_someone_swallows_and_goes_on_comes_again():
    """And again, until somebody lets it through; not while somebody deals with it, however long that takes."""
    program = (
        "import os, sys, time, zemoe_main, zemoe.cli\n"
        "def main():\n"
        "    for _ in range(2):\n"
        "        try:\n            os.write(2, b'!')\n            time.sleep(60)\n"
        "        except BaseException:\n            pass\n"
        "    try:\n        time.sleep(60)\n"
        "    finally:\n        time.sleep(1.5)\n        os.write(2, b' tidied')\n"
        "zemoe.cli.main = main\nsys.exit(zemoe_main.main())"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], **pipes, preexec_fn=default_signals, env=environment())
    assert process.stderr is not None and os.read(process.stderr.fileno(), 1) == b"!"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50) == (b"", b"! tidied") and process.returncode == 143


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup and the background of a shell leave Ctrl-C."""
    process = begin("--version", prepare=ignored_signals)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"") and out.startswith(b"zemoe ")


def test_ctrl_c_while_a_tokenizer_is_trained(tmp_path):
    """It does not wait until that is done: then there would be one."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(100_000)]
    (tmp_path / "my.txt").write_text(" ".join(words * 4))
    settings = [f"--set=model.{key}" for key in ("vocab_size=30000", "num_layers=1")]
    process = begin("train", "--data", str(tmp_path / "my.txt"), "--out", str(tmp_path / "run"), *settings)
    assert process.stderr is not None
    assert process.stderr.readline() == b"zemoe: training a tokenizer on 2 MB of text\n"
    time.sleep(0.3)  # until that write has returned: an exception in it would have the line written again
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_training_leaves_an_ignored_signal_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.asked
            signal.raise_signal(signal.SIGTERM)
            assert stop.signal == "SIGTERM" and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------------------- streams


def in_shell(line: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """`line` in bash, where "$@" is the program; its status is that of the pipe's first command."""
    command = ["bash", "-c", f'{line}; exit "${{PIPESTATUS[0]}}"', "bash", *PROGRAM]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(**changes), check=False)


def without_notes(err: str) -> str:
    """Without the line that says that loops are compiled, which comes where nothing has cached them."""
    return "".join(line for line in err.splitlines(True) if "compil" not in line)


FULL = "zemoe: error: standard output can't be written (No space left on device)\n"
CLOSED = "zemoe: error: standard output is closed; redirect it to /dev/null to have none\n"


@pytest.mark.parametrize(
    ("line", "code", "err"),
    [
        ('"$@" --version >&-', 1, CLOSED),
        ('"$@" --version >/dev/full', 1, FULL),
        ('"$@" doctor --json >/dev/full', 1, FULL),
        ('"$@" --version 1</dev/null', 1, "zemoe: error: standard output can't be written (Bad file descriptor)\n"),
        ('"$@" generate --max-new-tokens 3 >/dev/full', 1, FULL),
        ('"$@" --version >&- 2>&-', 1, ""),
        ('"$@" poem 2>&-', 2, ""),
        ('"$@" poem 2>/dev/full', 2, ""),
        ('"$@" --help | head -n 1 >/dev/null', 141, ""),
        ('"$@" generate --max-new-tokens 2000 | head -n 1 >/dev/null', 141, ""),
    ],
)
def test_a_stream_that_takes_nothing(line, code, err):
    done = in_shell(line)
    assert (done.returncode, without_notes(done.stderr), done.stdout) == (code, err, "")


def test_without_standard_error():
    done = in_shell('"$@" --version 2>&- <&-')
    assert done.returncode == 0 and done.stdout.startswith("zemoe ")


@pytest.mark.parametrize(("stream", "unbuffered"), [("stderr", ""), ("stderr", "1"), ("stdout", "1")])
def test_a_line_is_written_at_once(stream, unbuffered):
    """Of standard output too if Python is asked to; os._exit drops what waits in a buffer."""
    code = f"import os, sys, zemoe_main; zemoe_main._open_streams(); print('now', file=sys.{stream}); os._exit(0)"
    command, env = [sys.executable, "-c", code], environment(PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=True)
    assert getattr(done, stream) == "now\n"


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    """What a library writes to file 2 must not land in a file of the run."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "my.txt").write_text("the sea and the wind\n" * 200)
    sets = "--set train.steps=1 --set train.rows=2 --set data.context=8 --set model.vocab_size=260 --set run.device=cpu"
    line = f'cd {tmp_path}; "$@" train --config examples/train.toml --data my.txt --out run {sets} 2>&- >/dev/null <&-'
    assert in_shell(line).returncode == 0
    for record in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(record)


# ------------------------------------------------------------------------------------------------------------- folders

# root may write everywhere; setpriv takes that right away.
PLAIN = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []


@pytest.mark.skipif(bool(PLAIN) and shutil.which("setpriv") is None, reason="needs setpriv, to be no root")
def test_folders_that_cannot_be_written(tmp_path):
    """As home, cache and working folder; what has to write there says so in a line."""
    (tmp_path / "my.txt").write_text("the sea and the wind\n" * 200)
    tmp_path.chmod(0o555)
    home = environment(HOME=str(tmp_path), NUMBA_CACHE_DIR=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*PLAIN, *PROGRAM, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=home, capture_output=True, text=True, timeout=120, check=False)

    try:
        done = run("generate", "--max-new-tokens", "2")
        assert (done.returncode, without_notes(done.stderr)) == (0, "")
        done = run("train", "--data", "my.txt")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith("zemoe: error: runs/zemoe: ")
        done = run("bench", "first", "--tokens", "1", "--baseline", "none", "--repeats", "1", "--csv", "x.csv")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "x.csv" in done.stderr
    finally:
        tmp_path.chmod(0o755)


def test_a_working_folder_that_was_deleted(tmp_path):
    done = in_shell(f'mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; "$@" generate')
    told = "zemoe: error: the working folder was deleted; change to one that is there\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told)


def test_no_home(tmp_path):
    env = {key: value for key, value in environment().items() if key not in ("HOME", "XDG_CACHE_HOME")}
    command = [*PROGRAM, "generate", "--max-new-tokens", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, without_notes(done.stderr)) == (0, "")
