"""MoE: the whole block for people who build models: router, experts, zero-computation experts and shared experts.

T tokens, H hidden size, I expert width, E FFN experts, A slots, K choices, C constant experts.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .affine import AffineParams, check_kinds, count_kind
from .backends import backend_of, check_backend
from .casts import StaysFloat32
from .config import MoEConfig
from .experts import moe_activation, unflatten, weighted_experts
from .routing import Router, Routing


class SharedExperts(nn.Module):
    """A gated FFN that every token passes, optionally weighed by sigmoid(w_g x) (Qwen2-MoE).

    Args:
        hidden_size: H. intermediate_size: the width of this FFN. activation: as in MoEConfig. gated: add the sigmoid
            gate. dtype: of the weights.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        *,
        gated: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = moe_activation(activation)
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, dtype=dtype)
        self.gate = nn.Linear(hidden_size, 1, bias=False, dtype=dtype) if gated else None

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return what the shared experts add, [T, H], for x [T, H]."""
        gate, up = self.gate_up_proj(x_TH).chunk(2, dim=-1)
        y_TH = self.down_proj(self.activation(gate) * up)
        return y_TH if self.gate is None else torch.sigmoid(self.gate(x_TH)) * y_TH


class MoE(StaysFloat32):
    """A zero-expert MoE block: hidden states in, hidden states out (docs/specification.md).

    Args:
        config: MoEConfig.
        router_bias, tied_null, gating_residual, logit_norm: see zemoe.routing.Router.
        shared_intermediate_size: width of the shared experts, 0 for none. shared_gated: weigh them by a sigmoid gate.
        dtype: of the expert weights, shared ones too; the router, its selection bias and the affine parameters are
            float32, and stay so under `.to(torch.bfloat16)`, `.half()` and `.double()`.
        backend: a name in zemoe.backends.BACKENDS, or None for the first that works where the input is.

    Parameters: `w13 [E, 2I, H]`, `w2 [E, H, I]`, `router.classifier.weight`, and where there are experts of that kind
    `constant_router [C, 2, H]`, `constant_value [C, H]`, `scale [S]`. All are initialised: normal with a standard
    deviation of `init_std`, scales at 1.

    Raises:
        ValueError: for an unknown kind, score or activation, and what MoEConfig refuses.
    """

    stays_float32 = ("constant_router", "constant_value", "scale")  # the Router keeps its own tensors float32

    def __init__(
        self,
        config: MoEConfig,
        *,
        router_bias: bool = False,
        tied_null: bool = False,
        gating_residual: bool = False,
        logit_norm: float | None = None,
        shared_intermediate_size: int = 0,
        shared_gated: bool = False,
        dtype: torch.dtype | None = None,
        init_std: float = 0.02,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_kinds(config.zero_expert_kinds)
        moe_activation(config.activation)
        check_backend(backend)
        self.config = config
        self.backend = backend
        self.router = Router(
            config, bias=router_bias, tied_null=tied_null, gating_residual=gating_residual, logit_norm=logit_norm
        )
        E, H, width = config.num_experts, config.hidden_size, config.intermediate_size
        C = count_kind(config.zero_expert_kinds, "constant")
        S = count_kind(config.zero_expert_kinds, "scaled_identity")
        self.w13 = nn.Parameter(torch.empty(E, 2 * width, H, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(E, H, width, dtype=dtype))
        self.constant_router = nn.Parameter(torch.empty(C, 2, H, dtype=torch.float32)) if C else None
        self.constant_value = nn.Parameter(torch.empty(C, H, dtype=torch.float32)) if C else None
        self.scale = nn.Parameter(torch.ones(S, dtype=torch.float32)) if S else None
        self.shared_experts = (
            SharedExperts(H, shared_intermediate_size, config.activation, gated=shared_gated, dtype=dtype)
            if shared_intermediate_size
            else None
        )
        for parameter in (self.w13, self.w2, self.router.classifier.weight, self.constant_router, self.constant_value):
            if parameter is not None:
                nn.init.normal_(parameter, std=init_std)

    @classmethod
    def moe_plus_plus(
        cls,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        zero: int = 1,
        copy: int = 1,
        constant: int = 2,
        **options: Any,
    ) -> MoE:
        """An MoE++ layer (Jin et al., arXiv 2410.07348; the counts are those of its 7B model).

        Softmax over all slots; zero, copy and constant experts in this id order; the weights of what was chosen, less
        zero experts, are normalised; a gating residual takes the logits of the MoE++ layer before:
        `y, routing = layer(x, prev_logits, return_routing=True)`, and `routing.logits_TA` is for the next one.

        Args:
            zero, copy, constant: how many of each. options: of MoE itself; a first layer without a predecessor may
                have gating_residual=False, and does not need it.
        """
        config = MoEConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            top_k=top_k,
            zero_expert_kinds=(("zero", zero), ("identity", copy), ("constant", constant)),
            renormalize="nonnull",
        )
        settings: dict[str, Any] = {"gating_residual": True, **options}
        return cls(config, **settings)

    @classmethod
    def isaac(
        cls,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_null_experts: int,
        top_k: int,
        *,
        logit_norm: float = 1.0,
        **options: Any,
    ) -> MoE:
        """A layer with null experts behind one tied logit (Kilian et al., arXiv 2601.15370, as in Isaac).

        Softmax over all slots; the router has one row for all null experts, whose logit is repeated; a token's weights
        are normalised over the FFN experts that it chose; the router's logits are normalised (`normalize_logits`).
        Trained with the Switch loss over all slots, a token uses K E / (E + Z) FFN experts on average.

        Args:
            num_null_experts: Z. logit_norm: the scale of the normalised logits. options: of MoE itself.
        """
        config = MoEConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            top_k=top_k,
            zero_expert_kinds=(("zero", num_null_experts),),
            renormalize="real",
        )
        settings: dict[str, Any] = {"tied_null": True, "logit_norm": logit_norm, **options}
        return cls(config, **settings)

    def forward(
        self, hidden_states: Tensor, prev_logits: Tensor | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Return [..., H] for hidden_states [..., H]; with return_routing also the Routing of the T flattened tokens.

        Args:
            prev_logits: [T, A] logits of the layer before (`routing.logits_TA`), for a gating residual.

        Raises:
            ValueError: for a shape that does not fit, naming the argument.
        """
        config = self.config
        if hidden_states.ndim < 1 or hidden_states.shape[-1] != config.hidden_size:
            raise ValueError(
                f"hidden_states must have shape [..., H={config.hidden_size}], got {tuple(hidden_states.shape)}"
            )
        x_TH = hidden_states.reshape(-1, config.hidden_size)
        # The rows of constant_router are multiplied in the same product as the classifier's.
        rows = None if self.constant_router is None else self.constant_router.flatten(0, 1)
        backend = backend_of(hidden_states, config.num_experts, self.backend)
        logits_TA, constant = self.router.project(x_TH, prev_logits, rows, backend)
        routing = self.router.select(logits_TA, backend)
        y_TH = weighted_experts(
            x_TH,
            routing,
            self.w13,
            self.w2,
            config,
            AffineParams(self.constant_router, self.constant_value, self.scale),
            None if rows is None else constant.unflatten(1, (-1, 2)),
            backend,
        )
        if self.shared_experts is not None:
            y_TH = y_TH + self.shared_experts(x_TH)
        y = unflatten(y_TH, hidden_states.shape)
        return (y, routing) if return_routing else y
