"""The folder of a run, and what is made of its text before the first step."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from transformers import LongcatFlashConfig

from ..regular_files import MOST_JSON_BYTES, read_bytes, reason
from . import data, state
from .data import END_OF_TEXT, Corpus
from .export import recover
from .model import end_of, new_config, read_start, start_folder, wanted_ffn_experts
from .parallel import Ranks
from .settings import Settings, SettingsError
from .state import Reader, StateError


class Files(AbstractContextManager["Files"]):
    """`out` and what is in it. Only the first process writes."""

    def __init__(self, out: Path, *, writes: bool) -> None:
        self.out, self.writes = out, writes
        self.states, self.export = out / "states", out / "export"
        self.tokenizer, self.corpus = out / "tokenizer.json", out / "corpus.safetensors"
        self._metrics: IO[bytes] | None = None

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def writing(self, what: str) -> AbstractContextManager[None]:
        """A failure to write becomes a StateError that says what there is to go on from."""
        return state.writing(f"{self.out}: {what}", self.states)

    def last_state(self) -> str:
        return state.last_state(self.states)

    def begin(self, settings: Settings, metrics_bytes: int) -> None:
        """Settings as they are now, and metrics.jsonl without what a run wrote after the state that it goes on from."""
        if self.writes:
            with self.writing("settings.json or metrics.jsonl"):
                path = self.out / "metrics.jsonl"
                path.touch()
                self._metrics = path.open("r+b")
                self._claim(self._metrics)
                recover(self.export)
                state.write_json(self.out / "settings.json", settings.as_dict())
                self._metrics.truncate(min(metrics_bytes, path.stat().st_size))
                self._metrics.seek(0, 2)

    def _claim(self, metrics: IO[bytes]) -> None:
        """Hold the folder until this process ends, however it does; SettingsError if another one holds it."""
        import fcntl

        try:
            fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"run.out: another process is training in {self.out}; choose another folder") from None

    def write(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        assert self._metrics is not None
        with self.writing("metrics.jsonl"):
            self._metrics.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._metrics.flush()

    def metrics_bytes(self) -> int:
        """How long metrics.jsonl is, all of it on the disk."""
        if self._metrics is None:
            return 0
        with self.writing("metrics.jsonl"):
            state.sync(self.out / "metrics.jsonl")
        return self._metrics.tell()


@dataclass(frozen=True)
class Prepared:
    """config: of the model. ffn_experts: K_e. start: the folder of its first weights, or None. reader: of the state to
    go on from.
    """

    config: LongcatFlashConfig
    ffn_experts: float
    start: Path | None
    corpus: Corpus
    reader: Reader | None


def _go_on_from(files: Files, settings: Settings, resume: bool) -> Reader | None:
    kept = state.steps(files.states)
    if not resume and (kept or files.export.exists()):
        found = f"a state of step {kept[-1]}" if kept else "an export"
        raise SettingsError(
            f"run.out: {files.out} holds a run already ({found}); go on with --resume, or choose another folder"
        )
    if not (resume and kept):
        return None
    reader = Reader(files.states)
    if not reader.about.keys() >= {"settings", "corpus", "metrics_bytes", "progress"}:
        raise StateError(f"{reader.path}: was not written by this version of zemoe train")
    then, now = reader.about["settings"], settings.that_decide()
    if changed := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
        key = changed[0]
        raise SettingsError(
            f"{key} can't be changed by --resume: the run in {files.out} has {then.get(key)!r}, got {now.get(key)!r}; "
            "choose another run.out, perhaps with its export as model.start"
        )
    return reader


def _tokenizer_json(settings: Settings, start: Path | None, texts: list[str]) -> bytes:
    named = start / "tokenizer.json" if start is not None else settings.model.tokenizer
    if not named:
        seen = [data.split(text, settings.data.heldout)[0] for text in texts]
        return data.train_tokenizer(seen, settings.model.vocab_size).to_str(pretty=True).encode()
    try:
        return read_bytes(named, MOST_JSON_BYTES)
    except OSError as error:
        raise SettingsError(f"{named}: not readable as a tokenizer ({reason(error)})") from None


def prepare(settings: Settings, processes: Ranks, files: Files, *, resume: bool) -> Prepared:
    """Everything that a model needs to be trained; the first process reads and encodes the text, the others wait.

    Raises:
        SettingsError, StateError: as `zemoe.training.run.train`; what an earlier run left is as it was.
    """
    start = corpus = None
    with processes.together():
        reader = _go_on_from(files, settings, resume)
        start = start_folder(settings.model.start) if settings.model.start else None
        config = read_start(start) if start is not None else None
        context, parts = settings.data.context, settings.train.accumulate * processes.world
        if settings.train.rows % parts:
            raise SettingsError(
                f"train.rows must be a multiple of train.accumulate={settings.train.accumulate} times "
                f"{processes.world} processes, got {settings.train.rows}"
            )
        if config is not None and context > config.max_position_embeddings:
            most = config.max_position_embeddings
            raise SettingsError(f"data.context must be at most the model's {most}, got {context}")
        if processes.first:
            corpus = _encoded(settings, files, start, config, anew=reader is None)
    with processes.together():  # what the first process has made is there
        corpus = corpus or data.read_cache(files.corpus)
        if corpus is None:
            raise StateError(f"{files.corpus}: not readable here; run.out must be one folder for all processes")
        if reader is not None and corpus.fingerprint != reader.about["corpus"]:
            raise SettingsError(f"data.paths: --resume needs the text that the run in {files.out} was begun with")
        config = config or new_config(settings.model, data.load_tokenizer(files.tokenizer), context)
        ffn_experts = wanted_ffn_experts(config, settings.train.ffn_experts)
        corpus.check(context, config.vocab_size)
    with processes.together():
        files.begin(settings, reader.about["metrics_bytes"] if reader is not None else 0)
    return Prepared(config, ffn_experts, start, corpus, reader)


def _encoded(
    settings: Settings, files: Files, start: Path | None, config: LongcatFlashConfig | None, *, anew: bool
) -> Corpus:
    """The text in tokens, which is written as well, and a tokenizer beside it if there is none or `anew`."""
    texts = data.read_texts(data.text_files(settings.data.paths))
    with files.writing("the tokenizer or the encoded text"):
        files.out.mkdir(parents=True, exist_ok=True)
        if anew or not files.tokenizer.exists():
            state.write_bytes(files.tokenizer, _tokenizer_json(settings, start, texts))
        tokenizer = data.load_tokenizer(files.tokenizer)
        end = tokenizer.token_to_id(END_OF_TEXT) if config is None else end_of(config)
        return data.encode(texts, tokenizer, settings.data.heldout, end, files.corpus)
