"""The built wheel alone, outside of the repository: it has the command, its cases and the embedded model with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.paths import ROOT


def test_the_wheel_generates_text(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    # Without --wheel it is made of the source distribution, which so has all of it too.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("zemoe-*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        wheel,
    ]
    subprocess.run(install, check=True, capture_output=True)

    def run(*arguments: str) -> str:
        # Before site-packages, where this repository may be installed as editable.
        environment = os.environ | {"PYTHONPATH": str(site)}
        command = [sys.executable, *arguments] if arguments[0].startswith("-") else list(arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout

    assert Path(run("-c", "import zemoe; print(zemoe.__file__)").strip()).is_relative_to(site)
    assert Path(run("-c", "import zemoe_main; print(zemoe_main.__file__)").strip()).parent == site
    script = str(site / "bin" / "zemoe")
    assert run(script, "--version") == run("-m", "zemoe", "--version")
    assert "zemoe_main" in Path(script).read_text()
    assert "lite, research, flash, first, second" in run("-m", "zemoe", "bench", "--help")
    result = json.loads(run("-m", "zemoe", "generate", "--max-new-tokens", "5", "--seed", "1", "--json"))
    assert len(result["tokens"]) == 5
    assert result["model"].startswith("embedded") or str(site) in result["model"]
