"""Greedy generation by a transformers model of LongCat-Flash-Lite's shape: MoE layers of stock's beside ours.

    python benchmarks/gpu/generation.py --output benchmarks/results/nvidia-h100-80gb/generation.csv
    python benchmarks/gpu/generation.py --tiny --layers 1 --batches 2  # without a GPU: tries the script, not the speed

One model with random weights, in as many layers as fit with stock's dead rows, so that all sides have the very same
weights. The sides, in this order:

- stock;
- masked: stock with transformers' own `grouped_mm` experts, zero choices masked as it masks other ranks', which is what
  plain transformers could do (generation_model.py);
- batched: the same with `batched_mm`, which transformers' `generate` puts in `grouped_mm`'s place where it knows of it;
- zemoe: after `patch_`.

What is timed is `model.generate`: "eager" with the cache that it takes by default, "compiled" with a static cache and
`torch.compile(fullgraph=True, mode="reduce-overhead")`, which is one CUDA graph a token. A token's time is the median
over the steps of three runs, seen by a streamer. "prefill" is one forward of one long prompt.

Before a side is timed, each of its layers is checked on what the same layer of stock's got and gave. Each row is
written at once, so a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generation_model import LITE, TINY, build, fitting_layers, masked
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig, LongcatFlashForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import zemoe
from zemoe.bench.check import rms
from zemoe.bench.csv_files import write_csv
from zemoe.integrations.transformers import patch_
from zemoe.machine import commit

# Relative RMS error of a layer; stock rounds each expert's output and each sum to bfloat16.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CHECKED = 8  # sequences that both sides are compared on
SIDES = {"stock": None, "masked": "grouped_mm", "batched": "batched_mm", "zemoe": None}  # transformers' name for it
UNPROFILED, PROFILED = 4, 4  # steps before and while the GPU's kernels are recorded


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------ generation


class Clock(BaseStreamer):
    """When the prompt was handed in, and when each new token reached the CPU. `at[n]` is called after token n."""

    def __init__(self, at: dict[int, Callable[[], object]] | None = None) -> None:
        self.seconds: list[float] = []
        self.at = at or {}

    def put(self, value: Tensor) -> None:
        self.seconds.append(time.perf_counter())
        self.at.get(len(self.seconds) - 1, lambda: None)()

    def end(self) -> None:
        pass

    @property
    def steps(self) -> list[float]:
        """Seconds between new tokens; the first one is the prompt's."""
        return [after - before for before, after in zip(self.seconds[1:], self.seconds[2:], strict=False)]


def generate(model: LongcatFlashForCausalLM, ids: Tensor, new: int, clock: Clock, **options: Any) -> Tensor:
    """The `new` tokens that are likeliest after ids [B, S], [B, new]."""
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, streamer=clock, **options)
    return made[:, ids.shape[1] :]


def compiled_options(device: torch.device, length: int) -> dict[str, Any]:
    """What makes `generate` compile, once for all calls of up to `length` tokens, the prompt included.

    On the CPU the compiler itself is left out, which would only take long.
    """
    if device.type == "cuda":
        config = CompileConfig(fullgraph=True, dynamic=False)
    else:
        config = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
        config._compile_all_devices = True
    return {"cache_implementation": "static", "max_cache_len": length, "compile_config": config}


def compilation() -> str:
    """What torch has counted about compilation; a CUDA graph that it gave up says nothing by itself."""
    counted = torch._dynamo.utils.counters
    breaks, skipped = sum(counted["graph_break"].values()), counted["inductor"]["cudagraph_skips"]
    return f"graphs: {counted['stats']['unique_graphs']}, graph breaks: {breaks}, CUDA graphs skipped: {skipped}"


def timed_generation(
    model: LongcatFlashForCausalLM, ids: Tensor, new: int, repeats: int, options: dict[str, Any]
) -> tuple[dict[str, object], Tensor]:
    """Columns of a row, and the tokens. What a first call compiles is not timed, but told."""
    batch = len(ids)
    start = time.perf_counter()
    generate(model, ids, 3, Clock(), **options)
    first = time.perf_counter() - start
    clocks, tokens = [Clock() for _ in range(repeats)], ids
    for clock in clocks:
        tokens = generate(model, ids, new, clock, **options)
    step = statistics.median(seconds for clock in clocks for seconds in clock.steps)
    whole = statistics.median(clock.seconds[-1] - clock.seconds[0] for clock in clocks)
    columns = {
        "tokens_per_second": f"{batch / step:.1f}", "ms_per_step": f"{1e3 * step:.3f}", "new_tokens": new,
        "with_prompt_tokens_per_second": f"{batch * new / whole:.1f}", "first_call_s": f"{first:.1f}",
    }  # fmt: skip
    return columns, tokens


def busy(model: LongcatFlashForCausalLM, ids: Tensor, options: dict[str, Any], console: Console) -> float:
    """Seconds a step for which the GPU runs kernels, which are listed; copies and fills count."""
    profiler = profile(activities=[ProfilerActivity.CUDA])
    clock = Clock({UNPROFILED: profiler.start, UNPROFILED + PROFILED: profiler.stop})
    generate(model, ids, UNPROFILED + PROFILED, clock, **options)
    kernels = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels) / PROFILED
    launches = sum(event.count for event in kernels if event.self_device_time_total) / PROFILED
    console.print(f"  the GPU is busy for {total / 1e3:.3f} ms a step, with {launches:.0f} kernels; the longest:")
    for event in kernels[:10]:
        took = event.self_device_time_total / PROFILED
        console.print(
            f"  {took:9.1f} us {event.count / PROFILED:6.1f} x  {event.key[:100]}", markup=False, highlight=False
        )
    return total / 1e6


def choices(model: LongcatFlashForCausalLM, ids: Tensor) -> dict[str, object]:
    """What the routers of a model with our layers decide in a step after the prompt: means over the layers."""
    with zemoe.observe(model) as seen:
        generate(model, ids, 3, Clock())
    last = [routing.topk_ids_TK for (_, batch), routing in seen.items() if batch == seen.micro_batch]
    E = model.config.n_routed_experts
    zero = statistics.mean((chosen >= E).float().mean().item() for chosen in last)
    hit = statistics.mean(len(chosen[chosen < E].unique()) for chosen in last)
    return {"zero_share": f"{zero:.3f}", "experts_hit": f"{hit:.1f}"}


def prefill(model: LongcatFlashForCausalLM, ids: Tensor, repeats: int) -> dict[str, object]:
    """Columns for one forward of ids [1, T] into a fresh cache."""
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            synchronize(ids.device)
            start = time.perf_counter()
            model(ids, use_cache=True, logits_to_keep=1)
            synchronize(ids.device)
            seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[1:])
    return {
        "tokens_per_second": f"{ids.shape[1] / step:.1f}", "ms_per_step": f"{1e3 * step:.3f}",
        "first_call_s": f"{seconds[0]:.1f}",
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- checks


def seen_by_layers(model: LongcatFlashForCausalLM, ids: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What each MoE layer gets and gives for ids, and the logits."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        pairs.append((args[0].clone(), output.clone()))

    hooks = [layer.mlp.register_forward_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return pairs, logits


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return (rms((got.float() - wanted.float()).flatten()) / rms(wanted.flatten())).item()


def check(
    model: LongcatFlashForCausalLM, ids: Tensor, pairs: list[tuple[Tensor, Tensor]], logits: Tensor
) -> dict[str, object]:
    """A side's layers against stock's, each on the same input; and the logits, where differences have added up."""
    with torch.no_grad():
        errors = [relative_error(layer.mlp(x), y) for layer, (x, y) in zip(model.model.layers, pairs, strict=True)]
        found = model(ids, use_cache=False).logits
    tolerance = TOLERANCES[model.dtype]
    if not max(errors) <= tolerance:
        raise SystemExit(f"layers differ from stock's by {max(errors):.2e} of the output, {tolerance} is allowed")
    return {
        "layer_error": f"{max(errors):.1e}", "logits_error": f"{relative_error(found, logits):.1e}",
        "same_argmax": f"{(found.argmax(-1) == logits.argmax(-1)).float().mean().item():.4f}",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- run

COLUMNS = (
    "side", "mode", "batch", "tokens_per_second", "ms_per_step", "gpu_busy", "with_prompt_tokens_per_second",
    "new_tokens", "first_call_s", "zero_share", "experts_hit", "same_tokens", "memory_gb", "note", "backend",
    "layer_error", "logits_error", "same_argmax",
)  # fmt: skip


class Report:
    """The rows so far: each is printed and written at once, so that a run that is cut off leaves what it had."""

    def __init__(self, console: Console, output: Path | None) -> None:
        self.console, self.output = console, output
        self.rows: list[dict[str, object]] = []
        self.about: dict[str, object] = {}

    def say(self, line: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')}  {line}", markup=False, highlight=False)

    def add(self, **row: object) -> None:
        self.rows.append(row)
        self.say("  ".join(f"{name} {value}" for name, value in row.items()))
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        empty = dict.fromkeys(COLUMNS, "")
        write_csv(self.output, [empty | row | self.about for row in self.rows])

    def table(self) -> Table:
        """Tokens a second: a line for each mode and batch, a column for each side, and ours over the best other."""
        sides = [side for side in SIDES if any(row["side"] == side for row in self.rows)]
        table = Table(title="tokens per second")
        for heading in ("mode", "batch", *sides, "ratio"):
            table.add_column(heading, justify="left" if heading == "mode" else "right")
        rates = {(row["mode"], row["batch"], row["side"]): row.get("tokens_per_second") for row in self.rows}
        for mode, batch in dict.fromkeys((row["mode"], row["batch"]) for row in self.rows):
            # A side that does not compile can still do what it does eager.
            others = [rates.get((m, batch, side)) for m in (mode, "eager") for side in sides if side != "zemoe"]
            best = max((float(str(rate)) for rate in others if rate), default=None)
            ours = rates.get((mode, batch, "zemoe"))
            ratio = f"{float(str(ours)) / best:.2f}" if ours and best else "-"
            table.add_row(str(mode), str(batch), *(str(rates.get((mode, batch, s)) or "-") for s in sides), ratio)
        return table


class Bench:
    """The model, its prompts, and how a side is measured: the same for every side."""

    def __init__(self, args: argparse.Namespace, report: Report) -> None:
        self.args, self.report = args, report
        self.device = torch.device("cpu" if args.tiny else "cuda")
        dtype = torch.float32 if args.tiny else torch.bfloat16
        sizes = TINY if args.tiny else LITE
        layers = args.layers or (sizes["num_layers"] if args.tiny else fitting_layers(sizes, dtype))
        self.model = build(sizes | {"num_layers": layers}, self.device, dtype)
        synchronize(self.device)
        report.about = about(args, self.model, self.device)
        report.say("  ".join(f"{name} {value}" for name, value in report.about.items()))

        def random_ids(*shape: int) -> Tensor:
            return torch.randint(self.model.config.vocab_size, shape, device=self.device)

        self.prompts = {batch: random_ids(batch, args.prompt) for batch in args.batches}
        self.long, self.checked = random_ids(1, args.prefill), random_ids(CHECKED, args.prompt)
        self.pairs, self.logits = seen_by_layers(self.model, self.checked)
        self.greedy: dict[int, Tensor] = {}  # of the first side

    def side(self, side: str, new: int, backend: str | None) -> None:
        """Check and time all that is asked for, uncompiled first, with the layers that the model has now."""
        model, args = self.model, self.args
        columns: dict[str, object] = {"backend": backend} if backend else {}
        if side != "stock":
            columns |= check(model, self.checked, self.pairs, self.logits)
            self.report.say(f"{side}: {columns}")
        self._row(side, "prefill", 1, columns, lambda: prefill(model, self.long, args.repeats))
        for batch in args.batches:
            seen = choices(model, self.prompts[batch]) if side == "zemoe" else {}
            self._row(side, "eager", batch, columns | seen, lambda batch=batch: self._generation(batch, new, None))
        options = compiled_options(self.device, args.prompt + max(args.tokens, UNPROFILED + PROFILED))
        for batch in args.compiled_batches[:1] if side == "stock" else args.compiled_batches:
            self._row(side, "compiled", batch, columns, lambda batch=batch: self._generation(batch, new, options))
        torch._dynamo.reset()

    def _row(
        self, side: str, mode: str, batch: int, columns: dict[str, object], timed: Callable[[], dict[str, object]]
    ) -> None:
        self.report.say(f"{side} {mode} {batch} ...")
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            found = timed()
        except torch._dynamo.exc.TorchDynamoException as error:
            found = {"note": "does not compile: " + " ".join(str(error).split("\n\n")[0].split())}
        except torch.OutOfMemoryError:
            found = {"note": "out of memory"}
        if on_gpu:
            found["memory_gb"] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
            torch.cuda.empty_cache()  # one side's leavings are not in the next one's way
        self.report.add(side=side, mode=mode, batch=batch, **found, **columns)

    def _generation(self, batch: int, new: int, compiled: dict[str, Any] | None) -> dict[str, object]:
        prompt, options = self.prompts[batch], compiled or {}
        torch._dynamo.utils.counters.clear()
        columns, tokens = timed_generation(self.model, prompt, new, self.args.repeats, options)
        if compiled:
            columns["note"] = compilation()
        if batch in self.greedy:
            n = min(tokens.shape[1], self.greedy[batch].shape[1])
            columns["same_tokens"] = f"{(tokens[:, :n] == self.greedy[batch][:, :n]).float().mean().item():.3f}"
        else:
            self.greedy[batch] = tokens
        if self.device.type == "cuda" and batch == min(self.args.batches):
            took = busy(self.model, prompt, options, self.report.console)
            columns["gpu_busy"] = f"{1e3 * took / float(str(columns['ms_per_step'])):.3f}"
        return columns


def run(args: argparse.Namespace, report: Report) -> None:
    bench = Bench(args, report)
    if "stock" in args.sides:
        bench.side("stock", args.stock_tokens, None)
    for side in ("masked", "batched"):
        if side in args.sides:
            with masked(bench.model, SIDES[side]):
                bench.side(side, args.tokens, SIDES[side])
    if "zemoe" in args.sides:
        patched = patch_(bench.model)
        report.say(f"patch_: backend {patched.backend}, {patched.bytes_freed / 1e9:.1f} GB freed")
        bench.side("zemoe", args.tokens, patched.backend)


def about(args: argparse.Namespace, model: LongcatFlashForCausalLM, device: torch.device) -> dict[str, object]:
    config = model.config
    return {
        "H": config.hidden_size, "I": config.expert_ffn_hidden_size, "E": config.n_routed_experts,
        "Z": config.zero_expert_num, "K": config.moe_topk, "layers": config.num_layers, "vocab": config.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."), "prompt": args.prompt, "prefill": args.prefill,
        "repeats": args.repeats, "seed": args.seed, "commit": args.commit or commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **{package: importlib.metadata.version(package) for package in ("torch", "triton", "transformers")},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tiny", action="store_true", help="a tiny float32 model on the CPU, to try this script")
    add("--layers", type=int, help="default: as many as fit")
    add("--sides", nargs="+", choices=SIDES, default=["stock", "masked", "zemoe"], help="default: %(default)s")
    add("--batches", type=int, nargs="+", default=[1, 8, 64])
    add("--compiled-batches", type=int, nargs="*", help="default: all batches; none to leave compilation out")
    add("--prompt", type=int, default=64, help="tokens of each prompt")
    add("--tokens", type=int, default=32, help="new tokens of every side but stock")
    add("--stock-tokens", type=int, default=5, help="new tokens with stock's, which takes long for each")
    add("--prefill", type=int, default=4096, help="tokens of the long prompt")
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--commit", help="for the CSV, where this is not a checkout")
    add("--output", type=Path, help="CSV file")
    args = parser.parse_args(argv)
    if args.compiled_batches is None:
        args.compiled_batches = args.batches
    unknown = set(args.compiled_batches) - set(args.batches)
    if unknown:
        parser.error(f"--compiled-batches must be among --batches, got {sorted(unknown)}")
    logging.set_verbosity_error()
    if args.tiny:
        torch.set_num_threads(1)  # steps are too short to be shared
    torch.manual_seed(args.seed)
    report = Report(Console(width=None if Console().is_terminal else 160), args.output)
    run(args, report)
    report.console.print(report.table())


if __name__ == "__main__":
    main()
