"""A token's choices where somebody else computes the FFN experts and knows nothing of zero experts.

T tokens, E FFN experts, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def without_zero_choices(
    weights_TK: Tensor, ids_TK: Tensor, num_experts: int, replacement: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A routing with FFN experts only, and the sum of the weights of each token's identity experts.

    Experts' kernels mostly have no word for "no expert". So each choice of a zero expert (an id from E on) becomes,
    with weight 0, a choice of an FFN expert.

    Args:
        weights_TK, ids_TK: the routing. num_experts: E.
        replacement: the FFN expert's id. By default it is one that the token has chosen anyway (0 where it has none):
            no further weights are read then, and no expert gets the zero choices of all tokens.

    Returns:
        weights [T, K] and ids [T, K] for the FFN experts, and alpha [T, 1]: identity experts add alpha * x.
    """
    zero_TK = ids_TK >= num_experts
    alpha_T1 = weights_TK.masked_fill(~zero_TK, 0).sum(-1, keepdim=True)
    if replacement is None:
        chosen_T1 = ids_TK.masked_fill(zero_TK, num_experts).amin(-1, keepdim=True) % num_experts
        ids_TK = torch.where(zero_TK, chosen_T1, ids_TK)
    else:
        ids_TK = ids_TK.masked_fill(zero_TK, replacement)
    return weights_TK.masked_fill(zero_TK, 0), ids_TK, alpha_T1
