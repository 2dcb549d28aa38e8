"""From logits to the chosen experts and their weights; and how others get to see them.

T tokens, H hidden size, E FFN experts, Z zero-computation experts, A = E + Z slots, K choices per token.
Everything here computes in float32, whatever the dtype of the hidden states
(docs/specification.md, "Router logits").
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._compat import inside_backward
from .backends import Backend, routing_backend
from .casts import StaysFloat32
from .config import (
    MoEConfig,
    RoutingRules,
    ZeroExpertKinds,
    check_count,
    check_groups,
    expand_kinds,
    renormalize_mode,
    warn_of_weights_without_gradient,
)
from .ops.library import without_autocast
from .scores import check_scoring


class Routing(NamedTuple):
    """What a router decided for T tokens.

    logits_TA: float32, with their graph. topk_weights_TK: float32, scaled and renormalised, differentiable.
    topk_ids_TK: int64, ids 0..E-1 are FFN experts and E..A-1 zero-computation experts; best choice first.
    """

    logits_TA: Tensor
    topk_weights_TK: Tensor
    topk_ids_TK: Tensor


def _check_bias(bias: Tensor, num_experts: int, num_slots: int) -> None:
    if bias.ndim != 1 or bias.shape[0] not in (num_experts, num_slots):
        raise ValueError(
            f"e_score_correction_bias must have shape ({num_slots},) or ({num_experts},), got {tuple(bias.shape)}"
        )


def _check_rules(rules: RoutingRules, logits_TA: Tensor, has_bias: bool) -> None:
    """Raise ValueError unless slots can be chosen by these rules from these logits."""
    if logits_TA.ndim != 2 or not logits_TA.is_floating_point():
        raise ValueError(f"logits_TA must be a float [T, A] tensor, got {logits_TA.dtype} {tuple(logits_TA.shape)}")
    num_slots, num_experts, kinds = logits_TA.shape[1], rules.num_experts, rules.zero_expert_kinds
    check_count("top_k", rules.top_k, 1)
    check_count("num_experts", num_experts, 0)
    if num_experts > num_slots:
        raise ValueError(f"num_experts={num_experts} exceeds the {num_slots} slots of logits_TA")
    if rules.top_k > num_slots:
        raise ValueError(f"top_k={rules.top_k} exceeds the {num_slots} slots of logits_TA")
    check_scoring(rules.scoring_func)
    if kinds and rules.num_slots != num_slots:
        raise ValueError(
            f"zero_expert_kinds must name the {num_slots - num_experts} slots of logits_TA ({num_slots}) beyond "
            f"num_experts={num_experts}, got {kinds}"
        )
    check_groups(rules.num_expert_group, rules.topk_group, num_slots, rules.top_k, has_bias)


def select(
    logits_TA: Tensor, rules: RoutingRules, bias: Tensor | None = None, backend: str | Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `select_experts` does, (weights [T, K], ids [T, K]), for logits [T, A] and rules as one object.

    rules: RoutingRules with canonical kinds and mode, as in MoEConfig. bias: the selection bias, [A] or [E].

    Raises:
        ValueError: as `select_experts`.
    """
    _check_rules(rules, logits_TA, bias is not None)
    if bias is not None:
        _check_bias(bias, rules.num_experts, logits_TA.shape[1])
        bias = bias.detach().float()
    return routing_backend(logits_TA, backend).select(logits_TA.float(), rules, bias)


def select_experts(
    logits_TA: Tensor,
    top_k: int,
    *,
    num_experts: int,
    zero_expert_kinds: ZeroExpertKinds = (),
    scoring_func: str = "softmax",
    renormalize: str | bool = "none",
    e_score_correction_bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    backend: str | Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose K of A slots for each token, and weigh them.

    The rules: docs/specification.md, "Scores" up to "Renormalising".

    Args:
        logits_TA: [T, A] router logits of any float dtype; computed in float32.
        top_k: K. num_experts: E; slots from E on are zero-computation experts.
        zero_expert_kinds: (kind, count) in id order; only renormalize="nonnull" looks at the kinds.
        scoring_func: a name in SCORES.
        renormalize: "none" (LongCat), "all" (ZEDA), "real" (AdaMoE), "nonnull" (MoE++), or True / False
            for "all" / "none".
        e_score_correction_bias: [A] or [E], added for the selection only. No gradient.
        routed_scaling_factor: multiplies all weights.
        num_expert_group, topk_group: the group limit of DeepSeek-V3, or None.
        backend: a name in BACKENDS, or None for the first that works on this device.

    Returns:
        (topk_weights_TK float32, topk_ids_TK int64), best choice first, ties to the lower id. A slot with logit -inf is
        chosen only where fewer than K others remain. A token with a NaN or +inf logit, or only -inf, gets NaN weights.

    Raises:
        ValueError: for a shape, name or count that does not fit, naming it. RuntimeError: under torch.vmap.
    """
    rules = RoutingRules(
        num_experts=num_experts,
        top_k=top_k,
        zero_expert_kinds=expand_kinds(zero_expert_kinds),
        scoring_func=scoring_func,
        renormalize=renormalize_mode(renormalize),
        routed_scaling_factor=routed_scaling_factor,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
    )
    return select(logits_TA, rules, e_score_correction_bias, backend)


def router_logits(x_TH: Tensor, weight_RH: Tensor, backend: str | Backend | None = None) -> Tensor:
    """Return float32 logits [T, R]: x [T, H] of any float dtype times the transposed router weight [R, H].

    Autocast does not change the dtype of the product. A `backward()` that is called inside of autocast, which torch
    advises against, rounds the gradients to autocast's dtype where torch computes the product, not a kernel of ours.
    """
    return routing_backend(x_TH, backend).router_logits(x_TH, weight_RH)


def normalize_logits(logits_TA: Tensor, scale: float) -> Tensor:
    """Return [T, A]: scale * (logits - mean) / sqrt(variance + 1e-6), mean and variance being a token's.

    The formula is Skywork-MoE's (arXiv 2406.06563).

    A slot whose logit is -inf stays masked and is left out of mean and variance.
    """
    kept_TA = logits_TA != float("-inf")
    count_T1 = kept_TA.sum(-1, keepdim=True).clamp(min=1)
    mean_T1 = logits_TA.masked_fill(~kept_TA, 0.0).sum(-1, keepdim=True) / count_T1
    centred_TA = (logits_TA - mean_T1).masked_fill(~kept_TA, 0.0)
    variance_T1 = centred_TA.square().sum(-1, keepdim=True) / count_T1
    return (scale * centred_TA * (variance_T1 + 1e-6).rsqrt()).masked_fill(~kept_TA, float("-inf"))


class RoutingModule(nn.Module):
    """A module whose forward returns a Routing, so that `observe` can collect it."""


class Selector(RoutingModule):
    """`select` as a module without parameters, so that `observe` finds the Routing of layers without a Router."""

    def forward(
        self,
        logits_TA: Tensor,
        rules: RoutingRules,
        bias: Tensor | None = None,
        backend: str | Backend | None = None,
    ) -> Routing:
        logits_TA = logits_TA.float()
        return Routing(logits_TA, *select(logits_TA, rules, bias, backend))


class Router(StaysFloat32):
    """The classifier with its selection rules: hidden states in, Routing out.

    Parameters and buffers are float32 and stay so when it, or a module around it, is cast (zemoe.casts); the product is
    computed in float32 whatever the dtype of the hidden states, under autocast too.

    Args:
        config: the layer's MoEConfig.
        bias: the classifier has a bias.
        tied_null: the classifier has E + 1 rows; the last logit is repeated for all Z zero-computation experts.
        gating_residual: adds W_g times the previous layer's logits (MoE++); W_g starts at zero.
        logit_norm: the scale that the classifier's logits are normalised to, see `normalize_logits`: before a tied null
            logit is repeated, so that Z plays no part, and before a gating residual is added. None to leave them.

    Warns once where top_k is 1 and weights are renormalised, for then the only weight of a token has no gradient.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        config: MoEConfig,
        *,
        bias: bool = False,
        tied_null: bool = False,
        gating_residual: bool = False,
        logit_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_scoring(config.scoring_func)
        if tied_null and not config.num_zero_experts:
            raise ValueError("tied_null=True needs at least one zero-computation expert, got none in zero_expert_kinds")
        if logit_norm is not None and not 0 < logit_norm < float("inf"):
            raise ValueError(f"logit_norm must be a finite number above 0, or None, got {logit_norm!r}")
        warn_of_weights_without_gradient(config.top_k, config.renormalize)
        self.config = config
        self.logit_norm = logit_norm
        self.tied_null = tied_null
        rows = config.num_experts + 1 if tied_null else config.num_slots
        self.classifier = nn.Linear(config.hidden_size, rows, bias=bias, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_slots, dtype=torch.float32))
        self.residual: nn.Linear | None = None
        if gating_residual:
            self.residual = nn.Linear(config.num_slots, config.num_slots, bias=False, dtype=torch.float32)
            nn.init.zeros_(self.residual.weight)
        self.selector = Selector()

    def project(
        self,
        x_TH: Tensor,
        prev_logits: Tensor | None = None,
        extra_RH: Tensor | None = None,
        backend: str | Backend | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits [T, A], and the products [T, R] of x [T, H] with extra rows [R, H].

        Both come from one matrix product. prev_logits: [T, A] of the layer before, with a gating residual only.

        Raises:
            ValueError: for prev_logits without a gating residual, or of another shape.
        """
        if prev_logits is not None and self.residual is None:
            raise ValueError("prev_logits was given, but this router has no gating residual (gating_residual=True)")
        weight, bias = self.classifier.weight.float(), self.classifier.bias
        rows = weight.shape[0]
        if extra_RH is not None:
            weight = torch.cat([weight, extra_RH.float()])
        with without_autocast(x_TH.device):
            product = router_logits(x_TH, weight, backend)
            extra = product[:, rows:]
            logits = product if extra_RH is None else product[:, :rows]
            if bias is not None:  # pyright: ignore[reportUnnecessaryComparison] - nn.Linear(bias=False)
                logits = logits + bias.float()
            if self.logit_norm is not None:
                logits = normalize_logits(logits, self.logit_norm)
            if self.tied_null:
                E, Z = self.config.num_experts, self.config.num_zero_experts
                logits = torch.cat([logits[:, :E], logits[:, E:].expand(-1, Z)], dim=-1)
            if prev_logits is not None and self.residual is not None:
                if prev_logits.shape != logits.shape:
                    raise ValueError(
                        f"prev_logits must have shape {tuple(logits.shape)}, got {tuple(prev_logits.shape)}"
                    )
                logits = logits + F.linear(prev_logits.float(), self.residual.weight.float())
        return logits, extra

    def select(self, logits_TA: Tensor, backend: str | Backend | None = None) -> Routing:
        """Return the Routing of given logits [T, A], by this router's rules and its selection bias."""
        return self.selector(logits_TA, self.config, self.e_score_correction_bias, backend)

    def forward(self, x_TH: Tensor, prev_logits: Tensor | None = None, backend: str | Backend | None = None) -> Routing:
        """Return the Routing of x [T, H].

        Args:
            prev_logits: [T, A] of the layer before, with a gating residual only.
            backend: a name in BACKENDS, or None for the first that works on this device.
        """
        return self.select(self.project(x_TH, prev_logits, backend=backend)[0], backend)


class Observed(Mapping[tuple[str, int], Routing]):
    """Each layer's Routing, keyed by (layer name, micro-batch number). Filled while `observe` is active."""

    def __init__(self) -> None:
        self._routings: dict[tuple[str, int], Routing] = {}
        self.micro_batch = -1

    def __getitem__(self, key: tuple[str, int]) -> Routing:
        return self._routings[key]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._routings)

    def __len__(self) -> int:
        return len(self._routings)

    def layers(self) -> list[str]:
        """Names of the layers seen, in the order in which they first ran."""
        return list(dict.fromkeys(layer for layer, _ in self._routings))

    def clear(self) -> None:
        """Forget everything, so that the next forward is micro-batch 0."""
        self._routings.clear()
        self.micro_batch = -1

    def record(self, layer: str, routing: Routing) -> None:
        """Keep `routing`; one computed inside a backward pass replaces the one it repeats."""
        micro_batch = max(self.micro_batch, 0)
        if inside_backward():
            micro_batch = self._repeated(layer, routing, micro_batch)
        self._routings[layer, micro_batch] = routing

    def _repeated(self, layer: str, routing: Routing, latest: int) -> int:
        """Return the micro-batch that an activation checkpoint computes again.

        If there are several, it is the latest one with the same ids and bitwise equal logits; if no logits are equal
        (some kernels give other bits each time), the latest with the same ids; if there is none either, `latest`.
        """
        ids, logits = routing.topk_ids_TK, routing.logits_TA
        known = [(batch, seen) for (name, batch), seen in self._routings.items() if name == layer]
        if len(known) == 1:
            return known[0][0]
        same = [(batch, seen) for batch, seen in reversed(known) if torch.equal(seen.topk_ids_TK, ids)]
        exact = [batch for batch, seen in same if torch.equal(seen.logits_TA, logits)]
        return (exact or [batch for batch, _ in same] or [latest])[0]


@contextmanager
def observe(model: nn.Module) -> Generator[Observed, None, None]:
    """Collect every layer's Routing while the context is active; nothing is kept on the modules.

    Each call of `model` itself starts a new micro-batch; what activation checkpointing computes again during backward
    overwrites the entry it repeats and never adds one (with several micro-batches held, finding it compares ids and
    logits, a host synchronisation on a GPU). Logits keep their graph, so losses may be built from them.

    Run the model uncompiled: torch.compile takes no notice of hooks that came later, so a model compiled before shows
    nothing, and one under fullgraph=True fails to compile here. `MoE.forward(return_routing=True)` compiles.

    Yields:
        Observed: a mapping {(layer name, micro-batch): Routing}.

    Raises:
        ValueError: if `model` has no layer that routes.
    """
    routers = [(name, module) for name, module in model.named_modules() if isinstance(module, RoutingModule)]
    if not routers:
        raise ValueError(
            f"model must contain zemoe routing layers to be observed, got {type(model).__name__} without any"
        )
    seen = Observed()

    def start(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not inside_backward():  # not a recomputation inside backward
            seen.micro_batch += 1

    def recorder(layer: str) -> Callable[[nn.Module, tuple[Any, ...], Routing], None]:
        return lambda module, args, routing: seen.record(layer, routing)

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(start).remove)
        for name, module in routers:
            layer = name.removesuffix("selector").removesuffix(".") if isinstance(module, Selector) else name
            hooks.callback(module.register_forward_hook(recorder(layer)).remove)
        yield seen
