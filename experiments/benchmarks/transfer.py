"""What each step of augmentation and of realism brings on phantoms of families never trained on.

Each step trains the proxy with several seeds and predicts cases of other families, with other laws
of contrast, anatomy, pathology and drawing (`datamodules.phantom.families`): as real scans do, they
differ from the training in ways that the step was not made for. What is finished is kept: the same
command goes on where it was interrupted, and several may share the steps.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from experiments.benchmarks.revisions import HERE, REGIONS, run, scores_of
from experiments.command import command
from experiments.tables import markdown, write_csv
from files import write_text, written_whole

TEST_FAMILIES = ("swelling", "infiltrating")
TEST_CASES, TEST_SEED = 24, 9  # the seed is none that networks are trained with
SPACING_MM = 2
COMMON = ("patches.epochs=18", "callbacks.early_stopping.patience=18", "logger=csv")


class Step(NamedTuple):
    """A way to train.

    Attributes:
        does: What it adds to the step before; "cross entropy" and "wide" to "intensities".
        families: Phantoms that it trains on, 64 in all.
        overrides: Of the command line.
    """

    does: str
    families: tuple[str, ...]
    overrides: tuple[str, ...] = ("augmentation=wide_intensity",)


STEPS = {
    "spatial": Step("scaling and flips", ("classic",), ()),
    "intensities": Step("scale .6 to 1.6, shift, noise", ("classic",)),
    "wide": Step("all of `augmentation=wide`", ("classic",), ("augmentation=wide",)),
    "cross entropy": Step(
        "next to Dice",
        ("classic",),
        ("augmentation=wide_intensity", "loss.segmentation.cross_entropy_weight=1"),
    ),
    "borders": Step("soft oedema, a rater's smooth line", ("borders",)),
    "cores": Step("isointense, cystic, bloody, nodular cores", ("cores",)),
    "creeping": Step("small, cortical tumours; more that looks like some", ("creeping",)),
    "lopsided": Step("oedema mostly on one side, more cortical tumours", ("lopsided",)),
    "two families": Step("half of the cases `classic`", ("classic", "creeping")),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, predict, score and write what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.transfer", description=(__doc__ or "").strip()
    )
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; default: all"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each; default: %(default)s")
    parser.add_argument(
        "--test-spacing-mm", type=float, default=SPACING_MM, help="of the phantoms that are "
        "predicted; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--cases", type=Path, help="a folder of further cases with masks")
    parser.add_argument(
        "--trained", type=Path, metavar="WEIGHTS", help="networks that were trained otherwise, "
        "such as weights/glioma; alone, unless steps are named",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("runs/transfer"), help="default: %(default)s"
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="of every training"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"steps: expected some of {', '.join(STEPS)}, found {min(unknown)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output = options.output.resolve()
    spacing_mm = options.test_spacing_mm
    tests = {
        family: phantoms(
            output / f"test-{family}-{spacing_mm:g}mm", (family,), TEST_CASES, TEST_SEED, spacing_mm
        )
        for family in TEST_FAMILIES
    }
    if options.cases:
        tests[options.cases.name] = options.cases.resolve()
    rows = []
    for name in options.steps or ([] if options.trained else STEPS):
        for seed in range(options.seeds):
            checkpoint = trained(name, seed, output, options.override)
            for family, cases in tests.items():
                if family not in STEPS[name].families:
                    found = scored(checkpoint, cases, checkpoint.parent / f"{cases.name}-maps")
                    rows += [{"step": name, "seed": seed, "cases": family, **row} for row in found]
    if options.trained:
        for family, cases in tests.items():
            with TemporaryDirectory() as folder:  # weights of this name may change
                found = scored(options.trained.resolve(), cases, Path(folder) / "maps")
            rows += [
                {"step": options.trained.name, "seed": 0, "cases": family, **row} for row in found
            ]
    lines = table(rows)
    write_csv(output / "transfer.csv", rows)
    write_text(output / "transfer.md", markdown(lines) + "\n")
    print(markdown(lines))


def phantoms(
    folder: Path, families: Sequence[str], count: int, seed: int, spacing_mm: float = SPACING_MM
) -> Path:
    """Make phantoms of some families."""
    module = [sys.executable, "-m", "datamodules.phantom", str(folder), "--families", *families]
    numbers = ["--cases", str(count), "--spacing-mm", f"{spacing_mm:g}", "--seed", str(seed)]
    run([*module, *numbers], HERE)
    return folder


def trained(name: str, seed: int, output: Path, overrides: Sequence[str]) -> Path:
    """Train the proxy as a step says; returns its checkpoint.

    Raises:
        InputError: Training failed.
    """
    step = STEPS[name]
    root = output / f"train-{'-'.join(step.families)}"
    folder = output / f"{name.replace(', ', '-').replace(' ', '-')}-s{seed}"
    if not (folder / "results.json").is_file():
        logging.info("%s: training, seed %d", name, seed)
        data = [f"data.data_set.root={root}", f"data.data_set.families=[{','.join(step.families)}]"]
        run(
            [
                *(sys.executable, "train.py", f"seed={seed}", f"hydra.run.dir={folder}"),
                *(f"data.cache.root={output}/cache-{root.name}", *data),
                *(*COMMON, *step.overrides, *overrides),
            ],
            HERE,
        )
    return folder / "best.ckpt"


def scored(checkpoint: Path, cases: Path, maps: Path) -> list[dict[str, Any]]:
    """Predict cases with a checkpoint, or weights, and score them, see `scores_of`.

    What ends in "cored" is that of WT if its components without tumour core are left out.

    Raises:
        InputError: The prediction failed.
    """
    if not maps.is_dir():
        logging.info("%s: predicting", maps)
        predict = [sys.executable, "predict.py", f"checkpoint={checkpoint}", f"input={cases}"]
        with written_whole(maps) as partial:
            run([*predict, f"output={partial}", "pictures=false"], HERE)
    cored = {row["case"]: row for row in scores_of(maps, cases, ["WT"])}
    return [
        {
            **row,
            "dice_cored": cored[row["case"]]["dice_WT"],
            "border_mm_cored": cored[row["case"]]["border_mm_WT"],
        }
        for row in scores_of(maps, cases)
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Make a row for each step and set of cases: Dice over the cases that have a region.

    Means and standard deviations are over the seeds, of the mean over the cases of each.
    """
    lines = []
    keys = dict.fromkeys((row["cases"], row["step"]) for row in rows)
    for cases, step in sorted(keys, key=lambda key: key[0]):
        own = [row for row in rows if (row["cases"], row["step"]) == (cases, step)]
        seeds = sorted({row["seed"] for row in own})
        does = STEPS[step].does if step in STEPS else "trained before"
        line = {"cases": cases, "trained with": step, "it adds": does}
        for region in REGIONS:
            line[region] = over_seeds(own, f"dice_{region}", region)
        line["WT with core"] = over_seeds(own, "dice_cored", "WT")
        line["its border, mm"] = over_seeds(own, "border_mm_cored", "WT", "+.2f")
        lines.append({**line, "seeds": str(len(seeds))})
    return lines


def over_seeds(
    rows: Sequence[Mapping[str, Any]], score: str, region: str, form: str = ".3f"
) -> str:
    """Say mean and standard deviation over seeds of the mean over the cases with a region."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row[f"true_{region}"] and not isnan(row[score]):  # no border where nothing is found
            values.setdefault(row["seed"], []).append(row[score])
    means = [fmean(own) for own in values.values()]
    spread = f" ± {stdev(means):{form.lstrip('+')}}" if len(means) > 1 else ""
    return f"{fmean(means):{form}}{spread}" if means else "-"


if __name__ == "__main__":
    with command():
        main()
