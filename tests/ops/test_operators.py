"""The operators at their own boundary: what torch asks of a custom op, and gradients against finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from helpers.judge import BY_NAME, Case
from zemoe.affine import AffineTerms
from zemoe.integrations.engines import from_logits
from zemoe.ops import experts as ops
from zemoe.ops.routing import topk_ids
from zemoe.plan import RoutingPlan, make_plan

pytestmark = pytest.mark.usefixtures("poisoned_empty")

OPS = torch.ops.zemoe
# float64 differences need small shapes: T 5, H 6, I 4.
SMALL = [
    Case("ffn", "FFN rows and no affine part", T=5, H=6, I=4, E=3, kinds=(), K=2),
    Case("mixed", "FFN rows, alpha and beta", T=5, H=6, I=4, E=3, kinds=(("constant", 2), ("identity", 1)), K=3),
    Case("rowless", "an expert without rows and skipped choices", T=3, H=6, I=4, E=5, kinds=(("identity", 2),), K=2),
    Case("no_ffn", "no FFN experts at all", T=4, H=6, I=4, E=0, kinds=(("constant", 3),), K=2),
    Case("none", "T = 0", T=0, H=6, I=4, E=3, kinds=(("constant", 1),), K=2),
]


def arguments(case: Case, dtype: torch.dtype = torch.float64, activation: str = "silu", grad: bool = True) -> list:
    """x, weights, plan x 3, w13, w2, alpha, beta, value, activation; leaves that require grad."""
    inputs = case.inputs(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    plan = make_plan(inputs.ids_TK, case.E)
    generator = torch.Generator().manual_seed(1)

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().requires_grad_(grad)

    constants = case.count("constant")
    beta = value = None
    if constants:
        beta = leaf(torch.randn(case.T, constants, generator=generator).to(wide))
        value = leaf(torch.randn(constants, case.H, generator=generator).to(wide))
    return [
        leaf(inputs.x_TH),
        leaf(inputs.weights_TK.to(wide)),
        plan.row_token_N,
        plan.slot_row_MK,
        plan.expert_offsets,
        leaf(inputs.w13),
        leaf(inputs.w2),
        leaf(torch.randn(case.T, generator=generator).to(wide)),
        beta,
        value,
        activation,
    ]


def of_tensors(op, x, weights, *rest):
    """`moe_ffn` of what `arguments` returns, one tensor after the other."""
    *plan, w13, w2, alpha, beta, value, activation = rest
    return op(x, weights, RoutingPlan(*plan), w13, w2, AffineTerms(alpha, beta, value), activation)


class TestOpcheck:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    @pytest.mark.parametrize("save_preact", [False, True])
    def test_moe_ffn(self, case, dtype, save_preact):
        torch.library.opcheck(OPS.moe_ffn.default, (*arguments(case, dtype), save_preact))

    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    @pytest.mark.parametrize("needs", [[True] * 7, [False] * 7, [True, False, False, True, True, False, False]])
    @pytest.mark.parametrize("save_preact", [False, True])
    def test_moe_ffn_backward(self, case, needs, save_preact):
        *tensors, activation = arguments(case, torch.float32, grad=False)
        needs = [need and (i < 5 or bool(case.count("constant"))) for i, need in enumerate(needs)]
        out, preact = OPS.moe_ffn(*tensors, activation, save_preact)
        torch.library.opcheck(
            OPS.moe_ffn_backward.default, (torch.randn_like(out), *tensors, preact, activation, needs)
        )

    @pytest.mark.parametrize("form", ["strided x", "strided weights"])
    def test_moe_ffn_of_strided_tensors(self, form):
        args = arguments(SMALL[1], torch.float32, grad=False)
        if form == "strided x":
            args[0] = args[0].T.contiguous().T
        else:
            args[5], args[6] = args[5].mT.contiguous().mT, args[6].mT.contiguous().mT
        for i in (0, 1, 5, 6):
            args[i].requires_grad_()
        torch.library.opcheck(OPS.moe_ffn.default, (*args, True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("rows", [0, 1, 7])
    def test_grouped_linear(self, dtype, rows):
        left = torch.randn(rows, 6, dtype=dtype).requires_grad_()
        weight = torch.randn(3, 4, 6, dtype=dtype).requires_grad_()
        offsets = torch.tensor([0, 0, min(rows, 3), min(rows, 5)])
        torch.library.opcheck(OPS.grouped_linear.default, (left, weight, offsets))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("rows", [0, 1, 7])
    def test_grouped_outer(self, dtype, rows):
        left, right = torch.randn(rows, 6, dtype=dtype), torch.randn(rows, 4, dtype=dtype)
        offsets = torch.tensor([0, 0, min(rows, 3), min(rows, 5)])
        torch.library.opcheck(OPS.grouped_outer.default, (left, right, offsets))

    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_gather_and_sum_rows(self, case, dtype):
        x, _, row_token, slot_row, *_ = arguments(case, dtype)
        torch.library.opcheck(OPS.gather_rows.default, (x, row_token, slot_row))
        rows = torch.randn(len(row_token), case.H).to(dtype).requires_grad_()
        torch.library.opcheck(OPS.sum_rows.default, (rows, slot_row, row_token))

    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
    def test_plan(self, case, dtype):
        torch.library.opcheck(OPS.plan.default, (case.inputs().ids_TK.to(dtype), case.E, case.A))

    @pytest.mark.parametrize("shape", [(0, 5), (1, 5), (9, 5)])
    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_topk_ids(self, shape, k):
        choice = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0)).float()
        torch.library.opcheck(OPS.topk_ids.default, (choice, None, k))
        torch.library.opcheck(OPS.topk_ids.default, (choice, choice.roll(1), k))

    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_moe_ffn_from_ids(self, case, dtype):
        x, weights, *_, w13, w2, alpha, beta, value, activation = arguments(case, dtype, grad=False)
        ids = case.inputs().ids_TK
        args = (x, weights, ids, w13, w2, alpha, beta, value, case.A, activation)
        torch.library.opcheck(OPS.moe_ffn_from_ids.default, args)

    @pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
    def test_moe_ffn_few(self, ids_dtype):
        pytest.importorskip("numba")
        case = SMALL[0]
        given = case.inputs()
        x, w13, w2, weights, ids = given[:5]
        args = (x, weights, ids.to(ids_dtype), w13, w2, case.A - case.E, case.A)
        torch.library.opcheck(OPS.moe_ffn_few.default, args)

    def test_every_op_is_here(self):
        """An op that somebody adds has to be checked too."""
        names = {
            name.split("::")[1].split(".")[0]
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("zemoe::")
        }
        tested = {
            "moe_ffn",
            "moe_ffn_backward",
            "moe_ffn_few",
            "moe_ffn_from_ids",
            "grouped_linear",
            "grouped_outer",
            "gather_rows",
            "sum_rows",
        }
        tested |= {"plan", "select_few", "topk_ids"}  # select_few: tests/kernels/cpu/test_loops.py
        on_gpu = {"router_logits", "select_experts", "plan_tiles", "moe_ffn_tiles"}  # tests/kernels/triton/test_gpu.py
        # tests/kernels/triton/test_backward_operators.py, tests/kernels/triton/test_select_experts_backward.py
        trained = {"moe_ffn_tiles_train", "moe_ffn_tiles_backward", "moe_ffn_tiles_backward_"}
        trained |= {"router_logits_backward", "select_experts_backward"}
        # tests/integrations/engines/test_from_logits.py
        for_engines = {op.__name__ for op in (from_logits.moe_from_logits, from_logits.select_from_logits)}
        assert names == tested | on_gpu | trained | for_engines


class TestGradcheck:
    @pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    @pytest.mark.parametrize("op", [ops.moe_ffn, ops.moe_ffn_grouped], ids=["moe_ffn", "moe_ffn_grouped"])
    def test_moe_ffn(self, op, case, activation):
        args = arguments(case, activation=activation)
        leaves = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.requires_grad]

        def function(*values):
            merged = list(args)
            for i, value in zip(leaves, values, strict=True):
                merged[i] = value
            return of_tensors(op, *merged)

        # The cpu kernel adds a token's rows in one fixed order, so a difference between runs is an error.
        assert gradcheck(function, [args[i] for i in leaves], nondet_tol=0.0)

    @pytest.mark.parametrize("wanted", [(0,), (1,), (5,), (6,), (7,), (8,), (9,), (0, 6), (1, 7)])
    def test_some_of_the_gradients(self, wanted):
        args = arguments(SMALL[1])
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                arg.requires_grad_(i in wanted)

        def function(*values):
            merged = list(args)
            for i, value in zip(wanted, values, strict=True):
                merged[i] = value
            return of_tensors(ops.moe_ffn, *merged)

        assert gradcheck(function, [args[i] for i in wanted], nondet_tol=0.0)

    def test_without_saved_preactivations(self):
        """The backward then computes them again."""
        args = arguments(SMALL[1])
        assert gradcheck(lambda x, w13: OPS.moe_ffn(x, *args[1:5], w13, *args[6:], False)[0], (args[0], args[5]))

    def test_grouped_linear(self):
        rows = torch.randn(7, 6, dtype=torch.float64).requires_grad_()
        weight = torch.randn(3, 4, 6, dtype=torch.float64).requires_grad_()
        offsets = torch.tensor([0, 2, 2, 5])
        assert gradcheck(lambda rows, weight: OPS.grouped_linear(rows, weight, offsets), (rows, weight))

    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    def test_gather_and_sum_rows(self, case):
        """As far as a row has a choice: what nobody's rows hold and get doesn't matter, as long as it stays there."""
        x, _, row_token, slot_row, offsets, *_ = arguments(case)
        held = (torch.arange(len(row_token)) < offsets[-1])[:, None]
        assert gradcheck(lambda x: OPS.gather_rows(x, row_token, slot_row).masked_fill(~held, 0.0), x)
        rows = torch.randn(len(row_token), case.H, dtype=torch.float64).requires_grad_()
        assert gradcheck(lambda rows: OPS.sum_rows(rows.masked_fill(~held, 0.0), slot_row, row_token), rows)

    def test_grouped_outer(self):
        left = torch.randn(7, 6, dtype=torch.float64).requires_grad_()
        right = torch.randn(7, 4, dtype=torch.float64).requires_grad_()
        offsets = torch.tensor([0, 2, 2, 5])
        assert gradcheck(lambda left, right: OPS.grouped_outer(left, right, offsets), (left, right))

    def test_the_cpu_op_refuses_a_second_derivative(self):
        """Its backward is written out by hand and has none of its own; it must not be silently left out."""
        args = arguments(SMALL[0])
        (first,) = torch.autograd.grad(of_tensors(ops.moe_ffn, *args).square().sum(), args[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(first.square().sum(), args[0])

    def test_the_torch_backend_has_a_second_derivative(self):
        args = arguments(SMALL[1])
        assert gradgradcheck(
            lambda x, weights, w13, w2: of_tensors(ops.moe_ffn_grouped, x, weights, *args[2:5], w13, w2, *args[7:]),
            (args[0], args[1], args[5], args[6]),
        )


class TestTopkIds:
    @pytest.mark.parametrize("values", [(0.0, 1.0), (-1.0, 0.0, 1.0), (0.5,), (-float("inf"), 0.0, 2.0)])
    @pytest.mark.parametrize("k", [1, 2, 5, 6])
    def test_all_small_rows(self, values, k):
        choice = torch.tensor(list(itertools.product(values, repeat=6)))
        rows = [sorted(range(6), key=lambda i: (-row[i], i))[:k] for row in choice.tolist()]
        assert topk_ids(choice, None, k).tolist() == rows

    @pytest.mark.parametrize("A", [1, 2, 33, 256, 1000])
    def test_against_a_stable_sort(self, A):
        choice = torch.randint(0, 50, (64, A), generator=torch.Generator().manual_seed(A)).float() / 7
        k = min(12, A)
        expected = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(topk_ids(choice, None, k), expected)

    def test_extreme_values(self):
        row = torch.tensor([[1e-45, -1e-45, 3e38, -3e38, 0.0, -0.0, 1e-38, float("inf"), -float("inf")]])
        assert topk_ids(row, None, 9).tolist() == [[7, 2, 6, 0, 4, 5, 1, 3, 8]]

    def test_nan_rows_stay_in_range_and_alone(self):
        choice = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
        expected = topk_ids(choice, None, 6)
        choice[1, 3], choice[3] = float("nan"), float("nan")
        ids = topk_ids(choice, None, 6)
        assert ((ids >= 0) & (ids < 40)).all()
        assert all(len(set(row)) == 6 for row in ids.tolist())
        assert torch.equal(ids[::2], expected[::2])

    def test_the_gpu_way_is_the_same(self):
        from zemoe.kernels import topk

        choice = torch.randint(-20, 20, (200, 96), generator=torch.Generator().manual_seed(0)).float() / 3
        choice[0, :50] = -0.0
        choice[1, ::2] = -float("inf")
        choice[2] = -float("inf")
        assert torch.equal(topk.by_integer_keys(choice, None, 12), topk.by_repair(choice, None, 12))
        logits = choice.roll(7, 1).masked_fill(choice > 5, -float("inf"))
        assert torch.equal(topk.by_integer_keys(choice, logits, 12), topk.by_repair(choice, logits, 12))

    @pytest.mark.parametrize("A", [700, 768, 831, 832])
    @pytest.mark.parametrize("spoiled", [False, True])
    def test_one_tie_at_the_end_of_the_choice(self, A, spoiled):
        """The 12th largest value stands twice, in one row of many: at every width on both sides of counting."""
        choice = torch.rand(40, A, generator=torch.Generator().manual_seed(A))
        order = choice[17].sort(descending=True, stable=True).indices
        choice[17, order[-1]] = choice[17, order[11]]
        rows = torch.arange(40)
        if spoiled:  # a NaN's row has fewer values in reach, and must not hide the tie
            choice[3, :30], rows = float("nan"), rows[rows != 3]
        expected = choice[rows].sort(dim=-1, descending=True, stable=True).indices[:, :12]
        assert torch.equal(topk_ids(choice, None, 12)[rows], expected)

    def test_a_masked_slot_is_the_last_resort(self):
        choice, logits = torch.tensor([[0.9, 0.8, 0.1, 0.2]]), torch.tensor([[-float("inf"), 1.0, 0.0, -float("inf")]])
        assert topk_ids(choice, logits, 3).tolist() == [[1, 2, 0]]
        assert topk_ids(choice, None, 3).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("device", ["CUDA", "XPU", "MPS", "PrivateUse1"])
@pytest.mark.parametrize("op", ["topk_ids", "plan", "gather_rows", "sum_rows", "grouped_linear", "grouped_outer"])
def test_what_the_torch_backend_needs_is_there_for_any_device(op, device):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"zemoe::{op}", device)


def test_the_plan_of_both_devices_is_the_same():
    from zemoe.kernels import grouped

    for case in (*SMALL, BY_NAME["skips"], BY_NAME["heavy_skew"], BY_NAME["many_experts"]):
        ids = case.inputs().ids_TK
        for mine, other in zip(ops.plan(ids, case.E, case.A), grouped.make_plan(ids, case.E, case.A), strict=True):
            assert torch.equal(mine, other) and mine.dtype == torch.int64
