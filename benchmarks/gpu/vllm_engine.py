"""Tokens a second of the vLLM engine on a GPU: a random LongCat-Flash-Lite with vLLM's MoE layers and with zemoe's.

    python benchmarks/gpu/vllm_engine.py --output benchmarks/results --model plain

bfloat16, Triton's MLA attention, greedy; each run in a process of its own, with the plug-in off (ZEMOE_VLLM=0) or on.
Models: `plain`, four of the fourteen layers, without n-grams; `ngram`, two layers and embeddings of n-grams; `fp8`,
four layers with their experts in FP8. Modes: `graphs`, nothing compiled, CUDA graphs of whole decoding steps;
`default`, compiled with CUDA graphs as vLLM does without options; `eager`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONFIG: dict[str, Any] = {
    "architectures": ["LongcatFlashForCausalLM"],
    "model_type": "longcat_flash",
    "dtype": "bfloat16",
    "vocab_size": 131072,
    "hidden_size": 3072,
    "num_layers": 4,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "ffn_hidden_size": 6144,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "v_head_dim": 128,
    "moe_topk": 12,
    "n_routed_experts": 256,
    "zero_expert_num": 128,
    "expert_ffn_hidden_size": 1024,
    "routed_scaling_factor": 6.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "zero_expert_type": "identity",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ngram": {
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "num_layers": 2,
        "num_hidden_layers": 4,  # attentions
        "ngram_vocab_size_ratio": 8,  # 78 in the published model, whose tables take 63 GB
        "emb_neighbor_num": 4,
        "emb_split_num": 4,
        "pad_token_id": 0,
    },
    "fp8": {
        "disable_quant_module": ["self_attn", "mlps"],
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    },
}
CASES = ((1, 32, 128), (8, 32, 128), (64, 32, 128), (16, 1000, 1))  # requests at a time, tokens of a prompt, new tokens
REPEATS = 3
BEST = 20  # log-probabilities of the first new token that sides are compared by
COMPILATION: dict[str, dict[str, Any]] = {
    "default": {"cudagraph_capture_sizes": [1, 8, 64]},
    "graphs": {"cudagraph_capture_sizes": [1, 8, 64], "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "eager": {"mode": 0, "cudagraph_mode": "NONE"},
}
RUNS = ("vllm:graphs", "zemoe:graphs", "zemoe:default", "vllm:default")


def fill(model: nn.Module) -> None:
    """Weights from names alone, so that all runs have the same: products keep the size of what comes in."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        if parameter.dtype == torch.float8_e4m3fn:
            for expert in parameter.data:
                noise = torch.randn(expert.shape, generator=generator, device=expert.device)
                expert.copy_(noise.to(expert.dtype))
        elif name.endswith("_scale_inv"):  # a factor a block of 128 columns
            parameter.data.fill_((128 * parameter.shape[-1]) ** -0.5)
        elif name.endswith("e_score_correction_bias"):
            parameter.data.zero_()
        elif parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            std = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
            parameter.data.normal_(std=std, generator=generator)


def measure(mode: str, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Seconds of each repeat of each case, its last tokens, and log-probabilities of a token, in this process."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader("random")
    class RandomLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            fill(model)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = LLM(
            folder,
            load_format="random",
            skip_tokenizer_init=True,
            dtype=config["dtype"],
            max_model_len=2048,
            max_num_seqs=64,
            max_num_batched_tokens=16384,
            kv_cache_memory_bytes=4 << 30,
            enable_prefix_caching=False,
            compilation_config=COMPILATION[mode],
            attention_config={"backend": "TRITON_MLA"},
            **options,
        )
    found: dict[str, Any] = {"start": time.perf_counter() - start, "seconds": [], "tokens": []}
    for batch, length, new in CASES:
        prompts = torch.randint(
            3, config["vocab_size"], (REPEATS + 1, batch, length), generator=torch.Generator().manual_seed(1)
        )
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        times = []
        for repeat in prompts.tolist():
            start = time.perf_counter()
            outs = llm.generate([{"prompt_token_ids": prompt} for prompt in repeat], params, use_tqdm=False)
            times.append(time.perf_counter() - start)
            tokens = [list(out.outputs[0].token_ids) for out in outs]
        found["seconds"].append(times[1:])  # the first warms up
        found["tokens"].append(tokens)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=BEST, detokenize=False)
    prompts = torch.randint(3, config["vocab_size"], (64, 32), generator=torch.Generator().manual_seed(2)).tolist()
    outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    found["best"] = [{str(token): at.logprob for token, at in out.outputs[0].logprobs[0].items()} for out in outs]
    return found


def agreement(tokens: list[list[int]], wanted: list[list[int]]) -> str:
    """Requests whose tokens are all the same, and the mean number of tokens before the first that differs."""
    leading = [
        next((at for at, pair in enumerate(zip(*both, strict=True)) if pair[0] != pair[1]), len(both[0]))
        for both in zip(tokens, wanted, strict=True)
    ]
    same = sum(count == len(wanted[0]) for count in leading)
    return f"{same} of {len(leading)}; {sum(leading) / len(leading):.1f} of {len(wanted[0])} tokens"


def difference(best: list[dict[str, float]], wanted: list[dict[str, float]]) -> str:
    """Mean difference of the log-probabilities that both sides have among their best, and equal first choices."""
    pairs = list(zip(best, wanted, strict=True))
    both = [abs(here[token] - there[token]) for here, there in pairs for token in here.keys() & there.keys()]
    same = sum(max(here, key=here.__getitem__) == max(there, key=there.__getitem__) for here, there in pairs)
    return f"{sum(both) / max(len(both), 1):.4f}; {same} of {len(pairs)}"


def run(name: str, model: str, limit: float) -> dict[str, Any] | str:
    """What `measure` found in a process of its own, or why it ended."""
    side, mode = name.split(":")
    environment = os.environ | {
        "ZEMOE_VLLM": "1" if side == "zemoe" else "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-W", "ignore", __file__, "--model", model, "--one", mode]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no result after {limit:g} s"
    lines = (done.stdout + done.stderr).splitlines()
    print(*(line for line in lines if "zemoe" in line and "layers" in line), sep="\n", flush=True)
    found = next((line for line in lines if line.startswith("FOUND ")), None)
    if found is not None:
        return json.loads(found.removeprefix("FOUND "))
    print(*lines[-40:], sep="\n", flush=True)
    errors = [line.strip() for line in lines if re.search(r"(Error|Unsupported): ", line)]
    return errors[-1] if errors else f"exit code {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="plain", help="default: %(default)s")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), metavar="SIDE:MODE")
    parser.add_argument("--limit", type=float, default=150, help="seconds a run may take (default: %(default)s)")
    parser.add_argument("--one", choices=COMPILATION, metavar="MODE", help="measure in this process, print JSON")
    parser.add_argument("--output", type=Path, help="folder for <device>/<name>.csv")
    parser.add_argument("--commit", help="what to write for the commit; default: what git says")
    args = parser.parse_args()
    if args.one:
        print("FOUND", json.dumps(measure(args.one, CONFIG | MODELS[args.model])), flush=True)
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import results_csv  # needs Triton and the device

    rows: list[dict] = []
    first: dict[str, Any] | None = None
    for name in args.runs:
        found = run(name, args.model, args.limit)
        side, mode = name.split(":")
        if isinstance(found, str):
            print(f"{name}: {found}", flush=True)
            cells = ("model", "requests", "prompt_tokens", "new_tokens", "side", "mode", "tokens_per_second")
            rows.append(dict.fromkeys(cells, "-") | {"model": args.model, "side": side, "mode": mode})
            rows[-1] |= {"same_as_first": found, "logprobs": "-"}
            results_csv.write(f"vllm_engine_{args.model}", rows, args)
            continue
        first = first or found
        for at, (batch, length, new) in enumerate(CASES):
            rate = batch * (new if new > 1 else length) / min(found["seconds"][at])
            rows.append({"model": args.model, "requests": batch, "prompt_tokens": length, "new_tokens": new})
            rows[-1] |= {"side": side, "mode": mode}
            same = agreement(found["tokens"][at], first["tokens"][at])
            rows[-1] |= {"tokens_per_second": round(rate, 1), "same_as_first": same}
            rows[-1] |= {"logprobs": difference(found["best"], first["best"])}
            print(*rows[-1].values(), f"(started in {found['start']:.0f} s)", sep="  ", flush=True)
        results_csv.write(f"vllm_engine_{args.model}", rows, args)


if __name__ == "__main__":
    main()
