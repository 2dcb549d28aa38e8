"""The layer behind the router's product as one operator: its values, one node in a compiled graph, graphs, streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.judge import assert_bitwise, check_selection, judge, one_thread
from zemoe import reference
from zemoe.integrations.engines.from_logits import moe_from_logits, select_from_logits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
H, WIDTH, E, Z, K, SCALING = 48, 32, 6, 5, 4, 2.5


def weights(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """bias [A], w13 [E, 2I, H], w2 [E, H, I]."""
    generator = torch.Generator().manual_seed(1)
    bias = 0.02 * torch.randn(E + Z, generator=generator)
    w13 = torch.randn(E, 2 * WIDTH, H, generator=generator) * 1.2 / H**0.5
    w2 = torch.randn(E, H, WIDTH, generator=generator) * 2.5 / WIDTH**0.5
    return bias.to(device), w13.to(device, dtype), w2.to(device, dtype)


def inputs(device: str, dtype: torch.dtype, count: int = 19, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [T, H], logits [T, A]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, H, generator=generator)
    return x.to(device, dtype), torch.randn(count, E + Z, generator=generator).to(device)


def call(x: Tensor, logits: Tensor, tensors: tuple[Tensor, Tensor, Tensor], identity: bool = True) -> Tensor:
    return moe_from_logits(x, logits, *tensors, top_k=K, scaling=SCALING, identity=identity)


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("count", [0, 1, 19])
def test_values(device: str, identity: bool, count: int) -> None:
    dtype = dtype_of(device)
    tensors, (x, logits) = weights(device, dtype), inputs(device, dtype, count)
    bias, w13, w2 = (tensor.cpu() for tensor in tensors)
    with one_thread():
        chosen = reference.select(
            logits.cpu(), K, num_experts=E, e_score_correction_bias=bias, routed_scaling_factor=SCALING,
            zero_expert_kinds=(("identity", Z),),
        )  # fmt: skip
        rest = {"num_experts": E, "zero_expert_kinds": (("identity" if identity else "zero", Z),)}
        exact, own = (
            reference.experts(x.cpu(), w13, w2, chosen.topk_weights_TK, chosen.topk_ids_TK, dtype=of, **rest)
            for of in (torch.float64, dtype)
        )
    assert count < 19 or (chosen.topk_ids_TK >= E).any()
    judge(call(x, logits, tensors, identity), exact, own)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 19])
def test_selection(device: str, count: int) -> None:
    bias, (_, logits) = weights(device, torch.float32)[0], inputs(device, torch.float32, count)
    found, ids = select_from_logits(logits, bias, top_k=K, num_experts=E, scaling=SCALING)
    rules = {"num_experts": E, "zero_expert_kinds": (("identity", Z),), "routed_scaling_factor": SCALING}
    rules["e_score_correction_bias"] = bias.cpu()
    check_selection(ids.cpu(), reference.select(logits.cpu(), K, **rules))
    exact, own = (
        reference.select(logits.cpu(), K, ids_TK=ids.cpu(), dtype=dtype, **rules).topk_weights_TK
        for dtype in (torch.float64, torch.float32)
    )
    judge(found, exact, own)


@pytest.mark.parametrize("device", DEVICES)
def test_operators(device: str) -> None:
    dtype, ops = dtype_of(device), torch.ops.zemoe
    tensors, (x, logits) = weights(device, dtype), inputs(device, dtype)
    torch.library.opcheck(ops.moe_from_logits.default, (x, logits, *tensors, K, SCALING, True))
    torch.library.opcheck(ops.select_from_logits.default, (logits, tensors[0], K, E, SCALING))


@pytest.mark.parametrize("device", DEVICES)
def test_one_node_for_all_numbers_of_tokens(device: str) -> None:
    dtype, graphs = dtype_of(device), []
    tensors = weights(device, dtype)

    def backend(graph, example):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=True)
    for count in (3, 19, 70):
        x, logits = inputs(device, dtype, count)
        assert_bitwise(compiled(x, logits, tensors).cpu(), call(x, logits, tensors).cpu())
    assert len(graphs) == 1
    assert sum("moe_from_logits" in str(node.target) for node in graphs[0].graph.nodes) == 1


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("count", [1, 19, 512])
def test_graph_replays_new_routing(count: int) -> None:
    tensors, (x, logits) = weights("cuda", torch.bfloat16), inputs("cuda", torch.bfloat16, count)
    call(x, logits, tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(x, logits, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, logits, tensors)
    for seed in (1, 2):
        new_x, new_logits = inputs("cuda", torch.bfloat16, count, seed)
        x.copy_(new_x)
        logits.copy_(new_logits)
        graph.replay()
        assert_bitwise(out.cpu(), call(new_x, new_logits, tensors).cpu())


@pytest.mark.gpu
@torch.no_grad()
def test_two_streams_at_once() -> None:
    """As when an engine overlaps two halves of a batch: the same bits as one after the other."""
    tensors = weights("cuda", torch.bfloat16)
    halves = [inputs("cuda", torch.bfloat16, count, count) for count in (200, 311)]
    alone = [call(*half, tensors) for half in halves]
    streams = [torch.cuda.Stream() for _ in halves]
    torch.cuda.synchronize()
    outs: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, half, seen in zip(streams, halves, outs, strict=True):
            with torch.cuda.stream(stream):
                seen.append(call(*half, tensors))
    torch.cuda.synchronize()
    for seen, expected in zip(outs, alone, strict=True):
        for out in seen:
            assert_bitwise(out.cpu(), expected.cpu())
