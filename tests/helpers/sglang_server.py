"""SGLang's server in a process of its own, and a streaming client."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.vllm_server import connect, free_port


def streamed(port: int, prompt: list[int], new_tokens: int, leave_after: int | None = None) -> list[int]:
    """The tokens as they arrive; a client that leaves resets its connection, as one that was killed does."""
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    connection = connect(port)
    body = json.dumps({"input_ids": prompt, "sampling_params": params, "stream": True})
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    tokens: list[int] = []
    for line in response:
        if not line.startswith(b"data: ") or b"[DONE]" in line:
            continue
        tokens = json.loads(line[6:])["output_ids"]  # all so far
        if leave_after is not None and len(tokens) >= leave_after:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            response.close()
            break
    connection.close()
    return tokens


@contextmanager
def server(model: Path, log: Path, environment: dict[str, str], engine: dict[str, object]) -> Iterator[int]:
    """The port of a server that is ready; ended with the context. engine: as of sglang.Engine."""
    # Up to 0.5.14 SGLang takes the port 10000 above, too.
    port = next(port for port in iter(free_port, None) if port < 55000)
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)]
    for name, value in engine.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + 600
            while True:
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < until, f"no answer for 600 s:\n{log.read_text()[-4000:]}"
                try:
                    connection = connect(port)
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        break
                except OSError:
                    pass
                time.sleep(0.5)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
