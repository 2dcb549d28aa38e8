"""A few hundred damaged folders (`make fuzz` draws more), and that the judge of them sees what is wrong."""

from __future__ import annotations

import pytest
import torch

from tools import fuzz_folders
from tools.fuzz_folders import NAMES, fuzz, wrong_words
from tools.fuzz_readers import close


@pytest.mark.slow
def test_damaged_folders():
    found = fuzz(250, seed=20261201)
    wrong = [f"{case['number']} {case['reader']}, {case['damage']}: {case['wrong']}" for case in found if case["wrong"]]
    assert not wrong, "\n".join(wrong)
    refused = [case for case in found if case["code"] in (1, 2)]
    assert 100 < len(refused) < 220, "damage is no damage, or everything is refused"
    assert {case["reader"] for case in found} == set(fuzz_folders.READERS)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (1, ""),
        (1, "Traceback (most recent call last):\n"),
        (0, "thread '<unnamed>' panicked at x.rs\n"),
        (1, "zemoe: error: config.json: two\nlines\n"),
        (1, "zemoe: error: config.json: \x1b[31mred\n"),
        (1, f"zemoe: error: config.json: {'x' * 500}\n"),
        (1, "zemoe: error: 'int' object is not callable\n"),
        (1, "config.json: not from zemoe\n"),
        (3, "zemoe: error: config.json: odd\n"),
        (-1, "zemoe: error: config.json: odd\n"),
    ],
)
def test_wrong_words_are_seen(code, told):
    assert wrong_words(code, told, "start")


def test_right_words_pass():
    assert not wrong_words(1, "zemoe: error: a/config.json: hidden_size must be 8\n", "start")
    assert not wrong_words(1, "a/config.json: hidden_size must be 8\n", "load_model")
    assert not wrong_words(0, "", "start")
    assert NAMES.search("data.context must be") and not NAMES.search("the model is wrong")


def test_other_numbers_are_seen():
    wanted = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert close(wanted * (1 + 1e-5), wanted)
    for wrong in (wanted * 1.02, wanted.roll(1), torch.zeros(50), wanted.where(wanted < 1, torch.nan)):
        assert not close(wrong, wanted)
