"""Gradients of the Triton kernels: through the whole backend, operator by operator, and launcher by launcher.

float16 without a GPU: Triton 3.6's interpreter multiplies the bits of bfloat16 numbers, not their values. There the
operators of the backend are registered for the CPU as well, so that autograd, opcheck and torch.compile see them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from judge import BY_NAME, CASES, Case, assert_bitwise, judge
from memory import moved, pretend_hopper, strided
from test_experts import Reference, gradients, run
from test_triton_guard import Fence, bits, on_the_last, same_in_both, wild_ids

pytest.importorskip("triton")
from zemoe import AffineParams, experts, fused_experts, ops_triton, resolve_backend
from zemoe.kernels.triton import tiles
from zemoe.kernels.triton.backward import grad_preact, grad_rows, moe_ffn_backward, row_weights
from zemoe.kernels.triton.combine import grad_tokens
from zemoe.kernels.triton.forward import gate_up, moe_ffn
from zemoe.kernels.triton.grad_weight import grad_weight
from zemoe.kernels.triton.plan import prepare
from zemoe.kernels.triton.tiles import Backward, Product, Schedule

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes NaN with numpy
]
OPS = torch.ops.zemoe
NAN = float("nan")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
ROUNDINGS = 4 * torch.finfo(DTYPE).eps


def small(block_m: int, tma: bool, size: int = 16) -> tuple[Schedule, Backward]:
    """Tiles of which a Case takes several in each direction, and few fit."""
    m = min(block_m, 128)

    def product(*size: int, persistent: bool = False) -> Product:
        return Product(*size, 4, 2, tma, 3 if persistent else None, persistent)

    forward = Schedule(block_m, product(block_m, size, 2 * size), product(m, 2 * size, size, persistent=True), 64)
    weight = Product(size, 2 * size, 16, 4, 2, False)
    back = Backward(product(m, 2 * size, size), weight, product(m, size, 2 * size, persistent=True), 2 * size)
    return forward, back


@pytest.fixture(autouse=True)
def _on_this_device(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend runs on the CPU too where there is no GPU."""
    if device == "cuda":
        yield
        return
    takes_cpu = replace(experts.BACKENDS["triton"], devices=("cpu",), dtypes=(torch.float16,))
    monkeypatch.setitem(experts.BACKENDS, "triton", takes_cpu)
    with torch.library._scoped_library("zemoe", "IMPL") as library:
        library.impl("prepare", ops_triton._prepare_cuda, "CPU")
        library.impl("moe_ffn_tiles_train", ops_triton._moe_ffn_tiles_train_cuda, "CPU")
        library.impl("moe_ffn_tiles_backward", ops_triton._gradients, "CPU")
        library.impl("moe_ffn_tiles_backward_", ops_triton._gradients, "CPU")
        yield


def take(monkeypatch: pytest.MonkeyPatch, block_m: int, tma: bool, size: int = 16) -> None:
    forward, back = small(block_m, tma, size)
    monkeypatch.setattr(ops_triton, "training_rows_per_tile", lambda *_: block_m)
    monkeypatch.setattr(tiles, "schedule", lambda *_: forward)
    monkeypatch.setattr(tiles, "backward_schedule", lambda *_: back)


@pytest.fixture
def pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 16, False, 64)


def on(device: str, inputs):
    affine = inputs.affine and AffineParams(*(None if p is None else p.to(device) for p in inputs.affine))
    return inputs._replace(**{name: getattr(inputs, name).to(device) for name in inputs._fields[:5]}, affine=affine)


class Triton:
    dtype = None

    def __init__(self, case: Case, device: str, activation: str = "silu") -> None:
        self.case, self.device, self.activation = case, device, activation

    def __call__(self, inputs) -> Tensor:
        return run(self.case, on(self.device, inputs), "triton", activation=self.activation).cpu()


class OfActivation(Reference):
    activation = "silu"

    def __call__(self, inputs) -> Tensor:
        return self.case.reference(inputs, self.dtype, self.activation)


@functools.cache
def expected(case: Case, activation: str = "silu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sides = []
    for dtype in (torch.float64, DTYPE):
        compute = OfActivation(case, dtype)
        compute.activation = activation
        sides.append(gradients(case, DTYPE, compute))
    return sides[0], sides[1]


def check(case: Case, device: str, activation: str = "silu") -> None:
    exact, own = expected(case, activation)
    for name, grad in gradients(case, DTYPE, Triton(case, device, activation)).items():
        judge(grad, exact[name], own[name].to(grad.dtype), f"gradient of {name}")


# --------------------------------------------------------------------------------------------- values, by the backend


# The interpreter takes seconds for these, and others here are like them.
SLOW = ("wide", "many_rows", "many_experts", "constants", "scaled", "null", "no_zero_experts", "one_expert", "mixed")


@pytest.mark.parametrize(
    "case", [case for case in CASES if torch.cuda.is_available() or case.name not in SLOW], ids=lambda case: case.name
)
def test_pointers(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 16, False, 16 if case.name == "odd" else 64)
    check(case, device)


@pytest.mark.parametrize("name", ["plain", "empty_expert", "all_zero", "mixed"])
def test_descriptors(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 32, True, 32)
    check(BY_NAME[name], device)


@pytest.mark.parametrize("tma", [True, False])
def test_width_that_no_block_divides(tma: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 16, tma)
    check(Case("uneven", "blocks reach past H and I, into rows of somebody else", T=9, H=72, I=40, E=3), device)


@pytest.mark.parametrize("tma", [True, False])
def test_tall_tiles(tma: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 192, tma, 32)
    check(Case("tall", "192 rows a tile", T=140, H=24, I=16, E=1, kinds=(), K=1), device)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(activation: str, device: str, pointers: None) -> None:
    check(BY_NAME["plain"], device, activation)


# ---------------------------------------------------------------------------------------- what the backend does with it


FEW = Case("few", "quick, for values are judged elsewhere", T=5, H=20, I=12, E=3)


def leaves_of(
    case: Case, device: str, names: str = "x w13 w2 weights constant_value"
) -> tuple[dict[str, Tensor], dict]:
    """Leaves by name, those in `names` trained, and the other arguments of fused_experts."""
    inputs = on(device, case.inputs(DTYPE))
    leaves = {"x": inputs.x_TH, "w13": inputs.w13, "w2": inputs.w2, "weights": inputs.weights_TK}
    rest = {"ids": inputs.ids_TK, "affine": inputs.affine}
    if inputs.affine is not None:
        leaves["constant_value"] = inputs.affine.constant_value
    for name in names.split():
        if name in leaves:
            leaves[name].requires_grad_()
    return leaves, rest


def compute(case: Case, leaves: dict[str, Tensor], rest: dict, backend: str = "triton") -> Tensor:
    return fused_experts(
        leaves["x"], leaves["w13"], leaves["w2"], leaves["weights"], rest["ids"], num_experts=case.E,
        zero_expert_kinds=case.kinds, affine_params=rest["affine"], backend=backend,
    )  # fmt: skip


def upstream(case: Case, device: str) -> Tensor:
    return torch.randn(case.T, case.H, generator=torch.Generator().manual_seed(5)).to(DTYPE).to(device)


def test_the_same_bits_again(device: str, pointers: None) -> None:
    results = []
    for _ in range(2):
        leaves, rest = leaves_of(FEW, device)
        compute(FEW, leaves, rest).backward(upstream(FEW, device))
        results.append([leaf.grad for leaf in leaves.values()])
    for first, second in zip(*results, strict=True):
        assert_bitwise(first.cpu(), second.cpu())


@pytest.mark.parametrize("trained", ["x", "w13", "w2", "weights", "constant_value", "x weights", "w13 w2"])
def test_frozen_parts(trained: str, device: str, pointers: None) -> None:
    """They get no gradient, and what the others get does not depend on them; no pre-activation is kept for nothing."""
    case = Case("kinds", "every affine kind", T=4, E=2, kinds=(("constant", 1), ("identity", 1), ("zero", 1)), K=5)
    whole, rest = leaves_of(case, device)
    compute(case, whole, rest).backward(upstream(case, device))
    leaves, rest = leaves_of(case, device, trained)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = compute(case, leaves, rest)
    assert any(t.shape == (case.T * case.K, 2 * case.I) for t in saved) == (trained != "constant_value")
    out.backward(upstream(case, device))
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name not in trained.split())
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, whole[name].grad, rtol=ROUNDINGS, atol=ROUNDINGS)


@pytest.mark.parametrize("how", ["expanded", "transposed", "apart"])
def test_gradients_with_strides(how: str, device: str, pointers: None) -> None:
    case = FEW
    given = {
        "expanded": lambda: torch.ones((), dtype=DTYPE, device=device).expand(case.T, case.H),
        "transposed": lambda: upstream(case, device).T.contiguous().T,
        "apart": lambda: strided(upstream(case, device)),
    }[how]()
    results = []
    for grad in (given, given.contiguous()):
        leaves, rest = leaves_of(case, device)
        compute(case, leaves, rest).backward(grad)
        results.append([leaf.grad for leaf in leaves.values()])
    for first, second in zip(*results, strict=True):
        assert_bitwise(first.cpu(), second.cpu())


def test_tensors_elsewhere_in_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off alignment, with strides: the sizes that a GPU would take."""
    pretend_hopper(device, monkeypatch)
    case = Case("few", "small enough for large tiles", T=5, H=24, I=16, E=3)
    results = []
    for change in (lambda t: t, moved, strided):
        leaves, rest = leaves_of(case, device, "")
        leaves = {name: change(leaf).requires_grad_() for name, leaf in leaves.items()}
        grads = torch.autograd.grad(compute(case, leaves, rest), list(leaves.values()), upstream(case, device))
        results.append(grads)
    for grads in results[1:]:
        for grad, plain in zip(grads, results[0], strict=True):
            torch.testing.assert_close(grad, plain, rtol=ROUNDINGS, atol=ROUNDINGS)


def test_a_graph_that_is_kept(device: str, pointers: None) -> None:
    """What is saved may be overwritten by the last backward only."""
    case = FEW
    leaves, rest = leaves_of(case, device)
    out = compute(case, leaves, rest)
    want = list(leaves.values())
    first = torch.autograd.grad(out, want, upstream(case, device), retain_graph=True)
    second = torch.autograd.grad(out, want, upstream(case, device))
    for left, right in zip(first, second, strict=True):
        assert_bitwise(left.cpu(), right.cpu())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, want, upstream(case, device))


def test_checkpointing(device: str, pointers: None) -> None:
    case = FEW
    results = []
    for again in (False, True):
        leaves, rest = leaves_of(case, device)
        if again:
            out = torch.utils.checkpoint.checkpoint(compute, case, leaves, rest, use_reentrant=False)
        else:
            out = compute(case, leaves, rest)
        out.backward(upstream(case, device))
        results.append([leaf.grad for leaf in leaves.values()])
    for first, second in zip(*results, strict=True):
        assert_bitwise(first.cpu(), second.cpu())


def test_autocast(device: str, pointers: None) -> None:
    """float32 leaves, products in 16 bits, gradients in float32; the constants' own products stay in float32."""
    case, results = replace(FEW, kinds=(("constant", 2),)), []
    for cast in (True, False):
        leaves, rest = leaves_of(case, device, "")
        if cast:
            leaves = {name: leaf.float() for name, leaf in leaves.items()}
            rest["affine"] = rest["affine"]._replace(constant_value=leaves["constant_value"])
        for leaf in leaves.values():
            leaf.requires_grad_()
        with torch.autocast(device, DTYPE, enabled=cast):
            compute(case, leaves, rest).backward(upstream(case, device))
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
        results.append([leaf.grad.to(DTYPE) for leaf in leaves.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDINGS, atol=ROUNDINGS)


@pytest.mark.parametrize("where", ["x", "weight"])
def test_lost_tokens(where: str, device: str, pointers: None) -> None:
    """NaN in the same gradients as the torch backend's, and in no other."""
    kinds = (("identity", 3),) if where == "x" else (("constant", 1), ("identity", 2))  # a constant is NaN by itself
    case = Case("lost", "experts that no lost token chose", T=9, E=12, kinds=kinds, K=4)
    found = {}
    for backend in ("triton", "torch"):
        leaves, rest = leaves_of(case, device)
        with torch.no_grad():
            leaves["x" if where == "x" else "weights"][3, 1] = NAN
            leaves["x"][0] = NAN
            rest["ids"][5], leaves["x"][5, 4] = torch.tensor([-1, -1, case.A - 1, case.A - 2]), NAN  # identities alone
        compute(case, leaves, rest, backend).backward(upstream(case, device))
        found[backend] = {name: leaf.grad.cpu().float() for name, leaf in leaves.items()}
    for name, theirs in found["torch"].items():
        assert theirs.isnan().any() and (name == "constant_value" or not theirs.isnan().all()), name
        torch.testing.assert_close(
            found["triton"][name], theirs, rtol=4 * ROUNDINGS, atol=4 * ROUNDINGS, equal_nan=True
        )


def test_no_second_derivative(device: str, pointers: None) -> None:
    leaves, rest = leaves_of(FEW, device)
    out = compute(FEW, leaves, rest)
    (first,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.sum(), leaves["x"])


def test_large_layers_are_summed_in_slices(device: str, monkeypatch: pytest.MonkeyPatch, pointers: None) -> None:
    assert [tiles.training_slices(*size) for size in ((16384 * 12, 2048), (2048, 2048), (2**26, 24))] == [2, 1, 1]
    case, results = FEW, []
    for slices in (1, 2):
        monkeypatch.setattr(tiles, "training_slices", lambda *_, slices=slices: slices)
        leaves, rest = leaves_of(case, device)
        out = compute(case, leaves, rest)
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), upstream(case, device))])
    for one, two in zip(*results, strict=True):
        assert_bitwise(one.cpu(), two.cpu())


def test_who_gets_gradients_from_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes its own plan."""
    assert resolve_backend(device, DTYPE, "triton", gradients=True).name == "triton"
    if device == "cuda":
        assert resolve_backend(device, DTYPE, gradients=True).name == "triton"
    with pytest.raises(ValueError, match="makes a plan of its own"):
        resolve_backend(device, DTYPE, "triton", gradients=True, planned=True)
    monkeypatch.setitem(experts.BACKENDS, "triton", replace(experts.BACKENDS["triton"], train=None))
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\).* no backward pass"):
        resolve_backend(device, DTYPE, "triton", gradients=True)


# ------------------------------------------------------------------------------------------------------ the operators


def operator_arguments(case: Case, device: str, block_m: int = 16) -> list:
    inputs = on(device, case.inputs(DTYPE))
    plan = prepare(
        inputs.weights_TK, inputs.ids_TK, num_experts=case.E, num_slots=case.A, block_m=block_m, kinds=()
    )[:4]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    alpha, beta, value = (
        torch.randn(*s, generator=generator).to(device) for s in ((case.T,), (case.T, 2), (2, case.H))
    )
    trained = [inputs.x_TH, inputs.weights_TK, *plan, block_m, inputs.w13, inputs.w2, alpha, beta, value]
    return [t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in trained]


SMALL = Case(
    "small", "every row is somebody's: opcheck compares all of what is saved", T=3, H=16, I=8, E=2, kinds=(), K=2
)


@pytest.mark.parametrize("save_preact", [True, False])
def test_opcheck_forward(save_preact: bool, device: str, pointers: None) -> None:
    args = operator_arguments(SMALL, device)
    if not save_preact:
        for tensor in (args[0], args[1], args[7], args[8]):
            tensor.requires_grad_(False)
    which = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if (
        not save_preact
    ):  # else it compares, after a backward, what that backward has overwritten; see test_compiled_whole
        which.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.moe_ffn_tiles_train.default, (*args, None, None, "silu", save_preact), test_utils=which)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("moe_ffn_tiles_backward", [True] * 7),
        ("moe_ffn_tiles_backward", [False] * 7),
        ("moe_ffn_tiles_backward_", [True, False, False, True, True, False, True]),
    ],
)
def test_opcheck_backward(name: str, needs: list[bool], device: str, pointers: None) -> None:
    args = [t.detach() if isinstance(t, Tensor) else t for t in operator_arguments(SMALL, device)]
    out, preact = OPS.moe_ffn_tiles_train(*args, None, None, "silu", True)
    main_grads = (torch.zeros_like(args[7], dtype=torch.float32), None, True) if name.endswith("_") else ()
    torch.library.opcheck(
        getattr(OPS, name).default, (torch.randn_like(out), *args, preact, "silu", needs, *main_grads)
    )


def test_compiled_whole(device: str, pointers: None) -> None:
    case, results = Case("few", "an affine part", T=5, kinds=(("constant", 1), ("identity", 1)), K=4), []
    for compiled in (False, True):
        leaves, rest = leaves_of(case, device)
        function = functools.partial(compute, case, rest=rest)
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        function(leaves).backward(upstream(case, device))
        results.append([leaf.grad for leaf in leaves.values()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ the launchers


KINDS = (("identity", 2),)
FENCED = {
    "descriptors": (Case("d", "blocks reach past H and I", T=6, H=40, I=40, E=5, kinds=KINDS, K=4), 16, 0),
    "pointers": (Case("p", "odd H and I", T=6, H=37, I=19, E=5, kinds=KINDS, K=4), 16, 0),
    "unaligned": (Case("u", "memory off any alignment", T=6, H=40, I=40, E=5, kinds=KINDS, K=4), 64, 1),
    "two": (Case("t", "two tiles of an expert", T=70, H=24, I=16, E=1, kinds=(), K=1), 64, 0),
    "wild": (Case("w", "ids of no slot", T=6, H=40, I=24, E=5, kinds=KINDS, K=4, ids=wild_ids), 32, 0),
    "last": (Case("l", "all on the last", T=6, H=40, I=24, E=3, kinds=KINDS, K=3, ids=on_the_last), 16, 0),
}


@pytest.mark.parametrize("shape", FENCED)
def test_inside_fences(shape: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launcher between guard bands: see test_triton_guard. What rows of nobody hold differs between both runs."""
    pretend_hopper(device, monkeypatch)
    case, block_m, shift = FENCED[shape]
    inputs = case.inputs(DTYPE)
    alpha = torch.rand(case.T, generator=torch.Generator().manual_seed(1))

    def launch(fence: Fence) -> list[Tensor | None]:
        x, w13, w2, weights = (fence.around(inputs[i], gap=8 * (i == 0)) for i in range(4))
        dout, alpha_T = fence.around(upstream(case, "cpu"), gap=16), fence.around(alpha)
        made = prepare(
            weights, fence.around(inputs.ids_TK), num_experts=case.E, num_slots=case.A, block_m=block_m, kinds=()
        )
        row_token, slot_row, offsets, tile_lists = made[:4]
        how, back = tiles.schedule(block_m, case.T, case.K, w13, w2), tiles.backward_schedule(block_m, w13, w2)
        used, N = int(offsets[-1]), len(row_token)

        def untouched(what: str, *rows: Tensor) -> None:
            for made in rows:
                poison = torch.full_like(made[used:], fence.poison(made.dtype))
                assert torch.equal(bits(made[used:]), bits(poison)), f"{what} wrote rows that belong to nobody"

        preact = fence.empty(torch.empty(N, 2 * case.I, dtype=DTYPE))
        gate_up(x, row_token, offsets, tile_lists[0], w13, "silu", how.gate_up, preact)
        fence.check("gate_up", preact)
        kept, dpreact = preact.clone(), fence.empty(torch.empty(N, 2 * case.I, dtype=DTYPE))
        weight = row_weights(slot_row, weights)
        fence.check("row_weights", weight)
        rule = (dout, row_token, weight, offsets, tile_lists[-1], w2, preact)
        inner, partial = grad_preact(*rule, dpreact, "silu", back.preact, want_inner=True)
        fence.check("grad_preact", inner, partial)
        assert_bitwise(preact.cpu(), kept.cpu())
        untouched("grad_preact", preact, dpreact, inner, partial, weight)
        dw2 = grad_weight(inner, dout, row_token, offsets, back.weight, tokens_first=True)
        dw13 = grad_weight(dpreact, x, row_token, offsets, back.weight, tokens_first=False)
        fence.check("grad_weight", dw2, dw13)
        rows = grad_rows(dpreact, offsets, tile_lists[-1], w13, back.rows, len(x))
        fence.check("grad_rows", rows)
        untouched("grad_rows", rows)
        last = grad_tokens(
            rows, slot_row, partial, dout, x, alpha_T, back.block_h, want_x=True, want_alpha=True
        )  # fmt: skip
        fence.check("grad_tokens", *last)
        at_once = moe_ffn_backward(
            dout, x, weights, row_token, slot_row, offsets, tile_lists[-1], w13, w2, alpha_T, preact, "silu",
            (True,) * 5, back, overwrite=True,
        )  # fmt: skip
        fence.check("moe_ffn_backward", *(grad for grad in at_once if grad is not None))
        untouched("moe_ffn_backward", preact)
        for one, other in zip(at_once, (last[0], last[1], dw13, dw2, last[2]), strict=True):
            assert_bitwise(one.cpu(), other.cpu())
        assert_bitwise(preact[:used].cpu(), dpreact[:used].cpu())
        return [preact[:used], *at_once]

    for result in same_in_both(launch, device, shift):
        assert result.isfinite().all()


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, DTYPE], ids=str)
def test_weight_gradients_add_up(tokens_first: bool, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(41, 24, generator=generator).to(DTYPE).to(device)
    tokens = torch.randn(9, 40, generator=generator).to(DTYPE).to(device)
    rows[37:] = NAN  # of nobody
    row_token = torch.randint(0, 9, (41,), generator=generator, dtype=torch.int32).to(device)
    offsets = torch.tensor([0, 20, 20, 37], dtype=torch.int32, device=device)
    before = torch.randn(3, *((40, 24) if tokens_first else (24, 40)), generator=generator).to(dtype).to(device)
    into = before.clone()
    how = Product(16, 32, 16, 4, 2, False)
    assert grad_weight(rows, tokens, row_token, offsets, how, tokens_first=tokens_first, into=into) is into
    tolerance = 1e-4 if dtype == torch.float32 else ROUNDINGS
    for e, (start, stop) in enumerate(((0, 20), (20, 20), (20, 37))):
        sides = rows[start:stop].double(), tokens[row_token[start:stop].long()].double()
        want = before[e].double() + (sides[1].T @ sides[0] if tokens_first else sides[0].T @ sides[1])
        torch.testing.assert_close(into[e].double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("tma", [True, False])
def test_forward_is_the_same_with_what_it_saves(tma: bool, slices: int, device: str) -> None:
    """And in slices of H."""
    case = Case("sliced", "slices that blocks reach out of", T=7, H=48, I=16, kinds=(("identity", 2),))
    forward, _ = small(16, tma)
    x, weights, *plan, _, w13, w2, alpha, beta, value = (
        t.detach() if isinstance(t, Tensor) else t for t in operator_arguments(case, device)
    )
    preact = x.new_full((len(plan[0]), 2 * case.I), NAN)
    x[3, 5], plan[1][3] = NAN, -1  # seen in every slice, and without a row's help
    outs = [
        moe_ffn(x, weights, *plan, w13, w2, (alpha, beta, value), "silu", how, saved)
        for how, saved in ((replace(forward, slices=slices), preact), (forward, None))
    ]
    assert outs[0][3].isnan().all() and outs[0][4:].isfinite().all()
    assert_bitwise(outs[0].cpu(), outs[1].cpu())
    used = int(plan[2][-1])
    experts_N = torch.arange(case.E, device=device).repeat_interleave(plan[2].diff())
    want = (w13[experts_N].double() @ x[plan[0][:used].long()].double()[:, :, None]).squeeze(2)
    torch.testing.assert_close(preact[:used].double(), want, rtol=ROUNDINGS, atol=ROUNDINGS, equal_nan=True)
    assert preact[used:].isnan().all()
