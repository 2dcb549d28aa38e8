"""Compiles the CPU backend's loops before somebody measures how fast they are."""

from __future__ import annotations

from itertools import product

import torch

from .config import MoEConfig
from .kernels.topk import HAS_NUMBA
from .layer import MoE

# Numbers of tokens that make a layer of 16 slots use all of its loops: the one that does everything for few tokens, one
# for each step for more, and those that share their work among threads.
_TOKENS = (1, 40, 600, 4096)


def compile_loops(device: torch.device, dtype: torch.dtype, *, gradients: bool = False) -> None:
    """Compile every loop that a layer with identity experts uses, or read it from disk where it was compiled before.

    When something is compiled, the logger "zemoe" says so at level INFO. Without numba, and for devices other than
    CPUs, nothing happens.

    Args:
        dtype: of the hidden states and the experts. gradients: whether to compile the loops of training as well.
    """
    if device.type != "cpu" or not HAS_NUMBA:
        return
    config = MoEConfig(hidden_size=8, intermediate_size=8, num_experts=8, top_k=4, zero_expert_kinds=(("identity", 8),))
    with torch.random.fork_rng([]):
        layer = MoE(config, dtype=dtype, backend="cpu").requires_grad_(gradients)
        for tokens, training in product(_TOKENS, {False, gradients}):
            with torch.set_grad_enabled(training):
                layer(torch.zeros(tokens, config.hidden_size, dtype=dtype))
