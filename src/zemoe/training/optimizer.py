"""AdamW with warm-up and a cosine, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .settings import TrainSettings

_FUSED = ("cpu", "cuda")  # devices for which torch has it


def rate(train: TrainSettings, step: int) -> float:
    """Return the rate of step 0, 1, ..: warm-up, then a cosine down to `final_rate`; as a share of the peak."""
    if step < train.warmup:
        return (step + 1) / train.warmup
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.final_rate + (1 - train.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Optimizer:
    """AdamW over all parameters of a model; norms, biases and routers don't decay."""

    def __init__(self, model: nn.Module, train: TrainSettings) -> None:
        self.named = dict(model.named_parameters())
        decays = {name: p.ndim >= 2 and ".router." not in name for name, p in self.named.items()}
        groups = [
            {"params": [p for name, p in self.named.items() if decays[name] is decay], "weight_decay": weight}
            for decay, weight in ((True, train.weight_decay), (False, 0.0))
        ]
        fused = next(iter(self.named.values())).device.type in _FUSED
        self.adamw = torch.optim.AdamW(groups, lr=train.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)
        self.train = train
        for parameter in self.named.values():  # now and not at the first step, so that a state can be copied into it
            self.adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, number: int) -> Tensor:
        """Use and drop the gradients, clipped, as step `number` 0, 1, ..; return their norm before, on the device."""
        norm = nn.utils.clip_grad_norm_(self.named.values(), self.train.clip)
        for group in self.adamw.param_groups:
            group["lr"] = self.train.learning_rate * rate(self.train, number)
        self.adamw.step()
        self.adamw.zero_grad()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Return all that a step depends on, the parameters included; the tensors themselves."""
        for name, parameter in self.named.items():
            yield f"weight/{name}", parameter.data
            for key, value in self.adamw.state[parameter].items():
                yield f"{key}/{name}", value
