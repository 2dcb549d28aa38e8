"""The pages of the repository can be read and lead somewhere: no long lines, no broken links, no paths that moved."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from helpers.paths import ROOT

LONGEST = 120  # characters; no line is excepted, a table that is too wide is split
_LINK = re.compile(r"(?<!`)\[(?:[^\]`]|`[^`]*`)*\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?:\.\./)*(?:src|tests|benchmarks|docs|dev|examples)/[\w./*-]+")


def pages() -> list[str]:
    """Every page under version control, but for the embedded model's card and the template that it is made of."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        names = listed.split()
    except (OSError, subprocess.CalledProcessError):  # an unpacked source distribution
        names = [str(p.relative_to(ROOT)) for folder in ("docs", "dev") for p in (ROOT / folder).rglob("*.md")]
        names.append("README.md")
    cards = "src/zemoe/models/tiny/README.md", "examples/tiny_card.md"
    return sorted({name for name in names if name not in cards and (ROOT / name).is_file()})


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(text: str) -> Iterator[str]:
    """The lines outside of fenced blocks."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield line


def anchors(text: str) -> set[str]:
    """What `#...` may name on a page, by GitHub's rule: a heading in lower case, spaces as hyphens, no punctuation."""
    found: dict[str, int] = {}
    result = set()
    for line in prose(text):
        if heading := re.match(r"#{1,6} +(.*)", line):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            result.add(slug if slug not in found else f"{slug}-{found[slug]}")
            found[slug] = found.get(slug, 0) + 1
    return result


def long_lines(page: str, text: str) -> list[str]:
    return [
        f"{page}:{number}: {len(line)} characters"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > LONGEST
    ]


def broken_links(page: str, text: str) -> list[str]:
    broken = []
    for target in _LINK.findall("\n".join(prose(text))):
        if re.match(r"\w+:", target):  # https: and the like
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists():
            broken.append(f"{page}: {target}: no such file")
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
            broken.append(f"{page}: {target}: no such heading")
    return broken


def lost_paths(page: str, text: str) -> list[str]:
    """Paths of the repository in backticks that are not there; with `*` at least one has to be."""
    lost = []
    for span in re.findall(r"`([^`]+)`", "\n".join(prose(text))):
        for path in _PATH.findall(span):
            name = path.removeprefix("../").rstrip("./")
            if not any(ROOT.glob(name)):
                lost.append(f"{page}: `{path}` is not there")
    return lost


@pytest.mark.parametrize("page", pages())
def test_no_line_is_longer_than_120_characters(page):
    assert not long_lines(page, read(page))


@pytest.mark.parametrize("page", pages())
def test_every_relative_link_and_anchor_exists(page):
    assert not broken_links(page, read(page))


@pytest.mark.parametrize("page", pages())
def test_every_path_in_backticks_exists(page):
    assert not lost_paths(page, read(page))


def test_readme_is_at_most_120_lines():
    assert len(read("README.md").splitlines()) <= 120


def test_the_python_of_the_readme_runs_block_after_block():
    blocks = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    program = "\n".join([*blocks, "print(type(model.model.layers[0].mlp).__module__)"])
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(blocks) == 2 and done.stdout.splitlines()[-1] == "zemoe.integrations.transformers.layers"


def test_these_tests_find_what_is_broken():
    assert long_lines("README.md", "x" * 121) and not long_lines("README.md", "x" * 120)
    for text in ("[a](docs/none.md)", "[a](docs/gpu.md#no-such-heading)", "[`a` b](#none)"):
        assert broken_links("README.md", text), text
    for text in ("[a](docs/gpu.md#other-gpus)", "```\n[a](none.md)\n```", "[a](https://none.example/x.md)"):
        assert not broken_links("README.md", text), text
    assert lost_paths("README.md", "`src/zemoe/none.py`") and lost_paths("README.md", "`python tests/none_*.py --x`")
    assert not lost_paths("README.md", "`src/zemoe/config.py` `tests/test_*.py` `none/config.py` src/zemoe/none.py")
    assert anchors("# A `b`: c\n## A\n## A\n```\n# no\n```") == {"a-b-c", "a", "a-1"}
