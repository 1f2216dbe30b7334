"""Table of the runs of a sweep: what was tried, and what the validation cases say about it.

    python -m experiments.trials runs/detection_trials model patches.learning_rate

Rows with the same first column stand together, the best first. Test scores are not read: they are
for what was chosen.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from errors import InputError
from experiments.command import command
from experiments.run import RunFolder, finished_runs
from experiments.tables import markdown
from files import write_text

TABLE_NAME = "trials.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table that the command line asks for, into the folder of the runs."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.trials",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument(
        "columns", nargs="+", metavar="KEY", help="a group of the configuration, or a key with dots"
    )
    options = parser.parse_args(arguments)
    text = markdown(table(finished_runs(options.runs), options.columns))
    write_text(options.runs / TABLE_NAME, text + "\n")
    print(text)


def table(runs: Sequence[RunFolder], columns: Sequence[str]) -> list[dict[str, str]]:
    """Make a row for each combination of values that was tried, over the seeds of its runs.

    Args:
        runs: Finished runs.
        columns: Groups of the configuration, of which a row has the option, or keys with dots.

    Raises:
        InputError: A run has no such group or key, or its objective is no score of validation.
    """
    from experiments.results import Results
    from lightning_modules.checkpoint import CONFIG_KEY, read

    tried: dict[tuple[str, ...], list[Results]] = {}
    objectives = set()
    for run in runs:
        config = read(run.best)[CONFIG_KEY]
        objectives.add(config["objective"])
        values = tuple(_value(config, column, run) for column in columns)
        tried.setdefault(values, []).append(Results.read(run))
    objective, *others = sorted(objectives)
    if others or not objective.startswith("val/"):
        raise InputError(
            f"{runs[0].path.parent}: expected runs with one objective, a score of validation, "
            f"found {', '.join(sorted(objectives))}"
        )
    scores = {
        values: [results.metrics[objective] for results in found] for values, found in tried.items()
    }
    return [
        dict(zip(columns, values, strict=True))
        | {
            objective: f"{fmean(scores[values]):.3f}"
            + (f" ± {stdev(scores[values]):.3f}" if len(scores[values]) > 1 else ""),
            "runs": str(len(scores[values])),
            "epochs": " ".join(sorted({str(results.epochs) for results in tried[values]})),
            "GFLOP a patch": f"{tried[values][0].cost.gflops:.0f}",
        }
        for values in sorted(tried, key=lambda v: (v[0], -fmean(scores[v])))
    ]


def _value(config: Mapping[str, Any], column: str, run: RunFolder) -> str:
    """Return the option of a group, or the value of a key, in the configuration of a run."""
    if (option := config["choices"].get(column)) is not None:
        return str(option)
    node: Any = config
    for name in column.split("."):
        if not isinstance(node, dict) or name not in node:
            raise InputError(
                f"{run.path}: expected a group or a key of the configuration, found no {column}"
            )
        node = node[name]
    return str(node)


if __name__ == "__main__":
    with command():
        main()
