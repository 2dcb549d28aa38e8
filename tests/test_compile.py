"""torch.compile(fullgraph=True) of a layer on a CPU: each dtype, with and without gradients, few and many tokens.

T tokens, H hidden size, I expert width, E FFN experts, A slots, K choices.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from helpers.judge import one_thread
from zemoe import MoE, MoEConfig

KINDS = {
    "identity": (("identity", 2),),
    "none": (),
    "all": (("constant", 2), ("identity", 1), ("scaled_identity", 1), ("zero", 1)),
}
H, I, E, K = 16, 8, 4, 3


def _layer(kinds: str, dtype: torch.dtype) -> MoE:
    zeros = KINDS[kinds]
    torch.manual_seed(0)
    layer = MoE(MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K, zero_expert_kinds=zeros))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer.to(dtype)


def _results(layer: MoE, call, x: Tensor, trained: bool) -> list[Tensor]:
    if not trained:
        with torch.no_grad():
            return [call(x)]
    leaf = x.clone().requires_grad_()
    out = call(leaf)
    return [out, *torch.autograd.grad(out.float().square().sum(), [leaf, *layer.parameters()])]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("T", [1, 3, 200])  # one and more tokens in a single loop, then the operators for many
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_whole_layer(dtype: torch.dtype, trained: bool, T: int, kinds: str):
    layer = _layer(kinds, dtype)
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with one_thread():
        wanted = _results(layer, layer, x, trained)
        got = _results(layer, compiled, x, trained)
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for mine, other in zip(got, wanted, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert (mine.float() - other.float()).abs().max() <= tolerance * other.float().abs().max()


_WITHOUT_AVX512 = """
import torch
from zemoe import fused_experts
from zemoe.kernels.cpu import products
generator = torch.Generator().manual_seed(0)
x, w13, w2 = (torch.randn(shape, generator=generator).bfloat16() for shape in ((70, 16), (1, 16, 16), (1, 16, 8)))
w13.requires_grad_()
out = fused_experts(x, w13, w2, torch.ones(70, 1), torch.zeros(70, 1, dtype=torch.int64), num_experts=1,
                    zero_expert_kinds=())
out.float().sum().backward()
gate, up = (x.float() @ w13[0].float().T).chunk(2, 1)
wanted = (torch.nn.functional.silu(gate) * up) @ w2[0].float().T
assert (out.float() - wanted).abs().max() <= 0.02 * wanted.abs().max()
assert not products.FAST_BFLOAT16
"""


def test_bfloat16_where_onednn_is_kept_from_it():
    """On a CPU that has instructions for bfloat16 too: oneDNN's own variable decides what it builds."""
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _WITHOUT_AVX512]
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
