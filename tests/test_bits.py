"""What docs/train.md promises about bits, as it stands there ("To the bit").

A process of its own computes each time, so that what ran before in this one has no say. The numbers of a run that was
killed and resumed are in training/test_run.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

# A layer of `slots` slots on `threads` threads: a line for each of five calls, in which y is without gradients.
# Torch's softmax backward gives other bits on another number of threads where the slots don't fill its vectors: with 12
# slots on a CPU with AVX2, with 280 on one with AVX-512. So a number of threads that somebody changes shows.
LAYER = """
import hashlib, sys
import torch
from zemoe import MoE, MoEConfig

slots, dtype, T, threads = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
generator = torch.Generator().manual_seed(slots)
config = MoEConfig(
    hidden_size=64, intermediate_size=48, num_experts=slots - 4, top_k=4, zero_expert_kinds=(("identity", 4),)
)
layer = MoE(config)
for parameter in layer.parameters():
    parameter.data = torch.randn(parameter.shape, generator=generator) / 8
for experts in (layer.w13, layer.w2):
    experts.data = experts.data.to(dtype)
x = torch.randn(T, 64, generator=generator).to(dtype).requires_grad_()
g = torch.randn(T, 64, generator=generator).to(dtype)


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


kept = []
for call in range(5):
    with torch.no_grad():
        y = layer(x)
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    layer(x).backward(g)
    print(digest(y), *(digest(t.grad) for t in (x, layer.w13, layer.w2, layer.router.classifier.weight)))
    assert torch.get_num_threads() == threads, "a call has changed the number of threads"
    kept.append(torch.full((1000 + 77 * call,), float("nan")))  # other memory at the next call
    if call == 2:  # back and forth
        torch.set_num_threads(3 - threads)
        layer(x).sum().backward()
        torch.set_num_threads(threads)
"""


def calls(slots: int, dtype: str, T: int, threads: int) -> list[list[str]]:
    arguments = [sys.executable, "-c", LAYER, str(slots), dtype, str(T), str(threads)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("slots", "dtype", "T"), [(12, "float32", 64), (280, "float32", 64), (12, "bfloat16", 64), (12, "float32", 3)]
)
def test_the_same_input_gives_the_same_bits(slots, dtype, T, threads):
    first = calls(slots, dtype, T, threads)
    assert len(first) == 5 and len(first[0]) == 5 and all(call == first[0] for call in first)
    assert calls(slots, dtype, T, threads)[:1] == first[:1]


@pytest.mark.parametrize("slots", [12, 280])
def test_the_number_of_threads_changes_no_bit_of_the_compiled_loops(slots):
    pytest.importorskip("numba")
    one, two = calls(slots, "float32", 64, 1)[0], calls(slots, "float32", 64, 2)[0]
    assert one[0] == two[0]  # y without gradients; gradients pass through torch's operators
