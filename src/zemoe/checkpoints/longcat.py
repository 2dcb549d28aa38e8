"""LongCat-Flash checkpoints on disk: checked before anything loads, streamed, saved in the original layout.

H hidden size, I expert width, E FFN experts, Z zero experts, A = E + Z slots, L layers.

Three layouts of the expert weights exist; everything else has the same names in all of them:

| layout | gate and up | down |
|---|---|---|
| original | `experts.{0..E-1}.{gate,up}_proj.weight` [I, H] | `experts.{0..E-1}.down_proj.weight` [H, I] |
| transformers | the same, and rows for zero experts E..A-1 that nothing reads | as above |
| packed | `experts.gate_up_proj` [E or A, 2I, H] | `experts.down_proj` [E, H, I] |

The first is how the models are published, the second what `save_pretrained` of plain transformers writes, the third a
state dict (and `save_pretrained(..., save_original_format=False)`). Files are read and written by `files.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..regular_files import kind_of
from .config import check_config
from .files import (
    WEIGHT_DTYPES,
    CheckpointError,
    TensorInfo,
    check_tensors,
    load_json,
    read_tensors,
    save_tensors,
    stream_tensors,
)

# Multi-token prediction layers are published beside the model; old files also carry rotary frequencies.
_NOT_OURS = re.compile(r"^model\.mtp\.|rotary_emb\.inv_freq$")
_EXPERT = re.compile(r"^(?P<experts>.*\.mlp\.experts)\.(?P<id>[0-9]{1,9})\.(?P<which>gate|up|down)_proj\.weight$")
_PACKED = re.compile(r"^(?P<experts>.*\.mlp\.experts)\.(?P<which>gate_up|down)_proj$")


@dataclass(frozen=True)
class Manifest:
    """What `verify` found: the parsed config.json, the layout, and every tensor of the model by name."""

    folder: Path
    config: dict[str, Any]
    layout: str
    tensors: Mapping[str, TensorInfo]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files, sorted."""
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def num_parameters(self) -> int:
        """Numbers stored, dead zero-expert rows included."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())


def open_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder, whatever it says. Raises CheckpointError."""
    folder = Path(folder)
    if (kind := kind_of(folder)) != "a folder":
        kind = "missing" if kind == "nothing" else kind
        raise CheckpointError(f"{folder}: {kind}, expected a checkpoint folder with config.json and *.safetensors")
    return load_json(folder / "config.json")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked config.json of a checkpoint folder. Raises CheckpointError."""
    config = open_config(folder)
    check_config(config, str(Path(folder) / "config.json"))
    return config


def _expert_shapes(config: Mapping[str, Any], layout: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    H, I = config["hidden_size"], config["expert_ffn_hidden_size"]
    E = config["n_routed_experts"]
    A = E + config["zero_expert_num"]
    if layout == "packed":
        yield "gate_up_proj", (A, 2 * I, H)
        yield "down_proj", (E, H, I)
        return
    for e in range(A if layout == "transformers" else E):
        yield f"{e}.gate_proj.weight", (I, H)
        yield f"{e}.up_proj.weight", (I, H)
        if e < E:
            yield f"{e}.down_proj.weight", (H, I)


def _layer_shapes(config: Mapping[str, Any], layout: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A layer is two attention and two dense halves around one MoE."""
    H, F = config["hidden_size"], config["ffn_hidden_size"]
    q_rank, kv_rank, heads = config["q_lora_rank"], config["kv_lora_rank"], config["num_attention_heads"]
    nope, rope, v_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    A = config["n_routed_experts"] + config["zero_expert_num"]
    yield "mlp.router.classifier.weight", (A, H)
    yield "mlp.router.e_score_correction_bias", (A,)
    attention: dict[str, tuple[int, ...]] = {
        "q_a_proj.weight": (q_rank, H),
        "q_a_layernorm.weight": (q_rank,),
        "q_b_proj.weight": (heads * (nope + rope), q_rank),
        "kv_a_proj_with_mqa.weight": (kv_rank + rope, H),
        "kv_a_layernorm.weight": (kv_rank,),
        "kv_b_proj.weight": (heads * (nope + v_dim), kv_rank),
        "o_proj.weight": (H, heads * v_dim),
    }
    if config.get("attention_bias"):
        attention |= {"q_a_proj.bias": (q_rank,), "kv_a_proj_with_mqa.bias": (kv_rank + rope,), "o_proj.bias": (H,)}
    for half in ("0", "1"):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{norm}.{half}.weight", (H,)
        for which in ("gate", "up"):
            yield f"mlps.{half}.{which}_proj.weight", (F, H)
        yield f"mlps.{half}.down_proj.weight", (H, F)
        for name, shape in attention.items():
            yield f"self_attn.{half}.{name}", shape
    for name, shape in _expert_shapes(config, layout):
        yield f"mlp.experts.{name}", shape


def _shapes(config: Mapping[str, Any], layout: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape, one by one: a config may promise more layers and experts than there is memory for names."""
    H, V = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (V, H)
    yield "model.norm.weight", (H,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (V, H)
    for index in range(config["num_layers"]):
        for name, shape in _layer_shapes(config, layout):
            yield f"model.layers.{index}.{name}", shape


def expected_shapes(config: Mapping[str, Any], layout: str = "original") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds, in one of the three layouts.

    `lm_head.weight` is left out where the config ties it to the embedding. Source: the module definitions of
    LongCat-Flash in transformers; checked against them by the tests.
    """
    if layout not in ("original", "transformers", "packed"):
        raise ValueError(f"layout must be 'original', 'transformers' or 'packed', got {layout!r}")
    return dict(_shapes(config, layout))


def count_numbers(config: Mapping[str, Any]) -> int:
    """How many numbers a model of this config has, without rows for zero experts; in no time, however large it is."""
    one = dict(_layer_shapes(config, "packed"))
    one["mlp.experts.gate_up_proj"] = (config["n_routed_experts"], *one["mlp.experts.gate_up_proj"][1:])
    a_layer = sum(map(math.prod, one.values()))
    beside = sum(math.prod(shape) for _, shape in _shapes({**config, "num_layers": 0}, "packed"))
    return config["num_layers"] * a_layer + beside


def layout_of(names: Iterable[str], config: Mapping[str, Any]) -> str:
    """One of "original", "transformers" and "packed", judged by the names of the expert tensors."""
    layout = "original"
    for name in names:
        if _PACKED.match(name):
            return "packed"
        expert = _EXPERT.match(name)
        if expert and int(expert["id"]) >= config["n_routed_experts"]:
            layout = "transformers"
    return layout


def verify(folder: str | Path) -> Manifest:
    """Check a checkpoint folder completely without reading a tensor or executing anything.

    config.json must be there and make sense; the index must be complete; every tensor of the architecture must be
    there exactly once with its shape and a float dtype, and no other; no file may be truncated. Reads JSON and
    safetensors headers only.

    Raises:
        CheckpointError: naming the file and the tensor, and what was expected.
    """
    folder = Path(folder)
    config = read_config(folder)
    return verify_tensors(folder, config, read_tensors(folder))


def verify_tensors(
    folder: Path, config: Mapping[str, Any], found: Mapping[str, TensorInfo], dtypes: tuple[str, ...] = WEIGHT_DTYPES
) -> Manifest:
    """What `verify` returns, for tensors that were found already and may have one of `dtypes`.

    Raises:
        CheckpointError: for a tensor that is missing, does not fit or is not part of the model.
    """
    tensors = {name: info for name, info in found.items() if not _NOT_OURS.search(name)}
    layout = layout_of(tensors, config)
    needed, head = dict(tensors), tensors.get("lm_head.weight")
    fits = head is not None and head.shape == (config["vocab_size"], config["hidden_size"]) and head.dtype in dtypes
    if config.get("tie_word_embeddings") and fits:
        needed.pop("lm_head.weight")  # a tied head may be stored all the same
    check_tensors(folder, needed, _shapes_as_packed(config, layout, tensors), dtypes)
    return Manifest(folder, dict(config), layout, tensors)


def _shapes_as_packed(
    config: Mapping[str, Any], layout: str, found: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """`_shapes`, but without rows for zero experts where a packed tensor has none: a patched model has saved it."""
    for name, shape in _shapes(config, layout):
        live = (config["n_routed_experts"], *shape[1:])
        yield name, live if _PACKED.match(name) and name in found and found[name].shape == live else shape


def stream(checkpoint: str | Path | Manifest) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for the whole checkpoint, file by file, one tensor in memory at a time.

    A folder is verified first; names are those on disk (`original_layout` maps them).
    """
    manifest = checkpoint if isinstance(checkpoint, Manifest) else verify(checkpoint)
    yield from stream_tensors(manifest.folder, manifest.tensors)


def original_layout(tensors: Iterable[tuple[str, Tensor]], num_experts: int) -> Iterator[tuple[str, Tensor]]:
    """Map (name, tensor) pairs of any of the three layouts to the original one.

    Packed experts are split (as views), the dead rows of zero experts (ids >= num_experts) dropped; the rest passes.
    """
    for name, tensor in tensors:
        expert, packed = _EXPERT.match(name), _PACKED.match(name)
        if packed:
            halves = ("gate", "up") if packed["which"] == "gate_up" else ("down",)
            for e in range(num_experts):
                for which, part in zip(halves, tensor[e].chunk(len(halves)), strict=True):
                    yield f"{packed['experts']}.{e}.{which}_proj.weight", part
        elif expert is None or int(expert["id"]) < num_experts:
            yield name, tensor


def transformers_layout(
    tensors: Iterable[tuple[str, Tensor]], num_experts: int, zero_expert_num: int
) -> Iterator[tuple[str, Tensor]]:
    """Map (name, tensor) pairs of any of the three layouts to the one that plain transformers reads.

    Each zero expert gets the gate and up tensors that plain transformers allocates for it, zeros that nothing reads.
    """
    for name, tensor in original_layout(tensors, num_experts):
        yield name, tensor
        expert = _EXPERT.match(name)
        if expert and int(expert["id"]) == num_experts - 1 and expert["which"] != "down":
            for e in range(num_experts, num_experts + zero_expert_num):
                yield f"{expert['experts']}.{e}.{expert['which']}_proj.weight", torch.zeros_like(tensor)


def save_original_layout(
    tensors: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    config: Mapping[str, Any],
    max_shard_bytes: int = 5 * 10**9,
) -> Manifest:
    """Write a checkpoint in the original layout from (name, tensor) pairs of any layout, then verify it.

    Args:
        tensors: for example `stream(other_folder)` or `model.state_dict().items()`.
        folder: made if need be; must not hold weights yet.
        config: what config.json shall say; checked first.
        max_shard_bytes: a file is closed before it would grow past this.

    Raises:
        CheckpointError: for a config that can't be, or tensors that don't make the model.
    """
    check_config(config, "config")
    save_tensors(original_layout(tensors, config["n_routed_experts"]), folder, max_shard_bytes)
    (Path(folder) / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    return verify(folder)
