"""LongCat-Flash with our layers in the ways that transformers generates and places models; greedy text is stock's."""

from __future__ import annotations

import copy
import io

import accelerate
import pytest
import torch
from transformers import Cache, ContinuousBatchingConfig, GenerationConfig, LongcatFlashForCausalLM
from transformers.cache_utils import QuantizedLayer

import zemoe.integrations.transformers as bridge
from helpers import transformers_shared
from helpers.transformers_shared import TOLERANCE, greedy, logits_of
from helpers.transformers_tiny import tiny_ids, tiny_model
from zemoe.integrations.transformers.cache import CACHE

# Fixtures
transformers_is_left_as_it_was = transformers_shared.transformers_is_left_as_it_was
ids = transformers_shared.ids
stock = transformers_shared.stock
stock_logits = transformers_shared.stock_logits
folders = transformers_shared.folders


@pytest.fixture(scope="module")
def ours(stock) -> LongcatFlashForCausalLM:
    """Never changed by a test."""
    model = copy.deepcopy(stock)
    bridge.patch_(model)
    return model


# --- caches


class Int8Layer(QuantizedLayer):
    """The least that a quantized cache may be: a scale a position; transformers' own need packages that we don't."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True) / 127 + 1e-9
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor):
        numbers, scale = q_tensor
        return numbers * scale


def test_static_and_quantized_caches(stock, ours, ids):
    expected = greedy(stock, ids)
    assert torch.equal(greedy(ours, ids, cache_implementation="static", disable_compile=True), expected)

    def quantized() -> Cache:
        return Cache(layers=[Int8Layer(residual_length=2) for _ in range(4)])  # two attentions a layer

    rounded = greedy(stock, ids, **{CACHE: quantized()})
    assert torch.equal(greedy(ours, ids, **{CACHE: quantized()}), rounded)
    layer = quantized()
    ours.generate(ids, max_new_tokens=3, **{CACHE: layer}, pad_token_id=0)
    assert layer.layers[0]._quantized_keys[0].dtype == torch.int8


def test_continuous_batching():
    """Prompts of mixed length, more than fit in one batch, so that they enter and leave while others run.

    transformers' paged cache knows one size of heads, `config.head_dim`; so the heads of this model are made equal.
    """
    stock = tiny_model(v_head_dim=16)
    ours = copy.deepcopy(stock)
    bridge.patch_(ours)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in (3, 17, 9, 1, 12, 6)]
    alone = [greedy(stock, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    ours.config.head_dim = 16  # after its rotary frequencies are made

    def together(model: LongcatFlashForCausalLM) -> list[list[int]]:
        results = model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                max_batch_tokens=16, num_blocks=64, max_memory_percent=0.01
            ),
        )
        return [result.generated_tokens for result in results.values()]

    if CACHE == "cache":  # from 5.24 on
        stock.config.head_dim = 16
        assert together(stock) == [[]] * len(prompts)
        pytest.skip("the pages of this transformers don't fit LongCat's compressed keys, with its own layers either")
    assert together(ours) == alone


# --- torch.export


class Logits(torch.nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def test_an_exported_program_computes_what_the_model_does(ours, ids):
    with torch.no_grad():
        program = torch.export.export(Logits(ours), (ids,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    expected = logits_of(ours, ids)
    for runnable in (program.module(), torch.export.load(file).module()):
        assert (runnable(ids) - expected).abs().max() < TOLERANCE


def test_a_program_for_any_number_of_tokens(ours):
    """With the backend that does the same for any number."""
    model = copy.deepcopy(ours)
    bridge.patch_(model, backend="torch")
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=32)}
    with torch.no_grad():
        program = torch.export.export(Logits(model), (tiny_ids(),), dynamic_shapes={"ids": sizes}).module()
    for batch, length in ((1, 2), (3, 5), (7, 32)):
        ids = tiny_ids(batch, length)
        assert (program(ids) - logits_of(ours, ids)).abs().max() < TOLERANCE


# --- offloading


PLACES = {
    "layers on disk": {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"},
    "experts on disk": {
        "model.layers.0.mlp": "disk",
        "model.layers.0.self_attn": "cpu",
        "model.layers.0.mlps": "cpu",
        "model.layers.0.input_layernorm": "cpu",
        "model.layers.0.post_attention_layernorm": "cpu",
        "model.layers.1.mlp.router": "cpu",
        "model.layers.1.mlp.experts": "disk",
        "model.layers.1.self_attn": "disk",
        "model.layers.1.mlps": "cpu",
        "model.layers.1.input_layernorm": "cpu",
        "model.layers.1.post_attention_layernorm": "cpu",
        "lm_head": "cpu",
    },
}
ALWAYS = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


@pytest.mark.parametrize(("layout", "place"), list(zip(["original", "transformers"], PLACES, strict=True)))
def test_a_device_map_with_disk(folders, stock_logits, ids, tmp_path, layout, place):
    with bridge.applied():
        model = LongcatFlashForCausalLM.from_pretrained(
            folders[layout], device_map=ALWAYS | PLACES[place], offload_folder=tmp_path
        )
    assert type(model.model.layers[1].mlp) is bridge.ZeroExpertLongcatMoE
    assert model.model.layers[1].mlp.experts.gate_up_proj.is_meta
    assert (logits_of(model, ids) - stock_logits).abs().max() < TOLERANCE


def test_offloading_a_patched_model(stock, stock_logits, ids):
    """What a map with "cpu" beside an accelerator does: weights stay in memory and visit the device for each call."""
    model = copy.deepcopy(stock)
    bridge.patch_(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    router = model.model.layers[0].mlp.router
    assert router.classifier.weight.is_meta and model.model.layers[0].mlp.experts.down_proj.is_meta
    assert (logits_of(model, ids) - stock_logits).abs().max() < TOLERANCE
