"""Checkpoints that ZEDA has published, Qwen3-MoE and GLM-4.7-Flash with zero experts, in transformers' own models.

Their config.json has the base model's entries and `zce_nums`, `zce_types` and `use_zce_mask`; `mlp.gate.weight` has A
rows, `mlp.gate.e_score_correction_bias` (GLM) A entries, FFN experts first; zero experts have no other tensors. All
else is the base model's. Source: ZEDA (arXiv 2605.18643) and its repository.

E FFN experts, Z zero experts, A = E + Z slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...checkpoints.files import (
    CheckpointError,
    TensorInfo,
    check_counts,
    check_tensors,
    load_json,
    read_tensors,
    stream_tensors,
)
from ...retrofit import ZeroExpertBlock
from .loading import make_head, place, tie_if_equal
from .retrofit import retrofit_
from .values import WRONG_VALUE, of_the_architecture

BASES = {"qwen3_moe_plus_plus": "qwen3_moe", "glm4_moe_lite_plus_plus": "glm4_moe_lite"}
_KEYS = ("zce_nums", "zce_types", "use_zce_mask", "architectures", "auto_map", "model_type", "transformers_version")


def _zero_experts(config: Mapping[str, Any], source: Path) -> tuple[str, int]:
    """Return the kind and the number of the zero experts; CheckpointError for kinds that we do not compute."""
    numbers, kinds = config.get("zce_nums"), config.get("zce_types")
    if not isinstance(numbers, list) or not isinstance(kinds, list) or len(numbers) != len(kinds) or not kinds:
        raise CheckpointError(f"{source}: zce_nums and zce_types must be lists of one length, got {numbers}, {kinds}")
    if kinds[0] not in ("zero", "copy") or any(kind != kinds[0] for kind in kinds):
        raise CheckpointError(f"{source}: zce_types must all be 'zero' or all 'copy', got {kinds}")
    if any(type(number) is not int or number < 1 for number in numbers):
        raise CheckpointError(f"{source}: zce_nums must be integers >= 1, got {numbers}")
    return kinds[0], sum(numbers)


def _base_config(config: Mapping[str, Any], source: Path) -> Any:
    """The base model's config."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
        if kind not in ["default", *ROPE_INIT_FUNCTIONS]:  # of another, transformers complains in lines of its own
            raise CheckpointError(f"{source}: {key} must be an object with a rope_type of transformers, got {rope!r}")
    plain = {name: value for name, value in of_the_architecture(config).items() if name not in _KEYS}
    try:
        return CONFIG_MAPPING[BASES[config["model_type"]]](**plain)
    except WRONG_VALUE as error:
        raise CheckpointError(f"{source}: {error}") from error


def _check_sizes(base: Any, num_zero_experts: int, found: Mapping[str, TensorInfo], source: Path) -> None:
    """CheckpointError before memory is taken for more than the files hold."""
    counts = {key: getattr(base, key, 0) for key in ("num_hidden_layers", "num_experts", "n_routed_experts")}
    check_counts(source, counts, found)
    try:
        with torch.device("meta"), no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(base)
    except WRONG_VALUE as error:
        raise CheckpointError(f"{source}: {error}") from error
    there = sum(math.prod(info.shape) for info in found.values())
    asked = sum(parameter.numel() for parameter in model.parameters()) + num_zero_experts * base.hidden_size
    if asked > there + model.get_output_embeddings().weight.numel():  # which may be tied
        raise CheckpointError(f"{source}: its sizes make {asked:,} numbers, in the files are {there:,}")


def load_zeda(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | str = "auto") -> nn.Module:
    """Load a ZEDA checkpoint folder as transformers' base model with `retrofit_`'s blocks, in evaluation mode.

    Nothing is downloaded, no code of the checkpoint is run. `use_zce_mask` (zero experts are never chosen) gives the
    blocks with their zero experts disabled.

    Args:
        folder: with config.json and safetensors. device: where the model goes. dtype: "auto" for the checkpoint's own.

    Raises:
        zemoe.checkpoints.CheckpointError: for another model_type, zero experts of other or several kinds, tensors that
            are missing, of another shape, or not part of the model.
    """
    folder = Path(folder)
    source = folder / "config.json"
    config = load_json(source)
    if config.get("model_type") not in list(BASES):
        raise CheckpointError(f"{source}: model_type must be one of {sorted(BASES)}, got {config.get('model_type')!r}")
    kind, count = _zero_experts(config, source)
    base, found = _base_config(config, source), read_tensors(folder)
    _check_sizes(base, count, found, source)
    wanted = base.dtype or torch.float32 if dtype == "auto" else dtype
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(base, dtype=wanted)
    try:
        blocks = retrofit_(model, count, zero_expert_type=kind)
    except ValueError as error:  # no layer has experts
        raise CheckpointError(f"{source}: {error}") from error
    make_head(model, on_disk="lm_head.weight" in found)
    prediction = f"model.layers.{base.num_hidden_layers}."  # multi-token prediction, which the base model leaves out
    tensors = {name: info for name, info in found.items() if not name.startswith(prediction)}
    check_tensors(folder, tensors, _expected_shapes(model, blocks).items())
    for name, tensor in stream_tensors(folder, tensors):
        _fill(model, name, tensor)
    tie_if_equal(model)
    for name in blocks:
        model.get_submodule(name).zero_experts_enabled = not config.get("use_zce_mask", False)
    return model.to(device).eval()


def _expected_shapes(model: Any, blocks: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this retrofitted model holds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.lm_head.weight is model.get_input_embeddings().weight:
        shapes.pop("lm_head.weight")
    for block in blocks:
        num_zero_experts, _ = shapes.pop(f"{block}.zero_weight")
        shapes.pop(f"{block}.e_score_correction_bias", None)  # for a bias controller; not the gate's
        for part in ("weight", "e_score_correction_bias"):
            name = f"{block}.gate.{part}"
            if name in shapes:
                shapes[name] = (shapes[name][0] + num_zero_experts, *shapes[name][1:])
        num_experts, width, hidden = shapes.pop(f"{block}.experts.gate_up_proj")
        shapes.pop(f"{block}.experts.down_proj")
        for expert in range(num_experts):
            prefix = f"{block}.experts.{expert}"
            shapes |= {f"{prefix}.{which}_proj.weight": (width // 2, hidden) for which in ("gate", "up")}
            shapes[f"{prefix}.down_proj.weight"] = (hidden, width // 2)
    return shapes


def _fill(model: Any, name: str, tensor: torch.Tensor) -> None:
    owner, gate, part = name.rpartition(".gate.")
    block = model.get_submodule(owner) if gate else None
    if not isinstance(block, ZeroExpertBlock):
        place(model, name).copy_(tensor)
        return
    num_experts = block.rules.num_experts
    place(model, name).copy_(tensor[:num_experts])
    if part == "weight":
        block.zero_weight.data.copy_(tensor[num_experts:])
    else:
        zero_bias = tensor[num_experts:].to(block.e_score_correction_bias)
        block.register_buffer("zero_bias", zero_bias)
