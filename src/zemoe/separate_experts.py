"""State dicts in which each expert has tensors of its own: what transformers writes, and its Trainer reads back as is.

E FFN experts, H hidden size, I expert width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ._compat import EditsStateDict

_PART = re.compile(r"(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")
_KIND = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_PACKED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class LoadsSeparateExperts(EditsStateDict):
    """Experts with `gate_up_proj` [E, 2I, H] (gate rows first) and `down_proj` [E, H, I], which load either layout.

    `load_state_dict` also takes `{e}.gate_proj.weight`, `{e}.up_proj.weight` (both [I, H]) and `{e}.down_proj.weight`
    [H, I] in their place, or Mixtral's `w1`, `w3` and `w2`: all, or some of them (one shard of a checkpoint), and then
    the other rows stay as they are.
    """

    gate_up_proj: Tensor
    down_proj: Tensor

    @property
    def experts_on_disk(self) -> int:
        """Return how many experts a checkpoint may hold; those from E on are dead rows, which are dropped."""
        return len(self.down_proj)

    def edit_state_dict(
        self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str], error_msgs: list[str]
    ) -> dict[str, Any]:
        rest, parts = {}, {}
        for key, value in state_dict.items():
            found = _PART.fullmatch(key, len(prefix)) if key.startswith(prefix) else None
            if found and int(found[1]) < self.experts_on_disk:
                parts[int(found[1]), _KIND[found[2]]] = value
            else:
                rest[key] = value
        for name, kinds in _PACKED.items():
            now, key = getattr(self, name), prefix + name
            mine = {(e, kind): parts[e, kind] for e, kind in parts if kind in kinds and e < len(now)}
            try:
                if key in rest:
                    rest[key] = _without_dead_rows(rest[key], now, self.experts_on_disk)
                elif mine:
                    rest[key] = _with_rows(now, kinds, mine)
                    needed = {(e, kind) for e in range(len(now)) for kind in kinds}
                    missing_keys += [f"{prefix}{e}.{kind}_proj.weight" for e, kind in sorted(needed - mine.keys())]
            except ValueError as error:
                error_msgs.append(f"{key}: {error}")
                rest[key] = now
        return rest


def _without_dead_rows(packed: Tensor, now: Tensor, experts_on_disk: int) -> Tensor:
    dead = packed.ndim == 3 and len(now) < len(packed) == experts_on_disk
    return packed[: len(now)].clone() if dead else packed


def _with_rows(now: Tensor, kinds: tuple[str, ...], parts: dict[tuple[int, str], Tensor]) -> Tensor:
    """`now` [E, rows of every kind, columns] with the rows of each (expert, kind) of `parts` in place of its own."""
    from torch.distributed.tensor import DTensor  # takes as long to import as all of zemoe and more

    if isinstance(now, DTensor):
        raise ValueError("sharded experts load from packed tensors alone")
    if now.is_meta and len(parts) < len(now) * len(kinds):
        raise ValueError(f"{len(parts)} of {len(now) * len(kinds)} tensors are given, and nothing is in memory")
    shape = (now.shape[1] // len(kinds), now.shape[2])
    whole = torch.empty(now.shape, dtype=next(iter(parts.values())).dtype) if now.is_meta else now.detach().clone()
    for (e, kind), tensor in parts.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{e}.{kind}_proj.weight must have shape {shape}, got {tuple(tensor.shape)}")
        whole[e].view(len(kinds), *shape)[kinds.index(kind)].copy_(tensor)
    return whole
