"""Text to rows: what is read, what is held out, and that every token comes once an epoch in an order of its own."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.corpus_files import rewrite
from helpers.tiny_checkpoint import byte_tokenizer
from zemoe.training import data
from zemoe.training.data import (
    IGNORE,
    Corpus,
    Rows,
    encode,
    fingerprint_of,
    read_cache,
    read_texts,
    split,
    text_files,
    train_tokenizer,
    write_cache,
)
from zemoe.training.settings import SettingsError
from zemoe.training.state import StateError


def corpus(train: int, heldout: int = 10) -> Corpus:
    tokens = torch.arange(train + heldout, dtype=torch.int32)
    return Corpus(tokens[:train], tokens[train:], 2 * train, 3 * heldout, "")


def test_files_and_folders(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "folder.txt").mkdir()
    for name in ("a.md", "b/z.txt", "b/c/y.txt", "b/no.md"):
        (tmp_path / name).write_text("text")
    names = (str(tmp_path / "a.md"), str(tmp_path / "b"), str(tmp_path / "b" / "z.txt"))
    assert text_files(names) == [tmp_path / "a.md", tmp_path / "b" / "c" / "y.txt", tmp_path / "b" / "z.txt"]
    with pytest.raises(SettingsError, match=r"none does not exist"):
        text_files((str(tmp_path / "none"),))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"no \*\.txt in the folder"):
        text_files((str(tmp_path / "empty"),))


def test_texts_that_are_none(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"bad\.txt is not readable as UTF-8 text"):
        read_texts([tmp_path / "bad.txt"])
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(SettingsError, match="no text in"):
        read_texts([tmp_path / "blank.txt"])


@pytest.mark.parametrize(
    ("text", "begin", "rest"),
    [
        ("ab\n" * 100, "ab\n" * 91, "ab\n" * 9),  # after the line that 90 % of the text end in
        ("word " * 99 + "word\n", "word " * 91, "word " * 8 + "word\n"),  # the last newline leaves nothing behind it
        ("x" * 100, "x" * 90, "x" * 10),
        ("", "", ""),
    ],
)
def test_split(text, begin, rest):
    assert split(text, 0.1) == (begin, rest)


def test_tokenizer_knows_all_bytes_and_its_size():
    tokenizer = train_tokenizer(["the sea and the shore and the sea"] * 5, 262)
    assert tokenizer.get_vocab_size() <= 262 and tokenizer.token_to_id(data.END_OF_TEXT) == 0
    text = "ätsch \N{OCTOPUS}\n\x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    with pytest.raises(SettingsError, match=r"model\.vocab_size must be at least 257, got 256"):
        train_tokenizer(["text"], 256)


@pytest.mark.parametrize(
    "text", ["x" * 50_000, " " * 50_000, "é海" * 20_000, "\n \t" * 9000, "word" * 20 + " of prose"]
)
def test_words_without_an_end_are_cut(text):
    """Training takes the square of the longest word; what is cut comes back whole."""
    tokenizer = train_tokenizer([text], 400)
    assert max(len(tokenizer.decode([i])) for i in range(1, tokenizer.get_vocab_size())) <= 64
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


MARK = "It ends with <|endoftext|> and not before."


def test_an_end_mark_in_a_text_is_text(tmp_path):
    """In a tokenizer that is trained and in one that is read, of which text is the only thing that is encoded."""
    byte_tokenizer().save(str(tmp_path / "theirs.json"))  # has style tokens too
    train_tokenizer(["the sea"], 300).save(str(tmp_path / "ours.json"))
    for tokenizer in (train_tokenizer([MARK], 300), *map(data.load_tokenizer, sorted(tmp_path.iterdir()))):
        for text in (MARK, "<|austen|> in it"):
            *ids, end = torch.cat(list(data._encoded(tokenizer, text, 0))).tolist()
            assert end == 0 and not {tokenizer.token_to_id(mark) for mark in ("<|endoftext|>", "<|austen|>")} & set(ids)
            assert tokenizer.decode(ids) == text


def test_what_is_done_in_a_thread_fails_here():
    with pytest.raises(ZeroDivisionError):
        data._in_a_thread(lambda: 1 // 0)


def test_a_text_without_lines_is_encoded_in_pieces(monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 30)
    for text, ends in (("sea " * 100, "a"), ("x" * 1000, "x"), ("the sea\n" * 100, "\n")):
        pieces = list(data._pieces(text))
        assert "".join(pieces) == text and all(30 <= len(piece) <= 60 for piece in pieces[:-1])
        assert all(piece.endswith(ends) for piece in pieces[:-1])


def test_load_tokenizer(tmp_path):
    byte_tokenizer().save(str(tmp_path / "good.json"))
    text = "the morning"
    assert data.load_tokenizer(tmp_path / "good.json").encode(text).ids == byte_tokenizer().encode(text).ids
    for name, content in {"a.json": "{", "b.json": "[]", "c.json": '{"model": {"type": "none"}}'}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(SettingsError, match=rf"{name}: (not readable as|does not work as|is not) a tokenizer"):
            data.load_tokenizer(tmp_path / name)
    with pytest.raises(SettingsError, match="not readable as a tokenizer"):
        data.load_tokenizer(tmp_path / "none.json")


def test_a_tokenizer_with_dropout_gives_the_same_ids_each_time(tmp_path):
    stored = json.loads(byte_tokenizer().to_str())
    stored["model"]["dropout"] = 0.5
    (tmp_path / "t.json").write_text(json.dumps(stored))
    tokenizer, text = data.load_tokenizer(tmp_path / "t.json"), "the morning and the evening and the sea"
    for _ in range(5):
        assert tokenizer.encode(text).ids == byte_tokenizer().encode(text).ids


def test_two_tokens_with_one_id_are_refused(tmp_path):
    """Else what the id decodes to is another text in each process."""
    stored = json.loads(byte_tokenizer().to_str())
    first, second = list(stored["model"]["vocab"])[-2:]
    stored["model"]["vocab"][second] = same = stored["model"]["vocab"][first]
    (tmp_path / "t.json").write_text(json.dumps(stored))
    words = re.escape(f"t.json: the tokens {first!r} and {second!r} have the same id, {same}")
    with pytest.raises(SettingsError, match=words):
        data.load_tokenizer(tmp_path / "t.json")


def test_pieces_change_nothing_but_their_ends(monkeypatch):
    tokenizer = byte_tokenizer()
    text = "the morning\nand the sea\n\nand the evening\n" * 7 + "the end"
    whole = torch.cat(list(data._encoded(tokenizer, text, 0))).tolist()
    monkeypatch.setattr(data, "_PIECE", 30)
    monkeypatch.setattr(data, "_AT_ONCE", 2)
    assert all(piece.endswith(("\n", "the end")) for piece in data._pieces(text))
    assert len(list(data._pieces(text))) > 5 and "".join(data._pieces(text)) == text
    assert torch.cat(list(data._encoded(tokenizer, text, 0))).tolist() == whole  # lines are apart in this tokenizer
    assert whole[-1] == 0 and tokenizer.decode(whole[:-1], skip_special_tokens=False) == text


def test_encode_and_its_cache(tmp_path):
    tokenizer, cache = byte_tokenizer(), tmp_path / "corpus.safetensors"
    texts = ["the sea\n" * 50, "x", ""]
    assert read_cache(cache) is None
    first = encode(texts, tokenizer, 0.1, 0)
    write_cache(cache, first)
    assert tokenizer.decode(first.train.tolist()) == "the sea\n" * 46 + "x"
    assert tokenizer.decode(first.heldout.tolist()) == "the sea\n" * 4
    assert (first.train_bytes, first.heldout_bytes) == (46 * 8 + 1, 4 * 8)
    assert (first.train == 0).sum() == 2 and (first.heldout == 0).sum() == 1 and first.train.dtype == torch.int32
    assert first.heldout_tokens_per_byte == len(first.heldout) / 32

    again = read_cache(cache)
    assert torch.equal(again.train, first.train) and torch.equal(again.heldout, first.heldout)
    assert (again.train_bytes, again.heldout_bytes) == (369, 32)
    assert again.fingerprint == first.fingerprint == fingerprint_of(texts, tokenizer, 0.1, 0)
    assert again.sha256 == first.sha256

    for changed in ((["the sea\n" * 51, "x", ""], tokenizer, 0.1, 0), (texts, tokenizer, 0.2, 0)):
        assert fingerprint_of(*changed) != first.fingerprint
    assert encode(texts, tokenizer, 0.1, None).train.min() > 0
    assert fingerprint_of(texts, train_tokenizer(texts, 300), 0.1, 0) != first.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.safetensors"]
    empty = encode(["", "x"], tokenizer, 0.5, None)
    write_cache(cache, empty)
    assert len(empty.train) == 0 and read_cache(cache).sha256 == empty.sha256


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "nothing": lambda path: path.write_bytes(b""),
    "a bit of the last token": lambda path: path.write_bytes(path.read_bytes()[:-4] + b"\7\0\0\0"),
    "tokens XOR 1": lambda path: rewrite(path, lambda tokens: tokens ^ 1),
    "all zero": lambda path: rewrite(path, torch.zeros_like),
    "a token of -5": lambda path: rewrite(path, lambda tokens: tokens.clone().index_fill_(0, torch.tensor(3), -5)),
    "tokens that moved": lambda path: rewrite(path, lambda tokens: tokens.roll(1)),
    "another dtype": lambda path: rewrite(path, lambda tokens: tokens.float()),
    "other sizes of the text": lambda path: rewrite(path, lambda tokens: tokens, bytes=[1, 2]),
    "another text": lambda path: rewrite(path, lambda tokens: tokens, fingerprint="0"),
    "no digest": lambda path: rewrite(path, lambda tokens: tokens, sha256=None),
    "about nothing": lambda path: save_file(load_file(path), path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache(tmp_path, damage):
    cache = tmp_path / "corpus.safetensors"
    write_cache(cache, encode(["the sea\n" * 50], byte_tokenizer(), 0.1, 0))
    DAMAGE[damage](cache)
    with pytest.raises(StateError, match=r"corpus\.safetensors: damaged \(.*\); remove it, and --resume makes it anew"):
        read_cache(cache)


def test_a_full_disk_leaves_no_half_cache(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_cache(tmp_path / "corpus.safetensors", corpus(50))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("train", [41, 48, 50])  # of 8 tokens a row: 4 rows fit wherever the first begins
def test_every_token_once_an_epoch(train):
    rows = Rows(corpus(train).train, 8, seed=3)
    assert rows.an_epoch == (train - 1) // 8 - 1
    begins = set()
    for epoch in range(5):
        inputs, targets = rows.batch(epoch * rows.an_epoch, rows.an_epoch)
        begins.add(int(inputs.min()))
        assert torch.equal(inputs + 1, targets) and inputs.dtype == torch.int64
        seen = targets.flatten().sort().values
        assert torch.equal(seen, torch.arange(int(seen[0]), int(seen[0]) + len(seen))) and seen[-1] < train
    assert len(begins) > 2 and max(begins) < 8


def test_rows_depend_on_their_number_and_the_seed_alone():
    """However a step is cut into micro-batches, and across the end of an epoch."""
    rows = Rows(corpus(200).train, 8, seed=3)
    whole = rows.batch(0, 3 * rows.an_epoch)
    for first, count in ((0, 5), (rows.an_epoch - 2, 7), (2 * rows.an_epoch, 1), (3, 2 * rows.an_epoch + 5)):
        for part, all_rows in zip(rows.batch(first, count), whole, strict=True):
            assert torch.equal(part, all_rows[first : first + count])
    epochs = [whole[0][i * rows.an_epoch : (i + 1) * rows.an_epoch] for i in range(3)]
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert not torch.equal(Rows(corpus(200).train, 8, seed=4).batch(0, 5)[0], whole[0][:5])


@pytest.mark.parametrize("world", [1, 3])
def test_heldout_has_every_target_once(world):
    scored = []
    held = corpus(100, 53)
    counts = set()
    for rank in range(world):
        batches = list(held.heldout_batches(2, 8, 10**6, rank, world))
        counts.add(len(batches))
        for inputs, targets in batches:
            assert inputs.shape == targets.shape == (2, 8)
            real = targets != IGNORE
            assert torch.equal(inputs[real] + 1, targets[real])
            scored += targets[real].tolist()
    assert len(counts) == 1 and sorted(scored) == list(range(101, 153))


def test_some_of_the_heldout():
    """Windows from all over, not the first ones: texts come one after the other."""
    starts = [int(inputs[0, 0]) for inputs, _ in corpus(100, 801).heldout_batches(1, 8, 40)]
    assert starts == [100 + 8 * i for i in (0, 20, 40, 60, 80)]
    assert len(list(corpus(100, 801).heldout_batches(1, 8, 3))) == 1


def test_check():
    corpus(17).check(8, 27)
    with pytest.raises(SettingsError, match=r"data\.context=8 needs at least 17 tokens of training text, got 16"):
        corpus(16).check(8, 1000)
    with pytest.raises(SettingsError, match="nothing is held out"):
        corpus(50, 1).check(8, 1000)
    with pytest.raises(SettingsError, match="ids up to 26, the model only 26 tokens"):
        corpus(17).check(8, 26)
