"""Controls of the null report on its own runs: where it must find nothing, and where something.

- Labels swapped: where a level makes no difference, the labels "baseline" and "level" of two runs
  of one seed could as well be swapped. So the verdicts over all ways to swap the labels of some
  seeds are those of an exact null hypothesis, with the distribution of real scores.
- The baseline again: half of its seeds against the other half, in all ways to choose and to pair
  them. It is the harder control, because two seeds share neither weights nor patches.
- A planted difference: the same with a Dice of .05 more on one side in every case.

Given is the share of the ways in which a level, as a family of its own, comes out different over
all looks for which there are seeds.
"""

import argparse
from collections.abc import Mapping
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np

from errors import InputError
from experiments.command import command
from experiments.statistics import crossed, decide, of_levels
from experiments.sweep import BASELINE_CELL, Cell, Look, Sweep, read_sweep
from experiments.tables import markdown
from files import write_text

MOST_SEEDS = 12  # 4096 ways to swap; of more seeds the first ones are taken
MOST_HALVED = 8  # 1680 ways to choose one half and to pair it with the other
PLANTED = 0.05


def swapped(differences: np.ndarray) -> np.ndarray:
    """Return the differences (2^S, R, S, N) for all ways to swap the labels of some of S seeds.

    Args:
        differences: Level minus baseline (R, S, N) in R regions and N cases.
    """
    signs = np.array(list(product((1, -1), repeat=differences.shape[1])))
    return signs[:, None, :, None] * differences


def halves(dice: np.ndarray) -> np.ndarray:
    """Return the differences (W, R, S // 2, N) of half of the seeds to the others, in all W ways.

    Args:
        dice: Of one cell (R, S, N) in R regions and N cases.
    """
    seeds = range(dice.shape[1])
    half = len(seeds) // 2
    ways = [
        (list(one), list(other))
        for one in combinations(seeds, half)
        for other in permutations(sorted(set(seeds) - set(one)), half)
    ]
    return np.stack([dice[:, one] - dice[:, other] for one, other in ways])


def rate(ways: np.ndarray, looks: list[Look]) -> float:
    """Compute the share of the ways (W, R, S, N) in which a level comes out different.

    Args:
        ways: Level minus baseline.
        looks: When a verdict is given, after S seeds at most.
    """
    found = [crossed(ways[:, :, : look.seeds]).p_difference() for look in looks]
    p = [of_levels(p_of_look, np.ones_like(p_of_look))[0] for p_of_look in found]
    alphas = [look.alpha for look in looks]
    decided = decide(np.array(p)[..., None], np.ones((len(looks), len(p[0]), 1)), alphas)
    return float(decided.different.mean())


def rows_of(sweep: Sweep) -> list[dict[str, str]]:
    """Make a row for the baseline again, and one for each level with as many seeds as a look."""
    rows = []
    baseline = _dice(sweep, BASELINE_CELL)
    if len(halved := _common(baseline)[:MOST_HALVED]) > 3:
        # Half as many seeds as were planned: one look, that may spend all.
        look = Look(len(halved) // 2, sweep.alpha)
        ways = halves(_without_missing(_stacked(baseline, halved)))
        rows.append(_row(Cell("baseline", "again"), ways, [look]))
    for cell in sweep.levels():
        level = _dice(sweep, cell)
        seeds = _common(baseline, level)[:MOST_SEEDS]
        if looks := [look for look in sweep.looks if look.seeds <= len(seeds)]:
            differences = _stacked(level, seeds) - _stacked(baseline, seeds)
            rows.append(_row(cell, swapped(_without_missing(differences)), looks))
    return rows


def _row(cell: Cell, ways: np.ndarray, looks: list[Look]) -> dict[str, str]:
    return {
        **cell._asdict(),
        "seeds": str(ways.shape[2]),
        "cases": str(ways.shape[3]),
        "ways": str(len(ways)),
        "alpha spent": f"{sum(look.alpha for look in looks):.3f}",
        "different": f"{rate(ways, looks):.3f}",
        f"with {PLANTED:g} planted": f"{rate(ways + PLANTED, looks):.3f}",
    }


def _dice(sweep: Sweep, cell: Cell) -> dict[str, dict[int, np.ndarray]]:
    """Primary region -> seed -> Dice (N,) of a cell."""
    return {region: sweep.dice(cell, region) for region in sweep.margin}


def _common(*cells: Mapping[str, Mapping[int, np.ndarray]]) -> list[int]:
    """List the seeds that all regions of all cells have, in order."""
    return sorted(set.intersection(*(set(by_seed) for dice in cells for by_seed in dice.values())))


def _stacked(dice: Mapping[str, Mapping[int, np.ndarray]], seeds: list[int]) -> np.ndarray:
    """Return (R, S, N)."""
    return np.array([[by_seed[seed] for seed in seeds] for by_seed in dice.values()])


def _without_missing(dice: np.ndarray) -> np.ndarray:
    """Leave out the cases that lack a region."""
    return dice[..., ~np.isnan(dice).any((0, 1))]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.controls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of a sweep over factors")
    parser.add_argument("--output", type=Path, help="default: controls.md in its report")
    options = parser.parse_args()
    rows = rows_of(read_sweep(options.folder))
    if not rows:
        raise InputError(
            f"{options.folder}: expected a level and a baseline with all seeds of a look, found "
            "none"
        )
    output = options.output or options.folder / "report" / "controls.md"
    write_text(output, markdown(rows) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    with command():
        main()
