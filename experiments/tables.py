"""Rows of results as Markdown and CSV; the columns are those of the first row."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table; what a row lacks stays empty."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
