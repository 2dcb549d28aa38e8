"""CSV files of results: what `zemoe bench` writes, and the scripts in benchmarks/ and examples/."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a header and `rows`. The columns are the keys of all rows, in the order in which they first appear.

    A cell is empty where a row has no such key. How numbers are rounded is the caller's business.
    """
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
