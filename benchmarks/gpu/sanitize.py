"""Every Triton kernel once over the table of edges, small, for compute-sanitizer.

    python benchmarks/gpu/sanitize.py     # first without: compiles the kernels, whose cache the tools then use
    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/gpu/sanitize.py

T tokens, R router rows, H hidden size, I expert width, E FFN experts, A slots, K choices.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation of its own, so that its end is known

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from zemoe.kernels.triton.coefficients import CONSTANT, IDENTITY, SCALED, ZERO
from zemoe.kernels.triton.moe_ffn_tiles import moe_ffn_tiles
from zemoe.kernels.triton.moe_ffn_tiles_backward import moe_ffn_tiles_backward
from zemoe.kernels.triton.plan_tiles import plan_tiles
from zemoe.kernels.triton.router_logits import RouterSchedule, router_logits
from zemoe.kernels.triton.router_logits_backward import bfloat16_parts
from zemoe.kernels.triton.select_experts import select_experts
from zemoe.kernels.triton.select_experts_backward import select_experts_backward
from zemoe.kernels.triton.tiles import backward_schedule, schedule

NAN, INF = float("nan"), float("inf")
KINDS = ((CONSTANT, 1), (IDENTITY, 1), (SCALED, 1), (ZERO, 1))
E, Z, K = 5, 4, 3
A = E + Z


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to("cuda", dtype)


def check(rows: Tensor, with_nan: set[int]) -> None:
    """AssertionError unless those rows are NaN throughout and all others finite."""
    expected = torch.tensor([row in with_nan for row in range(len(rows))])
    assert torch.equal(rows.isnan().all(-1).cpu(), expected)
    assert torch.equal(rows.isfinite().all(-1).cpu(), ~expected)


def edges(T: int, K: int) -> Iterator[tuple[str, Tensor]]:
    """Ids [T, K] int64 of each edge."""
    some = torch.stack([torch.randperm(A, generator=torch.Generator().manual_seed(t))[:K] for t in range(T)])
    yield "any ids", some
    yield "only zero experts", E + some % Z
    yield "an expert without a token, the last one too", torch.where((some == 1) | (some == E - 1), 2, some)
    yield "all on the last expert", torch.full((T, K), E - 1)
    yield "-1 everywhere", torch.full((T, K), -1)
    wild = some.clone()
    values = [-(2**63), 2**63 - 1, 2**32 + 1, 2**31, A, -2, -1]
    wild.view(-1)[: len(values)] = torch.tensor(values)[: wild.numel()]
    yield "ids that name no slot", wild


def experts(what: str, T: int, H: int, I: int, block_m: int, K: int = K, *, many: bool = False, shift: int = 0) -> None:
    """The plan both ways, the layer and its backward, over all edges, the last token with a NaN.

    many: tiles as for many tokens.
    """
    x = normal(T, H, dtype=torch.bfloat16)
    x[-1, -1] = NAN
    w13 = normal(E * 2 * I * H + shift, dtype=torch.bfloat16)[shift:].view(E, 2 * I, H)
    w2 = normal(E * H * I + shift, dtype=torch.bfloat16)[shift:].view(E, H, I)
    weights, value, dout = normal(T, K), normal(1, H), normal(T, H, dtype=torch.bfloat16)
    forward, back = schedule(block_m, 10**6 if many else T, K, w13, w2), backward_schedule(block_m, w13, w2)
    for edge, ids in edges(T, K):
        for most_compared in (0, 10**9):
            *plan, alpha, beta = plan_tiles(
                weights,
                ids.cuda(),
                num_experts=E,
                num_slots=A,
                block_m=block_m,
                kinds=KINDS,
                scale_S=normal(1),
                constant_logits_TC2=normal(T, 1, 2),
                most_compared=most_compared,
                part=8,
            )
        out = moe_ffn_tiles(x, weights, *plan, w13, w2, (alpha, beta, value), "silu", forward)
        check(out, {T - 1})
        for into in ((None, None), (torch.zeros_like(w13, dtype=torch.float32), torch.zeros_like(w2))):
            preact = x.new_empty(T * K, 2 * I)
            moe_ffn_tiles(x, weights, *plan, w13, w2, (alpha, beta, value), "silu", forward, preact)
            dx, dweights, *_ = moe_ffn_tiles_backward(
                dout, x, weights, *plan[:3], plan[3][-1], w13, w2, alpha, preact, "silu", (True,) * 5, back, into,
                overwrite=into[0] is None,
            )  # fmt: skip
            assert dx is not None
            assert dweights is not None
            check(dx, {T - 1})
            check(dweights[:-1], set())
        print(f"experts: {what}, T={T} H={H} I={I} K={K} block_m={block_m}: {edge}")


def routing(A: int, K: int, **rules) -> None:
    logits = normal(7, A)
    logits[1, 0], logits[2, A - 1] = NAN, INF
    logits[3], logits[4, 1:] = -INF, -INF
    weights, ids = select_experts(logits, K, num_experts=A // 2, **rules)
    check(weights, {1, 2, 3})
    assert ids.min() >= 0
    assert ids.max() < A
    same = {name: rules[name] for name in ("scoring", "renormalize") if name in rules}
    for given in (ids, ids.clone().fill_(2**40), -ids):
        grad = select_experts_backward(normal(7, K), logits, given, **{
            "num_experts": A // 2, "scoring": "softmax", "renormalize": "none", "scaling": 1.0, **same
        })  # fmt: skip
        assert grad[[0, 4, 5, 6]].isfinite().all()
    print(f"routing: A={A} K={K}, NaN, inf and -inf, {', '.join(rules) or 'plain'}")


def router(way: RouterSchedule, T: int, R: int, H: int) -> None:
    x = normal(T, H, dtype=torch.bfloat16)
    x[0, 0] = NAN
    logits = router_logits(x, normal(R, H), way)
    check(logits, {0})
    check(bfloat16_parts(logits, low=1, beside=True), {0})
    print(f"router: {way.path}, T={T} R={R} H={H}")


def one_token() -> None:
    """Odd H and I, by a path of its own; without a NaN, for there is no other token."""
    H, I = 37, 19
    x, w13, w2 = (normal(*shape, dtype=torch.bfloat16) for shape in ((1, H), (E, 2 * I, H), (E, H, I)))
    weights, forward = normal(1, K), schedule(1, 1, K, w13, w2)
    for edge, ids in edges(1, K):
        *plan, alpha, _ = plan_tiles(weights, ids.cuda(), num_experts=E, num_slots=A, block_m=1, kinds=((IDENTITY, Z),))
        check(moe_ffn_tiles(x, weights, *plan, w13, w2, (alpha, None, None), "silu", forward), set())
        print(f"experts: one token, H={H} I={I} K={K}: {edge}")


def main() -> None:
    start = time.perf_counter()
    steps: list[Callable[[], None]] = [
        lambda: router(RouterSchedule("one", 4, 2, 32, 1, 4, 1), 3, 5, 37),
        lambda: router(RouterSchedule("direct", 16, 64, 64, 2, 4, 4), 17, 70, 137),
        lambda: router(RouterSchedule("split", 64, 128, 64, 2, 4, 3), 67, 130, 136),
        lambda: routing(9, 9),
        lambda: routing(300, 12, bias=normal(200), renormalize="all"),
        lambda: routing(24, 4, bias=normal(24), num_expert_group=3, topk_group=2, scoring="sigmoid"),
        lambda: experts("descriptors", 9, 72, 40, 16),
        lambda: experts("descriptors, persistent", 9, 72, 40, 128, many=True),
        lambda: experts("descriptors, tall", 150, 72, 40, 192),
        lambda: experts("pointers", 9, 37, 19, 16),
        lambda: experts("pointers, no alignment, K = A", 5, 72, 40, 32, A, shift=1),
        one_token,
    ]
    for step in steps:
        step()
    torch.cuda.synchronize()
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
