"""Text from a language model, token by token, with the FFN experts that each token used.

E FFN experts, K choices a token, L layers, S positions of one forward, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..routing import Observed, observe


class Token(NamedTuple):
    """A token and the number of FFN experts that it used in each layer, first layer first."""

    id: int
    ffn_by_layer: tuple[int, ...]

    @property
    def ffn_experts(self) -> int:
        """Return the number of FFN experts over all layers."""
        return sum(self.ffn_by_layer)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the likeliest token. top_p: only the likeliest tokens that together reach this probability are
    drawn from, 1 means all. seed: of the draws; the same seed gives the same tokens.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, got {self.seed}")


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw the id of the next token. `generator` lives on the CPU, so that a seed means the same on every device.

    Raises:
        ValueError: if the logits hold a NaN or a +inf.
    """
    logits_V = logits_V.cpu().double()
    best = logits_V.max()
    if not best.isfinite():
        raise ValueError("the model's logits are not finite; try --dtype float32, or check the checkpoint")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # The largest becomes 0, so that no temperature is too low.
    probabilities = ((logits_V - best) / sampling.temperature).softmax(-1)
    ranked, ids = probabilities.sort(descending=True, stable=True)
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= sampling.top_p, 0.0)
    return int(ids[torch.multinomial(ranked, 1, generator=generator)])


@dataclass
class Generation:
    """What was made so far. It is consistent at any moment, so that an interrupted run can be shown as well.

    prompt, tokens: with what each used. prompt_seconds, decode_seconds: spent in the model and in drawing.
    finish: why it ended: "end" (the model said so), "length" (max_new_tokens), "context" (the model's context is full),
    "interrupted", or None as long as it runs.
    """

    prompt: list[Token] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish: str | None = None

    @property
    def mean_ffn_by_layer(self) -> list[float]:
        """Return how many FFN experts a new token used on average, by layer; empty as long as there is no token."""
        by_layer = zip(*(token.ffn_by_layer for token in self.tokens), strict=True)
        return [sum(used) / len(self.tokens) for used in by_layer]


def _tokens(ids: Sequence[int], seen: Observed, num_experts: int) -> list[Token]:
    ids_LSK = torch.stack([routing.topk_ids_TK for routing in seen.values()])
    used_SL = (ids_LSK < num_experts).sum(-1).T.tolist()
    return [Token(token_id, tuple(used_L)) for token_id, used_L in zip(ids, used_SL, strict=True)]


def generate(
    model: Any, prompt_ids: Sequence[int], sampling: Sampling, max_new_tokens: int, into: Generation
) -> Iterator[Token]:
    """Yield each new token once it has passed the model itself, for only then is it known which experts it used.

    Args:
        model: a LongcatFlashForCausalLM with zemoe's layers, in evaluation mode.
        prompt_ids: at least one id; must fit into the model's context.
        max_new_tokens: an upper bound; the model's context is another.
        into: filled on the way, an empty Generation.

    Raises:
        ValueError: if the model's logits are not finite.
    """
    from ..integrations.transformers.cache import CACHE

    config = model.config
    ends = model.generation_config.eos_token_id if model.generation_config is not None else config.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    generator = torch.Generator().manual_seed(sampling.seed)
    room = config.max_position_embeddings - len(prompt_ids)
    cache = None

    with observe(model) as seen, torch.inference_mode():

        def step(ids: Sequence[int]) -> tuple[list[Token], int]:
            nonlocal cache
            seen.clear()
            inputs = torch.tensor([ids], device=model.device)
            out = model(input_ids=inputs, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            cache = out[CACHE]
            return _tokens(ids, seen, config.n_routed_experts), draw(out.logits[0, -1], sampling, generator)

        start = time.perf_counter()
        into.prompt, next_id = step(prompt_ids)
        into.prompt_seconds = time.perf_counter() - start
        while next_id not in ends and len(into.tokens) < min(max_new_tokens, room):
            start = time.perf_counter()
            (token,), next_id = step([next_id])
            into.decode_seconds += time.perf_counter() - start
            into.tokens.append(token)
            yield token
    if next_id in ends:
        into.finish = "end"
    else:
        into.finish = "length" if len(into.tokens) == max_new_tokens else "context"


class TextStream:
    """Turns ids into text piece by piece. A piece waits until its last character is complete, over several tokens.

    All pieces together are what decoding all ids at once gives.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._before: list[int] = []  # decoders may treat the start of a text in a special way
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that became complete with this token; "" if there is none yet."""
        self._waiting.append(token_id)
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._before, self._waiting = self._waiting, []
        return text

    def rest(self) -> str:
        """Return what is still waiting, complete or not."""
        text = self._text()
        self._before, self._waiting = self._waiting, []
        return text

    def _text(self) -> str:
        return self._decode(self._before + self._waiting)[len(self._decode(self._before)) :]
