"""The null report: which factors make a difference, which make none that matters, which are open.

`python train.py experiment=null_report` trains the runs and writes the report at the end;
`python -m experiments.null_report runs/null_report` writes it again at any time. For a sweep that
is half done, it shows the runs that are finished, and the commands that train the others.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.experimental.callback import Callback  # noqa: TID251  (the hook of a sweep's start)

from experiments.command import AT_END, command
from experiments.null_report_figures import (
    VERDICT_COLOURS,
    as_svg,
    draw_differences,
    draw_learning_curves,
)
from experiments.sweep import BASELINE_CELL, Cell, Sweep, read_sweep
from experiments.tables import markdown, write_csv
from files import write_text
from hydra_plugins.one_factor_sweeper import PLAN_NAME

if TYPE_CHECKING:
    from experiments.statistics import Comparison

TEMPLATE = "null_report.html.jinja"

Comparisons = dict[tuple[Cell, str], "Comparison"]  # cell, region -> difference from the baseline


def compare_all(sweep: Sweep) -> Comparisons:
    """Compare every cell with the baseline, in every region.

    All cells of the plan are one family, those without a finished run too: a verdict must not
    weaken when the rest of its family comes in.
    """
    from experiments.statistics import adjust, compare

    keys = [(cell, region) for cell in sweep.planned_levels() for region in sweep.margin]
    comparisons = [
        compare(
            sweep.dice(BASELINE_CELL, region),
            sweep.dice(cell, region),
            margin=sweep.margin[region],
            alpha=sweep.alpha,
        )
        for cell, region in keys
    ]
    return dict(zip(keys, adjust(comparisons), strict=True))


def verdict_rows(sweep: Sweep, comparisons: Comparisons) -> list[dict[str, str]]:
    """Make a row for every level: difference, interval and verdict by region."""
    rows = []
    for cell in sweep.levels():
        row = {**cell._asdict(), "seeds": str(len(sweep.runs_of(cell)))}
        for region, margin in sweep.margin.items():
            found = comparisons[cell, region]
            row[f"{region} (± {margin:g})"] = (
                f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}] {found.verdict}"
            )
        rows.append(row)
    return rows


def cell_rows(sweep: Sweep) -> list[dict[str, str]]:
    """Make a row for the baseline and every level: Dice over the seeds, and cost."""
    from experiments.results import Results

    rows = []
    for cell in (BASELINE_CELL, *sweep.levels()):
        runs = sweep.runs_of(cell)
        cost = Results.read(runs[0].folder).cost
        row = {**cell._asdict(), "seeds": " ".join(str(run.seed) for run in runs)}
        for region in sweep.margin:
            means = np.nanmean(sweep.dice(cell, region), axis=1)
            spread = f" ± {means.std(ddof=1):.3f}" if len(means) > 1 else ""
            row[f"Dice {region}"] = f"{means.mean():.3f}{spread}"
        rows.append(
            {
                **row,
                "widths": " ".join(map(str, cost.widths)),
                "parameters": f"{cost.parameters:,}",
                "GFLOP a patch": f"{cost.gflops:.2f}",
                "MiB a step": f"{cost.memory_mib:.0f}",
                "training": f"{np.mean([Results.read(run.folder).fit_s for run in runs]):.0f} s",
            }
        )
    return rows


def comparison_rows(comparisons: Comparisons) -> list[dict[str, object]]:
    """Make a row for every comparison, with all that was computed."""
    return [
        {**cell._asdict(), "region": region, **vars(found)}
        for (cell, region), found in comparisons.items()
    ]


def run_rows(sweep: Sweep) -> list[dict[str, str]]:
    """Make a row for every finished run: its mean Dice and its name."""
    return [
        {
            **run.cell._asdict(),
            "seed": str(run.seed),
            **{region: f"{np.nanmean(run.dice(region)):.4f}" for region in sweep.margin},
            "run": run.name,
        }
        for run in sweep.finished
    ]


def summary(sweep: Sweep, comparisons: Comparisons) -> list[str]:
    """Say in sentences what came out, and how to read it."""
    verdicts = [found.verdict for found in comparisons.values()]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICT_COLOURS)
    margins = ", ".join(f"{region} {margin:g}" for region, margin in sweep.margin.items())
    detectable = ", ".join(
        f"{region} {difference:.3f}"
        for region, difference in median_detectable(sweep, comparisons).items()
    )
    total = len(sweep.finished) + len(sweep.missing)
    return [
        f"{len(verdicts)} comparisons with the baseline: {counts}.",
        f"{len(sweep.finished)} of {total} runs are finished; {len(sweep.cases)} test cases; "
        f"margin of Dice {margins}, error rate {sweep.alpha:g} over the family (Holm), both stated "
        f"{sweep.stated}, before the first run.",
        '"Different": the difference is not 0. "Equivalent": it is smaller than the margin, '
        'whichever its sign. "Undecided": these cases and seeds can say neither. Intervals, of '
        f"{1 - sweep.alpha:.0%}, are over cases and seeds (thick in the figure: of "
        f"{1 - 2 * sweep.alpha:.0%}), before the correction.",
        "A difference that would be found four times in five, for half of the levels: "
        f"{detectable or 'not known yet'}.",
    ]


def median_detectable(sweep: Sweep, comparisons: Comparisons) -> dict[str, float]:
    """Find the median over the levels of the smallest detectable difference, by region.

    A region is left out as long as no level has enough seeds to tell.
    """
    detectable = {}
    for region in sweep.margin:
        differences = [
            found.minimum_detectable
            for (_, other), found in comparisons.items()
            if other == region and not np.isnan(found.minimum_detectable)
        ]
        if differences:
            detectable[region] = float(np.median(differences))
    return detectable


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write `null_report.md`, `null_report.csv`, `null_report.html` and `forest.png`.

    Args:
        folder: Folder of the sweep.
        output: Folder of the report; by default `report` in the folder of the sweep.

    Returns:
        The page, `null_report.html`.

    Raises:
        InputError: The sweep cannot be read, see `read_sweep`.
    """
    sweep = read_sweep(folder)
    comparisons = compare_all(sweep)
    output = output or folder / "report"
    output.mkdir(parents=True, exist_ok=True)
    if comparisons:
        write_csv(output / "null_report.csv", comparison_rows(comparisons))
    draw_differences(sweep, comparisons).savefig(output / "forest.png", dpi=120)
    write_text(output / "null_report.md", as_markdown(sweep, comparisons))
    page = output / "null_report.html"
    write_text(page, as_page(sweep, comparisons, output))
    return page


def missing_runs(sweep: Sweep) -> list[str]:
    """Name the runs of the plan that are not finished, and what they train."""
    return [
        f"{run.cell.factor}={run.cell.level} seed={run.seed} ({run.name})" for run in sweep.missing
    ]


def as_markdown(sweep: Sweep, comparisons: Comparisons) -> str:
    """Format the report as Markdown, with the figure in a file beside it."""
    verdicts = verdict_rows(sweep, comparisons)
    parts = [
        "# Null report",
        *summary(sweep, comparisons),
        "![Differences by region](forest.png)",
        "## Verdicts",
        markdown(verdicts) if verdicts else "None yet.",
        "## Cells",
        markdown(cell_rows(sweep)),
        "## Missing",
        "\n".join(f"- {name}" for name in missing_runs(sweep)) or "Nothing.",
        "Start it again: what is finished is not run anew." if sweep.missing else "## Command",
        "```sh\n" + "\n".join(sweep.commands) + "\n```",
        "## Runs",
        markdown(run_rows(sweep)),
    ]
    return "\n\n".join(parts) + "\n"


def as_page(sweep: Sweep, comparisons: Comparisons, output: Path) -> str:
    """Format the report as one HTML page that needs no other file.

    Args:
        sweep: The sweep.
        comparisons: Its comparisons.
        output: Folder of the page, from which it links to the folders of the runs.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        name=sweep.folder.name,
        colours=VERDICT_COLOURS,
        sentences=summary(sweep, comparisons),
        differences=as_svg(draw_differences(sweep, comparisons)),
        learning_curves=as_svg(draw_learning_curves(sweep)),
        margin=sweep.margin,
        levels=sweep.levels(),
        comparisons=comparisons,
        cells=cell_rows(sweep),
        missing=missing_runs(sweep),
        commands=sweep.commands,
        runs=[
            {**row, "folder": os.path.relpath(run.folder.path, output)}
            for row, run in zip(run_rows(sweep), sweep.finished, strict=True)
        ],
    )


class WriteReport(Callback):
    """Writes the report when the process of a sweep ends; a callback of Hydra.

    Hydra's own hook for the end of a sweep is not called if a job failed or the sweep was stopped,
    and a report of what is finished is wanted then too.
    """

    def on_multirun_start(self, config: Any, **_: object) -> None:  # noqa: ANN401  (Hydra's)
        AT_END.append(partial(self.write, Path(config.hydra.sweep.dir)))

    @staticmethod
    def write(folder: Path) -> None:
        """Write the report of a sweep, unless the sweep was refused before it began.

        Raises:
            InputError: See `write_report`.
        """
        if (folder / PLAN_NAME).is_file():
            print(f"report: {write_report(folder)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report that the command line asks for.

    Raises:
        InputError: See `write_report`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.null_report",
        description="Compare every level of a sweep over factors with the baseline.",
    )
    parser.add_argument("folder", type=Path, help="folder of the sweep, such as runs/null_report")
    parser.add_argument("--output", type=Path, help="folder of the report; default: FOLDER/report")
    options = parser.parse_args(arguments)
    print(write_report(options.folder, options.output))


if __name__ == "__main__":
    with command():
        main()
