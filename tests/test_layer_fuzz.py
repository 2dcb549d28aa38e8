"""Layers at random (fuzz_layers.py), values and gradients against the reference; and that mistakes are found by it.

`python tests/test_layer_fuzz.py FIRST LAST` tries the seeds of a range on the CPU's backends.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.fuzz_layers import Layer, check, compute, draw, judged, restated, routed
from zemoe import FusedMoE, ZeroExpertFusedMoE, backends
from zemoe.ops import triton_experts, triton_routing

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEEDS = 120
FIXED = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
RANDOM = st.randoms(use_true_random=False)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@settings(max_examples=40, **FIXED)
@given(rng=RANDOM)
def test_values_and_gradients(backend: str, rng: random.Random) -> None:
    check(draw(rng, DTYPES), backend)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_seeds(backend: str) -> None:
    """What hypothesis tries first is small; these are as a trainer's."""
    for seed in range(SEEDS):
        check(draw(random.Random(seed), DTYPES), backend)


@pytest.fixture
def triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """Every operator of the Triton backend, in its interpreter, which takes float16 alone."""
    pytest.importorskip("triton")
    from helpers import triton_training  # defines kernels

    if torch.cuda.is_available():
        pytest.skip("kernels/triton/test_gpu_fuzz.py runs the kernels themselves")
    triton_training.take(monkeypatch, 16, False, 32)
    monkeypatch.setattr(triton_experts, "rows_per_tile", lambda *_: 16)
    takes_cpu = replace(backends.BACKENDS["triton"], devices=("cpu",), dtypes=(torch.float16,))
    monkeypatch.setitem(backends.BACKENDS, "triton", takes_cpu)
    with torch.library._scoped_library("zemoe", "IMPL") as library:
        for name in ("plan_tiles", "moe_ffn_tiles", "moe_ffn_tiles_train"):
            library.impl(name, getattr(triton_experts, f"_{name}_cuda"), "CPU")
        for name in ("moe_ffn_tiles_backward", "moe_ffn_tiles_backward_"):
            library.impl(name, triton_experts._gradients, "CPU")
        for name in ("select_experts", "select_experts_backward"):
            library.impl(name, getattr(triton_routing, f"_{name}_cuda"), "CPU")
        yield


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes infinities and NaN with numpy
def test_triton_in_its_interpreter(triton_on_the_cpu) -> None:
    for seed in range(25):
        check(draw(random.Random(seed), (torch.float16,)), "triton")


def test_the_module_with_leading_sizes() -> None:
    """FusedMoE and ZeroExpertFusedMoE of the same tensors, strided as they are, [1, T, 1, H]."""
    for seed in range(60):
        layer = draw(random.Random(seed), DTYPES)
        if layer.rules["e_score_correction_bias"] is not None and not layer.num_experts:
            continue
        _judge_module(layer)


def _judge_module(layer: Layer) -> None:
    T, H = layer.x.values.shape
    options = {
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "hidden_size": H,
        "intermediate_size": layer.w2.values.shape[2],
        "params_dtype": layer.x.values.dtype,
        "renormalize": layer.rules["renormalize"],
        "scoring_func": layer.rules["scoring_func"],
        "routed_scaling_factor": layer.rules["routed_scaling_factor"],
        "e_score_correction_bias": layer.rules["e_score_correction_bias"],
        "use_grouped_topk": "topk_group" in layer.rules,
        "num_expert_group": layer.rules.get("num_expert_group"),
        "topk_group": layer.rules.get("topk_group"),
        "activation": layer.activation,
    }
    number = sum(count for _, count in layer.kinds)
    module = ZeroExpertFusedMoE(number, layer.kinds, None, **options) if layer.kinds else FusedMoE(**options)
    module.w13_weight.data, module.w2_weight.data = layer.w13.on("cpu"), layer.w2.on("cpu")
    for name, parameter in layer.params._asdict().items():
        if parameter is not None:
            getattr(module, name).data = parameter
    weights, ids = routed(layer, "cpu")
    tensors = {"x": layer.x.values, "w13": layer.w13.values, "w2": layer.w2.values, "weights": weights}
    tensors |= layer.params._asdict()
    sides = [restated(layer, tensors, ids, dtype) for dtype in (torch.float64, layer.x.values.dtype)]
    with torch.no_grad():
        y = module(layer.x.on("cpu")[None, :, None], layer.logits.on("cpu")[None, :, None])
    assert y.shape == (1, T, 1, H)
    judged(y[0, :, 0], *sides, "output")


# --- that it finds what is wrong


def zeros(layer: Layer, tensors: dict, ids_TK: Tensor, backend: str) -> Tensor:
    return compute(layer, tensors, ids_TK, backend) * 0


def a_dropped_choice(layer: Layer, tensors: dict, ids_TK: Tensor, backend: str) -> Tensor:
    dropped = ids_TK.clone()
    dropped[:, -1] = -1
    return compute(layer, tensors, dropped, backend)


def two_swapped_rows(layer: Layer, tensors: dict, ids_TK: Tensor, backend: str) -> Tensor:
    order = list(range(len(ids_TK)))
    order[:2] = order[:2][::-1]
    return compute(layer, tensors, ids_TK, backend)[order]


def weights_of_other_choices(layer: Layer, tensors: dict, ids_TK: Tensor, backend: str) -> Tensor:
    return compute(layer, tensors | {"weights": tensors["weights"].roll(1, dims=1)}, ids_TK, backend)


def a_zero_term_without_the_scale(layer: Layer, tensors: dict, ids_TK: Tensor, backend: str) -> Tensor:
    scale = torch.where(ids_TK >= layer.num_experts, layer.rules["routed_scaling_factor"], 1.0)
    return compute(layer, tensors | {"weights": tensors["weights"] / scale}, ids_TK, backend)


def no_gradient_of_the_weights(layer: Layer, tensors: dict, ids_TK: Tensor, backend: str) -> Tensor:
    return compute(layer, tensors | {"weights": tensors["weights"].detach()}, ids_TK, backend)


def memory_read_without_strides(layer: Layer, tensors: dict, ids_TK: Tensor, backend: str) -> Tensor:
    """What a kernel does that takes a pointer for contiguous."""
    flat = ids_TK.as_strided(ids_TK.shape, (ids_TK.shape[1], 1))
    return compute(layer, tensors, flat.clamp(-1, sum(n for _, n in layer.kinds) + layer.num_experts - 1), backend)


MISTAKES = {
    zeros: 30,
    a_dropped_choice: 25,
    two_swapped_rows: 15,
    weights_of_other_choices: 15,
    a_zero_term_without_the_scale: 8,
    no_gradient_of_the_weights: 8,
    memory_read_without_strides: 2,
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(mistake) -> None:
    """In so many of 60 layers at least; in the others there is nothing that it changes."""
    found = 0
    for seed in range(60):
        layer = draw(random.Random(seed), DTYPES)
        try:
            check(layer, "torch", run=mistake, gradients=mistake is no_gradient_of_the_weights)
        except AssertionError:
            found += 1
    assert found >= MISTAKES[mistake], found


if __name__ == "__main__":
    for seed in range(*map(int, sys.argv[1:])):
        for backend in ("cpu", "torch"):
            try:
                check(draw(random.Random(seed), DTYPES), backend)
            except Exception as error:
                print(f"seed {seed}, {backend}: {type(error).__name__}: {error}")
