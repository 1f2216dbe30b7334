"""What learning rate, patch, spacing, width and precision bring in a given time of training.

Each way differs in one respect from `base`, which is `experiment=real_scans` at a learning rate of
1e-3, and trains for about as many minutes, but for the one that is longer. All see phantoms of the
same families, and predict phantoms at 1 mm of a family that none was trained on. What is finished
is kept: the same command goes on where it was interrupted.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.revisions import HERE, REGIONS, run
from experiments.benchmarks.transfer import over_seeds, phantoms, scored
from experiments.command import command
from experiments.tables import markdown, write_csv
from files import read_json, write_text

FAMILIES = ("classic", "creeping", "lopsided", "low_grade", "swelling")  # those of real_scans
TRAINING_CASES, TRAINING_SEED = 160, 2
TEST_FAMILY, TEST_CASES, TEST_SEED, TEST_SPACING_MM = "infiltrating", 16, 9, 1.0
COMMON = (
    *("experiment=real_scans", "logger=csv", "split.validation=0.05", "split.test=0"),
    *(f"data.data_set.count={TRAINING_CASES}", f"data.data_set.seed={TRAINING_SEED}"),
    *("callbacks=averaged", "callbacks.best.monitor=null", "callbacks.slices.cases=0"),
)
STEPS_AN_EPOCH = 72


class Way(NamedTuple):
    """A way to train.

    Attributes:
        does: What it changes.
        epochs: Of 72 steps; so many that all ways take about as long.
        overrides: Of the command line.
        batch_size: Patches a step.
        spacing_mm: Of the phantoms to train on, and of what the network sees.
        precision: Of the training.
    """

    does: str
    epochs: int
    overrides: tuple[str, ...] = ()
    batch_size: int = 2
    spacing_mm: float = 2.0
    precision: str = "bf16-mixed"


WAYS = {
    "base": Way("patches of 32³, two a step, 2 mm, 16 filters, bfloat16, 1e-3", 12),
    "2e-3": Way("a learning rate of 2e-3", 12, ("patches.learning_rate=2e-3",)),
    "5e-4": Way("a learning rate of 5e-4", 12, ("patches.learning_rate=5e-4",)),
    "patch 48": Way("patches of 48³, one a step", 8, ("patches.size=48",), batch_size=1),
    "patch 24": Way("patches of 24³, four a step", 14, ("patches.size=24",), batch_size=4),
    "1.5 mm": Way("voxels of 1.5 mm", 12, spacing_mm=1.5),
    "8 filters": Way("8 filters", 22, ("filters.base=8",)),
    "float32": Way("float32", 7, precision="32-true"),
    "longer": Way("three times as long", 36),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, predict, score and write what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.recipe", description=(__doc__ or "").strip()
    )
    parser.add_argument(
        "ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}; default: all"
    )
    parser.add_argument("--seeds", type=int, default=2, help="runs of each; default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/recipe"), help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"ways: expected some of {', '.join(WAYS)}, found {min(unknown)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output = options.output.resolve()
    test = phantoms(output / "test", (TEST_FAMILY,), TEST_CASES, TEST_SEED, TEST_SPACING_MM)
    rows = []
    for seed in range(options.seeds):
        for name in options.ways or WAYS:
            folder = trained(name, seed, output)
            minutes = read_json(folder / "results.json", "it is that of a run")["fit_s"] / 60
            found = scored(folder / "best.ckpt", test, folder / "maps")
            rows += [{"way": name, "seed": seed, "minutes": minutes, **row} for row in found]
    lines = table(rows)
    write_csv(output / "recipe.csv", rows)
    write_text(output / "recipe.md", markdown(lines) + "\n")
    print(markdown(lines))


def trained(name: str, seed: int, output: Path) -> Path:
    """Train a network in one way; returns the folder of the run.

    Raises:
        InputError: Training failed.
    """
    way = WAYS[name]
    root = phantoms(
        output / f"train-{way.spacing_mm:g}mm", FAMILIES, TRAINING_CASES, TRAINING_SEED,
        way.spacing_mm,
    )  # fmt: skip
    folder = output / f"{name.replace(' ', '-')}-s{seed}"
    if not (folder / "results.json").is_file():
        logging.info("%s: training, seed %d", name, seed)
        data = [f"data.data_set.root={root}", f"data.cache.root={output}/cache"]
        run(
            [
                *(sys.executable, "train.py", f"seed={seed}", f"hydra.run.dir={folder}"),
                *(*COMMON, *data, *overrides(way)),
            ],
            HERE,
        )
    return folder


def overrides(way: Way) -> list[str]:
    """Return what the command line says of a way, next to `COMMON` and to folders."""
    return [
        f"data.data_set.spacing_mm={way.spacing_mm:g}",
        *(f"patches.epochs={way.epochs}", f"patches.epochs_per_validation={way.epochs}"),
        *(f"patches.batch_size={way.batch_size}", f"trainer.precision={way.precision}"),
        *(f"patches.per_epoch={STEPS_AN_EPOCH * way.batch_size}", "patches.learning_rate=1e-3"),
        *way.overrides,
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Make a row for each way: minutes of training, and Dice over the cases that have a region."""
    lines = []
    for name in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == name]
        minutes = {row["seed"]: row["minutes"] for row in own}
        line = {"way": name, "it changes": WAYS[name].does}
        line |= {"steps": str(WAYS[name].epochs * STEPS_AN_EPOCH)}
        line |= {"minutes": " ".join(f"{minutes[seed]:.0f}" for seed in sorted(minutes))}
        line |= {region: over_seeds(own, f"dice_{region}", region) for region in REGIONS}
        line["its border, mm"] = over_seeds(own, "border_mm_WT", "WT", "+.2f")
        lines.append({**line, "seeds": str(len(minutes))})
    return lines


if __name__ == "__main__":
    with command():
        main()
