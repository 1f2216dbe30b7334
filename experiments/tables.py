"""Rows of results as Markdown and CSV; the columns are those of the first row."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class CaseRows:
    """A CSV file with one row for each case, sorted by name; it is always written whole.

    Rows of other columns are not read, and do not outlive the next one that is written.

    Attributes:
        path: The file.
        columns: Names of the columns; the first is `case`.
    """

    path: Path
    columns: Sequence[str]

    def read(self) -> dict[str, dict[str, str]]:
        """Read the rows by the name of the case; none if there is no file."""
        if not self.path.is_file():
            return {}
        reader = csv.DictReader(self.path.read_text(errors="replace").splitlines())
        if list(reader.fieldnames or []) != list(self.columns):
            return {}
        return {row["case"]: row for row in reader if None not in row and None not in row.values()}

    def put(self, row: Mapping[str, object]) -> None:
        """Add the row of a case, or replace it."""
        self._write({**self.read(), str(row["case"]): row})

    def remove(self, case: str) -> None:
        """Remove the row of a case, if there is one."""
        rows = self.read()
        if rows.pop(case, None) is not None:
            self._write(rows)

    def _write(self, rows: Mapping[str, Mapping[str, object]]) -> None:
        if rows:
            write_csv(
                self.path, [{c: rows[case][c] for c in self.columns} for case in sorted(rows)]
            )
        else:
            self.path.unlink()
