"""LongCat-Flash in vLLM. `register` is what vLLM calls (entry point `vllm.general_plugins`)."""

from .plugin import register

__all__ = ["register"]
