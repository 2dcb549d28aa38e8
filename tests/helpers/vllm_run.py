"""Runs of vLLM, one after another, each in a process of its own: `python vllm_run.py REQUEST.json ANSWER`.

The request has "prompts" (lists of token ids) and "runs", each with "model", "dtype", "new_tokens" and "engine"
(arguments of vllm.LLM). ANSWER.0.json and so on have, of the prompts, all of them asked for at once: "tokens", the
greedy ones; "first", the log-probabilities of the first one's likeliest alternatives; and how many tokens of drafts
were "accepted".
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path


def answer(run: dict, prompts: list[list[int]], to: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        run["model"],
        dtype=run["dtype"],
        max_model_len=512,
        max_num_seqs=32,
        kv_cache_memory_bytes=1 << 27,
        seed=0,
        disable_log_stats=False,
        **run["engine"],
    )
    params = SamplingParams(temperature=0, max_tokens=run["new_tokens"], ignore_eos=True, logprobs=10)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [one.outputs[0] for one in llm.generate(asked, params, use_tqdm=False)]
    found = {
        "tokens": [list(output.token_ids) for output in outputs],
        "first": [{token: value.logprob for token, value in output.logprobs[0].items()} for output in outputs],
        "accepted": sum(
            metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens"
        ),
    }
    Path(to).write_text(json.dumps(found))


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    # vLLM asks for AMX, but its FP8 kernel runs with AVX-512 too.
    cpu_moe.CPUExpertsFp8._supports_current_device = staticmethod(lambda: True)
    forked = multiprocessing.get_context("fork")  # all of vLLM is imported once, and a process has one engine
    for number, run in enumerate(request["runs"]):
        process = forked.Process(target=answer, args=(run, request["prompts"], f"{sys.argv[2]}.{number}.json"))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"run {number} ended with {process.exitcode}")


if __name__ == "__main__":  # vLLM's own processes import this file
    main()
