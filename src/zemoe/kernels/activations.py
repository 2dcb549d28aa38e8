"""The activations an FFN expert may use, each with its derivative written out for the backward passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """forward(gate) -> act(gate); derivative(gate) -> d act / d gate. Elementwise, any float dtype."""

    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _silu_derivative(gate: Tensor) -> Tensor:
    s = torch.sigmoid(gate)
    return s * (1 + gate * (1 - s))


def _gelu_derivative(gate: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
    return cdf + gate * torch.exp(-0.5 * gate * gate) * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def _gelu_tanh_derivative(gate: Tensor) -> Tensor:
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * (gate + 0.044715 * gate**3))
    return 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * scale * (1 + 3 * 0.044715 * gate * gate)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _silu_derivative),
    "gelu": Activation(F.gelu, _gelu_derivative),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_derivative),
}
