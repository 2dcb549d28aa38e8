"""A random LongCat-Flash checkpoint with a tokenizer, for the tests of what writes text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from transformers_tiny import tiny_model
from zemoe.checkpoint import save_original_layout

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
