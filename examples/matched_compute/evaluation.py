"""Scores a trained arm on a split: bits a byte, FFN experts a token, and on which tokens they are spent.

B rows, L positions, T positions of a split (rows padded to their full length), E FFN experts, A slots, M layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from kinds import KINDS, STYLE, Vocabulary, common_words, token_kinds
from torch import Tensor

from tiny_model import IGNORE, Corpus, bits_per_byte, is_style
from training import Training
from zemoe.balance import slot_counts

FIFTHS = 5
LEAST_COUNT = 100  # how often a token has to occur in the held-out text for its own line


class Scores(NamedTuple):
    """nats_T: of the target at each position. ffn_TM: FFN experts that the token read there used.

    counts_MA: choices of each slot. scored_T: positions with a target; the counts are of those.
    """

    nats_T: Tensor
    ffn_TM: Tensor
    counts_MA: Tensor
    scored_T: Tensor


@torch.no_grad()
def score(training: Training, split: str) -> Scores:
    """Every token of a split once, in rows that don't overlap; with the routing and the precision of training."""
    settings = training.settings
    inputs_RL, targets_RL = training.corpus.fixed_rows(split, settings.context)
    nats, ffn, A = [], [], settings.slots(training.arm)
    counts_MA = torch.zeros(settings.layers, A, dtype=torch.int64, device=inputs_RL.device)
    for x_BL, y_BL in zip(inputs_RL.split(settings.batch_rows), targets_RL.split(settings.batch_rows), strict=True):
        nats.append(training.losses(x_BL, y_BL))
        routings = list(training.seen.values())
        ffn.append(torch.stack([(r.topk_ids_TK < settings.experts).sum(-1) for r in routings], dim=1))
        scored_T = y_BL.flatten() != IGNORE
        counts_MA += torch.stack([slot_counts(r.topk_ids_TK, A, scored_T) for r in routings])
    return Scores(torch.cat(nats).double(), torch.cat(ffn), counts_MA, targets_RL.flatten() != IGNORE)


def brief(training: Training, split: str, scores: Scores) -> dict[str, float]:
    """The two numbers that everything is about."""
    nats = float(scores.nats_T.sum())
    return {
        "bits_per_byte": bits_per_byte(nats, training.corpus.bytes_of(split)),
        "ffn_experts": float(scores.ffn_TM[scores.scored_T].double().mean()),
    }


def routing_numbers(training: Training, scores: Scores) -> dict[str, Any]:
    """How the choices were spread."""
    settings = training.settings
    ffn_TM = scores.ffn_TM[scores.scored_T].double()
    ffn_ME = scores.counts_MA[:, : settings.experts].double()
    share_A = scores.counts_MA.double().sum(0) / scores.counts_MA.sum()
    return {
        "ffn_by_layer": ffn_TM.mean(0).tolist(),
        "ffn_std_by_layer": ffn_TM.std(0).tolist(),
        "ffn_std": float(ffn_TM.std(0).mean()),
        "ffn_std_of_token_mean": float(ffn_TM.mean(1).std()),
        "zero_share": float(share_A[settings.experts :].sum()),
        "share_by_slot": share_A.tolist(),
        "max_over_mean_load_by_layer": (ffn_ME.amax(1) / ffn_ME.mean(1)).tolist(),
        "dead_experts": int((ffn_ME == 0).sum()),
    }


class Readings:
    """What the held-out text is made of; the same for all runs."""

    def __init__(self, corpus: Corpus, words: Vocabulary, split: str = "heldout") -> None:
        tokens_N = corpus.tokens[split]
        self.words, self.tokens_N = words, tokens_N
        self.kinds_N = token_kinds(words, tokens_N, common_words(words, corpus.tokens["train"]))
        self.document_N = is_style(tokens_N).cumsum(0) - 1
        documents = int(self.document_N[-1]) + 1
        sizes_N = words.bytes_V.to(tokens_N.device)[tokens_N]
        self.document_bytes = torch.zeros(documents, dtype=torch.int64, device=tokens_N.device)
        self.document_bytes.index_add_(0, self.document_N, sizes_N)

    def inputs(self, values_N: Tensor, first: int, context: int) -> Tensor:
        """[N]: of the token that the model reads where it predicts token n; `first` at the start of a row."""
        read_N = values_N.roll(1)
        read_N[::context] = first
        return read_N

    def describe(self, scores: Scores, context: int) -> dict[str, Any]:
        """FFN experts by kind of token read, by how hard the next token was, by token; nats by document."""
        N = len(self.tokens_N)
        nats_N, ffn_NM, scored_N = scores.nats_T[:N], scores.ffn_TM[:N].double(), scores.scored_T[:N]
        kinds_N = self.inputs(self.kinds_N, STYLE, context)
        kinds = {}
        for kind, name in enumerate(KINDS):
            read_N = scored_N & (kinds_N == kind)
            count = int(read_N.sum())
            kinds[name] = {"tokens": count, "ffn_by_layer": ffn_NM[read_N].mean(0).tolist() if count else None}
        order = nats_N[scored_N].argsort()
        fifths = [
            {
                "nats": float(nats_N[scored_N][part].mean()),
                "ffn_by_layer": ffn_NM[scored_N][part].mean(0).tolist(),
            }
            for part in order.tensor_split(FIFTHS)
        ]
        by_document = torch.zeros(len(self.document_bytes), dtype=torch.float64, device=nats_N.device)
        by_document.index_add_(0, self.document_N, nats_N)
        return {
            "kinds": kinds,
            "fifths_of_loss": fifths,
            "tokens": self.by_token(ffn_NM.mean(1), scored_N, context),
            "nats_by_document": by_document.tolist(),
            "bytes_by_document": self.document_bytes.tolist(),
        }

    def by_token(self, ffn_N: Tensor, scored_N: Tensor, context: int) -> list[list[Any]]:
        """[[text, count, FFN experts]] of the tokens that are read often."""
        read_N = self.inputs(self.tokens_N, -1, context)
        kept_N = scored_N & (read_N >= 0)
        V = len(self.words.texts)
        counts_V = torch.bincount(read_N[kept_N], minlength=V)
        sums_V = torch.bincount(read_N[kept_N], weights=ffn_N[kept_N], minlength=V)
        ids = (counts_V >= LEAST_COUNT).nonzero().flatten().tolist()
        return [[self.words.texts[i], int(counts_V[i]), round(float(sums_V[i] / counts_V[i]), 4)] for i in ids]
