"""What a training run is asked for: sections of a TOML file, and `section.key=value` on top. Needs no torch.

K choices, E FFN experts, Z zero experts.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..regular_files import read_bytes, reason

_MOST_BYTES = 2**20  # of a TOML file
# What a whole number, and any other one, may be at most: beyond, what is computed of two of them (a seed for each step
# and process, tokens in a step, what a weight loses in a step) does not fit into 64 bits or into float32.
_LARGEST_INT, _LARGEST = 2**31 - 1, 1e30
_LARGEST_FACTOR = 1e6  # of weight decay, balance and routing
PARALLEL = ("ddp", "fsdp")
DTYPES = ("auto", "float32", "bfloat16")
EXPORT_DTYPES = ("float32", "bfloat16")
LAYOUTS = ("original", "transformers")


class SettingsError(ValueError):
    """A file or a value that can't be used; the message says which key, what it got and what it needs."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What is trained. start: a checkpoint folder, which brings sizes, tokenizer and weights; else a new model.

    "models/tiny" is the embedded model unless there is a folder of that name. The sizes are those of transformers'
    LongcatFlashConfig. tokenizer: a tokenizer.json; none trains one of at most `vocab_size` tokens on the data.
    """

    start: str = ""
    tokenizer: str = ""
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4
    num_attention_heads: int = 2
    ffn_hidden_size: int = 128
    expert_ffn_hidden_size: int = 128
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    n_routed_experts: int = 16
    zero_expert_num: int = 8
    moe_topk: int = 6
    routed_scaling_factor: float = 6.0


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """paths: text files, and folders of *.txt. heldout: the end of each text, a share of its length.

    heldout_tokens: score at most so many of them, in windows spread over all. context: tokens of a row.
    """

    paths: tuple[str, ...] = ()
    heldout: float = 0.05
    heldout_tokens: int = 200_000
    context: int = 256


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How it is trained.

    rows: of `context` tokens in a step, over all processes and micro-batches; accumulate: micro-batches a step.
    ffn_experts: K_e, FFN experts a token wanted, 0 for two thirds of K. balance: coefficient of the balance loss.
    bias_rate: the share of the way to K_e that a step moves the selection bias, 0 to 1 (`BudgetController`).
    dtype: what products are computed in, "auto" is bfloat16 on a GPU; weights are float32. checkpoint_activations:
    compute layers again in backward.
    """

    steps: int = 1000
    rows: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 50
    final_rate: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    ffn_experts: float = 0.0
    balance: float = 1e-3
    bias_rate: float = 0.5
    seed: int = 0
    dtype: str = "auto"
    checkpoint_activations: bool = False


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where and how often. keep: states to keep. parallel: how torchrun's processes share a model, "ddp" or "fsdp".

    layout: of the export, "original" as the models are published and engines read them, or "transformers" for plain
    transformers; zemoe reads both. export_dtype: of its weights; the router's stay float32.
    """

    out: str = "runs/zemoe"
    device: str = "auto"
    parallel: str = "ddp"
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    keep: int = 2
    layout: str = "original"
    export_dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """plots: draw them at the end; needs the extra `report`."""

    plots: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of it, checked: SettingsError naming the key for a value out of range."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    run: RunSettings = field(default_factory=RunSettings)
    report: ReportSettings = field(default_factory=ReportSettings)

    def __post_init__(self) -> None:
        data, train, run = self.data, self.train, self.run
        least = {"data.context": 2, "train.warmup": 0, "train.seed": 0, "model.zero_expert_num": 0}
        for section in (ModelSettings, DataSettings, TrainSettings, RunSettings):
            name = section.__name__.removesuffix("Settings").lower()
            for key in (f"{name}.{f.name}" for f in fields(section) if f.type == "int"):
                _between(key, self.get(key), least.get(key, 1), _LARGEST_INT)
        for key in ("train.weight_decay", "train.balance", "train.ffn_experts"):
            _between(key, self.get(key), 0, _LARGEST_FACTOR)
        for key, most in {
            "train.learning_rate": _LARGEST,
            "train.clip": _LARGEST,
            "model.routed_scaling_factor": _LARGEST_FACTOR,
        }.items():
            _require(self.get(key) > 0, key, "above 0", self.get(key))
            _between(key, self.get(key), 0, most)
        tokens = train.rows * data.context
        _require(tokens <= _LARGEST_INT, "train.rows times data.context", f"at most {_LARGEST_INT}", tokens)
        _require(train.rows % train.accumulate == 0, "train.rows", f"a multiple of {train.accumulate=}", train.rows)
        for key in ("train.final_rate", "train.bias_rate"):
            _require(0 <= self.get(key) <= 1, key, "between 0 and 1", self.get(key))
        _require(0 < data.heldout < 1, "data.heldout", "between 0 and 1", data.heldout)
        _require(bool(data.paths), "data.paths", "at least one text file or folder (--data)", [])
        choices = {"train.dtype": DTYPES, "run.parallel": PARALLEL, "run.layout": LAYOUTS}
        choices["run.export_dtype"] = EXPORT_DTYPES
        for key, allowed in choices.items():
            _require(self.get(key) in allowed, key, f"one of {', '.join(allowed)}", self.get(key))
        _require(bool(run.out.strip()), "run.out", "a folder", run.out)
        if self.model.start:
            for f in fields(ModelSettings):
                if f.name != "start" and getattr(self.model, f.name) != f.default:
                    raise SettingsError(f"model.{f.name} can't be set beside model.start, which brings its own")

    def get(self, key: str) -> Any:
        """Return the value called "section.key"."""
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return sections of plain values, as JSON and TOML have them; `make` takes them back."""
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
            for name, section in asdict(self).items()
        }

    def that_decide(self) -> dict[str, Any]:
        """Return by "section.key" what a run that is resumed must have in common with the one before.

        Not: where, how often and on how many devices; how a step is cut up; where the text lies (what it says is
        compared by itself).
        """
        free = ("data.paths", "train.accumulate", "train.checkpoint_activations")
        named = {f"{name}.{key}": value for name, section in self.as_dict().items() for key, value in section.items()}
        return {
            key: value for key, value in named.items() if not key.startswith(("run.", "report.")) and key not in free
        }


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in fields(Settings)}


def _require(holds: bool, key: str, needs: str, got: object) -> None:
    if not holds:
        raise SettingsError(f"{key} must be {needs}, got {_shown(got)}")


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # a whole number with more digits than Python writes
        return "a longer number"


def _between(key: str, value: float, least: float, most: float) -> None:
    _require(value >= least, key, f"at least {least}", value)
    _require(value <= most, key, f"at most {most:.10g}", value)


def _typed(key: str, value: Any, kind: str) -> Any:
    """Return `value` as a field of the annotated `kind` takes it."""
    if kind == "tuple[str, ...]":
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and all(isinstance(item, str) and item for item in value):
            return tuple(value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if type(value).__name__ != kind:
        wanted = {"str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false"}
        raise SettingsError(f"{key} must be {wanted.get(kind, 'a list of strings')}, got {_shown(value)}")
    return value


def make(tables: dict[str, Any], source: str) -> Settings:
    """Make Settings from sections of plain values, every key and type checked; source: what errors call them."""
    made: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in SECTIONS:
            raise SettingsError(f"{source}: unknown section [{name}]; there are {', '.join(SECTIONS)}")
        if not isinstance(table, dict):
            raise SettingsError(f"{source}: {name} must be a section, got {table!r}")
        kinds = {f.name: str(f.type) for f in fields(SECTIONS[name])}
        if unknown := sorted(table.keys() - kinds):
            raise SettingsError(f"{source}: unknown key {name}.{unknown[0]}; there are {', '.join(kinds)}")
        values = {key: _typed(f"{name}.{key}", value, kinds[key]) for key, value in table.items()}
        made[name] = SECTIONS[name](**values)
    return Settings(**made)


def _override(text: str) -> tuple[str, str, Any]:
    """Return section, key and value of "train.steps=200"; what is no TOML value is a string without quotes."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise SettingsError(f"--set must look like train.steps=200, got {text!r}")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):  # ValueError: TOMLDecodeError, and a number of too many digits
        return section, key, value.strip()
    return section, key, parsed["value"] if len(parsed) == 1 else value


def read(path: Path | None, overrides: Iterable[str] = (), given: dict[str, dict[str, Any]] | None = None) -> Settings:
    """Read settings from a TOML file (None: the defaults), then `overrides`, "section.key=value" in TOML, then `given`.

    Raises:
        SettingsError: for a file or a value that can't be used.
    """
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(read_bytes(path, _MOST_BYTES).decode())
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, no TOML, a number of too many digits
            raise SettingsError(f"{path}: not readable as TOML ({reason(error)})") from None
        except RecursionError:
            raise SettingsError(f"{path}: not readable as TOML (it is nested too deep)") from None
    changes = [*map(_override, overrides)]
    changes += [(name, key, value) for name, table in (given or {}).items() for key, value in table.items()]
    for name, key, value in changes:
        table = tables.setdefault(name, {})
        if not isinstance(table, dict):
            raise SettingsError(f"{path}: {name} must be a section, got {table!r}")
        table[key] = value
    return make(tables, str(path) if path is not None else "settings")
