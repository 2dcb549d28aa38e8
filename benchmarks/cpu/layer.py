"""The zero-expert layer on a CPU beside transformers' own LongcatFlashMoE, router included on both sides.

    python benchmarks/cpu/layer.py --shape first --output benchmarks/results

Both sides have the same weights in memory of their own, run in turn on fresh random inputs, and are checked against
zemoe.reference before anything is timed. Writes one CSV a shape and dtype.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import nn
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

from zemoe import MoE, MoEConfig
from zemoe.bench.check import expected, judge
from zemoe.bench.csv_files import write_csv
from zemoe.bench.timing import cpu_ceilings, interleaved, moe_floor
from zemoe.machine import commit, processor_model

SHAPES = {"first": (1024, 512, 64, 32, 12), "second": (256, 128, 512, 256, 12)}  # H, I, E, Z, K
TOKENS = (1, 4, 16, 32, 64, 256, 1024, 4096)
SCALE = 6.0


def build(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Module, MoE]:
    H, I, E, Z, K = shape
    eager = LongcatFlashMoE(
        LongcatFlashConfig(
            hidden_size=H,
            expert_ffn_hidden_size=I,
            n_routed_experts=E,
            zero_expert_num=Z,
            moe_topk=K,
            num_experts_per_tok=K,
            routed_scaling_factor=SCALE,
        )
    )
    config = MoEConfig(
        hidden_size=H,
        intermediate_size=I,
        num_experts=E,
        top_k=K,
        zero_expert_kinds=(("identity", Z),),
        routed_scaling_factor=SCALE,
    )
    ours = MoE(config, dtype=dtype)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.normal_(std=0.02)
        eager.experts.to(dtype)
        ours.w13.copy_(eager.experts.gate_up_proj[:E])
        ours.w2.copy_(eager.experts.down_proj)
        ours.router.classifier.weight.copy_(eager.router.classifier.weight)
    return eager.eval(), ours.eval()


@torch.inference_mode()
def run(shape: tuple[int, ...], tokens: list[int], repeats: int, dtype: torch.dtype) -> list[dict[str, object]]:
    H, I, E, Z, K = shape
    eager, ours = build(shape, dtype)
    sides = {"eager": lambda x: eager(x[None]), "ours": ours}
    x = torch.randn(48, H).to(dtype)
    wanted = expected(ours, x)
    for name, side in sides.items():
        if wrong := judge(side(x).view_as(x), wanted):
            raise SystemExit(f"{name} is wrong: {wrong}")
    at = cpu_ceilings(dtype)
    print(f"reading {at.bytes_per_second / 1e9:.1f} GB/s, products {at.flops_per_second / 1e9:.0f} GFLOP/s", flush=True)
    rows = []
    for T in tokens:
        inputs = [torch.randn(T, H).to(dtype) for _ in range(repeats + 2)]
        seconds = interleaved(sides, inputs)
        floors = []
        for x in inputs[2:]:
            ids = ours(x, return_routing=True)[1].topk_ids_TK
            real = ids[ids < E]
            floors.append(
                moe_floor(
                    at,
                    tokens=T,
                    ffn_rows=real.numel(),
                    experts_hit=real.unique().numel(),
                    hidden_size=H,
                    intermediate_size=I,
                    itemsize=dtype.itemsize,
                )
            )
        # The first two runs of each side build oneDNN's kernels.
        eager_ms, ours_ms, floor_ms = (
            1e3 * statistics.median(values) for values in (seconds["eager"][2:], seconds["ours"][2:], floors)
        )
        row = {
            "H": H, "I": I, "E": E, "Z": Z, "K": K, "dtype": str(dtype).removeprefix("torch."), "T": T,
            "eager_ms": f"{eager_ms:.3f}", "ours_ms": f"{ours_ms:.3f}", "floor_ms": f"{floor_ms:.3f}",
            "speedup": f"{eager_ms / ours_ms:.2f}", "of_floor": f"{floor_ms / ours_ms:.2f}",
            "eager_best_ms": f"{1e3 * min(seconds['eager'][2:]):.3f}",
            "ours_best_ms": f"{1e3 * min(seconds['ours'][2:]):.3f}",
            "read_gb_s": f"{at.bytes_per_second / 1e9:.1f}", "product_gflop_s": f"{at.flops_per_second / 1e9:.0f}",
        }  # fmt: skip
        print("  ".join(f"{name} {row[name]}" for name in list(row)[6:14]), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="first")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder of results; a folder cpu-<capability> is made in it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = run(SHAPES[args.shape], args.tokens, args.repeats, getattr(torch, args.dtype))
    if args.output is None:
        return
    capability = torch.backends.cpu.get_cpu_capability()
    about = {
        "threads": args.threads, "seed": args.seed, "repeats": args.repeats, "commit": commit(),
        "torch": torch.__version__, "capability": capability, "cpu": processor_model(),
    }  # fmt: skip
    folder = args.output / f"cpu-{capability.lower()}"
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"layer-{args.shape}-{args.dtype}.csv", [row | about for row in rows])


if __name__ == "__main__":
    main()
