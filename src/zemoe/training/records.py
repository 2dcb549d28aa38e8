"""What a record of a training run says about routing, and whether one that was read back is whole.

E FFN experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..regular_files import parse_json
from ..statistics import RoutingTally


def routing_record(tally: RoutingTally, biases: Mapping[str, Tensor], num_experts: int) -> dict[str, Any]:
    """FFN experts a token, zero share and load, over all layers and `by_layer`, with its biases; read to the host.

    biases: by layer, the selection bias [A]. num_experts: E.
    """
    seen = tally.statistics(biases=biases).to_dict()
    zero_means = dict.fromkeys(biases)
    if any(len(bias) > num_experts for bias in biases.values()):
        means = torch.stack([bias[num_experts:].mean() for bias in biases.values()]).tolist()
        zero_means = dict(zip(biases, means, strict=True))
    by_layer = [
        {
            "ffn_experts": layer["ffn_mean"],
            "ffn_experts_std": layer["ffn_std"],
            "zero_share": layer["zero_share"],
            "max_over_mean_load": layer["max_load"],
            "dead_experts": len(layer["dead_experts"]),
            "bias_ffn_mean": layer["bias_mean"],
            "bias_zero_mean": zero_means[name],
            "bias_min": layer["bias_min"],
            "bias_max": layer["bias_max"],
        }
        for name, layer in seen["layers"].items()
    ]
    return {
        "ffn_experts": seen["ffn_mean"],
        "ffn_experts_std": seen["ffn_std"],
        "zero_share": seen["zero_share"],
        "max_over_mean_load": seen["max_load"],
        "dead_experts": seen["dead_experts"],
        "by_layer": by_layer,
    }


# What is shown and drawn of each kind: counts, texts, numbers (which may be null, for what was not measured).
_COUNTS = {
    "run": (
        "step", "steps", "parameters", "active_parameters", "choices", "ffn_slots", "zero_slots", "layers", "world",
        "tokens_per_step", "train_tokens", "heldout_tokens",
    ),
    "train": ("step", "tokens"),
    "eval": ("step",),
}  # fmt: skip
_TEXTS = {"run": ("device", "dtype"), "train": (), "eval": ()}
_NUMBERS = {
    "run": ("k_e",),
    "train": (
        "loss", "bits_per_byte", "learning_rate", "tokens_per_s", "ffn_experts", "ffn_experts_std", "zero_share",
    ),
    "eval": ("heldout_loss", "heldout_bits_per_byte"),
}  # fmt: skip
_BY_LAYER = ("zero_share", "bias_ffn_mean", "bias_zero_mean", "bias_min", "bias_max")
_MOST = 1e18  # beyond it nothing is a count, and pictures and figures overflow


def _is_number(value: object) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < _MOST)  # pyright: ignore[reportArgumentType]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _are_layers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(layer, dict) and all(key in layer and _is_number(layer[key]) for key in _BY_LAYER) for layer in value
    )


def whole_record(line: bytes) -> dict[str, Any] | None:
    """Return the record that a line of metrics.jsonl holds; None if it holds none, or lacks what is shown of it."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or not _is_count(record.get("step")):
        return None
    kind = record["kind"]
    if kind not in _COUNTS:
        return record
    fits = all(_is_count(record.get(key)) for key in _COUNTS[kind])
    fits = fits and all(isinstance(record.get(key), str) for key in _TEXTS[kind])
    fits = fits and all(key in record and _is_number(record[key]) for key in _NUMBERS[kind])
    if kind == "run":
        fits = fits and record["choices"] > 0
    if kind == "train":
        fits = fits and record["tokens_per_s"] is not None and _are_layers(record.get("by_layer"))
    if kind == "eval":
        fits = fits and isinstance(record.get("best"), bool)
    return record if fits else None
