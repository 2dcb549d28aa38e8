"""Where compiled loops are kept from one process to the next, so that compiling is waited for once.

numba's own files are unpickled and run as they are, so that a damaged one ends the process or worse. Ours begin with a
digest of all that they depend on, and one that isn't right is ignored.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

_DIGEST = hashlib.sha256().digest_size


def _folders() -> list[Path]:
    """Return where to look, and to write if possible: NUMBA_CACHE_DIR, or beside our files and in the user's cache."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given:
        return [Path(given)]
    of_user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    beside = Path(__file__).parent / "__pycache__"
    return [beside, of_user / "zemoe"] if of_user.is_absolute() else [beside]  # "~" stays where there is no home


class LoopCache:
    """Takes the place of numba's own cache of one function: a file for each signature and CPU."""

    def __init__(self, loop: Callable) -> None:
        self._source = Path(loop.__code__.co_filename)
        self._name = f"{self._source.stem}.{loop.__qualname__}"

    def _file_name(self, signature: Any, codegen: Any) -> str:
        known = str(self._source), sys.implementation.cache_tag, signature, codegen.magic_tuple()
        return f"{self._name}-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.loop"

    def _digest(self, name: str, code: bytes) -> bytes:
        """Return a digest of a loop's code, of the file that it was compiled from, and of the compiler's versions."""
        versions = f"{name} {numba.__version__} {llvmlite.__version__} "
        return hashlib.sha256(versions.encode() + hashlib.sha256(self._source.read_bytes()).digest() + code).digest()

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        name = self._file_name(sig, target_context.codegen())
        for folder in _folders():
            try:
                content = (folder / name).read_bytes()
            except OSError:
                continue
            digest, code = content[:_DIGEST], content[_DIGEST:]
            if digest == self._digest(name, code):
                return CompileResult._rebuild(target_context, *pickle.loads(code))
        return None

    def save_overload(self, sig: Any, cres: CompileResult) -> None:
        if cres.library.has_dynamic_globals:  # addresses of this process
            return
        name, code = self._file_name(sig, cres.codegen), dumps(cres._reduce())
        for folder in _folders():
            unfinished = folder / f"{name}.{os.getpid()}.{threading.get_ident()}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                unfinished.write_bytes(self._digest(name, code) + code)
                unfinished.replace(folder / name)
            except OSError:  # a folder of another user, or a full disk: try the next one, or compile again next time
                with suppress(OSError):
                    unfinished.unlink()
            else:
                return
