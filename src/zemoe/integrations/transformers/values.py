"""Entries of a config.json that anyone may have written, before transformers makes a config of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

# What transformers raises for a value of the wrong type, in its own check or its arithmetic.
WRONG_VALUE = (StrictDataclassError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)
_LEFT_OUT = ("num_labels", "id2label", "label2id", "attn_implementation", "experts_implementation", "per_layer_config")


def of_the_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a config without entries that are no part of the architecture but would take memory or choose code."""
    return {name: value for name, value in config.items() if name not in _LEFT_OUT and name[:1] != "_"}
