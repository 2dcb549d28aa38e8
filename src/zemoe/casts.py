"""Routers and selection biases stay float32 when a module is cast.

In bfloat16, which has 8 bits, the small steps of a selection bias would be lost, and a rounded router sends tokens to
other experts.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._compat import EditsStateDict


class StaysFloat32(EditsStateDict):
    """A module some of whose tensors no cast changes: not `.to(torch.bfloat16)`, `.half()`, `.double()` or `.type()`.

    Devices change as usual. A tensor that isn't float32 to begin with changes its dtype too, but only to float32.
    Loading a 16-bit state_dict gives float32 tensors, with assign=True too.

    stays_float32: the names of the module's own parameters and buffers that stay; None for all, those of its
    submodules included.
    """

    stays_float32: ClassVar[tuple[str, ...] | None] = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = self.stays_float32
        own = [tensor for name in names or () if (tensor := getattr(self, name, None)) is not None]
        own += [tensor.grad for tensor in own if tensor.is_leaf and tensor.grad is not None]

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            stays = names is None or any(tensor is mine for mine in own)
            if not stays or not tensor.is_floating_point() or new.dtype in (tensor.dtype, torch.float32):
                return new
            return tensor.to(device=new.device, dtype=torch.float32)

        return super()._apply(moved, recurse)

    def edit_state_dict(
        self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str], error_msgs: list[str]
    ) -> dict[str, Any]:
        names = self.stays_float32
        for key, value in state_dict.items():
            mine = key.startswith(prefix) and (names is None or key[len(prefix) :] in names)
            if mine and isinstance(value, Tensor) and value.is_floating_point():
                state_dict[key] = value.float()
        return state_dict
