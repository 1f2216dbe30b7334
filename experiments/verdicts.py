"""The verdicts of a sweep over factors, look after look, as its plan states them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.run import RunFolder
from experiments.statistics import (
    Comparison,
    Verdict,
    collapsed,
    compare,
    decide,
    of_levels,
    rate_bound,
)
from experiments.sweep import BASELINE_CELL, Cell, Sweep, read_sweep
from hydra_plugins.one_factor_sweeper import PLAN_NAME


@dataclass(frozen=True)
class Rate:
    """How many runs of an arm have never learned a region.

    Attributes:
        count: Their number.
        runs: Number of all runs.
    """

    count: int
    runs: int

    @property
    def bound(self) -> float:
        """Upper bound on the rate, of 95 % confidence."""
        return rate_bound(self.count, self.runs)


@dataclass(frozen=True)
class RegionVerdict:
    """What came out in one primary region.

    Attributes:
        comparison: The comparison with the baseline.
        margin: Smallest difference that matters.
        verdict: What can be said of this region alone, at the error rate of the whole family.
        detectable: True difference that would come out as different four times in five, after the
            correction over levels, regions and looks; NaN as long as there is no error, or before
            the first look.
        provable: Margin within which a true difference of 0 would come out as equivalent; likewise.
    """

    comparison: Comparison
    margin: float
    verdict: Verdict
    detectable: float
    provable: float


@dataclass(frozen=True)
class LevelVerdict:
    """What came out for a level.

    Attributes:
        verdict: The verdict over all primary regions.
        look: Number of the last look that the level has come to, up to the one that decided it; -1
            before the first.
        seeds: Number of seeds of that look; before the first look, those that both arms have.
        regions: By primary region, at that look.
        collapse_bound: Largest upper bound on the rate of collapse, of both arms and all primary
            regions, at that look. "Equivalent" assumes that no more runs collapse than that.
    """

    verdict: Verdict
    look: int
    seeds: int
    regions: dict[str, RegionVerdict]
    collapse_bound: float

    @property
    def assumption(self) -> str:
        """What the verdict assumes, if it is that a difference is small; else an empty string."""
        if self.verdict in ("different", "undecided"):
            return ""
        return f"if at most {self.collapse_bound:.0%} of runs collapse"

    @property
    def is_decided(self) -> bool:
        """Whether the level needs no more runs."""
        return self.verdict != "undecided"


def judge(sweep: Sweep) -> dict[Cell, LevelVerdict]:
    """Give a verdict on every level of the plan, those without a finished run too.

    Each look takes the first seeds of the plan, and all of them: a level comes to a look when the
    level and the baseline have all runs of these seeds. Runs that were trained beyond the look that
    decided a level change nothing.
    """
    return {
        cell: verdict
        for family in sweep.families()
        for cell, verdict in zip(family, _judge_family(sweep, family), strict=True)
    }


def _judge_family(sweep: Sweep, family: Sequence[Cell]) -> list[LevelVerdict]:
    regions, alphas = list(sweep.margin), [look.alpha for look in sweep.looks]
    p_difference, p_equivalence = np.full((2, len(alphas), len(family), len(regions)), np.nan)
    reached = np.full(len(family), -1)  # number of the last look that a level has come to
    for number, look in enumerate(sweep.looks):
        seeds = sweep.seeds[: look.seeds]
        for level, cell in enumerate(family):
            if _has_all(sweep, cell, seeds):
                reached[level] = number
                for place, (region, margin) in enumerate(sweep.margin.items()):
                    found = _compare(sweep, cell, region, seeds).estimate
                    p_difference[number, level, place] = found.p_difference()
                    p_equivalence[number, level, place] = found.p_equivalence(margin)
    decided = decide(*of_levels(p_difference, p_equivalence), alphas)
    shown = np.where(decided.look < 0, reached, decided.look)
    # A region has the whole family's error rate of its own verdict: that of difference is shared
    # out to the regions beforehand, as several can be wrong, while that of equivalence is not.
    unseen = np.arange(len(alphas))[:, None, None] > shown[:, None]
    of_regions = decide(
        np.where(unseen, np.nan, len(regions) * p_difference).swapaxes(-1, -2),
        np.where(unseen, np.nan, p_equivalence).swapaxes(-1, -2),
        alphas,
    ).verdicts()
    return [
        _level_verdict(
            sweep, cell, verdict, dict(zip(regions, words, strict=True)), int(look), len(family)
        )
        for cell, verdict, words, look in zip(
            family, decided.verdicts(), of_regions.T, shown, strict=True
        )
    ]


def _level_verdict(
    sweep: Sweep,
    cell: Cell,
    verdict: Verdict,
    of_regions: dict[str, Verdict],
    look: int,
    levels: int,
) -> LevelVerdict:
    seeds, alpha = sweep.seeds, np.nan
    if look >= 0:
        seeds, alpha = seeds[: sweep.looks[look].seeds], sweep.looks[look].alpha / levels
    regions = {}
    for region, word in of_regions.items():
        comparison = _compare(sweep, cell, region, seeds)
        regions[region] = RegionVerdict(
            comparison=comparison,
            margin=sweep.margin[region],
            verdict=word,
            detectable=float(comparison.estimate.detectable(alpha / len(of_regions))),
            provable=float(comparison.estimate.provable(alpha)),
        )
    bounds = [
        collapses(sweep, arm, region, seeds).bound
        for arm in (BASELINE_CELL, cell)
        for region in regions
    ]
    pairs = next(iter(regions.values())).comparison.seeds
    return LevelVerdict(verdict, look, pairs, regions, collapse_bound=max(bounds))


def _has_all(sweep: Sweep, cell: Cell, seeds: Sequence[int]) -> bool:
    arms = (sweep.runs_of(arm) for arm in (BASELINE_CELL, cell))
    return all({run.seed for run in runs} >= {*seeds} for runs in arms)


def _compare(sweep: Sweep, cell: Cell, region: str, seeds: Sequence[int]) -> Comparison:
    baseline, level = (
        {seed: dice for seed, dice in sweep.dice(arm, region).items() if seed in seeds}
        for arm in (BASELINE_CELL, cell)
    )
    return compare(baseline, level)


def collapses(sweep: Sweep, cell: Cell, region: str, seeds: Sequence[int]) -> Rate:
    """Count the finished runs of a cell, of some seeds, that have never learned a region."""
    runs = [run for run in sweep.runs_of(cell) if run.seed in seeds]
    count = sum(collapsed(run.dice(region), run.false_alarms_mm3(region)) for run in runs)
    return Rate(count, len(runs))


def is_settled(verdicts: Mapping[Cell, LevelVerdict], sweep: Sweep, cell: Cell, seed: int) -> bool:
    """Tell whether a run can change no verdict: its level was decided without its seed.

    A run of the baseline can change none if all levels were.
    """
    levels = verdicts.values() if cell == BASELINE_CELL else [verdicts[cell]]
    place = sweep.seeds.index(seed)
    return all(v.is_decided and place >= sweep.looks[v.look].seeds for v in levels)


def is_needless(folder: RunFolder, factor: str, level: str, seed: int) -> bool:
    """Tell whether a run that is about to be trained `is_settled` by its sweep, if it has one.

    Args:
        folder: Folder of the run, in that of its sweep.
        factor: Factor of its cell; "none" outside of a sweep over factors.
        level: Level of its cell.
        seed: Its seed.

    Raises:
        InputError: The plan cannot be read, or runs were tested on different cases.
    """
    if factor == "none" or not (folder.path.parent / PLAN_NAME).is_file():
        return False
    sweep = read_sweep(folder.path.parent)
    return is_settled(judge(sweep), sweep, Cell(factor, str(level)), seed)
