"""Reads tokenizer.json, and turns all that the library raises into one error.

The library is compiled Rust. Where that gives up (a "panic") it writes lines of its own to the standard error stream
and raises what is no `Exception`; everything else that it finds wrong is a bare `Exception`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..regular_files import read_json, reason


class TokenizerError(ValueError):
    """A tokenizer.json that can't be used; the message names the file."""


def _unnamed_file() -> IO[bytes]:
    """In memory where the system has such files: a token is decoded in microseconds."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("stderr"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


@contextmanager
def _without_panic_lines() -> Iterator[None]:
    """While this is active, what is written to file 2 waits; it is dropped after a panic and written out otherwise."""
    try:
        real = os.dup(2)
    except OSError:  # closed: there is nothing to keep clean
        yield
        return
    try:
        with _unnamed_file() as waiting:
            os.dup2(waiting.fileno(), 2)
            panicked = False
            try:
                yield
            except BaseException as error:
                panicked = _is_panic(error)
                raise
            finally:
                os.dup2(real, 2)
                waiting.seek(0)
                if not panicked and (text := waiting.read()):
                    os.write(2, text)
    finally:
        os.close(real)


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # each Rust library has a class of its own, which none exports


@contextmanager
def guarded(source: str | Path) -> Iterator[None]:
    """Turn what a tokenizer, made of the file `source`, raises inside this context into a TokenizerError."""
    try:
        with _without_panic_lines():
            yield
    except BaseException as error:
        if not _is_panic(error) and type(error) is not Exception:
            raise
        raise TokenizerError(f"{source}: does not work as a tokenizer ({error})") from None


def read_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer`, without truncation, padding or dropout. Raises TokenizerError.

    It encodes text as text: `<|endoftext|>` in it is thirteen characters, not the end mark, which has its id by name.
    The same text has the same ids each time.
    """
    from tokenizers import Tokenizer, models

    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: not readable as a tokenizer ({reason(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise TokenizerError(f"{path}: is not a tokenizer, it has no model; take the one that belongs to the weights")
    _check_ids(content["model"].get("vocab"), path)
    with guarded(path):
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        if isinstance(tokenizer.model, models.BPE):
            tokenizer.model.dropout = None  # it leaves out merges by chance
    return tokenizer


def _check_ids(vocab: Any, path: Path) -> None:
    """TokenizerError for an id of two tokens: which of them it decodes to would be another one in each process."""
    names: dict[Any, str] = {}
    for name, number in vocab.items() if isinstance(vocab, dict) else ():
        if isinstance(number, int) and names.setdefault(number, name) != name:
            raise TokenizerError(f"{path}: the tokens {names[number]!r} and {name!r} have the same id, {number}")
