"""The null report: which factors make a difference, which make none that matters, which are open.

`python train.py experiment=null_report` trains the runs and writes the report at the end;
`python -m experiments.null_report runs/null_report` writes it again at any time. For a sweep that
is half done, it shows the runs that are finished, and the commands that train the others.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from hydra.experimental.callback import Callback  # noqa: TID251  (the hook of a sweep's start)

from errors import InputError
from experiments.command import AT_END, command
from experiments.null_report_figures import (
    VERDICT_COLOURS,
    as_svg,
    draw_differences,
    draw_learning_curves,
)
from experiments.sweep import BASELINE_CELL, Cell, Run, Sweep, keep, read_sweep
from experiments.tables import markdown, write_csv
from files import write_text
from hydra_plugins.one_factor_sweeper import PLAN_NAME

if TYPE_CHECKING:
    from experiments.statistics import Estimate
    from experiments.verdicts import LevelVerdict

TEMPLATE = "null_report.html.jinja"

Verdicts = Mapping[Cell, "LevelVerdict"]


class Claim(NamedTuple):
    """What Frey & Nau 2019 say of a factor.

    Attributes:
        sentence: The sentence, with their words between quotation marks.
        baseline_is_better: Whether they say that of the baseline, and not that no level is better.
    """

    sentence: str
    baseline_is_better: bool = False


NO_IMPROVEMENT = Claim(
    'Other levels "did not lead to an improvement in model performance" (section 2.1).'
)
CLAIMS = {
    "downsampling": NO_IMPROVEMENT,
    "filters.ratio": NO_IMPROVEMENT,
    "model.bottleneck": NO_IMPROVEMENT,
    "model.depth": NO_IMPROVEMENT,
    "norm": NO_IMPROVEMENT,
    "activation": Claim(
        'LeakyReLU instead of ReLU was "an improvement in performance" (section 2.1).',
        baseline_is_better=True,
    ),
    "region_weights": Claim(
        'Other weights brought no "clear change in model performance" (section 2.2).'
    ),
    "inputs": Claim(
        'The similarity "did not further improve model performance"; of mirrored patches the '
        "authors give no result (section 2.3)."
    ),
}


def verdict_rows(sweep: Sweep, verdicts: Verdicts) -> list[dict[str, str]]:
    """Make a row for every level: its verdict, and difference and interval by primary region."""
    rows = []
    for cell in sweep.levels():
        level = verdicts[cell]
        sentence = ", ".join(filter(None, (level.verdict, level.assumption)))
        row = {**cell._asdict(), "seeds": str(level.seeds), "verdict": sentence}
        for region, found in level.regions.items():
            interval = with_interval(found.comparison.estimate, 1 - sweep.alpha)
            row[f"{region} (± {found.margin:g})"] = f"{interval} {found.verdict}"
        rows.append(row)
    return rows


def with_interval(estimate: "Estimate", confidence: float) -> str:
    """Format a difference and its interval, which a single seed does not have."""
    ends = estimate.interval(confidence)
    known = "" if np.isnan(ends).any() else " [{:+.3f}, {:+.3f}]".format(*ends)
    return f"{estimate.difference:+.3f}{known}"


def outcome_rows(sweep: Sweep) -> list[dict[str, str]]:
    """Make a row for the baseline and every level: three outcomes of every region.

    Dice is over the cases that have the region, false alarms are over the others, and runs that
    collapse are counted (`statistics.collapsed`), with an upper bound on their rate.
    """
    from experiments.verdicts import collapses

    rows = []
    for cell in (BASELINE_CELL, *sweep.levels()):
        runs = sweep.runs_of(cell)
        row = {**cell._asdict(), "seeds": str(len(runs))}
        for region in sweep.regions:
            means = np.array([mean_dice(run, region) for run in runs])
            spread = f" ± {means.std(ddof=1):.3f}" if len(means) > 1 else ""
            row[f"Dice {region}"] = f"{means.mean():.3f}{spread}"
        for region in sweep.regions:
            alarms = np.concatenate([run.false_alarms_mm3(region) for run in runs])
            if lacking := int((~np.isnan(alarms)).sum()):
                row[f"false alarms {region}"] = f"{int((alarms > 0).sum())} of {lacking}"
        for region in sweep.regions:
            rate = collapses(sweep, cell, region, sweep.seeds)
            row[f"collapses {region}"] = f"{rate.count} (≤ {rate.bound:.0%})"
        rows.append(row)
    return rows


def mean_dice(run: Run, region: str) -> float:
    """Compute the mean Dice over the cases that have a region; NaN if none has."""
    dice = run.dice(region)
    scored = dice[~np.isnan(dice)]
    return float(scored.mean()) if scored.size else np.nan


def cost_rows(sweep: Sweep) -> list[dict[str, str]]:
    """Make a row for the baseline and every level: size and cost."""
    from experiments.results import Results

    rows = []
    for cell in (BASELINE_CELL, *sweep.levels()):
        results = [Results.read(run.folder) for run in sweep.runs_of(cell)]
        cost = results[0].cost
        rows.append(
            {
                **cell._asdict(),
                "widths": " ".join(map(str, cost.widths)),
                "parameters": f"{cost.parameters:,}",
                "GFLOP a patch": f"{cost.gflops:.2f}",
                "MiB a step": f"{cost.memory_mib:.0f}",
                "training": f"{np.mean([result.fit_s for result in results]):.0f} s",
                "test": f"{np.mean([result.test_s for result in results]):.0f} s",
            }
        )
    return rows


def comparison_rows(sweep: Sweep, verdicts: Verdicts) -> list[dict[str, object]]:
    """Make a row for every level and primary region, with all that was computed."""
    rows = []
    for cell, level in verdicts.items():
        for region, found in level.regions.items():
            comparison, estimate = found.comparison, found.comparison.estimate
            low, high = estimate.interval(1 - sweep.alpha)
            tost_low, tost_high = estimate.interval(1 - 2 * sweep.alpha)
            rows.append(
                {
                    **cell._asdict(),
                    "verdict": level.verdict,
                    "look": level.look + 1,
                    "collapse_bound": level.collapse_bound,
                    "region": region,
                    "region_verdict": found.verdict,
                    "margin": found.margin,
                    "cases": comparison.cases,
                    "left_out": comparison.left_out,
                    "seeds": comparison.seeds,
                    "baseline_only": comparison.baseline_only,
                    "level_only": comparison.level_only,
                    "difference": estimate.difference,
                    "low": low,
                    "high": high,
                    "tost_low": tost_low,
                    "tost_high": tost_high,
                    "standard_error": estimate.standard_error,
                    "seed_share": estimate.seed_share,
                    "p_difference": estimate.p_difference(),
                    "p_equivalence": estimate.p_equivalence(found.margin),
                    "detectable": found.detectable,
                    "provable": found.provable,
                    "median": comparison.median,
                    "p_wilcoxon": comparison.p_wilcoxon,
                }
            )
    return rows


def run_rows(sweep: Sweep) -> list[dict[str, str]]:
    """Make a row for every finished run: its mean Dice and its name."""
    return [
        {
            **run.cell._asdict(),
            "seed": str(run.seed),
            **{region: f"{mean_dice(run, region):.4f}" for region in sweep.regions},
            "run": run.name,
        }
        for run in sweep.finished
    ]


def summary(sweep: Sweep, verdicts: Verdicts) -> list[str]:
    """Say in sentences what came out, and how to read it."""
    words = [level.verdict for level in verdicts.values()]
    counts = "; ".join(f"{words.count(verdict)} {verdict}" for verdict in VERDICT_COLOURS)
    margins = ", ".join(f"{region} {margin:g}" for region, margin in sweep.margin.items())
    looks = ", ".join(f"{look.seeds} ({look.alpha:.2g})" for look in sweep.looks)
    families = " and ".join(str(len(family)) for family in sweep.families())
    total = len(sweep.finished) + len(sweep.missing)
    return [
        f"{len(words)} levels: {counts}.",
        f"{len(sweep.finished)} of {total} planned runs are finished, {len(sweep.cases)} test "
        f"cases. Stated {sweep.stated}, before the first run: margin of Dice {margins} (reason: "
        f"{sweep.reason}); looks after so many seeds, with what each may spend of an error rate of "
        f"{sweep.alpha:g}: {looks}; families of {families or 'no'} levels, which share that rate.",
        '"Different": in some primary region the difference is not 0. "Equivalent": in all of '
        "them it is smaller than the margin, whichever its sign, unless more runs collapse than "
        'is said. "Undecided": these cases and seeds can say neither. A region has a word of its '
        f"own, at the same error rate. Intervals, of {1 - sweep.alpha:.0%}, are over cases and "
        f"seeds (thick in the figure: of {1 - 2 * sweep.alpha:.0%}), before any correction.",
        *sensitivity(sweep, verdicts),
    ]


def sensitivity(sweep: Sweep, verdicts: Verdicts) -> list[str]:
    """Say what half of the levels can tell four times in five, by region, after all corrections.

    Nothing is said of a region in which no level has come to its first look.
    """
    parts = []
    for region, margin in sweep.margin.items():
        found = [
            (level.regions[region].detectable, level.regions[region].provable)
            for level in verdicts.values()
            if not np.isnan(level.regions[region].detectable)
        ]
        if found:
            detectable, provable = np.median(found, axis=0)
            parts.append(
                f"{region}: a difference of {detectable:.3f} comes out as different, and none as "
                f"equivalent within {provable:.3f} (stated: {margin:g})"
            )
    if not parts:
        return []
    return [
        "What half of the levels can tell four times in five at the look that they have come to, "
        f"after the corrections for levels, regions and looks. {'; '.join(parts)}."
    ]


def claims(sweep: Sweep, verdicts: Verdicts) -> dict[str, str]:
    """Say of each factor what the paper claims, and what came out."""
    found = {}
    for factor, claim in CLAIMS.items():
        levels = {cell.level: verdicts[cell] for cell in sweep.levels() if cell.factor == factor}
        if levels:
            here = "; ".join(f"{name} is {in_words(level)}" for name, level in levels.items())
            found[factor] = f"{claim.sentence} Here, {here}. {outcome(claim, levels)}"
    return found


def in_words(level: "LevelVerdict") -> str:
    """Give a verdict with the differences that it rests on."""
    differences = ", ".join(
        f"{region} {found.comparison.estimate.difference:+.3f}"
        for region, found in level.regions.items()
    )
    seeds = "1 seed" if level.seeds == 1 else f"{level.seeds} seeds"
    return f"{level.verdict} ({differences}, {seeds})"


def outcome(claim: Claim, levels: Mapping[str, "LevelVerdict"]) -> str:
    """Say which levels came out better than the baseline, or worse if the claim is that."""
    sign, word = (-1, "worse") if claim.baseline_is_better else (1, "better")
    differing, undecided = [], []
    for name, level in levels.items():
        regions = level.regions.values()
        signed = [sign * found.comparison.estimate.difference for found in regions]
        if any(
            found.verdict.startswith("different") and difference > 0
            for found, difference in zip(regions, signed, strict=True)
        ):
            differing.append(name)
        elif any(found.verdict == "undecided" for found in regions):
            undecided.append(name)
    parts = []
    if differing:
        parts.append(f"So {' and '.join(differing)} came out {word} than the baseline.")
    if undecided:
        parts.append(f"Whether {' or '.join(undecided)} is {word} stays open.")
    return " ".join(parts) or f"So none is {word} than the baseline by as much as the margin."


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write `null_report.md`, `null_report.csv`, `null_report.html` and `forest.png`.

    Args:
        folder: Folder of the sweep.
        output: Folder of the report; by default `report` in the folder of the sweep.

    Returns:
        The page, `null_report.html`.

    Raises:
        InputError: The sweep cannot be read, see `read_sweep`, or its baseline has no finished run.
    """
    from experiments.verdicts import judge

    sweep = read_sweep(folder)
    if not sweep.runs_of(BASELINE_CELL):
        raise InputError(f"{folder}: the baseline has no finished run yet; nothing to compare with")
    verdicts = judge(sweep)
    output = output or folder / "report"
    output.mkdir(parents=True, exist_ok=True)
    if verdicts:
        write_csv(output / "null_report.csv", comparison_rows(sweep, verdicts))
    draw_differences(sweep, verdicts).savefig(output / "forest.png", dpi=120)
    write_text(output / "null_report.md", as_markdown(sweep, verdicts))
    page = output / "null_report.html"
    write_text(page, as_page(sweep, verdicts, output))
    return page


def missing_runs(sweep: Sweep, verdicts: Verdicts) -> list[str]:
    """Name the runs that a verdict waits for, and what they train."""
    from experiments.verdicts import is_settled

    return [
        f"{run.cell.factor}={run.cell.level} seed={run.seed} ({run.name})"
        for run in sweep.missing
        if not is_settled(verdicts, sweep, run.cell, run.seed)
    ]


def as_markdown(sweep: Sweep, verdicts: Verdicts) -> str:
    """Format the report as Markdown, with the figure in a file beside it."""
    rows, missing = verdict_rows(sweep, verdicts), missing_runs(sweep, verdicts)
    parts = [
        "# Null report",
        *summary(sweep, verdicts),
        "![Differences by region](forest.png)",
        "## What the paper says, and what came out",
        "\n".join(f"- `{factor}`: {said}" for factor, said in claims(sweep, verdicts).items())
        or "None of its factors.",
        "## Verdicts",
        markdown(rows) if rows else "None yet.",
        "## Dice, false alarms and collapses",
        markdown(outcome_rows(sweep)),
        "## Cost",
        markdown(cost_rows(sweep)),
        "## Missing",
        "\n".join(f"- {name}" for name in missing) or "Nothing.",
        "Start it again: what is finished is not run anew." if missing else "## Command",
        "```sh\n" + "\n".join(sweep.commands) + "\n```",
        "## Runs",
        markdown(run_rows(sweep)),
    ]
    return "\n\n".join(parts) + "\n"


def as_page(sweep: Sweep, verdicts: Verdicts, output: Path) -> str:
    """Format the report as one HTML page that needs no other file.

    Args:
        sweep: The sweep.
        verdicts: Its verdicts.
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
        sentences=summary(sweep, verdicts),
        claims=claims(sweep, verdicts),
        differences=as_svg(draw_differences(sweep, verdicts)),
        learning_curves=as_svg(draw_learning_curves(sweep)),
        margin=sweep.margin,
        confidence=1 - sweep.alpha,
        with_interval=with_interval,
        levels=sweep.levels(),
        verdicts=verdicts,
        outcomes=outcome_rows(sweep),
        costs=cost_rows(sweep),
        missing=missing_runs(sweep, verdicts),
        regions=sweep.regions,
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
    parser.add_argument(
        "--keep", type=Path, metavar="COPY",
        help="also copy what a report needs of the finished runs, some kilobytes each, to COPY: "
        "with its content in runs/null_report, the sweep goes on from there on any machine",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.keep:
        keep(read_sweep(options.folder), options.keep)
    print(write_report(options.folder, options.output))


if __name__ == "__main__":
    with command():
        main()
