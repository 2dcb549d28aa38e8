"""Checkpoints on disk: their layouts, and the checks that a folder passes before anything of it is loaded."""

from .files import CheckpointError
from .fp8 import save_dequantized
from .longcat import read_config, save_original_layout, verify

__all__ = ["CheckpointError", "read_config", "save_dequantized", "save_original_layout", "verify"]
