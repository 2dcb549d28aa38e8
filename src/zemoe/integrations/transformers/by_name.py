"""`experts_implementation="zemoe"`: transformers' way to say by name who computes a model's experts.

Most families of transformers look up a function under that name, and `experts_forward` is that function. LongCat-Flash
doesn't look, and what is registered for the others would miss its zero experts; so its models get hooks that see the
name and `patch_` or `unpatch_` the model.

T tokens, H hidden size, I expert width, E FFN experts, K choices.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations import moe
from transformers.modeling_utils import PreTrainedModel

from ...experts import fused_experts
from .layers import modeling
from .patch import patch_, unpatch_
from .private import (
    has_default_gate,
    implementation_name,
    note_implementation_name,
    unregister_experts_function,
)

NAME = "zemoe"
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
# transformers' activation modules, some of which write out the same function, and torch's.
_MODULES = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
}
_Longcat: Any = modeling.LongcatFlashPreTrainedModel


def activation_of(act_fn: Any) -> str | None:
    """Our name of a model's activation, a module or one of torch's functions; None for another."""
    if act_fn is F.silu or act_fn is F.gelu:
        return "silu" if act_fn is F.silu else "gelu"
    if type(act_fn) is nn.GELU:
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    return _MODULES.get(type(act_fn).__name__)


def _unsupported(experts: Any) -> str | None:
    """Why fused_experts doesn't compute what this module does, or None."""
    if not experts.has_gate:
        return "they have no gate"
    if experts.has_bias:
        return "they have biases"
    if experts.is_transposed or not getattr(experts, "is_concatenated", True):
        return "their weights are not laid out as [E, 2I, H] and [E, H, I], gate rows first"
    if getattr(experts, "has_post_expert_norm", False):
        return "they normalise after the expert"
    if not has_default_gate(experts):
        return "they have a gate of their own"
    if activation_of(experts.act_fn) is None:
        name = getattr(experts.act_fn, "__name__", type(experts.act_fn).__name__)
        return f"their activation is {name}; ours are {', '.join(ACTIVATIONS)}"
    return None


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What any family's experts compute: hidden_states [T, H], choices and weights [T, K]; the weighted sums [T, H].

    Under expert parallelism a rank has some of the experts, and an id past them is another rank's: worth nothing here.

    Raises:
        ValueError: naming the module and the reason, where ours are other experts than the family's.
    """
    reason = _unsupported(experts)
    if reason is not None:
        raise ValueError(f'experts_implementation="{NAME}" does not compute {type(experts).__name__}: {reason}')
    return fused_experts(
        hidden_states,
        experts.gate_up_proj,
        experts.down_proj,
        top_k_weights,
        top_k_index,
        num_experts=experts.gate_up_proj.shape[0],
        zero_expert_kinds="zero",
        activation=activation_of(experts.act_fn) or "",
    )


def _post_init(model: Any) -> None:
    """Stock's layers are there and empty, on the meta device if a checkpoint follows."""
    PreTrainedModel.post_init(model)
    if implementation_name(model.config) == NAME:
        patch_(model)


def _get_correct_experts_implementation(model: Any, requested_experts: str | None) -> str:
    if requested_experts not in (None, "eager", NAME):
        raise ValueError(
            f'{type(model).__name__}: experts_implementation must be "eager" or "{NAME}", got {requested_experts!r}; '
            "no other knows zero experts"
        )
    return requested_experts or "eager"


def _set_experts_implementation(model: Any, experts_implementation: str | dict[str, str] | None) -> None:
    asked = experts_implementation
    if isinstance(asked, dict):  # by name of a part of the config; "" is the whole
        asked = asked.get("", implementation_name(model.config))
    name = model.get_correct_experts_implementation(asked)
    if name == NAME:
        patch_(model)
    else:
        unpatch_(model)
    note_implementation_name(model.config, name)


_HOOKS = {
    "post_init": _post_init,
    "get_correct_experts_implementation": _get_correct_experts_implementation,
    "set_experts_implementation": _set_experts_implementation,
}


def is_registered() -> bool:
    """Whether transformers knows the name."""
    return NAME in moe.ALL_EXPERTS_FUNCTIONS


def install() -> None:
    """Register the name and set the hooks; RuntimeError, and nothing done, where something else has taken a place."""
    taken = sorted(_HOOKS.keys() & vars(_Longcat).keys())
    if taken:
        raise RuntimeError(f"{_Longcat.__name__} has methods of its own where our hooks would go: {taken}")
    for name, hook in _HOOKS.items():
        setattr(_Longcat, name, hook)
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def remove() -> None:
    """Undo `install`."""
    for name, hook in _HOOKS.items():
        if vars(_Longcat).get(name) is hook:
            delattr(_Longcat, name)
    if is_registered():
        unregister_experts_function(NAME)
