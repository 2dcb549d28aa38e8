"""Reads files that anyone may have made: only regular files, no more bytes than expected, and JSON without tricks.

A pipe would make us wait for a writer for ever, a device such as /dev/zero has no end, and JSON may be nested more
deeply than a parser's stack, or give one key two values.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

# Real files are smaller: the index of 560 B parameters has 6 MB, the largest tokenizers have 33 MB and 800,000 parts.
MOST_JSON_BYTES = 2**25
_MOST_PARTS = 2**21  # lists, objects and keys; `[{},{},...` takes 25 times its size in memory, once it is parsed
_DEEPEST = 64
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of(path: str | Path) -> str:
    """Say what is there, for people: "a file", "a folder", "a pipe", "nothing", "nothing (File name too long)" ..."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "nothing"
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        return f"nothing ({getattr(error, 'strerror', None) or error})"
    return "a file" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")


def check_regular(path: str | Path) -> int:
    """Return the size of a regular file, or of the one that a link leads to; OSError for anything else. Never waits."""
    try:
        found = os.stat(path)
    except ValueError as error:  # a zero byte in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
    return found.st_size


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """Read all of a regular file. OSError for anything else, or if it has more than `most` bytes."""
    size = check_regular(path)
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    with open(path, "rb") as file:
        return file.read(size)  # no more than it said it has, for some files in /proc have no end


def reason(error: OSError | ValueError) -> str:
    """Say what went wrong, without the path and the error's number, which `str` of an OSError repeats."""
    return getattr(error, "strerror", None) or str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object's entries; ValueError for a key that is there twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} is there twice")
    return made


def _no_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which Python reads as numbers and JSON doesn't have."""
    raise ValueError(f"{name} is no JSON")


def parse_json(content: bytes) -> Any:
    """Return the value of JSON in UTF-8.

    ValueError, with the reason, if it is no JSON, has a key twice or a NaN, is nested too deeply or has too many parts.
    """
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark")
    if sum(map(content.count, (b"[", b"{", b":"))) > _MOST_PARTS:
        raise ValueError(f"it has more than {_MOST_PARTS:,} lists, objects and keys")
    try:
        value = json.loads(content.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} deep") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        inside = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in inside if isinstance(child, dict | list)]
    if level:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    return value


def read_json(path: str | Path, most: int = MOST_JSON_BYTES) -> Any:
    """Read and parse a regular file of at most `most` bytes; errors are those of `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, most))
