"""fused_experts: everything after routing, from weights and ids alone; and which backend computes it.

T tokens, H hidden size, I expert width, E FFN experts, K choices, C constant experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .affine import AffineParams, affine_coefficients, check_kinds, check_params
from .config import ZeroExpertKinds, check_count, expand_kinds
from .plan import RoutingPlan, make_plan

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ALL_HIGHER_IDS = 2**31 - 1


@dataclass(frozen=True)
class Backend:
    """One way to compute `moe_ffn`.

    name: what `backend=` takes. moe_ffn: the op. devices: device types it runs on, None for all.
    dtypes: of x and weights. about: one line for people. moe_ffn_from_ids: plan and op in one, where no gradient is
    wanted, or None.
    """

    name: str
    moe_ffn: Callable[..., Tensor]
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    about: str
    moe_ffn_from_ids: Callable[..., Tensor] | None = None


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(
        name="cpu",
        moe_ffn=ops.moe_ffn,
        devices=("cpu",),
        dtypes=_FLOATS,
        about="our own dispatch for CPUs",
        moe_ffn_from_ids=ops.moe_ffn_from_ids,
    ),
    "torch": Backend(
        name="torch",
        moe_ffn=ops.moe_ffn_grouped,
        devices=None,
        dtypes=_FLOATS,
        about="sort and torch grouped_mm, any device",
    ),
}


def resolve_backend(device: torch.device | str, dtype: torch.dtype, name: str | None = None) -> Backend:
    """The backend called `name`, or the first of BACKENDS that can work on `device` in `dtype`.

    Raises:
        ValueError: for an unknown name, or one that cannot work there, with the reason.
    """
    device_type = torch.device(device).type
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)}, got {name!r}")
    reasons = []
    for backend in BACKENDS.values() if name is None else (BACKENDS[name],):
        if backend.devices is not None and device_type not in backend.devices:
            reasons.append(f"backend {backend.name!r} needs a device of {backend.devices}, got {device_type!r}")
        elif dtype not in backend.dtypes:
            reasons.append(f"backend {backend.name!r} needs a dtype of {backend.dtypes}, got {dtype}")
        else:
            return backend
    raise ValueError("; ".join(reasons))


def moe_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation called `name`; ValueError for an unknown one."""
    if name not in ops.ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ops.ACTIVATIONS)}, got {name!r}")
    return ops.ACTIVATIONS[name].forward


def _check_tensors(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, num_experts: int
) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit together; x is [T, H] already."""
    T, H = x.shape
    if w13.ndim != 3 or w13.shape[0] != num_experts or w13.shape[2] != H or w13.shape[1] % 2:
        raise ValueError(f"w13 must have shape [E={num_experts}, 2I, H={H}], got {tuple(w13.shape)}")
    width = w13.shape[1] // 2
    if tuple(w2.shape) != (num_experts, H, width):
        raise ValueError(f"w2 must have shape [E={num_experts}, H={H}, I={width}], got {tuple(w2.shape)}")
    if topk_ids.ndim != 2 or topk_ids.shape[0] != T:
        raise ValueError(f"topk_ids must have shape [T={T}, K], got {tuple(topk_ids.shape)}")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights must have the shape of topk_ids {tuple(topk_ids.shape)}, got {tuple(topk_weights.shape)}"
        )
    if not topk_weights.is_floating_point():
        raise ValueError(f"topk_weights must be floating point, got {topk_weights.dtype}")
    for name, tensor in (("w13", w13), ("w2", w2)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of hidden_states {x.dtype}, got {tensor.dtype}")
    for name, tensor in (("w13", w13), ("w2", w2), ("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of hidden_states {x.device}, got {tensor.device}")


def _kinds_and_bound(kinds: str | Sequence[tuple[str, int]], num_experts: int) -> tuple[ZeroExpertKinds, int | None]:
    """Canonical kinds, and the number of slots where the kinds say it."""
    if isinstance(kinds, str):
        # Named by one kind alone: every id from num_experts on is of that kind.
        return expand_kinds(kinds, _ALL_HIGHER_IDS - num_experts), None
    expanded = expand_kinds(kinds)
    return expanded, num_experts + sum(count for _, count in expanded)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, as it would do for a matmul."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def moe_ffn(
    x_TH: Tensor,
    topk_weights_TK: Tensor,
    plan: RoutingPlan,
    w13: Tensor,
    w2: Tensor,
    affine: tuple[Tensor, Tensor | None, Tensor | None],
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """The weighted sums of the planned FFN rows plus the affine terms (alpha_T, beta_TC, value_CH): [T, H].

    See zemoe.ops.moe_ffn for shapes and dtypes, which are not checked here again.
    """
    chosen = resolve_backend(x_TH.device, x_TH.dtype, backend)
    return chosen.moe_ffn(
        x_TH, topk_weights_TK, plan.row_token_N, plan.slot_row_MK, plan.expert_offsets, w13, w2, *affine, activation
    )


def fused_experts(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    num_experts: int,
    zero_expert_kinds: str | Sequence[tuple[str, int]],
    affine_params: AffineParams | None = None,
    activation: str = "silu",
    backend: str | None = None,
    constant_logits: Tensor | None = None,
) -> Tensor:
    """y_t = sum_k weight_tk * expert_{id_tk}(x_t), FFN and zero-computation experts together (SPEC section 2).

    Args:
        hidden_states: [..., H], float32, bfloat16, float16 or float64.
        w13: [E, 2I, H], gate rows first, of the same dtype. w2: [E, H, I], likewise.
        topk_weights: [T, K] float, computed in float32 (float64 with float64 hidden states); T is the product of
            the leading sizes.
        topk_ids: [T, K] int32 or int64. Ids 0..E-1 are FFN experts, from E on zero-computation experts, -1 is skipped.
        num_experts: E.
        zero_expert_kinds: (kind, count) pairs in id order, or one kind for all ids from E on.
        affine_params: what constant and scaled_identity experts learn, or None.
        activation: "silu", "gelu" or "gelu_tanh".
        backend: a name in BACKENDS, or None for the first that works on this device and dtype.
        constant_logits: [T, C, 2] float32, W_j x where the caller has it already; computed here otherwise.

    Returns:
        [..., H] in the dtype of hidden_states (autocast's, under autocast). A token with a NaN is NaN as a whole.
        Differentiable in hidden_states, topk_weights, w13, w2 and affine_params.

    Raises:
        ValueError: for a shape, dtype, device, name or count that does not fit, naming it; on the CPU also for an id
            that names no slot (elsewhere such a choice is skipped).
    """
    if hidden_states.ndim < 1 or not hidden_states.is_floating_point():
        raise ValueError(
            f"hidden_states must be a float [..., H] tensor, got {hidden_states.dtype} {tuple(hidden_states.shape)}"
        )
    check_count("num_experts", num_experts, 0)
    params = affine_params or AffineParams()
    kinds, num_slots = _kinds_and_bound(zero_expert_kinds, num_experts)
    if isinstance(zero_expert_kinds, str) and zero_expert_kinds in ("constant", "scaled_identity"):
        learned = params.constant_value if zero_expert_kinds == "constant" else params.scale
        if learned is None:
            raise ValueError(f"affine_params must hold what the kind {zero_expert_kinds!r} learns, got {affine_params}")
        kinds, num_slots = _kinds_and_bound(((zero_expert_kinds, learned.shape[0]),), num_experts)
    check_kinds(kinds)
    moe_activation(activation)
    x_TH, w13, w2 = _autocast(hidden_states.reshape(-1, hidden_states.shape[-1]), w13, w2)
    check_params(kinds, params, x_TH.shape[1])
    _check_tensors(x_TH, w13, w2, topk_weights, topk_ids, num_experts)

    weights_TK = topk_weights.to(torch.promote_types(x_TH.dtype, torch.float32))
    if params.constant_router is not None and constant_logits is None:
        with ops.without_autocast(x_TH.device):
            rows = params.constant_router.to(weights_TK.dtype).flatten(0, 1)
            constant_logits = torch.nn.functional.linear(x_TH.to(weights_TK.dtype), rows).unflatten(1, (-1, 2))
    alpha_T, beta_TC = affine_coefficients(
        weights_TK, topk_ids, num_experts=num_experts, kinds=kinds, params=params, constant_logits_TC2=constant_logits
    )
    # The affine terms carry a lost token: NaN * x is NaN in every column, whatever was chosen.
    alpha_T = alpha_T.masked_fill(x_TH.detach().amax(-1).isnan(), float("nan"))
    affine = (alpha_T, beta_TC, params.constant_value)
    from_ids = resolve_backend(x_TH.device, x_TH.dtype, backend).moe_ffn_from_ids
    differentiable = (x_TH, weights_TK, w13, w2, *affine)
    trained = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable)
    if from_ids is not None and not trained:
        bound = -1 if num_slots is None else num_slots
        return from_ids(x_TH, weights_TK, topk_ids, w13, w2, *affine, bound, activation).view(hidden_states.shape)
    plan = make_plan(topk_ids, num_experts, num_slots)
    y_TH = moe_ffn(x_TH, weights_TK, plan, w13, w2, affine, activation=activation, backend=backend)
    return y_TH.view(hidden_states.shape)
