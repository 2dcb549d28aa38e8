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

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm_server import ask, running, server, streamed
from vllm_tiny import LENGTHS, NEW_TOKENS, Expected, expected, prompts, tiny_model, write_checkpoint

STREAMED = slice(6, 14)  # eight prompts of middling length
STREAMED_TOKENS = 40
OURS = "this LongCat model has zemoe's MoE layers"
# Both sides compute in float32 and differ by some 1e-6; closer calls than this say nothing about either.
CLEAR = 1e-4


class Reference:
    def __init__(self, folder: Path) -> None:
        model = tiny_model()
        self.batch: Expected = expected(model, prompts())
        self.streams: Expected = expected(model, prompts()[STREAMED], STREAMED_TOKENS)
        self.published = write_checkpoint(folder / "published", model)
        self.saved = write_checkpoint(folder / "saved", model, dead_rows=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    return Reference(tmp_path_factory.mktemp("longcat"))


@pytest.fixture
def environment(tmp_path_factory) -> dict[str, str]:
    cache = str(tmp_path_factory.getbasetemp() / "vllm_cache")
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": cache,
        "VLLM_LOGGING_LEVEL": "INFO",
    }


def run(folder: Path, model: Path, environment: dict[str, str], **engine) -> tuple[list[list[int]], str]:
    """(greedy tokens of all prompts in one batch, the log) of a process of its own."""
    request = {"model": str(model), "prompts": prompts(), "new_tokens": NEW_TOKENS, "engine": engine}
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(Path(__file__).with_name("vllm_run.py")), "request.json", "answer.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    return json.loads((folder / "answer.json").read_text())["tokens"], log


def said(log: str) -> list[str]:
    return [line for line in log.splitlines() if "MoE layers" in line]


def test_the_reference_is_clear(reference):
    """No call is close, the prompts differ in length, and the text is no endless repetition."""
    assert min(reference.batch.margin, reference.streams.margin) > CLEAR
    assert len(set(LENGTHS)) >= 20
    assert len({token for tokens in reference.batch.tokens for token in tokens}) > 60


def test_in_one_process_and_eager(reference, environment, tmp_path):
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    tokens, log = run(tmp_path, reference.published, environment, enforce_eager=True)
    assert tokens == reference.batch.tokens
    assert len(said(log)) == 1 and OURS in log and "backend 'cpu'" in log


def test_two_tensor_parallel_ranks(reference, environment, tmp_path):
    """In processes of their own. The checkpoint has tensors for the zero experts, as transformers writes it."""
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    tokens, log = run(tmp_path, reference.saved, environment, enforce_eager=True, tensor_parallel_size=2)
    assert tokens == reference.batch.tokens
    assert len(said(log)) == 1 and OURS in log and "tensor parallel 2" in log


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
