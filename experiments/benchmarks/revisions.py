"""What each revision of this repository does to the scores of its demo, over several seeds.

Each revision is checked out, trains its demo with each seed, and predicts the same cases, which no
run has seen. The present evaluation scores all predictions, so that only the networks differ, and
not what is counted. What is finished is kept: the same command goes on where it was interrupted.
"""

import argparse
import logging
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from errors import InputError
from experiments.command import command
from experiments.tables import markdown, write_csv
from files import write_text, written_whole

HERE = Path(__file__).resolve().parents[2]
REGIONS = ("WT", "TC", "ET")
PHANTOMS_SEED = 9  # of the cases that are scored; the demo's phantoms have seed 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.revisions", description=(__doc__ or "").strip()
    )
    parser.add_argument("revisions", nargs="+", help="commits, in the order of the table")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each; default: %(default)s")
    parser.add_argument("--cases", type=Path, help="cases with masks; default: 24 phantoms")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/revisions"), help="default: %(default)s"
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="of every training"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    cases = options.cases.resolve() if options.cases else make_phantoms(output / "cases")
    lines, scores = [], []
    for revision in options.revisions:
        commit, title = describe(revision)
        rows_by_seed = [
            demo(commit, seed, cases, output, options.override) for seed in range(options.seeds)
        ]
        lines.append({"revision": commit, "change": title, **summary(rows_by_seed)})
        scores += [
            {"revision": commit, "seed": seed, **row}
            for seed, rows in enumerate(rows_by_seed)
            for row in rows
        ]
        write_csv(output / f"{cases.name}.csv", scores)
        write_text(output / f"{cases.name}.md", markdown(lines) + "\n")
    print(markdown(lines))


def make_phantoms(folder: Path) -> Path:
    """Make the cases that are scored."""
    module = [sys.executable, "-m", "datamodules.phantom", str(folder)]
    run([*module, "--cases", "24", "--spacing-mm", "2", "--seed", str(PHANTOMS_SEED)], HERE)
    return folder


def describe(revision: str) -> tuple[str, str]:
    """Return the short name and the subject of a commit.

    Raises:
        InputError: There is no such commit.
    """
    shown = subprocess.run(
        ["git", "log", "-1", "--format=%h%x00%s", revision, "--"],
        cwd=HERE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if shown.returncode or not shown.stdout:
        raise InputError(f"{revision}: expected a commit of {HERE}, found none")
    commit, title = shown.stdout.strip().split("\0")
    return commit, title


def check_out(commit: str, tree: Path) -> None:
    """Write the files of a commit into a new folder."""
    archive = subprocess.run(
        ["git", "archive", commit], cwd=HERE, stdout=subprocess.PIPE, check=True
    ).stdout
    with written_whole(tree) as partial, tarfile.open(fileobj=BytesIO(archive)) as files:
        partial.mkdir()
        files.extractall(partial, filter="data")


def demo(
    commit: str, seed: int, cases: Path, output: Path, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """Train the demo of a revision with a seed, predict the cases and score them.

    Returns:
        The scores of every case, see `scores_of`.

    Raises:
        InputError: A command of the revision failed.
    """
    maps = output / f"{commit}-s{seed}-{cases.name}"
    if not maps.is_dir():
        tree = output / f"{commit}-tree"
        if not tree.is_dir():
            check_out(commit, tree)
        trained = output / f"{commit}-s{seed}"
        if not (trained / "results.json").is_file():
            logging.info("%s: training, seed %d", commit, seed)
            train = [sys.executable, "train.py", f"seed={seed}", "logger=csv", *overrides]
            run([*train, f"hydra.run.dir={trained}"], tree)
        logging.info("%s: predicting %s, seed %d", commit, cases, seed)
        predict = [sys.executable, "predict.py", f"checkpoint={trained}/best.ckpt"]
        with written_whole(maps) as partial:
            run([*predict, f"input={cases}", f"output={partial}", "pictures=false"], tree)
    return scores_of(maps, cases)


def scores_of(maps: Path, folder: Path, cored: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compare predicted label maps with the truth.

    Args:
        maps: Folder of the label maps.
        folder: Folder of the cases.
        cored: Regions of which only components with tumour core are kept, see `without_coreless`.

    Returns:
        For each case the voxels of each region in the truth and in the prediction, its Dice, and
        how far the predicted border lies outside the true one, in mm.
    """
    from datamodules.brats import BraTS, BraTSMasks
    from experiments.frey2019 import compare, pairs_of
    from experiments.operating_point import without_coreless
    from lightning_modules.metrics.border import border_mm

    data_set = BraTS(folder)
    predictions = BraTSMasks(maps)
    rows = []
    for pair in pairs_of(predictions, data_set.cases()):
        both = compare(pair, predictions, data_set)
        prediction = without_coreless(both.prediction, data_set.regions, cored)
        row = {}
        for region, found, true in zip(data_set.regions, prediction, both.truth, strict=True):
            total = int(found.sum() + true.sum())
            row[f"true_{region}"], row[f"found_{region}"] = int(true.sum()), int(found.sum())
            row[f"dice_{region}"] = 2 * int((found & true).sum()) / total if total else float("nan")
            row[f"border_mm_{region}"] = border_mm(found, true, both.spacing_mm)
        rows.append({"case": pair.case.name, **row})
    return rows


def run(arguments: Sequence[str], folder: Path) -> None:
    """Run a command in a folder.

    Raises:
        InputError: It failed; its last lines are in the message.
    """
    done = subprocess.run(
        arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        last = " | ".join(done.stdout.strip().splitlines()[-3:])
        raise InputError(f"{' '.join(arguments)}: expected exit code 0, found {last}")


def summary(rows_by_seed: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Summarise the scores of one revision.

    Args:
        rows_by_seed: For each seed, the scores of every case.

    Returns:
        For each region, the mean Dice over the cases that have it, as mean and standard deviation
        over seeds, and the share of the cases without it in which it was predicted all the same.
    """
    line = {}
    for region in REGIONS:
        having = [[row for row in rows if row[f"true_{region}"]] for rows in rows_by_seed]
        dice = [fmean(row[f"dice_{region}"] for row in rows) for rows in having if rows]
        spread = f" ± {stdev(dice):.3f}" if len(dice) > 1 else ""
        score = f"{fmean(dice):.3f}{spread}" if dice else "-"
        line[f"{region} ({len(having[0])} cases)"] = score
        alarms = [
            row[f"found_{region}"] > 0
            for rows in rows_by_seed
            for row in rows
            if not row[f"true_{region}"]
        ]
        if alarms:
            line[f"{region} false alarms"] = f"{sum(alarms)} of {len(alarms)}"
    return line


if __name__ == "__main__":
    with command():
        main()
