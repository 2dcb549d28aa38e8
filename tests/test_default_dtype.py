"""torch.set_default_dtype changes nothing that has a dtype of its own.

transformers sets it while it builds a model, and so do training scripts for all that they do. Compiled loops take
memory of their own by pointer: of half the size, they would write beyond its end.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from zemoe import MoE, MoEConfig, Routing, select_experts
from zemoe.balance import ffn_experts_per_token, longcat_balance_loss, slot_counts
from zemoe.retrofit import new_router_rows

H = 16
OTHERS = [torch.bfloat16, torch.float16, torch.float64]
KINDS = {"identity": (("identity", 3),), "all": (("constant", 2), ("identity", 1), ("scaled_identity", 1), ("zero", 1))}


@pytest.fixture(params=OTHERS, ids=str)
def other(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    torch.set_default_dtype(torch.float32)


def _layer(kinds: str, dtype: torch.dtype, backend: str) -> MoE:
    torch.manual_seed(0)
    config = MoEConfig(hidden_size=H, intermediate_size=8, num_experts=4, top_k=3, zero_expert_kinds=KINDS[kinds])
    return MoE(config, dtype=dtype, init_std=0.5, backend=backend)


def _run(moe: MoE, x: Tensor, trained: bool) -> list[Tensor]:
    moe.zero_grad()
    with torch.set_grad_enabled(trained):
        y = moe(x)
        if trained:
            y.float().square().sum().backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in moe.parameters() if parameter.grad is not None)]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, its in zip(got, wanted, strict=True):
        assert mine.dtype == its.dtype and torch.equal(mine, its)


@pytest.fixture
def _watched_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that loops get, looked at before they write to it: a test that fails must not end the process."""
    compiled = pytest.importorskip("zemoe.kernels.compiled")
    array = compiled.array

    def watched(tensor: Tensor):
        if tensor.ndim == 2 and tensor.shape[0] == 2:  # what gate and up yield
            assert tensor.dtype == torch.float32
        return array(tensor)

    monkeypatch.setattr(compiled, "array", watched)


@pytest.mark.usefixtures("_watched_loops")
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_layers(other, dtype, backend, kinds):
    for T in (0, 1, 3, 40, 300):
        moe, x = _layer(kinds, dtype, backend), torch.randn(T, H, dtype=torch.float32).to(dtype)
        for trained in (False, True):
            torch.set_default_dtype(torch.float32)
            wanted = _run(moe, x, trained)
            torch.set_default_dtype(other)
            assert_equal(_run(moe, x, trained), wanted)


def _numbers() -> list[Tensor]:
    """What tells and steers training, of 333 tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(333, 12, generator=generator, dtype=torch.float32)
    routing = Routing(logits, *select_experts(logits, 4, num_experts=8, renormalize="real"))
    counts = slot_counts(routing.topk_ids_TK, 12)
    return [
        routing.topk_weights_TK,
        longcat_balance_loss(routing, num_experts=8, ffn_experts_per_token=2.7),
        ffn_experts_per_token(counts, 8, 4),
        new_router_rows(logits, 3, generator),
    ]


def test_routing_losses_and_new_rows(other):
    wanted = _numbers()
    torch.set_default_dtype(other)
    assert_equal(_numbers(), wanted)


def test_all_of_a_router_is_float32(other):
    torch.set_default_dtype(other)
    moe = MoE.moe_plus_plus(H, 8, 4)
    tensors = {**dict(moe.router.named_parameters()), **dict(moe.router.named_buffers())}
    assert "residual.weight" in tensors and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert moe.w13.dtype == other  # whose dtype the caller may leave to the default
