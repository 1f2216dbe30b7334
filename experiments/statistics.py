"""A level of a factor against the baseline: different, equivalent or undecided.

Wanted is the mean over cases and seeds of training, level minus baseline, for the one training set
that all runs share. A score is the sum of its arm's mean, case, arm x case, seed within arm, and a
residual: cases are crossed with all runs, seeds are nested in their arm. Radiology has this design
with readers for seeds, the reader-nested-within-test study, and analyses it by mean squares:
Hillis, "A marginal-mean ANOVA approach for analyzing multireader multicase radiological imaging
data", Stat Med 33 (2014) 330-360, doi 10.1002/sim.5926.

All but Wilcoxon's test and the median rests on means and a t distribution, so on scores whose mean
says something, as Dice does, and an HD95 of 373 mm for an empty mask does not. In simulations
errors of nominally 5 % stay at 5 % or below where seeds vary alike in both arms. They reach 7 %
with 3 seeds, 30 cases and one arm whose seeds all agree (Welch's test does so too), and more than
10 % where the scores of one arm alone are strongly skewed and seeds hardly matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import numpy as np
from scipy import special, stats

POWER = 0.8
Verdict = Literal["different", "equivalent", "undecided"]


class Estimate(NamedTuple):
    """A mean difference and how sure it is; every field (...), NaN where it is not defined.

    Attributes:
        difference: Level minus baseline, in units of the score.
        standard_error: Over cases and seeds, in units of the score.
        degrees_of_freedom: Of its t distribution.
    """

    difference: np.ndarray
    standard_error: np.ndarray
    degrees_of_freedom: np.ndarray

    def interval(self, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        """Both ends of the confidence interval, each (...)."""
        half = self.standard_error * stats.t.isf((1 - confidence) / 2, self.degrees_of_freedom)
        return self.difference - half, self.difference + half

    def p_difference(self) -> np.ndarray:
        """Two-sided p (...) of a difference of 0."""
        return 2 * stats.t.sf(
            np.abs(self.difference) / self.standard_error, self.degrees_of_freedom
        )

    def p_equivalence(self, margin: float) -> np.ndarray:
        """P (...) of a difference of at least `margin` in size: the larger of two one-sided ones.

        It is below alpha exactly where the interval of confidence 1 - 2 alpha lies within the
        margin (Schuirmann 1987, doi 10.1007/BF01068419).
        """
        room = margin - np.abs(self.difference)
        return stats.t.sf(room / self.standard_error, self.degrees_of_freedom)

    def minimum_detectable(self, alpha: float) -> np.ndarray:
        """The true difference (...) that `p_difference` puts below alpha with a power of `POWER`.

        By the noncentral t distribution, at the standard error observed.
        """
        critical = stats.t.isf(alpha / 2, self.degrees_of_freedom)
        return self.standard_error * special.nctdtrinc(self.degrees_of_freedom, 1 - POWER, critical)


def estimate(baseline: np.ndarray, level: np.ndarray) -> Estimate:
    """Mean difference with cases and seeds as random effects.

    The variance is that of the seeds' means, each arm by itself as in Welch's test, plus that of
    the cases' differences, less the residual, which both contain; where the residual exceeds the
    cases' part, that part is taken for 0. Degrees of freedom are Satterthwaite's over both. Hillis
    leaves the cases' part out of these: simulated with ten cases, errors of 5 % became 8 %.

    Where seeds and residual do not vary, this is the paired t test of the cases; where cases'
    differences do not, Welch's test of the seeds' means. The standard error is NaN with fewer than
    two seeds in an arm, with fewer than two cases, and where neither varies: two constants say
    nothing about the next seed.

    Args:
        baseline: Scores (..., S, N) of S seeds in N cases, without NaN.
        level: Scores (..., T, N) of T other seeds in the same cases.
    """
    cases = baseline.shape[-1]
    least = min(cases, baseline.shape[-2], level.shape[-2])
    undefined = np.full(np.broadcast_shapes(baseline.shape[:-2], level.shape[:-2]), np.nan)
    if least == 0:
        return Estimate(undefined, undefined, undefined)
    case_differences = level.mean(-2) - baseline.mean(-2)
    difference = case_differences.mean(-1)
    if least == 1:
        return Estimate(difference, undefined, undefined)

    of_cases = case_differences.var(-1, ddof=1) / cases
    of_seeds, residual = np.zeros_like(difference), np.zeros_like(difference)
    squares = of_cases**2 / (cases - 1)
    for arm in (baseline, level):
        seeds = arm.shape[-2]
        deviations = arm - arm.mean(-2, keepdims=True)
        seed_means = deviations.mean(-1, keepdims=True)
        of_arm = seed_means[..., 0].var(-1, ddof=1) / seeds
        of_seeds = of_seeds + of_arm
        squares = squares + of_arm**2 / (seeds - 1)
        mean_square = ((deviations - seed_means) ** 2).sum((-2, -1)) / (seeds - 1) / (cases - 1)
        residual = residual + mean_square / (seeds * cases)

    variance = of_seeds + np.maximum(of_cases - residual, 0)
    rounding = 8 * np.finfo(float).eps * max(np.abs(baseline).max(), np.abs(level).max())
    variance = np.where(variance > rounding**2, variance, np.nan)
    return Estimate(difference, np.sqrt(variance), variance**2 / squares)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values (..., F) of families (..., F).

    A NaN stays NaN and counts as a test that was planned: it makes the others no smaller.
    """
    known = np.where(np.isnan(p), 1.0, p)
    order = known.argsort(-1)
    steps = np.take_along_axis(known, order, -1) * np.arange(p.shape[-1], 0, -1)
    steps = np.minimum(np.maximum.accumulate(steps, -1), 1)
    return np.where(np.isnan(p), np.nan, np.take_along_axis(steps, order.argsort(-1), -1))


def verdicts(p_difference: np.ndarray, p_equivalence: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The `Verdict` (...) of p values (...).

    Where both tests reject, the difference is there and smaller than what was said to matter before
    the run: "equivalent". NaN is "undecided".
    """
    tests = [p_equivalence < alpha, p_difference < alpha]
    return np.select(tests, ["equivalent", "different"], "undecided")


@dataclass(frozen=True)
class Comparison:
    """Level against baseline; differences are level minus baseline, in units of the score.

    What is not defined is NaN: all but counts without a common case or without a run in one arm;
    what needs a standard error where `estimate` gives none. The verdict is then "undecided".

    Attributes:
        cases: That are scored in every run of both arms.
        left_out: Cases that are NaN in some run, and taken from both arms.
        baseline_seeds: Runs of the baseline.
        level_seeds: Runs of the level.
        margin: The smallest difference that matters, stated before the run.
        alpha: Error rate of each test, in a family after Holm.
        difference: Mean over cases and seeds.
        low: Lower end of its interval of confidence 1 - alpha, over cases and seeds, before Holm.
        high: Upper end.
        tost_low: Lower end of the interval of confidence 1 - 2 alpha: the equivalence test before
            Holm asks whether it lies within the margin.
        tost_high: Upper end.
        standard_error: Of the difference, over cases and seeds.
        degrees_of_freedom: Of its t distribution.
        minimum_detectable: The true difference that would be found with a power of 0.8, at this
            standard error, alone in its family.
        p_difference: Two-sided, that the difference is 0.
        p_equivalence: That it is at least the margin, in either direction.
        median: Over cases, of the difference of the arms' means over seeds.
        p_wilcoxon: Signed ranks of these differences. Conditional on the checkpoints: it asks
            whether these runs differ, and with other seeds may answer otherwise.
        p_difference_holm: Adjusted for its family, as the two that follow.
        p_equivalence_holm: Of the equivalence tests.
        p_wilcoxon_holm: Of the Wilcoxon tests.
        verdict: By `p_difference_holm` and `p_equivalence_holm`, see `verdicts`.
    """

    cases: int
    left_out: int
    baseline_seeds: int
    level_seeds: int
    margin: float
    alpha: float
    difference: float
    low: float
    high: float
    tost_low: float
    tost_high: float
    standard_error: float
    degrees_of_freedom: float
    minimum_detectable: float
    p_difference: float
    p_equivalence: float
    median: float
    p_wilcoxon: float
    p_difference_holm: float = np.nan
    p_equivalence_holm: float = np.nan
    p_wilcoxon_holm: float = np.nan
    verdict: Verdict = "undecided"


def compare(
    baseline: np.ndarray, level: np.ndarray, margin: float, alpha: float = 0.05
) -> Comparison:
    """Compare two arms that were tested on the same cases; alone in its family until `adjust`.

    Args:
        baseline: Scores (S, N) of S seeds, 0 or more, in N cases; NaN where a score is undefined.
        level: Scores (T, N); its seeds have nothing to do with those of the baseline.
        margin: The smallest difference that matters, in units of the score.
        alpha: Error rate of each of the two tests.

    Raises:
        ValueError: Other shapes, infinite scores, a margin that is not positive, or alpha outside
            (0, 0.5).
    """
    baseline, level = np.asarray(baseline, float), np.asarray(level, float)
    if baseline.ndim != 2 or level.ndim != 2 or baseline.shape[1] != level.shape[1]:
        raise ValueError(
            "expected scores (seeds, cases) with the same cases, "
            f"found {baseline.shape} and {level.shape}"
        )
    if np.isinf(baseline).any() or np.isinf(level).any():
        raise ValueError("expected finite scores or NaN, found infinite ones")
    if not 0 < margin < np.inf:
        raise ValueError(f"expected a positive margin, found {margin}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"expected alpha between 0 and 0.5, found {alpha}")

    scored = ~np.isnan(np.concatenate([baseline, level])).any(0)
    baseline, level = baseline[:, scored], level[:, scored]
    found = estimate(baseline, level)
    low, high = found.interval(1 - alpha)
    tost_low, tost_high = found.interval(1 - 2 * alpha)
    median, p_wilcoxon = np.nan, np.nan
    if not np.isnan(found.difference):
        differences = level.mean(0) - baseline.mean(0)
        median = float(np.median(differences))
        p_wilcoxon = 1.0
        if differences.any():
            p_wilcoxon = float(stats.wilcoxon(differences).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    comparison = Comparison(
        cases=int(scored.sum()),
        left_out=int((~scored).sum()),
        baseline_seeds=len(baseline),
        level_seeds=len(level),
        margin=margin,
        alpha=alpha,
        difference=float(found.difference),
        low=float(low),
        high=float(high),
        tost_low=float(tost_low),
        tost_high=float(tost_high),
        standard_error=float(found.standard_error),
        degrees_of_freedom=float(found.degrees_of_freedom),
        minimum_detectable=float(found.minimum_detectable(alpha)),
        p_difference=float(found.p_difference()),
        p_equivalence=float(found.p_equivalence(margin)),
        median=median,
        p_wilcoxon=p_wilcoxon,
    )
    return adjust([comparison])[0]


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with Holm's p values and verdicts of one family, in the same order.

    Tests of difference, of equivalence and Wilcoxon tests are a family each: among all comparisons,
    a false "different" has at most the probability alpha, and so has a false "equivalent".
    """
    adjusted = {
        f"{name}_holm": holm(np.array([getattr(comparison, name) for comparison in comparisons]))
        for name in ("p_difference", "p_equivalence", "p_wilcoxon")
    }
    alpha = np.array([comparison.alpha for comparison in comparisons])
    found = verdicts(adjusted["p_difference_holm"], adjusted["p_equivalence_holm"], alpha)
    return [
        replace(
            comparison,
            **{name: float(p[number]) for name, p in adjusted.items()},
            verdict=cast(Verdict, str(found[number])),
        )
        for number, comparison in enumerate(comparisons)
    ]
