"""A random LongCat-Flash checkpoint with a tokenizer, for the tests of what writes text."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from helpers.transformers_tiny import tiny_model
from zemoe.checkpoints.files import INDEX_NAME
from zemoe.checkpoints.fp8 import SUFFIX
from zemoe.checkpoints.longcat import save_original_layout

SPECIAL = ["<|endoftext|>", "<|austen|>", "<|bible|>"]
CONTEXT = 96


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token and there are a few merges, so that most characters beyond ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=275, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the morning and the evening and the sea"] * 3, trainer)
    return tokenizer


def write_checkpoint(folder: Path, **changes) -> Path:
    """In the original layout. A random model, so it writes bytes that are seldom UTF-8; it never ends by itself."""
    tokenizer = byte_tokenizer()
    settings = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": CONTEXT}
    settings |= {"bos_token_id": None, "pad_token_id": 0}
    model = tiny_model(**(settings | changes))
    save_original_layout(model.state_dict().items(), folder, json.loads(model.config.to_json_string()))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


BLOCK = (20, 16)  # divides no width of the tiny model but 40, and no hidden size but 32


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight in FP8, its factors, and what they stand for: block by block, as a loop."""
    rows, columns = weight.shape
    factors = torch.empty(math.ceil(rows / BLOCK[0]), math.ceil(columns / BLOCK[1]))
    stored, meant = torch.empty_like(weight), torch.empty_like(weight)
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            part = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            factors[i, j] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / factors[i, j]).to(torch.float8_e4m3fn).float()
            meant[part] = stored[part] * factors[i, j]
    return stored.to(torch.float8_e4m3fn), factors, meant


def write_fp8(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """`source` with its projections in FP8, all factors in a file of their own; the plain tensors that it means."""
    folder.mkdir()
    meant, weights, factors = {}, {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj" in name:
            weights[name], factors[name + SUFFIX], meant[name] = quantized(tensor)
        else:
            weights[name] = meant[name] = tensor
    files = {"model-00001-of-00002.safetensors": weights, "model-00002-of-00002.safetensors": factors}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    where = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    (folder / "config.json").write_text(json.dumps(config))
    return meant
