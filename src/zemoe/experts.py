"""fused_experts: everything after routing, from weights and ids alone.

T tokens, H hidden size, I expert width, E FFN experts, K choices, C constant experts.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._compat import reshape_without_view
from .affine import NO_PARAMS, AffineParams, check_kinds, check_params, kinds_of_all_ids
from .backends import Backend, ExpertsInput, autocast_dtype, backend_of
from .config import MoEConfig, ZeroExpertKinds, check_count, expand_kinds
from .kernels.activations import ACTIVATIONS
from .ops import library
from .routing import Routing

# Dtypes of a weight's `main_grad`. Not float64: the sums that are added to it are float32.
_MAIN_GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def moe_activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation called `name`; raise ValueError for an unknown one."""
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
    """Return the attribute `main_grad` of each, or None; raise ValueError for one that no gradient can be added to."""
    found = []
    for name, weight in (("w13", w13), ("w2", w2)):
        main = getattr(weight, "main_grad", None)
        if main is not None and not (
            isinstance(main, Tensor)
            and main.dtype in _MAIN_GRAD_DTYPES
            and main.shape == weight.shape
            and main.device == weight.device
            and main.is_contiguous()
            and not main.requires_grad
        ):
            got = f"{main.dtype} {tuple(main.shape)} on {main.device}" if isinstance(main, Tensor) else repr(main)
            raise ValueError(
                f"{name}.main_grad must be a contiguous tensor of shape {tuple(weight.shape)} on {weight.device}, of a "
                f"dtype of {_MAIN_GRAD_DTYPES}, without requires_grad, got {got}"
            )
        found.append(main)
    return found[0], found[1]


def _check_main_grads(backend: Backend, *, kept: bool, leaves: bool) -> None:
    """Raise ValueError unless the backend adds gradients to main_grad, and may do so here.

    kept: w13 and w2 are used as they were given, not cast. leaves: those with a main_grad are leaves of the graph.
    """
    what = "w13.main_grad and w2.main_grad are filled by the backend 'triton' alone"
    if not backend.adds_main_grads:
        raise ValueError(f"{what}, and this layer runs on {backend.name!r}; remove the attributes")
    if not kept:
        raise ValueError(f"{what}, of weights in the dtype that is computed in, and autocast casts them")
    if not leaves:
        raise ValueError(f"{what}, of parameters: a weight made of other tensors would pass no gradient on to them")
    if torch.compiler.is_compiling():
        raise ValueError(f"{what}, and not in compiled code; remove the attributes or don't compile the layer")


def _kinds_and_slots(
    kinds: str | Sequence[tuple[str, int]], num_experts: int, params: AffineParams
) -> tuple[ZeroExpertKinds, int | None]:
    """Return canonical kinds, checked, and the number of slots A; None for A where a kind has no limit."""
    if isinstance(kinds, str):
        expanded, num_slots = kinds_of_all_ids(kinds, num_experts, params)
    else:
        expanded = expand_kinds(kinds)
        num_slots = num_experts + sum(count for _, count in expanded)
    check_kinds(expanded)
    return expanded, num_slots


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, under autocast cast to its dtype as a matmul's arguments are; float64 stays."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def unflatten(y_TH: Tensor, shape: torch.Size) -> Tensor:
    """Return the rows of a layer as `shape` [..., H], in the same memory and yet not as a view.

    Callers add to a layer's output in place. Were it a view, adding would remove the hook that FSDP has registered on
    it, and gradients would not be reduced.
    """
    return y_TH if len(shape) == 2 else reshape_without_view(y_TH, shape)


def _constant_logits(params: AffineParams, x_TH: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return W_j x of the constant experts, [T, C, 2] in `dtype`, or None for a layer without them."""
    if params.constant_router is None:
        return None
    with library.without_autocast(x_TH.device):
        rows = params.constant_router.to(dtype).flatten(0, 1)
        return torch.nn.functional.linear(x_TH.to(dtype), rows).unflatten(1, (-1, 2))


def _compute(given: ExpertsInput, backend: Backend) -> Tensor:
    """Return [T, H] from tensors as a caller gave them: they are checked here, and cast under autocast."""
    main_grads = _main_grads(given.w13, given.w2)
    x_TH, w13, w2 = _autocast(given.x_TH, given.w13, given.w2)
    check_params(given.kinds, given.params, x_TH.shape[1])
    _check_tensors(x_TH, w13, w2, given.weights_TK, given.ids_TK, given.num_experts)
    weights_TK = given.weights_TK.to(torch.promote_types(x_TH.dtype, torch.float32))
    constant_logits = given.constant_logits_TC2
    if constant_logits is None:
        constant_logits = _constant_logits(given.params, x_TH, weights_TK.dtype)
    differentiable = (x_TH, weights_TK, w13, w2, *given.params, constant_logits)
    library.refuse_transforms(*differentiable)
    trained = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable)
    if trained and any(main is not None for main in main_grads):  # `!=` would compare tensors, which can't be traced
        weights = zip((given.w13, given.w2), main_grads, strict=True)
        leaves = all(main is None or weight.is_leaf for weight, main in weights)
        _check_main_grads(backend, kept=w13 is given.w13 and w2 is given.w2, leaves=leaves)
    compute = backend.train if trained else backend.infer
    assert compute is not None, "backend_of asks for gradients where they are on"
    checked = ExpertsInput(
        x_TH, weights_TK, given.ids_TK, w13, w2, *given[5:9], constant_logits, given.activation, main_grads
    )
    return compute(checked)


def weighted_experts(
    x_TH: Tensor,
    routing: Routing,
    w13: Tensor,
    w2: Tensor,
    config: MoEConfig,
    affine_params: AffineParams | None = None,
    constant_logits: Tensor | None = None,
    backend: str | Backend | None = None,
) -> Tensor:
    """Return what `fused_experts` does, [T, H], with the sizes, kinds and activation of `config`.

    The other arguments are those of `fused_experts`: x_TH are its hidden_states, `routing` has its weights and ids.
    """
    given = ExpertsInput(
        x_TH,
        routing.topk_weights_TK,
        routing.topk_ids_TK,
        w13,
        w2,
        config.num_experts,
        config.num_slots,
        config.zero_expert_kinds,
        affine_params or NO_PARAMS,
        constant_logits,
        config.activation,
    )
    return _compute(given, backend_of(x_TH, config.num_experts, backend))


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
    backend: str | Backend | None = None,
    constant_logits: Tensor | None = None,
) -> Tensor:
    """Compute y_t = sum_k weight_tk * expert_{id_tk}(x_t), over FFN and zero-computation experts together.

    The rules are in docs/specification.md, "FFN experts", "Zero-computation experts" and "Ids and skipped choices".

    Args:
        hidden_states: [..., H], float32, bfloat16, float16 or float64.
        w13: [E, 2I, H], gate rows first, of the dtype of hidden_states. w2: [E, H, I], likewise. The gradient of one
            that has an attribute `main_grad`, a float32 or 16-bit tensor of its shape, is added to that: in float32
            sums, rounded once to its dtype. `.grad` stays as it is, and hooks of the parameter see None. Every backward
            pass through here adds, also torch.autograd.grad with respect to other tensors. Only the backend "triton"
            does this, and not in compiled code.
        topk_weights: [T, K] float, computed in float32 (float64 with float64 hidden states); T is the product of
            the leading sizes.
        topk_ids: [T, K] int32 or int64. Ids 0..E-1 are FFN experts, from E on zero-computation experts, -1 is skipped.
        num_experts: E.
        zero_expert_kinds: (kind, count) pairs in id order, or one kind for all ids from E on.
        affine_params: what constant and scaled_identity experts learn, or None.
        activation: "silu", "gelu" or "gelu_tanh".
        backend: a name in BACKENDS, what `resolve_backend` returned, or None for the first that works here.
        constant_logits: [T, C, 2] float32, W_j x where the caller has it already; computed here otherwise.

    Returns:
        [..., H] in the dtype of hidden_states (autocast's, under autocast). A token with a NaN is NaN as a whole.
        Differentiable in hidden_states, topk_weights, w13, w2 and affine_params.

    Raises:
        ValueError: for a shape, dtype, device, name or count that does not fit, naming it; on the CPU also for an id
            that names no slot (elsewhere such a choice is skipped).
        RuntimeError: in forward-mode differentiation, torch.vmap, and torch.func's grad, vjp and their like.
    """
    chosen = backend_of(hidden_states, num_experts, backend)
    check_count("num_experts", num_experts, 0)
    params = affine_params or NO_PARAMS
    kinds, num_slots = _kinds_and_slots(zero_expert_kinds, num_experts, params)
    moe_activation(activation)
    x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    routed = x_TH, topk_weights, topk_ids, w13, w2
    given = ExpertsInput(*routed, num_experts, num_slots, kinds, params, constant_logits, activation)
    return unflatten(_compute(given, chosen), hidden_states.shape)
