"""fused_experts: everything after routing, from weights and ids alone; and which backend computes it.

T tokens, H hidden size, I expert width, E FFN experts, K choices, C constant experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._compat import reshape_without_view
from .affine import AffineParams, affine_coefficients, check_kinds, check_params, kernel_kinds
from .config import ZeroExpertKinds, check_count, expand_kinds
from .kernels.activations import ACTIVATIONS
from .ops import experts as ops
from .ops import library, triton_experts
from .plan import RoutingPlan, make_plan

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAIN_GRADS = (torch.float32, torch.bfloat16, torch.float16)  # more than float32 sums have is nothing to add to
_ALL_HIGHER_IDS = 2**31 - 1


class Call(NamedTuple):
    """What a layer computes once it is routed; checked, x [T, H], weights [T, K] in float32 (float64 with float64 x).

    num_slots: A, or None where any id from num_experts on is a slot. kinds: canonical, in id order.
    constant_logits_TC2: W_j x of the constant experts, or None. main_grads: what the gradients of w13 and w2 are added
    to instead of being returned, each None where they are.
    """

    x_TH: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    w13: Tensor
    w2: Tensor
    num_experts: int
    num_slots: int | None
    kinds: ZeroExpertKinds
    params: AffineParams
    constant_logits_TC2: Tensor | None
    activation: str
    main_grads: tuple[Tensor | None, Tensor | None]


def _coefficients(call: Call) -> tuple[Tensor, Tensor | None]:
    return affine_coefficients(
        call.weights_TK,
        call.ids_TK,
        num_experts=call.num_experts,
        kinds=call.kinds,
        params=call.params,
        constant_logits_TC2=call.constant_logits_TC2,
    )


def _affine(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(alpha_T, beta_TC, value_CH) of the zero-computation experts."""
    alpha_T, beta_TC = _coefficients(call)
    # The affine terms carry a lost token: NaN * x is NaN in every column, whatever was chosen.
    alpha_T = alpha_T.masked_fill(call.x_TH.detach().amax(-1).isnan(), float("nan"))
    return alpha_T, beta_TC, call.params.constant_value


def _infer_cpu(call: Call) -> Tensor:
    bound = -1 if call.num_slots is None else call.num_slots
    x_TH, ids_TK, w13, w2 = call.x_TH, call.ids_TK, call.w13, call.w2
    if (
        len(call.kinds) == 1
        and call.kinds[0][0] == "identity"
        and ops.takes_few(x_TH, ids_TK, w13, w2, call.activation)
    ):
        return ops.moe_ffn_few(x_TH, call.weights_TK, ids_TK, w13, w2, call.kinds[0][1], bound)
    return ops.moe_ffn_from_ids(
        call.x_TH, call.weights_TK, call.ids_TK, call.w13, call.w2, *_affine(call), bound, call.activation
    )


def _infer_triton(call: Call) -> Tensor:
    """Lost tokens are found by the kernels that read x anyway."""
    T, K = call.ids_TK.shape
    slots = call.num_slots or call.num_experts
    block_m = triton_experts.rows_per_tile(T, K, slots)
    codes = kernel_kinds(call.kinds)
    *plan, alpha_T, beta_TC = triton_experts.plan_tiles(
        call.weights_TK,
        call.ids_TK,
        num_experts=call.num_experts,
        num_slots=-1 if call.num_slots is None else call.num_slots,
        block_m=block_m,
        kinds=codes or (),
        scale_S=call.params.scale,
        constant_logits_TC2=None if codes is None else call.constant_logits_TC2,
    )
    if codes is None:  # a kind that the kernel has no code for
        affine = _affine(call)
    else:
        affine = alpha_T, None if call.params.constant_value is None else beta_TC, call.params.constant_value
    return triton_experts.moe_ffn_tiles(
        call.x_TH, call.weights_TK, plan, block_m, call.w13, call.w2, affine, call.activation
    )


def _train_triton(call: Call) -> Tensor:
    """Lost tokens are found by the kernels here too."""
    T, K = call.ids_TK.shape
    slots = call.num_slots or call.num_experts
    block_m = triton_experts.training_rows_per_tile(T, K, slots)
    *plan, _, _ = triton_experts.plan_tiles(
        call.weights_TK.detach(),
        call.ids_TK,
        num_experts=call.num_experts,
        num_slots=-1 if call.num_slots is None else call.num_slots,
        block_m=block_m,
        kinds=(),
        scale_S=None,
        constant_logits_TC2=None,
    )
    affine = *_coefficients(call), call.params.constant_value
    return triton_experts.moe_ffn_tiles_train(
        call.x_TH, call.weights_TK, plan, block_m, call.w13, call.w2, affine, call.activation, call.main_grads
    )


@dataclass(frozen=True)
class Backend:
    """One way to compute a layer.

    name: what `backend=` takes. about: one line for people. devices: device types it runs on, None for all.
    dtypes: of x and weights. moe_ffn: the differentiable op over a RoutingPlan, or None. infer: the layer from weights
    and ids, where no gradient is wanted, or None for a plan and moe_ffn. train: likewise where one is wanted.
    most_experts: E, or None for any. missing: the package that it needs and that is not installed.
    """

    name: str
    about: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    moe_ffn: Callable[..., Tensor] | None
    infer: Callable[[Call], Tensor] | None = None
    train: Callable[[Call], Tensor] | None = None
    most_experts: int | None = None
    missing: str | None = None


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(
        name="cpu",
        about="our own dispatch for CPUs",
        devices=("cpu",),
        dtypes=_FLOATS,
        moe_ffn=ops.moe_ffn,
        infer=_infer_cpu,
    ),
    "triton": Backend(
        name="triton",
        about="fused kernels for NVIDIA GPUs",
        devices=("cuda",),
        dtypes=triton_experts.DTYPES,
        moe_ffn=None,
        infer=_infer_triton,
        train=_train_triton,
        most_experts=triton_experts.MOST_EXPERTS,
        missing=None if library.HAS_TRITON else "triton",
    ),
    "torch": Backend(
        name="torch",
        about="sort and torch grouped_mm, any device",
        devices=None,
        dtypes=_FLOATS,
        moe_ffn=ops.moe_ffn_grouped,
    ),
}


def check_backend(name: str | None) -> None:
    """Raise ValueError for a name that is not in BACKENDS."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)}, got {name!r}")


def _lacks(device: torch.device | str) -> str:
    """What a CUDA device lacks to run our kernels. Asked only where CUDA is in use, and not while code is traced."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return ""  # asking would initialise CUDA, and a process that did may not fork
    return library.why_not(torch.device(device))


def resolve_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    name: str | None = None,
    *,
    gradients: bool = False,
    planned: bool = False,
    num_experts: int = 0,
) -> Backend:
    """The backend called `name`, or the first of BACKENDS that can work on `device` in `dtype`.

    Args:
        gradients: it has to be differentiable. planned: over a RoutingPlan that is there already. num_experts: E.

    Raises:
        ValueError: for an unknown name, or one that cannot work there, with the reason.
    """
    device_type = torch.device(device).type
    check_backend(name)
    reasons = []
    for backend in BACKENDS.values() if name is None else (BACKENDS[name],):
        needs = f"backend {backend.name!r} needs"
        if backend.devices is not None and device_type not in backend.devices:
            reasons.append(f"{needs} a device of {backend.devices}, got {device_type!r}")
        elif dtype not in backend.dtypes:
            reasons.append(f"{needs} a dtype of {backend.dtypes}, got {dtype}")
        elif backend.missing is not None:
            reasons.append(f"{needs} the package {backend.missing}: pip install 'zemoe[{backend.missing}]'")
        elif backend.name == "triton" and _lacks(device):
            reasons.append(f"{needs} {_lacks(device)}")
        elif backend.most_experts is not None and num_experts > backend.most_experts:
            reasons.append(f"{needs} num_experts <= {backend.most_experts}, got {num_experts}")
        elif planned and backend.moe_ffn is None:
            reasons.append(f"{needs} fused_experts, where it makes a plan of its own")
        elif gradients and backend.moe_ffn is None and backend.train is None:
            reasons.append(f"{needs} torch.no_grad() or inputs without requires_grad: it has no backward pass")
        else:
            return backend
    raise ValueError("; ".join(reasons))


def moe_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation called `name`; ValueError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name].forward


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


def _main_grads(w13: Tensor, w2: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Their attributes `main_grad`, where they have any; ValueError for one that a gradient can't be added to."""
    found = []
    for name, weight in (("w13", w13), ("w2", w2)):
        main = getattr(weight, "main_grad", None)
        if main is not None and not (
            isinstance(main, Tensor)
            and main.dtype in _MAIN_GRADS
            and main.shape == weight.shape
            and main.device == weight.device
            and main.is_contiguous()
            and not main.requires_grad
        ):
            got = f"{main.dtype} {tuple(main.shape)} on {main.device}" if isinstance(main, Tensor) else repr(main)
            raise ValueError(
                f"{name}.main_grad must be a contiguous tensor of shape {tuple(weight.shape)} on {weight.device}, of a "
                f"dtype of {_MAIN_GRADS}, without requires_grad, got {got}"
            )
        found.append(main)
    return found[0], found[1]


def _check_main_grads(backend: str, *, kept: bool, leaves: bool) -> None:
    """ValueError unless the backend adds gradients to main_grad.

    kept: w13 and w2 are used as they were given. leaves: those with a main_grad are no results of other tensors.
    """
    what = "w13.main_grad and w2.main_grad are filled by the backend 'triton' alone"
    if backend != "triton":
        raise ValueError(f"{what}, and this layer runs on {backend!r}; remove the attributes")
    if not kept:
        raise ValueError(f"{what}, of weights in the dtype that is computed in, and autocast casts them")
    if not leaves:
        raise ValueError(f"{what}, of parameters: a weight made of other tensors would pass no gradient on to them")
    if torch.compiler.is_compiling():
        raise ValueError(f"{what}, and not in compiled code; remove the attributes or don't compile the layer")


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


def unflatten(y_TH: Tensor, shape: torch.Size) -> Tensor:
    """The rows of a layer as `shape` [..., H], without a copy and yet no view.

    Callers add to a layer's output in place. If it were a view, what FSDP hangs on it would be lost then, and with it
    the reduction of the gradients.
    """
    return y_TH if len(shape) == 2 else reshape_without_view(y_TH, shape)


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

    See zemoe.ops.experts.moe_ffn for shapes and dtypes, which are not checked here again.
    """
    chosen = resolve_backend(x_TH.device, x_TH.dtype, backend, gradients=True, planned=True)
    assert chosen.moe_ffn is not None
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
    """y_t = sum_k weight_tk * expert_{id_tk}(x_t), FFN and zero-computation experts together.

    What it computes: docs/specification.md, "FFN experts", "Zero-computation experts" and what follows them there.

    Args:
        hidden_states: [..., H], float32, bfloat16, float16 or float64.
        w13: [E, 2I, H], gate rows first, of the same dtype. w2: [E, H, I], likewise. With an attribute `main_grad`, a
            float32 or 16-bit tensor of its shape, a parameter's gradient is added to that, in float32 sums rounded once
            to its dtype, and `.grad` stays as it is (backend "triton", not compiled): by every backward that passes,
            one of torch.autograd.grad with respect to other tensors included. Hooks of the parameter see None.
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
        RuntimeError: in forward-mode differentiation, torch.vmap, and torch.func's grad, vjp and their like.
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
    given, main_grads = (w13, w2), _main_grads(w13, w2)
    x_TH, w13, w2 = _autocast(hidden_states.reshape(-1, hidden_states.shape[-1]), w13, w2)
    check_params(kinds, params, x_TH.shape[1])
    _check_tensors(x_TH, w13, w2, topk_weights, topk_ids, num_experts)

    weights_TK = topk_weights.to(torch.promote_types(x_TH.dtype, torch.float32))
    if params.constant_router is not None and constant_logits is None:
        with library.without_autocast(x_TH.device):
            rows = params.constant_router.to(weights_TK.dtype).flatten(0, 1)
            constant_logits = torch.nn.functional.linear(x_TH.to(weights_TK.dtype), rows).unflatten(1, (-1, 2))
    call = Call(
        x_TH,
        weights_TK,
        topk_ids,
        w13,
        w2,
        num_experts,
        num_slots,
        kinds,
        params,
        constant_logits,
        activation,
        main_grads,
    )
    differentiable = (x_TH, weights_TK, w13, w2, *params, constant_logits)
    library.refuse_transforms(*differentiable)
    trained = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable)
    chosen = resolve_backend(x_TH.device, x_TH.dtype, backend, gradients=trained, num_experts=num_experts)
    if trained and any(main is not None for main in main_grads):  # `!=` would compare tensors, which can't be traced
        leaves = all(main is None or weight.is_leaf for weight, main in zip(given, main_grads, strict=True))
        _check_main_grads(chosen.name, kept=w13 is given[0] and w2 is given[1], leaves=leaves)
    whole = chosen.train if trained else chosen.infer
    if whole is not None:
        return unflatten(whole(call), hidden_states.shape)
    plan = make_plan(topk_ids, num_experts, num_slots)
    y_TH = moe_ffn(x_TH, weights_TK, plan, w13, w2, _affine(call), activation=activation, backend=chosen.name)
    return unflatten(y_TH, hidden_states.shape)
