"""Every public name of zemoe with its signature, a line each: `PYTHONPATH=tests python -m tools.public_api`.

`tests/public_api.txt` holds what this prints; `tests/test_public_api.py` compares the two, so that a name or an
argument changes on purpose only.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType

MODULES = (
    "zemoe",
    "zemoe.balance",
    "zemoe.controller",
    "zemoe.statistics",
    "zemoe.retrofit",
    "zemoe.checkpoints",
    "zemoe.integrations.transformers",
    "zemoe.integrations.transformers.moepp",
    "zemoe.integrations.transformers.retrofit",
    "zemoe.integrations.transformers.zeda",
    "zemoe.training.run",
    "zemoe.training.settings",
)


def _signature(thing: object) -> str:
    assert callable(thing)
    if isinstance(thing, type) and issubclass(thing, Exception):
        return ""
    text = str(inspect.signature(thing)).replace("'", "")
    return re.sub(r"<object object at 0x\w+>", "...", text)


def _public(module: ModuleType) -> Iterator[str]:
    """Names in `__all__`, or else what is defined in the module itself."""
    if hasattr(module, "__all__"):
        yield from module.__all__
        return
    for name, thing in vars(module).items():
        if not name.startswith("_") and callable(thing) and getattr(thing, "__module__", None) == module.__name__:
            yield name


def lines() -> Iterator[str]:
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(_public(module)):
            thing, full = getattr(module, name), f"{module_name}.{name}"
            if inspect.isclass(thing):
                yield f"class {full}{_signature(thing)}"
                for method, function in sorted(vars(thing).items()):
                    function = getattr(function, "__func__", function)  # of a class method
                    if inspect.isfunction(function) and (not method.startswith("_") or method == "__call__"):
                        yield f"    {method}{_signature(function)}"
            elif callable(thing):
                yield f"{full}{_signature(thing)}"
            else:
                yield f"{full}: {'module' if isinstance(thing, ModuleType) else type(thing).__name__}"


if __name__ == "__main__":
    print(*lines(), sep="\n")
