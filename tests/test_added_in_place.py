"""A layer's output belongs to its caller: no view, no memory of anything else; `y += x` is as good as `x + y`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers.ranks import as_rank
from zemoe import FusedMoE, MoE, MoEConfig, ZeroExpertFusedMoE

H, A, T = 16, 8, 12
SHAPES = [(H,), (T, H), (3, 4, H), (3, 2, 2, H), (1, H), (0, H), (2, 0, H)]
OPTIONS = {"num_experts": 5, "top_k": 3, "hidden_size": H, "intermediate_size": 10}


class FromLogits(nn.Module):
    """A layer that takes logits, as a function of x alone."""

    def __init__(self, layer: FusedMoE) -> None:
        super().__init__()
        self.layer, self.project = layer, nn.Linear(H, layer.num_slots, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.project(x))


def layers() -> dict[str, nn.Module]:
    kinds = (("identity", 1), ("constant", 2))
    config = MoEConfig(**OPTIONS, zero_expert_kinds=kinds)
    made: dict[str, nn.Module] = {
        "MoE": MoE(config),
        "MoE, torch": MoE(config, backend="torch"),
        "MoE, shared experts": MoE(config, shared_intermediate_size=6, shared_gated=True),
        "MoE, only zero experts": MoE(
            MoEConfig(hidden_size=H, intermediate_size=1, num_experts=0, top_k=3, zero_expert_kinds=(("identity", A),))
        ),
        "FusedMoE": FromLogits(FusedMoE(**OPTIONS)),
        "ZeroExpertFusedMoE": FromLogits(ZeroExpertFusedMoE(3, kinds, None, **OPTIONS)),
    }
    generator = torch.Generator().manual_seed(0)
    for module in made.values():
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5
    return made


NAMES = list(layers())


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["gradients", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_no_view(name, mode):
    layer = layers()[name]
    for shape in SHAPES:
        x, again = tokens(*shape), tokens(*shape)
        with {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]():
            first, second = layer(x), layer(x)
            assert not first._is_view() and first._base is None
            first.fill_(7)
            assert torch.equal(x, again), "the output shares the input's memory"
            assert torch.equal(second, layer(x)), "the output shares memory with the next one"


@pytest.mark.parametrize("gradients", [False, True])
def test_the_output_of_compiled_code_is_no_view(gradients):
    layer = torch.compile(layers()["MoE"], fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        out = layer(tokens(3, 4, H))
    assert not out._is_view() and out._base is None


@pytest.mark.parametrize("shape", [(T, H), (3, 4, H)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_sum_in_place(name, shape):
    found = []
    for in_place in (False, True):
        layer, x = layers()[name], tokens(*shape).requires_grad_()
        y = layer(x)
        if in_place:
            y += x
        else:
            y = y + x
        y.square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, got in zip(*found, strict=True):
        assert torch.equal(expected, got)


class Block(nn.Module):
    """A residual layer with the sum in place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(H, H), layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y = self.layer(x)
        y += x
        return y


def _block(layer: nn.Module) -> Block:
    torch.manual_seed(3)
    return Block(copy.deepcopy(layer))


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def _train(rank: int, folder: str) -> None:
    """One rank: gradients of its half of the tokens, with the layer as FSDP's root, within one, and under DDP."""
    import torch.distributed as dist

    mesh = dist.init_device_mesh("cpu", (2,))
    x = tokens(2, 6, H)[rank : rank + 1]
    found = {}
    for name in ("MoE", "MoE, torch", "ZeroExpertFusedMoE"):
        root = copy.deepcopy(layers()[name])
        fully_shard(root, mesh=mesh)
        y = root(x)
        y += x
        y.square().mean().backward()
        inner = _block(layers()[name])
        fully_shard(inner.layer, mesh=mesh)
        fully_shard(inner, mesh=mesh)
        inner(x).square().mean().backward()
        copied = DistributedDataParallel(_block(layers()[name]))
        copied(x).square().mean().backward()
        found |= {
            (name, "root"): _gradients(root),
            (name, "inner"): _gradients(inner),
            (name, "DDP"): _gradients(copied),
        }
    torch.save(found, f"{folder}/{rank}.pt")


def _rank(rank: int, folder: str) -> None:
    as_rank(rank, f"{folder}/meeting", _train, rank, folder)


def test_two_ranks_find_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2, join=True)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    x = tokens(2, 6, H)
    assert first.keys() == second.keys() and len(first) == 9
    for (name, way), gradients in first.items():
        alone = layers()[name] if way == "root" else _block(layers()[name])
        (alone(x) + x if way == "root" else alone(x)).square().mean().backward()
        expected = _gradients(alone)
        assert gradients.keys() == expected.keys()
        for parameter, gradient in gradients.items():
            assert torch.allclose(gradient, expected[parameter], rtol=1e-4, atol=1e-6), (name, way, parameter)
            assert torch.equal(gradient, second[name, way][parameter]), (name, way, parameter)
