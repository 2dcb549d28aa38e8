"""LongCat-Flash in vLLM (0.26 to 0.33), with its MoE layers computed by zemoe: the plug-in that vLLM finds by itself.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). It puts our model classes in place
of vLLM's own for the LongCat architectures that have MoE layers. What they do, and when they leave all to vLLM, is in
`models.py`, which is imported only where a LongCat model is built. `ZEMOE_VLLM=0` turns the plug-in off.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import multiprocessing
import os

import vllm
from vllm.logger import init_logger

from ..engines.versions import switch_of, why_not

ENGINE = "vLLM"

_MODELS = "zemoe.integrations.vllm.models"
ARCHITECTURES = {
    "LongcatFlashForCausalLM": f"{_MODELS}:ZeroExpertLongcatFlashForCausalLM",
    "LongcatFlashNgramForCausalLM": f"{_MODELS}:ZeroExpertLongcatFlashNgramForCausalLM",
}

logger = init_logger("vllm.plugins.zemoe")  # vLLM shows what is logged below "vllm"


def register() -> None:
    """Put our model classes in vLLM's registry, as names that are imported when a model is built; idempotent."""
    reason = why_not(ENGINE, vllm.__version__, os.environ.get(switch_of(ENGINE)))
    if reason is not None:
        if multiprocessing.parent_process() is None:  # vLLM's other processes would all say it again
            # A warning: vLLM loads plug-ins before it makes a place for its log, and Python shows warnings without one.
            logger.warning("zemoe: LongCat models have vLLM's own MoE layers: %s", reason)
        return
    from vllm import ModelRegistry

    for architecture, name in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, name)
