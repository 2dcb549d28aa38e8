"""The code of docs/training.md runs, block after block, as the page says."""

from __future__ import annotations

import re

import torch

from helpers.judge import one_thread
from helpers.paths import ROOT


def test_the_page_runs(capsys):
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    torch.manual_seed(0)
    scope: dict = {}
    with one_thread():
        for block in blocks:
            exec(compile(block, "docs/training.md", "exec"), scope)
    assert scope["line"]["layers"]["1.router"]["tokens"] == 4 * 2 * 32
    out = capsys.readouterr().out
    assert "'ffn_histogram'" in out and "'gradient_ratio'" in out and "torch.Size([10, 32]) torch.Size([9, 32])" in out
