"""One row of `zemoe bench`: a layer at one T is checked, timed and compared with the least time it could take.

T tokens, H hidden size, I expert width, E FFN experts, Z zero experts, A = E + Z slots, K choices a token.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..layer import MoE
from ..terminal import CommandError
from . import check, timing
from .baselines import Forward
from .cases import Case
from .request import BenchSettings

# Untimed rounds before: oneDNN builds its kernels in the first two.
_WARMUP = {"cpu": 2, "cuda": 1}
MOST_REPLAYED = 512  # tokens up to which a CUDA graph is replayed, as engines do when they decode
CALLS_A_GRAPH = 4
_POISON_BYTES = 2**30
WRONG = "wrong"  # a baseline's method where it was not timed for that, with the reason after it


def _poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next calls get, so that what they don't write shows."""
    if device.type == "cuda":
        sizes = [_POISON_BYTES, *[2**19] * 64]  # small tensors come from a pool of their own
        held = [torch.full((size // 4,), float("nan"), device=device) for size in sizes]
        del held


class Work(NamedTuple):
    """Means over a row's inputs; the shares are of all their choices together.

    ffn_rows: (token, FFN expert) pairs. top_share: the most popular FFN expert's share of them.
    """

    floor_seconds: float
    experts_hit: float
    ffn_rows: float
    zero_share: float
    top_share: float


class Row:
    """One layer, its routing steered, at one T: inputs, checks, times."""

    def __init__(self, settings: BenchSettings, case: Case, layer: MoE, sides: dict[str, Forward], tokens: int) -> None:
        self.settings, self.case, self.layer, self.sides, self.tokens = settings, case, layer, sides, tokens
        self.cuda = settings.device.type == "cuda"
        self.replayed = self.cuda and tokens <= MOST_REPLAYED
        self.rounds = settings.repeats + _WARMUP[settings.device.type]
        calls = self.rounds * (CALLS_A_GRAPH if self.replayed else 1)
        self.inputs = [self._input() for _ in range(calls)]
        self.what = f"{case.name} at T = {tokens}"
        self.left_out: dict[str, str] = {}
        self.methods: dict[str, str] = {}

    def _input(self) -> Tensor:
        x_TH = torch.randn(self.tokens, self.case.hidden_size, device=self.settings.device)
        return x_TH.to(self.settings.dtype)

    def _expected(self) -> check.Expected:
        for _ in range(100):
            wanted = check.expected(self.layer, self.inputs[0])
            if wanted.tokens:
                return wanted
            self.inputs[0] = self._input()
        raise CommandError(
            f"{self.what}: no token has choices that are clear of rounding, so nothing can be checked", 1
        )

    def _right(self, name: str, out_TH: Tensor, wanted: check.Expected) -> bool:
        """Return whether a side's output is right. A wrong baseline is noted; where zemoe is wrong, everything ends."""
        wrong = check.judge(out_TH, wanted)
        if wrong and name == "zemoe":
            raise CommandError(f"zemoe is wrong, {self.what}: {wrong}", 1)
        if wrong:
            self.left_out[name] = f"{WRONG}: {wrong}"
        return not wrong

    def _check(self, wanted: check.Expected) -> None:
        for name in list(self.sides):
            _poison(self.settings.device)
            try:
                out_TH = self.sides[name](self.inputs[0])
            except torch.OutOfMemoryError as error:
                if name == "zemoe":
                    raise CommandError(f"{self.what}: {error}", 1) from None
                self.left_out[name] = "out of memory"
                del self.sides[name]
                continue
            if not self._right(name, out_TH, wanted):
                del self.sides[name]

    def seconds(self, reached: Callable[[float], None]) -> dict[str, list[float]]:
        """Return the seconds of a call in each round, for each side, once all sides have passed the check.

        reached: called after each round with the share of them that is done.
        """
        turns = count(1)

        def after() -> None:
            reached(next(turns) / self.rounds)

        wanted = self._expected()
        self._check(wanted)
        if not self.cuda:
            self.methods = dict.fromkeys(self.sides, "clock")
            spent = timing.interleaved(self.sides, self.inputs, after)
        elif not self.replayed:
            self.methods = dict.fromkeys(self.sides, "events")
            spent = timing.cuda_events(self.sides, self.inputs, after)
        else:
            spent = self._replays(wanted, after)
        warmup = _WARMUP[self.settings.device.type]
        return {name: values[warmup:] for name, values in spent.items()}

    def _replays(self, wanted: check.Expected, after: Callable[[], None]) -> dict[str, list[float]]:
        static = [x.clone() for x in self.inputs[:CALLS_A_GRAPH]]
        replays: dict[str, timing.Replay] = {}
        others: dict[str, Forward] = {}
        for name, call in self.sides.items():
            if timing.waits_for_device(partial(call, static[0])):
                others[name], self.methods[name] = call, "events"
                continue
            replay = timing.capture(call, static)
            for out_TH in replay.outputs:
                out_TH.fill_(float("nan"))
            replay.graph.replay()
            judged = [wanted, *[wanted._replace(tokens=[])] * (CALLS_A_GRAPH - 1)]
            if all(self._right(name, *pair) for pair in zip(replay.outputs, judged, strict=True)):
                replays[name], self.methods[name] = replay, "replay"
        batches = [self.inputs[i : i + CALLS_A_GRAPH] for i in range(0, len(self.inputs), CALLS_A_GRAPH)]
        if not replays:
            return timing.cuda_events(others, [batch[0] for batch in batches], after)
        return timing.cuda_replays(replays, others, batches, after)

    def work(self, ceilings: timing.Ceilings) -> Work:
        """Return what the layer had to do for the inputs that were timed."""
        case = self.case
        sizes = {"hidden_size": case.hidden_size, "itemsize": self.settings.dtype.itemsize, "tokens": self.tokens}
        router = timing.router_floor(ceilings, slots=case.config.num_slots, **sizes)
        chosen_A = torch.zeros(case.config.num_slots, dtype=torch.int64, device=self.settings.device)
        floors, hits = [], []
        for x_TH in self.inputs:
            counts_A = torch.bincount(self.layer.router(x_TH).topk_ids_TK.flatten(), minlength=case.config.num_slots)
            counts_E = counts_A[: case.num_experts]
            rows, hit = int(counts_E.sum()), int(counts_E.count_nonzero())
            floor = timing.moe_floor(
                ceilings, ffn_rows=rows, experts_hit=hit, intermediate_size=case.intermediate_size, **sizes
            )
            floors.append(floor + router)
            hits.append(hit)
            chosen_A += counts_A
        chosen_E = chosen_A[: case.num_experts]
        real = int(chosen_E.sum())
        return Work(
            floor_seconds=statistics.mean(floors),
            experts_hit=statistics.mean(hits),
            ffn_rows=real / len(self.inputs),
            zero_share=1 - real / int(chosen_A.sum()),
            top_share=int(chosen_E.amax()) / max(real, 1),
        )

    def result(
        self, seconds: dict[str, list[float]], ceilings: timing.Ceilings, zero_share: float | None
    ) -> dict[str, Any]:
        """Return what the table, the CSV and the JSON hold of this row."""
        case, work = self.case, self.work(ceilings)
        ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
        flops = 2 * work.ffn_rows * 3 * case.hidden_size * case.intermediate_size
        row: dict[str, Any] = {
            "case": case.name,
            "H": case.hidden_size,
            "I": case.intermediate_size,
            "E": case.num_experts,
            "Z": case.num_zero_experts,
            "K": case.top_k,
            "dtype": str(self.settings.dtype).removeprefix("torch."),
            "backend": resolve_backend(self.settings.device, self.settings.dtype, num_experts=case.num_experts).name,
            "T": self.tokens,
            "zero_share_asked": zero_share,
            "zero_share": work.zero_share,
            "skew_asked": self.settings.request.skew,
            "skew": work.top_share,
            "experts_hit": work.experts_hit,
            "method": self.methods["zemoe"],
            "ms": ms["zemoe"],
            "best_ms": 1e3 * min(seconds["zemoe"]),
            "floor_ms": 1e3 * work.floor_seconds,
            "floor_ratio": ms["zemoe"] / (1e3 * work.floor_seconds),
            "tflop_s": flops / ms["zemoe"] / 1e9,
        }
        for name in self.settings.baselines:
            row[f"{name}_method"] = self.methods.get(name) or self.left_out[name]
            row[f"{name}_ms"] = ms.get(name)
            row[f"{name}_best_ms"] = 1e3 * min(seconds[name]) if name in seconds else None
            row[f"{name}_ratio"] = ms[name] / ms["zemoe"] if name in ms else None
        return row
