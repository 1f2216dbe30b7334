"""Comparisons of two arms: against numbers computed by hand, against scipy, and in simulations.

A simulated rate passes if it exceeds its bound by at most three standard errors of the simulation.
The seeds are fixed, so that no test fails by chance.
"""

from dataclasses import astuple
from itertools import product

import numpy as np
import pytest
from scipy import special, stats

from experiments.statistics import (
    POWER,
    Comparison,
    Decisions,
    Estimate,
    Ratio,
    Scores,
    collapsed,
    compare,
    crossed,
    decide,
    holm,
    nested,
    of_levels,
    prospect,
    rate_bound,
    spending,
)

ALPHA = 0.05
DATA_SETS = 6000  # of a simulation
# Standard deviations between seeds, between cases, and of the residual.
SPREADS = [(0.0, 1.0, 0.5), (0.0, 0.0, 1.0), (0.3, 1.0, 0.5), (1.0, 0.3, 0.3)]


def at_most(rate: float, data_sets: int) -> float:
    """Return the highest simulated rate that is compatible with a true rate."""
    return rate + 3 * np.sqrt(rate * (1 - rate) / data_sets)


def draws(
    seeds: int,
    cases: int,
    spread: tuple[float, float, float],
    *families: int,
    seed: int = 0,
) -> np.ndarray:
    """Simulate differences (..., S, N) whose mean is 0.

    Args:
        seeds: Number of seeds S.
        cases: Number of cases N.
        spread: Standard deviations between seeds, between cases, and of the residual.
        families: Shape of what is simulated.
        seed: Seed of the simulation.
    """
    draw = np.random.default_rng(seed).standard_normal
    of_seeds, of_cases, residual = spread
    return (
        of_seeds * draw((*families, seeds, 1))
        + of_cases * draw((*families, 1, cases))
        + residual * draw((*families, seeds, cases))
    )


def true_error(seeds: int, cases: int, spread: tuple[float, float, float]) -> float:
    """Compute the standard error of the mean difference from the parameters of a simulation."""
    of_seeds, of_cases, residual = np.square(spread)
    return np.sqrt(of_seeds / seeds + of_cases / cases + residual / seeds / cases)


def by_seed(scores: np.ndarray, first: int = 0) -> Scores:
    return {first + number: row for number, row in enumerate(scores)}


def test_crossed_by_hand():
    """Two seeds with means 2 and 4, three cases with means 2, 3 and 4, residual 0 or not."""
    additive = crossed(np.array([[1.0, 2, 3], [3, 4, 5]]))
    # Mean squares: of seeds 3 x 2, of cases 2 x 1, and no residual; all over 2 x 3.
    assert additive.difference == 3
    assert additive.parts == pytest.approx(np.array([6, 2]) / 6)
    assert additive.degrees_of_freedom.tolist() == [1, 2]
    # Residuals of +-1 in two of three cases: their sum of squares is 4, with 1 x 2 degrees of
    # freedom; the mean square of cases, 2, does not exceed it.
    noisy = crossed(np.array([[2.0, 2, 2], [2, 4, 6]]))
    assert noisy.difference == 3
    assert noisy.parts == pytest.approx(np.array([6, 0]) / 6)


def test_crossed_against_an_analysis_of_variance_in_loops():
    d = np.random.default_rng(1).normal(0.1, [[1], [2], [0.5], [1]], (4, 7))
    seeds, cases = d.shape
    mean = sum(d[s, n] for s in range(seeds) for n in range(cases)) / 28
    rows = [sum(d[s, n] for n in range(cases)) / cases for s in range(seeds)]
    columns = [sum(d[s, n] for s in range(seeds)) / seeds for n in range(cases)]
    of_seeds = sum(cases * (row - mean) ** 2 for row in rows) / (seeds - 1)
    of_cases = sum(seeds * (column - mean) ** 2 for column in columns) / (cases - 1)
    residual = sum(
        (d[s, n] - rows[s] - columns[n] + mean) ** 2 for s in range(seeds) for n in range(cases)
    ) / ((seeds - 1) * (cases - 1))
    found = crossed(d)
    expected = (of_seeds + max(of_cases - residual, 0)) / (seeds * cases)
    assert found.standard_error**2 == pytest.approx(expected)
    assert found.seed_share == pytest.approx(of_seeds / 28 / expected)
    assert (crossed(d.T).parts[1] == 0) == (of_seeds < residual)


def test_the_residual_counts_once():
    """The mean of the squared standard error equals the variance of the differences."""
    spread = (0.3, 1.0, 1.0)
    found = crossed(draws(5, 10, spread, DATA_SETS))
    expected = true_error(5, 10, spread) ** 2
    assert np.mean(found.standard_error**2) == pytest.approx(expected, rel=0.02)
    assert np.var(found.difference) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("axis", [0, 1], ids=["seeds", "cases"])
def test_if_only_seeds_or_cases_vary_it_is_the_paired_t_test(axis: int):
    draw = np.random.default_rng(2)
    baseline, level = draw.uniform(0.4, 0.6, (2, 9))
    shape = ((9, 4), (4, 9))[axis]
    values = [np.broadcast_to(np.expand_dims(v, 1 - axis), shape) for v in (baseline, level)]
    found = compare(by_seed(values[0]), by_seed(values[1])).estimate
    oracle = stats.ttest_rel(level, baseline)
    assert found.p_difference() == pytest.approx(oracle.pvalue)
    for confidence in (0.95, 0.9):
        expected = tuple(oracle.confidence_interval(confidence))
        assert found.interval(confidence) == pytest.approx(expected)
    sides = [
        stats.ttest_rel(level, baseline - 0.1, alternative="greater").pvalue,
        stats.ttest_rel(level, baseline + 0.1, alternative="less").pvalue,
    ]
    assert found.p_equivalence(0.1) == pytest.approx(max(sides))


def test_a_mixture_lies_between_its_t_distributions():
    found = Estimate(np.array(0.0), np.array([0.03, 0.01]), np.array([2, 39]))
    for tail in (0.4, 0.025, 1e-4):
        quantile = found.quantile(tail)
        assert stats.t.isf(tail, 39) < quantile < stats.t.isf(tail, 2)
        expected = 0.75 * stats.t.sf(quantile, 2) + 0.25 * stats.t.sf(quantile, 39)
        assert expected == pytest.approx(tail)


def rates_of_error(found: Estimate, margin: float) -> list[float]:
    """Compute the rate of a false "different", and of a false "equivalent" at either margin."""
    shifted = [found._replace(difference=found.difference + d) for d in (margin, -margin)]
    rejected = [other.p_equivalence(margin) < ALPHA for other in shifted]
    return [float(np.mean(r)) for r in (found.p_difference() < ALPHA, *rejected)]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("seeds", "cases"), [(3, 10), (3, 30), (5, 10), (5, 30), (12, 30)])
def test_error_rates(seeds: int, cases: int, spread: tuple[float, float, float]):
    found = crossed(draws(seeds, cases, spread, DATA_SETS))
    rates = rates_of_error(found, 5 * true_error(seeds, cases, spread))
    assert max(rates) <= at_most(ALPHA, DATA_SETS)


@pytest.mark.parametrize("spread", SPREADS)
def test_the_tail_that_a_correction_reads(spread: tuple[float, float, float]):
    """With five seeds, a test at .05 % errs .05 % of the time; see `Estimate`."""
    p = crossed(draws(5, 13, spread, 40_000)).p_difference()
    assert np.mean(p < 0.0005) <= at_most(0.0005, 40_000)


def swapped(differences: np.ndarray) -> float:
    """Compute the p value (exact) of all swaps of the arms' labels within seeds."""
    means = differences.mean(-1)
    signs = np.array(list(product((1, -1), repeat=len(means))))
    sums = np.abs(signs @ means)
    return float(np.mean(sums >= abs(means.sum()) - 1e-12))


def test_it_agrees_with_swapping_the_labels_within_seeds():
    """Eight seeds that dominate, as in real runs: the exact test rejects as often, and the same."""
    data = draws(8, 200, (0.0075, 0.01, 0.04), 400) + np.array([0, 0.006])[
        np.arange(400) % 2
    ].reshape(-1, 1, 1)
    ours = crossed(data).p_difference()
    exact = np.array([swapped(d) for d in data])
    assert np.corrcoef(stats.rankdata(ours), stats.rankdata(exact))[0, 1] > 0.95
    assert np.mean(ours < ALPHA) == pytest.approx(np.mean(exact < ALPHA), abs=0.08)


def test_pairing_takes_out_what_seeds_do_to_both_arms():
    """Seeds act alike on both arms: the paired error is that of the residual alone."""
    rng = np.random.default_rng(3)
    common = 0.5 + 0.05 * rng.standard_normal((6, 1)) + 0.05 * rng.standard_normal((1, 30))
    arms = [common + 0.01 * rng.standard_normal((6, 30)) for _ in range(2)]
    paired = compare(by_seed(arms[0]), by_seed(arms[1]))
    apart = compare(by_seed(arms[0]), by_seed(arms[1], first=6))
    assert (paired.seeds, apart.seeds) == (6, 0)
    assert (apart.baseline_only, apart.level_only) == (6, 6)
    assert apart.estimate.difference == pytest.approx(paired.estimate.difference)
    assert apart.estimate.standard_error > 5 * paired.estimate.standard_error
    error = 0.01 * np.sqrt(2 / 180)
    assert paired.estimate.standard_error == pytest.approx(error, rel=0.5)


def test_seeds_of_one_arm_are_left_out_and_counted():
    rng = np.random.default_rng(4)
    baseline, level = rng.random((5, 9)), rng.random((4, 9))
    found = compare(
        dict(zip((0, 1, 2, 3, 9), baseline, strict=True)),
        dict(zip((3, 0, 7, 1), level, strict=True)),
    )
    expected = crossed(level[[1, 3, 0]] - baseline[[0, 1, 3]])
    assert (found.seeds, found.baseline_only, found.level_only) == (3, 2, 1)
    assert found.estimate.difference == pytest.approx(expected.difference)
    assert found.estimate.standard_error == pytest.approx(expected.standard_error)


# Of `nested`: the means of the two seeds are .2 and .4, and the residual is 0.
BASELINE = np.array([[1.0, 2, 3], [3, 4, 5]]) / 10


def test_nested_by_hand():
    """The arms differ by .1, .1 and .4 in the cases; the residual of the level is .02."""
    level = np.array([[2.0, 4, 9], [4, 4, 7]]) / 10
    found = nested(BASELINE, level)
    assert found.difference == pytest.approx(0.2)
    # The baseline's seeds contribute 2 / 2, the level's 0, the cases 3 / 3, and the residual of
    # 2 / (2 x 3) is subtracted; all in hundredths.
    assert found.parts * 100 == pytest.approx(np.array([1, 0, 1 - 1 / 3]))
    assert found.degrees_of_freedom.tolist() == [1, 1, 2]
    apart = compare(by_seed(BASELINE), by_seed(level, first=2))
    assert apart.median == pytest.approx(0.1)
    assert apart.p_wilcoxon == pytest.approx(2 / 8)  # all three of one sign


def test_nested_where_the_residual_exceeds_the_cases():
    """The arms differ by .1 in every case: t is 1 with one degree of freedom, a Cauchy variable."""
    found = nested(BASELINE, np.array([[2.0, 4, 6], [4, 4, 4]]) / 10)
    assert found.standard_error == pytest.approx(0.1)
    assert found.p_difference() == pytest.approx(0.5)
    assert found.p_equivalence(0.2) == pytest.approx(0.25)
    low, high = found.interval(0.9)
    assert (low, high) == pytest.approx((0.1 - 0.1 * np.tan(0.45 * np.pi), 0.1 + 0.63137515))
    assert found.interval(0.95) == (-1, 1)  # no difference of Dice lies beyond


@pytest.mark.parametrize("spread", SPREADS)
def test_error_rates_of_independent_arms(spread: tuple[float, float, float]):
    """Three seeds against five, one arm varying twice as much as the other."""
    case = np.random.default_rng(5).standard_normal((DATA_SETS, 1, 20))
    baseline = case + draws(3, 20, spread, DATA_SETS, seed=1)
    level = case + 2 * draws(5, 20, spread, DATA_SETS, seed=2)
    rates = rates_of_error(nested(baseline, level), 5 * true_error(3, 20, spread))
    assert max(rates) <= at_most(ALPHA, DATA_SETS)


def test_seeds_that_agree_by_chance_do_not_hang():
    """Satterthwaite's degrees of freedom are .1 here, for which scipy's `nctdtrinc` never returns.

    All three runs of each arm have the same mean, and disagree about the cases.
    """
    baseline, level = (
        np.array([[int(digit) for digit in row] for row in text.split()], float)
        for text in (
            "1110110100000 0011011011100 1111000001011",
            "0001011111010 1101101010000 1000111010100",
        )
    )
    for first in (0, 3):  # paired, and not
        found = compare(by_seed(baseline), by_seed(level, first)).estimate
        values = [*found.interval(0.95), found.p_difference(), found.p_equivalence(0.02)]
        assert np.isfinite([*values, found.detectable(0.001), found.provable(0.001)]).all()


def test_power():
    spread = (0.005, 0.01, 0.01)
    found = crossed(draws(5, 20, spread, DATA_SETS))
    harmful = crossed(draws(5, 20, spread, DATA_SETS) + 0.05)
    assert np.mean(found.p_equivalence(0.03) < ALPHA) > 0.95
    assert np.mean(harmful.p_difference() < ALPHA) > 0.95
    # With a margin far below the noise, no data set is large enough for a verdict.
    assert np.mean(found.p_equivalence(0.001) < ALPHA) < ALPHA


@pytest.mark.parametrize("seeds", [5, 12])
def test_what_is_detectable_and_provable_comes_true_four_times_in_five(seeds: int):
    """The standard error is taken from a large simulation, as it counts as known."""
    spread, alpha = (0.3, 0.5, 0.5), 0.01
    sample = crossed(draws(seeds, 40, spread, DATA_SETS))
    known = sample._replace(parts=np.broadcast_to(sample.parts.mean(0), sample.parts.shape))
    detectable, provable = known.detectable(alpha)[0], known.provable(alpha)[0]
    shifted = sample._replace(difference=sample.difference + detectable)
    assert np.mean(shifted.p_difference() < alpha) == pytest.approx(POWER, abs=0.07)
    assert np.mean(sample.p_equivalence(provable) < alpha) == pytest.approx(POWER, abs=0.07)


def test_a_prospect_of_the_pilots_own_seeds_is_its_comparison():
    pilot = draws(5, 40, (0.01, 0.02, 0.03))
    pilot[1, 3] = np.nan
    found = crossed(np.delete(pilot, 3, axis=1))
    hoped = prospect(pilot, seeds=5, alpha=0.02, levels=18, regions=2)
    assert hoped.detectable == pytest.approx(found.detectable(0.02 / 36))
    assert hoped.provable == pytest.approx(found.provable(0.02 / 18))
    more = prospect(pilot, seeds=20, alpha=0.02, levels=18, regions=2)
    assert more.detectable < hoped.detectable
    assert more.provable < hoped.provable


def test_a_pilot_that_does_not_vary_says_nothing():
    for pilot in (np.zeros((2, 5)), np.full((2, 5), np.nan)):
        assert np.isnan(prospect(pilot, 3, 0.05, 3, 1)).all()


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


def test_a_level_differs_in_any_region_and_is_equivalent_in_all():
    different, equivalent = of_levels(
        np.array([[0.01, 0.2], [0.04, 0.03], [np.nan, 0.01]]),
        np.array([[0.01, 0.2], [0.04, 0.03], [np.nan, 0.01]]),
    )
    assert different == pytest.approx([0.02, 0.06, np.nan], nan_ok=True)
    assert equivalent == pytest.approx([0.2, 0.04, np.nan], nan_ok=True)


def test_spending_by_hand():
    assert spending([5, 8, 12, 16], 0.05) == pytest.approx(
        [0.05 * 25 / 256, 0.05 * 39 / 256, 0.05 * 80 / 256, 0.05 * 112 / 256]
    )
    assert sum(spending([3, 4, 7], 0.1)) == pytest.approx(0.1)
    assert spending([6], 0.05) == [0.05]


def test_a_verdict_of_each_kind():
    """One look at four levels: Holm's correction multiplies the smallest p value by 4."""
    p_difference = np.array([[0.012, 0.2, 0.001, np.nan]])
    p_equivalence = np.array([[0.2, 0.012, 0.001, np.nan]])
    found = decide(p_difference, p_equivalence, [0.05])
    assert found.verdicts().tolist() == [
        "different",
        "equivalent",
        "different, but less than the margin",
        "undecided",
    ]
    assert found.look.tolist() == [0, 0, 0, -1]


def test_looks_by_hand():
    """Two levels, two looks at .02 and .03."""
    nan = np.nan
    # The first level is decided at the first look, and leaves the family of that test: the second
    # is then tested at .03 instead of .015. What the first would be at the second look is not used.
    found = decide(np.array([[0.009, 0.5], [0.9, 0.02]]), np.ones((2, 2)), [0.02, 0.03])
    assert found.different.tolist() == [True, True]
    assert found.look.tolist() == [0, 1]
    # Decided by the other test, it stays in the family of this one.
    found = decide(
        np.array([[0.5, 0.5], [0.5, 0.02]]), np.array([[0.009, 1], [1, 1]]), [0.02, 0.03]
    )
    assert found.verdicts().tolist() == ["equivalent", "undecided"]
    # One that has no data yet counts in the family all the same.
    found = decide(np.array([[nan, 0.012], [nan, nan]]), np.ones((2, 2)), [0.02, 0.03])
    assert found.verdicts().tolist() == ["undecided", "undecided"]


def naive_decide(p_difference: np.ndarray, p_equivalence: np.ndarray, alphas: list[float]):
    """Decide look after look with sets and loops."""
    levels = range(p_difference.shape[1])
    found: dict[str, set[int]] = {"difference": set(), "equivalence": set()}
    for number, alpha in enumerate(alphas):
        tested = set(levels) - found["difference"] - found["equivalence"]
        for test, p in (("difference", p_difference), ("equivalence", p_equivalence)):
            family = len(levels) - len(found[test])
            for level in sorted(tested, key=lambda level: p[number, level]):
                if p[number, level] * family >= alpha:
                    break
                found[test].add(level)
                family -= 1
    return found


def test_decisions_against_loops():
    rng = np.random.default_rng(6)
    alphas = [0.1, 0.2, 0.3]
    for _ in range(200):
        p, q = rng.random((2, 3, 5)) ** 3
        found, expected = decide(p, q, alphas), naive_decide(p, q, alphas)
        assert set(np.flatnonzero(found.different)) == expected["difference"]
        assert set(np.flatnonzero(found.equivalent)) == expected["equivalence"]


def test_a_verdict_does_not_weaken_when_the_rest_of_the_family_comes_in():
    rng = np.random.default_rng(7)
    p, q = rng.random((2, 3, 5)) ** 3
    for late in range(5):
        held_back = np.where(np.arange(5) == late, np.nan, p)
        before = decide(held_back, np.where(np.arange(5) == late, np.nan, q), [0.1, 0.2, 0.3])
        after = decide(p, q, [0.1, 0.2, 0.3])
        assert (~before.different | after.different).all()
        assert (~before.equivalent | after.equivalent).all()


def looked(data: np.ndarray, looks: tuple[int, ...], margin: float) -> Decisions:
    """Decide on levels, whose differences are (F, M, S, N), in one region."""
    found = [crossed(data[..., :look, :]) for look in looks]
    return decide(
        np.array([f.p_difference() for f in found]),
        np.array([f.p_equivalence(margin) for f in found]),
        spending(looks, ALPHA),
    )


def test_families_that_share_a_baseline_and_are_looked_at_four_times():
    """In 95 % of families of six levels there is no false verdict, at any look."""
    families, spread, looks = 2000, (0.3, 0.5, 0.5), (4, 6, 8, 10)
    shared = draws(10, 15, spread, families, 1, seed=8)
    data = draws(10, 15, spread, families, 6, seed=9) - shared
    margin = 4 * true_error(10, 15, spread)
    assert np.mean(looked(data, looks, margin).different.any(-1)) <= at_most(ALPHA, families)
    rate = np.mean(looked(data + margin, looks, margin).equivalent.any(-1))
    assert rate <= at_most(ALPHA, families)
    p = np.array([crossed(data[..., :look, :]).p_difference() for look in looks])
    assert np.mean((p < ALPHA).any((0, -1))) > 0.2  # without looks and correction


def test_collapse():
    nan = np.nan
    silent, alarmed = np.array([nan, nan, 0.0]), np.array([nan, nan, 80.0])
    assert collapsed(np.array([0.0, 0.0, nan]), silent)
    assert collapsed(np.array([0.09, 0.0, nan]), silent)
    assert not collapsed(np.array([0.2, 0.0, nan]), silent)
    assert not collapsed(np.array([0.0, 0.0, nan]), alarmed)  # it predicts the region somewhere
    assert not collapsed(np.full(3, nan), np.zeros(3))  # no case has the region


@pytest.mark.parametrize(("count", "runs"), [(0, 3), (0, 16), (2, 15), (14, 15)])
def test_the_bound_of_a_rate(count: int, runs: int):
    bound = rate_bound(count, runs)
    assert stats.binom.cdf(count, runs, bound) == pytest.approx(0.05)
    exact = stats.binomtest(count, runs, alternative="less").proportion_ci(0.95, "exact")
    assert bound == pytest.approx(exact.high)


def test_the_bound_of_a_rate_covers():
    """At any rate, at most 5 % of all counts have a bound below it."""
    for rate in (0.02, 0.1, 0.3, 0.7):
        missed = [count for count in range(17) if rate_bound(count, 16) < rate]
        assert stats.binom.pmf(missed, 16, rate).sum() <= 0.05
    assert rate_bound(16, 16) == rate_bound(0, 0) == 1


def test_cases_without_a_score_are_left_out_of_both_arms():
    draw = np.random.default_rng(7)
    baseline, level = draw.random((3, 8)), draw.random((3, 8))
    kept = [0, 2, 3, 4, 5, 7]
    expected = compare(by_seed(baseline[:, kept]), by_seed(level[:, kept]))
    baseline[1, 6] = level[0, 1] = level[:, 6] = np.nan
    found = compare(by_seed(baseline), by_seed(level))
    assert (found.cases, found.left_out) == (6, 2)
    assert found.estimate.difference == expected.estimate.difference
    assert found.estimate.parts.tolist() == expected.estimate.parts.tolist()
    assert found.p_wilcoxon == expected.p_wilcoxon


def numbers(found: Comparison) -> np.ndarray:
    """Return what a comparison says, but for the difference and the counts."""
    estimate = found.estimate
    tests = [estimate.p_difference(), estimate.p_equivalence(0.1)]
    limits = [estimate.detectable(0.01), estimate.provable(0.01)]
    return np.array([*estimate.interval(0.95), *tests, *limits])


@pytest.mark.parametrize(
    ("baseline_shape", "level_shape"),
    [((1, 9), (1, 9)), ((3, 9), (1, 9)), ((3, 1), (3, 1)), ((0, 9), (3, 9)), ((3, 9), (0, 9)),
     ((3, 0), (3, 0)), ((0, 0), (0, 0))],
)  # fmt: skip
@pytest.mark.parametrize("first", [0, 10], ids=["paired", "apart"])
def test_too_little_has_no_error(
    baseline_shape: tuple[int, int], level_shape: tuple[int, int], first: int
):
    draw = np.random.default_rng(8)
    found = compare(by_seed(draw.random(baseline_shape)), by_seed(draw.random(level_shape), first))
    assert np.isnan(numbers(found)).all()
    without = 0 in (*baseline_shape, *level_shape)
    assert np.isnan(found.estimate.difference) == np.isnan(found.median) == without


def test_no_common_case_has_no_difference():
    baseline, level = np.ones((3, 4)), np.ones((3, 4))
    baseline[0, :2] = level[0, 2:] = np.nan
    found = compare(by_seed(baseline), by_seed(level))
    assert (found.cases, found.left_out) == (0, 4)
    assert np.isnan(found.estimate.difference)


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_scores_that_do_not_vary_have_no_error(shift: float):
    """Such are three copies of one run, or networks that mark nothing; rounding is no variance."""
    baseline = np.tile(0.8 * np.random.default_rng(9).random(7), (3, 1))
    for first in (0, 3):
        found = compare(by_seed(baseline), by_seed(baseline + shift, first))
        assert found.estimate.difference == pytest.approx(shift)
        assert np.isnan(numbers(found)).all()
        assert found.p_wilcoxon == (1 if shift == 0 else pytest.approx(2 / 2**7))


def test_what_cannot_be_compared():
    scores = np.zeros((3, 4))
    with pytest.raises(ValueError, match="expected scores of the same cases"):
        compare(by_seed(scores), by_seed(np.zeros((3, 5))))
    with pytest.raises(ValueError, match="from 0 to 1"):
        compare(by_seed(scores), by_seed(scores + np.inf))
    with pytest.raises(ValueError, match="from 0 to 1"):
        compare(by_seed(scores), by_seed(scores - 0.1))
    assert len(astuple(compare(by_seed(scores), by_seed(scores)))) == 8


COUNTED = np.array([[3.0, 0, 2, 1], [4, 1, 2, 1], [2, 0, 1, 1]])  # three seeds, four patients
LESIONS = np.array([4.0, 1, 2, 1])


def test_the_interval_of_a_share_is_symmetric_in_logits():
    ratio = Ratio(COUNTED, LESIONS)
    assert ratio.value == pytest.approx(18 / 24)
    # 4 / 8 = .5, the mean of the totals over the total, is what a lesion of one patient weighs.
    np.testing.assert_allclose(ratio.deviations(), (COUNTED - 0.75 * LESIONS) * 4 / 8)
    half = half_width(crossed((COUNTED - 0.75 * LESIONS) / 20)) * 10  # far from its ends
    interval = ratio.interval(share=True)
    assert special.logit([interval.low, interval.high]) == pytest.approx(
        special.logit(0.75) + np.array([-half, half]) / (0.75 * 0.25)
    )
    assert str(interval) == f"0.750 [{interval.low:.3f}, {interval.high:.3f}]"


def half_width(estimate: Estimate) -> float:
    low, high = estimate.interval(0.95)
    return float(high - low) / 2


def test_the_interval_of_a_mean_is_symmetric_in_logarithms():
    interval = Ratio(COUNTED, np.ones(4)).interval(share=False)
    half = half_width(crossed(COUNTED / 10)) * 10
    assert interval.value == pytest.approx(1.5)
    assert np.log([interval.low, interval.high]) == pytest.approx(
        np.log(1.5) + np.array([-half, half]) / 1.5
    )


def test_the_difference_of_ratios_is_paired_by_seed_and_patient():
    other = np.array([[2.0, 0, 2, 0], [3, 0, 1, 0], [2, 0, 2, 1]])
    found = Ratio(COUNTED, np.ones(4)).minus(Ratio(other, np.ones(4)))
    half = half_width(crossed((COUNTED - other) / 10)) * 10
    assert found == pytest.approx((5 / 12, 5 / 12 - half, 5 / 12 + half))
    same = Ratio(COUNTED, LESIONS).minus(Ratio(COUNTED, LESIONS))
    assert same.value == 0
    assert np.isnan(same.low)


@pytest.mark.parametrize("counts", [np.zeros((3, 4)), np.tile(LESIONS, (3, 1)), COUNTED[:1]])
def test_what_does_not_vary_has_no_interval(counts: np.ndarray):
    interval = Ratio(counts, LESIONS).interval(share=True)
    assert np.isnan([interval.low, interval.high]).all()
    assert str(interval) == f"{counts.mean(0).sum() / 8:.3f}"
