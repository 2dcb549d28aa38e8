"""zemoe: zero-expert mixture-of-experts layers for PyTorch.

The layer is here. What trains one is in `zemoe.balance` (balance losses, bias updates), `zemoe.controller` (a budget of
FFN experts), `zemoe.statistics` (what the routing does) and `zemoe.retrofit` (zero experts for a trained model);
`zemoe.integrations` knows transformers, vLLM and SGLang.
"""

from . import balance, controller, retrofit, statistics
from ._version import __version__
from .affine import AffineParams
from .backends import resolve_backend
from .config import MoEConfig
from .experts import fused_experts
from .fused_moe import FusedMoE, ZeroExpertFusedMoE
from .layer import MoE, SharedExperts
from .routing import Router, Routing, observe, select_experts

__all__ = [
    "AffineParams",
    "FusedMoE",
    "MoE",
    "MoEConfig",
    "Router",
    "Routing",
    "SharedExperts",
    "ZeroExpertFusedMoE",
    "__version__",
    "balance",
    "controller",
    "fused_experts",
    "observe",
    "resolve_backend",
    "retrofit",
    "select_experts",
    "statistics",
]
