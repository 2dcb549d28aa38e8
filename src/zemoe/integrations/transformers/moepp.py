"""MoE++ checkpoints in the layout of the published code: read into `moepp_model`.py, and written again.

Tensors have Llama's names but for `model.layers.{i}.mlp.moe.`: `gate.wg.weight` [A, H], or of a two-layer gate
`gate.wg.0.weight` [8A, H] and `gate.wg.2.weight` [A, 8A]; `gate.gate_map.weight` [A, A]; `experts.experts.{e}.`
`up_proj.weight` [2I, H] (gate rows first) and `down_proj.weight` [H, I] of FFN experts, `constant` [H] and `wg.weight`
[2, H] of constant experts. Source: the published code; no published weights were read.

H hidden size, I expert width, E FFN experts, A = E + 4 slots.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from ...checkpoints.files import (
    CheckpointError,
    TensorInfo,
    check_counts,
    check_tensors,
    load_json,
    read_tensors,
    save_tensors,
    stream_tensors,
)
from .moepp_model import ZERO_EXPERTS, MoEPlusPlusConfig, MoEPlusPlusForCausalLM
from .private import build
from .values import WRONG_VALUE, of_the_architecture

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_FLAGS = (
    "moe_use_mixtral_gating", "moe_2layer_gate", "moe_use_logits_norm", "moe_feature_no_mul_topk", "tie_word_embeddings"
)  # fmt: skip
_POSITIVE = ("moe_gate_norm_std", "rms_norm_eps", "rope_theta")
_DTYPES = ("float32", "bfloat16", "float16")
# Entries about the file, not the model; and those of Llama's config that the published code never reads.
_LEFT_OUT = (
    "architectures", "auto_map", "model_type", "transformers_version", "moe_expert_interval", "rope_theta",
    "rope_scaling", "rope_parameters", "head_dim", "attention_bias", "attention_dropout", "mlp_bias",
)  # fmt: skip


def _is_count(value: object, minimum: int) -> bool:
    return type(value) is int and value >= minimum


def _is_number_above(value: object, bound: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bound < value < math.inf


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError unless `config`, with the published defaults for what is absent, is a model of ours."""

    def need(key: str, right: bool, needs: str) -> None:
        if not right:
            raise CheckpointError(f"{source}: {key} must be {needs}, got {config.get(key)!r}")

    need("model_type", config.get("model_type") == "MoE++", "'MoE++'")
    interval = config.get("moe_expert_interval", 1)
    need("moe_expert_interval", interval == 1, "1 or absent (with another the published model can't run)")
    slots = config.get("num_experts", [32])
    fits = isinstance(slots, list) and bool(slots) and _is_count(slots[0], ZERO_EXPERTS + 1)
    least = f"a list of integers, the first at least {ZERO_EXPERTS + 1}"
    need("num_experts", fits, f"{least} (all slots of a layer: 2 constant, a copy, a zero and FFN experts)")
    for key in _COUNTS:
        need(key, _is_count(config.get(key, 1), 1), "an integer >= 1")
    for key in _FLAGS:
        need(key, type(config.get(key, False)) is bool, "true, false or absent")
    for key in _POSITIVE:
        need(key, _is_number_above(config.get(key, 1.0), 0.0), "a finite number above 0")
    hidden, heads = config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
    need("num_attention_heads", hidden % (2 * heads) == 0, f"such that hidden_size = {hidden} gives heads of even size")
    groups = config.get("num_key_value_heads")
    fits = groups is None or (_is_count(groups, 1) and heads % groups == 0)
    need("num_key_value_heads", fits, f"a divisor of num_attention_heads = {heads}, or absent")
    vocab, pad = config.get("vocab_size", 32000), config.get("pad_token_id")
    fits = pad is None or (type(pad) is int and -vocab <= pad < vocab)
    need("pad_token_id", fits, f"one of the {vocab} tokens, or absent")
    scaling = config.get("rope_scaling")
    fits = scaling is None or (
        isinstance(scaling, dict)
        and sorted(scaling) == ["factor", "type"]
        and scaling["type"] in ("linear", "dynamic", "ntk")
        and _is_number_above(scaling["factor"], 1.0)
    )
    need("rope_scaling", fits, "null or {type: 'linear', 'dynamic' or 'ntk', factor: a number above 1}")
    for key in ("rope_parameters", "quantization_config"):
        need(key, config.get(key) is None, "absent (the published code has no such entry)")
    for key in ("dtype", "torch_dtype"):
        need(key, config.get(key) in (None, *_DTYPES), f"one of {', '.join(_DTYPES)}, or absent")


def read_config(folder: str | Path) -> MoEPlusPlusConfig:
    """The checked config.json of a checkpoint folder. Raises CheckpointError.

    rope_scaling of type "ntk" multiplies the base, so it becomes a larger rope_theta.
    """
    source = Path(folder) / "config.json"
    raw = load_json(source)
    check_config(raw, str(source))
    scaling = raw.get("rope_scaling") or {"type": "default"}
    rope = {"rope_type": scaling["type"], "rope_theta": float(raw.get("rope_theta", 10000.0))}
    if scaling["type"] == "ntk":
        rope |= {"rope_type": "default", "rope_theta": rope["rope_theta"] * scaling["factor"]}
    elif scaling["type"] != "default":
        rope["factor"] = float(scaling["factor"])
    plain = {key: value for key, value in of_the_architecture(raw).items() if key not in _LEFT_OUT}
    for key in ("moe_gate_norm_std", "rms_norm_eps"):
        if key in plain:
            plain[key] = float(plain[key])
    try:
        return MoEPlusPlusConfig(**plain, rope_parameters=rope)
    except WRONG_VALUE as error:
        raise CheckpointError(f"{source}: {error}") from error


def published_tensors(model: MoEPlusPlusForCausalLM) -> dict[str, Tensor]:
    """The model's tensors under their published names: views, so that filling one fills the model."""
    num_experts = model.config.num_experts[0] - ZERO_EXPERTS
    rows = {
        "gate_up_proj": (0, "up_proj.weight"),
        "down_proj": (0, "down_proj.weight"),
        "constant": (num_experts, "constant"),
        "constant_wg": (num_experts, "wg.weight"),
    }
    published: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer, block, part = name.partition(".mlp.")
        group, _, packed = part.partition(".")
        if group == "experts":
            first, own = rows[packed]
            for e, row in enumerate(tensor, start=first):
                published[f"{layer}.mlp.moe.experts.experts.{e}.{own}"] = row
        else:
            published[f"{layer}.mlp.moe.{part}" if block else name] = tensor
    if model.lm_head.weight is model.model.embed_tokens.weight:
        published.pop("lm_head.weight")
    return published


def _checked_tensors(folder: Path, config: MoEPlusPlusConfig) -> dict[str, TensorInfo]:
    """Check a folder's tensors against the config before memory is taken for a model of its size; returns them."""
    found = read_tensors(folder)
    source = folder / "config.json"
    counts = {"num_hidden_layers": config.num_hidden_layers, "num_experts": config.num_experts[0]}
    check_counts(source, counts, found)
    try:
        with torch.device("meta"), no_init_weights():
            model = build(MoEPlusPlusForCausalLM, config, torch.float32)
    except WRONG_VALUE as error:
        raise CheckpointError(f"{source}: {error}") from error
    model.tie_weights()
    expected = published_tensors(model)
    if config.tie_word_embeddings:  # the published code leaves a head in the files alone
        found.pop("lm_head.weight", None)
    check_tensors(folder, found, ((name, tuple(tensor.shape)) for name, tensor in expected.items()))
    return found


def load_moepp(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | str = "auto"
) -> MoEPlusPlusForCausalLM:
    """Load an MoE++ checkpoint folder as a causal language model of transformers, in evaluation mode.

    Nothing is downloaded, no code of the checkpoint is run; one tensor at a time is in memory beside the model. The
    routers' weights are float32, with the values that are stored, whatever the dtype of the model.

    Args:
        folder: with config.json and safetensors in the published layout. device: where the model goes. dtype: "auto"
            for config.json's own (float32 if it has none).

    Raises:
        zemoe.checkpoints.CheckpointError: for a config that isn't MoE++'s, tensors that are missing, of another shape,
            or not part of the model, naming file and entry.
    """
    folder = Path(folder)
    config = read_config(folder)
    wanted = config.dtype or torch.float32 if dtype == "auto" else dtype
    found = _checked_tensors(folder, config)
    with no_init_weights():
        model = build(MoEPlusPlusForCausalLM, config, wanted)
    model.tie_weights()
    places = published_tensors(model)
    for name, tensor in stream_tensors(folder, found):
        places[name].copy_(tensor)
    cast(nn.Module, model).to(device)
    return model.eval()


def save_moepp(model: MoEPlusPlusForCausalLM, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> list[str]:
    """Write the model as a checkpoint in the published layout, which `load_moepp` reads; returns the weights' files.

    Raises ValueError if the folder already holds weights.
    """
    files = save_tensors(published_tensors(model).items(), folder, max_shard_bytes)
    config = model.config.to_dict()
    rope, dtype = config["rope_parameters"], str(model.lm_head.weight.dtype).removeprefix("torch.")
    config.pop("dtype", None)
    scaling = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}
    config = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    config |= {"model_type": "MoE++", "architectures": ["MoeForCausalLM"], "moe_expert_interval": 1}
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "torch_dtype": dtype}
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return files
