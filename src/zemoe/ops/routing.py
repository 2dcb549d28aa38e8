"""The operators of routing for any device: the choice of experts, and scores to weights of few tokens on a CPU.

T tokens, A slots, k choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._compat import inside_forward_mode
from ..kernels import topk
from .library import define, implement

# --- topk_ids: the ids of the k largest values, ties to the lower id ---

define("topk_ids(Tensor choice, Tensor? logits, int k) -> Tensor", vmap=False)
implement("topk_ids", "CPU", topk.on_host)
implement("topk_ids", "CompositeExplicitAutograd", topk.by_integer_keys)  # any other device


@torch.library.register_fake("zemoe::topk_ids")
def _topk_ids_fake(choice: Tensor, logits: Tensor | None, k: int) -> Tensor:
    return choice.new_empty((choice.shape[0], k), dtype=torch.int64)


def topk_ids(choice_TA: Tensor, logits_TA: Tensor | None, k: int) -> Tensor:
    """[T, k] int64 ids of the k largest float32 values of each row, largest first, equal values by lower id first.

    A slot whose logit is -inf counts as -inf, whatever its value; with logits_TA None every slot counts as it is.
    A row with a NaN yields ids in range, in no particular order.
    """
    return torch.ops.zemoe.topk_ids(choice_TA, logits_TA, k)


# --- select_few: scores, ids and weights of few tokens, without gradients ---

define(
    "select_few(Tensor logits, Tensor? bias, int k, int dropped, bool renormalize, float scaling) -> (Tensor, Tensor)",
    vmap=False,
)
implement("select_few", "CPU", topk.select_few)


@torch.library.register_fake("zemoe::select_few")
def _select_few_fake(logits, bias, k, dropped, renormalize, scaling) -> tuple[Tensor, Tensor]:
    return logits.new_empty((logits.shape[0], k)), logits.new_empty((logits.shape[0], k), dtype=torch.int64)


def selects_few(logits_TA: Tensor) -> bool:
    """Whether `select_few` is the better way. Not for a compiler, which would compile once a number of tokens."""
    if torch.compiler.is_compiling() or inside_forward_mode():
        return False
    return topk.suits_select_few(logits_TA) and not (torch.is_grad_enabled() and logits_TA.requires_grad)


def select_few(
    logits_TA: Tensor, bias: Tensor | None, k: int, dropped: int, renormalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """(weights [T, k] float32, ids [T, k] int64) of float32 logits [T, A]: softmax, and the best k by score + bias.

    bias: float32, up to A long (0 for the rest). renormalize: divide by the sum of a token's weights, where slots from
    `dropped` on weigh 0; scaling multiplies them. No gradients.
    """
    return torch.ops.zemoe.select_few(logits_TA, bias, k, dropped, renormalize, scaling)
