"""Comparisons of two arms: against numbers computed by hand, against scipy, and in simulations.

A simulated rate passes if it exceeds its bound by at most three standard errors of the simulation.
The seeds are fixed, so that no test fails by chance.
"""

from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats

from experiments.statistics import (
    Comparison,
    Estimate,
    adjust,
    compare,
    estimate,
    holm,
    verdicts,
)

ALPHA = 0.05
DATA_SETS = 6000  # of a simulation
# The means of the two seeds are 2 and 4, and the residual is 0.
BASELINE = np.array([[1.0, 2, 3], [3, 4, 5]])
# Standard deviations between seeds, of arm x case, and of the residual.
SPREADS = [(0.0, 1.0, 0.5), (0.0, 0.0, 1.0), (0.3, 1.0, 0.5), (1.0, 0.3, 0.3)]


def at_most(rate: float, data_sets: int) -> float:
    """Return the highest simulated rate that is compatible with a true rate."""
    return rate + 3 * np.sqrt(rate * (1 - rate) / data_sets)


def arms(
    seeds: tuple[int, ...],
    cases: int,
    spread: tuple[float, float, float],
    data_sets: int = DATA_SETS,
    seed: int = 0,
) -> list[np.ndarray]:
    """Simulate the scores (data_sets, S, N) of arms that have the same mean.

    Args:
        seeds: Number of seeds S of each arm.
        cases: Number of cases N.
        spread: Standard deviations between seeds, of arm x case, and of the residual.
        data_sets: Number of simulated studies.
        seed: Seed of the simulation.
    """
    draw = np.random.default_rng(seed).standard_normal
    between, interaction, residual = spread
    case = draw((data_sets, 1, cases))
    return [
        case
        + interaction * draw((data_sets, 1, cases))
        + between * draw((data_sets, number, 1))
        + residual * draw((data_sets, number, cases))
        for number in seeds
    ]


def decide(found: Estimate, margin: float) -> np.ndarray:
    return verdicts(found.p_difference(), found.p_equivalence(margin), np.array(ALPHA))


def true_error(seeds: tuple[int, int], cases: int, spread: tuple[float, float, float]) -> float:
    """Compute the standard error of the difference from the parameters of a simulation."""
    between, interaction, residual = np.square(spread)
    seed_variance = between + residual / cases
    return np.sqrt(seed_variance / seeds[0] + seed_variance / seeds[1] + 2 * interaction / cases)


def test_by_hand():
    """The arms differ by 1, 1 and 4 in the cases; the residual mean square of the level is 2."""
    comparison = compare(BASELINE, np.array([[2.0, 4, 9], [4, 4, 7]]), margin=3)
    assert comparison.difference == pytest.approx(2)
    assert comparison.median == pytest.approx(1)
    # The baseline's seeds contribute 2 / 2, the level's 0, the cases 3 / 3, and the residual of
    # 2 / (2 x 3) is subtracted.
    assert comparison.standard_error == pytest.approx(np.sqrt(1 + 1 - 1 / 3))
    assert comparison.degrees_of_freedom == pytest.approx((5 / 3) ** 2 / (1**2 / 1 + 1**2 / 2))
    assert comparison.p_wilcoxon == pytest.approx(2 / 8)  # all three of one sign


def test_by_hand_where_the_residual_exceeds_the_cases():
    """The arms differ by 1 in every case: t is 1 with one degree of freedom, a Cauchy variable."""
    comparison = compare(BASELINE, np.array([[2.0, 4, 6], [4, 4, 4]]), margin=2)
    assert (comparison.difference, comparison.standard_error) == (1, 1)
    assert comparison.degrees_of_freedom == pytest.approx(1)
    assert comparison.p_difference == pytest.approx(0.5)
    assert comparison.p_equivalence == pytest.approx(0.25)
    assert comparison.low == pytest.approx(1 - np.tan(0.475 * np.pi))
    assert comparison.high == pytest.approx(1 + np.tan(0.475 * np.pi))
    assert comparison.tost_high == pytest.approx(1 + np.tan(0.45 * np.pi))
    assert comparison.verdict == "undecided"


def test_without_variance_of_seeds_it_is_the_paired_t_test():
    draw = np.random.default_rng(1)
    baseline, level = draw.random(12), draw.random(12)
    comparison = compare(np.tile(baseline, (3, 1)), np.tile(level, (4, 1)), margin=0.1)
    oracle = stats.ttest_rel(level, baseline)
    assert comparison.p_difference == pytest.approx(oracle.pvalue)
    assert comparison.degrees_of_freedom == pytest.approx(11)
    for low, high, confidence in (
        (comparison.low, comparison.high, 0.95),
        (comparison.tost_low, comparison.tost_high, 0.9),
    ):
        assert (low, high) == pytest.approx(tuple(oracle.confidence_interval(confidence)))
    sides = [
        stats.ttest_rel(level, baseline - 0.1, alternative="greater").pvalue,
        stats.ttest_rel(level, baseline + 0.1, alternative="less").pvalue,
    ]
    assert comparison.p_equivalence == pytest.approx(max(sides))
    assert comparison.p_wilcoxon == pytest.approx(stats.wilcoxon(level - baseline).pvalue)


def test_without_variance_of_differences_it_is_welch_on_the_seeds():
    draw = np.random.default_rng(2)
    case, a, b = draw.random(7), draw.random((3, 1)), 0.2 + 2 * draw.random((5, 1))
    comparison = compare(case + a, case + b, margin=0.1)
    oracle = stats.ttest_ind(b[:, 0], a[:, 0], equal_var=False)
    assert comparison.p_difference == pytest.approx(oracle.pvalue)
    assert comparison.degrees_of_freedom == pytest.approx(oracle.df)


def test_the_residual_counts_once():
    """The mean of the squared standard error equals the variance of the differences."""
    seeds, cases, spread = (3, 5), 10, (0.3, 1.0, 1.0)
    found = estimate(*arms(seeds, cases, spread))
    expected = true_error(seeds, cases, spread) ** 2
    assert np.mean(found.standard_error**2) == pytest.approx(expected, rel=0.02)
    assert np.var(found.difference) == pytest.approx(expected, rel=0.05)


def rates_of_error(found: Estimate, margin: float) -> list[float]:
    """Compute the rate of a false "different", and of a false "equivalent" at either margin.

    The first is computed with a margin of nearly 0, because "equivalent" takes the place of
    "different" within a larger one.
    """
    shifted = [found._replace(difference=found.difference + d) for d in (margin, -margin)]
    different = np.mean(decide(found, 1e-9) == "different")
    return [different, *(np.mean(decide(other, margin) == "equivalent") for other in shifted)]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
    ("seeds", "cases"),
    [((3, 3), 10), ((3, 3), 30), ((5, 5), 10), ((5, 5), 30), ((3, 5), 10)],
)
def test_error_rates(seeds: tuple[int, int], cases: int, spread: tuple[float, float, float]):
    found = estimate(*arms(seeds, cases, spread))
    rates = rates_of_error(found, 5 * true_error(seeds, cases, spread))
    assert max(rates) <= at_most(ALPHA, DATA_SETS)


def test_error_rates_where_one_arm_is_less_stable():
    """The rate stays at the 7 % that the module states, where all seeds of one arm agree."""
    steady, _ = arms((3, 3), 30, (0.0, 0.5, 0.5))
    _, unstable = arms((3, 3), 30, (0.5, 0.5, 0.5))
    rates = rates_of_error(estimate(steady, unstable), margin=2)
    assert max(rates) <= at_most(0.07, DATA_SETS)


@pytest.mark.parametrize(("seeds", "cases"), [(3, 10), (5, 30)])
def test_a_duplicate_of_the_baseline_on_scores_like_dice(seeds: int, cases: int):
    """Scores are skewed and bounded, and cases hard for both arms; only the seeds differ."""
    draw = np.random.default_rng(3)
    hardness = draw.normal(1.5, 1.2, (DATA_SETS, 1, cases))
    baseline, level = (
        1 / (1 + np.exp(-hardness - draw.normal(0, 0.1, (DATA_SETS, seeds, 1)) + noise))
        for noise in draw.normal(0, 0.3, (2, DATA_SETS, seeds, cases))
    )
    found = decide(estimate(baseline, level), margin=1e-9)
    assert np.mean(found == "different") <= at_most(ALPHA, DATA_SETS)


def test_wilcoxon_is_conditional_on_the_checkpoints():
    """It gives no verdict because it takes the difference between seeds for an effect."""
    pairs = zip(*arms((3, 3), 20, (0.3, 0.1, 0.1), 100), strict=True)
    found = [compare(baseline, level, margin=0.1) for baseline, level in pairs]
    assert np.mean([c.p_wilcoxon < ALPHA for c in found]) > 0.3
    assert np.mean([c.verdict == "different" for c in found]) <= at_most(ALPHA, 100)


def test_power():
    spread = (0.005, 0.01, 0.01)
    baseline, level = arms((3, 3), 20, spread)
    assert np.mean(decide(estimate(baseline, level), 0.03) == "equivalent") > 0.95
    assert np.mean(decide(estimate(baseline, level + 0.05), 0.03) == "different") > 0.95
    # With a margin far below the noise, no data set is large enough for a verdict.
    assert np.mean(decide(estimate(baseline, level), 0.001) == "undecided") > 0.9


def test_a_planted_effect_is_different():
    """One family has a crippled level and a duplicate of the baseline."""
    baseline, duplicate, crippled = (
        0.8 + 0.05 * scores[0] for scores in arms((3, 3, 3), 15, (0.1, 0.2, 0.2), 1, seed=4)
    )
    found = adjust([compare(baseline, arm, 0.03) for arm in (duplicate, crippled - 0.15)])
    assert [comparison.verdict for comparison in found] == ["equivalent", "different"]
    assert found[1].difference == pytest.approx(-0.15, abs=0.02)


def test_families_that_share_a_baseline():
    """In 95 % of families of ten levels there is no false "different" or "equivalent"."""
    families, spread = 3000, (0.3, 0.5, 0.5)
    baseline, *levels = arms((3,) * 11, 15, spread, families)
    margin = 5 * true_error((3, 3), 15, spread)
    found = estimate(baseline[:, None], np.stack(levels, 1))
    assert found.difference.shape == (families, 10)
    at_margin = found._replace(difference=found.difference + margin)
    for p in (found.p_difference(), at_margin.p_equivalence(margin)):
        assert np.mean((holm(p) < ALPHA).any(1)) <= at_most(ALPHA, families)
        assert np.mean((p < ALPHA).any(1)) > 0.15  # without Holm's correction


def test_minimum_detectable_effect():
    """By the noncentral t distribution, the power of the two-sided test at this effect is 0.8."""
    for seeds, cases in ((2, 5), (3, 10), (10, 100)):
        baseline, level = (a[0] for a in arms((seeds, seeds), cases, (0.3, 0.5, 0.5), 1))
        comparison = compare(baseline, level, margin=1, alpha=0.01)
        shift = comparison.minimum_detectable / comparison.standard_error
        critical = stats.t.isf(0.005, comparison.degrees_of_freedom)
        assert stats.nct.sf(critical, comparison.degrees_of_freedom, shift) == pytest.approx(0.8)


def naive_holm(p: list[float]) -> list[float]:
    """Adjust p values by Holm's method in a loop."""
    adjusted, running = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = running
    return adjusted


def test_holm():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.02, np.nan, 0.5])) == pytest.approx([0.06, np.nan, 1], nan_ok=True)
    families = np.random.default_rng(5).random((20, 7)).round(1) ** 3  # with ties
    assert holm(families) == pytest.approx(np.array([naive_holm(list(p)) for p in families]))


def test_adjusting_a_family():
    draw = np.random.default_rng(6)
    baseline = draw.normal(0, 0.02, (3, 12))
    levels = [baseline.mean(0) + draw.normal(mean, 0.02, (3, 12)) for mean in (0, 0.025, 0.2)]
    alone = [compare(baseline, level, margin=0.05) for level in levels]
    for one in alone:
        assert one.p_difference_holm == one.p_difference
        assert adjust([one]) == [one]
    family = adjust(alone)
    for name in ("p_difference", "p_equivalence", "p_wilcoxon"):
        raw = [getattr(one, name) for one in alone]
        assert [getattr(one, f"{name}_holm") for one in family] == pytest.approx(naive_holm(raw))
        assert [getattr(one, name) for one in family] == raw
    # A comparison without a run counts in its family all the same.
    missing = compare(baseline, np.empty((0, 12)), margin=0.05)
    assert adjust([*alone, missing])[2].p_difference_holm == 4 * alone[2].p_difference
    assert adjust([]) == []


def test_a_verdict_of_each_kind():
    p_difference = np.array([0.2, 0.2, 0.01, 0.01, np.nan, 0.05])
    p_equivalence = np.array([0.2, 0.01, 0.2, 0.01, np.nan, 0.05])
    assert verdicts(p_difference, p_equivalence, np.array(0.05)).tolist() == [
        "undecided",
        "equivalent",
        "different",
        "equivalent",  # there is a difference, but it is smaller than the margin
        "undecided",
        "undecided",
    ]


def test_the_tost_interval_lies_within_the_margin_where_equivalence_is_found():
    pairs = zip(*arms((3, 3), 10, (0.2, 0.3, 0.3), 40), strict=True)
    found = [compare(baseline, level, margin=0.6) for baseline, level in pairs]
    inside = [max(-c.tost_low, c.tost_high) < 0.6 for c in found]
    assert inside == [c.p_equivalence < ALPHA for c in found]
    assert 0 < sum(inside) < 40
    assert [c.low > 0 or c.high < 0 for c in found] == [c.p_difference < ALPHA for c in found]


def test_cases_without_a_score_are_left_out_of_both_arms():
    draw = np.random.default_rng(7)
    baseline, level = draw.random((3, 8)), draw.random((4, 8))
    expected = compare(baseline[:, [0, 2, 3, 4, 5, 7]], level[:, [0, 2, 3, 4, 5, 7]], margin=0.1)
    baseline[1, 6] = level[0, 1] = level[:, 6] = np.nan
    found = compare(baseline, level, margin=0.1)
    assert (found.cases, found.left_out) == (6, 2)
    assert (found.baseline_seeds, found.level_seeds) == (3, 4)
    assert replace(found, left_out=0) == expected


def undefined(comparison: Comparison) -> set[str]:
    return {name for name, value in asdict(comparison).items() if value != value}


NEEDS_ERROR = {
    *("low", "high", "tost_low", "tost_high", "standard_error", "degrees_of_freedom"),
    *("minimum_detectable", "p_difference", "p_equivalence"),
    *("p_difference_holm", "p_equivalence_holm"),
}
NEEDS_SCORES = NEEDS_ERROR | {"difference", "median", "p_wilcoxon", "p_wilcoxon_holm"}


@pytest.mark.parametrize(
    ("baseline_shape", "level_shape", "missing"),
    [
        ((1, 9), (1, 9), NEEDS_ERROR),
        ((3, 9), (1, 9), NEEDS_ERROR),
        ((3, 1), (3, 1), NEEDS_ERROR),
        ((0, 9), (3, 9), NEEDS_SCORES),
        ((3, 9), (0, 9), NEEDS_SCORES),
        ((3, 0), (3, 0), NEEDS_SCORES),
        ((0, 0), (0, 0), NEEDS_SCORES),
        ((2, 2), (2, 2), set()),
    ],
)
def test_too_little_is_undecided(
    baseline_shape: tuple[int, int], level_shape: tuple[int, int], missing: set[str]
):
    draw = np.random.default_rng(8)
    found = compare(draw.random(baseline_shape), 5 + draw.random(level_shape), margin=0.1)
    assert undefined(found) == missing
    assert found.verdict == "undecided" or not missing


def test_no_common_case_is_undecided():
    baseline, level = np.ones((3, 4)), np.ones((3, 4))
    baseline[0, :2] = level[0, 2:] = np.nan
    found = compare(baseline, level, margin=0.1)
    assert (found.cases, found.left_out, found.verdict) == (0, 4, "undecided")
    assert undefined(found) == NEEDS_SCORES


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_scores_that_do_not_vary_are_undecided(shift: float):
    """Such are three copies of one run, or networks that mark nothing; rounding is no variance."""
    baseline = np.tile(np.random.default_rng(9).random(7), (3, 1))
    found = compare(baseline, baseline + shift, margin=0.2)
    assert undefined(found) == NEEDS_ERROR
    assert found.difference == pytest.approx(shift)
    assert found.verdict == "undecided"
    assert found.p_wilcoxon == (1 if shift == 0 else pytest.approx(2 / 2**7))


def test_what_cannot_be_compared():
    scores = np.zeros((3, 4))
    with pytest.raises(ValueError, match=r"same cases, found \(3, 4\) and \(3, 5\)"):
        compare(scores, np.zeros((3, 5)), margin=0.1)
    with pytest.raises(ValueError, match=r"found \(4,\)"):
        compare(scores[0], scores, margin=0.1)
    with pytest.raises(ValueError, match="infinite"):
        compare(scores, scores + np.inf, margin=0.1)
    for margin in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="positive margin"):
            compare(scores, scores, margin)
    for alpha in (0, 0.5, np.nan):
        with pytest.raises(ValueError, match="alpha between"):
            compare(scores, scores, 0.1, alpha)
