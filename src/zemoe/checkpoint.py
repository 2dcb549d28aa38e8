"""LongCat-Flash checkpoints on disk: checked before anything loads, streamed, saved in the original layout.

H hidden size, I expert width, E FFN experts, Z zero experts, A = E + Z slots, L layers.

Three layouts of the expert weights exist; everything else has the same names in all of them:

| layout | gate and up | down |
|---|---|---|
| original | `experts.{0..E-1}.{gate,up}_proj.weight` [I, H] | `experts.{0..E-1}.down_proj.weight` [H, I] |
| transformers | the same, and rows for zero experts E..A-1 that nothing reads | as above |
| packed | `experts.gate_up_proj` [E or A, 2I, H] | `experts.down_proj` [E, H, I] |

The first is how the models are published, the second what `save_pretrained` of plain transformers writes, the third a
state dict (and `save_pretrained(..., save_original_format=False)`). Needs torch and safetensors only; pickled weights
are never opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHT_DTYPES = ("F32", "BF16", "F16")

_DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_DTYPE_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
_SIZES = (
    "vocab_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_topk", "n_routed_experts", "expert_ffn_hidden_size",
)  # fmt: skip
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Multi-token prediction layers are published beside the model; old files also carry rotary frequencies.
_NOT_OURS = re.compile(r"^model\.mtp\.|rotary_emb\.inv_freq$")
_EXPERT = re.compile(r"^(?P<experts>.*\.mlp\.experts)\.(?P<id>\d+)\.(?P<which>gate|up|down)_proj\.weight$")
_PACKED = re.compile(r"^(?P<experts>.*\.mlp\.experts)\.(?P<which>gate_up|down)_proj$")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format


class CheckpointError(ValueError):
    """A checkpoint folder that must not be loaded; the message names the file and, where there is one, the tensor."""


class TensorInfo(NamedTuple):
    """Where a tensor is: file name, dtype as safetensors spells it, shape, size in bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


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


def load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or CheckpointError."""
    try:
        loaded = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint folder holds {path.name}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(loaded).__name__}")
    return loaded


def check_config(config: Mapping[str, Any], source: str = "config.json") -> None:
    """Raise CheckpointError unless `config` describes a LongCat-Flash model that transformers' code computes right."""

    def refuse(key: str, needs: str) -> None:
        raise CheckpointError(f"{source}: {key} must be {needs}, got {config.get(key)!r}")

    def is_count(value: object, minimum: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= minimum

    if config.get("model_type") != "longcat_flash":
        refuse("model_type", "'longcat_flash' (the supported architecture)")
    for key in _SIZES:
        if not is_count(config.get(key), 1):
            refuse(key, "an integer >= 1")
    if not is_count(config.get("zero_expert_num"), 0):
        refuse("zero_expert_num", "an integer >= 0")
    slots = config["n_routed_experts"] + config["zero_expert_num"]
    if config["moe_topk"] > slots:
        refuse("moe_topk", f"at most n_routed_experts + zero_expert_num = {slots}")
    scale = config.get("routed_scaling_factor")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        refuse("routed_scaling_factor", "a finite number")
    if config["qk_rope_head_dim"] % 2:
        refuse("qk_rope_head_dim", "even")
    # Rotary positions are made for head_dim, which defaults to 64, and used for qk_rope_head_dim.
    if config.get("head_dim", 64) != config["qk_rope_head_dim"]:
        refuse("head_dim", f"qk_rope_head_dim = {config['qk_rope_head_dim']} (64 if absent)")
    if config.get("num_key_value_heads") not in (None, config["num_attention_heads"]):
        refuse("num_key_value_heads", f"num_attention_heads = {config['num_attention_heads']}, or absent")
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else "default"
    if rope_type not in _ROPE_TYPES:
        raise CheckpointError(f"{source}: rope_type must be one of {', '.join(_ROPE_TYPES)}, got {rope_type!r}")
    head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if config.get("qk_head_dim", head_dim) not in (None, head_dim):
        refuse("qk_head_dim", f"qk_nope_head_dim + qk_rope_head_dim = {head_dim}, or absent")
    # Options that the published models don't use, and that transformers' LongCat-Flash reads past without a word.
    if config.get("zero_expert_type", "identity") not in ("identity", "copy"):
        refuse("zero_expert_type", "'identity' (all that LongCat-Flash in transformers computes)")
    for key in ("router_bias", "norm_topk_prob"):
        if config.get(key):
            refuse(key, "false or absent (LongCat-Flash in transformers ignores it)")
    for key in ("mla_scale_q_lora", "mla_scale_kv_lora"):
        if config.get(key, True) is not True:
            refuse(key, "true or absent (LongCat-Flash in transformers always scales)")
    for key in ("dtype", "torch_dtype"):
        if not isinstance(config.get(key), str | torch.dtype | None):
            refuse(key, "the name of a dtype, or absent")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{source}: quantization_config is set; quantized checkpoints are not supported")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked config.json of a checkpoint folder. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "missing"
        raise CheckpointError(f"{folder}: {kind}, expected a checkpoint folder with config.json and *.safetensors")
    config = load_json(folder / "config.json")
    check_config(config, str(folder / "config.json"))
    return config


def _expert_shapes(config: Mapping[str, Any], layout: str) -> dict[str, tuple[int, ...]]:
    H, I = config["hidden_size"], config["expert_ffn_hidden_size"]
    E = config["n_routed_experts"]
    A = E + config["zero_expert_num"]
    if layout == "packed":
        return {"gate_up_proj": (A, 2 * I, H), "down_proj": (E, H, I)}
    rows = A if layout == "transformers" else E
    shapes = {f"{e}.{which}_proj.weight": (I, H) for e in range(rows) for which in ("gate", "up")}
    return shapes | {f"{e}.down_proj.weight": (H, I) for e in range(E)}


def expected_shapes(config: Mapping[str, Any], layout: str = "original") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds, in one of the three layouts.

    `lm_head.weight` is left out where the config ties it to the embedding. Source: the module definitions of
    LongCat-Flash in transformers; checked against them by the tests.
    """
    if layout not in ("original", "transformers", "packed"):
        raise ValueError(f"layout must be 'original', 'transformers' or 'packed', got {layout!r}")
    H, V, F = config["hidden_size"], config["vocab_size"], config["ffn_hidden_size"]
    q_rank, kv_rank, heads = config["q_lora_rank"], config["kv_lora_rank"], config["num_attention_heads"]
    nope, rope, v_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    A = config["n_routed_experts"] + config["zero_expert_num"]
    layer: dict[str, tuple[int, ...]] = {
        "mlp.router.classifier.weight": (A, H),
        "mlp.router.e_score_correction_bias": (A,),
    }
    layer |= {f"mlp.experts.{name}": shape for name, shape in _expert_shapes(config, layout).items()}
    for half in ("0", "1"):  # a layer is two attention and two dense halves around one MoE
        layer |= {f"{norm}.{half}.weight": (H,) for norm in ("input_layernorm", "post_attention_layernorm")}
        layer |= {f"mlps.{half}.{which}_proj.weight": (F, H) for which in ("gate", "up")}
        layer[f"mlps.{half}.down_proj.weight"] = (H, F)
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
            biased = {"q_a_proj": q_rank, "kv_a_proj_with_mqa": kv_rank + rope, "o_proj": H}
            attention |= {f"{name}.bias": (size,) for name, size in biased.items()}
        layer |= {f"self_attn.{half}.{name}": shape for name, shape in attention.items()}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, H)
    for index in range(config["num_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _tensor_info(file: str, entry: object, data_bytes: int) -> TensorInfo | str:
    """The checked header entry of one tensor, or what is wrong with it."""
    if not isinstance(entry, dict):
        return f"is described by {type(entry).__name__}, not by an object"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in _DTYPE_BYTES:
        return f"has unknown dtype {dtype!r}"
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        return f"has shape {shape!r}"
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        return f"has data_offsets {offsets!r}"
    begin, end = offsets
    size = math.prod(shape) * _DTYPE_BYTES[dtype]
    if begin < 0 or end - begin != size:
        return f"of shape {shape} and dtype {dtype} takes {size} bytes, its data_offsets are {offsets}"
    if end > data_bytes:
        return f"ends at byte {end} of the data, but the file is truncated: only {data_bytes} bytes of data are there"
    return TensorInfo(file, dtype, tuple(shape), size)


def _read_start(path: Path) -> tuple[int, bytes, int, object]:
    """Size of a file, its first 8 bytes, the header length they give, and the parsed header (None where it is none)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            fits = len(start) == 8 and 2 <= length <= min(size - 8, _MAX_HEADER_BYTES)
            raw = file.read(length) if fits else b""
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    try:
        return size, start, length, json.loads(raw)
    except ValueError:  # neither UTF-8 nor JSON
        return size, start, length, None


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, from its header alone; no tensor data is read.

    Raises CheckpointError for a file that is missing, truncated or of another format (a pickle is named, never loaded).
    """
    path = Path(path)
    size, start, length, header = _read_start(path)
    if not isinstance(header, dict):
        if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):  # zip, pickle protocol
            raise CheckpointError(f"{path}: holds pickled weights under another name; refused, nothing was loaded")
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({size} bytes, header length {length})")
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        info = _tensor_info(path.name, entry, size - 8 - length)
        if isinstance(info, str):
            raise CheckpointError(f"{path}: tensor {name} {info}")
        tensors[name] = info
    described = sum(info.num_bytes for info in tensors.values())
    if described != size - 8 - length:
        raise CheckpointError(f"{path}: {size - 8 - length} bytes of data, but its tensors make {described}")
    return tensors


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The names of the weight files, and the index {tensor: file} where there is one."""
    if (folder / INDEX_NAME).exists():
        index = load_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{folder / INDEX_NAME}: weight_map must be an object that names each tensor's file")
        for tensor, file in index.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder / INDEX_NAME}: tensor {tensor} is in {file!r}; only *.safetensors of this folder are read"
                )
        return sorted(set(index.values())), index
    if (folder / SINGLE_NAME).exists():
        return [SINGLE_NAME], None
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{folder / pickled[0]}: pickled weights can run code and are never loaded; convert them to safetensors"
        )
    raise CheckpointError(f"{folder / SINGLE_NAME}: no such file, and no {INDEX_NAME} either")


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder, from its index and its files' headers; CheckpointError where they disagree."""
    files, index = _weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{folder / file}: tensor {name} is also in {tensors[name].file}")
            if index is not None and index.get(name) != file:
                raise CheckpointError(f"{folder / file}: tensor {name} is here, {INDEX_NAME} says {index.get(name)!r}")
            tensors[name] = info
    for name, file in (index or {}).items():
        if name not in tensors:
            raise CheckpointError(f"{folder / file}: tensor {name} is missing, though {INDEX_NAME} lists it")
    return tensors


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
    return check_tensors(folder, config, read_tensors(folder), WEIGHT_DTYPES)


def check_tensors(
    folder: Path, config: Mapping[str, Any], found: Mapping[str, TensorInfo], dtypes: tuple[str, ...]
) -> Manifest:
    """What `verify` finds, of tensors found already; CheckpointError for one that is missing or doesn't fit."""
    tensors = {name: info for name, info in found.items() if not _NOT_OURS.search(name)}
    layout = layout_of(tensors, config)
    expected = expected_shapes(config, layout)
    source = folder / INDEX_NAME if (folder / INDEX_NAME).exists() else folder / SINGLE_NAME
    for name, shape in expected.items():
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(f"{source}: tensor {name} {list(shape)} is missing")
        allowed = [shape]
        if _PACKED.match(name):  # packed by a patched model: the zero experts have no rows
            allowed.append((config["n_routed_experts"], *shape[1:]))
        if info.shape not in allowed:
            raise CheckpointError(
                f"{folder / info.file}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
            )
        if info.dtype not in dtypes:
            raise CheckpointError(
                f"{folder / info.file}: tensor {name} has dtype {info.dtype}, supported are {', '.join(dtypes)}"
            )
    for name, info in tensors.items():
        tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
        if name not in expected and not tied:
            raise CheckpointError(
                f"{folder / info.file}: tensor {name} {list(info.shape)} is not part of this config.json"
            )
    return Manifest(folder, dict(config), layout, tensors)


def stream(checkpoint: str | Path | Manifest) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for the whole checkpoint, file by file, one tensor in memory at a time.

    A folder is verified first; names are those on disk (`original_layout` maps them).
    """
    manifest = checkpoint if isinstance(checkpoint, Manifest) else verify(checkpoint)
    for file in manifest.files:
        with safe_open(manifest.folder / file, framework="pt") as tensors:
            for name, info in manifest.tensors.items():
                if info.file == file:
                    yield name, tensors.get_tensor(name)


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


def save_tensors(
    tensors: Iterable[tuple[str, Tensor]], folder: str | Path, max_shard_bytes: int = 5 * 10**9
) -> list[str]:
    """Write (name, tensor) pairs as safetensors, with an index where there is more than one file.

    At most one shard is held in memory. The index, or the final name of a single file, is written last, so an
    interrupted run leaves nothing that loads. Returns the file names; ValueError if the folder already holds weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(path.name for path in folder.glob("model*.safetensors*"))
    if present:
        raise ValueError(f"folder must not hold weights yet, got {folder} with {present[0]}")
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        save_file(pending, folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_shard_bytes:
            flush()
            pending_bytes = 0
        # A copy: views of one storage (a packed parameter's rows) can't be told apart by safetensors.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += size
        total_bytes += size
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE_NAME]
    for i, name in enumerate(names):
        (folder / f"part-{i}.safetensors").rename(folder / name)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return names


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
