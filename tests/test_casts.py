"""Routers, selection biases and affine parameters stay float32 when a layer is cast; its expert weights don't."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zemoe import FusedMoE, MoE, MoEConfig, ZeroExpertFusedMoE
from zemoe.retrofit import ZeroExpertBlock, ZeroExpertGate

H, KINDS = 16, (("identity", 2), ("constant", 1), ("scaled_identity", 1))
OPTIONS = {"num_experts": 6, "top_k": 3, "hidden_size": H, "intermediate_size": 10}


def filled(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(tensor.shape[-1], 1) ** 0.5)
    return layer


def moe(**options) -> nn.Module:
    config = MoEConfig(**OPTIONS, zero_expert_kinds=KINDS)
    return filled(MoE(config, router_bias=True, gating_residual=True, shared_intermediate_size=4, **options))


def fused() -> nn.Module:
    return filled(FusedMoE(**OPTIONS, e_score_correction_bias=torch.zeros(6)))


def zero_fused() -> nn.Module:
    return filled(ZeroExpertFusedMoE(4, KINDS, None, **OPTIONS, e_score_correction_bias=torch.zeros(6)))


class _Gate(ZeroExpertGate):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, H))
        self.register_buffer("e_score_correction_bias", torch.ones(6))


class _Block(ZeroExpertBlock):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.gate, self.experts = _Gate(), nn.Linear(H, H)
        self.register_buffer("e_score_correction_bias", torch.ones(6))
        self.register_buffer("zero_bias", torch.ones(2))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "MoE": moe,
    "FusedMoE": fused,
    "ZeroExpertFusedMoE": zero_fused,
    "retrofitted block": lambda: filled(_Block()),
}
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to bfloat16": lambda layer: layer.to(torch.bfloat16),
    "bfloat16": lambda layer: layer.bfloat16(),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "type": lambda layer: layer.type(torch.float16),
    "with something around": lambda layer: nn.Sequential(nn.ReLU(), layer).to("cpu", torch.bfloat16)[1],
    "there and back": lambda layer: layer.to(torch.bfloat16).float(),
    "on the meta device": lambda layer: layer.to("meta").half().to_empty(device="cpu"),
}


def stays(name: str) -> bool:
    routes = ("router", "e_score_correction_bias", "zero_bias", "constant_router", "constant_value", "scale")
    return any(part in name for part in routes)


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_cast_leaves_them(name, cast):
    layer, plain = LAYERS[name](), LAYERS[name]()
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    changed = CASTS[cast](layer)
    assert any(map(stays, tensors(plain)))
    for part, tensor in tensors(changed).items():
        before = tensors(plain)[part]
        if stays(part):
            assert tensor.dtype == torch.float32, part
            assert cast == "on the meta device" or torch.equal(tensor, before), part
        elif cast != "there and back":
            assert tensor.dtype != torch.float32, part
        assert tensor.shape == before.shape and tensor.device.type == "cpu"
        assert tensor.grad is None or tensor.grad.dtype == tensor.dtype, part


def test_values_are_those_of_a_layer_made_in_bfloat16():
    """A cast layer computes what one computes whose experts alone are bfloat16."""
    cast, made = moe().to(torch.bfloat16), moe(dtype=torch.bfloat16)
    made.shared_experts.to(torch.bfloat16)
    x = torch.randn(200, H, generator=torch.Generator().manual_seed(1)).bfloat16()
    (y, routing), (expected, expected_routing) = cast(x, return_routing=True), made(x, return_routing=True)
    assert torch.equal(y, expected)
    for tensor, other in zip(routing, expected_routing, strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_16_bit_state_dict_is_widened(name, assign):
    layer = LAYERS[name]()
    state = {key: tensor.bfloat16() for key, tensor in layer.state_dict().items()}
    given = dict(state)
    around = nn.Sequential(layer)
    around.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()}, assign=assign)
    assert all(state[key] is tensor for key, tensor in given.items())
    for part, tensor in layer.state_dict().items():
        if stays(part):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, state[part].float()), part


def test_what_was_16_bit_before_is_left():
    """A user's own bias, which the layer shares with its owner; it becomes float32 when it would change anyway."""
    bias = torch.zeros(6, dtype=torch.bfloat16)
    layer = FusedMoE(**OPTIONS, e_score_correction_bias=bias).to(torch.bfloat16)
    assert layer.e_score_correction_bias.data_ptr() == bias.data_ptr()
    assert layer.half().e_score_correction_bias.dtype == torch.float32


def test_copies_and_other_functions_change_nothing():
    layer = copy.deepcopy(moe())
    assert layer.to("cpu") is layer and layer.share_memory() is layer
    assert all(tensor.dtype == torch.float32 for tensor in tensors(layer).values())
