"""SGLang itself on a CPU, with the plug-in found by its entry point: tokens of transformers, layers of reference.py.

`make test-sglang` runs this in the engine's environment. tests/helpers/sglang_cpu has what stands in for packages
that are not published for CPUs, and a plug-in that records what MoE layers compute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT

pytest.importorskip("sglang", reason="SGLang has an environment of its own: make test-sglang")

import sglang

from helpers.sglang_server import server, streamed
from helpers.vllm_tiny import NEW_TOKENS, SIZES, Expected, expected, prompts, tiny_model, write_checkpoint
from zemoe import reference

ON_CPU = ROOT / "tests" / "helpers" / "sglang_cpu"
E, Z, K, SCALE = (SIZES[name] for name in ("n_routed_experts", "zero_expert_num", "moe_topk", "routed_scaling_factor"))
OURS = "zemoe: LongCat-Flash models have MoE layers computed by zemoe"
FEW = slice(3, 7)
STREAMED = slice(6, 14)  # eight prompts of middling length
# Both sides compute in float32; layers give values up to 40, and tokens are decided by more than this.
CLOSE, CLEAR = 1e-4, 1e-4
# Up to 0.5.14 the layer sums over ranks, later the model does.
OLD = tuple(map(int, sglang.__version__.split(".")[:3])) <= (0, 5, 14)
# SGLang's rotary embedding on CPUs knows only this kind, which with a factor of 1 is the plain one.
YARN = {"rope_type": "yarn", "rope_theta": 1e7, "factor": 1.0, "original_max_position_embeddings": 512}
ROPE = {"rope_parameters": {"rope_theta": 1e7}} if OLD else {"rope_scaling": YARN | {"mscale": 1, "mscale_all_dim": 1}}
ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
    "context_length": 512,
    "max_total_tokens": 8192,
    "random_seed": 0,
    # Older versions of transformers write a layer for each attention, which published configurations don't.
    "json_model_override_args": json.dumps(ROPE | {"num_hidden_layers": SIZES["num_layers"]}),
}


class Reference:
    def __init__(self, folder: Path) -> None:
        self.model = tiny_model()
        self.published = write_checkpoint(folder / "published", self.model)
        self.saved = write_checkpoint(folder / "saved", self.model, dead_rows=True)
        self.weights = self.model.state_dict()

    @cached_property
    def batch(self) -> Expected:
        return expected(self.model, prompts())

    def layer(self, layer_id: int, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the MoE layer's output, the zero experts' part of it) in float64."""
        weights = {
            name.removeprefix(f"model.layers.{layer_id}.mlp."): weight.double()
            for name, weight in self.weights.items()
            if name.startswith(f"model.layers.{layer_id}.mlp.")
        }
        x_TH = x_TH.double()
        _, _, weights_TK, ids_TK = reference.select(
            x_TH @ weights["router.classifier.weight"].T,
            K,
            num_experts=E,
            zero_expert_kinds="identity",
            e_score_correction_bias=weights["router.e_score_correction_bias"],
            routed_scaling_factor=SCALE,
        )
        output_TH = reference.experts(
            x_TH,
            weights["experts.gate_up_proj"][:E],
            weights["experts.down_proj"][:E],
            weights_TK,
            ids_TK,
            num_experts=E,
            zero_expert_kinds=(("identity", Z),),
        )
        return output_TH, weights_TK.masked_fill(ids_TK < E, 0).sum(1, keepdim=True) * x_TH


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Reference:
    return Reference(tmp_path_factory.mktemp("longcat"))


@dataclass
class Layer:
    """One call of a MoE layer: x and the sum of all ranks' outputs [T, H], class names of the layer and its experts."""

    layer_id: int
    ranks: int
    x_TH: torch.Tensor
    output_TH: torch.Tensor
    kinds: tuple[str, str]


@dataclass
class Run:
    tokens: list[list[int]]
    log: str
    layers: list[Layer]


def recorded(folder: Path) -> list[Layer]:
    calls: dict[tuple[int, int], list] = {}
    for path in sorted(folder.glob("*.pt")):
        layer_id, _, call = map(int, path.name.split(".")[:3])
        calls.setdefault((layer_id, call), []).append(torch.load(path))
    layers = []
    for (layer_id, _), ranks in calls.items():
        (x_TH, _, kinds), output_RTH = ranks[0], torch.stack([rank[1] for rank in ranks]).double()
        layers.append(Layer(layer_id, len(ranks), x_TH, output_RTH[0] if OLD else output_RTH.sum(0), kinds))
    return layers


def environment(folder: Path, **changes: str) -> dict[str, str]:
    return os.environ | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_ON_CPU_RECORD": str(folder),
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",
        "HF_HUB_OFFLINE": "1",
        **changes,
    }


def run(folder: Path, model: Path, asked: list[list[int]], new_tokens: int, tp_size: int = 1, **rest) -> Run:
    """rest: other arguments of the engine, in lower case, or variables of its environment, in upper case."""
    variables = {name: value for name, value in rest.items() if name.isupper()}
    if tp_size > 1:
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(tp_size)))
    engine = ENGINE | {name: value for name, value in rest.items() if name.islower()}
    engine |= {"model_path": str(model), "tp_size": tp_size, "log_level": "info"}
    (folder / "request.json").write_text(json.dumps({"prompts": asked, "new_tokens": new_tokens, "engine": engine}))
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "sglang_run.py"), "request.json", "answer.json"]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder, **variables), capture_output=True, text=True, timeout=600
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    return Run(json.loads((folder / "answer.json").read_text())["tokens"], log, recorded(folder))


def said(log: str) -> set[str]:
    return {line.partition("] ")[2] for line in log.splitlines() if "zemoe: LongCat-Flash" in line}


def assert_layers_are_right(found: Run, published: Reference, ranks: int, experts: str) -> None:
    assert len(found.layers) == 2 * 3
    for layer in found.layers:
        assert layer.ranks == ranks and layer.kinds == ("ZeroExpertLongcatMoE", experts)
        output_TH, zero_TH = published.layer(layer.layer_id, layer.x_TH)
        assert zero_TH.abs().max() > 1
        assert (layer.output_TH - output_TH).abs().max() < CLOSE


def test_the_reference_is_clear(published):
    assert published.batch.margin > CLEAR
    assert len({token for tokens in published.batch.tokens for token in tokens}) > 60


def test_one_rank(published, tmp_path):
    found = run(tmp_path, published.published, prompts(), NEW_TOKENS)
    assert found.tokens == published.batch.tokens
    assert said(found.log) == {OURS}
    assert_layers_are_right(found, published, 1, "ZeroExpertLongcatExperts")
    assert sorted({len(layer.x_TH) for layer in found.layers}) == [len(prompts()), sum(map(len, prompts()))]


def test_two_tensor_parallel_ranks(published, tmp_path):
    """Prompts in chunks, and a checkpoint with tensors for the zero experts, as transformers writes it."""
    found = run(tmp_path, published.saved, prompts(), NEW_TOKENS, tp_size=2, chunked_prefill_size=256)
    assert found.tokens == published.batch.tokens
    assert_layers_are_right(found, published, 2, "ZeroExpertLongcatExperts")


def test_experts_spread_over_ranks_are_sglangs_own(published, tmp_path):
    found = run(tmp_path, published.published, prompts()[FEW], 4, tp_size=2, ep_size=2)
    assert found.tokens == [tokens[:4] for tokens in published.batch.tokens[FEW]]
    assert "FFN experts by SGLang: the experts are spread over 2 ranks" in found.log
    assert_layers_are_right(found, published, 2, "FusedMoE")


def test_server(published, tmp_path):
    """Eight clients at once, of which one leaves in the middle, and one after them."""
    log, asked, right = tmp_path / "server.log", prompts()[STREAMED], published.batch.tokens[STREAMED]
    with server(published.published, log, environment(tmp_path), ENGINE) as port, ThreadPoolExecutor(8) as clients:
        leaving = clients.submit(streamed, port, asked[0], 400, leave_after=3)
        staying = [clients.submit(streamed, port, prompt, NEW_TOKENS) for prompt in asked[1:]]
        assert [client.result() for client in staying] == right[1:]
        seen = leaving.result()
        assert 3 <= len(seen) < NEW_TOKENS and seen == right[0][: len(seen)]
        assert streamed(port, asked[0], NEW_TOKENS) == right[0]
    assert said(log.read_text()) == {OURS}


def test_why_sglang_is_no_oracle(tmp_path, monkeypatch):
    """Its own layer, its Triton kernel interpreted: the zero experts' sum is on each rank, unscaled, of 256 columns."""
    monkeypatch.setitem(SIZES, "hidden_size", 256 + 200)
    wide = Reference(tmp_path / "wide")
    variables = {"ZEMOE_SGLANG": "0", "TRITON_INTERPRET": "1"}
    found = run(tmp_path, wide.published, prompts()[FEW], 4, tp_size=2, **variables)
    assert said(found.log) == {"zemoe: LongCat-Flash models have SGLang's own MoE layers: ZEMOE_SGLANG=0"}
    assert len(found.layers) == 2 * 3
    for layer in found.layers:
        assert layer.ranks == 2 and layer.kinds == ("LongcatFlashMoE", "FusedMoE")
        right_TH, zero_TH = wide.layer(layer.layer_id, layer.x_TH)
        theirs_TH = right_TH - zero_TH
        theirs_TH[:, :256] += 2 / SCALE * zero_TH[:, :256]
        assert (layer.output_TH - theirs_TH).abs().max() < CLOSE
        assert (layer.output_TH - right_TH).abs().max() > 0.1
