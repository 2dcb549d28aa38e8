"""Checkpoints on disk: their layouts, and that a folder holds what it says, checked before anything is loaded."""

from .files import CheckpointError
from .fp8 import save_dequantized
from .longcat import read_config, save_original_layout, verify

__all__ = ["CheckpointError", "read_config", "save_dequantized", "save_original_layout", "verify"]
