"""What `zemoe train` shows of a run, from the records that the trainer hands to its listener.

`open_view` gives one of three: JSON lines for programs, a picture that is drawn anew on a terminal, a line a record in
a file or a pipe. K choices a token, K_e FFN experts a token that the controller steers to.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..terminal import BAR_COLOR, SHADES, bar, figures

Record = dict[str, Any]
_CELLS = 20  # of a gauge and of the progress bar
_LOSS_CELLS = 24
_AIM_COLOR = "#5abec8"
_FRAMES_PER_SECOND = 2
_BY_LAYER = 32  # layers of which each has its number; of more, the range is told


class View(AbstractContextManager["View"]):
    """Called with each record of a run, as zemoe.training.run.train describes them. This one shows nothing."""

    def __call__(self, record: Record) -> None:
        return None

    def remember(self, train: Sequence[Record], evals: Sequence[Record]) -> None:
        """Called before a run that is resumed, with what it did before; some of it the run may do again."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def open_view(console: Console, as_json: bool) -> View:
    """Return the view for `console`; `as_json`: it shows nothing but the records, a JSON object a line."""
    if as_json:
        return JsonView(console)
    return LiveView(console) if console.is_terminal else LineView(console)


# --------------------------------------------------------------------------------------------------------- small parts


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many digits; a dash for None, the word for what isn't finite."""
    return f"{value}" if value is not None and not math.isfinite(value) else figures(value, digits)


def span(seconds: float) -> str:
    """Write a time: 1:05 is a minute and five seconds, 1:00:05 an hour and five."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def millions(parameters: float) -> str:
    return f"{parameters / 1e9:,.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.1f} M"


def sparkline(values: Sequence[float], cells: int, ascii_only: bool) -> str:
    """Draw the course of `values`, oldest first, in at most so many cells, each the mean of its part."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    cells = min(cells, len(values))
    edges = [i * len(values) // cells for i in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    marks = "_.-=^" if ascii_only else "▁▂▃▄▅▆▇█"
    step = (high - low) / (len(marks) - 1) or 1.0
    return "".join(marks[round((mean - low) / step)] for mean in means)


def gauge(used: float | None, aim: float | None, most: float, ascii_only: bool) -> Text:
    """Draw a bar of `used` among `most`, with a mark at `aim`."""
    filled = bar(min(max((used or 0) / most, 0), 1), ascii_only).ljust(_CELLS, "." if ascii_only else "·")
    text = Text(filled, style=BAR_COLOR)
    if aim is not None:
        at = min(round(aim / most * _CELLS), _CELLS - 1)
        mark = Text("|" if ascii_only else "┃", style=f"bold {_AIM_COLOR}")
        text = Text.assemble(text[:at], mark, text[at + 1 :])
    return text


def headline(run: Record) -> str:
    """Return one line: the model, the device, the dtype, and how much text."""
    world = f" x {run['world']}" if run["world"] > 1 else ""
    return (
        f"{millions(run['parameters'])} parameters, {millions(run['active_parameters'])} used by a token; "
        f"{run['layers']} layers, {run['choices']} of {run['ffn_slots']} FFN and {run['zero_slots']} zero experts a "
        f"token; {run['device']}{world}, {run['dtype']}; {run['train_tokens']:,} tokens to train on, "
        f"{run['heldout_tokens']:,} held out, {run['tokens_per_step']:,} a step"
    )


def _experts(record: Record, run: Record) -> str:
    """Write FFN experts a token, such as 3.98 ± 0.91 of 6 a token, K_e 4."""
    spread = "" if record["ffn_experts_std"] is None else f" ± {record['ffn_experts_std']:.2f}"
    aim = "" if run["k_e"] is None else f", K_e {run['k_e']:g}"
    return f"{number(record['ffn_experts'], 3)}{spread} of {run['choices']} a token{aim}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _held_out(record: Record) -> str:
    return f"{number(record['heldout_bits_per_byte'])} bits/byte, loss {number(record['heldout_loss'])}"


def at_step(step: int) -> str:
    """Say when a model had a score: at step 20, or before the first step."""
    return f"at step {step}" if step else "at the start"


def training_line(record: Record, run: Record) -> str:
    """Return one line of a "train" record."""
    return (
        f"step {record['step']} of {run['steps']}: loss {number(record['loss'])}, {number(record['bits_per_byte'])} "
        f"bits/byte, FFN experts {_experts(record, run)}, zero share {_share(record['zero_share'])}, "
        f"learning rate {number(record['learning_rate'], 3)}, {record['tokens_per_s']:,.0f} tokens/s"
    )


def ending(end: Record) -> str:
    """Say how the run ended, and what to do next."""
    text = f"{end['reason']} at step {end['step']} after {span(end['seconds'])}"
    if end["best_step"] is not None:
        text += f", best held-out {number(end['best_heldout_bits_per_byte'])} bits/byte {at_step(end['best_step'])}"
    if end["start_is_best"]:
        text += ": no step made it better, and the export has the weights that the run began with"
    if end["reason"] == "stopped":
        text += "; to go on: the same command with --resume"
    return text if end["export"] is None else f"{text}; to write with it: zemoe generate --model {end['export']}"


# -------------------------------------------------------------------------------------------------------- the three


class JsonView(View):
    """Writes a record a line, as soon as it comes. What JSON can't hold (a loss that is no number) is null."""

    def __init__(self, console: Console) -> None:
        self._file = console.file

    def __call__(self, record: Record) -> None:
        self._file.write(json.dumps(_json(record)) + "\n")
        self._file.flush()


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Clock:
    """Seconds of this process in a run, and how many are left if its steps go on as they did."""

    def __init__(self, run: Record, clock: Callable[[], float]) -> None:
        self._clock, self._begin, self._first, self._steps = clock, clock(), run["step"], run["steps"]
        self._at, self._step = self._begin, self._first

    def reached(self, step: int) -> None:
        self._at, self._step = self._clock(), step

    @property
    def passed(self) -> float:
        return self._clock() - self._begin

    @property
    def left(self) -> float | None:
        if self._step <= self._first:
            return None
        return (self._at - self._begin) * (self._steps - self._first) / (self._step - self._first) - self.passed


class LineView(View):
    """Writes a record a line."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now = console, clock
        self._run: Record = {}

    def __call__(self, record: Record) -> None:
        step = f"step {record['step']}"
        match record["kind"]:
            case "run":
                self._run, self._clock = record, _Clock(record, self._now)
                text = headline(record)
                if record["step"]:
                    text += f"; goes on at step {record['step']} of {record['steps']}"
            case "train":
                self._clock.reached(record["step"])
                left = self._clock.left
                text = training_line(record, self._run) + ("" if left is None else f", {span(left)} left")
            case "eval":
                note = "the best so far" if record["step"] else "the start"
                text = f"{step}: held-out {_held_out(record)}{f' ({note})' if record['best'] else ''}"
            case "saved":
                text = f"{step}: saved {record['path']}"
            case "end":
                text = ending(record)
            case other:
                raise AssertionError(f"a record of kind {other!r}")
        self._console.print(text, markup=False)


class LiveView(View):
    """Draws the same few lines on a terminal anew as the run goes on, and leaves them there at its end."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now, self._ascii = console, clock, console.options.ascii_only
        self._begin = clock()
        self._last: dict[str, Record] = {}  # by kind
        self._bests: list[Record] = []
        self._losses: list[tuple[int, float]] = []  # step, loss
        self._live = Live(console=console, get_renderable=self._frame, refresh_per_second=_FRAMES_PER_SECOND)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.transient = "run" not in self._last  # an error follows, and nothing was shown yet
        self._live.stop()
        if "end" in self._last:
            self._console.print(ending(self._last["end"]), markup=False)

    def __call__(self, record: Record) -> None:
        self._last = self._last | {record["kind"]: record}  # a new dict: another thread draws
        match record["kind"]:
            case "run":
                self._clock = _Clock(record, self._now)
                self._losses = [(step, loss) for step, loss in self._losses if step <= record["step"]]
                self._bests = [best for best in self._bests if best["step"] <= record["step"]]
            case "train":
                self._clock.reached(record["step"])
                self._losses.append((record["step"], record["loss"]))
            case "eval" if record["best"]:
                self._bests.append(record)
        if record["kind"] in ("run", "end"):
            self._live.refresh()

    def remember(self, train: Sequence[Record], evals: Sequence[Record]) -> None:
        self._losses = [(record["step"], record["loss"]) for record in train]
        self._bests = [record for record in evals if record["best"]]

    def _frame(self) -> Group | Text:
        last = self._last
        if "run" not in last:
            return Text(f"reading the text and making the model: {span(self._now() - self._begin)}", style="dim")
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("step", self._progress(last))
        if "train" in last:
            self._add_training(table, last["train"], last["run"])
        if "eval" in last:
            table.add_row("held-out", self._scores(last["eval"]))
        if "saved" in last:
            table.add_row("saved", f"step {last['saved']['step']}")
        return Group(Text(headline(last["run"]), style="dim"), Text(), table)

    def _progress(self, last: dict[str, Record]) -> Text:
        run, end = last["run"], last.get("end")
        step = max(record["step"] for record in last.values())
        steps = max(run["steps"], 1)
        text = Text.assemble(f"{step} of {steps} ", gauge(step, None, steps, self._ascii), f" {step / steps:.0%}, ")
        if end is not None:
            return text.append(f"{end['reason']} after {span(end['seconds'])}")
        left = self._clock.left
        return text.append(f"{span(self._clock.passed)} so far" + ("" if left is None else f", {span(left)} left"))

    def _add_training(self, table: Table, train: Record, run: Record) -> None:
        epochs = train["tokens"] / run["train_tokens"] if run["train_tokens"] else 0
        table.add_row(
            "tokens", f"{train['tokens']:,} ({epochs:.2f} times the text), {train['tokens_per_s']:,.0f} a second"
        )
        spark = sparkline([loss for _, loss in self._losses], _LOSS_CELLS, self._ascii)
        table.add_row(
            "loss",
            Text.assemble(
                f"{number(train['loss'])} ", (spark, BAR_COLOR), f" {number(train['bits_per_byte'])} bits/byte"
            ),
        )
        table.add_row(
            "FFN experts",
            Text.assemble(
                gauge(train["ffn_experts"], run["k_e"], run["choices"], self._ascii), f" {_experts(train, run)}"
            ),
        )
        table.add_row("zero share", f"{_share(train['zero_share'])} of all choices, which cost no FFN expert")
        if train["by_layer"]:
            table.add_row("  by layer", self._layers([layer["zero_share"] for layer in train["by_layer"]]))
        dead = train["dead_experts"]
        load = f"busiest FFN expert {number(train['max_over_mean_load'], 3)} times the mean, "
        table.add_row(
            "load", Text.assemble(load, ("- dead" if dead is None else f"{dead:g} dead", "bold red" if dead else ""))
        )
        table.add_row(
            "optimizer",
            f"learning rate {number(train['learning_rate'], 3)}, gradient norm {number(train['grad_norm'], 3)}, "
            f"balance loss {number(train['balance_loss'], 3)}",
        )

    def _layers(self, shares: list[float | None]) -> Text:
        """Shade each layer by its FFN work: the less of it, the darker."""
        text = Text()
        for share in shares:
            background, ink = SHADES[round((1 - (share or 0)) * (len(SHADES) - 1))]
            cell = "  - " if share is None else f" {100 * share:.0f} "
            text.append(cell if len(shares) <= _BY_LAYER else " ", f"{ink} on {background}")
        known = [share for share in shares if share is not None]
        if len(shares) > _BY_LAYER and known:
            return text.append(f" {_share(min(known))} to {_share(max(known))}")
        return text.append(" %")

    def _scores(self, scored: Record) -> str:
        text = f"{_held_out(scored)} {at_step(scored['step'])}"
        best = self._bests[-1] if self._bests else scored
        if best["step"] != scored["step"]:
            text += f"; best {number(best['heldout_bits_per_byte'])} {at_step(best['step'])}"
        return text
