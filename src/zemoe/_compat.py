"""All private names of torch that zemoe uses, each behind a function or a class that says what it is for.

torch may rename them without notice. They were seen, with these meanings, in torch 2.11, 2.12, 2.13 and 2.14, and none
of them has a public twin there. A new torch is tried against this file first. What is not here: nn.Module's dicts
(`_parameters`, `_buffers`, `_modules`) and its `_apply`, which `retrofit.py` and `casts.py` use of their own modules.

T tokens, I and O input and output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

# --- what surrounds a call ---


def inside_forward_mode() -> bool:
    """Return whether a `torch.autograd.forward_ad.dual_level` is entered, so that tensors may carry tangents.

    `_current_level` counts from 0, and is -1 outside.
    """
    return forward_ad._current_level >= 0


def inside_function_transform() -> bool:
    """Return whether torch.func.grad, vjp, jvp or vmap is active: each has an interpreter on a stack.

    torch.compile can't trace the question.
    """
    return _functorch.peek_interpreter_stack() is not None


def tracked_by_function_transform(tensor: Tensor) -> bool:
    """Return whether torch.func.grad or its like wants this tensor's gradient; `requires_grad` doesn't say so."""
    return _functorch.is_gradtrackingtensor(tensor)


def inside_backward() -> bool:
    """Return whether this thread runs a backward pass, as it does while activation checkpointing recomputes.

    The id of the pass is -1 outside of any.
    """
    return torch._C._current_graph_task_id() != -1


def backward_keeps_graph() -> bool:
    """Return, within a backward pass, whether it has retain_graph, so that it may be run once more."""
    return _autograd._get_current_graph_task_keep_graph()


# --- products and shapes ---


def onednn_linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight.T [T, O] by oneDNN, on a CPU; torch.nn.functional.linear takes MKL for float32.

    Raises RuntimeError for a dtype that oneDNN doesn't multiply on this CPU.
    """
    return torch.ops.mkldnn._linear_pointwise.default(x_TI, weight_OI, None, "none", [], "")


def has_bfloat16_instructions() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16)."""
    return torch.cpu._is_avx512_bf16_supported()


def reshape_without_view(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor of this shape in the same memory; autograd takes it for a new one, to be changed in place."""
    return torch.ops.aten._unsafe_view(tensor, shape)


# --- modules ---


class EditsStateDict(nn.Module):
    """A module that edits what `load_state_dict` gives it before torch copies it into parameters and buffers.

    torch's public hooks are registered an instance at a time; modules that take on this class while they live, as
    patched and retrofitted ones do, need it to come with the class.
    """

    def edit_state_dict(
        self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str], error_msgs: list[str]
    ) -> dict[str, Any]:
        """Return the entries to load in place of those of `state_dict`, which is a copy and may be changed.

        Args:
            state_dict: of the whole model. prefix: what this module's own keys begin with.
            missing_keys, error_msgs: lists to add to; with strict loading an entry of either raises.
        """
        raise NotImplementedError

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        edited = self.edit_state_dict(state_dict, prefix, missing_keys, error_msgs)
        super()._load_from_state_dict(edited, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def remove_load_hooks(module: nn.Module, kind: type) -> None:
    """Take out the hooks of `kind` that `register_load_state_dict_pre_hook` registered, whose handles nobody kept."""
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", None), kind)]:
        del hooks[key]
