"""Compare levels of a factor with the baseline: differences, their errors, looks and verdicts.

We estimate the mean difference of a score, level minus baseline, over test cases and over seeds of
the training, for the one training set that all runs share. A seed fixes weights, patches and noise
in both arms, so that seeds are crossed with arms, as cases are. Radiology knows this design as the
study of several readers and cases, where our seeds are its readers: Obuchowski & Rockette, Commun
Stat Simul 24 (1995) 285-308; Hillis, Stat Med 33 (2014) 330-360, doi 10.1002/sim.5926.

What follows suits scores from 0 to 1 whose mean is meaningful, such as Dice, and not HD95 with 373
mm for an empty mask. A run that never learns a region counts with the scores that it has; how often
that happens has a bound of its own (`collapsed`, `rate_bound`).

`python -m experiments.benchmarks.error_rates` measures the error rates of the whole procedure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np
from scipy import special, stats

POWER = 0.8  # with which a test finds what is called detectable or provable
COLLAPSED_DICE = 0.05  # see `collapsed`
Verdict = Literal["different", "equivalent", "different, but less than the margin", "undecided"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)  # in this order

Scores = Mapping[int, np.ndarray]  # seed -> scores (N,) in N cases, NaN where undefined


class Estimate(NamedTuple):
    """A mean difference and its uncertainty.

    The variance of the difference has parts, one for each random effect, each with degrees of
    freedom of its own. The ratio of the difference and its standard error is taken to have the
    mixture of the parts' t distributions, weighted by the parts' shares of the variance. Cochran
    (Biometrics 20 (1964) 191-195) weights the quantiles in this way; we weight the probabilities,
    which gives p values without a search. The mixture lies between the t distributions of the
    parts, so that it acts like one with at least the fewest degrees of freedom of any part, usually
    S - 1; where one part is all, it is the t distribution of that part.

    Satterthwaite's degrees of freedom, which Hillis uses too, are themselves estimates, and much
    too large where the seeds happen to agree. On normal effects, with 5 seeds and 13 cases, tests
    at 5 % err up to 1.1 times as often as stated (Hillis' 1.5 times), and tests at .05 %, where a
    correction over many levels reads them, 4 times (8 times); with 3 seeds 1.3 and 14 times. The
    mixture stays within 1.05 times at 5 %, and below 1 at most settings (1.1 with 16 seeds and 13
    cases).

    Attributes:
        difference: Mean of level minus baseline (...), in units of the score; NaN without scores.
        parts: Parts (..., P) of the variance of the difference; NaN where they are not defined.
        degrees_of_freedom: Degrees of freedom (P,) of the parts.
    """

    difference: np.ndarray
    parts: np.ndarray
    degrees_of_freedom: np.ndarray

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error (...) of the difference, in units of the score."""
        return np.sqrt(self.parts.sum(-1))

    @property
    def seed_share(self) -> np.ndarray:
        """Share (...) of the variance that is due to seeds; the rest is due to cases."""
        return self.parts[..., :-1].sum(-1) / self.parts.sum(-1)

    def tail(self, ratio: np.ndarray) -> np.ndarray:
        """Compute the probability (...) that difference / standard error exceeds a ratio (...)."""
        weights = self.parts / self.parts.sum(-1, keepdims=True)
        return (weights * special.stdtr(self.degrees_of_freedom, -ratio[..., None])).sum(-1)

    def quantile(self, tail: float) -> np.ndarray:
        """Compute the ratio (...) that is exceeded with a probability of `tail`, below 0.5.

        NaN leads to NaN.
        """
        ends = special.stdtrit(self.degrees_of_freedom, 1 - tail)
        undefined = np.isnan(self.parts).any(-1) | np.isnan(tail)
        low = np.full(undefined.shape, ends.min())
        high = np.full(undefined.shape, ends.max())
        for _ in range(60):  # bisection, down to rounding
            middle = (low + high) / 2
            above = self.tail(middle) > tail
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(undefined, np.nan, high)

    def interval(self, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        """Compute the lower and the upper end (...) of the confidence interval.

        They end at -1 and 1, as differences of scores between 0 and 1 do.
        """
        half = self.standard_error * self.quantile((1 - confidence) / 2)
        return np.maximum(self.difference - half, -1), np.minimum(self.difference + half, 1)

    def p_difference(self) -> np.ndarray:
        """Compute the two-sided p value (...) of the hypothesis that the difference is 0."""
        return 2 * self.tail(np.abs(self.difference) / self.standard_error)

    def p_equivalence(self, margin: float | np.ndarray) -> np.ndarray:
        """Compute the p value (...) of the hypothesis that the difference is at least the margin.

        It is the larger p value of two one-sided tests, one for each sign of the difference. It is
        below alpha exactly if the confidence interval of level 1 - 2 alpha lies within the margin
        (Schuirmann 1987, doi 10.1007/BF01068419).
        """
        return self.tail((margin - np.abs(self.difference)) / self.standard_error)

    def detectable(self, alpha: float) -> np.ndarray:
        """Compute the true difference (...) that a test of error rate alpha finds with `POWER`.

        The standard error counts as known, here and in `provable`.
        """
        return self.standard_error * (self.quantile(alpha / 2) + self.quantile(1 - POWER))

    def provable(self, alpha: float) -> np.ndarray:
        """Compute the margin (...) within which a true difference of 0 is shown with `POWER`.

        Args:
            alpha: Error rate of the test of equivalence.
        """
        return self.standard_error * (self.quantile(alpha) + self.quantile((1 - POWER) / 2))


def _defined(difference: np.ndarray, parts: Sequence[np.ndarray], degrees: list[int]) -> Estimate:
    """Make an estimate, without an error where nothing varies but rounding of scores up to 1."""
    stacked = np.stack(parts, -1)
    varies = stacked.sum(-1, keepdims=True) > (8 * np.finfo(float).eps) ** 2
    return Estimate(difference, np.where(varies, stacked, np.nan), np.array(degrees))


def _without_error(difference: np.ndarray, parts: int) -> Estimate:
    undefined = np.full((*difference.shape, parts), np.nan)
    return Estimate(difference, undefined, np.ones(parts))


def crossed(differences: np.ndarray) -> Estimate:
    """Estimate the mean difference between arms that share their seeds and their cases.

    For seed s and case n, level minus baseline is

        d[s, n] = mean + seed[s] + case[n] + residual[s, n]

    with independent random effects of variances A, B and E. What a seed or a case adds to both arms
    alike cancels: A and B are twice the variances of the interactions of an arm with the reader and
    with the case in the model of Obuchowski & Rockette. The mean over all d has the variance

        A / S + B / N + E / (S N) = ((N A + E) + (S B + E) - E) / (S N)

    The expected mean squares of the two-way table are N A + E between seeds, S B + E between cases,
    and E of the residual. So the estimate is

        MS_seed / (S N) + max(MS_case - MS_residual, 0) / (S N)

    which is that of Hillis (2014), in terms of differences. The first part, of seeds with S - 1
    degrees of freedom, contains the residual; the second, of cases, is given N - 1.

    If differences vary between seeds alone, this is the paired t test over seeds; if they vary
    between cases alone, the paired t test over cases. The error is NaN with fewer than two seeds or
    cases, and if nothing varies: two constants say nothing about the next seed.

    Args:
        differences: Level minus baseline (..., S, N) for S seeds and N cases, without NaN.
    """
    seeds, cases = differences.shape[-2:]
    if min(seeds, cases) == 0:
        return _without_error(np.full(differences.shape[:-2], np.nan), 2)
    of_seeds, of_cases = differences.mean(-1), differences.mean(-2)
    difference = of_seeds.mean(-1)
    if min(seeds, cases) == 1:
        return _without_error(difference, 2)
    residuals = differences - of_seeds[..., None] - of_cases[..., None, :]
    residuals = residuals + difference[..., None, None]
    residual = (residuals**2).sum((-2, -1)) / ((seeds - 1) * (cases - 1)) / (seeds * cases)
    seed_part = of_seeds.var(-1, ddof=1) / seeds  # MS_seed / (S N)
    case_part = np.maximum(of_cases.var(-1, ddof=1) / cases - residual, 0)
    return _defined(difference, [seed_part, case_part], [seeds - 1, cases - 1])


def nested(baseline: np.ndarray, level: np.ndarray) -> Estimate:
    """Estimate the mean difference between arms that share their cases, but no seed.

    The variance has one part for the seeds of each arm, as in Welch's test, and one for the cases'
    differences, less the residual that the others contain. Where the residual exceeds the last
    part, that counts as 0. The error is NaN where that of `crossed` is.

    Args:
        baseline: Scores (..., S, N) of S seeds in N cases, without NaN.
        level: Scores (..., T, N) of T other seeds in the same N cases.
    """
    cases = baseline.shape[-1]
    least = min(cases, baseline.shape[-2], level.shape[-2])
    if least == 0:
        shape = np.broadcast_shapes(baseline.shape[:-2], level.shape[:-2])
        return _without_error(np.full(shape, np.nan), 3)
    case_differences = level.mean(-2) - baseline.mean(-2)
    difference = case_differences.mean(-1)
    if least == 1:
        return _without_error(difference, 3)
    parts, residual = [], np.zeros_like(difference)
    for arm in (baseline, level):
        seeds = arm.shape[-2]
        deviations = arm - arm.mean(-2, keepdims=True)
        seed_means = deviations.mean(-1, keepdims=True)
        parts.append(seed_means[..., 0].var(-1, ddof=1) / seeds)
        mean_square = ((deviations - seed_means) ** 2).sum((-2, -1)) / (seeds - 1) / (cases - 1)
        residual = residual + mean_square / (seeds * cases)
    case_part = np.maximum(case_differences.var(-1, ddof=1) / cases - residual, 0)
    degrees = [baseline.shape[-2] - 1, level.shape[-2] - 1, cases - 1]
    return _defined(difference, [*np.broadcast_arrays(*parts, case_part)], degrees)


@dataclass(frozen=True)
class Comparison:
    """The comparison of a level with the baseline, in one region.

    Attributes:
        cases: Number of cases that are scored in every run that counts.
        left_out: Number of cases that are NaN in some run and are left out of both arms.
        seeds: Number of seeds that both arms have. If it is 0 the arms are compared as independent.
        baseline_only: Number of seeds that only the baseline has; left out if `seeds` is not 0.
        level_only: Number of seeds that only the level has; likewise.
        estimate: The difference and its error, over cases and seeds; scalars.
        median: Median over the cases of the difference between the arms' means over seeds.
        p_wilcoxon: P value of Wilcoxon's signed-rank test of these differences. It is conditional
            on the checkpoints: it asks whether these runs differ, which says little about runs with
            other seeds. It takes no part in a verdict.
    """

    cases: int
    left_out: int
    seeds: int
    baseline_only: int
    level_only: int
    estimate: Estimate
    median: float
    p_wilcoxon: float


def compare(baseline: Scores, level: Scores) -> Comparison:
    """Compare two arms that were tested on the same cases, seed by seed.

    Seeds that one arm lacks are left out of the other. Arms without a common seed cannot pair:
    their seeds are independent, and `nested` compares them.

    Args:
        baseline: Scores by seed, none or more.
        level: Scores by seed in the same cases.

    Raises:
        ValueError: The number of cases differs, or a score lies outside [0, 1].
    """
    arrays = [np.asarray(scores, float) for arm in (baseline, level) for scores in arm.values()]
    if len({array.shape for array in arrays}) > 1 or any(array.ndim != 1 for array in arrays):
        raise ValueError(f"expected scores of the same cases, found {[a.shape for a in arrays]}")
    if any((array < 0).any() or (array > 1).any() for array in arrays):
        raise ValueError("expected scores from 0 to 1 or NaN, found others")
    common = [seed for seed in baseline if seed in level]
    cases = len(arrays[0]) if arrays else 0
    first, second = (
        np.array([arm[seed] for seed in chosen], float).reshape(len(chosen), cases)
        for arm, chosen in ((baseline, common or baseline), (level, common or level))
    )
    scored = ~np.isnan(np.concatenate([first, second])).any(0)
    first, second = first[:, scored], second[:, scored]
    found = crossed(second - first) if common else nested(first, second)
    median = p_wilcoxon = np.nan
    if not np.isnan(found.difference):
        differences = second.mean(0) - first.mean(0)
        median, p_wilcoxon = float(np.median(differences)), 1.0
        if differences.any():
            p_wilcoxon = float(stats.wilcoxon(differences).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    return Comparison(
        cases=int(scored.sum()),
        left_out=int((~scored).sum()),
        seeds=len(common),
        baseline_only=len(baseline) - len(common),
        level_only=len(level) - len(common),
        estimate=found,
        median=median,
        p_wilcoxon=p_wilcoxon,
    )


class Interval(NamedTuple):
    """A score with its confidence interval; the ends are NaN if nothing says how it varies."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Ratio(NamedTuple):
    """Counts over totals, such as lesions found over all lesions, of one arm.

    Patients and seeds count as random: lesions of one patient are not independent, and neither are
    the counts of one seed. To first order, the ratio r = sum of counts / sum of totals varies as
    the mean of (count - r total) / (mean total) over patients and seeds does, whose variance is
    that of `crossed`. How often the intervals cover is in experiments/results/benchmarks.

    Attributes:
        counts: (S, N) of S seeds in N patients.
        totals: (N,) of the patients, of which one at least is positive.
    """

    counts: np.ndarray
    totals: np.ndarray

    @property
    def value(self) -> float:
        """The ratio, over all patients and seeds."""
        return float(self.counts.mean(0).sum() / self.totals.sum())

    def deviations(self) -> np.ndarray:
        """Compute what each seed and patient adds to the ratio (S, N), with a mean of 0."""
        return (self.counts - self.value * self.totals) / self.totals.mean()

    def interval(self, confidence: float = 0.95, *, share: bool) -> Interval:
        """Compute the interval on a scale on which it is about symmetric: logits, or logarithms.

        Args:
            confidence: How often it covers the ratio over all patients and seeds.
            share: Whether the ratio lies between 0 and 1.
        """
        value = self.value
        half = _half_width(self.deviations(), confidence)
        if value <= 0 or (share and value >= 1):
            return Interval(value, float("nan"), float("nan"))
        ends = np.array([-half, half])
        if share:
            low, high = special.expit(special.logit(value) + ends / (value * (1 - value)))
        else:
            low, high = value * np.exp(ends / value)
        return Interval(value, float(low), float(high))

    def minus(self, other: "Ratio", confidence: float = 0.95) -> Interval:
        """Compute the difference to another arm, paired by seed and by patient.

        Args:
            other: The same seeds, patients and totals.
            confidence: How often the interval covers the difference over all patients and seeds.
        """
        difference = self.value - other.value
        half = _half_width(self.deviations() - other.deviations(), confidence)
        return Interval(difference, difference - half, difference + half)


def _half_width(deviations: np.ndarray, confidence: float) -> float:
    estimate = crossed(deviations)
    return float(estimate.standard_error * estimate.quantile((1 - confidence) / 2))


class Prospect(NamedTuple):
    """What a comparison will be able to tell four times in five (`POWER`); NaN if that is unknown.

    Attributes:
        detectable: The true difference that would come out as different.
        provable: The margin within which a true difference of 0 would come out as equivalent.
    """

    detectable: float
    provable: float


def prospect(
    differences: np.ndarray, seeds: int, alpha: float, levels: int, regions: int
) -> Prospect:
    """Predict what a comparison with another number of seeds can tell, from a pilot.

    Of the variances of `crossed`, that of seeds shrinks with their number, and that of cases does
    not. Both tests are those of the first step of the correction.

    Args:
        differences: Level minus baseline (S, N) of at least two pilot seeds; NaN where undefined.
        seeds: Number of seeds that are planned, at least two.
        alpha: Error rate that the last look may spend.
        levels: Number of levels of the family.
        regions: Number of primary regions.
    """
    scored = differences[:, ~np.isnan(differences).any(0)]
    pilot = crossed(scored)
    scale = np.array([len(scored) / seeds, 1.0])
    degrees = np.array([seeds - 1, max(scored.shape[1] - 1, 1)])
    planned = Estimate(np.zeros(()), pilot.parts * scale, degrees)
    return Prospect(
        detectable=float(planned.detectable(alpha / levels / regions)),
        provable=float(planned.provable(alpha / levels)),
    )


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust the p values of families of F tests, (..., F), by Holm's method.

    NaN stays NaN. It counts as a test that was planned, as if its p value were 1.
    """
    known = np.where(np.isnan(p), 1.0, p)
    order = known.argsort(-1)
    steps = np.take_along_axis(known, order, -1) * np.arange(p.shape[-1], 0, -1)
    steps = np.minimum(np.maximum.accumulate(steps, -1), 1)
    return np.where(np.isnan(p), np.nan, np.take_along_axis(steps, order.argsort(-1), -1))


def of_levels(p_difference: np.ndarray, p_equivalence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn the p values of R regions, (..., R), into those of their levels, (...).

    A level differs if any region does: the smallest p value after Holm's correction over the
    regions. It is equivalent if all regions are: the largest p value, which needs no correction
    (intersection-union test, Berger 1982, doi 10.1080/00401706.1982.10487790). NaN in a region
    leads to NaN.
    """
    return holm(p_difference).min(-1), p_equivalence.max(-1)


def spending(looks: Sequence[int], alpha: float) -> list[float]:
    """Compute the error rate that each look may spend, so that all looks together spend alpha.

    Up to a look, alpha times the square of the fraction of all seeds is spent, one of the spending
    functions of Kim & DeMets (Biometrika 74 (1987) 149-154), after the principle of Lan & DeMets
    (Biometrika 70 (1983) 659-663). The test of a look has the error rate that is new, whatever came
    out before. That looks share data would allow more; this bound needs no model of how they do.

    >>> spending([5, 8, 10], 0.05)
    [0.0125, 0.0195, 0.018]

    Args:
        looks: Numbers of seeds at which a verdict may be given, in rising order.
        alpha: Error rate over all looks.
    """
    spent = [alpha * (look / looks[-1]) ** 2 for look in (0, *looks)]
    return [round(after - before, 12) for before, after in pairwise(spent)]


class Decisions(NamedTuple):
    """What came out of all looks, for every level (..., M).

    Attributes:
        different: Whether the level was found to differ.
        equivalent: Whether it was found to lie within its margins.
        look: Number of the look that decided it; -1 if none did.
    """

    different: np.ndarray
    equivalent: np.ndarray
    look: np.ndarray

    def verdicts(self) -> np.ndarray:
        """Return the `Verdict` (..., M) of each level."""
        both = self.different & self.equivalent
        words = np.array(VERDICTS, object)
        return words[np.select([both, self.different, self.equivalent], [2, 0, 1], 3)]


def decide(
    p_difference: np.ndarray, p_equivalence: np.ndarray, alphas: Sequence[float]
) -> Decisions:
    """Decide on the M levels of a family, look after look.

    At each look, Holm's correction over the levels is applied to the tests of difference, and to
    those of equivalence, at the error rate of the look. A level that is decided is not tested
    again. It leaves the family of the test that decided it, as in Holm's next step, and stays in
    the other's. For each of the two tests, the probability of any false rejection at any look is at
    most alpha: the first one happens while all U true hypotheses are in the family, so at a p value
    of at most the error rate of the look / U, which each of these U has with that probability.

    Args:
        p_difference: P values (K, ..., M) of K looks; NaN for a level that has not come so far, and
            then counts as if it were 1.
        p_equivalence: Likewise.
        alphas: Error rate of each look (K,), see `spending`.
    """
    shape = p_difference.shape[1:]
    different, equivalent, look = np.zeros(shape, bool), np.zeros(shape, bool), np.full(shape, -1)
    for number, alpha in enumerate(alphas):
        undecided = ~(different | equivalent)
        for found, p in ((different, p_difference), (equivalent, p_equivalence)):
            tested = np.where(found, 0.0, np.where(undecided, p[number], np.nan))
            found |= holm(tested) < alpha
        look[undecided & (different | equivalent)] = number
    return Decisions(different, equivalent, look)


def collapsed(dice: np.ndarray, false_alarms: np.ndarray) -> bool:
    """Tell whether a run never learned a region, the only place that says so.

    The mean Dice over the cases that have the region is below `COLLAPSED_DICE`, and the region is
    predicted in none of the cases that lack it.

    Args:
        dice: Dice (N,) of the region in every case, NaN where a case lacks it.
        false_alarms: What is predicted of the region (N,) in cases that lack it, NaN in the others.
    """
    scored = dice[~np.isnan(dice)]
    return bool(scored.size and scored.mean() < COLLAPSED_DICE and not (false_alarms > 0).any())


def rate_bound(count: int, runs: int, confidence: float = 0.95) -> float:
    """Compute the upper bound on a rate that was seen `count` times in a number of runs.

    The bound is exact and one-sided (Clopper & Pearson 1934, doi 10.1093/biomet/26.4.404): at any
    higher rate, so few would be seen with a probability of less than 1 - confidence.

    >>> round(rate_bound(0, 3), 3)
    0.632
    """
    return 1.0 if count == runs else float(special.betaincinv(count + 1, runs - count, confidence))
