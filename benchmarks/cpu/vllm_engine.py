"""Tokens a second of vLLM on a CPU: LongCat with zemoe's MoE layers, and with layers written in torch's operators.

    .venv-vllm/bin/python benchmarks/cpu/vllm_engine.py --output benchmarks/results/cpu-avx512/vllm.csv

Two layers of H 1024, I 512, E 64, Z 32, K 12 with random weights in float32, vLLM's own defaults but for `--eager`,
each side in a process of its own. vLLM's own layer is no side: it does not run on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zemoe.bench.csv_files import write_csv

CONFIG = {
    "architectures": ["LongcatFlashForCausalLM"],
    "model_type": "longcat_flash",
    "dtype": "float32",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_layers": 2,
    "num_attention_heads": 8,
    "ffn_hidden_size": 1024,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "v_head_dim": 128,
    "moe_topk": 12,
    "n_routed_experts": 64,
    "zero_expert_num": 32,
    "expert_ffn_hidden_size": 512,
    "routed_scaling_factor": 6.0,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "zero_expert_type": "identity",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
CASES = ((1, 32, 64), (8, 32, 64), (32, 32, 32), (8, 512, 1))  # requests at a time, tokens of a prompt, new tokens
REPEATS = 3
SIDES = ("zemoe", "torch", "grouped_mm")


def _route(
    x_TH: Tensor, logits_TA: Tensor, bias: Tensor, E: int, top_k: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(what the identity experts yield; then by expert: rows' tokens, weights, number of rows; experts' ids)."""
    scores = logits_TA.softmax(-1)
    ids = (scores + bias).topk(top_k, sorted=False).indices
    weights = scores.gather(1, ids) * scaling
    y_TH = x_TH * (weights * (ids >= E)).sum(-1, keepdim=True)
    sorted_N, order_N = ids.view(-1).sort()
    order_N = order_N[: int((sorted_N < E).sum())]
    return y_TH, order_N // top_k, weights.view(-1)[order_N], torch.bincount(sorted_N, minlength=E)[:E], ids


def in_torch(x_TH, logits_TA, bias, w13, w2, *, top_k, scaling, identity=True) -> Tensor:
    """Sorted by expert, one pair of products an expert that has rows."""
    y_TH, token_N, weight_N, rows_E, _ = _route(x_TH, logits_TA, bias, len(w13), top_k, scaling)
    start = 0
    for e, rows in enumerate(rows_E.tolist()):
        if rows:
            token = token_N[start : start + rows]
            gate, up = F.linear(x_TH[token], w13[e]).chunk(2, -1)
            out = F.linear(F.silu(gate) * up, w2[e])
            y_TH.index_add_(0, token, out * weight_N[start : start + rows, None])
            start += rows
    return y_TH


def by_grouped_mm(x_TH, logits_TA, bias, w13, w2, *, top_k, scaling, identity=True) -> Tensor:
    """Sorted by expert, two of torch's grouped products."""
    y_TH, token_N, weight_N, rows_E, _ = _route(x_TH, logits_TA, bias, len(w13), top_k, scaling)
    if len(token_N):
        offsets = rows_E.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x_TH[token_N], w13.transpose(1, 2), offs=offsets).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offsets)
        y_TH.index_add_(0, token_N, out * weight_N[:, None])
    return y_TH


def _spread(model) -> None:
    """Routers that choose as trained ones do: vLLM's dummy weights choose the same experts for every token."""
    for name, parameter in model.named_parameters():
        if name.endswith("classifier.weight"):
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        elif name.endswith("e_score_correction_bias"):
            parameter.data.zero_()


def measure(side: str, eager: bool) -> list[list[float]]:
    """Seconds of each repeat of each case, in this process."""
    from vllm import LLM, SamplingParams

    from zemoe.integrations.engines import from_logits  # noqa: F401 - defines the operator

    if side != "zemoe":
        # Behind an operator as ours is, so that compiled code calls it as it is.
        other = in_torch if side == "torch" else by_grouped_mm

        def implementation(x, logits, bias, w13, w2, top_k, scaling, identity):
            return other(x, logits, bias, w13, w2, top_k=top_k, scaling=scaling)

        library = torch.library.Library("zemoe", "IMPL", "CPU")
        library.impl("moe_from_logits", implementation)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=32,
            kv_cache_memory_bytes=1 << 29,
            enforce_eager=eager,
        )
    llm.apply_model(_spread)
    seconds = []
    for batch, length, new in CASES:
        prompts = torch.randint(3, 8192, (REPEATS + 1, batch, length), generator=torch.Generator().manual_seed(1))
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        times = []
        for repeat in prompts.tolist():
            start = time.perf_counter()
            llm.generate([{"prompt_token_ids": prompt} for prompt in repeat], params, use_tqdm=False)
            times.append(time.perf_counter() - start)
        seconds.append(times[1:])  # the first warms up
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="the CSV to write")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--side", choices=SIDES, help="measure this one alone, and print seconds as JSON")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if arguments.side:
        print("SECONDS", json.dumps(measure(arguments.side, arguments.eager)))
        return
    rows = []
    for side in SIDES:
        command = [sys.executable, __file__, "--side", side, *(["--eager"] if arguments.eager else [])]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(next(line for line in out.splitlines() if line.startswith("SECONDS")).partition(" ")[2])
        for (batch, length, new), times in zip(CASES, found, strict=True):
            best = min(times)
            counted = batch * (new if new > 1 else length)
            row = {"side": side, "mode": "eager" if arguments.eager else "compiled", "requests": batch}
            row |= {"prompt_tokens": length, "new_tokens": new, "tokens_per_second": round(counted / best, 1)}
            rows.append(row)
            print(*row.values(), flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(arguments.output, rows)


if __name__ == "__main__":
    main()
