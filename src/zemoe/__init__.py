"""zemoe: zero-expert mixture-of-experts layers for PyTorch."""

from .affine import AffineParams
from .config import MoEConfig
from .experts import fused_experts, resolve_backend
from .routing import Routing, observe, select_experts

__all__ = ["AffineParams", "MoEConfig", "Routing", "fused_experts", "observe", "resolve_backend", "select_experts"]
