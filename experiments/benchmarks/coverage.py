"""How often the intervals of a detector's scores cover the truth, on simulated patients and seeds.

Two detectors share seeds and patients. Most patients have few lesions and some have a dozen; some
lesions, and some patients, are harder than others for both detectors and all seeds; false positives
come in patients that have much that looks like a lesion. `statistics.Ratio` makes the intervals
that experiments.krivov2018 writes; beside them stands what it wrote before, a bootstrap over
patients of the mean over seeds.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track
from scipy.special import expit

from experiments.command import command
from experiments.statistics import Interval, Ratio
from experiments.tables import markdown
from files import write_text

PATIENTS, SEEDS = (10, 20, 40, 80, 160), (3, 5)
# Standard deviations on the logit of finding a lesion, and the logit of either detector.
OF_LESIONS, OF_PATIENTS, OF_SEEDS, OF_RESIDUAL = 1.5, 1.0, 0.25, 0.5
LOGITS = (1.2, 0.8)
FALSE_POSITIVES, OF_SEEDS_LOG = (1.0, 1.2), 0.2  # a patient, and how their logarithm varies
DRAWS = 500


class Study(NamedTuple):
    """What was counted in S seeds and N patients.

    Attributes:
        lesions: (N,).
        found: Of either detector (2, S, N).
        false: False positives of either detector (2, S, N).
    """

    lesions: np.ndarray
    found: np.ndarray
    false: np.ndarray


def simulate(patients: int, seeds: int, generator: np.random.Generator) -> Study:
    """Draw a study."""
    lesions = np.minimum(generator.gamma(0.9, 4.5, patients).astype(int), 12)
    hard = generator.normal(0, OF_LESIONS, (patients, lesions.max(initial=1)))
    there = np.arange(hard.shape[1]) < lesions[:, None]
    of_patients = generator.normal(0, OF_PATIENTS, patients)
    look_alikes = generator.gamma(0.5, 2, patients)
    found, false = [], []
    for logit, rate in zip(LOGITS, FALSE_POSITIVES, strict=True):
        of_seeds = generator.normal(0, OF_SEEDS, (seeds, 1))
        residual = generator.normal(0, OF_RESIDUAL, (seeds, patients))
        chance = expit((logit + of_patients + of_seeds + residual)[..., None] + hard)
        found.append(((generator.random(chance.shape) < chance) & there).sum(-1))
        scale = np.exp(generator.normal(0, OF_SEEDS_LOG, (seeds, 1)))
        false.append(generator.poisson(rate * look_alikes * scale))
    return Study(lesions.astype(float), np.array(found, float), np.array(false, float))


def true_sensitivities() -> list[float]:
    """Compute the chance of either detector to find a lesion, over all that varies."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    spread = np.sqrt(OF_LESIONS**2 + OF_PATIENTS**2 + OF_SEEDS**2 + OF_RESIDUAL**2)
    chances = [expit(logit + spread * nodes) @ weights / weights.sum() for logit in LOGITS]
    return [float(chance) for chance in chances]


def bootstrap(ratio: Ratio, generator: np.random.Generator) -> Interval:
    """Estimate an interval from resampled patients."""
    count = len(ratio.totals)
    drawn = generator.integers(count, size=(DRAWS, count))
    numerator, denominator = ratio.counts.mean(0)[drawn].sum(1), ratio.totals[drawn].sum(1)
    low, high = np.percentile(numerator / np.maximum(denominator, 1), (2.5, 97.5))
    return Interval(ratio.value, float(low), float(high))


def covered(study: Study, generator: np.random.Generator) -> Iterator[tuple[str, bool]]:
    """Tell for each interval whether it covers the truth; one that is not defined does not."""
    sensitivities = true_sensitivities()
    rates = [rate * float(np.exp(OF_SEEDS_LOG**2 / 2)) for rate in FALSE_POSITIVES]
    first, second = (Ratio(found, study.lesions) for found in study.found)
    ones = np.ones(len(study.lesions))
    alarms, others = (Ratio(false, ones) for false in study.false)
    for name, interval, truth in (
        ("sensitivity", first.interval(share=True), sensitivities[0]),
        ("bootstrap", bootstrap(first, generator), sensitivities[0]),
        ("difference", first.minus(second), sensitivities[0] - sensitivities[1]),
        ("false positives", alarms.interval(share=False), rates[0]),
        ("bootstrap of these", bootstrap(alarms, generator), rates[0]),
        ("difference of these", alarms.minus(others), rates[0] - rates[1]),
    ):
        yield name, interval.low <= truth <= interval.high


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.coverage", description=(__doc__ or "").strip()
    )
    parser.add_argument("--studies", type=int, default=2000, help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/coverage/coverage.md"),
        help="default: %(default)s",
    )  # fmt: skip
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    rows = []
    for patients in PATIENTS:
        for seeds in SEEDS:
            counted: Counter[str] = Counter()
            for _ in track(range(options.studies), f"{patients} patients, {seeds} seeds"):
                study = simulate(patients, seeds, generator)
                if study.lesions.any():
                    counted.update(dict(covered(study, generator)), total=1)
            total = counted.pop("total")
            shares = {name: f"{count / total:.3f}" for name, count in counted.items()}
            rows.append({"patients": str(patients), "seeds": str(seeds), **shares})
    error = np.sqrt(0.95 * 0.05 / options.studies)
    text = (
        f"How often intervals of 95 % cover, in {options.studies} studies each (standard error "
        f"{error:.3f}).\n\n{markdown(rows)}\n"
    )
    write_text(options.output, text)
    print(text)


if __name__ == "__main__":
    with command():
        main()
