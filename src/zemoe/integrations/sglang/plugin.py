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

from ..engines.versions import switch_of, why_not

ENGINE = "SGLang"
TARGET = "sglang.srt.models.longcat_flash.LongcatFlashMoE"

logger = logging.getLogger("sglang.plugins.zemoe")


def register() -> None:
    """Have SGLang replace its LongCat-Flash MoE layer by ours when it applies its hooks."""
    reason = why_not(ENGINE, sglang_version, os.environ.get(switch_of(ENGINE)))
    if reason is not None:
        # Said when a model is built: SGLang sets up its log after it has called us, and other models needn't know.
        def say(_: None, layer: Any, *args: object, **kwargs: object) -> None:
            if layer.layer_id == 0:
                logger.info("zemoe: LongCat-Flash models have SGLang's own MoE layers: %s", reason)

        HookRegistry.register(f"{TARGET}.__init__", say, HookType.AFTER)
        return
    from .layers import ZeroExpertLongcatMoE  # imports SGLang's model, as applying the hook would

    HookRegistry.register(TARGET, ZeroExpertLongcatMoE, HookType.REPLACE)
