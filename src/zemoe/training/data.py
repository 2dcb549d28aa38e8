"""Text files to rows of tokens, in an order that depends on the seed and the step alone.

L tokens of context, R rows.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.tokenizer import TokenizerError, guarded, read_tokenizer
from ..regular_files import check_regular, kind_of, reason
from .settings import SettingsError
from .state import StateError

IGNORE = -100  # a target that is not scored
END_OF_TEXT = "<|endoftext|>"
# Words of the tokenizer that is trained: training takes the square of the longest one's length, and this is longer than
# those of prose.
_LONG_WORDS = r"\S{64}|\s{64}"
_MUCH = 2_000_000  # bytes of text
# Characters in a piece that is encoded by itself, and pieces that are encoded at once, in threads: the tokenizer's own
# records of them are far larger than the text.
_PIECE, _AT_ONCE = 250_000, 8


def text_files(paths: tuple[str, ...]) -> list[Path]:
    """Return the files that `paths` name, each once: in the order named, a folder's *.txt by name.

    Raises:
        SettingsError: for a path that isn't there, or a folder without text.
    """
    found: dict[Path, None] = {}
    for name in paths:
        path = Path(name)
        kind = kind_of(path)
        if kind == "a folder":
            inside = sorted(file for file in path.rglob("*.txt") if file.is_file())
            if not inside:
                raise SettingsError(f"data.paths: no *.txt in the folder {path}")
            found.update(dict.fromkeys(inside))
        elif kind == "a file":
            found[path] = None
        elif kind == "nothing":
            raise SettingsError(f"data.paths: {path} does not exist")
        else:
            raise SettingsError(f"data.paths: {path} must be a text file or a folder, found {kind}")
    return list(found)


def read_texts(files: list[Path]) -> list[str]:
    """Return their contents. Raises SettingsError for one that is no UTF-8 text, or if there is no text at all."""
    texts = []
    for path in files:
        try:
            check_regular(path)
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"data.paths: {path} is not readable as UTF-8 text ({reason(error)})") from None
    if not any(text.strip() for text in texts):
        raise SettingsError(f"data.paths: no text in {', '.join(map(str, files[:3]))}")
    return texts


def split(text: str, heldout: float) -> tuple[str, str]:
    """Cut a text into all but about its last `heldout`, and the rest; between lines or words where any are near."""
    at = round(len(text) * (1 - heldout))
    for mark in ("\n", " "):
        found = text.find(mark, at, at + min(1000, (len(text) - at) // 2))
        if found >= 0:
            at = found + 1
            break
    return text[:at], text[at:]


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """Train a byte-level BPE of at most `vocab_size` tokens; id 0 ends a text, and no text encodes to it.

    A signal does not have to wait until it is done.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_LONG_WORDS), "isolated")
    into_words = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.pre_tokenizer = into_words  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.encode_special_tokens = True
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise SettingsError(f"model.vocab_size must be at least {len(alphabet) + 1}, got {vocab_size}")
    size = count_bytes(texts)
    # No text has more merges than characters, and the library sets memory aside for as many as it is told.
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, len(alphabet) + 1 + size),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    _say("training a tokenizer on", size)
    _in_a_thread(lambda: tokenizer.train_from_iterator(texts, trainer))
    return tokenizer


def count_bytes(texts: list[str]) -> int:
    """Return the number of bytes of the texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def _say(what: str, size: int) -> None:
    """Write to the log what takes more than a moment."""
    if size > _MUCH:
        logging.getLogger("zemoe").info(f"{what} {size / 1e6:.0f} MB of text")


def _in_a_thread(work: Callable[[], object]) -> None:
    """Call `work` in a thread: Python takes signals in the main one alone, and there between two calls."""
    failed: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]


def load_tokenizer(path: Path) -> Any:
    """Load a tokenizer.json, without truncation or padding. Raises SettingsError for anything else."""
    try:
        return read_tokenizer(path)
    except TokenizerError as error:
        raise SettingsError(str(error)) from None


@dataclass(frozen=True)
class Corpus:
    """train, heldout: token streams, int32. *_bytes: of the texts that they came from. fingerprint: of the texts and
    the tokenizer.
    """

    train: Tensor
    heldout: Tensor
    train_bytes: int
    heldout_bytes: int
    fingerprint: str

    @cached_property
    def sha256(self) -> str:
        """Return the digest of all of it, tokens included."""
        sizes = [self.fingerprint, len(self.train), len(self.heldout), self.train_bytes, self.heldout_bytes]
        digest = hashlib.sha256(json.dumps(sizes).encode())
        for tokens in (self.train, self.heldout):
            digest.update((ctypes.c_char * tokens.nbytes).from_address(tokens.data_ptr()))
        return digest.hexdigest()

    @property
    def train_tokens_per_byte(self) -> float:
        return len(self.train) / max(self.train_bytes, 1)

    @property
    def heldout_tokens_per_byte(self) -> float:
        return len(self.heldout) / max(self.heldout_bytes, 1)

    def check(self, context: int, vocab_size: int) -> None:
        """Raise SettingsError if there is no row to train on, no token to score, or no row of the model for some id."""
        if (len(self.train) - 1) // context < 2:
            raise SettingsError(
                f"data.context={context} needs at least {2 * context + 1} tokens of training text, got "
                f"{len(self.train)}; give more text or a shorter context"
            )
        if len(self.heldout) < 2:
            raise SettingsError("data.heldout: nothing is held out; give more text or hold out more of it")
        if (most := int(max(self.train.max(), self.heldout.max()))) >= vocab_size:
            raise SettingsError(f"the tokenizer has ids up to {most}, the model only {vocab_size} tokens")

    def heldout_batches(
        self, rows: int, context: int, most: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return inputs and targets [R, L] of windows that lie beside each other, as many batches for each rank.

        Of about `most` tokens: if there are more, windows are left out evenly. What fills the last ones is IGNOREd.
        """
        targets = self.heldout[1:].long()
        every = -(-len(targets) // context)
        windows = min(every, max(1, most // context))
        filled = -(-windows // (rows * world)) * rows * world
        chosen = torch.arange(windows) * every // windows
        inputs_RL = torch.zeros(filled, context, dtype=torch.int64)
        targets_RL = torch.full((filled, context), IGNORE)
        for source, into, fill in ((self.heldout[:-1].long(), inputs_RL, 0), (targets, targets_RL, IGNORE)):
            padded = torch.full((every * context,), fill)
            padded[: len(source)] = source
            into[:windows] = padded.view(every, context)[chosen]
        batches = zip(inputs_RL.split(rows), targets_RL.split(rows), strict=True)
        yield from (batch for i, batch in enumerate(batches) if i % world == rank)


class Rows:
    """The rows of all epochs, one after the other.

    An epoch has every token of the text but for less than two rows once as a target. Where its rows begin and in which
    order they come is drawn anew for each.
    """

    def __init__(self, tokens: Tensor, context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.an_epoch = (len(tokens) - 1) // context - 1  # as many whatever the first begins with
        self._epoch, self._starts = -1, torch.empty(0, dtype=torch.int64)

    def _starts_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            cut = int(torch.randint(self.context, (1,), generator=generator))
            order = torch.randperm(self.an_epoch, generator=generator)
            self._epoch, self._starts = epoch, cut + order * self.context
        return self._starts

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets [count, L] of the rows first, first + 1, ..."""
        starts = []
        for epoch in range(first // self.an_epoch, (first + count - 1) // self.an_epoch + 1):
            begin = epoch * self.an_epoch
            starts.append(self._starts_of(epoch)[max(first - begin, 0) : max(first + count - begin, 0)])
        at_RL = torch.cat(starts)[:, None] + torch.arange(self.context)
        return self.tokens[at_RL].long(), self.tokens[at_RL + 1].long()


def _pieces(text: str) -> Iterator[str]:
    """Yield pieces of _PIECE to twice as many characters, which end with a line or before a space if they can."""
    begin = 0
    while begin < len(text):
        least, most = begin + _PIECE, begin + 2 * _PIECE
        end = text.find("\n", least, most) + 1 or text.find(" ", least, most)
        end = end if end > 0 else most
        yield text[begin:end]
        begin = end


def _encoded(tokenizer: Any, text: str, end: int | None) -> Iterator[Tensor]:
    pieces = list(_pieces(text))
    for first in range(0, len(pieces), _AT_ONCE):
        try:
            with guarded("tokenizer.json"):
                batch = tokenizer.encode_batch(pieces[first : first + _AT_ONCE], add_special_tokens=False)
        except TokenizerError as error:
            raise SettingsError(str(error)) from None
        for encoded in batch:
            yield torch.tensor(encoded.ids, dtype=torch.int32)
    if end is not None and text:
        yield torch.tensor([end], dtype=torch.int32)


def fingerprint_of(texts: list[str], tokenizer: Any, heldout: float, end: int | None) -> str:
    """Return a digest of these: what `encode` makes depends on them alone."""
    digest = hashlib.sha256(f"{heldout} {end} {tokenizer.to_str()}".encode())
    for text in texts:
        encoded = text.encode()
        digest.update(f" {len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()


def read_cache(cache: Path) -> Corpus | None:
    """Return the corpus that `write_cache` wrote; None if there is none.

    Raises:
        StateError: if that is not what it wrote.
    """
    if not cache.is_file():
        return None
    try:
        with safe_open(cache, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            train_bytes, heldout_bytes = about["bytes"]
            train, heldout = file.get_tensor("train"), file.get_tensor("heldout")
        if any(tokens.dtype != torch.int32 or tokens.dim() != 1 for tokens in (train, heldout)):
            raise ValueError("tokens must be int32")
        corpus = Corpus(train, heldout, train_bytes, heldout_bytes, about["fingerprint"])
        if corpus.sha256 != about["sha256"]:
            raise ValueError("its content is not what was written")
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"no {error} in it" if isinstance(error, LookupError) else str(error)
        raise StateError(f"{cache}: damaged ({why}); remove it, and --resume makes it anew from the text") from None
    return corpus


def encode(texts: list[str], tokenizer: Any, heldout: float, end: int | None) -> Corpus:
    """Make the corpus of the texts. end: the id after every text, or None."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    sizes = [0, 0]
    _say("encoding", count_bytes(texts))
    for text in texts:
        for i, part in enumerate(split(text, heldout)):
            parts[i].extend(_encoded(tokenizer, part, end))
            sizes[i] += len(part.encode())
    train, held = (torch.cat([torch.empty(0, dtype=torch.int32), *part]) for part in parts)
    return Corpus(train, held, sizes[0], sizes[1], fingerprint_of(texts, tokenizer, heldout, end))


def write_cache(cache: Path, corpus: Corpus) -> None:
    """Write the corpus for `read_cache`, completely or not at all."""
    sizes = [corpus.train_bytes, corpus.heldout_bytes]
    about = {"fingerprint": corpus.fingerprint, "bytes": sizes, "sha256": corpus.sha256}
    unfinished = cache.with_name(f".{cache.name}.part")
    try:
        save_file({"train": corpus.train, "heldout": corpus.heldout}, unfinished, {"about": json.dumps(about)})
        unfinished.replace(cache)
    except (OSError, SafetensorError):
        unfinished.unlink(missing_ok=True)
        raise
