"""Whether a plug-in takes part at all: the engine's version, and the variable that turns the plug-in off."""

from __future__ import annotations

from ...versions import is_tested, range_of


def switch_of(engine: str) -> str:
    """The environment variable that turns the plug-in of `engine` off: ZEMOE_VLLM, ZEMOE_SGLANG."""
    return f"ZEMOE_{engine.upper()}"


def why_not(engine: str, version: str, value: str | None) -> str | None:
    """Why the plug-in of an engine does nothing, or None.

    The plug-ins subclass what is inside the engines, so that each version's sources were read and tried
    (docs/vllm.md, docs/sglang.md); with any other version an engine keeps its own layers.

    Args:
        engine: "vLLM" or "SGLang". version: the installed one. value: of the environment variable; None if unset.
    """
    if value == "0":
        return f"{switch_of(engine)}=0"
    if value not in (None, "", "1"):
        return f"{switch_of(engine)} must be 0 or 1, got {value!r}"
    if not is_tested(engine.lower(), version):
        return f"zemoe knows {engine} {range_of(engine.lower())}, and this is {version}"
    return None
