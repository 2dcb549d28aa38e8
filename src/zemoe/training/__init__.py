"""`zemoe train`: language models with zero experts from text files.

    from zemoe.training import train
    from zemoe.training.settings import read

    end = train(read(Path("run.toml"), ["train.steps=200"]), resume=False, listener=print)

`zemoe.training.run` tells more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .run import train  # late: it needs transformers, which takes seconds to import, and settings don't

    return train
