"""Backends: each computes a layer, routing and experts together, on its devices and in its dtypes.

A layer asks `backend_of` once a call and passes the Backend on to everything that it calls.

T tokens, H hidden size, I expert width, E FFN experts, A slots, R rows of a router's weight, K choices,
C constant experts.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine import (
    HIGHEST_ID,
    NO_PARAMS,
    AffineParams,
    AffineTerms,
    affine_coefficients,
    count_identities,
    kernel_kinds,
)
from .config import RoutingRules, ZeroExpertKinds
from .ops import experts as ops
from .ops import library, triton_experts, triton_routing
from .ops.library import without_autocast
from .ops.routing import select_few, takes_select_few, topk_ids
from .plan import make_plan
from .scores import SCORES, renormalized

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Choice = tuple[Tensor, Tensor]  # weights [T, K] float32, ids [T, K] int64


class ExpertsInput(NamedTuple):
    """What the experts of a layer compute from; checked, x [T, H], weights [T, K] in float32 (float64 with float64 x).

    w13: [E, 2I, H]. w2: [E, H, I]. num_slots: A, or None where any id from num_experts on is a slot. kinds: canonical,
    in id order. constant_logits_TC2: W_j x of the constant experts, or None. main_grads: for w13 and for w2, the tensor
    that its gradient is added to, or None for a gradient that is returned as usual.
    """

    x_TH: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    w13: Tensor
    w2: Tensor
    num_experts: int
    num_slots: int | None
    kinds: ZeroExpertKinds
    params: AffineParams = NO_PARAMS
    constant_logits_TC2: Tensor | None = None
    activation: str = "silu"
    main_grads: tuple[Tensor | None, Tensor | None] = (None, None)


# --- routing: x [T, H] and a weight [R, H] to logits; logits [T, A] and a float32 bias, [A] or [E], to choices ---


def _logits_by_torch(x_TH: Tensor, weight_RH: Tensor) -> Tensor:
    with without_autocast(x_TH.device):
        return F.linear(x_TH.float(), weight_RH.float())


def _logits_by_triton(x_TH: Tensor, weight_RH: Tensor) -> Tensor:
    if triton_routing.takes_router_logits(x_TH, weight_RH):
        return triton_routing.router_logits(x_TH, weight_RH)
    return _logits_by_torch(x_TH, weight_RH)


def _limit_to_groups(choice_TA: Tensor, num_expert_group: int, topk_group: int, has_bias: bool) -> Tensor:
    T, A = choice_TA.shape
    choice_TGS = choice_TA.view(T, num_expert_group, A // num_expert_group)
    value_TG = choice_TGS.topk(2, dim=-1).values.sum(-1) if has_bias else choice_TGS.amax(-1)
    best_TG = torch.zeros_like(value_TG, dtype=torch.bool).scatter(1, topk_ids(value_TG, None, topk_group), True)
    return choice_TGS.masked_fill(~best_TG[:, :, None], float("-inf")).view(T, A)


def _select_by_torch(logits_TA: Tensor, rules: RoutingRules, bias: Tensor | None) -> Choice:
    scores_TA = SCORES[rules.scoring_func](logits_TA)
    choice_TA = scores_TA.detach()
    if bias is not None:
        missing = logits_TA.shape[1] - bias.shape[0]  # zero-computation slots of a bias of length E get 0
        choice_TA = choice_TA + (F.pad(bias, (0, missing)) if missing else bias)
    if rules.num_expert_group is not None and rules.topk_group is not None:
        choice_TA = torch.where(logits_TA == float("-inf"), float("-inf"), choice_TA)
        choice_TA = _limit_to_groups(choice_TA, rules.num_expert_group, rules.topk_group, bias is not None)
    ids_TK = topk_ids(choice_TA, logits_TA.detach(), rules.top_k)
    weights_TK = scores_TA.gather(1, ids_TK)
    weights_TK = renormalized(weights_TK, ids_TK, rules.renormalize, rules.num_experts, rules.null_ranges)
    if rules.routed_scaling_factor != 1.0:
        weights_TK = weights_TK * rules.routed_scaling_factor
    return weights_TK, ids_TK


def _select_on_cpu(logits_TA: Tensor, rules: RoutingRules, bias: Tensor | None) -> Choice:
    mode = rules.renormalize
    plain = rules.scoring_func == "softmax" and mode != "nonnull" and rules.num_expert_group is None
    if plain and takes_select_few(logits_TA):
        dropped = rules.num_experts if mode == "real" else logits_TA.shape[1]
        return select_few(logits_TA, bias, rules.top_k, dropped, mode != "none", rules.routed_scaling_factor)
    return _select_by_torch(logits_TA, rules, bias)


def _select_by_triton(logits_TA: Tensor, rules: RoutingRules, bias: Tensor | None) -> Choice:
    if triton_routing.takes_select_experts(logits_TA, rules):
        return triton_routing.select_experts(logits_TA, rules, bias)
    return _select_by_torch(logits_TA, rules, bias)


# --- experts: from an ExpertsInput to weighted sums [T, H] ---


def _coefficients(given: ExpertsInput) -> tuple[Tensor, Tensor | None]:
    return affine_coefficients(
        given.weights_TK,
        given.ids_TK,
        num_experts=given.num_experts,
        kinds=given.kinds,
        params=given.params,
        constant_logits_TC2=given.constant_logits_TC2,
    )


def _affine_terms(given: ExpertsInput) -> AffineTerms:
    alpha_T, beta_TC = _coefficients(given)
    # A NaN anywhere in a token's x makes its alpha NaN, so that alpha * x is NaN in every column, whatever was chosen.
    alpha_T = alpha_T.masked_fill(given.x_TH.detach().amax(-1).isnan(), float("nan"))
    return AffineTerms(alpha_T, beta_TC, given.params.constant_value)


def _bound(given: ExpertsInput) -> int:
    """Return what ids lie below; without a number of slots the kinds end at HIGHEST_ID, and so do the ids."""
    return HIGHEST_ID if given.num_slots is None else given.num_slots


def _infer_on_cpu(given: ExpertsInput) -> Tensor:
    bound = _bound(given)
    x_TH, weights_TK, ids_TK, w13, w2 = given[:5]
    identities = count_identities(given.kinds)
    if identities and ops.takes_moe_ffn_few(x_TH, ids_TK, w13, w2, given.activation):
        return ops.moe_ffn_few(x_TH, weights_TK, ids_TK, w13, w2, identities, bound)
    return ops.moe_ffn_from_ids(x_TH, weights_TK, ids_TK, w13, w2, _affine_terms(given), bound, given.activation)


def _train_on_cpu(given: ExpertsInput) -> Tensor:
    plan = make_plan(given.ids_TK, given.num_experts, _bound(given))
    terms = _affine_terms(given)
    return ops.moe_ffn(given.x_TH, given.weights_TK, plan, given.w13, given.w2, terms, given.activation)


def _experts_by_torch(given: ExpertsInput) -> Tensor:
    plan = make_plan(given.ids_TK, given.num_experts, _bound(given))
    terms = _affine_terms(given)
    return ops.moe_ffn_grouped(given.x_TH, given.weights_TK, plan, given.w13, given.w2, terms, given.activation)


def _infer_by_triton(given: ExpertsInput) -> Tensor:
    """Compute the experts by Triton's kernels, which find NaN tokens themselves while they read x."""
    T, K = given.ids_TK.shape
    block_m = triton_experts.rows_per_tile(T, K, given.num_slots or given.num_experts)
    codes = kernel_kinds(given.kinds)
    *plan, alpha_T, beta_TC = triton_experts.plan_tiles(
        given.weights_TK,
        given.ids_TK,
        num_experts=given.num_experts,
        num_slots=-1 if given.num_slots is None else given.num_slots,
        block_m=block_m,
        kinds=codes or (),
        scale_S=given.params.scale,
        constant_logits_TC2=None if codes is None else given.constant_logits_TC2,
    )
    if codes is None:  # one of the kinds is not in affine.CODES
        terms = _affine_terms(given)
    else:
        value_CH = given.params.constant_value
        terms = AffineTerms(alpha_T, None if value_CH is None else beta_TC, value_CH)
    return triton_experts.moe_ffn_tiles(
        given.x_TH, given.weights_TK, plan, block_m, given.w13, given.w2, terms, given.activation
    )


def _train_by_triton(given: ExpertsInput) -> Tensor:
    """Compute the experts by Triton's differentiable operator, whose kernels find NaN tokens too."""
    T, K = given.ids_TK.shape
    block_m = triton_experts.training_rows_per_tile(T, K, given.num_slots or given.num_experts)
    *plan, _, _ = triton_experts.plan_tiles(
        given.weights_TK.detach(),
        given.ids_TK,
        num_experts=given.num_experts,
        num_slots=-1 if given.num_slots is None else given.num_slots,
        block_m=block_m,
        kinds=(),
        scale_S=None,
        constant_logits_TC2=None,
    )
    terms = AffineTerms(*_coefficients(given), given.params.constant_value)
    return triton_experts.moe_ffn_tiles_train(
        given.x_TH, given.weights_TK, plan, block_m, given.w13, given.w2, terms, given.activation, given.main_grads
    )


@dataclass(frozen=True)
class Backend:
    """One way to compute a layer, from hidden states to the weighted sums of its experts.

    name: what `backend=` takes, the key in BACKENDS. about: a line for `zemoe doctor`.
    devices: the device types that it runs on, None for all. dtypes: those of x, w13 and w2 that it takes.
    router_logits: from x [T, H] and the router's weight [R, H] to float32 logits [T, R].
    select: from float32 logits [T, A], rules and a float32 bias to weights [T, K] and ids [T, K].
    infer: from an ExpertsInput to weighted sums [T, H], where no gradient is wanted.
    train: the same where gradients are wanted; None for a backend without a backward pass.
    most_experts: the largest E that it takes, None for any. missing: a package that it needs and that is not installed.
    lacks: returns what a device lacks for it, "" for nothing. adds_main_grads: it adds gradients to `main_grad`.
    """

    name: str
    about: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    router_logits: Callable[[Tensor, Tensor], Tensor]
    select: Callable[[Tensor, RoutingRules, Tensor | None], Choice]
    infer: Callable[[ExpertsInput], Tensor]
    train: Callable[[ExpertsInput], Tensor] | None
    most_experts: int | None = None
    missing: str | None = None
    lacks: Callable[[torch.device], str] | None = None
    adds_main_grads: bool = False


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(
        name="cpu",
        about="our own dispatch for CPUs",
        devices=("cpu",),
        dtypes=_FLOATS,
        router_logits=_logits_by_torch,
        select=_select_on_cpu,
        infer=_infer_on_cpu,
        train=_train_on_cpu,
    ),
    "triton": Backend(
        name="triton",
        about="fused kernels for NVIDIA GPUs",
        devices=("cuda",),
        dtypes=triton_experts.DTYPES,
        router_logits=_logits_by_triton,
        select=_select_by_triton,
        infer=_infer_by_triton,
        train=_train_by_triton,
        most_experts=triton_experts.MOST_EXPERTS,
        missing=None if library.HAS_TRITON else "triton",
        lacks=library.lacks_for_triton,
        adds_main_grads=True,
    ),
    "torch": Backend(
        name="torch",
        about="sort and torch grouped_mm, any device",
        devices=None,
        dtypes=_FLOATS,
        router_logits=_logits_by_torch,
        select=_select_by_torch,
        infer=_experts_by_torch,
        train=_experts_by_torch,
    ),
}


def check_backend(name: str | None) -> None:
    """Raise ValueError for a name that is not in BACKENDS."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)}, got {name!r}")


def _unmet(
    backend: Backend, device: torch.device, dtype: torch.dtype | None, gradients: bool, num_experts: int
) -> str | None:
    """Return what the backend needs and does not have there, or None if it can work."""
    if backend.devices is not None and device.type not in backend.devices:
        return f"a device of {backend.devices}, got {device.type!r}"
    if dtype is not None and dtype not in backend.dtypes:
        return f"a dtype of {backend.dtypes}, got {dtype}"
    if backend.missing is not None:
        return f"the package {backend.missing}: pip install 'zemoe[{backend.missing}]'"
    if backend.lacks is not None and (lacking := backend.lacks(device)):
        return lacking
    if backend.most_experts is not None and num_experts > backend.most_experts:
        return f"num_experts <= {backend.most_experts}, got {num_experts}"
    if gradients and backend.train is None:
        return "torch.no_grad(): it has no backward pass"
    return None


def resolve_backend(
    device: torch.device | str,
    dtype: torch.dtype | None,
    name: str | None = None,
    *,
    gradients: bool = False,
    num_experts: int = 0,
) -> Backend:
    """Return the backend called `name`, or the first of BACKENDS that can work on `device` in `dtype`.

    Args:
        dtype: of the experts, or None if only routing is asked for.
        name: a name in BACKENDS, or None.
        gradients: whether the backend has to have a backward pass.
        num_experts: E.

    Raises:
        ValueError: for an unknown name, or one that cannot work there, with the reason.
    """
    device = torch.device(device)
    check_backend(name)
    reasons = []
    for backend in BACKENDS.values() if name is None else (BACKENDS[name],):
        unmet = _unmet(backend, device, dtype, gradients, num_experts)
        if unmet is None:
            return backend
        reasons.append(f"backend {backend.name!r} needs {unmet}")
    raise ValueError("; ".join(reasons))


def backend_of(hidden_states: Tensor, num_experts: int, asked: str | Backend | None = None) -> Backend:
    """Return the backend of a layer with E = `num_experts` for this input: `asked`, or the first that can compute it.

    It can if it takes the dtype of hidden_states [..., H] (autocast's, under autocast), and, while gradients are
    enabled, has a backward pass. A Backend is returned as it is.

    Raises:
        ValueError: as `resolve_backend`, and for hidden states that are no float [..., H] tensor.
    """
    if isinstance(asked, Backend):
        return asked
    if hidden_states.ndim < 1 or not hidden_states.is_floating_point():
        raise ValueError(
            f"hidden_states must be a float [..., H] tensor, got {hidden_states.dtype} {tuple(hidden_states.shape)}"
        )
    device, dtype = hidden_states.device, hidden_states.dtype
    if dtype != torch.float64:
        dtype = autocast_dtype(device) or dtype
    return resolve_backend(device, dtype, asked, gradients=torch.is_grad_enabled(), num_experts=num_experts)


def routing_backend(tensor: Tensor, asked: str | Backend | None = None) -> Backend:
    """Return the backend that routes outside of a layer: `asked`, or the first that works on the tensor's device.

    Raises:
        ValueError: as `resolve_backend`.
    """
    return asked if isinstance(asked, Backend) else resolve_backend(tensor.device, None, asked)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast casts float tensors of this device to (never float64 ones); None if it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
