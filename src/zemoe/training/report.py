"""The plots of a training run, from its metrics.jsonl. Needs matplotlib, the extra `report`.

K choices a token, K_e FFN experts a token that the controller steers to.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..regular_files import read_bytes, reason
from .records import whole_record
from .view import at_step, headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
METRICS, PLOTS = "metrics.jsonl", "plots"
_MAIN, _AIM, _OTHER, _QUIET = "#cb4b48", "#555555", "#3b6fb6", "#777777"
_CAPTION_CHARACTERS = 130  # what fits below a plot
_IN_LEGEND = 8  # layers; of more, a colour bar tells which is which


class ReportError(ValueError):
    """A report can't be drawn; the message is one line that says what to do."""


class Metrics(NamedTuple):
    """A run, by kind of record and in the order of steps; unreadable: lines that hold no record."""

    run: Record
    train: list[Record]
    evals: list[Record]
    unreadable: int


def check_matplotlib() -> None:
    """Raise ReportError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise ReportError("plots need matplotlib, which is not installed: pip install 'zemoe[report]'")


def read_metrics(folder: Path) -> Metrics:
    """Return what `folder`/metrics.jsonl holds.

    A process that is killed may leave part of a line; a line that is no whole record is left out and counted. Where a
    run was resumed at an earlier step than it had reached, what it wrote after that step before is left out too.

    Raises:
        ReportError: if there is no such file, or nothing in it to draw.
    """
    path = folder / METRICS
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError as error:
        raise ReportError(f"{path}: {reason(error)}; give the folder that zemoe train wrote") from None
    run: Record | None = None
    train: list[Record] = []
    evals: list[Record] = []
    unreadable = 0
    for line in filter(None, lines):
        record = whole_record(line)
        if record is None:
            unreadable += 1
        elif record["kind"] == "run":
            run = record
            for kept in (train, evals):
                kept[:] = [earlier for earlier in kept if earlier["step"] <= record["step"]]
        elif record["kind"] in ("train", "eval"):
            (train if record["kind"] == "train" else evals).append(record)
    if run is None or not train:
        missing = "no run" if run is None else "no step of training"
        raise ReportError(f"{path}: holds {missing} yet" + (f" ({unreadable} lines unreadable)" if unreadable else ""))
    return Metrics(run, train, evals, unreadable)


# ------------------------------------------------------------------------------------------------------------ drawing


def draw(folder: Path) -> tuple[list[Path], Metrics]:
    """Draw the run in `folder` into `folder`/plots; return the files, and what was drawn.

    Raises:
        ReportError: without matplotlib or metrics.
        OSError: if a file can't be written.
    """
    check_matplotlib()
    metrics = read_metrics(folder)
    plots = folder / PLOTS
    plots.mkdir(exist_ok=True)
    drawn = [plots / f"{name}.png" for name in _PANELS]
    for path, panel in zip(drawn, _PANELS.values(), strict=True):
        with _axes(metrics, path) as axes:
            panel(axes, metrics)
    return drawn, metrics


@contextmanager
def _axes(metrics: Metrics, path: Path) -> Iterator[Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    figure.supxlabel(textwrap.fill(headline(metrics.run), _CAPTION_CHARACTERS), fontsize=6, color=_QUIET)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, format="png")
    part.replace(path)  # whoever looks at the old picture meanwhile sees all of it


def _values(records: list[Record], key: str) -> list[float]:
    """Return the values of a record's key; NaN, which leaves a gap in a line, where a record hasn't got it."""
    return [math.nan if record.get(key) is None else record[key] for record in records]


def _ffn_experts(axes: Axes, metrics: Metrics) -> None:
    steps, means = _values(metrics.train, "step"), _values(metrics.train, "ffn_experts")
    spreads = _values(metrics.train, "ffn_experts_std")
    low, high = ([mean + sign * std for mean, std in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=_MAIN, alpha=0.18, linewidth=0, label="± standard deviation over tokens")
    axes.plot(steps, means, color=_MAIN, label="mean a token")
    if metrics.run["k_e"] is not None:
        axes.axhline(metrics.run["k_e"], color=_AIM, linestyle="--", linewidth=1, label=f"K_e {metrics.run['k_e']:g}")
    axes.set_title(f"FFN experts a token, of {metrics.run['choices']} choices")


def _loss(axes: Axes, metrics: Metrics) -> None:
    steps = _values(metrics.train, "step")
    axes.plot(steps, _values(metrics.train, "bits_per_byte"), color=_MAIN, linewidth=1, label="training")
    if metrics.evals:
        scores = _values(metrics.evals, "heldout_bits_per_byte")
        axes.plot(_values(metrics.evals, "step"), scores, color=_OTHER, marker="o", markersize=3, label="held out")
        finite = [
            (score, record["step"]) for score, record in zip(scores, metrics.evals, strict=True) if math.isfinite(score)
        ]
        for score, step in sorted(finite)[:1]:
            axes.plot(step, score, "o", color=_AIM, markersize=5, label=f"best: {score:.4g} {at_step(int(step))}")
    axes.set_ylabel("bits a byte")
    axes.set_title("loss")


def _zero_share(axes: Axes, metrics: Metrics) -> None:
    steps = _values(metrics.train, "step")
    for look, records in _by_layer(axes, metrics):
        axes.plot(steps, _values(records, "zero_share"), linewidth=1, **look)
    if metrics.run["k_e"] is not None:
        aim = 1 - metrics.run["k_e"] / metrics.run["choices"]
        label = f"{aim:.1%}, with K_e {metrics.run['k_e']:g}"
        axes.axhline(aim, color=_AIM, linestyle="--", linewidth=1, label=label)
    axes.set_title("share of the choices that fall on zero experts")


def _bias(axes: Axes, metrics: Metrics) -> None:
    steps = _values(metrics.train, "step")
    for look, records in _by_layer(axes, metrics):
        low, high = _values(records, "bias_min"), _values(records, "bias_max")
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.08, linewidth=0)
        axes.plot(steps, _values(records, "bias_ffn_mean"), linewidth=1, **look)
        axes.plot(steps, _values(records, "bias_zero_mean"), linewidth=1, linestyle=":", color=look["color"])
    axes.set_title("selection bias: FFN mean (line), zero mean (dots), least to greatest (shade)")


def _by_layer(axes: Axes, metrics: Metrics) -> Iterator[tuple[dict[str, Any], list[Record]]]:
    """Return for each layer how to draw it and its part of every record."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layers = min(len(record["by_layer"]) for record in metrics.train)
    colors = colormaps["plasma"]
    for layer in range(layers):
        look: dict[str, Any] = {"color": colors(0.85 * layer / max(layers - 1, 1))}
        if layers <= _IN_LEGEND:
            look["label"] = f"layer {layer}"
        yield look, [record["by_layer"][layer] for record in metrics.train]
    if layers > _IN_LEGEND:
        scale = ScalarMappable(Normalize(0, (layers - 1) / 0.85), colors)
        axes.figure.colorbar(scale, ax=axes, label="layer", boundaries=range(layers + 1))


_PANELS: dict[str, Callable[[Axes, Metrics], None]] = {
    "ffn_experts": _ffn_experts,
    "loss": _loss,
    "zero_share": _zero_share,
    "bias": _bias,
}
