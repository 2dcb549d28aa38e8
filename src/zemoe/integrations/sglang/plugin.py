"""LongCat-Flash in SGLang (0.5.11 to 0.5.23), with MoE layers computed by zemoe: the plug-in that SGLang finds itself.

SGLang calls `register` in each of its processes (entry point `sglang.srt.plugins`). It has SGLang's registry of hooks
put our class in the place of `LongcatFlashMoE`; what that does is in `layers.py`. `ZEMOE_SGLANG=0` turns the
plug-in off.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import os
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.version import __version__ as sglang_version

from ...versions import is_tested, range_of

SWITCH = "ZEMOE_SGLANG"
TARGET = "sglang.srt.models.longcat_flash.LongcatFlashMoE"

logger = logging.getLogger("sglang.plugins.zemoe")


def why_not(version: str, switch: str | None) -> str | None:
    """Why the plug-in does nothing with this SGLang and this value of ZEMOE_SGLANG, or None."""
    if switch == "0":
        return f"{SWITCH}=0"
    if switch not in (None, "", "1"):
        return f"{SWITCH} must be 0 or 1, got {switch!r}"
    if not is_tested("sglang", version):  # the ends' sources were read and tried (docs/sglang.md)
        return f"zemoe knows SGLang {range_of('sglang')}, and this is {version}"
    return None


def register() -> None:
    """Have SGLang replace its LongCat-Flash MoE layer by ours when it applies its hooks."""
    reason = why_not(sglang_version, os.environ.get(SWITCH))
    if reason is not None:
        # Said when a model is built: SGLang sets up its log after it has called us, and other models needn't know.
        def say(_: None, layer: Any, *args: object, **kwargs: object) -> None:
            if layer.layer_id == 0:
                logger.info("zemoe: LongCat-Flash models have SGLang's own MoE layers: %s", reason)

        HookRegistry.register(f"{TARGET}.__init__", say, HookType.AFTER)
        return
    from .layers import ZeroExpertLongcatMoE  # imports SGLang's model, as applying the hook would

    HookRegistry.register(TARGET, ZeroExpertLongcatMoE, HookType.REPLACE)
