"""Zero experts for a trained mixture-of-experts block, the ZEDA way: what is the same in every framework.

`zemoe.retrofit_` puts it into models of transformers (integrations/transformers_retrofit.py). A block keeps its class's
own forward, its parameters and their names; added are one row of router weight a zero expert, and a forward over all
slots. Source: ZEDA (arXiv 2605.18643), SPEC section 5.

T tokens, H hidden size, I expert width, E FFN experts, Z zero experts, A = E + Z slots, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import MoEConfig
from .layer import weighted_experts
from .routing import Routing, Selector, router_logits


def new_router_rows(weight_EH: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """[count, H] rows like those of `weight_EH`: Gaussian, in each column with the mean and deviation of the E rows.

    So a zero expert is chosen about as often as an FFN expert. Same dtype and device; drawn on the CPU in float32, so
    that a seed gives the same rows on every device.

    Args:
        weight_EH: [E, H], a trained router's weight. generator: of the CPU; torch's global one by default.
    """
    rows_EH = weight_EH.detach().float().cpu()
    noise = torch.randn(count, rows_EH.shape[1], generator=generator)
    rows = rows_EH.mean(0) + rows_EH.std(0, correction=0) * noise
    return rows.to(dtype=weight_EH.dtype, device=weight_EH.device)


class ZeroExpertBlock(nn.Module):
    """A trained block with zero experts behind its FFN experts; mixed in before the block's own class.

    The block has `gate.weight` [E, H], `experts.gate_up_proj` [E, 2I, H] (gate rows first), `experts.down_proj`
    [E, H, I] and maybe `shared_experts`. `adopt` adds

    - `zero_weight`: Parameter [Z, H], the router's rows for the zero experts;
    - `e_score_correction_bias`: float32 buffer [E], 0, which only selects, for a bias controller; a block whose gate
      has one uses that;
    - `zero_experts_enabled`: False gives the block's own forward, untouched: the model as it was, up to what has been
      trained since.

    `zemoe.observe` sees its Routing under the block's own name.
    """

    gate: nn.Module
    experts: nn.Module
    zero_weight: nn.Parameter
    e_score_correction_bias: Tensor
    selector: Selector
    rules: MoEConfig
    zero_experts_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} is made from a trained block by zemoe.retrofit_, not built")

    def adopt(self, rules: MoEConfig, zero_weight_ZH: Tensor) -> None:
        """Add what a zero-expert block has; `release` undoes it."""
        self.rules = rules
        self.zero_experts_enabled = True
        self.zero_weight = nn.Parameter(zero_weight_ZH)
        self.selector = Selector()
        if "e_score_correction_bias" not in dict(self.gate.named_buffers()):
            bias_E = torch.zeros(rules.num_experts, dtype=torch.float32, device=zero_weight_ZH.device)
            self.register_buffer("e_score_correction_bias", bias_E)

    def release(self) -> None:
        """Take out what `adopt` added, as far as it is there."""
        for added in (
            "zero_weight",
            "zero_bias",
            "selector",
            "e_score_correction_bias",
            "rules",
            "zero_experts_enabled",
        ):
            for where in (self._parameters, self._buffers, self._modules, vars(self)):
                where.pop(added, None)

    def route(self, x_TH: Tensor) -> Routing:
        """The Routing of x [T, H] over all A slots, in float32 whatever the dtype of the model."""
        rules = self.rules
        weight_EH = self.gate.get_parameter("weight")
        return self.selector(
            router_logits(x_TH, torch.cat([weight_EH, self.zero_weight.to(weight_EH.dtype)])),
            rules.top_k,
            num_experts=rules.num_experts,
            zero_expert_kinds=rules.zero_expert_kinds,
            scoring_func=rules.scoring_func,
            renormalize=rules.renormalize,
            e_score_correction_bias=self.e_score_correction_bias,
            routed_scaling_factor=rules.routed_scaling_factor,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [..., H]; the same shape and dtype out."""
        if not self.zero_experts_enabled:
            return super().forward(hidden_states)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        gate_up, down = (self.experts.get_parameter(name) for name in ("gate_up_proj", "down_proj"))
        y = weighted_experts(x_TH, self.route(x_TH), gate_up, down, self.rules).view(hidden_states.shape)
        shared_experts = self._modules.get("shared_experts")
        return y if shared_experts is None else y + shared_experts(hidden_states)


@contextmanager
def zero_experts_disabled(model: nn.Module) -> Iterator[None]:
    """The retrofitted blocks of `model` compute their original forward for the duration of a `with` block.

    Before any training that is the original model, to the bit: ZEDA's teacher, without a second copy in memory as long
    as only `zero_weight` is trained.

    Raises:
        ValueError: if `model` has no block with zero experts from `zemoe.retrofit_`.
    """
    blocks = [module for module in model.modules() if isinstance(module, ZeroExpertBlock)]
    if not blocks:
        raise ValueError(f"model must have been through zemoe.retrofit_, got {type(model).__name__} without its blocks")
    before = [block.zero_experts_enabled for block in blocks]
    for block in blocks:
        block.zero_experts_enabled = False
    try:
        yield
    finally:
        for block, enabled in zip(blocks, before, strict=True):
            block.zero_experts_enabled = enabled
