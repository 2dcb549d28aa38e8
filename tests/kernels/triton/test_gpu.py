"""The library on a CUDA device: values and gradients against the reference, edges, determinism, graphs, no sync."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from helpers.judge import BY_NAME, CASES, Case, assert_bitwise, check_selection, judge
from zemoe import AffineParams, ZeroExpertFusedMoE, fused_experts, reference, select_experts
from zemoe.balance import (
    adamoe_balance_loss,
    longcat_balance_loss,
    moe_plus_plus_balance_loss,
    router_z_loss,
    slot_counts,
    switch_balance_loss,
    update_deepseek_bias_,
    update_longcat_bias_,
    zeda_balance_loss,
)
from zemoe.plan import make_plan
from zemoe.routing import Routing

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def on_gpu(inputs):
    affine = inputs.affine and AffineParams(*(None if p is None else p.cuda() for p in inputs.affine))
    return inputs._replace(**{name: getattr(inputs, name).cuda() for name in inputs._fields[:5]}, affine=affine)


def layer(case: Case, inputs, **changes):
    inputs = inputs._replace(**changes)
    return fused_experts(*inputs[:5], num_experts=case.E, zero_expert_kinds=case.kinds, affine_params=inputs.affine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    own = case.reference(inputs, dtype if dtype == torch.float64 else torch.float32).to(dtype)
    own = case.reference(inputs, dtype) if dtype in (torch.bfloat16, torch.float16) else own
    judge(layer(case, on_gpu(inputs)), case.reference(inputs), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "mixed", "empty_expert", "skips", "odd", "heavy_skew", "all_zero"])
def test_gradients(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    inputs = case.inputs(dtype)
    upstream = torch.randn(case.T, case.H, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(inputs, run_dtype):
        leaves = [inputs[i].detach().clone().requires_grad_() for i in range(4)]
        if run_dtype is not None:
            leaves = [leaf.detach().to(run_dtype).requires_grad_() for leaf in leaves]
        out = layer(case, inputs._replace(x_TH=leaves[0], w13=leaves[1], w2=leaves[2], weights_TK=leaves[3]))
        return torch.autograd.grad(out, leaves, upstream.to(out))

    exact = gradients(inputs, torch.float64)  # on the CPU, where gradcheck has judged it
    found = gradients(on_gpu(inputs), None)
    for what, got, want in zip(("x", "w13", "w2", "weights"), found, exact, strict=True):
        error = (got.cpu().double() - want).square().mean().sqrt()
        assert error <= want.square().mean().sqrt() * (2e-2 if dtype == torch.bfloat16 else 2e-5), what


def test_selection_and_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 48, generator=generator)
    logits[:64] = logits[:64].mul(2).round()  # many exact ties
    rules = {"num_experts": 32, "zero_expert_kinds": (("identity", 16),), "routed_scaling_factor": 2.5}
    weights, ids = select_experts(logits.cuda(), 8, **rules)
    check_selection(ids.cpu(), reference.select(logits, 8, **rules))
    cpu_weights, cpu_ids = select_experts(logits, 8, **rules)
    assert torch.equal(ids[:64].cpu(), cpu_ids[:64])
    torch.testing.assert_close(weights.cpu()[:64], cpu_weights[:64], rtol=1e-5, atol=1e-6)


def test_ids_that_name_no_slot_are_skipped() -> None:
    case = BY_NAME["plain"]
    inputs = on_gpu(case.inputs())
    wild = inputs.ids_TK.clone()
    wild[::2, 0] = torch.tensor([case.A, 2**31 - 1, -7, case.A + 5], device="cuda").repeat(3)
    skipped = torch.where((wild < 0) | (wild >= case.A), -1, wild)
    assert_bitwise(layer(case, inputs, ids_TK=wild).cpu(), layer(case, inputs, ids_TK=skipped).cpu())


def test_lost_token() -> None:
    case = BY_NAME["plain"]
    inputs = on_gpu(case.inputs())
    clean = layer(case, inputs)
    x = inputs.x_TH.clone()
    x[3, 1] = float("nan")
    out = layer(case, inputs, x_TH=x)
    assert out[3].isnan().all()
    others = torch.arange(case.T) != 3
    assert_bitwise(out.cpu()[others], clean.cpu()[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_again(dtype: torch.dtype) -> None:
    case = Case("long", "many rows, so that a race would show", T=2048, H=256, I=128, E=16, K=4)
    inputs = on_gpu(case.inputs(dtype))

    def run():
        leaves = [inputs[i].detach().clone().requires_grad_() for i in range(4)]
        out = layer(case, inputs._replace(x_TH=leaves[0], w13=leaves[1], w2=leaves[2], weights_TK=leaves[3]))
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    for first, second in zip(run(), run(), strict=True):
        assert_bitwise(first.cpu(), second.cpu())


def zero_expert_layer() -> tuple[ZeroExpertFusedMoE, torch.nn.Linear]:
    torch.manual_seed(0)
    router = torch.nn.Linear(64, 24, bias=False).cuda()
    moe = ZeroExpertFusedMoE(
        8, "identity", router, num_experts=16, top_k=4, hidden_size=64, intermediate_size=32, renormalize=False,
        params_dtype=torch.bfloat16,
    ).cuda()  # fmt: skip
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return moe, router


@torch.no_grad()
def test_no_host_sync_and_graph_capture() -> None:
    moe, router = zero_expert_layer()
    x = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)
    logits = router(x.float())
    expected = moe(x, logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe(x, logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe(x, logits)
    graph.replay()
    assert_bitwise(out.cpu(), expected.cpu())
    logits.copy_(torch.randn_like(logits))  # new routing at the next replay
    graph.replay()
    assert_bitwise(out.cpu(), moe(x, logits).cpu())


def test_compiled() -> None:
    moe, router = zero_expert_layer()
    x = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    logits = router(x.detach().float()).detach().requires_grad_()
    eager = torch.autograd.grad(moe(x, logits).float().square().sum(), (x, logits))
    compiled = torch.compile(moe, fullgraph=True)
    found = torch.autograd.grad(compiled(x, logits).float().square().sum(), (x, logits))
    for got, want in zip(found, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


LOSSES = {
    "switch": switch_balance_loss,
    "moe++": partial(moe_plus_plus_balance_loss, tau=0.5),
    "adamoe": adamoe_balance_loss,
    "zeda": partial(zeda_balance_loss, zero_weight=0.5),
    "longcat": partial(longcat_balance_loss, ffn_experts_per_token=2.0),
    "z": lambda routing, num_experts: router_z_loss(routing),
}


@pytest.mark.parametrize("zero_slots", [8, 0])
@pytest.mark.parametrize("name", LOSSES)
def test_balance_without_a_host_sync(name: str, zero_slots: int) -> None:
    """Every loss with its gradient, and both controllers, in a graph that is replayed with new routing."""
    E, A, K = 16, 16 + zero_slots, 3
    logits = torch.randn(64, A, device="cuda", requires_grad=True)
    ids = torch.zeros(64, K, dtype=torch.int64, device="cuda")
    bias = torch.zeros(A, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = LOSSES[name](Routing(logits, logits, ids), num_experts=E)
        counts = slot_counts(ids, A)
        update_longcat_bias_(bias, counts, num_experts=E, top_k=K, ffn_experts_per_token=2.0, rate=0.1)
        update_deepseek_bias_(bias, counts, num_experts=E, rate=0.1)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(aside):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        logits.normal_()
    ids.copy_(logits.topk(K).indices)
    bias.zero_()
    graph.replay()
    found = [tensor.clone() for tensor in (*replayed, bias)]
    bias.zero_()
    for got, want in zip(found, (*step(), bias), strict=True):
        torch.testing.assert_close(got, want)


def test_plan_matches_the_cpu() -> None:
    ids = torch.randint(-1, 48, (777, 6), generator=torch.Generator().manual_seed(0))
    for got, want in zip(make_plan(ids.cuda(), 32), make_plan(ids, 32), strict=True):
        assert torch.equal(got.cpu(), want)
