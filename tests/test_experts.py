"""fused_experts: one suite for every backend. A new entry in BACKENDS is picked up by itself."""

from __future__ import annotations

import functools

import pytest
import torch

from helpers.experts import Reference, gradients, run
from helpers.judge import BY_NAME, CASES, Case, assert_bitwise, judge, one_thread
from zemoe import AffineParams, fused_experts, reference, resolve_backend
from zemoe.backends import BACKENDS

pytestmark = pytest.mark.usefixtures("poisoned_empty")

ON_CPU = [name for name, backend in BACKENDS.items() if backend.devices is None or "cpu" in backend.devices]
WITH_DTYPES = [(name, dtype) for name in ON_CPU for dtype in BACKENDS[name].dtypes]


@functools.cache
def expected(case: Case, dtype: torch.dtype, activation: str = "silu") -> tuple[torch.Tensor, torch.Tensor]:
    inputs = case.inputs(dtype)
    return case.reference(inputs, activation=activation), case.reference(inputs, dtype, activation)


@pytest.mark.parametrize(("backend", "dtype"), WITH_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values(case, backend, dtype):
    judge(run(case, case.inputs(dtype), backend), *expected(case, dtype))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize(("backend", "dtype"), WITH_DTYPES, ids=str)
def test_activations(activation, backend, dtype):
    case = BY_NAME["plain"]
    out = run(case, case.inputs(dtype), backend, activation=activation)
    judge(out, *expected(case, dtype, activation))


# --------------------------------------------------------------------------------------------------------- gradients


class Mine:
    dtype = None

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend = case, backend

    def __call__(self, inputs):
        return run(self.case, inputs, self.backend)


@functools.cache
def expected_gradients(case: Case, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    with one_thread():
        return gradients(case, dtype, Reference(case, torch.float64)), gradients(case, dtype, Reference(case, dtype))


@pytest.mark.parametrize(("backend", "dtype"), WITH_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case, backend, dtype):
    exact, own = expected_gradients(case, dtype)
    mine = gradients(case, dtype, Mine(case, backend))
    assert mine.keys() == exact.keys()
    for name, grad in mine.items():
        judge(grad, exact[name], own[name].to(grad.dtype), f"gradient of {name}")


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("wanted", ["x", "w13", "w2", "weights", "constant_value"])
def test_one_gradient_at_a_time(backend, wanted):
    """Frozen parts get none, and what is wanted doesn't depend on what else is."""
    case = BY_NAME["mixed"]
    everything = gradients(case, torch.float32, Mine(case, backend))[wanted]
    inputs = case.inputs()
    leaves = {"x": inputs.x_TH, "w13": inputs.w13, "w2": inputs.w2, "weights": inputs.weights_TK}
    leaves["constant_value"] = inputs.affine.constant_value
    leaves[wanted].requires_grad_()
    out = run(case, inputs, backend)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name != wanted)
    torch.testing.assert_close(leaves[wanted].grad, everything, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_add_up_over_two_calls(backend):
    case = BY_NAME["plain"]
    inputs = case.inputs()
    w13 = inputs.w13.requires_grad_()
    run(case, inputs, backend).sum().backward()
    once = w13.grad.clone()
    run(case, inputs, backend).sum().backward()
    torch.testing.assert_close(w13.grad, 2 * once)


@pytest.mark.parametrize("backend", ON_CPU)
def test_an_expanded_gradient(backend):
    """sum() hands an expanded, zero-stride gradient to the backward."""
    case = BY_NAME["odd"]
    inputs = case.inputs()
    x = inputs.x_TH.requires_grad_()
    run(case, inputs, backend).sum().backward()
    expanded = x.grad.clone()
    x.grad = None
    out = run(case, inputs, backend)
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad, expanded)


@pytest.mark.parametrize("backend", ON_CPU)
def test_an_unused_expert_gets_a_zero_gradient(backend):
    case = BY_NAME["empty_expert"]
    inputs = case.inputs()
    for weight in (inputs.w13, inputs.w2):
        weight.requires_grad_()
    run(case, inputs, backend).sum().backward()
    for weight in (inputs.w13, inputs.w2):
        assert (weight.grad[1] == 0).all() and (weight.grad[0] != 0).any()


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_skipped_choice_gets_a_zero_gradient(backend):
    case = BY_NAME["skips"]
    inputs = case.inputs()
    inputs.weights_TK.requires_grad_()
    run(case, inputs, backend).sum().backward()
    assert (inputs.weights_TK.grad[inputs.ids_TK == -1] == 0).all()
    assert (inputs.weights_TK.grad[inputs.ids_TK >= 0] != 0).all()


# ----------------------------------------------------------------------------------------------- form, not value


@pytest.mark.parametrize("backend", ON_CPU)
class TestForm:
    CASE = BY_NAME["mixed"]

    def test_inputs_are_left_alone(self, backend):
        inputs, before = self.CASE.inputs(), self.CASE.inputs()
        run(self.CASE, inputs, backend)
        for tensor, copy in zip((*inputs[:5], *inputs.affine), (*before[:5], *before.affine), strict=True):
            assert_bitwise(tensor, copy)

    @pytest.mark.parametrize("shape", [(2, 20), (40, 1), (2, 4, 5)])
    def test_leading_dimensions(self, backend, shape):
        inputs = self.CASE.inputs()
        flat = run(self.CASE, inputs, backend)
        shaped = run(self.CASE, inputs._replace(x_TH=inputs.x_TH.reshape(*shape, -1)), backend)
        assert shaped.shape == (*shape, self.CASE.H)
        assert_bitwise(shaped.reshape(flat.shape), flat)

    def test_one_vector(self, backend):
        case = BY_NAME["one_token"]
        inputs = case.inputs()
        out = run(case, inputs._replace(x_TH=inputs.x_TH[0]), backend)
        assert out.shape == (case.H,)
        assert_bitwise(out, run(case, inputs, backend)[0])

    def test_not_contiguous(self, backend):
        inputs = self.CASE.inputs()
        strided = inputs._replace(
            x_TH=inputs.x_TH.T.contiguous().T,
            w13=inputs.w13.mT.contiguous().mT,
            w2=torch.stack([inputs.w2, inputs.w2], dim=-1)[..., 0],
            weights_TK=inputs.weights_TK.T.contiguous().T,
            ids_TK=inputs.ids_TK.T.contiguous().T,
        )
        assert not any(tensor.is_contiguous() for tensor in strided[:5])
        judge(run(self.CASE, strided, backend), *expected(self.CASE, torch.float32))

    @pytest.mark.parametrize("name", ["x_TH", "w13", "w2"])
    @pytest.mark.parametrize("margin", [1, 16])
    def test_a_slice_of_a_wider_tensor(self, backend, name, margin):
        inputs = self.CASE.inputs()
        tensor = getattr(inputs, name)
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 2 * margin), float("nan"))
        wide[..., margin:-margin] = tensor
        strided = inputs._replace(**{name: wide[..., margin:-margin]})
        judge(run(self.CASE, strided, backend), *expected(self.CASE, torch.float32))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_weights_of_another_dtype(self, backend, dtype):
        inputs = self.CASE.inputs()
        weights = inputs.weights_TK.to(dtype)
        out = run(self.CASE, inputs._replace(weights_TK=weights), backend)
        assert_bitwise(out, run(self.CASE, inputs._replace(weights_TK=weights.float()), backend))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_weights_are_not_rounded_to_the_dtype_of_x(self, backend, dtype):
        case = Case("identity", "one product, so that each rounding shows", kinds=(("identity", 2),), K=1)
        inputs = case.inputs(dtype)
        inputs = inputs._replace(ids_TK=torch.full_like(inputs.ids_TK, case.E))
        assert_bitwise(run(case, inputs, backend), (inputs.x_TH.float() * inputs.weights_TK).to(dtype))

    def test_int32_ids(self, backend):
        inputs = self.CASE.inputs()
        out = run(self.CASE, inputs._replace(ids_TK=inputs.ids_TK.int()), backend)
        assert_bitwise(out, run(self.CASE, inputs, backend))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_twice_the_same_bits(self, backend, dtype):
        case = BY_NAME["many_rows"]
        results = []
        for _ in range(2):
            inputs = case.inputs(dtype)
            leaves = (inputs.x_TH, inputs.w13, inputs.w2, inputs.weights_TK)
            for leaf in leaves:
                leaf.requires_grad_()
            out = run(case, inputs, backend)
            out.square().sum().backward()
            results.append([out, *(leaf.grad for leaf in leaves)])
        for first, second in zip(*results, strict=True):
            assert_bitwise(first, second)

    def test_the_order_of_tokens_does_not_matter(self, backend):
        case = BY_NAME["heavy_skew"]
        inputs = case.inputs()
        order = torch.randperm(case.T, generator=torch.Generator().manual_seed(0))
        moved = inputs._replace(
            x_TH=inputs.x_TH[order], weights_TK=inputs.weights_TK[order], ids_TK=inputs.ids_TK[order]
        )
        exact, own = expected(case, torch.float32)
        judge(run(case, moved, backend), exact[order], own[order])

    def test_an_expert_chosen_twice_counts_twice(self, backend):
        case = BY_NAME["plain"]
        inputs = case.inputs()
        inputs.ids_TK[:, 1] = inputs.ids_TK[:, 0]
        judge(run(case, inputs, backend), case.reference(inputs), case.reference(inputs, torch.float32))

    def test_one_kind_for_all_higher_ids(self, backend):
        case = BY_NAME["plain"]
        inputs = case.inputs()
        ids = torch.where(inputs.ids_TK >= case.E, inputs.ids_TK * 100_003, inputs.ids_TK)
        inputs = inputs._replace(ids_TK=ids)
        for kind in ("identity", "copy", "zero", "null"):
            judged = {"num_experts": case.E, "zero_expert_kinds": kind}
            out = fused_experts(*inputs[:5], **judged, backend=backend)
            exact = reference.experts(*case.inputs()[:5], num_experts=case.E, zero_expert_kinds=kind)
            own = reference.experts(*case.inputs()[:5], num_experts=case.E, zero_expert_kinds=kind, dtype=torch.float32)
            judge(out, exact, own)

    @pytest.mark.parametrize("kind", ["constant", "scaled_identity"])
    def test_one_learned_kind_for_all_higher_ids(self, backend, kind):
        case = Case("learned", "one string for a kind with parameters", kinds=((kind, 3),))
        inputs = case.inputs()
        out = fused_experts(
            *inputs[:5], num_experts=case.E, zero_expert_kinds=kind, affine_params=inputs.affine, backend=backend
        )
        judge(out, case.reference(inputs), case.reference(inputs, torch.float32))

    def test_autocast(self, backend):
        case = BY_NAME["plain"]
        inputs = case.inputs()
        for tensor in (inputs.x_TH, inputs.w13, inputs.w2):
            tensor.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = run(case, inputs, backend)
        assert out.dtype == torch.bfloat16
        rounded = inputs._replace(x_TH=inputs.x_TH.bfloat16(), w13=inputs.w13.bfloat16(), w2=inputs.w2.bfloat16())
        judge(out, case.reference(rounded), case.reference(rounded, torch.bfloat16))
        out.sum().backward()
        assert inputs.w13.grad.dtype == torch.float32

    def test_compiles_whole_forward_and_backward(self, backend):
        results = []
        for compiled in (False, True):
            inputs = self.CASE.inputs()
            leaves = (inputs.x_TH, inputs.w13, inputs.w2, inputs.weights_TK)
            for leaf in leaves:
                leaf.requires_grad_()
            function = functools.partial(run, self.CASE, backend=backend)
            if compiled:
                torch._dynamo.reset()
                function = torch.compile(function, fullgraph=True, backend="aot_eager")
            out = function(inputs)
            out.square().sum().backward()
            results.append([out, *(leaf.grad for leaf in leaves)])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)

    def test_no_grad_and_inference_mode(self, backend):
        inputs = self.CASE.inputs()
        plain = run(self.CASE, inputs, backend)
        with torch.no_grad():
            assert_bitwise(run(self.CASE, inputs, backend), plain)
        with torch.inference_mode():
            assert_bitwise(run(self.CASE, inputs, backend), plain)


def test_backends_agree():
    case = BY_NAME["mixed"]
    outs = [run(case, case.inputs(), backend) for backend in ON_CPU]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- refusals


class TestRefusals:
    CASE = BY_NAME["plain"]  # T 24, H 32, I 16, E 6, A 8, K 3

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"x_TH": torch.zeros(24, 31)}, ["w13", "(6, 32, 32)", "31"]),
            ({"x_TH": torch.zeros(23, 32)}, ["topk_ids", "23", "(24, 3)"]),
            ({"x_TH": torch.zeros(24, 32, dtype=torch.int64)}, ["hidden_states", "int64"]),
            ({"x_TH": torch.zeros(())}, ["hidden_states", "()"]),
            ({"x_TH": torch.zeros(24, 32, dtype=torch.bfloat16)}, ["w13", "bfloat16", "float32"]),
            ({"w13": torch.zeros(6, 32, 32, device="meta")}, ["w13", "device", "meta", "cpu"]),
            ({"x_TH": torch.zeros(24, 32, device="meta")}, ["device", "meta", "cpu"]),
            ({"w13": torch.zeros(6, 32)}, ["w13", "(6, 32)"]),
            ({"w13": torch.zeros(6, 33, 32)}, ["w13", "(6, 33, 32)"]),
            ({"w13": torch.zeros(8, 32, 32)}, ["w13", "(8, 32, 32)", "6"]),
            ({"w13": torch.zeros(6, 32, 32, dtype=torch.float64)}, ["w13", "float64", "float32"]),
            ({"w2": torch.zeros(6, 16, 32)}, ["w2", "(6, 16, 32)", "32", "16"]),
            ({"w2": torch.zeros(5, 32, 16)}, ["w2", "(5, 32, 16)", "6"]),
            ({"w2": torch.zeros(6, 32, 16, dtype=torch.bfloat16)}, ["w2", "bfloat16", "float32"]),
            ({"weights_TK": torch.zeros(24, 2)}, ["topk_weights", "(24, 2)", "(24, 3)"]),
            ({"weights_TK": torch.zeros(24, 3, dtype=torch.int64)}, ["topk_weights", "int64"]),
            ({"weights_TK": torch.zeros(24, 3, device="meta")}, ["topk_weights", "meta", "cpu"]),
            ({"ids_TK": torch.zeros(24, 3)}, ["topk_ids", "float32", "int64"]),
            ({"ids_TK": torch.zeros(24, 3, dtype=torch.bool)}, ["topk_ids", "bool", "int64"]),
            ({"ids_TK": torch.zeros(72, dtype=torch.int64)}, ["topk_ids", "(72,)"]),
            ({"ids_TK": torch.full((24, 3), 8)}, ["topk_ids", "8", "-1"]),
            ({"ids_TK": torch.full((24, 3), -2)}, ["topk_ids", "-2"]),
        ],
    )
    def test_tensors(self, change, parts):
        with pytest.raises(ValueError) as error:
            run(self.CASE, self.CASE.inputs()._replace(**change))
        for part in parts:
            assert part in str(error.value), str(error.value)

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"num_experts": 5}, ["w13", "E=5"]),
            ({"num_experts": -1}, ["num_experts", "-1"]),
            ({"num_experts": 6.0}, ["num_experts", "6.0"]),
            ({"zero_expert_kinds": (("other", 2),)}, ["'other'", "identity"]),
            ({"zero_expert_kinds": "other"}, ["'other'", "identity"]),
            ({"zero_expert_kinds": (("identity", -2),)}, ["identity", "-2"]),
            ({"zero_expert_kinds": (("constant", 2),)}, ["constant_router", "None"]),
            ({"zero_expert_kinds": "constant"}, ["affine_params", "'constant'", "None"]),
            ({"activation": "relu"}, ["activation", "'relu'", "silu"]),
            ({"backend": "abacus"}, ["backend", "'abacus'", "cpu"]),
            ({"affine_params": AffineParams(scale=torch.ones(2))}, ["affine_params.scale", "None"]),
        ],
    )
    def test_arguments(self, change, parts):
        arguments = {"num_experts": 6, "zero_expert_kinds": (("identity", 2),)} | change
        with pytest.raises(ValueError) as error:
            fused_experts(*self.CASE.inputs()[:5], **arguments)
        for part in parts:
            assert part in str(error.value), str(error.value)

    def test_kinds_are_needed(self):
        with pytest.raises(TypeError):
            fused_experts(*self.CASE.inputs()[:5], num_experts=6)

    @pytest.mark.parametrize("backend", ON_CPU)
    def test_a_wrong_id_is_refused_by_every_backend(self, backend):
        for wrong in (8, -2):
            inputs = self.CASE.inputs()
            inputs.ids_TK[3, 1] = wrong
            with pytest.raises(ValueError, match=f"topk_ids.*{wrong}"):
                run(self.CASE, inputs, backend)

    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("backend", ON_CPU)
    def test_an_id_beyond_all_kinds_is_refused_where_one_kind_has_all_ids(self, backend, gradients):
        x, *inputs, ids = self.CASE.inputs()[:5]
        ids[3, 1] = 2**31 - 2
        named = {"num_experts": 6, "zero_expert_kinds": "identity", "backend": backend}
        fused_experts(x.requires_grad_(gradients), *inputs, ids, **named)
        ids[3, 1] = 2**31 - 1
        with pytest.raises(ValueError, match=r"topk_ids must be 0\.\.2147483646.*2147483647"):
            fused_experts(x, *inputs, ids, **named)


class TestResolveBackend:
    @pytest.mark.parametrize("name", sorted(BACKENDS))
    def test_by_name(self, name):
        backend = BACKENDS[name]
        device = "cpu" if backend.devices is None else backend.devices[0]
        assert resolve_backend(device, backend.dtypes[0], name) is backend

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_the_first_that_works(self, dtype):
        assert resolve_backend("cpu", dtype).name == "cpu"
        assert resolve_backend(torch.device("cpu"), dtype).name == "cpu"

    def test_never_another_one(self):
        with pytest.raises(ValueError, match=r"'cpu'.*'cuda'"):
            resolve_backend("cuda", torch.float32, "cpu")
        with pytest.raises(ValueError, match="int8"):
            resolve_backend("cpu", torch.int8)
        with pytest.raises(ValueError, match=r"'abacus'"):
            resolve_backend("cpu", torch.float32, "abacus")

    def test_every_backend_says_what_it_is(self):
        for name, backend in BACKENDS.items():
            assert backend.name == name and backend.about and backend.dtypes


@pytest.mark.parametrize("way", ["dual numbers", "torch.func.jvp"])
@pytest.mark.parametrize("what", ["x_TH", "weights_TK", "w2"])
def test_forward_mode_is_refused(way: str, what: str) -> None:
    case = BY_NAME["plain"]
    given = case.inputs()

    def layer(value: torch.Tensor) -> torch.Tensor:
        inputs = given._replace(**{what: value})
        return fused_experts(*inputs[:5], num_experts=case.E, zero_expert_kinds=case.kinds)

    value = getattr(given, what)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        if way == "dual numbers":
            with torch.autograd.forward_ad.dual_level():
                layer(torch.autograd.forward_ad.make_dual(value, torch.ones_like(value)))
        else:
            torch.func.jvp(layer, (value,), (torch.ones_like(value),))
    with torch.autograd.forward_ad.dual_level():
        layer(value)  # nothing to differentiate
