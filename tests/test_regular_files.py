"""Reading files that anyone may have made, and the one line that is said about them."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from helpers.tiny_checkpoint import byte_tokenizer
from zemoe.checkpoints.tokenizer import TokenizerError, guarded, read_tokenizer
from zemoe.messages import LONGEST, one_line
from zemoe.regular_files import kind_of, parse_json, read_bytes


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a path: an\n error \t of two lines ", "a path: an error of two lines"),
        ("tensor \x1b[31mred\x07", "tensor \\x1b[31mred\\x07"),
        ("turned \u202eround, \u200bwide, \ud800 alone, \ue000 private", None),
        ("plain é ü 中 🙂", "plain é ü 中 🙂"),
    ],
)
def test_one_line(message, line):
    made = one_line(message)
    assert made.isprintable() and (line is None or made == line)
    made.encode()


def test_long_messages_keep_both_ends():
    for middle in ("x" * 10**7, "\x1b" * 10**6, "🙂" * 499):
        made = one_line(f"model.safetensors: tensor {middle} has no dtype")
        assert len(made) <= LONGEST == 500
        assert made.startswith("model.safetensors: tensor ") and made.endswith(" has no dtype")
    assert one_line("y" * LONGEST) == "y" * LONGEST


def test_what_is_there(tmp_path):
    (tmp_path / "text").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    kinds = {"text": "a file", "folder": "a folder", "pipe": "a pipe", "socket": "a socket", "none": "nothing"}
    for name, kind in kinds.items():
        assert kind_of(tmp_path / name) == kind
        if kind not in ("a file", "nothing"):
            with pytest.raises(OSError, match=f"it is {kind}, not a regular file"):
                read_bytes(tmp_path / name)
    assert kind_of("/dev/zero") == "a device"
    assert kind_of(tmp_path / ("n" * 300)) == "nothing (File name too long)"
    assert kind_of("a\0b").startswith("nothing (")
    (tmp_path / "text").write_bytes(b"12345")
    assert read_bytes(tmp_path / "text", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_bytes(tmp_path / "text", 4)


def nested(levels: int) -> bytes:
    return (
        b'{"a":' * (levels // 2) + b"[" * (levels - levels // 2) + b"]" * (levels - levels // 2) + b"}" * (levels // 2)
    )


def test_json():
    for good in ({"a": [1, {"b": None}], "c": "é"}, [], 3, "text", None):
        assert parse_json(json.dumps(good).encode()) == good
    parse_json(nested(64))
    bad = {nested(65): "nested", nested(500): "nested", nested(10**6): "nested", b"\xef\xbb\xbf{}": "byte order mark"}
    bad |= {
        b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}': "'c' is there twice",
        b"[NaN]": "NaN",
        b'{"a": -Infinity}': "-Inf",
    }
    bad |= {b"\xff": "utf-8", b"": "Expecting value", b"{": "Expecting", b"9" * 5000: "digits"}
    bad |= {b"[" + b"{}," * 2**21 + b"0]": "lists, objects and keys", b'{"a":' * 2**21: "lists, objects and keys"}
    for content, why in bad.items():
        with pytest.raises(ValueError, match=why):
            parse_json(content)


# What makes the library's Rust code panic, in reading a tokenizer or in using it.
PANICS = {
    "reading": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "encoding": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}


def damaged(folder: Path, changes: dict) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(byte_tokenizer().to_str()) | changes))
    return path


@pytest.mark.parametrize("while_", PANICS)
def test_a_panic_is_one_error_and_no_other_words(tmp_path, capfd, while_):
    path = damaged(tmp_path, PANICS[while_])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: does not work as a tokenizer \("):
        tokenizer = read_tokenizer(path)
        with guarded(path):
            os.write(2, b"part of the panic\n")
            tokenizer.encode("the sea")
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


def test_what_is_no_panic_passes(capfd):
    """Ctrl-C and errors of ours are not swallowed, nor what others write meanwhile."""
    for kind in (KeyboardInterrupt, SystemExit, RuntimeError):
        with pytest.raises(kind), guarded("tokenizer.json"):
            print("a warning", file=sys.stderr, flush=True)
            raise kind
    assert capfd.readouterr().err == "a warning\n" * 3
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json: .* \(of the library\)"), guarded("tokenizer.json"):
        raise Exception("of the library")


def test_a_closed_stderr(tmp_path):
    real = os.dup(2)
    os.close(2)
    try:
        assert read_tokenizer(damaged(tmp_path, {})).encode("the").ids
    finally:
        os.dup2(real, 2)
        os.close(real)
