"""A corpus file, written anew with one thing changed."""

from __future__ import annotations

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def rewrite(path, change, **about):
    """The same file, whole as safetensors, with other tokens or another description."""
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["about"]) | about
    said = {key: value for key, value in said.items() if value is not None}
    save_file({name: change(tokens) for name, tokens in load_file(path).items()}, path, {"about": json.dumps(said)})
