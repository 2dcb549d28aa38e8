"""SGLang for CPUs imports names of this package, which is not published for CPUs. Without AMX it calls none of them."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}")

    return absent
