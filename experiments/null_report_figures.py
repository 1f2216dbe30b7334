"""The figures of the null report: differences with their intervals, and learning curves."""

from collections.abc import Mapping
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np

from experiments.sweep import BASELINE, BASELINE_CELL, Cell, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.statistics import Verdict
    from experiments.verdicts import LevelVerdict

VERDICT_COLOURS: "dict[Verdict, str]" = {
    "different": "#d1495b",
    "equivalent": "#2a9d8f",
    "different, but less than the margin": "#4a6fa5",
    "undecided": "#8d99ae",
}
CURVE_COLUMNS = 4


def draw_differences(sweep: Sweep, verdicts: "Mapping[Cell, LevelVerdict]") -> "Figure":
    """Draw the differences of Dice from the baseline, one panel for each primary region.

    The margin is shaded. The thin line is the interval that must leave out 0 for "different", the
    thick line the interval that must lie within the margin for "equivalent"; both are those before
    any correction. The colour of a line is the verdict on its region, that of the name of a level
    the verdict on the level.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    levels = sweep.levels()
    figure = Figure(figsize=(11, 1.8 + 0.32 * len(levels)), layout="constrained")
    axes = figure.subplots(1, len(sweep.margin), sharey=True, squeeze=False)[0]
    for ax, (region, margin) in zip(axes, sweep.margin.items(), strict=True):
        ax.axvspan(-margin, margin, color=VERDICT_COLOURS["equivalent"], alpha=0.12, lw=0)
        ax.axvline(0, color="#444444", lw=0.8)
        reach = []
        for place, cell in enumerate(levels):
            found = verdicts[cell].regions[region]
            colour, estimate = VERDICT_COLOURS[found.verdict], found.comparison.estimate
            interval = estimate.interval(1 - sweep.alpha)
            ax.plot(interval, [place, place], color=colour, lw=1)
            ax.plot(estimate.interval(1 - 2 * sweep.alpha), [place, place], color=colour, lw=3)
            ax.plot(estimate.difference, place, "o", color=colour, ms=5)
            if not np.isnan(interval[0]):
                reach.append(max(np.abs(interval)))
        # What is far wider or further away than the others would squeeze them: it runs off the
        # panel, where a point that does is named.
        limit = max(2 * margin, 1.5 * float(np.median(reach))) if reach else 2 * margin
        ax.set_xlim(-limit, limit)
        for place, cell in enumerate(levels):
            found = verdicts[cell].regions[region]
            difference = float(found.comparison.estimate.difference)
            if abs(difference) > limit:
                ax.text(
                    np.copysign(0.97 * limit, difference),
                    place,
                    f"{'→' if difference > 0 else '←'} {difference:+.2f}",
                    color=VERDICT_COLOURS[found.verdict],
                    ha="right" if difference > 0 else "left",
                    va="center",
                )
        ax.set_title(f"{region}, margin ± {margin:g}")
        ax.set_xlabel("Dice, level minus baseline")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(levels)), [f"{factor} = {level}" for factor, level in levels])
    for label, cell in zip(axes[0].get_yticklabels(), levels, strict=True):
        label.set_color(VERDICT_COLOURS[verdicts[cell].verdict])
    axes[0].set_ylim(max(len(levels), 1) - 0.5, -0.5)
    handles = [
        Line2D([], [], marker="o", color=colour, label=verdict)
        for verdict, colour in VERDICT_COLOURS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_learning_curves(sweep: Sweep) -> "Figure":
    """Draw validation Dice by epoch: one panel for each factor, one line for each run."""
    from matplotlib.figure import Figure

    levels = sweep.levels()
    factors = list(dict.fromkeys(cell.factor for cell in levels)) or [BASELINE]
    columns = min(CURVE_COLUMNS, len(factors))
    lines = -(-len(factors) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for ax, factor in zip(axes, factors, strict=False):
        shown = [BASELINE_CELL, *(cell for cell in levels if cell.factor == factor)]
        for number, cell in enumerate(shown):
            for repeat, run in enumerate(sweep.runs_of(cell)):
                label = cell.level if repeat == 0 else None
                curve = run.learning_curve()
                ax.plot(*curve.T, ".-", color=f"C{number}", alpha=0.7, lw=1, label=label)
        ax.set_title(factor, fontsize=10)
        ax.legend(fontsize=7, frameon=False)
        ax.grid(alpha=0.3)
    for ax in list(axes)[len(factors) :]:
        ax.set_axis_off()
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("validation Dice", fontsize=9)
    return figure


def as_svg(figure: "Figure") -> str:
    """Turn a figure into an <svg> element, to be part of a page."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    _, start, rest = text.getvalue().partition("<svg")
    return start + rest
