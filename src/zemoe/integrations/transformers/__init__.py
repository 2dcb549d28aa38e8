"""LongCat-Flash in Hugging Face transformers (5.17 and later), with its MoE layers computed by zemoe.

`apply()` makes every LongCat-Flash model built or loaded from then on use our layers; `patch_(model)` changes a loaded
one; `register()` makes `experts_implementation="zemoe"` known, for LongCat-Flash and for families without zero experts.
All can be undone, and importing this module changes nothing.

What becomes better: the layer costs work for its FFN experts only, compiles without graph breaks, routes in float32
whatever the dtype of the model, has no weights for its zero experts, and loads checkpoints in the layout in which the
models are published, which plain transformers can't.
"""

from .apply import EP_PLAN, applied, apply, is_applied, is_registered, register, unapply, unregister
from .layers import ZeroExpertLongcatExperts, ZeroExpertLongcatMoE, ZeroExpertLongcatRouter
from .loading import export, load_config, load_model
from .patch import PatchReport, patch_, unpatch_

__all__ = [
    "EP_PLAN",
    "PatchReport",
    "ZeroExpertLongcatExperts",
    "ZeroExpertLongcatMoE",
    "ZeroExpertLongcatRouter",
    "applied",
    "apply",
    "export",
    "is_applied",
    "is_registered",
    "load_config",
    "load_model",
    "patch_",
    "register",
    "unapply",
    "unpatch_",
    "unregister",
]
