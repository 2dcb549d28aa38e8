"""Layers drawn at random, with every stride, routing and kind that the specification knows; and how one is judged.

`draw` takes anything with the methods of random.Random: hypothesis' own, which shrinks what fails, or a seeded one.
Legend: T tokens, H hidden, I expert width, E FFN experts, A slots, K choices, C constant experts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers.judge import check_selection, judge, one_thread
from zemoe import AffineParams, fused_experts, reference, select_experts

INF, NAN = float("inf"), float("nan")
LAYOUTS = ("contiguous", "contiguous", "rows apart", "columns apart", "transposed", "one row", "one column")
PAIRS_LAYOUTS = LAYOUTS[1:5]  # a token's choices differ from another's
SLACK = 6.0  # of `judge`: results of two numbers have errors by luck, and what is wrong is wrong by far
LEAVES = ("x", "w13", "w2", "weights", "constant_router", "constant_value", "scale")


@dataclass(frozen=True)
class Laid:
    """Values on the CPU, and how they lie in memory."""

    values: Tensor
    layout: str

    def on(self, device: str) -> Tensor:
        """The values on a device; between rows or columns that lie apart there is what must not be read."""
        values = self.values.to(device)
        n = values.shape[-1]
        nobody = NAN if values.is_floating_point() else torch.iinfo(values.dtype).max
        if self.layout == "rows apart":
            memory = torch.full((*values.shape[:-1], n + 3), nobody, dtype=values.dtype, device=device)
            memory[..., :n] = values
            return memory[..., :n]
        if self.layout == "columns apart":
            memory = torch.full((*values.shape[:-1], 2 * n), nobody, dtype=values.dtype, device=device)
            memory[..., ::2] = values
            return memory[..., ::2]
        if self.layout == "transposed":
            return values.mT.contiguous().mT
        if self.layout == "one row":
            return values[:1].clone().expand_as(values)
        if self.layout == "one column":
            return values[..., :1].clone().expand_as(values)
        return values.clone()


@dataclass(frozen=True)
class Layer:
    """A layer and what goes in. odd: NaN or infinities are in x or logits, so that gradients have no meaning."""

    num_experts: int
    kinds: tuple[tuple[str, int], ...]
    top_k: int
    rules: dict[str, Any]
    activation: str
    x: Laid
    w13: Laid
    w2: Laid
    logits: Laid
    skipped_TK: Tensor
    params: AffineParams
    pairs_layout: str
    odd: bool

    def ids_layout(self, values: Tensor) -> Laid:
        return Laid(values, self.pairs_layout)


def _kinds(rng: random.Random, least: int) -> tuple[tuple[str, int], ...]:
    if rng.random() < 0.35:
        return (("identity", rng.randint(1, 3)),)  # LongCat-Flash's, for which there are ways of their own
    names = ("identity", "copy", "zero", "null", "constant", "scaled_identity")
    kinds = [(rng.choice(names), rng.randint(1, 3)) for _ in range(rng.randint(least, 3))]
    return tuple(kinds)


def _groups(rng: random.Random, A: int, K: int, biased: bool) -> dict[str, int]:
    least = 2 if biased else 1
    fits = [(g, n) for g in range(1, A + 1) if A % g == 0 and A // g >= least for n in range(1, g + 1)]
    fits = [(g, n) for g, n in fits if n * (A // g) >= K]
    if not fits or rng.random() < 0.6:
        return {}
    groups, best = rng.choice(fits)
    return {"num_expert_group": groups, "topk_group": best}


def _laid(rng: random.Random, values: Tensor, plain: bool = False) -> Laid:
    layout = "contiguous" if plain or not values.numel() else rng.choice(LAYOUTS)
    return Laid(Laid(values, layout).on("cpu").contiguous(), layout)


def _odd(rng: random.Random, logits_TA: Tensor, x_TH: Tensor) -> None:
    """NaN and infinities in some tokens, in place."""
    T, A = logits_TA.shape
    for t in range(T):
        way = rng.choice(("no", "no", "nan", "inf", "masked", "some masked", "x"))
        if way in ("nan", "inf"):
            logits_TA[t, rng.randrange(A)] = NAN if way == "nan" else INF
        elif way == "masked":
            logits_TA[t] = -INF
        elif way == "some masked":
            logits_TA[t, : rng.randint(1, A)] = -INF
        elif way == "x":
            x_TH[t, rng.randrange(x_TH.shape[1])] = NAN


def draw(rng: random.Random, dtypes: tuple[torch.dtype, ...]) -> Layer:
    """A layer in one of `dtypes`."""
    generator = torch.Generator().manual_seed(rng.randint(0, 2**31 - 1))

    def normal(*shape: int, deviation: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * deviation

    E = rng.choice((0, 1, 2, 3, 5, 8))
    kinds = _kinds(rng, 0 if E else 1)
    A = E + sum(count for _, count in kinds)
    K = rng.choice((1, min(2, A), min(3, A), min(6, A), A))
    T, H, I = rng.choice((0, 1, 1, 2, 3, 7, 16, 33)), rng.choice((1, 2, 3, 8, 17, 32)), rng.choice((1, 2, 5, 8, 19))
    dtype = rng.choice(dtypes)
    biased = rng.random() < 0.5
    bias = normal(rng.choice((A, E)) if E else A, deviation=0.3).float() if biased else None
    rules = {
        "num_experts": E,
        "zero_expert_kinds": kinds,
        "scoring_func": rng.choice(("softmax", "sigmoid", "sqrtsoftplus")),
        "renormalize": rng.choice(("none", "all", "real", "nonnull")),
        "routed_scaling_factor": rng.choice((1.0, 0.5, 6.0)),
        "e_score_correction_bias": bias,
        **_groups(rng, A, K, biased),
    }
    logits, x = 2 * normal(T, A).float(), normal(T, H).to(dtype)
    odd = rng.random() < 0.4
    if odd:
        _odd(rng, logits, x)
    constants = sum(count for kind, count in kinds if kind == "constant")
    scales = sum(count for kind, count in kinds if kind == "scaled_identity")
    params = AffineParams(
        normal(constants, 2, H, deviation=H**-0.5).float() if constants else None,
        normal(constants, H).float() if constants else None,
        normal(scales).float() if scales else None,
    )
    skips, plain = rng.choice((0.0, 0.0, 0.3)), rng.random() < 0.5  # compiled loops take plain weights alone
    return Layer(
        num_experts=E,
        kinds=kinds,
        top_k=K,
        rules=rules,
        activation=rng.choice(("silu", "silu", "gelu", "gelu_tanh")),
        x=_laid(rng, x, plain),
        w13=_laid(rng, normal(E, 2 * I, H, deviation=1.2 * H**-0.5).to(dtype), plain),
        w2=_laid(rng, normal(E, H, I, deviation=2.5 * I**-0.5).to(dtype), plain),
        logits=_laid(rng, logits),
        skipped_TK=torch.rand(T, K, generator=generator) < skips,
        params=params,
        pairs_layout=rng.choice(PAIRS_LAYOUTS),
        odd=odd,
    )


# --- judged


def judged(out: Tensor, exact: Tensor, own: Tensor, what: str) -> None:
    """`judge` with slack; where the reference overflows in its own dtype, its own error is that of one rounding."""
    judge(out, exact, torch.where(exact.isfinite() & ~own.isfinite(), exact.to(own.dtype), own), what, SLACK)


Run = Callable[..., Tensor]
Pairs = tuple[Tensor, Tensor]


def routed(layer: Layer, device: str, backend: str | None = None) -> Pairs:
    """(weights, ids) on the CPU by `select_experts`, judged against the reference."""
    bias = layer.rules["e_score_correction_bias"]
    rules = layer.rules | {"e_score_correction_bias": None if bias is None else bias.to(device)}
    chosen = select_experts(layer.logits.on(device), layer.top_k, **rules, backend=backend)
    weights, ids = (tensor.cpu() for tensor in chosen)
    check_selection(ids, reference.select(layer.logits.values, layer.top_k, **layer.rules))
    exact, own = (
        reference.select(layer.logits.values, layer.top_k, ids_TK=ids, dtype=dtype, **layer.rules).topk_weights_TK
        for dtype in (torch.float64, torch.float32)
    )
    judged(weights, exact, own, "weights")
    return weights, ids


def compute(
    layer: Layer, tensors: dict[str, Tensor | None], ids_TK: Tensor, backend: str | None, **changes: Any
) -> Tensor:
    """`fused_experts` of named tensors."""
    return fused_experts(
        tensors["x"],
        tensors["w13"],
        tensors["w2"],
        tensors["weights"],
        ids_TK,
        num_experts=layer.num_experts,
        zero_expert_kinds=layer.kinds,
        affine_params=AffineParams(*(tensors[name] for name in LEAVES[4:])),
        activation=layer.activation,
        backend=backend,
    )


def restated(layer: Layer, tensors: dict[str, Tensor | None], ids_TK: Tensor, dtype: torch.dtype) -> Tensor:
    with one_thread():
        return reference.experts(
            tensors["x"],
            tensors["w13"],
            tensors["w2"],
            tensors["weights"],
            ids_TK,
            num_experts=layer.num_experts,
            zero_expert_kinds=layer.kinds,
            affine_params=AffineParams(*(tensors[name] for name in LEAVES[4:])),
            activation=layer.activation,
            dtype=dtype,
        )


def check(layer: Layer, backend: str | None, device: str = "cpu", run: Run = compute, gradients: bool = True) -> None:
    """AssertionError unless values, without gradients and with, and gradients are as good as the reference's own."""
    weights, ids = routed(layer, device, backend)
    ids = ids.masked_fill(layer.skipped_TK, -1)
    laid = {"x": layer.x, "w13": layer.w13, "w2": layer.w2, "weights": layer.ids_layout(weights)}
    tensors = {name: one.on(device) for name, one in laid.items()}
    tensors |= {name: None if p is None else p.to(device) for name, p in layer.params._asdict().items()}
    strided_ids = layer.ids_layout(ids).on(device)
    values = {name: None if tensor is None else tensor.cpu() for name, tensor in tensors.items()}
    dtype = layer.x.values.dtype
    sides = [restated(layer, values, ids, to) for to in (torch.float64, dtype)]
    with torch.no_grad():
        judged(run(layer, tensors, strided_ids, backend), *sides, "output")
    if layer.odd or not gradients:
        return
    seeds = torch.randn(layer.x.values.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    found = []
    for to in (None, torch.float64, dtype):
        leaves = {
            name: None if t is None else (t.detach() if to is None else t.cpu().to(to, copy=True)).requires_grad_()
            for name, t in tensors.items()
        }
        ours = to is None
        y = run(layer, leaves, strided_ids, backend) if ours else restated(layer, leaves, ids, to)
        if ours:
            judged(y, *sides, "output with gradients")
        found.append(_gradients(y, leaves, seeds))
    mine, exact, own = found
    for name, grad in mine.items():
        judged(grad, exact[name], own[name].to(grad.dtype), f"gradient of {name}")


def _gradients(y: Tensor, leaves: dict[str, Tensor | None], seeds: Tensor) -> dict[str, Tensor]:
    """By name; zeros where nothing of a leaf came into y."""
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    if not y.requires_grad:
        return {name: torch.zeros_like(leaf).cpu() for name, leaf in given.items()}
    grads = torch.autograd.grad(y, list(given.values()), seeds.to(y), allow_unused=True)
    return {
        name: (torch.zeros(leaf.shape, dtype=leaf.dtype) if grad is None else grad).cpu()
        for (name, leaf), grad in zip(given.items(), grads, strict=True)
    }
