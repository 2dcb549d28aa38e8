"""Statistics of observed routing, for the trainer's logs and for the bias controllers.

T tokens, E FFN experts, A slots, K choices, R rows of a router's weight (A, or E + 1 with a tied null logit).

Everything is counted and kept on the device. Only `_to_host` copies numbers to the host, and only
`RoutingTally.statistics` and `BiasTrajectory.to_dict` call it, once each: call these when a line is logged.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .balance import all_reduce, local_counts, valid_tokens
from .config import check_count
from .routing import Routing


def _to_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return the numbers of each tensor, flattened, in float64. Nothing else in this file waits for the device."""
    if not tensors:
        return []
    sizes = [tensor.numel() for tensor in tensors]
    device = tensors[0].device
    flat = torch.cat([tensor.detach().to(device, torch.float64).reshape(-1) for tensor in tensors]).tolist()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer chose for the tokens of a global batch.

    A number that does not exist, such as a mean over no token, is NaN here and None in `to_dict`.

    Attributes:
        tokens: T.
        ffn_mean, ffn_std: mean and standard deviation, over tokens, of how many FFN experts a token chose.
        ffn_histogram: [K + 1], how many tokens chose 0, 1, .. K FFN experts.
        zero_share: choices of zero-computation slots over all choices.
        max_load: how often the busiest FFN expert was chosen, over how often an FFN expert was on average; 1 is even.
        dead_experts: ids of the FFN experts that no token chose.
        bias_min, bias_mean, bias_max: of the selection bias of the FFN experts; None unless asked for, as what follows.
        row_cosine, ffn_zero_cosine: see `router_cosines`.
        gradient_ratio: see `gradient_ratios`.
    """

    tokens: int
    ffn_mean: float
    ffn_std: float
    ffn_histogram: list[int]
    zero_share: float
    max_load: float
    dead_experts: list[int]
    bias_min: float | None = None
    bias_mean: float | None = None
    bias_max: float | None = None
    row_cosine: float | None = None
    ffn_zero_cosine: float | None = None
    gradient_ratio: float | None = None


@dataclass(frozen=True)
class RoutingStatistics:
    """The statistics of each layer by its name, and of all layers together."""

    layers: dict[str, LayerStatistics]

    @property
    def ffn_mean(self) -> float:
        """The mean over layers of how many FFN experts a token chose."""
        return _mean([layer.ffn_mean for layer in self.layers.values()])

    @property
    def ffn_std(self) -> float:
        """The mean over layers of the standard deviation over tokens."""
        return _mean([layer.ffn_std for layer in self.layers.values()])

    @property
    def zero_share(self) -> float:
        """The mean over layers of their share of zero choices."""
        return _mean([layer.zero_share for layer in self.layers.values()])

    @property
    def max_load(self) -> float:
        """The largest max_load of a layer."""
        return max((layer.max_load for layer in self.layers.values()), default=math.nan)

    @property
    def dead_experts(self) -> int:
        """How many FFN experts no token chose, in all layers together."""
        return sum(len(layer.dead_experts) for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dicts, fit for a line of JSON: what is NaN or infinite becomes None."""
        totals = {name: getattr(self, name) for name in ("ffn_mean", "ffn_std", "zero_share", "max_load")}
        layers = {name: _without_none(asdict(layer)) for name, layer in self.layers.items()}
        return _finite({**totals, "dead_experts": self.dead_experts, "layers": layers})


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _without_none(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}


def _finite(value: Any) -> Any:
    """Return `value` with None in place of each number that JSON can't hold."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RoutingTally:
    """Counts the choices of every layer, over the micro-batches of a global batch.

        tally = RoutingTally(num_experts=16)
        for batch in micro_batches:
            with zemoe.observe(model) as seen:
                loss(model(batch)).backward()
            tally.add(seen)
        tally.all_reduce_()  # once a global batch
        for layer, counts_A in tally.counts.items():
            update_longcat_bias_(model.get_submodule(layer).e_score_correction_bias, counts_A, ...)
        log(tally.statistics().to_dict())
        tally.clear()

    Call `add` once for each `observe`, before its backward passes or after them. What activation checkpointing computes
    again replaces its entry in `seen`, so nothing is counted twice either way.

    Args:
        num_experts: E, the same in every layer.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = check_count("num_experts", num_experts, 1)
        self._counts: dict[str, Tensor] = {}
        self._histograms: dict[str, Tensor] = {}

    @property
    def counts(self) -> dict[str, Tensor]:
        """How often each slot was chosen so far, [A] int64, by layer."""
        return dict(self._counts)

    @property
    def ffn_histograms(self) -> dict[str, Tensor]:
        """How many tokens chose 0, 1, .. K FFN experts so far, [K + 1] int64, by layer."""
        return dict(self._histograms)

    @torch.no_grad()
    def add(self, seen: Mapping[tuple[str, int], Routing], masks: Tensor | Mapping[int, Tensor] | None = None) -> None:
        """Count what `zemoe.observe` saw.

        Args:
            seen: {(layer, micro-batch): Routing}.
            masks: [T] bool, True for tokens that count; one for all, or {micro-batch: mask}, or None to count all.

        Raises:
            ValueError: for a mask that does not fit or is missing, or a layer with fewer slots than E or other slots or
                choices than before; nothing has been counted then.
        """
        new: list[tuple[str, Tensor, Tensor]] = []
        for (layer, batch), routing in seen.items():
            A, K = routing.logits_TA.shape[1], routing.topk_ids_TK.shape[1]
            if self.num_experts > A:
                raise ValueError(f"num_experts={self.num_experts} exceeds the {A} slots of layer {layer!r}")
            known = self._counts.get(layer)
            if known is not None and (len(known), len(self._histograms[layer])) != (A, K + 1):
                raise ValueError(
                    f"layer {layer!r} must have A={len(known)} slots and K={len(self._histograms[layer]) - 1} choices "
                    f"as before, got A={A}, K={K}"
                )
            if isinstance(masks, Mapping) and batch not in masks:
                raise ValueError(f"masks must have an entry for each micro-batch seen, got none for {batch}")
            mask_T = masks[batch] if isinstance(masks, Mapping) else masks
            ids_TK, valid_T = routing.topk_ids_TK, valid_tokens(mask_T, routing.logits_TA)
            ffn_T = ((ids_TK >= 0) & (ids_TK < self.num_experts)).sum(1)
            # Tokens that don't count go into a bin of their own, which is cut off.
            bins_T = torch.where(valid_T, ffn_T, K + 1)
            histogram = torch.zeros(K + 2, dtype=torch.int64, device=ids_TK.device)
            histogram.scatter_add_(0, bins_T, torch.ones_like(bins_T))
            new.append((layer, local_counts(ids_TK, A, valid_T), histogram[: K + 1]))
        for layer, counts, histogram in new:
            if layer in self._counts:
                counts, histogram = self._counts[layer] + counts, self._histograms[layer] + histogram
            self._counts[layer], self._histograms[layer] = counts, histogram

    def all_reduce_(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum the counts over the data-parallel ranks, in one reduction; call it once a global batch, on every rank.

        Without torch.distributed nothing happens. Every rank must have seen the same layers.
        """
        parts = [part for layer in self._counts for part in (self._counts[layer], self._histograms[layer])]
        if not parts:
            return
        total = all_reduce(torch.cat(parts), group).split([len(part) for part in parts])
        for i, layer in enumerate(self._counts):
            self._counts[layer], self._histograms[layer] = total[2 * i], total[2 * i + 1]

    def clear(self) -> None:
        """Forget all counts, to begin the next global batch."""
        self._counts.clear()
        self._histograms.clear()

    def statistics(
        self,
        *,
        biases: Mapping[str, Tensor] | None = None,
        router_weights: Mapping[str, Tensor] | None = None,
        gradient_ratios: Mapping[str, Tensor] | None = None,
    ) -> RoutingStatistics:
        """Return what the counts say, as numbers on the host (one copy).

        Args:
            biases: by layer, the selection bias [A] or [E]. router_weights: by layer, the router's weight [R, H].
            gradient_ratios: by layer, from `gradient_ratios`. What is not given for a layer is None in its statistics.

        Raises:
            ValueError: for the name of a layer that was not counted.
        """
        named = {"biases": biases, "router_weights": router_weights, "gradient_ratios": gradient_ratios}
        for name, given in named.items():
            unknown = set(given or ()) - set(self._counts)
            if unknown:
                raise ValueError(f"{name} must be of layers {sorted(self._counts)}, got {sorted(unknown)}")
        fetched: list[tuple[str, str, Tensor]] = []
        for layer, counts in self._counts.items():
            fetched += [(layer, "counts", counts), (layer, "histogram", self._histograms[layer])]
            if biases is not None and layer in biases:
                bias_E = biases[layer].detach()[: self.num_experts].double()
                fetched.append((layer, "bias", torch.stack([bias_E.amin(), bias_E.mean(), bias_E.amax()])))
            if router_weights is not None and layer in router_weights:
                fetched.append((layer, "cosines", torch.stack(router_cosines(router_weights[layer], self.num_experts))))
            if gradient_ratios is not None and layer in gradient_ratios:
                fetched.append((layer, "ratio", gradient_ratios[layer]))
        numbers: dict[str, dict[str, list[float]]] = {layer: {} for layer in self._counts}
        for (layer, name, _), values in zip(fetched, _to_host([tensor for _, _, tensor in fetched]), strict=True):
            numbers[layer][name] = values
        return RoutingStatistics({layer: _layer(self.num_experts, entries) for layer, entries in numbers.items()})


def _layer(num_experts: int, numbers: Mapping[str, list[float]]) -> LayerStatistics:
    counts, histogram = ([int(number) for number in numbers[name]] for name in ("counts", "histogram"))
    tokens, choices, ffn = sum(histogram), sum(counts), sum(counts[:num_experts])
    mean = sum(k * n for k, n in enumerate(histogram)) / tokens if tokens else math.nan
    variance = sum((k - mean) ** 2 * n for k, n in enumerate(histogram)) / tokens if tokens else math.nan
    low, middle, high = numbers.get("bias", [None] * 3)
    row_cosine, ffn_zero_cosine = numbers.get("cosines", [None] * 2)
    return LayerStatistics(
        tokens=tokens,
        ffn_mean=mean,
        ffn_std=math.sqrt(variance),
        ffn_histogram=histogram,
        zero_share=1 - ffn / choices if choices else math.nan,
        max_load=max(counts[:num_experts]) * num_experts / ffn if ffn else math.nan,
        dead_experts=[i for i, n in enumerate(counts[:num_experts]) if not n],
        bias_min=low,
        bias_mean=middle,
        bias_max=high,
        row_cosine=row_cosine,
        ffn_zero_cosine=ffn_zero_cosine,
        gradient_ratio=numbers.get("ratio", [None])[0],
    )


class RouterCosines(NamedTuple):
    """Mean cosines, scalars: over all pairs of rows, and over all pairs of an FFN expert's and another slot's row."""

    rows: Tensor
    ffn_zero: Tensor


@torch.no_grad()
def router_cosines(weight_RH: Tensor, num_experts: int) -> RouterCosines:
    """Measure how alike the rows of a router's weight are. Near 1, the router can't tell the slots apart.

    Args:
        weight_RH: [R, H], rows of the E FFN experts first. num_experts: E.

    Returns:
        RouterCosines in float64, NaN where there is no such pair. A row of zeros has the cosine 0 with any other.

    Raises:
        ValueError: if there are fewer than E rows.
    """
    if weight_RH.ndim != 2 or weight_RH.shape[0] < num_experts:
        raise ValueError(f"weight_RH must have shape [R >= num_experts={num_experts}, H], got {tuple(weight_RH.shape)}")
    unit_RH = torch.nn.functional.normalize(weight_RH.double(), dim=1)
    R, ffn_H, zero_H = len(unit_RH), unit_RH[:num_experts].sum(0), unit_RH[num_experts:].sum(0)
    pairs = (unit_RH.sum(0).square().sum() - unit_RH.square().sum()) / 2  # each pair once, no row with itself
    none = pairs.new_full((), math.nan)
    return RouterCosines(
        rows=pairs / (R * (R - 1) / 2) if R > 1 else none,
        ffn_zero=ffn_H @ zero_H / (num_experts * (R - num_experts)) if num_experts < R else none,
    )


def gradient_ratios(balance_loss: Tensor, lm_loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute |gradient of balance_loss| / |gradient of lm_loss| for each parameter, as scalars on the device.

    The norms are Frobenius norms. Where the ratio is well below 1, the language model decides what the router learns,
    and not the balance loss; LongCat-Flash's report watches such a ratio and advises to keep it under 0.1. It costs two
    backward passes down to the parameters: call it before `backward`, when a line is logged. No `.grad` changes. Give
    `balance_loss` with its coefficient.

    Args:
        balance_loss, lm_loss: scalars with a graph, which is kept. parameters: by layer, the router's weight, or any
            other tensor of the graph, such as the logits that were observed.

    Returns:
        The ratios by name: infinite where only lm_loss has no gradient, NaN where neither loss has one.

    Raises:
        ValueError: for a loss without a graph.
    """
    for name, loss in (("balance_loss", balance_loss), ("lm_loss", lm_loss)):
        if not loss.requires_grad:
            raise ValueError(
                f"{name} must have a graph, got a tensor without; activation checkpointing with use_reentrant=True "
                "runs the forward without one, use_reentrant=False keeps it"
            )
    names, tensors = list(parameters), list(parameters.values())
    norms = []
    for loss in (balance_loss, lm_loss):
        grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        unused = [grad is None for grad in grads]  # pyright: ignore[reportUnnecessaryComparison] - allow_unused
        norms.append([t.new_zeros(()) if no else g.norm() for g, t, no in zip(grads, tensors, unused, strict=True)])
    return {name: (over / under).detach() for name, over, under in zip(names, *norms, strict=True)}


class BiasTrajectory:
    """Records how selection biases move: it keeps copies on the device, and gives numbers when it is asked for them."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._biases: dict[str, list[Tensor]] = {}

    def record(self, step: int, biases: Mapping[str, Tensor]) -> None:
        """Keep a copy of the biases [A] or [E] by layer, as of `step`; ValueError for other layers than before."""
        if self._steps and set(biases) != set(self._biases):
            raise ValueError(f"biases must be of layers {sorted(self._biases)}, got {sorted(biases)}")
        self._steps.append(step)
        for layer, bias in biases.items():
            self._biases.setdefault(layer, []).append(bias.detach().clone())

    def to_dict(self) -> dict[str, Any]:
        """Return {"steps": [n], "layers": {layer: [n][A]}} in plain numbers (one copy to the host)."""
        stacked = {layer: torch.stack(snapshots) for layer, snapshots in self._biases.items()}
        layers = {}
        for (layer, bias_NA), flat in zip(stacked.items(), _to_host(list(stacked.values())), strict=True):
            A = bias_NA.shape[1]
            layers[layer] = [_finite(flat[i : i + A]) for i in range(0, len(flat), A)]
        return {"steps": list(self._steps), "layers": layers}
