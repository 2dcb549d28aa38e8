"""BudgetController: steers selection biases to a number of FFN experts a token, at any batch size and any score scale.

T tokens, E FFN experts, Z zero-computation experts, A = E + Z slots, K choices, K_e FFN experts a token wanted,
L layers, B bins of a histogram.

A controller with a fixed rate, such as `update_longcat_bias_`, needs a rate that fits how many choices change when a
bias moves. That depends on how close together the scores lie, which differs by orders of magnitude between layers and
over a training run: a rate that is right at the end makes the first hundred steps overshoot. This controller measures
in each batch how many choices would change.

docs/specification.md, "Selection-bias controllers", has it beside the others.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .balance import all_reduce, local_counts, valid_tokens
from .config import check_count
from .routing import Routing
from .scores import SCORES, check_scoring

# The histogram of shifts has bins that grow with the size of a shift, eight to each doubling, from 2^-40 to 2^8.
_OCTAVES_BELOW_ONE, _OCTAVES, _BINS_PER_OCTAVE = 40, 48, 8
_SIZES = _OCTAVES * _BINS_PER_OCTAVE
_BINS = 2 * _SIZES + 1  # of negative shifts, of those too small to tell from 0, of positive ones
_SUMS = 3  # what is summed beside the counts: tokens, tokens with a gap, the logarithms of their gaps
# Uneven loads are evened out at half the speed at which K_e is reached: a small batch says little about the load of one
# of many experts.
_EVENING = 0.5


class BudgetController:
    """Moves each layer's selection bias so that a token uses K_e FFN experts on average, evenly spread over them.

        controller = zemoe.controller.BudgetController(num_experts=16, ffn_experts_per_token=4)
        for batch in micro_batches:
            with zemoe.observe(model) as seen:
                loss(model(batch)).backward()
            controller.add(seen, biases)
        controller.all_reduce_()  # once a global batch
        controller.update_(biases)

    The zero-computation slots' biases stay as they are. An FFN expert's bias moves by

        rate * (s + 1/2 A g (n / E - n_i) / T)

    The first term reaches the budget. If s were added to the biases of all FFN experts, the tokens of this batch would
    have used K_e FFN experts on average. A token chooses its j-th best FFN expert if the shift is larger than this
    difference: the choice value (score + bias) of its (K - j + 1)-th best zero-computation slot, less that of the FFN
    expert. So s is the K_e / K quantile of these differences, over all tokens and j from 1 to K.

    The second term evens out the load. n_i is how often expert i was chosen, and n is the sum over FFN experts. g is
    the geometric mean, over tokens, of the gap between the worst chosen slot and the best slot that was not chosen. A
    bias has to move by about A g to change the load of its expert by one choice a token.

    Both s and g are measured, so `rate` has no unit and needs no tuning: it is the share of the way to K_e that one
    step goes. Counts add up over micro-batches and ranks, so it does not matter how a batch is cut up.

    Args:
        num_experts: E, the same in every layer.
        ffn_experts_per_token: K_e.
        rate: from 0 to 1. With 1 each step goes all the way; smaller rates average over batches; 0 moves nothing.
        scoring_func: of the routers, a name in zemoe.scores.SCORES.

    Raises:
        ValueError: for a number or name that does not fit, naming it.

    A group limit (`num_expert_group`) is ignored: shifts are computed as if every slot could be chosen.
    """

    def __init__(
        self, num_experts: int, ffn_experts_per_token: float, rate: float = 0.5, scoring_func: str = "softmax"
    ) -> None:
        self.num_experts = check_count("num_experts", num_experts, 1)
        if not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"rate must be a number from 0 to 1, got {rate!r}")
        if not isinstance(ffn_experts_per_token, int | float) or not 0 < ffn_experts_per_token <= num_experts:
            raise ValueError(
                f"ffn_experts_per_token must be above 0 and at most num_experts={num_experts}, "
                f"got {ffn_experts_per_token!r}"
            )
        check_scoring(scoring_func)
        self.ffn_experts_per_token, self.rate, self.scoring_func = ffn_experts_per_token, rate, scoring_func
        self._measured: dict[str, Tensor] = {}  # float64: _BINS of shifts, choices by slot [A], and _SUMS
        self._choices: dict[str, int] = {}

    @torch.no_grad()
    def add(
        self,
        seen: Mapping[tuple[str, int], Routing],
        biases: Mapping[str, Tensor],
        masks: Tensor | Mapping[int, Tensor] | None = None,
    ) -> None:
        """Measure the routing that `zemoe.observe` saw.

        Args:
            seen: {(layer, micro-batch): Routing}.
            biases: by layer, the float32 selection bias [A] or [E] that the routing was chosen with.
            masks: [T] bool, True for tokens that count; one for all, or {micro-batch: mask}, or None for all.

        Raises:
            ValueError: for a layer without a bias, or a bias, mask, K or number of slots that does not fit; nothing
                has been added then.
        """
        new = []
        for (layer, batch), routing in seen.items():
            A, K = routing.logits_TA.shape[1], routing.topk_ids_TK.shape[1]
            if layer not in biases:
                raise ValueError(f"biases must have an entry for each layer seen, got none for {layer!r}")
            _check_budget(layer, self.ffn_experts_per_token, self.num_experts, A, K)
            _check_bias(layer, biases[layer], self.num_experts, A)
            known = self._measured.get(layer)
            if known is not None and (len(known) != _BINS + A + _SUMS or self._choices[layer] != K):
                raise ValueError(
                    f"layer {layer!r} must have A={len(known) - _BINS - _SUMS} slots and K={self._choices[layer]} "
                    f"choices as before, got A={A}, K={K}"
                )
            if isinstance(masks, Mapping) and batch not in masks:
                raise ValueError(f"masks must have an entry for each micro-batch seen, got none for {batch}")
            mask_T = masks[batch] if isinstance(masks, Mapping) else masks
            valid_T = valid_tokens(mask_T, routing.logits_TA)
            new.append((layer, K, self._measure(routing, biases[layer], valid_T)))
        for layer, choices, measured in new:
            known = self._measured.get(layer)
            self._measured[layer] = measured if known is None else known + measured
            self._choices[layer] = choices

    def _measure(self, routing: Routing, bias: Tensor, valid_T: Tensor) -> Tensor:
        """Return the histogram of shifts, the choices by slot and the sums of one Routing, as one float64 tensor."""
        logits_TA, ids_TK = routing.logits_TA, routing.topk_ids_TK
        A, E = logits_TA.shape[1], self.num_experts
        choice_TA = SCORES[self.scoring_func](logits_TA)
        choice_TA = choice_TA.masked_fill(logits_TA == -math.inf, -math.inf)
        choice_TA = choice_TA + torch.nn.functional.pad(bias, (0, A - len(bias)))
        valid_T = valid_T & (ids_TK >= 0).all(1) & ~choice_TA.isnan().any(1)
        shift_TK = _shifts(choice_TA, E, ids_TK.shape[1])
        bins = _bin_of(torch.where(valid_T[:, None], shift_TK, 0.0)).reshape(-1)
        counted = valid_T[:, None].expand_as(shift_TK).reshape(-1)
        histogram_B = torch.zeros(_BINS, dtype=torch.int64, device=bins.device).scatter_add_(0, bins, counted.long())
        counts_A = local_counts(ids_TK, A, valid_T)
        worst_T = choice_TA.gather(1, ids_TK.clamp(min=0)).amin(1)
        best_T = choice_TA.scatter(1, ids_TK.clamp(min=0), -math.inf).amax(1)  # of those that were not chosen
        gap_T = worst_T - best_T
        gapped_T = valid_T & gap_T.isfinite()  # not where masked slots leave a token no other choice
        log_gap = torch.where(gapped_T, gap_T.clamp(min=2.0**-_OCTAVES_BELOW_ONE).log(), 0.0).double().sum()
        sums = torch.stack([valid_T.sum().double(), gapped_T.sum().double(), log_gap])
        return torch.cat([histogram_B.double(), counts_A.double(), sums])

    def all_reduce_(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum the counts over the data-parallel ranks, in one reduction; call it once a global batch, on every rank.

        Without torch.distributed nothing happens. Every rank must have seen the same layers.
        """
        if self._measured:
            total = all_reduce(torch.cat(list(self._measured.values())), group)
            parts = total.split([len(part) for part in self._measured.values()])
            self._measured = dict(zip(self._measured, parts, strict=True))

    @torch.no_grad()
    def update_(self, biases: Mapping[str, Tensor]) -> None:
        """Move the biases of the layers that were added, in place, and begin the next global batch.

        A batch in which no token counted moves nothing.
        """
        E, rate = self.num_experts, self.rate
        for layer, measured in self._measured.items():
            A = len(measured) - _BINS - _SUMS
            histogram_B, counts_A, (tokens, gaps, log_gap) = measured.split([_BINS, A, _SUMS])
            step_E = torch.zeros(E, dtype=torch.float64, device=measured.device)
            if E < A:
                step_E += _shift_of(histogram_B, self.ffn_experts_per_token * tokens)
            load_E = counts_A[:E] / tokens.clamp(min=1)
            gap = (log_gap / gaps.clamp(min=1)).exp()
            step_E += _EVENING * A * gap * (load_E.mean() - load_E)
            biases[layer][:E] += (rate * step_E).to(biases[layer])
        self.clear()

    def clear(self) -> None:
        """Forget what was added since the last update."""
        self._measured.clear()
        self._choices.clear()


def _check_budget(layer: str, ffn_experts: float, num_experts: int, num_slots: int, top_k: int) -> None:
    """Raise ValueError unless K_e lies between what a token has to choose and what it can choose."""
    zero_experts = num_slots - num_experts
    if zero_experts < 0:
        raise ValueError(f"num_experts={num_experts} exceeds the {num_slots} slots of layer {layer!r}")
    least = max(0, top_k - zero_experts)
    if not zero_experts:
        if ffn_experts != top_k:
            raise ValueError(f"ffn_experts_per_token must be K={top_k} without zero experts, got {ffn_experts}")
    elif not least < ffn_experts < top_k:
        raise ValueError(
            f"ffn_experts_per_token must be above {least} and below K={top_k} for the {zero_experts} zero experts of "
            f"layer {layer!r}, got {ffn_experts}"
        )


def _check_bias(layer: str, bias: Tensor, num_experts: int, num_slots: int) -> None:
    """Raise ValueError unless `bias` is a selection bias of a layer with so many slots, and not of 16 bits."""
    if bias.ndim != 1 or bias.shape[0] not in (num_experts, num_slots):
        raise ValueError(
            f"biases[{layer!r}] must have length E={num_experts} or A={num_slots}, got {tuple(bias.shape)}"
        )
    if bias.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"biases[{layer!r}] must be float32, so that small steps count, got {bias.dtype}")


def _shifts(choice_TA: Tensor, num_experts: int, top_k: int) -> Tensor:
    """Return [T, K]: the shift of all FFN experts above which a token chooses at least j = 1..K of them.

    -inf where it does in any case, inf where it can't.
    """

    def best(choice: Tensor) -> Tensor:
        found = choice.topk(min(top_k, choice.shape[1]), 1).values
        return torch.nn.functional.pad(found, (0, top_k - found.shape[1]), value=-math.inf)

    ffn_TK, zero_TK = best(choice_TA[:, :num_experts]), best(choice_TA[:, num_experts:])
    # Where neither has a slot left, the token chooses no j-th FFN expert.
    return torch.where(ffn_TK == -math.inf, math.inf, zero_TK.flip(1) - ffn_TK)


def _bin_of(shift: Tensor) -> Tensor:
    """Return the bin of each shift, int64 from 0 to _BINS - 1; infinite shifts are in the first and the last bin."""
    size = ((shift.abs().log2() + _OCTAVES_BELOW_ONE) * _BINS_PER_OCTAVE).floor().clamp(-1, _SIZES - 1) + 1
    return (size * shift.sign()).long() + _SIZES


def _edge(b: Tensor) -> Tensor:
    """Return the upper edge of bin `b`; its lower edge is the upper one of the bin before."""
    n = (b - _SIZES).double()
    size = torch.exp2((torch.where(n > 0, n, -n - 1)) / _BINS_PER_OCTAVE - _OCTAVES_BELOW_ONE)
    return torch.where(n > 0, size, torch.where(n < 0, -size, 0.0))


def _shift_of(histogram_B: Tensor, target: Tensor) -> Tensor:
    """Return the shift below which `target` of the counted shifts lie, a scalar; 0 if all are infinite."""
    below_B = histogram_B.cumsum(0)
    # A target among the infinite shifts can't be reached: the nearest finite shift is the best.
    first, last = below_B[0], below_B[-2]
    reachable = torch.minimum(torch.maximum(target, first + 0.5), last - 0.5)
    b = torch.searchsorted(below_B, reachable.reshape(1)).clamp(1, _BINS - 2)
    part = (reachable - below_B[b - 1]) / histogram_B[b].clamp(min=1)
    shift = (_edge(b - 1) + part * (_edge(b) - _edge(b - 1)))[0]
    return torch.where(last > first, shift, 0.0)
