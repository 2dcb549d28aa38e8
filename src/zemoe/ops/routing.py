"""The operators of routing: `topk_ids` for any device, and `select_few` for few tokens on a CPU.

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
    """Return int64 ids [T, k] of the k largest float32 values of each row, largest first, of equal ones the lower id.

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


def takes_select_few(logits_TA: Tensor) -> bool:
    """Return whether `select_few` can and should be used for these logits.

    Never in compiled code: as the answer depends on T, torch.compile would compile anew for each number of tokens.
    """
    if torch.compiler.is_compiling() or inside_forward_mode():
        return False
    return topk.takes_select_few(logits_TA) and not (torch.is_grad_enabled() and logits_TA.requires_grad)


def select_few(
    logits_TA: Tensor, bias: Tensor | None, k: int, dropped: int, renormalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return (weights [T, k] float32, ids [T, k] int64) of float32 logits [T, A]: softmax, the best k by score + bias.

    bias: float32, at most A long, 0 for the slots beyond it. renormalize: divide weights by their sum; those of slots
    from `dropped` on are set to 0 first. scaling: multiplies the weights last. No gradients.
    """
    return torch.ops.zemoe.select_few(logits_TA, bias, k, dropped, renormalize, scaling)
