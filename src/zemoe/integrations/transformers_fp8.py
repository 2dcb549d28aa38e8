"""FP8 checkpoints of LongCat-Flash in transformers, dequantized weight by weight while they are read.

transformers' own way replaces the experts by a class that doesn't know zero experts, or, dequantizing, needs blocks
that divide each weight evenly, which `kv_a_proj_with_mqa` (576 rows, blocks of 128) doesn't offer.

E FFN experts, I expert width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import LongcatFlashConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..checkpoints.fp8 import QuantizedManifest, stream_dequantized
from ..checkpoints.longcat import original_layout
from .transformers_layers import modeling

_EXPERT = re.compile(r"^(?P<experts>.*\.mlp\.experts)\.(?P<id>\d+)\.(?P<which>gate|up|down)_proj\.weight$")


def place(model: nn.Module, name: str) -> torch.Tensor:
    """The part of the model that a tensor of the original layout goes to."""
    expert = _EXPERT.match(name)
    if expert is None:
        module, _, last = name.rpartition(".")
        return getattr(model.get_submodule(module), last).data
    experts, row = model.get_submodule(expert["experts"]), int(expert["id"])
    if expert["which"] == "down":
        return experts.get_parameter("down_proj").data[row]
    gate, up = experts.get_parameter("gate_up_proj").data[row].chunk(2)
    return gate if expert["which"] == "gate" else up


def make_head(model: PreTrainedModel, *, on_disk: bool) -> None:
    """Before a model is filled: a head of its own where the checkpoint holds one, whatever the config says of ties."""
    head: Any = model.get_output_embeddings()
    if on_disk:
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    else:
        model.tie_weights()


def tie_if_equal(model: PreTrainedModel) -> None:
    """Once it is filled: tied as the config says, unless the head differs from the embedding; transformers' rule."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if torch.equal(head.weight, embedding.weight):
        model.tie_weights()


def load_dequantized(
    manifest: QuantizedManifest, config: LongcatFlashConfig, dtype: torch.dtype
) -> modeling.LongcatFlashForCausalLM:
    """Build the model that `config` (not quantized) says, on the CPU, and fill it; for while our layers are applied.

    Memory beside the model: one weight and all blocks' factors.
    """
    with no_init_weights():
        model = modeling.LongcatFlashForCausalLM._from_config(config, dtype=dtype)
    make_head(model, on_disk="lm_head.weight" in manifest.weights.tensors)
    for name, tensor in original_layout(stream_dequantized(manifest, dtype), config.n_routed_experts):
        place(model, name).copy_(tensor)
    tie_if_equal(model)
    return model.eval()
