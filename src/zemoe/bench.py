"""`zemoe bench`: times the layer beside baselines and beside the floor of the machine, and checks it before.

T tokens, H hidden size, I expert width, E FFN experts, Z zero experts, A = E + Z slots, K choices a token.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from . import __version__, bench_check, bench_layer, bench_show, measure
from .baselines import BASELINES, Call
from .bench_layer import Case
from .doctor import device_name, usable_devices, versions
from .experts import resolve_backend
from .generate import CommandError
from .layer import MoE

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_BASELINES = ("torch", "eager")
_REPEATS = {"cpu": 7, "cuda": 20}
# Untimed rounds before: oneDNN builds its kernels in the first two.
_WARMUP = {"cpu": 2, "cuda": 1}
_MOST_REPLAYED = 512  # tokens up to which a CUDA graph is replayed, as engines do when they decode
_CALLS_A_GRAPH = 4
_POISON_BYTES = 2**30
_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What was asked for; None or () for the default. skew: share of one expert among the FFN choices."""

    cases: tuple[str, ...] = ()
    baselines: tuple[str, ...] = DEFAULT_BASELINES
    tokens: tuple[int, ...] = ()
    dtype: str | None = None
    device: str | None = None
    zero_shares: tuple[float, ...] = ()
    skew: float | None = None
    repeats: int | None = None
    seed: int = 0
    csv: Path | None = None
    plot: Path | None = None


class Plan(NamedTuple):
    """A request with all defaults filled in. absent: baselines that can't be timed here, and why."""

    request: BenchRequest
    cases: list[Case]
    device: torch.device
    dtype: torch.dtype
    repeats: int
    zero_shares: tuple[float | None, ...]
    baselines: list[str]
    absent: dict[str, str]

    def tokens(self, case: Case) -> tuple[int, ...]:
        return self.request.tokens or case.tokens


def numbers(option: str, text: str | None, kind: Callable[[str], Any], least: float, most: float) -> tuple[Any, ...]:
    """What `option` lists with commas between, () for None. Raises CommandError for anything else."""
    if text is None:
        return ()
    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(least <= number <= most for number in found):
        what = "whole numbers" if kind is int else "numbers"
        range_ = f"from {least:g}" + (f" to {most:g}" if most < float("inf") else "")
        raise CommandError(f"{option} must be {what} {range_}, with commas between them, got {text!r}")
    return found


# ------------------------------------------------------------------------------------------------- before measuring


def _full_device(name: str | None) -> torch.device:
    usable = [device for device in usable_devices() if device.split(":")[0] in _REPEATS]
    wanted = usable[-1].split(":")[0] if name is None else name
    wanted = wanted if wanted == "cpu" or ":" in wanted else f"{wanted}:0"
    if wanted not in usable:
        raise CommandError(f"--device must be one that bench can use here ({', '.join(usable)}), got {name!r}")
    return torch.device(wanted)


def _check_file(option: str, path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise CommandError(f"{option} must be a file in a folder that exists, got {path}")


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had there, None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def _check_memory(plan: Plan) -> None:
    free = free_bytes(plan.device)
    for case in plan.cases:
        weights = case.weight_bytes(plan.dtype.itemsize)
        work = max(case.work_bytes(T, plan.dtype.itemsize) for T in plan.tokens(case))
        if free is not None and weights + work > free:
            raise CommandError(
                f"{case.name} needs {weights / 1e9:.1f} GB of weights and up to {work / 1e9:.1f} GB to work in, but "
                f"{plan.device} has {free / 1e9:.1f} GB left; take a smaller case or fewer --tokens",
                1,
            )


def make_plan(request: BenchRequest) -> Plan:
    """Check all that can be said before anything is measured. Raises CommandError."""
    known = bench_layer.load_cases()
    device = _full_device(request.device)
    names = request.cases or tuple(name for name, case in known.items() if device.type in case.devices)
    for name in names:
        if name not in known:
            raise CommandError(f"CASE must be one of {', '.join(known)}, got {name!r}")
    for name in request.baselines:
        if name not in BASELINES:
            raise CommandError(f"--baseline must list some of {', '.join(BASELINES)}, or be none, got {name!r}")
    dtype = request.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if request.skew is not None and not 0 < request.skew <= 1:
        raise CommandError(f"--skew must be more than 0 and at most 1, got {request.skew:g}")
    if request.repeats is not None and request.repeats < 1:
        raise CommandError(f"--repeats must be at least 1, got {request.repeats}")
    _check_file("--csv", request.csv)
    _check_file("--plot", request.plot)
    if request.plot is not None:
        if request.plot.suffix not in _SUFFIXES:
            raise CommandError(f"--plot must end in one of {', '.join(_SUFFIXES)}, got {request.plot}")
        if find_spec("matplotlib") is None:
            raise CommandError("--plot needs matplotlib, which is not installed: pip install 'zemoe[report]'", 1)
    absent = {name: BASELINES[name].why_absent() for name in dict.fromkeys(request.baselines)}
    plan = Plan(
        request=request,
        cases=[known[name] for name in dict.fromkeys(names)],
        device=device,
        dtype=getattr(torch, dtype),
        repeats=request.repeats or _REPEATS[device.type],
        zero_shares=request.zero_shares or (None,),
        baselines=[name for name, why in absent.items() if not why],
        absent={name: why for name, why in absent.items() if why},
    )
    _check_memory(plan)
    return plan


def commit() -> str:
    """The commit that this code comes from, with "-dirty" where files differ from it; "unknown" outside of git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment may lie inside of somebody else's repository: ours is one that knows this file.
    if git("ls-files", "--error-unmatch", str(here)) is None:
        return "unknown"
    return git("describe", "--always", "--dirty", "--exclude=*") or "unknown"


def _about(plan: Plan, at: measure.Ceilings) -> dict[str, Any]:
    installed, name = versions(), device_name(str(plan.device))
    if plan.device.type == "cpu" and (cpu_info := Path("/proc/cpuinfo")).exists():
        lines = cpu_info.read_text(encoding="utf-8").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0]}, {name}" if models else name
    return {
        "repeats": plan.repeats,
        "seed": plan.request.seed,
        "commit": commit(),
        "device": name,
        "read_gb_s": at.bytes_per_second / 1e9,
        "product_tflop_s": at.flops_per_second / 1e12,
        "zemoe": __version__,
        **{package: installed[package] for package in ("torch", "triton", "transformers")},
    }


# --------------------------------------------------------------------------------------------------------- measuring


def _poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next calls get, so that what they don't write shows."""
    if device.type == "cuda":
        sizes = [_POISON_BYTES, *[2**19] * 64]  # small tensors come from a pool of their own
        held = [torch.full((size // 4,), float("nan"), device=device) for size in sizes]
        del held


def _judged(name: str, out_TH: Tensor, wanted: bench_check.Expected, what: str) -> None:
    wrong = bench_check.judge(out_TH, wanted)
    if wrong:
        raise CommandError(f"{name} is wrong, {what}: {wrong}", 1)


class _Row:
    """One layer, its routing steered, at one T: inputs, checks, times."""

    def __init__(self, plan: Plan, case: Case, layer: MoE, sides: dict[str, Call], tokens: int) -> None:
        self.plan, self.case, self.layer, self.sides, self.tokens = plan, case, layer, sides, tokens
        self.cuda = plan.device.type == "cuda"
        self.replayed = self.cuda and tokens <= _MOST_REPLAYED
        self.rounds = plan.repeats + _WARMUP[plan.device.type]
        count = self.rounds * (_CALLS_A_GRAPH if self.replayed else 1)
        self.inputs = [self._input() for _ in range(count)]
        self.what = f"{case.name} at T = {tokens}"
        self.too_large: list[str] = []
        self.methods: dict[str, str] = {}

    def _input(self) -> Tensor:
        x_TH = torch.randn(self.tokens, self.case.hidden_size, device=self.plan.device)
        return x_TH.to(self.plan.dtype)

    def _expected(self) -> bench_check.Expected:
        for _ in range(100):
            wanted = bench_check.expected(self.layer, self.inputs[0])
            if wanted.tokens:
                return wanted
            self.inputs[0] = self._input()
        raise CommandError(
            f"{self.what}: no token has choices that are clear of rounding, so nothing can be checked", 1
        )

    def _check(self, wanted: bench_check.Expected) -> None:
        for name in list(self.sides):
            _poison(self.plan.device)
            try:
                out_TH = self.sides[name](self.inputs[0])
            except torch.OutOfMemoryError as error:
                if name == "zemoe":
                    raise CommandError(f"{self.what}: {error}", 1) from None
                self.too_large.append(name)
                del self.sides[name]
                continue
            _judged(name, out_TH, wanted, self.what)

    def seconds(self, after: Callable[[], None]) -> dict[str, list[float]]:
        """Seconds a call and round of each side, once all of them have passed the check."""
        wanted = self._expected()
        self._check(wanted)
        if not self.cuda:
            self.methods = dict.fromkeys(self.sides, "clock")
            spent = measure.interleaved(self.sides, self.inputs, after)
        elif not self.replayed:
            self.methods = dict.fromkeys(self.sides, "events")
            spent = measure.cuda_events(self.sides, self.inputs, after)
        else:
            spent = self._replays(wanted, after)
        warmup = _WARMUP[self.plan.device.type]
        return {name: values[warmup:] for name, values in spent.items()}

    def _replays(self, wanted: bench_check.Expected, after: Callable[[], None]) -> dict[str, list[float]]:
        static = [x.clone() for x in self.inputs[:_CALLS_A_GRAPH]]
        replays: dict[str, measure.Replay] = {}
        others: dict[str, Call] = {}
        for name, call in self.sides.items():
            if measure.waits_for_device(partial(call, static[0])):
                others[name], self.methods[name] = call, "events"
                continue
            replays[name], self.methods[name] = measure.capture(call, static), "replay"
            for out_TH in replays[name].outputs:
                out_TH.fill_(float("nan"))
            replays[name].graph.replay()
            for place, out_TH in enumerate(replays[name].outputs):
                _judged(name, out_TH, wanted._replace(tokens=[]) if place else wanted, f"{self.what}, replayed")
        batches = [self.inputs[i : i + _CALLS_A_GRAPH] for i in range(0, len(self.inputs), _CALLS_A_GRAPH)]
        if not replays:
            self.methods = dict.fromkeys(self.sides, "events")
            return measure.cuda_events(self.sides, [batch[0] for batch in batches], after)
        return measure.cuda_replays(replays, others, batches, after)

    def work(self, at: measure.Ceilings) -> dict[str, float]:
        """Means over all inputs: floor_seconds, ffn_rows, experts_hit, zero_share, top_share."""
        case, itemsize = self.case, self.plan.dtype.itemsize
        sums = dict.fromkeys(("floor_seconds", "ffn_rows", "experts_hit", "zero_share", "top_share"), 0.0)
        for x_TH in self.inputs:
            ids_TK = self.layer.router(x_TH).topk_ids_TK
            real = ids_TK[ids_TK < case.num_experts]
            hit = real.unique().numel()
            found = bench_layer.shares(ids_TK, case.num_experts)
            floor = measure.moe_floor(
                at,
                tokens=self.tokens,
                ffn_rows=real.numel(),
                experts_hit=hit,
                hidden_size=case.hidden_size,
                intermediate_size=case.intermediate_size,
                itemsize=itemsize,
            ) + measure.router_floor(
                at,
                tokens=self.tokens,
                slots=case.config.num_slots,
                hidden_size=case.hidden_size,
                itemsize=itemsize,
            )
            for key, value in zip(sums, (floor, real.numel(), hit, found.zero, found.top), strict=True):
                sums[key] += value
        return {key: value / len(self.inputs) for key, value in sums.items()}

    def result(self, seconds: dict[str, list[float]], at: measure.Ceilings, zero_share: float | None) -> dict[str, Any]:
        """What the table, the CSV and the JSON hold of this row."""
        case, work = self.case, self.work(at)
        ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
        flops = 2 * work["ffn_rows"] * 3 * case.hidden_size * case.intermediate_size
        row: dict[str, Any] = {
            "case": case.name,
            "H": case.hidden_size,
            "I": case.intermediate_size,
            "E": case.num_experts,
            "Z": case.num_zero_experts,
            "K": case.top_k,
            "dtype": str(self.plan.dtype).removeprefix("torch."),
            "backend": resolve_backend(self.plan.device, self.plan.dtype).name,
            "T": self.tokens,
            "zero_share_asked": zero_share,
            "zero_share": work["zero_share"],
            "skew_asked": self.plan.request.skew,
            "skew": work["top_share"],
            "experts_hit": work["experts_hit"],
            "method": self.methods["zemoe"],
            "ms": ms["zemoe"],
            "best_ms": 1e3 * min(seconds["zemoe"]),
            "floor_ms": 1e3 * work["floor_seconds"],
            "floor_ratio": ms["zemoe"] / (1e3 * work["floor_seconds"]),
            "tflop_s": flops / ms["zemoe"] / 1e9,
        }
        for name in self.plan.baselines:
            row[f"{name}_method"] = self.methods.get(name, "out of memory" if name in self.too_large else None)
            row[f"{name}_ms"] = ms.get(name)
            row[f"{name}_best_ms"] = 1e3 * min(seconds[name]) if name in seconds else None
            row[f"{name}_ratio"] = ms[name] / ms["zemoe"] if name in ms else None
        return row


@contextmanager
def _torch_state(plan: Plan) -> Iterator[None]:
    """Our seed and device inside, the caller's random numbers as they were afterwards; nothing keeps a graph."""
    devices = [plan.device] if plan.device.type == "cuda" else []
    current = torch.cuda.device(plan.device) if devices else nullcontext()
    with torch.random.fork_rng(devices), current, torch.inference_mode():
        torch.manual_seed(plan.request.seed)
        yield


def _measure_case(
    plan: Plan, case: Case, at: measure.Ceilings, progress: bench_show.Progress, rows: list[dict[str, Any]]
) -> None:
    """Append the rows of a case to `rows` as they come."""
    progress.say(f"{case.name}: making the weights")
    layer = bench_layer.build(case, plan.dtype, plan.device)
    built = {"zemoe": layer, **{name: BASELINES[name].build(layer) for name in plan.baselines}}  # type: ignore[misc]
    for zero_share in plan.zero_shares:
        if zero_share is not None or plan.request.skew is not None:
            try:
                bench_layer.steer(layer, zero_share, plan.request.skew)
            except ValueError as error:
                raise CommandError(f"{case.name}: --{error}") from None
        for tokens in plan.tokens(case):
            share = "" if zero_share is None else f", zero share {zero_share:g}"
            progress.say(f"{case.name}, T = {tokens}{share}")
            row = _Row(plan, case, layer, dict(built), tokens)
            seconds = row.seconds(lambda: progress.advance(1 / row.rounds))  # noqa: B023 - called in this iteration
            rows.append(row.result(seconds, at, zero_share))


def _write_csv(path: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    def text(value: Any) -> Any:
        return f"{value:.6g}" if isinstance(value, float) else value

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: text(value) for key, value in (row | about).items()} for row in rows)


def run(request: BenchRequest, out: Console, status: Console) -> tuple[int, dict[str, Any]]:
    """Show tables on `out` and progress on `status`; the exit code, and the result for programs.

    Ctrl-C ends the measuring; what was measured until then is still shown and written. Raises CommandError, with code
    1 where zemoe or a baseline computes something else than the reference.
    """
    plan = make_plan(request)
    rows: list[dict[str, Any]] = []
    finish = "done"
    result: dict[str, Any] = {"zemoe": __version__, "finish": finish, "rows": rows}
    with _torch_state(plan):
        try:
            with status.status("measuring the machine's ceilings") if status.is_terminal else nullcontext():
                at = (measure.cpu_ceilings if plan.device.type == "cpu" else measure.cuda_ceilings)(plan.dtype)
        except KeyboardInterrupt:
            status.print("interrupted before anything was measured")
            return 130, result | {"finish": "interrupted"}
        about = _about(plan, at)
        out.print(bench_show.headline(about, str(plan.dtype).removeprefix("torch.")), style="dim", markup=False)
        for case in plan.cases:
            done = len(rows)
            units = len(plan.tokens(case)) * len(plan.zero_shares)
            try:
                with bench_show.Progress(status, units) as progress:
                    _measure_case(plan, case, at, progress, rows)
            except KeyboardInterrupt:
                finish = "interrupted"
            if rows[done:]:
                out.print()
                out.print(bench_show.table(case, rows[done:], plan.baselines))
            if finish == "interrupted":
                units = sum(len(plan.tokens(each)) * len(plan.zero_shares) for each in plan.cases)
                out.print(f"interrupted: {len(rows)} of {units} rows were measured", style="bold", markup=False)
                break
    cache = torch.cuda.get_device_properties(plan.device).L2_cache_size if plan.device.type == "cuda" else 0
    notes = bench_show.notes(plan.absent, rows, plan.baselines)
    notes += [
        f"{case.name}: its weights are no larger than the cache of {cache / 1e6:.0f} MB, which may have held them"
        for case in plan.cases
        if case.weight_bytes(plan.dtype.itemsize) <= cache
    ]
    for note in notes:
        out.print(note, style="dim", markup=False)
    result |= {
        "finish": finish,
        "about": about,
        "cases": [asdict(case) for case in plan.cases],
        "baselines": {name: plan.absent.get(name) or "timed" for name in dict.fromkeys(request.baselines)},
        "notes": notes,
    }
    if rows and request.csv is not None:
        _write_csv(request.csv, rows, about)
    if rows and request.plot is not None:
        from .bench_plot import plot

        plot(rows, plan.baselines, bench_show.headline(about, rows[0]["dtype"]), request.plot)
    return 130 if finish == "interrupted" else 0, result
