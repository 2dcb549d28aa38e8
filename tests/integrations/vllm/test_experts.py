"""The layer whose FFN experts are vLLM's own: built by vLLM itself and run on a CPU, unquantised and in FP8.

`make test-vllm` runs this in the engine's environment.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from helpers.vllm_fp8 import BLOCK, in_blocks
from zemoe.integrations.vllm import layers
from zemoe.integrations.vllm.layers import ZeroExpertLongcatMoEAroundTheirs

# vLLM's kernels for CPUs want multiples of 32, and blocks of FP8 are of 128.
H, WIDTH, E, Z, K = 256, 128, 6, 5, 4
SCALING = 2.5


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    """vLLM's groups of ranks, with this process alone in them."""
    store = tmp_path_factory.mktemp("store") / "store"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


class Layer:
    """A loaded layer, with what vLLM has around it, and its weights [E, 2I, H] and [E, H, I]."""

    def __init__(self, fp8: bool = False, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * 0.1

        self.config, self.dtype = VllmConfig(), dtype
        quantised = Fp8Config(True, "dynamic", weight_block_size=[BLOCK, BLOCK]) if fp8 else None
        with set_current_vllm_config(self.config):
            self.module = ZeroExpertLongcatMoEAroundTheirs(
                SimpleNamespace(routed_scaling_factor=SCALING, zero_expert_num=Z),
                E,
                K,
                H,
                WIDTH,
                params_dtype=dtype,
                quant_config=quantised,
                prefix="model.layers.0.mlp",
            )
        named = dict(self.module.named_parameters())
        self.gate_up, self.down = torch.empty(E, 2 * WIDTH, H), torch.empty(E, H, WIDTH)
        for e in range(E):
            parts = {"w1": self.gate_up[e, :WIDTH], "w3": self.gate_up[e, WIDTH:], "w2": self.down[e]}
            for shard, part in parts.items():
                weight = normal(*part.shape).to(dtype)
                suffixes = {"weight": weight}
                if fp8:
                    quantised_weight, scale, weight = in_blocks(weight.float())
                    suffixes = {"weight": quantised_weight, "weight_scale_inv": scale}
                part.copy_(weight)
                for suffix, tensor in suffixes.items():
                    parameter = named[f"experts.routed_experts.{'w2' if shard == 'w2' else 'w13'}_{suffix}"]
                    loader = parameter.weight_loader
                    assert loader(
                        parameter, tensor, f"{shard}.{suffix}", shard_id=shard, expert_id=e, return_success=True
                    )
        self.router = self.module.router
        self.router.classifier.weight.data.copy_(normal(E + Z, H) * 2)
        self.router.e_score_correction_bias.weight_loader(self.router.e_score_correction_bias, normal(E + Z) * 0.5)

    def ready(self) -> Layer:
        """As vLLM calls it once all is loaded: kernels get their weights in their own order."""
        routed = self.module.experts.routed_experts
        with set_current_vllm_config(self.config):
            routed.quant_method.process_weights_after_loading(routed)
        return self

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        with set_current_vllm_config(self.config), set_forward_context(None, self.config, num_tokens=len(x_TH)):
            return self.module(x_TH)

    def choices(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores [T, A], ids [T, K]) in float64."""
        scores = (x_TH.double() @ self.router.classifier.weight.double().T).softmax(-1)
        return scores, (scores + self.router.e_score_correction_bias.double()).topk(K).indices

    def by_loops(self, x_TH: torch.Tensor) -> torch.Tensor:
        scores, ids_TK = self.choices(x_TH)
        y_TH = torch.zeros_like(x_TH, dtype=torch.float64)
        for t, ids in enumerate(ids_TK.tolist()):
            for e in ids:
                x = value = x_TH[t].double()
                if e < E:
                    gate, up = (self.gate_up[e].double() @ x).chunk(2)
                    value = self.down[e].double() @ (torch.nn.functional.silu(gate) * up)
                y_TH[t] += SCALING * scores[t, e] * value
        return y_TH


def tokens(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(scope="module")
def layer(one_rank) -> Layer:
    return Layer().ready()


@pytest.mark.parametrize("count", [1, 3, 70])
def test_layer(layer, count):
    x_TH = tokens(count)
    before = x_TH.clone()
    y_TH = layer(x_TH)
    assert y_TH.shape == x_TH.shape and y_TH.dtype == x_TH.dtype
    torch.testing.assert_close(y_TH.double(), layer.by_loops(before), rtol=1e-4, atol=1e-5)
    _, ids_TK = layer.choices(before)
    assert (ids_TK < E).any() and (ids_TK >= E).any()


def allow_fp8(monkeypatch) -> None:
    """vLLM asks for AMX, but its FP8 kernel runs with AVX-512 too."""
    if not hasattr(torch.ops._C, "fused_experts_cpu"):
        pytest.skip("vLLM has no FP8 experts for this CPU")
    monkeypatch.setattr(cpu_moe.CPUExpertsFp8, "_supports_current_device", staticmethod(lambda: True))


@pytest.mark.parametrize("count", [1, 70])
def test_fp8(monkeypatch, count):
    allow_fp8(monkeypatch)
    layer = Layer(fp8=True, dtype=torch.bfloat16).ready()
    x_TH = tokens(count, torch.bfloat16)
    y_TH, expected = layer(x_TH), layer.by_loops(x_TH)
    assert y_TH.dtype == torch.bfloat16
    assert (y_TH - expected).norm() < 0.01 * expected.norm()


def test_zero_choices_go_to_experts_that_are_chosen_anyway(layer, monkeypatch):
    """With weight 0. vLLM's own router sends them all to expert 0, which is here one that no token chooses."""
    bias = layer.router.e_score_correction_bias
    monkeypatch.setattr(bias, "data", torch.cat([torch.tensor([-10.0]), bias.data[1:]]))
    x_TH = tokens(70)
    _, expected = layer.choices(x_TH)
    seen = []
    theirs = layer.module.experts.router
    monkeypatch.setattr(theirs, "capture_fn", seen.append)
    weights = []
    unpacked = theirs.custom_routing_function

    def watch(**given):
        weights.append(unpacked(**given)[0])
        return unpacked(**given)

    monkeypatch.setattr(theirs, "custom_routing_function", watch)
    layer(x_TH)
    ids_TK = seen[0].long()
    zero_TK = expected >= E
    assert torch.equal(ids_TK[~zero_TK], expected[~zero_TK]) and zero_TK.any()
    assert torch.equal(weights[0] == 0, zero_TK)
    for ids, zero in zip(ids_TK, zero_TK, strict=True):
        assert zero.all() or set(ids[zero].tolist()) <= set(ids[~zero].tolist())


def test_a_token_with_zero_choices_only(layer, monkeypatch):
    bias = layer.router.e_score_correction_bias
    monkeypatch.setattr(bias, "data", torch.cat([torch.full((E,), -10.0), torch.zeros(Z)]))
    x_TH = tokens(5)
    torch.testing.assert_close(layer(x_TH).double(), layer.by_loops(x_TH), rtol=1e-4, atol=1e-5)


def test_each_rank_adds_the_zero_experts(layer, monkeypatch):
    """vLLM's experts give back what is summed over ranks, in all supported versions (vllm_minors.py)."""
    x_TH = tokens(9)
    scores, ids_TK = layer.choices(x_TH)
    zero_TK = ids_TK >= E
    factor_T1 = SCALING * (scores.gather(1, ids_TK) * zero_TK).sum(-1, keepdim=True)
    monkeypatch.setattr(layer.module.experts, "forward", lambda hidden_states, router_logits: hidden_states.mul_(0))
    for rank in (0, 1):
        monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: 2)
        torch.testing.assert_close(layer(x_TH.clone()).double(), factor_T1 * x_TH, rtol=1e-4, atol=1e-6)


def test_experts_that_choose_by_themselves_are_refused(monkeypatch):
    """They would take our packed routing for logits."""
    monkeypatch.setattr(cpu_moe.CPUUnquantizedExperts, "is_monolithic", staticmethod(lambda: True))
    with pytest.raises(layers.UnsupportedExpertsError, match=r"themselves \(UnquantizedFusedMoEMethod\)"):
        Layer()


def test_a_missing_kernel_is_named(monkeypatch):
    monkeypatch.setattr(cpu_moe.CPUExpertsFp8, "_supports_current_device", staticmethod(lambda: False))
    with pytest.raises(layers.UnsupportedExpertsError, match=r"no experts for it here \(Fp8MoEMethod\)"):
        Layer(fp8=True, dtype=torch.bfloat16)


def test_compiles_once_for_all_numbers_of_tokens(layer):
    """Ours around vLLM's, without a guard on the number: vLLM drops guards."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def ours(x_TH):
        return layer.module(x_TH)

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for count in (70, 2, 9):
        x_TH = tokens(count)
        torch._dynamo.mark_dynamic(x_TH, 0)
        expected = layer(x_TH.clone())
        with set_current_vllm_config(layer.config), set_forward_context(None, layer.config, num_tokens=count):
            assert torch.equal(compiled(x_TH), expected)
    assert len(graphs) == 1
