"""The null report: which factors make a difference, which make none that matters, which are open.

`python train.py experiment=null_report` trains the cells and ends here; `python -m
experiments.null_report runs/null_report` does it again, at any time: of a sweep that is half done
it shows what there is, and how to get the rest.
"""

import argparse
import atexit
import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.experimental.callback import Callback  # noqa: TID251  (the hook of a sweep's start)

from errors import InputError
from experiments.tables import markdown, write_csv
from hydra_plugins.one_factor_sweeper import BASELINE, PLAN_NAME

if TYPE_CHECKING:
    from lightning_modules.results import Results
    from matplotlib.figure import Figure

    from experiments.statistics import Comparison

TEMPLATE = "null_report.html.jinja"
VERDICT_COLOURS = {"different": "#d1495b", "equivalent": "#2a9d8f", "undecided": "#8d99ae"}


@dataclass(frozen=True)
class Run:
    """A finished cell of a sweep.

    Attributes:
        name: Of its folder.
        factor, level: What sets it apart from the baseline; both "baseline" for the baseline.
        seed: Of weights, patches and augmentation.
        results: What the run wrote last.
        scores: Test case -> column of `cases.csv` -> value.
        curve: (E, 2), epoch and mean validation Dice.
    """

    name: str
    factor: str
    level: str
    seed: int
    results: "Results"
    scores: dict[str, dict[str, float]]
    curve: np.ndarray


@dataclass(frozen=True)
class Sweep:
    """A plan, and what of it is done.

    Attributes:
        folder: Of the runs.
        margin: Region -> smallest difference of Dice that matters.
        alpha: Error rate of the tests, over the whole family.
        stated: When margin and cells were written down, before the first run.
        commands: That train the cells.
        runs: Those finished.
        missing: Cells of the plan that are not.
        cases: Test cases, the same for all runs.
    """

    folder: Path
    margin: dict[str, float]
    alpha: float
    stated: str
    commands: list[str]
    runs: list[Run]
    missing: list[dict[str, Any]]
    cases: list[str]

    def of(self, factor: str, level: str) -> list[Run]:
        """Finished runs of a cell, by seed."""
        runs = [run for run in self.runs if (run.factor, run.level) == (factor, level)]
        return sorted(runs, key=lambda run: run.seed)

    def levels(self) -> list[tuple[str, str]]:
        """Factor and level of every cell with a finished run, the baseline first."""
        cells = dict.fromkeys((run.factor, run.level) for run in self.runs)
        return sorted(cells, key=lambda cell: cell[0] != BASELINE)

    def scores(self, factor: str, level: str, region: str) -> np.ndarray:
        """Dice (seeds, cases) of a cell; no seeds where none is finished."""
        column, runs = f"dice_{region}", self.of(factor, level)
        scores = [[run.scores[case][column] for case in self.cases] for run in runs]
        return np.array(scores).reshape(len(runs), len(self.cases))


def read_sweep(folder: Path) -> Sweep:
    """What a sweep planned and what of it is finished.

    Raises:
        InputError: No plan, no finished baseline, or runs that were tested on different cases.
    """
    path = folder / PLAN_NAME
    if not path.is_file():
        raise InputError(
            f"{path}: not found; expected the folder of a sweep over factors, as "
            "`python train.py experiment=null_report` makes it"
        )
    plan = json.loads(path.read_text())
    finished = [cell for cell in plan["cells"] if (folder / cell["run"] / "results.json").is_file()]
    runs = [read_run(folder, cell) for cell in finished]
    if not any(run.factor == BASELINE for run in runs):
        raise InputError(f"{folder}: the baseline has no finished run yet; nothing to compare with")
    cases = list(runs[0].scores)
    for run in runs:
        if list(run.scores) != cases:
            raise InputError(
                f"{folder / run.name}: tested on other cases than {folder / runs[0].name}"
            )
    return Sweep(
        folder=folder,
        margin=plan["report"]["margin"],
        alpha=plan["report"]["alpha"],
        stated=plan["stated"],
        commands=plan["commands"],
        runs=runs,
        missing=[cell for cell in plan["cells"] if cell not in finished],
        cases=cases,
    )


def read_run(folder: Path, cell: dict[str, Any]) -> Run:
    """One finished run, from its folder."""
    from lightning_modules.results import Results

    path = folder / cell["run"]
    with (path / "cases.csv").open(newline="") as file:
        scores = {
            row.pop("case"): {column: float(value) for column, value in row.items()}
            for row in csv.DictReader(file)
        }
    return Run(
        name=cell["run"],
        factor=cell["factor"],
        level=str(cell["level"]),
        seed=cell["seed"],
        results=Results.read(path),
        scores=scores,
        curve=read_curve(path),
    )


def read_curve(run: Path) -> np.ndarray:
    """Epoch and validation Dice (E, 2); where a run was resumed, the later version counts."""
    by_epoch: dict[int, float] = {}
    versions = sorted(run.glob("csv/version_*"), key=lambda path: int(path.name.split("_")[1]))
    for version in versions:
        with (version / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("val/dice"):
                    by_epoch[int(row["epoch"])] = float(row["val/dice"])
    return np.array(sorted(by_epoch.items())).reshape(-1, 2)


def compare_all(sweep: Sweep) -> dict[tuple[str, str, str], "Comparison"]:
    """(factor, level, region) -> its comparison with the baseline; one family, as planned."""
    from experiments.statistics import adjust, compare

    # The missing ones too: a verdict must not weaken when the rest of its family comes in.
    missing = [(cell["factor"], str(cell["level"])) for cell in sweep.missing]
    keys = [
        (factor, level, region)
        for factor, level in dict.fromkeys([*sweep.levels(), *missing])
        if factor != BASELINE
        for region in sweep.margin
    ]
    comparisons = [
        compare(
            sweep.scores(BASELINE, BASELINE, region),
            sweep.scores(factor, level, region),
            margin=sweep.margin[region],
            alpha=sweep.alpha,
        )
        for factor, level, region in keys
    ]
    return dict(zip(keys, adjust(comparisons), strict=True))


def verdict_rows(
    sweep: Sweep, comparisons: dict[tuple[str, str, str], "Comparison"]
) -> list[dict[str, str]]:
    """A row for every level: difference, interval and verdict by region."""
    rows = []
    for factor, level in sweep.levels()[1:]:
        row = {"factor": factor, "level": level, "seeds": str(len(sweep.of(factor, level)))}
        for region, margin in sweep.margin.items():
            found = comparisons[factor, level, region]
            row[f"{region} (± {margin:g})"] = (
                f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}] {found.verdict}"
            )
        rows.append(row)
    return rows


def cell_rows(sweep: Sweep) -> list[dict[str, str]]:
    """A row for every cell: Dice over its seeds, and what it costs."""
    rows = []
    for factor, level in sweep.levels():
        runs = sweep.of(factor, level)
        cost = runs[0].results.cost
        row = {"factor": factor, "level": level, "seeds": " ".join(str(run.seed) for run in runs)}
        for region in sweep.margin:
            means = np.nanmean(sweep.scores(factor, level, region), axis=1)
            spread = f" ± {means.std(ddof=1):.3f}" if len(means) > 1 else ""
            row[f"Dice {region}"] = f"{means.mean():.3f}{spread}"
        rows.append(
            {
                **row,
                "widths": " ".join(map(str, cost.widths)),
                "parameters": f"{cost.parameters:,}",
                "GFLOP a patch": f"{cost.gflops:.2f}",
                "MiB a step": f"{cost.memory_mib:.0f}",
                "training": f"{np.mean([run.results.fit_s for run in runs]):.0f} s",
            }
        )
    return rows


def comparison_rows(
    comparisons: dict[tuple[str, str, str], "Comparison"],
) -> list[dict[str, object]]:
    """Everything that was computed, a row for every comparison."""
    return [
        {"factor": factor, "level": level, "region": region, **vars(found)}
        for (factor, level, region), found in comparisons.items()
    ]


def run_rows(sweep: Sweep, output: Path) -> list[dict[str, str]]:
    """A row for every finished run, with the way to its folder from the report's."""
    return [
        {
            "factor": run.factor,
            "level": run.level,
            "seed": str(run.seed),
            **{
                region: f"{np.nanmean([row[f'dice_{region}'] for row in run.scores.values()]):.4f}"
                for region in sweep.margin
            },
            "run": run.name,
            "folder": os.path.relpath(sweep.folder / run.name, output),
        }
        for run in sweep.runs
    ]


def forest_figure(sweep: Sweep, comparisons: dict[tuple[str, str, str], "Comparison"]) -> "Figure":
    """Differences of Dice with their intervals, the margin shaded, a panel for every region.

    Thin: the interval that the test of difference asks to leave out 0. Thick: that which the test
    of equivalence asks to lie within the margin. Both before Holm's correction.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    cells = sweep.levels()[1:]
    figure = Figure(figsize=(11, 1.6 + 0.32 * len(cells)), layout="constrained")
    axes = figure.subplots(1, len(sweep.margin), sharey=True, squeeze=False)[0]
    for ax, (region, margin) in zip(axes, sweep.margin.items(), strict=True):
        ax.axvspan(-margin, margin, color="#2a9d8f", alpha=0.12, lw=0)
        ax.axvline(0, color="#444444", lw=0.8)
        for place, (factor, level) in enumerate(cells):
            found = comparisons[factor, level, region]
            colour = VERDICT_COLOURS[found.verdict]
            ax.plot([found.low, found.high], [place, place], color=colour, lw=1)
            ax.plot([found.tost_low, found.tost_high], [place, place], color=colour, lw=3)
            ax.plot(found.difference, place, "o", color=colour, ms=5)
        # One cell of which nothing is known would squeeze all others; its line runs off the panel.
        found = [comparisons[factor, level, region] for factor, level in cells]
        reach = [max(abs(c.low), abs(c.high)) for c in found if not np.isnan(c.low)]
        limit = max(2 * margin, 1.5 * float(np.median(reach))) if reach else 2 * margin
        ax.set_xlim(-limit, limit)
        ax.set_title(f"{region}, margin ± {margin:g}")
        ax.set_xlabel("Dice, level minus baseline")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(cells)), [f"{factor} = {level}" for factor, level in cells])
    axes[0].set_ylim(max(len(cells), 1) - 0.5, -0.5)
    handles = [Line2D([], [], marker="o", color=c, label=v) for v, c in VERDICT_COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def curves_figure(sweep: Sweep) -> "Figure":
    """Validation Dice by epoch, a panel for every factor, a line for every run."""
    from matplotlib.figure import Figure

    factors = [*dict.fromkeys(factor for factor, _ in sweep.levels()[1:])] or [BASELINE]
    columns = min(4, len(factors))
    lines = -(-len(factors) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for ax, factor in zip(axes, factors, strict=False):
        cells = [(BASELINE, BASELINE)]
        cells += [cell for cell in sweep.levels()[1:] if cell[0] == factor]
        for number, (of, level) in enumerate(cells):
            for repeat, run in enumerate(sweep.of(of, level)):
                label = level if repeat == 0 else None
                ax.plot(*run.curve.T, ".-", color=f"C{number}", alpha=0.7, lw=1, label=label)
        ax.set_title(factor, fontsize=10)
        ax.legend(fontsize=7, frameon=False)
        ax.grid(alpha=0.3)
    for ax in list(axes)[len(factors) :]:
        ax.set_axis_off()
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("validation Dice", fontsize=9)
    return figure


def svg(figure: "Figure") -> str:
    """A figure as an element of a page."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def summary(sweep: Sweep, comparisons: dict[tuple[str, str, str], "Comparison"]) -> list[str]:
    """What came out, in sentences."""
    verdicts = [found.verdict for found in comparisons.values()]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICT_COLOURS)
    margins = ", ".join(f"{region} {margin:g}" for region, margin in sweep.margin.items())
    total = len(sweep.runs) + len(sweep.missing)
    return [
        f"{len(verdicts)} comparisons with the baseline: {counts}.",
        f"{len(sweep.runs)} of {total} runs are finished; {len(sweep.cases)} test cases; margin of "
        f"Dice {margins}, error rate {sweep.alpha:g} over the family (Holm), both stated "
        f"{sweep.stated}, before the first run.",
        '"Different": the difference is not 0. "Equivalent": it is smaller than the margin, '
        'whichever its sign. "Undecided": these cases and seeds can say neither. Intervals, of '
        f"{1 - sweep.alpha:.0%}, are over cases and seeds (thick in the figure: of "
        f"{1 - 2 * sweep.alpha:.0%}), before the correction.",
        f"A difference that would be found four times in five, for half of the levels: "
        f"{', '.join(detectable(sweep, comparisons)) or 'not known yet'}.",
    ]


def detectable(
    sweep: Sweep, comparisons: dict[tuple[str, str, str], "Comparison"]
) -> Iterator[str]:
    """The median over the levels of the smallest detectable difference, by region."""
    for region in sweep.margin:
        values = [c.minimum_detectable for key, c in comparisons.items() if key[2] == region]
        known = [value for value in values if not np.isnan(value)]
        if known:
            yield f"{region} {np.median(known):.3f}"


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write `null_report.md`, `.csv` and `.html`; returns the page.

    Args:
        folder: Of the sweep.
        output: Folder of the report; `report` in the sweep's by default.

    Raises:
        InputError: As `read_sweep`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    sweep = read_sweep(folder)
    comparisons = compare_all(sweep)
    output = output or folder / "report"
    output.mkdir(parents=True, exist_ok=True)
    forest, curves = forest_figure(sweep, comparisons), curves_figure(sweep)
    verdicts, runs = verdict_rows(sweep, comparisons), run_rows(sweep, output)
    cells = cell_rows(sweep)
    if comparisons:
        write_csv(output / "null_report.csv", comparison_rows(comparisons))
    forest.savefig(output / "forest.png", dpi=120)
    missing = [
        f"{cell['factor']}={cell['level']} seed={cell['seed']} ({cell['run']})"
        for cell in sweep.missing
    ]
    parts = [
        "# Null report",
        *summary(sweep, comparisons),
        "![Differences by region](forest.png)",
        "## Verdicts",
        markdown(verdicts) if verdicts else "None yet.",
        "## Cells",
        markdown(cells),
        "## Missing",
        "\n".join(f"- {name}" for name in missing) or "Nothing.",
        "## Command" if not missing else "Start it again: what is finished is not run anew.",
        "```sh\n" + "\n".join(sweep.commands) + "\n```",
        "## Runs",
        markdown([{k: v for k, v in row.items() if k != "folder"} for row in runs]),
    ]
    (output / "null_report.md").write_text("\n\n".join(parts) + "\n")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        name=folder.name,
        sentences=summary(sweep, comparisons),
        forest=svg(forest),
        curves=svg(curves),
        margin=sweep.margin,
        levels=sweep.levels()[1:],
        comparisons=comparisons,
        cells=cells,
        missing=missing,
        commands=sweep.commands,
        runs=runs,
    )
    path = output / "null_report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page)
    partial.replace(path)
    return path


class WriteReport(Callback):
    """Hydra callback: the report when a sweep's process ends.

    Hydra's own hook is not called when a job has failed or the sweep was stopped; the end of the
    process comes always.
    """

    def on_multirun_start(self, config: Any, **_: object) -> None:  # noqa: ANN401  (Hydra's)
        atexit.register(self.write, Path(config.hydra.sweep.dir))

    @staticmethod
    def write(folder: Path) -> None:
        try:
            print(f"report: {write_report(folder)}")
        except InputError as error:
            print(f"no report: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.null_report", description="What a sweep over factors found."
    )
    parser.add_argument("folder", type=Path, help="of a sweep over factors")
    parser.add_argument("--output", type=Path, help="folder of the report; FOLDER/report")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.folder, options.output))
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
