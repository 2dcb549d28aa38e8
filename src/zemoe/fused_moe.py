"""FusedMoE and ZeroExpertFusedMoE: the layer under the names that inference engines use.

Their names and arguments: docs/specification.md, "Engine names".

T tokens, H hidden size, I expert width, E FFN experts, Z zero-computation experts, A = E + Z slots, K choices.
Nothing is stored on a module during forward; the one exception is the explicit, per-thread memo of `_memoize`.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from .affine import AffineParams, check_kinds, count_kind
from .backends import Backend, backend_of
from .casts import StaysFloat32
from .config import MoEConfig, RoutingRules, ZeroExpertKinds, check_count, expand_kinds, renormalize_mode
from .engine_options import RoutingMemo, check_engine_options
from .experts import fused_experts, moe_activation
from .routing import Routing, Selector
from .scores import check_scoring


def _check_bias(bias: object) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"e_score_correction_bias must be a tensor, got {type(bias).__name__}: {bias!r}")


class FusedMoE(StaysFloat32):
    """Routed FFN experts in one fused operation.

    Args:
        num_experts: E. top_k: K. hidden_size: H. intermediate_size: I.
        renormalize: True or "all", False or "none", "real", "nonnull" (docs/specification.md, "Renormalising").
        scoring_func: a name in zemoe.scores.SCORES, such as "softmax" or "sigmoid".
        e_score_correction_bias: [E] float tensor added for the selection only; kept as a buffer that shares its memory
            and is not saved, for its owner (the router) saves it.
        routed_scaling_factor: multiplies every weight.
        use_grouped_topk: apply the group limit of num_expert_group and topk_group; without it they have no effect.
        activation: "silu", "gelu" or "gelu_tanh".
        custom_routing_function: (hidden_states, gating_output, topk, renormalize) -> (weights [T, K], ids [T, K]).
        params_dtype: of the weights; torch's default dtype if None.
        prefix: the layer's name, kept.
        engine_options: further arguments of engines' FusedMoE, accepted at their neutral values.

    Parameters `w13_weight [E, 2I, H]` (gate rows first) and `w2_weight [E, H, I]` are uninitialised until loaded.
    Casting the module changes these two; a float32 selection bias and the affine parameters stay float32.

    Raises:
        ValueError: for a value that does not fit or an option that zemoe does not have, naming it.
        TypeError: for an unknown argument, or a bias that is no tensor.
    """

    e_score_correction_bias: Tensor | None
    stays_float32 = ("e_score_correction_bias", "constant_router", "constant_value", "scale")

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        params_dtype: torch.dtype | None = None,
        renormalize: bool | str = True,
        use_grouped_topk: bool = False,
        num_expert_group: int | None = None,
        topk_group: int | None = None,
        prefix: str = "",
        custom_routing_function: Callable[..., tuple[Tensor, Tensor]] | None = None,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        e_score_correction_bias: Tensor | None = None,
        activation: str = "silu",
        **engine_options: object,
    ) -> None:
        super().__init__()
        check_engine_options(type(self).__name__, engine_options)
        if use_grouped_topk and (num_expert_group is None or topk_group is None):
            raise ValueError(
                "use_grouped_topk=True needs num_expert_group and topk_group, "
                f"got num_expert_group={num_expert_group}, topk_group={topk_group}"
            )
        self.num_experts = num_experts
        self.top_k = top_k
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.renormalize = renormalize
        self.use_grouped_topk = use_grouped_topk
        self.num_expert_group = num_expert_group
        self.topk_group = topk_group
        self.prefix = prefix
        self.custom_routing_function = custom_routing_function
        self.scoring_func = scoring_func
        self.routed_scaling_factor = routed_scaling_factor
        self.activation = activation
        MoEConfig(hidden_size=hidden_size, intermediate_size=intermediate_size, **vars(self._rules()))
        check_scoring(scoring_func)
        moe_activation(activation)
        if e_score_correction_bias is not None:
            _check_bias(e_score_correction_bias)
            e_score_correction_bias = e_score_correction_bias.detach()
        self.register_buffer("e_score_correction_bias", e_score_correction_bias, persistent=False)
        bias = self._selection_bias()
        fitting = {(num_experts,), (self.num_slots,)}
        if bias is not None and custom_routing_function is None and tuple(bias.shape) not in fitting:
            raise ValueError(f"e_score_correction_bias must have a shape of {sorted(fitting)}, got {tuple(bias.shape)}")
        self.w13_weight = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size, dtype=params_dtype))
        self.w2_weight = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, dtype=params_dtype))
        self.selector = Selector()

    def _zero_expert_kinds(self) -> ZeroExpertKinds:
        return ()

    def _affine_params(self) -> AffineParams:
        return AffineParams()

    def _selection_bias(self) -> Tensor | None:
        return self.e_score_correction_bias

    def _rules(self) -> RoutingRules:
        """Return the rules of the layer's attributes as they are now: engines may set those after construction."""
        return RoutingRules(
            num_experts=self.num_experts,
            top_k=self.top_k,
            zero_expert_kinds=self._zero_expert_kinds(),
            scoring_func=self.scoring_func,
            renormalize=renormalize_mode(self.renormalize),
            routed_scaling_factor=self.routed_scaling_factor,
            num_expert_group=self.num_expert_group if self.use_grouped_topk else None,
            topk_group=self.topk_group if self.use_grouped_topk else None,
        )

    @property
    def num_slots(self) -> int:
        """A, the number of logits that forward takes."""
        return self.num_experts + sum(count for _, count in self._zero_expert_kinds())

    def route(self, hidden_states: Tensor, router_logits: Tensor, backend: Backend | None = None) -> Routing:
        """Return the Routing of x [T, H] with logits [T, A], by the layer's attributes as they are now."""
        if self.custom_routing_function is not None:
            weights, ids = self.custom_routing_function(
                hidden_states=hidden_states,
                gating_output=router_logits,
                topk=self.top_k,
                renormalize=self.renormalize,
            )
            return Routing(router_logits, weights, ids)
        if backend is None:
            backend = backend_of(hidden_states, self.num_experts)
        return self.selector(router_logits, self._rules(), self._selection_bias(), backend)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        """Return [..., H] for hidden_states [..., H] and router_logits [..., A] of all slots, on the same device.

        Raises:
            ValueError: for a shape, dtype or device that does not fit, naming the argument.
        """
        if hidden_states.ndim < 1 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must have shape [..., H={self.hidden_size}], got {tuple(hidden_states.shape)}"
            )
        needed = (*hidden_states.shape[:-1], self.num_slots)
        if tuple(router_logits.shape) != needed:
            raise ValueError(f"router_logits must have shape {needed} (all slots), got {tuple(router_logits.shape)}")
        if not router_logits.is_floating_point():
            raise ValueError(f"router_logits must be floating point, got {router_logits.dtype}")
        if router_logits.device != hidden_states.device:
            raise ValueError(
                f"router_logits must be on {hidden_states.device} like hidden_states, got {router_logits.device}"
            )
        backend = backend_of(hidden_states, self.num_experts)
        x_TH, logits_TA = hidden_states.reshape(-1, self.hidden_size), router_logits.reshape(-1, self.num_slots)
        routing = self.route(x_TH, logits_TA, backend)
        return fused_experts(
            hidden_states,
            self.w13_weight,
            self.w2_weight,
            routing.topk_weights_TK,
            routing.topk_ids_TK,
            num_experts=self.num_experts,
            zero_expert_kinds=self._zero_expert_kinds(),
            affine_params=self._affine_params(),
            activation=self.activation,
            backend=backend,
        )

    def weight_loader(
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copy one expert's matrix into a stacked parameter.

        Args:
            param: w13_weight or w2_weight. loaded_weight: [I, H] for "w1" and "w3", [H, I] for "w2".
            weight_name: the checkpoint's name of it, for messages.
            shard_id: "w1" (gate), "w3" (up) or "w2" (down). expert_id: 0..A-1; an id
                >= E (a zero-computation expert) is skipped.
            return_success: return whether something was copied.

        Raises:
            ValueError: for an unknown shard_id, an expert_id that is no integer >= 0, a wrong shape, or the other
                parameter.
        """
        if shard_id not in ("w1", "w2", "w3"):
            raise ValueError(f"shard_id must be 'w1', 'w2' or 'w3', got {shard_id!r} for {weight_name}")
        if not isinstance(expert_id, SupportsIndex) or expert_id < 0:
            raise ValueError(f"expert_id must be an integer >= 0, got {expert_id!r} for {weight_name}")
        owner = self.w2_weight if shard_id == "w2" else self.w13_weight
        if param is not owner and param.shape != owner.shape:
            name = "w2_weight" if shard_id == "w2" else "w13_weight"
            raise ValueError(
                f"param must be {name} for shard_id={shard_id!r}, got shape {tuple(param.shape)} ({weight_name})"
            )
        loaded = expert_id < self.num_experts
        if loaded:
            target = param.data[expert_id]
            if shard_id != "w2":
                target = target.chunk(2)[0 if shard_id == "w1" else 1]
            if target.shape != loaded_weight.shape:
                raise ValueError(
                    f"loaded_weight must have shape {tuple(target.shape)} for shard_id={shard_id!r}, "
                    f"got {tuple(loaded_weight.shape)} ({weight_name})"
                )
            target.copy_(loaded_weight)
        return loaded if return_success else None

    @staticmethod
    def make_expert_params_mapping(
        ckpt_gate_proj_name: str, ckpt_down_proj_name: str, ckpt_up_proj_name: str, num_experts: int
    ) -> list[tuple[str, str, int, str]]:
        """(parameter prefix, checkpoint prefix, expert id, shard id) of each expert matrix, for engines' loaders."""
        shards = (("w1", ckpt_gate_proj_name), ("w2", ckpt_down_proj_name), ("w3", ckpt_up_proj_name))
        return [
            (f"experts.{'w2' if shard == 'w2' else 'w13'}_", f"experts.{expert}.{name}.", expert, shard)
            for expert in range(num_experts)
            for shard, name in shards
        ]

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}"
        )


class ZeroExpertFusedMoE(FusedMoE):
    """FusedMoE over E FFN experts and Z zero-computation experts; routing is computed once and serves both.

    Args:
        zero_expert_num: Z.
        zero_expert_type: one kind for all, or (kind, count) pairs in id order: identity (copy), zero (null), constant,
            scaled_identity.
        router: the classifier module, or None. It is not registered as a submodule; its owner moves and saves it. If it
            has an `e_score_correction_bias` of length A, routing uses all of it, live, and this layer's own attribute
            shows the first E entries (a view made at construction; after `.to()` maybe a copy, which routing ignores);
            a bias given by the user that has another length is kept.
        kwargs: of FusedMoE.

    Constant experts add the float32 parameters `constant_router [C, 2, H]` and `constant_value [C, H]`, scaled_identity
    experts `scale [S]`.

    Raises:
        ValueError: as FusedMoE; for a custom_routing_function, because this class manages its own routing.
    """

    _kinds: ZeroExpertKinds
    router: nn.Module | None

    def __init__(
        self,
        zero_expert_num: int,
        zero_expert_type: str | Sequence[tuple[str, int]],
        router: nn.Module | None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("custom_routing_function") is not None:
            raise ValueError(
                "custom_routing_function must be None: ZeroExpertFusedMoE manages its own routing; use FusedMoE, "
                "or fused_experts with your own weights and ids"
            )
        check_count("zero_expert_num", zero_expert_num, 0)
        kinds = expand_kinds(zero_expert_type, zero_expert_num)
        check_kinds(kinds)
        # Read by _rules before nn.Module is ready, and a registered router would be saved twice.
        self.__dict__["_kinds"] = kinds
        self.__dict__["router"] = router
        router_bias = getattr(router, "e_score_correction_bias", None)
        own_bias = kwargs.get("e_score_correction_bias")
        if router_bias is not None and "num_experts" in kwargs:
            E = check_count("num_experts", kwargs["num_experts"], 0)
            for bias in (router_bias, own_bias):
                if bias is not None:
                    _check_bias(bias)
            full = router_bias.shape == (E + zero_expert_num,)
            if own_bias is None or own_bias.shape == router_bias.shape:
                kwargs["e_score_correction_bias"] = router_bias[:E] if full else router_bias
        super().__init__(**kwargs)
        self.zero_expert_num = zero_expert_num
        self.zero_expert_type = zero_expert_type
        H = self.hidden_size
        C, S = count_kind(kinds, "constant"), count_kind(kinds, "scaled_identity")
        self.constant_router = nn.Parameter(torch.zeros(C, 2, H, dtype=torch.float32)) if C else None
        self.constant_value = nn.Parameter(torch.zeros(C, H, dtype=torch.float32)) if C else None
        self.scale = nn.Parameter(torch.ones(S, dtype=torch.float32)) if S else None
        self._memo = RoutingMemo()

    def _zero_expert_kinds(self) -> ZeroExpertKinds:
        return self._kinds

    def _affine_params(self) -> AffineParams:
        return AffineParams(self.constant_router, self.constant_value, self.scale)

    def _selection_bias(self) -> Tensor | None:
        own = self.e_score_correction_bias
        if "e_score_correction_bias" in self.__dict__:
            return own  # set by _temporarily_set_attrs
        if own is not None and self._kinds and own.shape == (self.num_slots,):
            return own  # set after construction, which leaves at most the first E entries
        full = getattr(self.router, "e_score_correction_bias", None)
        return full if full is not None and full.shape == (self.num_slots,) else own

    def _compute_zero_expert_result(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor
    ) -> Tensor | None:
        """Return the zero-computation experts' part of the output, [..., H], from routing [T, K] computed before.

        Returns None for a layer without zero-computation experts. Never changes its inputs.
        """
        if not self._kinds:
            return None
        return fused_experts(
            hidden_states,
            self.w13_weight[:0],
            self.w2_weight[:0],
            topk_weights,
            torch.where(topk_ids < self.num_experts, -1, topk_ids - self.num_experts),
            num_experts=0,
            zero_expert_kinds=self._kinds,
            affine_params=self._affine_params(),
        )

    @contextmanager
    def _memoize(self, topk_weights: Tensor, topk_ids: Tensor) -> Generator[None, None, None]:
        """Let this thread read the given routing [T, K] with `_select_experts_from_memo` until the context ends.

        Inside another such context the outer one goes on afterwards where it was.
        """
        with self._memo.holding(topk_weights, topk_ids):
            yield

    def _select_experts_from_memo(self, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """(topk_weights, topk_ids) of the next len(hidden_states) memoized rows; router_logits are not used.

        Raises:
            RuntimeError: when nothing is memoized on this thread, or fewer rows are left than asked for.
        """
        return self._memo.take(len(hidden_states))

    @staticmethod
    @contextmanager
    def _temporarily_set_attrs(target: object, **attrs: object) -> Generator[None, None, None]:
        """Set attributes of `target` within the context and restore them after, also after an exception.

        Raises:
            AttributeError: for a name that target does not have; nothing is set then.
        """
        before = {}
        for name in attrs:
            getattr(target, name)
            before[name] = (name in target.__dict__, target.__dict__.get(name))
        try:
            for name, value in attrs.items():
                # Past nn.Module.__setattr__, which refuses a tensor for a parameter and which Dynamo cannot trace.
                object.__setattr__(target, name, value)
            yield
        finally:
            for name, (own, value) in before.items():
                if own:
                    object.__setattr__(target, name, value)
                elif name in target.__dict__:
                    del target.__dict__[name]  # Dynamo traces this, and not object.__delattr__

    def extra_repr(self) -> str:
        own = f"zero_expert_num={self.zero_expert_num}, zero_expert_type={self.zero_expert_type!r}"
        return f"{super().extra_repr()}, {own}"
