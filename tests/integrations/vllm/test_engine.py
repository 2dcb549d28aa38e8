"""vLLM itself, with the plug-in found by its entry point: greedy tokens equal to those of transformers' own layers.

`make test-vllm` runs this in the engine's environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from helpers.vllm_server import ask, running, server, streamed
from helpers.vllm_tiny import (
    LENGTHS,
    NEW_TOKENS,
    Expected,
    expected,
    first_log_probabilities,
    fp8_model,
    prompts,
    tiny_model,
    write_checkpoint,
    write_draft_checkpoint,
    write_fp8_checkpoint,
)

STREAMED = slice(6, 14)  # eight prompts of middling length
STREAMED_TOKENS = 40
OURS = "this LongCat model has zemoe's MoE layers"
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# Both sides compute in float32 and differ by some 1e-6; closer calls than this say nothing about either.
CLEAR = 1e-4


class Reference:
    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # operators of this size take longer with two
        model = tiny_model()
        self.batch: Expected = expected(model, prompts())
        self.streams: Expected = expected(model, prompts()[STREAMED], STREAMED_TOKENS)
        self.published = write_checkpoint(folder / "published", model)
        self.saved = write_checkpoint(folder / "saved", model, dead_rows=True)
        self.draft = write_draft_checkpoint(folder / "draft", model)
        quantised = fp8_model()
        self.fp8 = write_fp8_checkpoint(folder / "fp8", quantised)
        self.fp8_first = first_log_probabilities(quantised, prompts())


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    return Reference(tmp_path_factory.mktemp("longcat"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    cache = str(tmp_path_factory.getbasetemp() / "vllm_cache")
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": cache,
        "VLLM_LOGGING_LEVEL": "INFO",
    }


def engine(model: Path, dtype: str = "float32", new_tokens: int = NEW_TOKENS, **arguments) -> dict:
    arguments["enforce_eager"] = True
    return {"model": str(model), "dtype": dtype, "new_tokens": new_tokens, "engine": arguments}


def run(folder: Path, environment: dict[str, str], *engines: dict) -> tuple[list[dict], list[str]]:
    """(what vllm_run.py answers of each engine, what the log says of each)."""
    (folder / "request.json").write_text(json.dumps({"prompts": prompts(), "runs": engines}))
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "vllm_run.py"), "request.json", "answer"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    found = said(log)
    assert len(found) == len(engines)
    return [json.loads((folder / f"answer.{number}.json").read_text()) for number in range(len(engines))], found


def said(log: str) -> list[str]:
    return [line for line in log.splitlines() if "MoE layers" in line]


def test_the_reference_is_clear(reference):
    """No call is close, the prompts differ in length, and the text is no endless repetition."""
    assert min(reference.batch.margin, reference.streams.margin) > CLEAR
    assert len(set(LENGTHS)) >= 20
    assert len({token for tokens in reference.batch.tokens for token in tokens}) > 60


@pytest.fixture(scope="module")
def in_one_process(reference, environment, tmp_path_factory) -> list[tuple[dict, str]]:
    """Four engines one after another, eager, each in the process that asks it: (answer, line of the log) of each."""
    engines = [
        engine(reference.published),
        engine(reference.published, enable_expert_parallel=True),
        engine(reference.draft, speculative_config={"method": "mtp", "num_speculative_tokens": 1}),
    ]
    if AVX512:
        engines.append(engine(reference.fp8, dtype="bfloat16", new_tokens=1))
    environment = environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | ONE_THREAD
    return list(zip(*run(tmp_path_factory.mktemp("run"), environment, *engines), strict=True))


def test_in_one_process_and_eager(reference, in_one_process):
    answer, line = in_one_process[0]
    assert answer["tokens"] == reference.batch.tokens
    assert OURS in line and "backend 'cpu'" in line


def test_around_the_experts_of_vllm(reference, in_one_process):
    """Expert parallelism over one rank: FFN experts are vLLM's, and compute in float32."""
    answer, line = in_one_process[1]
    assert answer["tokens"] == reference.batch.tokens
    assert "routing and zero experts by zemoe, FFN experts by vLLM: expert parallelism" in line


@pytest.mark.skipif(not AVX512, reason="vLLM has no experts in FP8 for this CPU")
def test_fp8(reference, in_one_process):
    """vLLM's experts for FP8 in blocks, with all else in bfloat16: its rounding is what is left of a difference."""
    answer, line = in_one_process[3]
    assert "routing and zero experts by zemoe, FFN experts by vLLM: the model is quantised (fp8)" in line
    off = torch.tensor(
        [
            [abs(value - expected[int(token)]) for token, value in found.items()]
            for found, expected in zip(answer["first"], reference.fp8_first.tolist(), strict=True)
        ]
    )
    assert off.max() < 0.3 and off.mean() < 0.03
    best = reference.fp8_first.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.3
    first = torch.tensor(answer["tokens"])[:, 0]
    assert clear.sum() >= 8 and torch.equal(first[clear], reference.fp8_first.argmax(-1)[clear])


def test_a_draft_model(reference, in_one_process):
    """Its layer has no MoE in vLLM. Drafts are taken now and then, and change no token."""
    answer, line = in_one_process[2]
    assert answer["tokens"] == reference.batch.tokens
    assert OURS in line
    assert answer["accepted"] > 0


def test_two_tensor_parallel_ranks(reference, environment, tmp_path):
    """In processes of their own. The checkpoint has tensors for the zero experts, as transformers writes it."""
    environment = environment | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    (answer,), (line,) = run(tmp_path, environment, engine(reference.saved, tensor_parallel_size=2))
    assert answer["tokens"] == reference.batch.tokens
    assert OURS in line and "tensor parallel 2" in line


def test_server_compiled(reference, environment, tmp_path):
    """vLLM's defaults (compiled by inductor, the engine in its own process) under the OpenAI-compatible server."""
    log = tmp_path / "server.log"
    with server(reference.published, log, environment) as port:
        _, response = ask(port, stream=False, prompt=prompts(), max_tokens=NEW_TOKENS)
        choices = sorted(json.load(response)["choices"], key=lambda choice: choice["index"])
        assert [choice["token_ids"] for choice in choices] == reference.batch.tokens

        asked = prompts()[STREAMED]
        with ThreadPoolExecutor(len(asked)) as clients:
            leaving = clients.submit(streamed, port, asked[0], 400, leave_after=3)
            staying = [clients.submit(streamed, port, prompt, STREAMED_TOKENS) for prompt in asked[1:]]
            assert [client.result() for client in staying] == reference.streams.tokens[1:]
            seen = leaving.result()
        assert 3 <= len(seen) < STREAMED_TOKENS and seen == reference.streams.tokens[0][: len(seen)]
        until = time.monotonic() + 20
        while running(port):  # the request of the client that left is given up
            assert time.monotonic() < until
            time.sleep(0.1)
        assert streamed(port, asked[0], STREAMED_TOKENS) == reference.streams.tokens[0]
    assert len(said(log.read_text())) == 1 and OURS in log.read_text()
