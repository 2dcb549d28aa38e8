"""One run of vLLM in a process of its own: `python vllm_run.py REQUEST.json ANSWER.json`.

The request has "model", "prompts" (lists of token ids), "new_tokens" and "engine" (arguments of vllm.LLM); the answer
has the greedy tokens of each prompt, all of them asked for at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(
        request["model"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=32,
        kv_cache_memory_bytes=1 << 27,
        seed=0,
        **request["engine"],
    )
    params = SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], params, use_tqdm=False)
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    Path(sys.argv[2]).write_text(json.dumps({"tokens": tokens}))


if __name__ == "__main__":  # vLLM's own processes import this file
    main()
