"""A plug-in for SGLang beside ours, for the tests: what SGLang lacks to run LongCat-Flash on a CPU, and a witness.

SGLANG_ON_CPU_RECORD: a folder for what MoE layers were given and gave, LAYER.RANK.CALL.pt, of the first calls.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from sglang.version import __version__

RECORDED_CALLS = 3
OLD = tuple(map(int, __version__.split(".")[:3])) <= (0, 5, 14)


def register() -> None:
    from sglang.srt.layers.moe import fused_moe_native
    from sglang.srt.layers.rotary_embedding import factory
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry, AttnForwardMethod
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # Torch's attention reads keys from SGLang's cache, so it needs the compressed ones from the first token on.
    AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)

    def experts(layer: Any, x: torch.Tensor, topk_output: Any, config: Any) -> torch.Tensor:
        """SGLang's other implementation in torch: this one takes no choice twice and no expert of another rank."""
        weights, ids, logits = topk_output
        chosen = type(topk_output)(weights.masked_fill(ids < 0, 0), ids.clamp(min=0), logits)
        dispatched = fused_moe_native.StandardDispatchOutput(x, None, chosen)
        return fused_moe_native.fused_moe_forward_native(layer, dispatched).hidden_states

    fused_moe_native.moe_forward_native = experts

    if OLD:
        # Up to 0.5.14 LongCat-Flash's rotary embedding can't be YaRN, and that for CPUs can't be anything else.
        def rotary_embedding(*args: Any, device: object = None, **kwargs: Any) -> Any:
            return factory.get_rope(*args[:8], **kwargs)

        factory.get_rope_cpu = rotary_embedding
        torch.cuda.Stream = lambda: None

    folder = os.environ.get("SGLANG_ON_CPU_RECORD")
    if folder:
        calls: Counter[int] = Counter()

        def recorded(forward: Any, layer: Any, hidden_states: torch.Tensor, *rest: Any) -> torch.Tensor:
            given = hidden_states.clone()
            output = forward(layer, hidden_states, *rest)
            if calls[layer.layer_id] < RECORDED_CALLS:
                kinds = (type(layer).__name__, type(layer.experts).__name__)
                name = f"{layer.layer_id}.{torch.distributed.get_rank()}.{calls[layer.layer_id]}.pt"
                torch.save((given, output.clone(), kinds), Path(folder, name))
                calls[layer.layer_id] += 1
            return output

        moe = "sglang.srt.models.longcat_flash.LongcatFlashMoE"
        HookRegistry.register(f"{moe}.forward", recorded, HookType.AROUND)
