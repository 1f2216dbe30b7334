"""Error rates of the null report's verdicts, from the first look to the last, on simulated scores.

A family of levels is compared with one baseline in two regions: crossed seeds and cases, looks and
corrections, by the functions that the report calls. Scores are bounded and skewed, and 0 in hard
cases; seeds act on the baseline and on a level alike, to a degree; the levels may vary more than
the baseline; and some runs collapse. A rate is over families: how often at least one level is
called different where none is, or equivalent where each differs by the margin in one region. Runs
that collapse are no part of that margin: "equivalent" is about the others, and says which rate of
collapse it assumes.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.optimize import bisect
from scipy.special import expit

from experiments.command import command
from experiments.statistics import Decisions, crossed, decide, of_levels, spending
from experiments.tables import markdown, write_csv
from files import write_text

ALPHA, LOOKS, MARGINS = 0.04, (5, 8), (0.02, 0.03)  # those of conf/experiment/null_report.yaml
PLANTED = 0.05
# Scores are logistic functions of a sum of normal variables: with these standard deviations and
# this mean, Dice has about the spreads that notes on real runs of the proxy state.
CENTRE, OF_CASES, OF_ARM_AND_CASE, OF_SEEDS, OF_RESIDUAL = 1.5, 1.0, 0.1, 0.15, 0.3
MISSED_BELOW = -0.5  # a case with a smaller sum is missed, and scores 0: 3 % of all
SCORES_AT_ONCE = 2_000_000
ERRORS = ("false different", "false equivalent")
FINDINGS = ("equal is equivalent", "planted is different")


class Setting(NamedTuple):
    """What is simulated.

    Attributes:
        looks: Numbers of seeds at which verdicts are given.
        cases: Number of test cases.
        levels: Number of levels of the family.
        correlation: Of the effects of seeds, and of residuals, between a level and the baseline.
        spread: Standard deviation of these effects in the levels; that of the baseline is 1.
        collapse: Share of runs that score 0 in all cases.
    """

    looks: tuple[int, ...]
    cases: int
    levels: int
    correlation: float
    spread: float
    collapse: float


SETTINGS = [
    Setting(looks, cases, levels, correlation, spread, collapse)
    for (looks, cases, levels), correlation, spread, collapse in product(
        ((LOOKS, 13, 1), (LOOKS, 40, 1), (LOOKS, 200, 1), (LOOKS, 200, 18), (LOOKS[-1:], 200, 1)),
        (0.0, 0.5, 0.95),
        (1.0, 3.0),
        (0.0, 0.1),
    )
]


def score(total: np.ndarray) -> np.ndarray:
    """Turn sums of effects into scores."""
    return expit(total) * (total > MISSED_BELOW)


def mean_score(centre: float, spread: float) -> float:
    """Compute the mean score of runs that learn, by quadrature over the steps of `score`."""
    deviation = np.sqrt(
        OF_CASES**2 + OF_ARM_AND_CASE**2 + spread**2 * (OF_SEEDS**2 + OF_RESIDUAL**2)
    )
    nodes = MISSED_BELOW + np.linspace(0, 12 * deviation, 4001)
    density = np.exp(-(((nodes - centre) / deviation) ** 2) / 2) / deviation / np.sqrt(2 * np.pi)
    return float(np.trapezoid(expit(nodes) * density, nodes))


def centre_of(difference: float, spread: float) -> float:
    """Find the mean of the sums at which a level's mean score differs by so much."""
    wanted = mean_score(CENTRE, 1.0) + difference
    return bisect(lambda centre: mean_score(centre, spread) - wanted, -3.0, 8.0)  # pyright: ignore[reportReturnType]


def simulate(rng: np.random.Generator, setting: Setting, differences: np.ndarray) -> np.ndarray:
    """Simulate level minus baseline (F, M, R, S, N).

    Args:
        rng: Source of randomness.
        setting: The setting, with M levels, S seeds at its last look, and N cases.
        differences: True differences (F, M, R) of the mean scores of runs that learn, in F families
            and R regions.
    """
    families, levels, regions = differences.shape
    seeds, cases = setting.looks[-1], setting.cases

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((families, *shape), dtype=np.float32)

    case = OF_CASES * draw(1, regions, 1, cases)
    shared_seed, shared_residual = draw(1, regions, seeds, 1), draw(1, regions, seeds, cases)
    common, own = np.sqrt(setting.correlation), np.sqrt(1 - setting.correlation)

    def arm(number: int, centre: np.ndarray, spread: float) -> np.ndarray:
        seed = common * shared_seed + own * draw(number, regions, seeds, 1)
        residual = common * shared_residual + own * draw(number, regions, seeds, cases)
        of_arm = OF_ARM_AND_CASE * draw(number, regions, 1, cases)
        effects = spread * (OF_SEEDS * seed + OF_RESIDUAL * residual)
        learns = rng.random((families, number, 1, seeds, 1)) >= setting.collapse
        return score(centre[..., None, None] + case + of_arm + effects) * learns

    values, place = np.unique(differences, return_inverse=True)
    centres = np.array([centre_of(value, setting.spread) for value in values])
    level = arm(levels, centres[place].reshape(differences.shape), setting.spread)
    return level - arm(1, np.full((families, 1, regions), CENTRE), 1.0)


def decisions(differences: np.ndarray, looks: Sequence[int]) -> Decisions:
    """Decide on levels (F, M) by their differences (F, M, R, S, N)."""
    found = [crossed(differences[..., :look, :]) for look in looks]
    p_difference, p_equivalence = zip(
        *(of_levels(f.p_difference(), f.p_equivalence(np.array(MARGINS))) for f in found),
        strict=True,
    )
    return decide(np.array(p_difference), np.array(p_equivalence), spending(looks, ALPHA))


def batches(setting: Setting, families: int) -> Iterator[int]:
    """Yield numbers of families that are simulated at once."""
    size = setting.levels * len(MARGINS) * setting.looks[-1] * setting.cases
    at_once = max(1, SCORES_AT_ONCE // size)
    for start in range(0, families, at_once):
        yield min(at_once, families - start)


def at_margin(families: int, levels: int) -> np.ndarray:
    """Make true differences (F, M, R) at the margin in one region, by turns, and 0 in the other.

    Both signs take turns too, as the scores are skewed.
    """
    turn = np.add.outer(np.arange(families), np.arange(levels))
    region = np.equal.outer(turn // 2 % len(MARGINS), np.arange(len(MARGINS)))
    return region * np.array(MARGINS) * (turn % 2 * 2 - 1)[..., None]


def rates(setting: Setting, families: int, seed: int) -> dict[str, float]:
    """Simulate a setting.

    Returns:
        `ERRORS`: shares of families with at least one such level. `FINDINGS`: shares of levels
        without a difference, and of levels with one of `PLANTED` in both regions.
    """
    rng = np.random.default_rng(seed)
    sums = dict.fromkeys((*ERRORS, *FINDINGS), 0.0)
    for number in batches(setting, families):
        none = np.zeros((number, setting.levels, len(MARGINS)))
        equal, differing, planted = (
            decisions(simulate(rng, setting, differences), setting.looks)
            for differences in (none, at_margin(number, setting.levels), none - PLANTED)
        )
        sums["false different"] += equal.different.any(-1).sum()
        sums["false equivalent"] += differing.equivalent.any(-1).sum()
        sums["equal is equivalent"] += equal.equivalent.mean(-1).sum()
        sums["planted is different"] += planted.different.mean(-1).sum()
    return {name: float(total / families) for name, total in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.error_rates", description=(__doc__ or "").strip()
    )
    parser.add_argument("--families", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("experiments/results/benchmarks"),
        help="default: %(default)s",
    )
    options = parser.parse_args()
    rows, lines = [], []
    for setting in track(SETTINGS, "simulating", console=Console(stderr=True), transient=True):
        row = {**setting._asdict(), "looks": " ".join(map(str, setting.looks))}
        line = {name: str(value) for name, value in row.items()}
        for name, rate in rates(setting, options.families, options.seed).items():
            error = float(np.sqrt(rate * (1 - rate) / options.families))
            row |= (
                {name: rate, f"standard error of {name}": error} if name in ERRORS else {name: rate}
            )
            line[name] = f"{rate:.3f} ± {error:.3f}" if name in ERRORS else f"{rate:.2f}"
        rows.append(row)
        lines.append(line)
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "error_rates.csv", rows)
    write_text(options.output / "error_rates.md", markdown(lines) + "\n")
    print(markdown(lines))


if __name__ == "__main__":
    with command():
        main()
