"""Sorts tokens into kinds, to see which ones a model spends experts on. N tokens of a stream, V vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

KINDS = (
    "style or end of text",
    "line break",
    "number",
    "punctuation",
    "start of a common word",
    "start of another word",
    "rest of a word",
)
STYLE, BREAK, NUMBER, PUNCTUATION, COMMON, START, REST = range(len(KINDS))
COMMON_WORDS = 100  # the tokens that start most words of the training text


class Vocabulary(NamedTuple):
    """What a token's text says, by id.

    shape_V: kind of a token, words as START (of whatever place in a word). opens_V: begins with a space. letter_V: ends
    in a letter. bytes_V: how many bytes of text it stands for, 0 for special tokens. texts: for people.
    """

    shape_V: Tensor
    opens_V: Tensor
    letter_V: Tensor
    bytes_V: Tensor
    texts: list[str]


def shape_of(text: str) -> int:
    """The kind of a token from its text alone; byte-level BPE never mixes letters, digits and other signs."""
    if "\n" in text:
        return BREAK
    if any(sign.isalpha() for sign in text):
        return START
    return NUMBER if any(sign.isdigit() for sign in text) else PUNCTUATION


def read_vocabulary(tokenizer: Tokenizer, special_ids: set[int]) -> Vocabulary:
    """The vocabulary of a byte-level BPE tokenizer, on the CPU."""
    alphabet = {sign: byte for byte, sign in _byte_signs().items()}
    shapes, opens, letters, sizes, texts = [], [], [], [], []
    for token in range(tokenizer.get_vocab_size()):
        sign = tokenizer.id_to_token(token)
        special = token in special_ids
        data = b"" if special else bytes(alphabet[s] for s in sign)
        text = data.decode("utf-8", errors="replace")
        shapes.append(STYLE if special else shape_of(text))
        opens.append(text.startswith(" "))
        letters.append(text[-1:].isalpha())
        sizes.append(len(data))
        texts.append(sign if special else text)
    return Vocabulary(torch.tensor(shapes), torch.tensor(opens), torch.tensor(letters), torch.tensor(sizes), texts)


def _byte_signs() -> dict[int, str]:
    """Byte -> the sign that byte-level BPE writes for it: itself where that can be seen, else the next of 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    signs = {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    assert set(signs.values()) == set(ByteLevel.alphabet())
    return signs


def common_words(words: Vocabulary, train_N: Tensor) -> Tensor:
    """[V] bool: the COMMON_WORDS tokens that start most words of the training text."""
    starts_N = train_N[token_kinds(words, train_N) == START]
    counts_V = torch.bincount(starts_N, minlength=len(words.texts))
    common_V = torch.zeros(len(words.texts), dtype=torch.bool, device=train_N.device)
    common_V[counts_V.topk(min(COMMON_WORDS, len(common_V))).indices] = True
    return common_V & (counts_V > 0)


def token_kinds(words: Vocabulary, tokens_N: Tensor, common_V: Tensor | None = None) -> Tensor:
    """[N] kind of each token of a stream. Letters that follow a letter without a space are the rest of a word."""
    shape_V, opens_V, letter_V = (table.to(tokens_N.device) for table in words[:3])
    kinds_N = shape_V[tokens_N]
    after_letter_N = torch.zeros_like(tokens_N, dtype=torch.bool)
    after_letter_N[1:] = letter_V[tokens_N[:-1]]
    word_N = kinds_N == START
    rest_N = word_N & after_letter_N & ~opens_V[tokens_N]
    if common_V is not None:
        kinds_N = torch.where(word_N & common_V[tokens_N], COMMON, kinds_N)
    return torch.where(rest_N, REST, kinds_N)
