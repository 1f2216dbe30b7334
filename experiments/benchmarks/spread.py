"""How much scores vary from seed to seed, by which weights of a run are kept and how it is trained.

A null report decides with fewer runs if the runs of an arm vary less, and above all if the
difference between two arms that share a seed does. Each way trains the baseline, and the same with
another activation, with several seeds, and all predict the same phantoms, which no run has seen.
What is finished is kept: the same command goes on where it was interrupted.
"""

import argparse
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from csv import DictReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.splits import PARTS
from experiments.benchmarks.revisions import HERE, REGIONS, run
from experiments.benchmarks.transfer import phantoms
from experiments.command import command
from experiments.tables import markdown, write_csv
from files import write_json, write_text

TRAINING_CASES, VALIDATION_CASES, TRAINING_SEED = 51, 24, 0
TEST_CASES, TEST_SEED = 60, 9  # the seed is none that networks are trained with
ARMS: dict[str, tuple[str, ...]] = {"baseline": (), "relu": ("activation=relu",)}
COMMON = ("augmentation=paper", "logger=csv", "callbacks.slices.cases=0")


class Way(NamedTuple):
    """A way to train a run, and which of its weights are scored.

    Attributes:
        does: What it is, for the table.
        overrides: Of the command line.
        validation: Number of validation cases.
        checkpoint: "best" of the validation, or "last".
        arms: Arms that are trained in this way.
    """

    does: str
    overrides: tuple[str, ...] = ()
    validation: int = 6
    checkpoint: str = "last"
    arms: tuple[str, ...] = tuple(ARMS)


WAYS = {
    "best of 6": Way("the best weights for 6 validation cases", checkpoint="best"),
    "best of 24": Way("for 24 validation cases", validation=24, checkpoint="best"),
    "last": Way("the last weights"),
    "average": Way("a moving average over 100 steps", ("callbacks=averaged",)),
    "prior": Way(
        "last; logits start at a probability of .05", ("model.prior=0.05",), arms=("baseline",)
    ),
    "clipping": Way(
        "last; norm of the gradient at most 1", ("+trainer.gradient_clip_val=1",),
        arms=("baseline",),
    ),
    "cross entropy": Way(
        "last; next to Dice", ("loss.segmentation.cross_entropy_weight=1",), arms=("baseline",)
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, predict, score and write what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.spread", description=(__doc__ or "").strip()
    )
    parser.add_argument(
        "ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}; default: all"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each; default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/spread"), help="default: %(default)s"
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="of every training"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"ways: expected some of {', '.join(WAYS)}, found {min(unknown)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output = options.output.resolve()
    test = phantoms(output / "test", ("classic",), TEST_CASES, TEST_SEED)
    rows = []
    for name in options.ways or WAYS:
        for seed in range(options.seeds):
            for arm in WAYS[name].arms:
                folder = trained(WAYS[name], arm, seed, output, options.override)
                kept = folder / f"{WAYS[name].checkpoint}.csv"
                if not kept.is_file():
                    logging.info("%s: scoring", kept)
                    write_csv(kept, scored(kept.with_suffix(".ckpt"), test))
                with kept.open(newline="") as file:
                    found = [{k: float(v) for k, v in row.items()} for row in DictReader(file)]
                rows += [{"way": name, "arm": arm, "seed": seed, **row} for row in found]
    lines = table(rows)
    write_csv(output / "spread.csv", rows)
    write_text(output / "spread.md", markdown(lines) + "\n")
    print(markdown(lines))


def trained(way: Way, arm: str, seed: int, output: Path, overrides: Sequence[str]) -> Path:
    """Train an arm in one way; ways that differ in what is scored share the run.

    Raises:
        InputError: Training failed.
    """
    root = phantoms(
        output / "train", ("classic",), TRAINING_CASES + VALIDATION_CASES, TRAINING_SEED
    )
    split = output / f"split-{way.validation}.json"
    names = [f"phantom_{number:04}" for number in range(TRAINING_CASES + way.validation)]
    parts = (names[:TRAINING_CASES], names[TRAINING_CASES:], [])
    write_json(split, dict(zip(PARTS, parts, strict=True)))
    values = (f"validation={way.validation}", *way.overrides, *ARMS[arm])
    folder = output / re.sub(r"[^\w.]+", "-", "-".join((*values, f"seed={seed}")))
    if not (folder / "results.json").is_file():
        logging.info("%s: training", folder.name)
        data = [f"data.data_set.root={root}", f"data.cache.root={output}/cache"]
        run(
            [
                *(sys.executable, "train.py", f"seed={seed}", f"hydra.run.dir={folder}"),
                *(f"data.data_set.count={TRAINING_CASES + VALIDATION_CASES}", *data),
                *("split=file", f"split.path={split}", *COMMON),
                *(*way.overrides, *ARMS[arm], *overrides),
            ],
            HERE,
        )
    return folder


def scored(checkpoint: Path, folder: Path) -> list[dict[str, float]]:
    """Score a checkpoint of a run on the cases of a folder: a row of scores a case."""
    import torch
    from torch.utils.data import DataLoader

    from datamodules.patches import collate_volumes
    from experiments.krivov2018 import volumes_of
    from experiments.run import RunFolder
    from lightning_modules.checkpoint import load

    module, config = load(checkpoint)
    volumes = volumes_of(RunFolder(checkpoint.parent), config, folder)
    metrics = module.metrics["test"]
    with torch.inference_mode():
        for batch in DataLoader(volumes, collate_fn=collate_volumes):
            metrics.update(module(batch["image"]), batch)
    return list(metrics.rows().values())


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Make a row for each way.

    For each region: the Dice of the baseline over the cases that have it, as mean and standard
    deviation over the seeds, and the standard deviation over seeds of the difference between the
    two arms. Runs whose mean Dice of ET is below .05 have not learnt it.
    """
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        means = {
            (arm, region): _means([row for row in own if row["arm"] == arm], region)
            for arm in WAYS[way].arms
            for region in REGIONS
        }
        line = {"weights": way, "which are": WAYS[way].does}
        for region in REGIONS:
            dice = means["baseline", region]
            line[region] = f"{dice.mean():.3f} ± {dice.std(ddof=1):.4f}"
        for region in REGIONS:
            paired = "-"
            if "relu" in WAYS[way].arms:
                paired = f"{(means['relu', region] - means['baseline', region]).std(ddof=1):.4f}"
            line[f"{region}, difference"] = paired
        never = np.concatenate([means[arm, "ET"] < 0.05 for arm in WAYS[way].arms])
        lines.append({**line, "without ET": f"{never.sum()} of {never.size}"})
    return lines


def _means(rows: Sequence[Mapping[str, Any]], region: str) -> np.ndarray:
    """Mean Dice (S,) of each seed over the cases that have a region."""
    seeds = sorted({row["seed"] for row in rows})
    return np.array(
        [np.nanmean([row[f"dice_{region}"] for row in rows if row["seed"] == s]) for s in seeds]
    )


if __name__ == "__main__":
    with command():
        main()
