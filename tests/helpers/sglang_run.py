"""One run of SGLang's engine in processes of its own: `python sglang_run.py REQUEST.json ANSWER.json`.

The request has "prompts" (lists of token ids), "new_tokens" and "engine" (arguments of sglang.Engine); the answer has
the greedy tokens of each prompt, all of them asked for at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    import sglang

    engine = sglang.Engine(**request["engine"])
    params = {"temperature": 0, "max_new_tokens": request["new_tokens"], "ignore_eos": True}
    answers = engine.generate(input_ids=request["prompts"], sampling_params=params)
    Path(sys.argv[2]).write_text(json.dumps({"tokens": [answer["output_ids"] for answer in answers]}))
    engine.shutdown()


if __name__ == "__main__":  # SGLang's own processes import this file
    main()
