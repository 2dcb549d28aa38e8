"""zemoe: zero-expert mixture-of-experts layers for PyTorch."""

from typing import Any

from ._version import __version__
from .affine import AffineParams
from .balance import (
    adamoe_balance_loss,
    longcat_balance_loss,
    moe_plus_plus_balance_loss,
    router_z_loss,
    slot_counts,
    switch_balance_loss,
    update_deepseek_bias_,
    update_longcat_bias_,
    zeda_balance_loss,
)
from .config import MoEConfig
from .controller import BudgetController
from .experts import fused_experts, resolve_backend
from .fused_moe import FusedMoE, ZeroExpertFusedMoE
from .layer import MoE, SharedExperts
from .retrofit import zero_experts_disabled
from .routing import Router, Routing, observe, select_experts
from .statistics import BiasTrajectory, RoutingStatistics, RoutingTally, gradient_ratios, router_cosines

__all__ = [
    "AffineParams",
    "BiasTrajectory",
    "BudgetController",
    "FusedMoE",
    "MoE",
    "MoEConfig",
    "Router",
    "Routing",
    "RoutingStatistics",
    "RoutingTally",
    "SharedExperts",
    "ZeroExpertFusedMoE",
    "__version__",
    "adamoe_balance_loss",
    "fused_experts",
    "gradient_ratios",
    "longcat_balance_loss",
    "moe_plus_plus_balance_loss",
    "observe",
    "resolve_backend",
    "router_cosines",
    "router_z_loss",
    "select_experts",
    "slot_counts",
    "switch_balance_loss",
    "update_deepseek_bias_",
    "update_longcat_bias_",
    "zeda_balance_loss",
    "zero_experts_disabled",
]

# Public names that need transformers, imported when they are asked for; not in __all__, which `import *` would fetch.
_NEED_TRANSFORMERS = ("retrofit_", "unretrofit_")


def __getattr__(name: str) -> Any:
    if name not in _NEED_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .integrations.transformers import retrofit

    return getattr(retrofit, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEED_TRANSFORMERS})
