"""Peak memory of the zero-expert FFN op on a CPU beside the rows and intermediates that a plain one would hold.

    python benchmarks/cpu/memory.py

Counts what torch allocates, with its profiler; weights and inputs are not counted.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from zemoe.experts import fused_experts


def peak_bytes(call) -> int:
    """The largest sum of bytes allocated and not yet freed during `call`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024, 4096])
    args = parser.parse_args()
    H, I, E, Z, K = 256, 128, 64, 32, 12
    torch.manual_seed(0)
    w13, w2 = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    for T in args.tokens:
        x = torch.randn(T, H)
        weights, ids = torch.rand(T, E + Z).topk(K)
        for training in (False, True):
            leaves = [tensor.clone().requires_grad_(training) for tensor in (x, w13, w2, weights)]

            def call(leaves=leaves, training=training, ids=ids):
                x, w13, w2, weights = leaves
                y = fused_experts(x, w13, w2, weights, ids, num_experts=E, zero_expert_kinds=(("identity", Z),))
                if training:
                    y.sum().backward()

            call()
            # Rows, gate and up, inner, output of each choice; training adds the gradients of the weights.
            plain = 4 * T * K * (H + 2 * I + I + H) + (4 * (w13.numel() + w2.numel()) if training else 0)
            print(f"T {T} {'train' if training else 'infer'} peak {peak_bytes(call) / plain:.2f} of the plain op's")


if __name__ == "__main__":
    main()
