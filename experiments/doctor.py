"""The report of the doctor: a table on the screen, JSON in a file."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from datamodules.cases import DataSet
from datamodules.checks import Finding
from datamodules.doctor import NOT_CHECKED, diagnose
from files import write_json

COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def report(data_set: DataSet, workers: int | None, json: str | None) -> bool:
    """Examine a data set and print what was found.

    Args:
        data_set: Its phantoms are made, if it is one of phantoms; other files are only read.
        workers: Cases to examine at a time; None for one per core.
        json: File that gets the findings too.

    Returns:
        Whether the data set has no errors.

    Raises:
        InputError: The folder is missing or has no case, or the file cannot be written.
    """
    data_set.prepare()
    count, findings = diagnose(data_set, workers)
    if json is not None:
        content = {"cases": count, "not_checked": NOT_CHECKED, "findings": [*map(asdict, findings)]}
        write_json(Path(json), content)
    show(count, findings)
    return not any(finding.severity == "error" for finding in findings)


def show(count: int, findings: Sequence[Finding]) -> None:
    """Print the findings as a table, and how many there are of each severity."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if findings:
        table = Table("severity", "case", "finding", title_justify="left")
        for finding in findings:
            severity = Text(finding.severity, style=COLOURS[finding.severity])
            table.add_row(severity, Text(finding.case), Text(finding.message, overflow="fold"))
        console.print(table)
    number = Counter(finding.severity for finding in findings)
    found = ", ".join(f"{number[severity]} {severity}s" for severity in COLOURS)
    console.print(f"{count} cases: {found}", highlight=False)
    console.print(NOT_CHECKED, highlight=False)
