"""What stands between the operators of the triton backend and its kernels: strides, alignment, shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.judge import Case, assert_bitwise, judge
from helpers.memory import moved, pretend_hopper, strided

pytest.importorskip("triton")
from zemoe.affine import AffineParams, kernel_kinds
from zemoe.ops import library, triton_experts, triton_routing

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes NaN with numpy
]

CASE = Case("learned", "kinds that read a parameter", T=6, kinds=(("constant", 2), ("scaled_identity", 2)), K=5)


@pytest.fixture(autouse=True)
def _a_hopper(device, monkeypatch):
    pretend_hopper(device, monkeypatch)


@pytest.mark.parametrize("length", [8, 12])
def test_bias(length: int, device: str) -> None:
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).to(device)
    bias = torch.randn(length, generator=torch.Generator().manual_seed(1)).to(device)

    def select(bias: Tensor) -> tuple[Tensor, Tensor]:
        return triton_routing._select_experts_cuda(logits, bias, 3, 8, "softmax", "none", 1.0, 0, 0, [])

    for given, same in ((strided(bias), bias), (bias[:1].expand(length), bias[:1].repeat(length))):
        for left, right in zip(select(given), select(same), strict=True):
            assert_bitwise(left, right)


@pytest.mark.parametrize("T", [1, 9])
def test_router_of_one_column(T: int, device: str) -> None:
    """contiguous() leaves a dimension of size 1 whatever stride it has."""
    x, weight = torch.randn(T, 3).half().to(device), torch.randn(5, 3).to(device)
    x, weight = (rows.T.contiguous().T[:, :1] for rows in (x, weight))
    assert x.stride(1) == max(T, 1) and weight.stride(1) == 5
    expected = x.float() * weight[:, 0]
    torch.testing.assert_close(triton_routing._router_logits_cuda(x, weight), expected, rtol=1e-4, atol=1e-6)


def run(inputs, affine: AffineParams, constant_logits: Tensor, block_m: int = 16) -> Tensor:
    x, w13, w2, weights, ids = inputs[:5]
    codes = [number for pair in kernel_kinds(CASE.kinds) for number in pair]
    *plan, alpha, beta = triton_experts._plan_tiles_cuda(
        weights, ids, CASE.E, CASE.A, block_m, codes, affine.scale, constant_logits
    )
    return triton_experts._moe_ffn_tiles_cuda(
        x, weights, *plan, block_m, w13, w2, alpha, beta, affine.constant_value, "silu"
    )


def prepared(device: str):
    inputs = CASE.inputs(torch.float16)
    logits = (inputs.x_TH.float() @ inputs.affine.constant_router.flatten(0, 1).T).unflatten(1, (-1, 2))
    affine = AffineParams(*(parameter.to(device) for parameter in inputs.affine))
    return (
        inputs._replace(**{name: getattr(inputs, name).to(device) for name in inputs._fields[:5]}),
        affine,
        logits.to(device),
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs, affine: (inputs._replace(w2=moved(inputs.w2)), affine),
        lambda inputs, affine: (inputs._replace(w13=moved(inputs.w13)), affine),
        lambda inputs, affine: (inputs._replace(x_TH=strided(inputs.x_TH)), affine),
        lambda inputs, affine: (inputs, affine._replace(scale=strided(affine.scale))),
        lambda inputs, affine: (inputs, affine._replace(constant_value=strided(affine.constant_value))),
    ],
    ids=["w2 off alignment", "w13 off alignment", "x strided", "scale strided", "value strided"],
)
def test_alignment_and_strides(change, device: str) -> None:
    inputs, affine, logits = prepared(device)
    exact, own = (CASE.reference(CASE.inputs(torch.float16), dtype) for dtype in (torch.float64, torch.float16))
    judge(run(*change(inputs, affine), logits).cpu(), exact, own)


def test_constant_logits(device: str) -> None:
    inputs, affine, logits = prepared(device)
    rounded = logits.bfloat16()
    assert_bitwise(run(inputs, affine, rounded), run(inputs, affine, rounded.float()))
    for wrong in (logits[:1], logits[:, :1], logits.flatten(1), None):
        got = "None" if wrong is None else str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"constant_logits must have shape \(6, 2, 2\), got {got}"):
            run(inputs, affine, wrong)


def test_more_choices_than_int32_counts(device: str) -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device).expand(2**16, 2**15)
    with pytest.raises(ValueError, match="topk_ids must have fewer than"):
        triton_experts._plan_tiles_cuda(ids[:1].float(), ids, 1, 1, 16, [], None, None)


def test_rows_of_a_matrix_lie_apart(device: str) -> None:
    """So an expanded x takes the kernels, and gets the bits, of its copy."""
    one, many = torch.randn(1, 24, device=device), torch.randn(5, 48, device=device)
    for matrix in (one, many, many[:, :24], one[:, :8]):
        assert library.with_rows(matrix) is matrix
    for matrix in (one.expand(5, -1), many.T, one[:, :1].expand(5, 1), many.flatten().as_strided((5, 24), (8, 1))):
        copy = library.with_rows(matrix)
        assert copy.stride() == (matrix.shape[1], 1) and torch.equal(copy, matrix)
