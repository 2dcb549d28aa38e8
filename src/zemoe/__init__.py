"""zemoe: zero-expert mixture-of-experts layers for PyTorch."""

from .affine import AffineParams
from .config import MoEConfig
from .experts import fused_experts, resolve_backend
from .fused_moe import FusedMoE, ZeroExpertFusedMoE
from .layer import MoE, SharedExperts
from .routing import Router, Routing, observe, select_experts

__version__ = "0.1.0"

__all__ = [
    "AffineParams",
    "FusedMoE",
    "MoE",
    "MoEConfig",
    "Router",
    "Routing",
    "SharedExperts",
    "ZeroExpertFusedMoE",
    "fused_experts",
    "observe",
    "resolve_backend",
    "select_experts",
]
