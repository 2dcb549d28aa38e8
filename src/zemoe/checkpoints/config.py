"""What a LongCat-Flash config.json may say: every entry that the model is built from, checked one by one.

E FFN experts, Z zero experts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .files import CheckpointError

_SIZES = (
    "vocab_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_topk", "n_routed_experts", "expert_ffn_hidden_size",
)  # fmt: skip
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# Other names that transformers has for an entry; where both are there it would take either.
_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts_per_tok": "moe_topk",
    "intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "expert_ffn_hidden_size",
}
_NGRAM = ("oe_", "ngram_", "emb_neighbor_num", "emb_split_num")


_MOST = 2**53  # what float64 and torch's integers hold without loss


def _is_count(value: object, minimum: int = 1) -> bool:
    return type(value) is int and minimum <= value < _MOST


def _is_number(value: object) -> bool:
    return (type(value) is int and abs(value) < _MOST) or (type(value) is float and abs(value) < 2.0**127)  # as float32


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_id(value: object) -> bool:
    return value is None or _is_count(value, 0)


def _is(value: object, *known: object) -> bool:
    """Return whether `value` is one of `known`, of the same type: 1 is neither True nor 1.0."""
    return any(type(value) is type(one) and value == one for one in known)


def _one_of(*known: object) -> Callable[[object], bool]:
    return lambda value: _is(value, *known)


Check = tuple[Callable[[Any], bool], str]
_BOOL: Check = (_is_bool, "true or false, or absent")
_POSITIVE: Check = (lambda value: _is_number(value) and value > 0, "a finite number above 0")
_AT_LEAST_1: Check = (lambda value: _is_number(value) and value >= 1, "a finite number >= 1")
_DTYPE: Check = (
    lambda value: isinstance(value, torch.dtype) or _is(value, None, "float32", "bfloat16", "float16", "float64"),
    "the name of a float dtype (float32, bfloat16, float16, float64), or absent",
)
# Entries that may be absent, with what they must be.
_OPTIONAL: dict[str, Check] = {
    "max_position_embeddings": (_is_count, "an integer from 1 to 2**53, or absent"),
    "initializer_range": (lambda value: _is_number(value) and value >= 0, "a finite number >= 0, or absent"),
    "rms_norm_eps": _POSITIVE,
    "attention_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "between 0 and 1, or absent"),
    "hidden_act": (
        _one_of("silu", "swish", "gelu", "gelu_pytorch_tanh"),
        "'silu', 'swish', 'gelu' or 'gelu_pytorch_tanh', or absent",
    ),
    "use_cache": _BOOL,
    "tie_word_embeddings": _BOOL,
    "attention_bias": _BOOL,
    "output_router_logits": _BOOL,
    "pad_token_id": (_is_id, "an integer from 0 to 2**53, null or absent"),
    "bos_token_id": (_is_id, "an integer from 0 to 2**53, null or absent"),
    "eos_token_id": (
        lambda value: _is_id(value) or (isinstance(value, list) and all(_is_count(item, 0) for item in value)),
        "an integer >= 0, a list of such, null or absent",
    ),
    "rope_theta": _AT_LEAST_1,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    # Options that the published models don't use, and that transformers' LongCat-Flash reads past without a word.
    "zero_expert_type": (
        _one_of("identity", "copy"),
        "'identity' (all that LongCat-Flash in transformers computes)",
    ),
    "router_bias": (_one_of(False, None), "false or absent (LongCat-Flash in transformers ignores it)"),
    "norm_topk_prob": (_one_of(False, None), "false or absent (LongCat-Flash in transformers ignores it)"),
    "mla_scale_q_lora": (_one_of(True), "true or absent (LongCat-Flash in transformers always scales)"),
    "mla_scale_kv_lora": (_one_of(True), "true or absent (LongCat-Flash in transformers always scales)"),
    "attention_method": (
        _one_of("MLA", None),
        "'MLA' or absent (LongCat-2.0's sparse attention is not computed here)",
    ),
}
_ROPE: dict[str, Check] = {
    "rope_theta": _AT_LEAST_1,
    "factor": _AT_LEAST_1,
    "original_max_position_embeddings": (_is_count, "an integer from 1 to 2**53"),
    "attention_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "mscale": _POSITIVE,
    "mscale_all_dim": (lambda value: _is_number(value) and value >= 0, "a finite number >= 0"),
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "truncate": (_is_bool, "true or false"),
    "partial_rotary_factor": (lambda value: _is_number(value) and value == 1, "1 (a part of a head is not rotated)"),
}
# The entries of config.json that a model in transformers is built with. All others concern the file, or transformers
# but not this architecture: labels, private names, how a caller wants outputs.
READ = (
    *_SIZES, "zero_expert_num", "routed_scaling_factor", "head_dim", "num_key_value_heads", "qk_head_dim",
    "rope_parameters", "rope_scaling", *_OPTIONAL, "router_dtype",
)  # fmt: skip


def check_config(config: Mapping[str, Any], source: str = "config.json") -> None:
    """Raise CheckpointError unless `config` describes a LongCat-Flash model that transformers' code computes right."""

    def refuse(key: str, needs: str) -> None:
        raise CheckpointError(f"{source}: {key} must be {needs}, got {config.get(key)!r}")

    if config.get("model_type") != "longcat_flash":
        refuse("model_type", "'longcat_flash' (the supported architecture)")
    for key in _SIZES:
        if not _is_count(config.get(key)):
            refuse(key, "an integer from 1 to 2**53")
    if not _is_count(config.get("zero_expert_num"), 0):
        refuse("zero_expert_num", "an integer from 0 to 2**53")
    for key, value in config.items():
        if key.startswith(_NGRAM) and value:
            refuse(key, "absent: n-gram embeddings (LongCat-2.0, LongCat-Flash-Lite) are no part of LongCat-Flash")
    slots = config["n_routed_experts"] + config["zero_expert_num"]
    if config["moe_topk"] > slots:
        refuse("moe_topk", f"at most n_routed_experts + zero_expert_num = {slots}")
    if not _is_number(config.get("routed_scaling_factor")):
        refuse("routed_scaling_factor", "a finite number")
    if config["qk_rope_head_dim"] % 2:
        refuse("qk_rope_head_dim", "even")
    # Rotary positions are made for head_dim, which defaults to 64, and used for qk_rope_head_dim.
    if not _is(config.get("head_dim", 64), config["qk_rope_head_dim"]):
        refuse("head_dim", f"qk_rope_head_dim = {config['qk_rope_head_dim']} (64 if absent)")
    if not _is(config.get("num_key_value_heads"), None, config["num_attention_heads"]):
        refuse("num_key_value_heads", f"num_attention_heads = {config['num_attention_heads']}, or absent")
    head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if not _is(config.get("qk_head_dim"), None, head_dim):
        refuse("qk_head_dim", f"qk_nope_head_dim + qk_rope_head_dim = {head_dim}, or absent")
    for key, (fits, needs) in _OPTIONAL.items():
        if key in config and not fits(config[key]):
            refuse(key, needs)
    for key in ("pad_token_id", "bos_token_id"):
        if (config.get(key) or 0) >= config["vocab_size"]:
            refuse(key, f"below vocab_size = {config['vocab_size']}")
    for alias, key in _ALIASES.items():
        if not _is(config.get(alias, config[key]), config[key]):
            refuse(alias, f"{key} = {config[key]}, of which it is another name, or absent")
    layers = config["num_layers"]
    # Twice: the attention layers, two in each. 56: what transformers 5.17 says of every model.
    if not _is(config.get("num_hidden_layers"), None, layers, 2 * layers, 56):
        refuse("num_hidden_layers", f"num_layers = {layers} or twice that, or absent")
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None:
            _check_rope(config[key], f"{source}: {key}", config["qk_rope_head_dim"])
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{source}: quantization_config is set; quantized checkpoints are not supported")


def _check_rope(rope: Any, source: str, rope_dim: int) -> None:
    """CheckpointError unless transformers computes what the config says of rotary positions, for all layers at once."""
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{source} must be an object, null or absent, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        raise CheckpointError(f"{source}: rope_type must be one of {', '.join(_ROPE_NEEDS)}, got {kind!r}")
    for key in _ROPE_NEEDS[kind]:
        if rope.get(key) is None:
            raise CheckpointError(f"{source}.{key} is missing, which rope_type {kind!r} needs")
    for key, (fits, needs) in _ROPE.items():
        if (rope.get(key) is not None or key == "rope_theta" in rope) and not fits(rope[key]):
            raise CheckpointError(f"{source}.{key} must be {needs}, got {rope[key]!r}")
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key)
        if factors is None:
            continue
        if not isinstance(factors, list) or len(factors) != rope_dim // 2 or not all(map(_AT_LEAST_1[0], factors)):
            raise CheckpointError(f"{source}.{key} must be a list of {rope_dim // 2} numbers >= 1, got {factors!r}")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if rope.get(low) is not None and rope.get(high) is not None and not rope[low] < rope[high]:
            raise CheckpointError(f"{source}.{low} must be below {high}, got {rope[low]!r} and {rope[high]!r}")
    for key, value in rope.items():
        if isinstance(value, Mapping):
            raise CheckpointError(f"{source}.{key} must not be an object: all layers have the same rotary positions")
