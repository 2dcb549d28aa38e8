"""config.json: every entry that a model is built from is checked, named, and no other one has a say."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from transformers import LongcatFlashConfig

import zemoe.integrations.transformers as bridge
from helpers.tiny_checkpoint import write_checkpoint
from helpers.transformers_shared import logits_of
from helpers.transformers_tiny import SIZES, tiny_config, tiny_ids, tiny_model
from zemoe.checkpoints.config import READ, check_config
from zemoe.checkpoints.files import CheckpointError
from zemoe.checkpoints.longcat import count_numbers, verify
from zemoe.integrations.transformers.layers import modeling

CONFIG = {**SIZES, "model_type": "longcat_flash"}
BILLION = 10**9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


def changed(checkpoint: Path, target: Path, **changes: object) -> Path:
    folder = shutil.copytree(checkpoint, target / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def rope(**entries: object) -> dict:
    return {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4} | entries}


REFUSED = [
    ("max_position_embeddings", {"max_position_embeddings": 0}),
    ("max_position_embeddings", {"max_position_embeddings": None}),
    ("rms_norm_eps", {"rms_norm_eps": 1e39}),
    ("attention_dropout", {"attention_dropout": 1.5}),
    ("hidden_act", {"hidden_act": "relu"}),
    ("hidden_act", {"hidden_act": ["silu"]}),
    ("use_cache", {"use_cache": 1}),
    ("tie_word_embeddings", {"tie_word_embeddings": "no"}),
    ("attention_bias", {"attention_bias": 0}),
    ("pad_token_id", {"pad_token_id": BILLION}),
    ("bos_token_id", {"bos_token_id": 1.0}),
    ("eos_token_id", {"eos_token_id": [1, "2"]}),
    ("dtype", {"dtype": "int8"}),
    ("torch_dtype", {"torch_dtype": ["float32"]}),
    ("head_dim", {"head_dim": 8.0}),
    ("num_key_value_heads", {"num_key_value_heads": True}),
    ("num_hidden_layers", {"num_hidden_layers": 3}),
    ("num_local_experts", {"num_local_experts": 50}),
    ("moe_intermediate_size", {"moe_intermediate_size": 7}),
    ("rope_parameters must be an object", {"rope_parameters": 3}),
    ("rope_scaling must be an object", {"rope_scaling": [1]}),
    ("rope_parameters.factor", rope(factor="x")),
    ("rope_parameters.factor", rope(factor=None)),
    ("rope_parameters.factor", rope(factor=1e300)),
    ("rope_parameters.rope_theta", rope(rope_theta=0)),
    ("rope_theta", {"rope_theta": 10**30}),
    ("rope_theta", {"rope_theta": None}),
    ("rope_parameters.rope_theta", rope(rope_theta=None)),
    ("max_position_embeddings", {"max_position_embeddings": 10**30}),
    ("rope_parameters.original_max_position_embeddings", rope(original_max_position_embeddings=0)),
    ("rope_parameters.beta_slow", rope(beta_slow=32, beta_fast=1)),
    ("rope_parameters.partial_rotary_factor", rope(partial_rotary_factor=0.5)),
    ("rope_parameters.full_attention", rope(full_attention={"rope_type": "default"})),
    ("rope_parameters.long_factor", rope(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[1.0] * 3)),
    ("rope_type", rope(rope_type=["yarn"])),
    ("attention_method", {"attention_method": "LSA"}),
    ("oe_num_layers", {"oe_num_layers": 2}),
    ("ngram_vocab_size_ratio", {"ngram_vocab_size_ratio": 78}),
    ("emb_neighbor_num", {"emb_neighbor_num": 4}),
]


@pytest.mark.parametrize(("key", "changes"), REFUSED, ids=[f"{key}-{i}" for i, (key, _) in enumerate(REFUSED)])
def test_a_value_that_cannot_be(checkpoint, tmp_path, key, changes):
    folder = changed(checkpoint, tmp_path, **changes)
    for call in (verify, bridge.load_config, bridge.load_model):
        with pytest.raises(CheckpointError) as caught:
            call(folder)
        assert str(folder / "config.json") in str(caught.value) and key in str(caught.value)
        assert len(str(caught.value)) <= 500 and str(caught.value).isprintable()


def test_n_gram_embeddings_are_refused_by_the_layers_too(checkpoint, tmp_path):
    """`apply` and from_pretrained would leave the embeddings out, with a warning only."""
    folder = changed(checkpoint, tmp_path, ngram_vocab_size_ratio=78)
    with bridge.applied(), pytest.raises(ValueError, match=r"ngram_vocab_size_ratio.*no part of LongCat-Flash"):
        modeling.LongcatFlashForCausalLM.from_pretrained(folder)
    check_config(CONFIG | {"ngram_vocab_size_ratio": None, "oe_ratio": 0, "attention_method": "MLA"})


IGNORED = {
    "_attn_implementation": 3,
    "attn_implementation": "someone/kernel",
    "_experts_implementation_internal": "eager",
    "num_labels": BILLION,  # a dict of so many labels, in transformers
    "to_dict": 3,
    "return_dict": False,
    "text_config": {"a": 1},
    "transformers_weights": "other.safetensors",
    "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    "per_layer_config": {"0": {"hidden_size": 4}},
    "quantization_config": None,
    "num_hidden_layers": 2,
    "topk_method": "noaux",
}


def test_what_transformers_5_17_writes_has_no_say():
    check_config(CONFIG | {"num_hidden_layers": 56}, "config.json")


def test_what_is_no_part_of_the_architecture_has_no_say(checkpoint, tmp_path):
    folder = changed(checkpoint, tmp_path, **IGNORED)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    found, expected = bridge.load_model(folder), bridge.load_model(checkpoint)
    assert torch.equal(logits_of(found, tiny_ids()), logits_of(expected, tiny_ids()))
    assert not (tmp_path / "executed").exists()


def test_what_is_read_is_what_the_architecture_has():
    """A new entry of transformers' config shows here, with the question whether it is one of the architecture."""
    named = {key for key in READ if hasattr(LongcatFlashConfig, key) or key in LongcatFlashConfig.__annotations__}
    # transformers 5.17 has num_hidden_layers, with a default that says nothing: compared with num_layers alone.
    own = set(LongcatFlashConfig.__annotations__) - {"transformers_version", "architectures", "num_hidden_layers"}
    assert own <= named


@pytest.mark.parametrize(
    "key", ["num_layers", "n_routed_experts", "zero_expert_num", "vocab_size", "hidden_size", "ffn_hidden_size"]
)
@pytest.mark.parametrize("layout", ["original", "packed"])
def test_a_billion_is_refused_in_little_memory(checkpoint, tmp_path, key, layout):
    folder = changed(checkpoint, tmp_path, **{key: BILLION})
    if layout == "packed":
        shutil.rmtree(folder)
        tiny_model().save_pretrained(folder, save_original_format=False)
    about = json.loads((folder / "config.json").read_text())
    about.pop("num_hidden_layers", None)  # which would be another reason
    (folder / "config.json").write_text(json.dumps(about | {key: BILLION}))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*tensor model\.|model\.safetensors.*tensor lm_head"):
        bridge.load_model(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}])
def test_count_numbers(changes):
    """Without a model: the parameters of one with our layers, and a selection bias a layer."""
    config = tiny_config(**changes)
    with bridge.applied():
        model = modeling.LongcatFlashForCausalLM(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert count_numbers(CONFIG | changes) == parameters + 2 * (5 + 3)


def test_the_single_file_beside_an_index(checkpoint, tmp_path):
    """transformers would read the one that was not checked."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "part.safetensors")
    names = verify(folder).tensors
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is there beside model\.safetensors\.index\.json"):
        verify(folder)
    (folder / "model.safetensors").unlink()
    assert verify(folder).files == ("part.safetensors",)


def test_a_head_that_is_tied_must_fit(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = changed(checkpoint, tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    verify(folder)
    save_file(tensors | {"lm_head.weight": torch.zeros(3, 3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight F32 \[3, 3\] is not part"):
        verify(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "must hold a JSON object"),
        ('{"cache_implementation": 3}', "cache_implementation can't be used"),
        ('{"validate": 3}', "validate can't be used"),
        ("\ufeff{}", "byte order mark"),
        ('{"eos_token_id": 2.5}', "eos_token_id must be a token id, a list of them, or null, got 2.5"),
        ('{"eos_token_id": [1, "2"]}', "eos_token_id must be a token id"),
        ('{"pad_token_id": [1]}', "pad_token_id must be a token id or null"),
    ],
)
def test_generation_config(checkpoint, tmp_path, content, said):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{said}"):
        bridge.load_model(folder)
