"""docs/train.md says what the code says: each setting once, with its defaults."""

from __future__ import annotations

import re
from dataclasses import fields

from helpers.paths import ROOT
from zemoe.training.command import FINE_TUNE
from zemoe.training.settings import Settings

PAGE = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")


def _text(value: object) -> str:
    """As TOML has it, without quotes; an empty value as an empty cell."""
    return str(value).lower() if isinstance(value, bool) else "" if value in ("", ()) else str(value)


def test_the_table_of_settings_has_each_with_its_defaults():
    rows = re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| (.*?) ?\| (.*?) ?\| .*\|$", PAGE, re.MULTILINE)
    defaults = {
        f"{section.name}.{key.name}": key.default
        for section in fields(Settings)
        for key in fields(section.default_factory)  # pyright: ignore[reportArgumentType]
        if section.name != "model" or key.name in ("start", "tokenizer")
    }
    started = {f"{section}.{key}": value for section, keys in FINE_TUNE.items() for key, value in keys.items()}
    assert [name for name, *_ in rows] == list(dict.fromkeys(name for name, *_ in rows))
    assert {name: default for name, default, _ in rows} == {name: _text(value) for name, value in defaults.items()}
    assert {name: value for name, _, value in rows if value} == {name: _text(value) for name, value in started.items()}
