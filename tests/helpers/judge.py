"""How a result is judged: against `zemoe.reference` in float64, on a scale that the reference itself sets.

`judge` compares values, `check_selection` compares ids, `CASES` are the shapes, each with the reason why it is there.
Legend: T tokens, H hidden, I expert width, E FFN experts, A slots, K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from zemoe import reference
from zemoe.affine import AffineParams

# In float64 the reference and its "own dtype" run are one and the same, so the scale is a number of roundings instead.
FLOAT64_ROUNDINGS = 32.0
SELECTION_GAP = 1e-5

Kinds = tuple[tuple[str, int], ...]


# ------------------------------------------------------------------------------------------------------------ values


def rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item() if values.numel() else 0.0


def judge(out: Tensor, ref64: Tensor, ref_own: Tensor, what: str = "output", slack: float = 1.0) -> None:
    """AssertionError unless `out` is as good as the reference computed in the dtype of `out`.

    RMS error at most twice that of `ref_own` (where that happens to be tiny: of half a rounding), largest error in
    proportion to it (or four roundings of the largest value), NaN and infinity in exactly the same places. An RMS over
    n numbers is itself uncertain by 1 / sqrt(n), which matters for the gradient of a handful of weights: three such
    deviations are granted. `slack` times as much is allowed where thousands of small results are judged.
    """
    assert out.shape == ref64.shape, f"{what}: shape {tuple(out.shape)}, reference {tuple(ref64.shape)}"
    assert out.dtype == ref_own.dtype, f"{what}: {out.dtype}, expected {ref_own.dtype}"
    result, exact, own = out.detach().cpu().double(), ref64.detach().double(), ref_own.detach().double()
    assert torch.equal(result.isnan(), exact.isnan()), f"{what}: NaN in other places than the reference"
    finite = exact.isfinite()
    assert torch.equal(result[~finite].nan_to_num(), exact[~finite].nan_to_num()), f"{what}: other infinities"
    assert result[finite].isfinite().all(), f"{what}: infinite where the reference is finite"

    error, own_error = (result - exact)[finite], (own - exact)[finite]
    roundings = FLOAT64_ROUNDINGS if out.dtype == torch.float64 else 0.5
    unit = max(rms(own_error), roundings * torch.finfo(out.dtype).eps * rms(exact[finite]))
    unit *= slack * (1 + 3 / max(error.numel(), 1) ** 0.5)
    assert rms(error) <= 2 * unit, f"{what}: RMS error {rms(error):.3g}, allowed {2 * unit:.3g}"
    if error.numel():
        four_roundings = 4 * torch.finfo(out.dtype).eps * exact[finite].abs().max().item()
        largest = max(16 * unit, 2 * slack * own_error.abs().max().item(), slack * four_roundings)
        assert error.abs().max().item() <= largest, (
            f"{what}: largest error {error.abs().max():.3g}, allowed {largest:.3g}"
        )


def rejects(out: Tensor, ref64: Tensor, ref_own: Tensor) -> bool:
    """Whether `judge` turns `out` down."""
    try:
        judge(out, ref64, ref_own)
    except AssertionError:
        return True
    return False


def assert_bitwise(left: Tensor, right: Tensor) -> None:
    """Equal to the last bit, NaN included."""
    assert left.shape == right.shape and left.dtype == right.dtype
    assert torch.equal(left.detach().contiguous().view(torch.uint8), right.detach().contiguous().view(torch.uint8))


# --------------------------------------------------------------------------------------------------------- selection


def check_selection(ids_TK: Tensor, expected: reference.Selection) -> float:
    """AssertionError unless the id sets agree wherever the float64 gap at K/K+1 is clear; the share that was clear."""
    num_tokens, top_k = ids_TK.shape
    num_slots = expected.choice_TA.shape[1]
    assert ids_TK.dtype == torch.int64
    clear = 0
    for t in range(num_tokens):
        ids = ids_TK[t].tolist()
        assert len(set(ids)) == top_k and all(0 <= slot < num_slots for slot in ids), f"token {t} chose {ids}"
        if reference.is_broken(expected.scores_TA[t]):
            continue
        best_first = sorted(expected.choice_TA[t].tolist(), reverse=True)
        if top_k < num_slots and not best_first[top_k - 1] - best_first[top_k] > SELECTION_GAP:
            continue
        clear += 1
        assert set(ids) == set(expected.topk_ids_TK[t].tolist()), (
            f"token {t}: {ids}, {expected.topk_ids_TK[t].tolist()}"
        )
    return clear / max(num_tokens, 1)


# ------------------------------------------------------------------------------------------------------------ shapes


@contextmanager
def one_thread() -> Iterator[None]:
    """For the reference: its products are so small that two threads on a busy machine take a thousand times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Inputs(NamedTuple):
    x_TH: Tensor
    w13: Tensor
    w2: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    affine: AffineParams | None


Ids = Callable[["Case", torch.Generator], Tensor]


def _distinct(scores: Tensor, top_k: int) -> Tensor:
    return scores.topk(top_k, dim=1).indices


def random_ids(case: Case, generator: torch.Generator) -> Tensor:
    return _distinct(torch.rand(case.T, case.A, generator=generator), case.K)


def without_expert_1(case: Case, generator: torch.Generator) -> Tensor:
    scores = torch.rand(case.T, case.A, generator=generator)
    scores[:, 1] = -1
    return _distinct(scores, case.K)


def only_zero_experts(case: Case, generator: torch.Generator) -> Tensor:
    return case.E + _distinct(torch.rand(case.T, case.A - case.E, generator=generator), case.K)


def only_ffn_experts(case: Case, generator: torch.Generator) -> Tensor:
    return _distinct(torch.rand(case.T, case.E, generator=generator), case.K)


def all_on_one(case: Case, generator: torch.Generator) -> Tensor:
    scores = torch.rand(case.T, case.A, generator=generator)
    scores[:, 2] = 2
    return _distinct(scores, case.K)


def heavy_skew(case: Case, generator: torch.Generator) -> Tensor:
    popularity = torch.arange(case.A, dtype=torch.float32).neg()
    return _distinct(popularity - torch.empty(case.T, case.A).exponential_(generator=generator).log(), case.K)


def with_skips(case: Case, generator: torch.Generator) -> Tensor:
    ids = random_ids(case, generator)
    skipped = torch.rand(ids.shape, generator=generator) < 0.4
    skipped[0] = True
    return ids.masked_fill(skipped, -1)


@dataclass(frozen=True)
class Case:
    """A shape, and why it is one of those that we try."""

    name: str
    why: str
    T: int = 24
    H: int = 32
    I: int = 16
    E: int = 6
    kinds: Kinds = (("identity", 2),)
    K: int = 3
    ids: Ids = field(default=random_ids)

    @property
    def A(self) -> int:
        return self.E + sum(count for _, count in self.kinds)

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
        """Values of size about 1 and weights of similar size, so that every choice counts in the sum."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        affine = None
        constants, scales = self.count("constant"), self.count("scaled_identity")
        if constants or scales:
            affine = AffineParams(
                (normal(constants, 2, self.H) / self.H**0.5).float() if constants else None,
                normal(constants, self.H).float() if constants else None,
                (0.5 + normal(scales).abs()).float() if scales else None,
            )
        return Inputs(
            normal(self.T, self.H).to(dtype),
            (normal(self.E, 2 * self.I, self.H) * (1.2 / self.H**0.5)).to(dtype),
            (normal(self.E, self.H, self.I) * (2.5 / max(self.I, 1) ** 0.5)).to(dtype),
            0.5 + 0.5 * torch.rand(self.T, self.K, generator=generator),
            self.ids(self, generator),
            affine,
        )

    def count(self, kind: str) -> int:
        return sum(count for name, count in self.kinds if name == kind)

    def reference(self, inputs: Inputs, dtype: torch.dtype = torch.float64, activation: str = "silu") -> Tensor:
        with one_thread():
            return reference.experts(
                *inputs[:5],
                num_experts=self.E,
                zero_expert_kinds=self.kinds,
                affine_params=inputs.affine,
                activation=activation,
                dtype=dtype,
            )


MIXED = (("constant", 2), ("identity", 1), ("scaled_identity", 2), ("zero", 1), ("constant", 1), ("copy", 1))

CASES = [
    Case("plain", "nothing special, so that a failure here is no edge case"),
    Case("no_zero_experts", "a plain MoE layer must work too", kinds=()),
    Case("one_token", "T = 1, decoding: most experts are empty", T=1),
    Case("one_token_top_1", "the smallest layer there is: one row or none", T=1, K=1, ids=only_ffn_experts),
    Case("empty_expert", "expert 1 gets no token: an empty slice between two full ones", ids=without_expert_1),
    Case("all_zero", "only zero experts: the FFN has no rows", kinds=(("identity", 4),), ids=only_zero_experts),
    Case("no_ffn_experts", "E = 0: there are no FFN weights at all", E=0, kinds=(("identity", 4),)),
    Case("all_on_one", "every token chooses expert 2: one long slice", T=40, ids=all_on_one),
    Case("choose_all", "K = A: every token takes every slot", T=9, K=8),
    Case("odd", "odd H and I: no vector width divides them", T=13, H=37, I=19, E=5),
    Case("wide", "H and I past one block of any kernel", T=8, H=260, I=130, E=4),
    Case("one_expert", "E = 1: nothing to sort", T=5, E=1, K=2),
    Case("heavy_skew", "slot popularity falls as exp(-i): slices from 0 to T rows", T=64, E=12, K=4, ids=heavy_skew),
    Case("many_rows", "slices of over a hundred rows: the branch for large M", T=160, E=2, K=3),
    Case("many_experts", "more slots than pairs: slices of 0 or 1 rows", T=6, E=96, kinds=(("identity", 48),), K=12),
    Case("skips", "ids of -1 everywhere, the first token has nothing else", ids=with_skips),
    Case("mixed", "every affine kind, repeated and out of order", T=40, kinds=MIXED, K=8),
    Case("constants", "only constants", kinds=(("constant", 3),)),
    Case("scaled", "only scaled identities", kinds=(("scaled_identity", 3),)),
    Case("null", "value 0 must cost nothing and change nothing", kinds=(("zero", 3),)),
]  # fmt: skip
NO_TOKENS = Case("no_tokens", "T = 0", T=0)
BY_NAME = {case.name: case for case in [*CASES, NO_TOKENS]}
