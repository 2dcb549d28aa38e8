"""The folder of a run, and what is made of its text before the first step."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from transformers import LongcatFlashConfig

from ..machine import total_bytes
from ..regular_files import MOST_JSON_BYTES, check_regular, read_bytes, reason
from . import data, state
from .data import Corpus
from .export import recover
from .model import check_fits, end_of, new_config, read_start, start_folder, wanted_ffn_experts
from .parallel import Ranks
from .settings import Settings, SettingsError
from .state import Reader, StateError


class Files(AbstractContextManager["Files"]):
    """`out` and what is in it. Only the first process writes."""

    def __init__(self, out: Path, *, writes: bool) -> None:
        self.out, self.writes = out, writes
        self.states, self.export = out / "states", out / "export"
        self.tokenizer, self.corpus = out / "tokenizer.json", out / "corpus.safetensors"
        self.metrics = out / "metrics.jsonl"
        self._lock: IO[bytes] | None = None
        self._metrics: IO[bytes] | None = None
        self._told = hashlib.sha256()  # of metrics.jsonl so far

    def __exit__(self, *_: object) -> None:
        if self._lock is not None and [path.name for path in self.out.iterdir()] == ["lock"]:
            (self.out / "lock").unlink()  # what was asked for was refused
            with suppress(OSError):
                self.out.rmdir()
        for file in (self._metrics, self._lock):
            if file is not None:
                file.close()

    def writing(self, what: str) -> AbstractContextManager[None]:
        """Turn a failure to write into a StateError that says what there is to go on from."""
        return state.writing(f"{self.out}: {what}", self.states)

    def last_state(self) -> str:
        return state.last_state(self.states)

    def claim(self) -> None:
        """Hold the folder, which is made where there is none, until this process ends in whatever way.

        Nothing else in it may be written, moved or removed before. The file `lock` stays behind, and means nothing.

        Raises:
            SettingsError: if another process holds it.
        """
        import fcntl

        if not self.writes:
            return
        with self.writing("the file lock"):
            self.out.mkdir(parents=True, exist_ok=True)
            lock = self.out / "lock"
            lock.touch()
            check_regular(lock)  # opening a pipe would wait
            file = lock.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno()))
            except BlockingIOError:
                mine = False
            if not mine:  # or of one that has just left, and removed it
                file.close()
                raise SettingsError(f"run.out: another process is training in {self.out}; choose another folder")
            self._lock = file
            recover(self.export)

    def begin(self, settings: Settings, reader: Reader | None) -> None:
        """Write the settings as they are now, and cut metrics.jsonl after the state that the run goes on from.

        Raises:
            StateError: if metrics.jsonl is not what it was when that state was written; nothing has been changed.
        """
        if not self.writes:
            return
        size = reader.about["metrics_bytes"] if reader is not None else 0
        if reader is not None:
            with suppress(OSError):
                check_regular(self.metrics)
                with self.metrics.open("rb") as file:
                    self._told = hashlib.sha256(file.read(size))
            if self._told.hexdigest() != reader.about["metrics_sha256"]:
                raise StateError(
                    f"{self.metrics}: damaged (its first {size} bytes are not those that were written); put them back, "
                    "or go on from the export in another folder"
                )
        with self.writing("settings.json or metrics.jsonl"):
            self.metrics.touch()
            check_regular(self.metrics)
            self._metrics = self.metrics.open("r+b")
            state.write_json(self.out / "settings.json", state.sealed(settings.as_dict()))
            self._metrics.truncate(size)
            self._metrics.seek(0, 2)

    def write(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        assert self._metrics is not None
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self.writing("metrics.jsonl"):
            self._metrics.write(line)
            self._metrics.flush()
        self._told.update(line)

    def metrics_so_far(self) -> dict[str, Any]:
        """Return for a state how long metrics.jsonl is, with all of it on the disk, and its digest."""
        if self._metrics is None:
            return {}
        with self.writing("metrics.jsonl"):
            state.sync(self.metrics)
        return {"metrics_bytes": self._metrics.tell(), "metrics_sha256": self._told.hexdigest()}


# What a state says beside its tensors. corpus, tokens, tokenizer: digests of text and tokenizer, of the encoded text,
# of tokenizer.json.
_IN_A_STATE = {"settings", "corpus", "tokens", "tokenizer", "metrics_bytes", "metrics_sha256", "progress"}


@dataclass(frozen=True)
class Prepared:
    """config: of the model. ffn_experts: K_e. start: the folder of its first weights, or None. tokenizer: what
    tokenizer.json holds. reader: of the state to go on from.
    """

    config: LongcatFlashConfig
    ffn_experts: float
    start: Path | None
    corpus: Corpus
    tokenizer: bytes
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
    if not reader.about.keys() >= _IN_A_STATE:
        raise StateError(f"{reader.path}: was not written by this version of zemoe train")
    then, now = reader.about["settings"], settings.that_decide()
    if changed := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
        key = changed[0]
        raise SettingsError(
            f"{key} can't be changed by --resume: the run in {files.out} has {then.get(key)!r}, got {now.get(key)!r}; "
            "choose another run.out, perhaps with its export as model.start"
        )
    return reader


def _tokenizer(settings: Settings, start: Path | None, texts: list[str]) -> tuple[Any, bytes]:
    """Return the tokenizer that a run begins with, and its tokenizer.json."""
    named = start / "tokenizer.json" if start is not None else settings.model.tokenizer
    if not named:
        seen = [data.split(text, settings.data.heldout)[0] for text in texts]
        tokenizer = data.train_tokenizer(seen, settings.model.vocab_size)
        return tokenizer, tokenizer.to_str(pretty=True).encode()
    tokenizer = data.load_tokenizer(Path(named))
    try:
        return tokenizer, read_bytes(named, MOST_JSON_BYTES)
    except OSError as error:
        raise SettingsError(f"{named}: not readable as a tokenizer ({reason(error)})") from None


def prepare_run(settings: Settings, processes: Ranks, files: Files, *, resume: bool) -> Prepared:
    """Make all that a model needs to be trained; the first process reads and encodes the text, the others wait.

    Raises:
        SettingsError, StateError: as `zemoe.training.run.train`; what an earlier run left is as it was.
    """
    start = corpus = None
    with processes.together():
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
        texts = data.read_texts(data.text_files(settings.data.paths)) if processes.first else []
        files.claim()
        reader = _go_on_from(files, settings, resume)
        if processes.first:
            corpus = _encode(settings, processes, files, start, config, texts, reader)
    with processes.together():  # what the first process has made is there
        corpus = corpus or data.read_cache(files.corpus)
        if corpus is None:
            raise StateError(f"{files.corpus}: not readable here; run.out must be one folder for all processes")
        config = config or new_config(settings.model, data.load_tokenizer(files.tokenizer), context)
        ffn_experts = wanted_ffn_experts(config, settings.train.ffn_experts)
    with processes.together():
        files.begin(settings, reader)
    return Prepared(config, ffn_experts, start, corpus, files.tokenizer.read_bytes(), reader)


def _encode(
    settings: Settings,
    processes: Ranks,
    files: Files,
    start: Path | None,
    config: LongcatFlashConfig | None,
    texts: list[str],
    reader: Reader | None,
) -> Corpus:
    """The text in tokens, which is written as well, and without a state to go on from (`reader`) a new tokenizer.

    Nothing is written before all is known to fit.
    """
    if reader is None:
        tokenizer, content = _tokenizer(settings, start, texts)
    elif _sha256(files.tokenizer) != reader.about["tokenizer"]:
        raise StateError(
            f"{files.tokenizer}: damaged (its bytes are not those that were written); put it back, as the export has it"
        )
    else:
        tokenizer, content = data.load_tokenizer(files.tokenizer), None
    config = config or new_config(settings.model, tokenizer, settings.data.context)
    check_fits(config)
    wanted_ffn_experts(config, settings.train.ffn_experts)
    if processes.device.type == "cpu":
        _check_memory(settings, config, processes.world)
    heldout, end = settings.data.heldout, end_of(config)
    fingerprint = data.fingerprint_of(texts, tokenizer, heldout, end)
    if reader is not None and fingerprint != reader.about["corpus"]:
        raise SettingsError(f"data.paths: --resume needs the text that the run in {files.out} was begun with")
    known = None
    with suppress(*() if reader is not None else (StateError,)):  # of no run yet: made anew
        known = data.read_cache(files.corpus)
    new = known is None or known.fingerprint != fingerprint
    corpus = data.encode(texts, tokenizer, heldout, end) if known is None or new else known
    if reader is not None and corpus.sha256 != reader.about["tokens"]:
        raise StateError(f"{files.corpus}: damaged (not the tokens of the state); remove it")
    corpus.check(settings.data.context, config.vocab_size)
    with files.writing("the tokenizer or the encoded text"):
        if content is not None:
            state.write_bytes(files.tokenizer, content)
        if new:
            data.write_cache(files.corpus, corpus)
    return corpus


def _check_memory(settings: Settings, config: LongcatFlashConfig, world: int) -> None:
    """Raise SettingsError if not even the logits of a micro-batch fit, which a machine may take minutes to notice."""
    train = settings.train
    needs = train.rows // (train.accumulate * world) * settings.data.context * config.vocab_size * 4
    if (there := total_bytes()) is not None and needs > there:
        raise SettingsError(
            f"train.rows={train.rows} of {settings.data.context} tokens have {needs / 1e9:,.0f} GB of logits, this "
            f"machine has {there / 1e9:,.0f} GB; take fewer, or a larger train.accumulate"
        )


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
