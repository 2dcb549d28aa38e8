"""Zero experts for a trained mixture-of-experts block, the ZEDA way: what is the same in every framework.

`retrofit_` puts it into models of transformers (integrations/transformers/retrofit.py). A block keeps its class's
own forward, its parameters and their names; added are one row of router weight a zero expert, and a forward over all
slots. Source: ZEDA (arXiv 2605.18643); docs/specification.md, "Retrofit".

T tokens, H hidden size, I expert width, E FFN experts, Z zero experts, A = E + Z slots, K choices.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .backends import Backend, backend_of
from .casts import StaysFloat32
from .config import MoEConfig
from .experts import unflatten, weighted_experts
from .routing import Routing, Selector, router_logits
from .separate_experts import LoadsSeparateExperts


def new_router_rows(weight_EH: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """[count, H] rows like those of `weight_EH`: Gaussian, in each column with the mean and deviation of the E rows.

    So a zero expert is chosen about as often as an FFN expert. Same dtype and device; drawn on the CPU in float32, so
    that a seed gives the same rows on every device.

    Args:
        weight_EH: [E, H], a trained router's weight. generator: of the CPU; torch's global one by default.
    """
    rows_EH = weight_EH.detach().float().cpu()
    noise = torch.randn(count, rows_EH.shape[1], generator=generator, dtype=torch.float32)
    rows = rows_EH.mean(0) + rows_EH.std(0, correction=0) * noise
    return rows.to(dtype=weight_EH.dtype, device=weight_EH.device)


class ZeroExpertGate(StaysFloat32):
    """A trained router that also takes the zero experts' rows; mixed in before the router's own class.

    The block calls it and doesn't read its weight: what wraps a module (offloading, LoRA) takes part in calls alone.
    """

    weight: Tensor
    stays_float32 = ("e_score_correction_bias",)  # the weight is cast, as the router's own class needs it

    def forward(
        self, hidden_states: Tensor, zero_weight_ZH: Tensor | None = None, backend: Backend | None = None
    ) -> Any:
        """Logits of x [T, H] over all A slots in float32, and the selection bias [E] if there is one.

        Without the zero experts' rows what the router's own class gives.
        """
        if zero_weight_ZH is None:
            return super().forward(hidden_states)
        weight_EH = self.weight
        weight_AH = torch.cat([weight_EH, zero_weight_ZH.to(weight_EH.dtype)])
        logits_TA = router_logits(hidden_states, weight_AH, backend)
        return logits_TA, self._buffers.get("e_score_correction_bias")


class ZeroExpertExperts(LoadsSeparateExperts):
    """A trained block's experts, for all slots where the block gives its rules; mixed in likewise."""

    def forward(
        self,
        x_TH: Tensor,
        *choices: Tensor,
        routing: Routing | None = None,
        rules: Any = None,
        backend: Backend | None = None,
    ) -> Tensor:
        """[T, H], the weighted sums by `routing` over all A slots and the block's `rules`, a MoEConfig.

        Without them what the experts' own class gives for its `choices`.
        """
        if routing is None:
            return super().forward(x_TH, *choices)
        return weighted_experts(x_TH, routing, self.gate_up_proj, self.down_proj, rules, backend=backend)


class ZeroExpertBlock(StaysFloat32):
    """A trained block with zero experts behind its FFN experts; mixed in before the block's own class.

    The block has `gate` with `weight` [E, H], `experts` with `gate_up_proj` [E, 2I, H] (gate rows first) and
    `down_proj` [E, H, I], both with the classes above mixed in, and maybe `shared_experts`. `adopt` adds

    - `zero_weight`: Parameter [Z, H], the router's rows for the zero experts;
    - `e_score_correction_bias`: float32 buffer [E], 0, which only selects, for a bias controller, and which no cast
      of the model changes; a block whose gate has one uses that;
    - `zero_experts_enabled`: False gives the block's own forward, untouched: the model as it was, up to what has been
      trained since.

    `zemoe.observe` sees its Routing under the block's own name.
    """

    stays_float32 = ("e_score_correction_bias", "zero_bias")

    gate: nn.Module
    experts: nn.Module
    zero_weight: nn.Parameter
    e_score_correction_bias: Tensor
    selector: Selector
    rules: MoEConfig
    zero_experts_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} is made from a trained block by retrofit_, not built")

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

    def route(self, x_TH: Tensor, backend: Backend | None = None) -> Routing:
        """The Routing of x [T, H] over all A slots, in float32 whatever the dtype of the model."""
        logits_TA, gate_bias_E = self.gate(x_TH, self.zero_weight, backend)
        bias = self.e_score_correction_bias if gate_bias_E is None else self._bias(gate_bias_E)
        return self.selector(logits_TA, self.rules, bias, backend)

    def _bias(self, gate_bias_E: Tensor) -> Tensor:
        """The gate's selection bias [E], or [A] where zero experts have one too."""
        zero_bias_Z = self._buffers.get("zero_bias")
        return gate_bias_E if zero_bias_Z is None else torch.cat([gate_bias_E, zero_bias_Z])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [..., H]; the same shape and dtype out."""
        if not self.zero_experts_enabled:
            return super().forward(hidden_states)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        backend = backend_of(x_TH, self.rules.num_experts)
        y_TH = self.experts(x_TH, routing=self.route(x_TH, backend), rules=self.rules, backend=backend)
        y = unflatten(y_TH, hidden_states.shape)
        shared_experts = self._modules.get("shared_experts")
        return y if shared_experts is None else y + shared_experts(hidden_states)


@contextmanager
def zero_experts_disabled(model: nn.Module) -> Generator[None, None, None]:
    """The retrofitted blocks of `model` compute their original forward for the duration of a `with` block.

    Before any training that is the original model, to the bit: ZEDA's teacher, without a second copy in memory as long
    as only `zero_weight` is trained.

    Raises:
        ValueError: if `model` has no block with zero experts from `retrofit_`.
    """
    blocks = [module for module in model.modules() if isinstance(module, ZeroExpertBlock)]
    if not blocks:
        raise ValueError(f"model must have been through retrofit_, got {type(model).__name__} without its blocks")
    before = [block.zero_experts_enabled for block in blocks]
    for block in blocks:
        block.zero_experts_enabled = False
    try:
        yield
    finally:
        for block, enabled in zip(blocks, before, strict=True):
            block.zero_experts_enabled = enabled
