"""Tensors that are views: strided, transposed, expanded, or from the middle of a storage, against contiguous copies.

Whatever lies between a view's elements is NaN or an impossible id here, so that reading it shows.
T tokens, H hidden size, I expert width, E FFN experts, A slots, K choices, N = T * K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from helpers.judge import Case, one_thread
from zemoe import AffineParams, fused_experts
from zemoe.integrations.engines.from_logits import moe_from_logits, select_from_logits
from zemoe.plan import make_plan
from zemoe.routing import router_logits, select_experts

OPS = torch.ops.zemoe
KINDS = (("constant", 2), ("identity", 2), ("scaled_identity", 1), ("zero", 1))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def _junk(shape: tuple[int, ...], tensor: Tensor) -> Tensor:
    return torch.full(shape, float("nan") if tensor.is_floating_point() else 2**30, dtype=tensor.dtype)


def _every_second(tensor: Tensor) -> Tensor:
    """Of a tensor twice as wide in its last dimension."""
    return torch.stack([tensor, _junk(tuple(tensor.shape), tensor)], -1).flatten(-2)[..., ::2]


def _part(tensor: Tensor) -> Tensor:
    """The first columns of a wider table, as a caller has that keeps the best of its choices; of one entry a column."""
    wide = torch.cat([tensor, _junk((*tensor.shape[:-1], 3), tensor)], -1)
    return wide[..., : tensor.shape[-1]]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def _offset(tensor: Tensor) -> Tensor:
    """In one piece, from the middle of a storage on, at no multiple of a vector."""
    whole = torch.cat([_junk((3,), tensor), tensor.flatten(), _junk((5,), tensor)])
    return whole[3 : 3 + tensor.numel()].view(tensor.shape)


def _same_rows(tensor: Tensor) -> Tensor:
    return tensor[:1].clone().expand(tensor.shape)


def _same_columns(tensor: Tensor) -> Tensor:
    return tensor[..., :1].clone().expand(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__.removeprefix("_"): function
    for function in (_every_second, _part, _transposed, _offset, _same_rows, _same_columns)
}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """As near as another order of the sums brings it."""
    for mine, other in zip(got, wanted, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        if not other.is_floating_point() or not other.numel():
            assert torch.equal(mine, other)
            continue
        eps = 4 * torch.finfo(other.dtype).eps if other.dtype != torch.float32 else 1e-5
        assert (mine.double() - other.double()).abs().max() <= eps * other.double().abs().max()


def _case(T: int, kinds: tuple[tuple[str, int], ...] = KINDS, K: int = 3) -> Case:
    return Case("layouts", "", T=T, H=16, I=8, E=4, kinds=kinds, K=K)


# ------------------------------------------------------------------------------------------------------ fused_experts


def _experts(tensors: list[Tensor], case: Case, backend: str, grad_TH: Tensor | None) -> tuple[Tensor, ...]:
    """The output, and with grad_TH the gradients of all that is no id."""
    trained = [tensor.detach().requires_grad_(grad_TH is not None and tensor.is_floating_point()) for tensor in tensors]
    x, w13, w2, weights, ids, *affine = trained
    params = AffineParams(*affine) if affine else None
    rules = {"num_experts": case.E, "zero_expert_kinds": case.kinds, "affine_params": params, "backend": backend}
    out = fused_experts(x, w13, w2, weights, ids, **rules)
    if grad_TH is None:
        return (out,)
    leaves = [tensor for tensor in trained if tensor.requires_grad]
    return out.detach(), *torch.autograd.grad(out, leaves, grad_TH)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("T", "K", "identity", "dtype"),
    [
        (1, 3, True, torch.float32),
        (7, 1, True, torch.bfloat16),
        (7, 3, False, torch.float32),
        (50, 3, True, torch.bfloat16),
        (100, 1, False, torch.float32),
    ],
    ids=str,
)
def test_fused_experts(T: int, K: int, identity: bool, dtype: torch.dtype, trained: bool, backend: str, layout: str):
    """Every operand in turn, then all of them; few and many choices go separate ways, as does one choice a token."""
    case = _case(T, (("identity", 3),) if identity else KINDS, K)
    inputs = case.inputs(dtype)
    tensors = [*inputs[:5], *(inputs.affine or ())]
    change = LAYOUTS[layout]
    grad_TH = torch.randn(T, case.H, generator=torch.Generator().manual_seed(2)).to(dtype) if trained else None
    for changed in [*([i] for i in range(len(tensors))), list(range(len(tensors)))]:
        views = [change(tensor) if i in changed else tensor for i, tensor in enumerate(tensors)]
        grad = None if grad_TH is None else change(grad_TH) if len(changed) > 1 else grad_TH
        plain_grad = None if grad is None else _plain(grad)
        wanted = _experts([_plain(view) for view in views], case, backend, plain_grad)
        assert_same(_experts(views, case, backend, grad), wanted)


def test_one_choice_of_two():
    """The case that was found: 200 tokens, of whose two choices the caller keeps the first."""
    E, H, I = 8, 32, 16
    generator = torch.Generator().manual_seed(0)
    weights, ids = torch.randn(200, E, generator=generator).softmax(-1).topk(2)
    x, w13 = torch.randn(200, H, generator=generator), torch.randn(E, 2 * I, H, generator=generator)
    w2 = torch.randn(E, H, I, generator=generator)
    rules = {"num_experts": E, "zero_expert_kinds": ()}
    got = fused_experts(x, w13, w2, weights[:, :1], ids[:, :1], **rules)
    assert torch.equal(got, fused_experts(x, w13, w2, weights[:, 0, None].clone(), ids[:, 0, None].clone(), **rules))


# ------------------------------------------------------------------------------------------------------------ routing


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 40, 1300])  # one loop, an operator each, another loop
def test_routing(T: int, dtype: torch.dtype, layout: str):
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(T, 32, generator=generator).to(dtype), torch.randn(32, generator=generator)
    change = LAYOUTS[layout]
    for view, view_of_bias in ((change(logits), bias), (logits, change(bias)), (change(logits), change(bias))):
        for rules in ({}, {"scoring_func": "sigmoid", "num_expert_group": 4, "topk_group": 2}):
            how = {"num_experts": 20, **rules}
            got = select_experts(view, 3, e_score_correction_bias=view_of_bias, **how)
            assert_same(got, select_experts(_plain(view), 3, e_score_correction_bias=_plain(view_of_bias), **how))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_router(layout: str):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 16, generator=generator), torch.randn(9, 16, generator=generator)
    change = LAYOUTS[layout]
    for views in ((change(x), weight), (x, change(weight)), (change(x), change(weight))):
        assert_same((router_logits(*views),), (router_logits(*map(_plain, views)),))


# ---------------------------------------------------------------------------------------------------------- operators


def _calls() -> dict[str, tuple]:
    """Each operator with arguments that fit: for the CPU's own, those that its compiled loops take."""
    case = _case(40, (("constant", 2), ("identity", 2)))
    x, w13, w2, weights, ids, _ = case.inputs()
    generator = torch.Generator().manual_seed(1)
    alpha, beta = torch.randn(case.T, generator=generator), torch.randn(case.T, 2, generator=generator)
    value, logits = torch.randn(2, case.H, generator=generator), torch.randn(case.T, case.A, generator=generator)
    bias = torch.randn(case.A, generator=generator)
    plan = make_plan(ids, case.E)
    layer = (x, weights, plan.row_token_N, plan.slot_row_MK, plan.expert_offsets, w13, w2, alpha, beta, value)
    out, preact = OPS.moe_ffn(*layer, "silu", True)
    grad = torch.randn(out.shape, generator=generator)
    rows = OPS.gather_rows(x, plan.row_token_N, plan.slot_row_MK)
    rows = rows.masked_fill((torch.arange(len(rows)) >= plan.expert_offsets[-1])[:, None], 0)
    few = case.K * 4
    return {
        "moe_ffn": (*layer, "silu", True),
        "moe_ffn_backward": (grad, *layer, preact, "silu", [True] * 7),
        "moe_ffn_from_ids": (x, weights, ids, w13, w2, alpha, beta, value, case.A, "silu"),
        "moe_ffn_few": (x[:few], weights[:few], ids[:few], w13, w2, 4, case.A),
        "plan": (ids, case.E, case.A),
        "topk_ids": (logits, logits.roll(1), case.K),
        "select_few": (logits, bias, case.K, case.A, True, 1.0),
        "gather_rows": (x, plan.row_token_N, plan.slot_row_MK),
        "sum_rows": (rows, plan.slot_row_MK, plan.row_token_N),
        "grouped_linear": (rows, w13, plan.expert_offsets),
        "grouped_outer": (rows, rows.roll(1, 1), plan.expert_offsets),
        select_from_logits.__name__: (logits, bias, case.K, case.E, 1.0),
        moe_from_logits.__name__: (x, logits, bias, w13, w2, case.K, 1.0, True),
    }


def _results(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize(
    "layout", ["every_second", "part", "transposed", "offset"]
)  # of equal rows no plan can be made
@pytest.mark.parametrize("op", list(_calls()))
def test_operator(op: str, layout: str):
    """Each tensor in turn, and what a compiler is told about the result's strides."""
    if op in ("moe_ffn_few", "select_few"):
        pytest.importorskip("numba")
    arguments, function = _calls()[op], getattr(OPS, op)
    wanted = _results(function(*arguments))
    for i in (i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)):
        changed = [*arguments[:i], LAYOUTS[layout](arguments[i]), *arguments[i + 1 :]]
        assert_same(_results(function(*changed)), wanted)
        torch.library.opcheck(function.default, tuple(changed), test_utils="test_faketensor")


def test_every_operator_is_here():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "zemoe::" in name}
    on_gpu = {"plan_tiles", "router_logits", "router_logits_backward", "select_experts", "select_experts_backward"}
    on_gpu |= {"moe_ffn_tiles", "moe_ffn_tiles_train", "moe_ffn_tiles_backward", "moe_ffn_tiles_backward_"}
    assert names == set(_calls()) | on_gpu


def test_no_pointer_into_strided_memory():
    """The net below the operators: a loop that gets a view by mistake says so instead of reading what lies beside."""
    pytest.importorskip("numba")
    from zemoe.kernels.cpu import compiled

    with pytest.raises(ValueError, match=r"contiguous, got shape \(4, 1\) with strides \(2, 1\)"):
        compiled.array(torch.zeros(4, 2)[:, :1])
