"""The FFN experts' weights as an engine loads them: one rank's share, under the engine's names.

E FFN experts, H hidden size, I expert width, R tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ExpertShare(nn.Module):
    """One rank's share of the experts: `w13_weight` [E, 2I/R, H], gate rows first, and `w2_weight` [E, H, I/R].

    An engine loads a checkpoint's matrices with the `weight_loader` that each parameter carries.

    Args:
        num_experts: E. hidden_size: H. intermediate_size: I, a multiple of R.
        rank: which share this is, from 0. ranks: R.
        fill_up: whether a checkpoint may have a smaller I; the rest is zeros then, which changes no output.
        dtype, device: of both parameters; by default torch's.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        rank: int,
        ranks: int,
        fill_up: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.intermediate_size, self.rank, self.fill_up = intermediate_size, rank, fill_up
        width = intermediate_size // ranks
        w13 = torch.empty(num_experts, 2 * width, hidden_size, dtype=dtype, device=device)
        w2 = torch.empty(num_experts, hidden_size, width, dtype=dtype, device=device)
        self.w13_weight: Any = nn.Parameter(w13, requires_grad=False)
        self.w2_weight: Any = nn.Parameter(w2, requires_grad=False)
        self.w13_weight.weight_loader = self.w2_weight.weight_loader = self.weight_loader

    def weight_loader(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copy this rank's part of one expert's matrix: [I, H] for "w1" (gate) and "w3" (up), [H, I] for "w2" (down).

        Raises:
            ValueError: for another shard_id or a matrix that does not fit, naming it.
        """
        if shard_id not in ("w1", "w2", "w3"):
            raise ValueError(f"shard_id must be 'w1', 'w2' or 'w3', got {shard_id!r} for {weight_name}")
        part, split = param.data[expert_id], 1  # the dimension of I
        if shard_id != "w2":
            part, split = part.chunk(2)[0 if shard_id == "w1" else 1], 0
        shape, needed = list(loaded_weight.shape), list(part.shape)
        needed[split] = self.intermediate_size
        least = needed.copy()
        if self.fill_up and len(shape) == 2:
            least[split] = min(shape[split], needed[split])
        if shape not in (needed, least):
            raise ValueError(f"{weight_name} must have shape {tuple(needed)}, got {tuple(shape)}")
        width = part.shape[split]
        start = min(self.rank * width, shape[split])
        length = min(width, shape[split] - start)
        if length < width:  # of a smaller I the last ranks have less than the others, or nothing
            part.zero_()
        part.narrow(split, 0, length).copy_(loaded_weight.narrow(split, start, length))
        return True if return_success else None
