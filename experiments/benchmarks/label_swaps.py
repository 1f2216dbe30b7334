"""How often the null report calls a level different where labels are swapped in real runs.

Where a level makes no difference, the labels "baseline" and "level" of two runs of one seed could
as well be swapped. So a finished sweep gives an exact null hypothesis, with the distribution of
real scores: for each level, the verdicts over all ways to swap the labels of some seeds. The rate
is the share of these ways in which the level, as a family of its own, comes out different over all
looks.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np

from errors import InputError
from experiments.command import command
from experiments.statistics import crossed, decide, of_levels
from experiments.sweep import BASELINE_CELL, Sweep, read_sweep
from experiments.tables import markdown
from files import write_text

MOST_SEEDS = 12  # 4096 ways; of more seeds the first ones are taken


def swapped(differences: np.ndarray) -> np.ndarray:
    """Return the differences (2^S, R, S, N) for all ways to swap the labels of some of S seeds.

    Args:
        differences: Level minus baseline (R, S, N) in R regions and N cases.
    """
    signs = np.array(list(product((1, -1), repeat=differences.shape[1])))
    return signs[:, None, :, None] * differences


def rate(differences: np.ndarray, looks: list[int], alphas: list[float]) -> float:
    """Compute the share of the ways in which the level comes out different.

    Args:
        differences: Level minus baseline (R, S, N).
        looks: Numbers of seeds at which a verdict is given.
        alphas: Error rate that each look spends.
    """
    found = [crossed(swapped(differences)[:, :, :look]).p_difference() for look in looks]
    p = [of_levels(p_of_look, np.ones_like(p_of_look))[0] for p_of_look in found]
    decided = decide(np.array(p)[..., None], np.ones((len(looks), len(p[0]), 1)), alphas)
    return float(decided.different.mean())


def rows_of(sweep: Sweep) -> list[dict[str, str]]:
    """Make a row for each level that has as many seeds as the baseline, and two at least."""
    rows = []
    for cell in sweep.levels():
        arms = [
            {region: sweep.dice(arm, region) for region in sweep.margin}
            for arm in (BASELINE_CELL, cell)
        ]
        seeds = [
            seed
            for seed in sweep.seeds
            if all(seed in dice for arm in arms for dice in arm.values())
        ][:MOST_SEEDS]
        looks = [look for look in sweep.looks if look.seeds <= len(seeds)]
        if not looks:
            continue
        differences = np.array(
            [
                [arms[1][region][seed] - arms[0][region][seed] for seed in seeds]
                for region in sweep.margin
            ]
        )
        scored = differences[..., ~np.isnan(differences).any((0, 1))]
        alphas = [look.alpha for look in looks]
        share = rate(scored, [look.seeds for look in looks], alphas)
        rows.append(
            {
                **cell._asdict(),
                "seeds": str(len(seeds)),
                "ways": str(2 ** len(seeds)),
                "alpha spent": f"{sum(alphas):.3f}",
                "different": f"{share:.3f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.label_swaps", description=(__doc__ or "").strip()
    )
    parser.add_argument("folder", type=Path, help="folder of a sweep over factors")
    parser.add_argument("--output", type=Path, help="default: label_swaps.md in its report")
    options = parser.parse_args()
    rows = rows_of(read_sweep(options.folder))
    if not rows:
        raise InputError(
            f"{options.folder}: expected a level and a baseline with all seeds of a look, found "
            "none"
        )
    output = options.output or options.folder / "report" / "label_swaps.md"
    write_text(output, markdown(rows) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    with command():
        main()
