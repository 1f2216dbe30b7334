"""Does the Dice that an ensemble expects of a case tell its Dice with the truth?

    python -m experiments.agreement EVALUATIONS... --output FOLDER

Reads `cases.csv` of folders of `evaluate.py`. For each region it writes the correlation of
`expected_<region>` with `dice_<region>` over the cases, the means of both, and their mean absolute
difference; and the mean Dice of each fifth of the cases, by what is expected of them. The cases
must be of another kind than those of the training: nothing is fitted to them.
"""

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import InputError
from experiments.command import command
from experiments.tables import markdown, write_csv
from files import write_text, written_whole

EXPECTED = "expected_"  # begins the columns of `cases.csv` that are compared with `dice_<region>`
BINS = 5
LEAST_CASES = 3  # for a correlation


class Scored(NamedTuple):
    """A case that has a region in truth, some of which an estimate finds.

    Attributes:
        evaluation: Folder that it was scored in.
        expected: Dice of one estimate with another.
        dice: Dice of the prediction with the truth.
    """

    evaluation: str
    expected: float
    dice: float


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("evaluations", nargs="+", type=Path, help="folders of evaluate.py")
    parser.add_argument(
        "--output", type=Path, default=Path("agreement"), help="folder; default: %(default)s"
    )
    arguments = parser.parse_args()
    print(write_report(arguments.evaluations, arguments.output).read_text())


def write_report(evaluations: Sequence[Path], output: Path) -> Path:
    """Write `agreement.md`, its tables as CSV, and the picture; return the Markdown file.

    Raises:
        InputError: See `read`.
    """
    scored = read(evaluations)
    summary = [summary_of(region, cases) for region, cases in scored.items()]
    bins = [row for region, cases in scored.items() for row in bins_of(region, cases)]
    write_csv(output / "agreement.csv", summary)
    write_csv(output / "calibration.csv", bins)
    with written_whole(output / "agreement.png") as partial:
        draw(scored, partial)
    text = output / "agreement.md"
    write_text(text, f"{markdown(summary)}\n\n{markdown(bins)}\n")
    return text


def read(evaluations: Sequence[Path]) -> dict[str, list[Scored]]:
    """Read the cases of evaluations by region.

    A case counts for a region if it has the region in truth and an estimate finds some of it.

    Raises:
        InputError: There is no `cases.csv`, or nothing is expected of any case.
    """
    scored: dict[str, list[Scored]] = {}
    for folder in evaluations:
        for row in rows_of(folder / "cases.csv"):
            for region in (
                name.removeprefix(EXPECTED) for name in row if name.startswith(EXPECTED)
            ):
                case = Scored(
                    str(folder), float(row[EXPECTED + region]), float(row[f"dice_{region}"])
                )
                if float(row[f"true_voxels_{region}"]) and not math.isnan(case.expected):
                    scored.setdefault(region, []).append(case)
    if not scored:
        raise InputError(
            f"{evaluations[0] / 'cases.csv'}: expected numbers in {EXPECTED}REGION, found none; "
            "evaluate.py writes them if it predicts with several networks or flips=true"
        )
    return scored


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file.

    Raises:
        InputError: There is no such file, or it has no rows of cases.
    """
    advice = "expected the scores of an evaluation; evaluate.py writes them"
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {advice}, found {error}") from None
    if not rows or "case" not in rows[0]:
        raise InputError(f"{path}: {advice}, found others")
    return rows


def summary_of(region: str, cases: Sequence[Scored]) -> dict[str, str]:
    """Make the row of a region: its correlations, means and mean absolute difference."""
    from scipy.stats import pearsonr, spearmanr

    expected, dice = (
        np.array([getattr(case, name) for case in cases]) for name in Scored._fields[1:]
    )
    varies = len(cases) >= LEAST_CASES and np.ptp(expected) > 0 and np.ptp(dice) > 0
    return {
        "region": region,
        "cases": str(len(cases)),
        **{
            name: f"{correlation(expected, dice)[0]:.2f}" if varies else "-"
            for name, correlation in (("Pearson", pearsonr), ("Spearman", spearmanr))
        },
        "expected": f"{expected.mean():.3f}",
        "Dice": f"{dice.mean():.3f}",
        "mean absolute error": f"{np.abs(expected - dice).mean():.3f}",
    }


def bins_of(region: str, cases: Sequence[Scored]) -> list[dict[str, str]]:
    """Make a row for each fifth of the cases, by what is expected of them, lowest first."""
    ranked = sorted(cases, key=lambda case: case.expected)
    return [
        {
            "region": region,
            "fifth": str(number),
            "cases": str(len(part)),
            "expected": f"{np.mean([ranked[place].expected for place in part]):.3f}",
            "Dice": f"{np.mean([ranked[place].dice for place in part]):.3f}",
        }
        for number, part in enumerate(np.array_split(np.arange(len(ranked)), BINS), start=1)
        if len(part)
    ]


def draw(scored: Mapping[str, Sequence[Scored]], path: Path) -> None:
    """Draw the Dice of each case over what was expected of it, a panel for each region."""
    from matplotlib.figure import Figure

    names = sorted({case.evaluation for cases in scored.values() for case in cases})
    figure = Figure(figsize=(4 * len(scored), 5 + 0.25 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(scored), squeeze=False)[0]
    for ax, (region, cases) in zip(panels, scored.items(), strict=True):
        for name in names:
            own = [case for case in cases if case.evaluation == name]
            ax.scatter(
                [case.expected for case in own], [case.dice for case in own], s=16, label=name
            )
        ax.plot([0, 1], [0, 1], color="grey", linewidth=1)
        ax.set(title=region, xlabel="expected Dice", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("Dice")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    with command():
        main()
