"""The OpenAI-compatible server of vLLM in a process of its own, and a streaming client."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=120)


def get(port: int, path: str) -> str:
    connection = connect(port)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def ask(port: int, stream: bool, **body) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A completion, greedy, answered with token ids."""
    body |= {"model": "tiny", "temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": stream}
    connection = connect(port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    return connection, response


def streamed(port: int, prompt: list[int], new_tokens: int, leave_after: int | None = None) -> list[int]:
    """The tokens as they arrive; a client that leaves resets its connection, as one that was killed does."""
    connection, response = ask(port, stream=True, prompt=prompt, max_tokens=new_tokens)
    tokens: list[int] = []
    for line in response:
        if not line.startswith(b"data: ") or b"[DONE]" in line:
            continue
        for choice in json.loads(line[6:])["choices"]:
            tokens += choice["token_ids"] or []
        if leave_after is not None and len(tokens) >= leave_after:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            response.close()
            break
    connection.close()
    return tokens


def running(port: int) -> float:
    """How many requests the engine works on."""
    lines = get(port, "/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


@contextmanager
def server(model: Path, log: Path, environment: dict[str, str], *arguments: str) -> Iterator[int]:
    """The port of a server that is ready; ended with the context."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "512"]
    command += ["--kv-cache-memory-bytes", str(1 << 27), *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + 300
            while True:
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < until, f"no answer for 300 s:\n{log.read_text()[-4000:]}"
                try:
                    get(port, "/health")
                    break
                except OSError:
                    time.sleep(0.5)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
