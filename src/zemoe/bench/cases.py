"""The layers that `zemoe bench` measures: cases by name, and how their routing is steered.

T tokens, H hidden size, E FFN experts, Z zero experts, A = E + Z slots, K choices a token.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import MoEConfig
from ..layer import MoE

CASES_FILE = Path(__file__).parent / "cases.toml"
# A score is between 0 and 1, so a bias of this size alone decides.
_ALWAYS = 2.0
_STEER_TOKENS = 2048
_NEAR = 0.01  # how far from what was asked the steered share may be, on the tokens that steered it


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer by its sizes. tokens: the default T. devices: device types where it is measured when none is named."""

    name: str
    about: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_zero_experts: int
    top_k: int
    routed_scaling_factor: float
    tokens: tuple[int, ...]
    devices: tuple[str, ...]

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_experts=self.num_experts,
            top_k=self.top_k,
            zero_expert_kinds=(("identity", self.num_zero_experts),),
            routed_scaling_factor=self.routed_scaling_factor,
        )

    def weight_bytes(self, itemsize: int) -> int:
        """Return the bytes of the FFN experts' weights, and of the router's in float32."""
        experts = 3 * self.num_experts * self.intermediate_size * self.hidden_size
        return itemsize * experts + 4 * self.config.num_slots * self.hidden_size

    def work_bytes(self, tokens: int, itemsize: int) -> int:
        """Return what a layer that gathers all rows holds beside its weights, the most that any side needs."""
        row = 2 * self.hidden_size + 3 * self.intermediate_size
        return itemsize * tokens * (self.top_k * row + 2 * self.hidden_size) + 8 * tokens * self.config.num_slots


def load_cases(path: Path = CASES_FILE) -> dict[str, Case]:
    """Return the cases of a TOML file by name, in its order."""
    with path.open("rb") as file:
        tables = tomllib.load(file)
    return {
        name: Case(name=name, **(fields | {key: tuple(fields[key]) for key in ("tokens", "devices")}))
        for name, fields in tables.items()
    }


def build(case: Case, dtype: torch.dtype, device: torch.device) -> MoE:
    """Build the layer with random weights from torch's global generator; its logits' standard deviation is about 1."""
    with device:
        layer = MoE(case.config, dtype=dtype, init_std=case.hidden_size**-0.5)
    return layer.eval().requires_grad_(False)


class Shares(NamedTuple):
    """zero: the zero experts' share of all choices. top: the most popular FFN expert's share of the FFN choices."""

    zero: float
    top: float


def shares(ids_TK: Tensor, num_experts: int) -> Shares:
    """Return the shares of chosen ids."""
    real = ids_TK[ids_TK < num_experts]
    top = torch.bincount(real).amax().item() / real.numel() if real.numel() else 0.0
    return Shares(1 - real.numel() / ids_TK.numel(), top)


def _least(reached: Callable[[float], bool]) -> float:
    """Return the least bias for which `reached` holds, by halving; `reached` is monotone."""
    low, high = -_ALWAYS, _ALWAYS
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def steer(layer: MoE, zero_share: float | None, skew: float | None) -> None:
    """Set the router's selection bias so that random hidden states choose as asked; None leaves that to chance.

    A bias selects and changes no weight, so nothing else about the layer is touched. One number is added to all zero
    experts, another to FFN expert 0, both found by halving on random tokens.

    Args:
        zero_share: share of all choices that falls on zero experts.
        skew: share of the choices of FFN experts that falls on one of them.

    Raises:
        ValueError: for a share that this layer can't reach, with the reason.
    """
    config, bias = layer.config, layer.router.e_score_correction_bias
    E, K = config.num_experts, config.top_k
    bias.zero_()
    x_TH = torch.randn(_STEER_TOKENS, config.hidden_size, device=bias.device).to(layer.w13.dtype)
    scores_TA = layer.router.project(x_TH)[0].softmax(-1)

    def chosen() -> Tensor:
        return (scores_TA + bias).topk(K, dim=-1, sorted=False).indices

    def enough_zero(value: float) -> bool:
        bias[E:] = value
        return shares(chosen(), E).zero >= (zero_share or 0.0)

    def enough_skew(value: float) -> bool:
        bias[0] = value
        ids_TK = chosen()
        # With a share of zero choices that will be so, not with the one that this value makes: that converges faster.
        real = (ids_TK < E).sum().item() if zero_share is None else (1 - zero_share) * ids_TK.numel()
        return (ids_TK == 0).sum().item() >= (skew or 0.0) * real

    for _ in range(1 if skew is None or zero_share is None else 8):  # each of the two moves the other
        if zero_share is not None:
            # All of them: what these tokens do by a hair others may not.
            bias[E:] = _ALWAYS if zero_share == 1 else _least(enough_zero)
        if skew is not None:
            bias[0] = _least(enough_skew)
        if zero_share is not None and abs(shares(chosen(), E).zero - zero_share) < _NEAR / 8:
            break
    found = shares(chosen(), E)
    if zero_share is not None and abs(found.zero - zero_share) > _NEAR:
        raise ValueError(
            f"zero-share {zero_share:g} is out of reach: {K} choices among {E} FFN and {config.num_zero_experts} zero "
            f"experts get to {found.zero:.2f}"
        )
    if skew is not None and abs(found.top - skew) > _NEAR:
        real = K * (1 - found.zero)
        raise ValueError(
            f"skew {skew:g} is out of reach: a token makes {real:.1f} choices of FFN experts, each at most once, so "
            f"one expert gets from {1 / E:.2g} to {1 / max(real, 1.0):.2g} of them; a larger --zero-share allows more"
        )
