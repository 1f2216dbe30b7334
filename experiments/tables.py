"""Rows of results as Markdown and CSV; the columns are those of the first row."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from files import write_text


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Format rows as a Markdown table; a cell that a row lacks stays empty."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as a CSV file with a header."""
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
