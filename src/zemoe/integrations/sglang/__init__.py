"""LongCat-Flash in SGLang. `register` is what SGLang calls (entry point `sglang.srt.plugins`)."""

from .plugin import register

__all__ = ["register"]
