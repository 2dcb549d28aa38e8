"""The versions of other packages that zemoe is tested with, and a warning about any other version.

pyproject.toml, constraints*.txt and the Makefile name the same versions; tests/test_versions.py compares them.
"""

from __future__ import annotations

import re
import warnings
from functools import cache

Version = tuple[int, ...]

# The oldest and the newest version of each package. Numbers after those that are given here don't matter: 2.14.1 is a
# version 2.14.
TESTED: dict[str, tuple[Version, Version]] = {
    "torch": ((2, 11), (2, 14)),
    "transformers": ((5, 17), (5, 24)),
    "triton": ((3, 6), (3, 9)),
    "numba": ((0, 61), (0, 68)),
    "vllm": ((0, 26), (0, 33)),
    "sglang": ((0, 5, 11), (0, 5, 23)),
}


class UntestedVersionWarning(UserWarning):
    """A package is of a version that zemoe was not tested with."""


def range_of(package: str) -> str:
    """Return the versions of a package of TESTED that were tested, such as "5.17 to 5.24"."""
    return " to ".join(".".join(map(str, bound)) for bound in TESTED[package])


def is_tested(package: str, version: str) -> bool:
    """Say whether `version`, such as "2.14.1+cu130", was tested. One that begins with no number was not."""
    oldest, newest = TESTED[package]
    numbers = re.match(r"\d+(\.\d+)*", version)
    if numbers is None:
        return False
    return oldest <= tuple(map(int, numbers[0].split(".")))[: len(newest)] <= newest


@cache
def warn_if_untested(package: str, version: str) -> None:
    """Warn with UntestedVersionWarning, once a process, if this version of `package` was not tested."""
    if not is_tested(package, version):
        warnings.warn(
            f"zemoe was tested with {package} {range_of(package)}, and this is {version}",
            UntestedVersionWarning,
            stacklevel=2,
        )
