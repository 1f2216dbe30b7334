"""What each revision of this repository does to the scores of its demo, over several seeds.

Each revision is checked out, trains its demo with each seed, and predicts the same cases, which no
run has seen. The present evaluation scores all predictions, so that only the networks differ, and
not what is counted. What is finished is kept: the same command goes on where it was interrupted.
"""

import argparse
import csv
import logging
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

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
) -> list[dict[str, str]]:
    """Train the demo of a revision with a seed, predict the cases and score them.

    Returns:
        A row for every case, as the evaluation writes them.

    Raises:
        InputError: A command of the revision failed.
    """
    scored = output / f"{commit}-s{seed}-{cases.name}"
    table = scored / "cases.csv"
    if not table.is_file():
        tree = output / f"{commit}-tree"
        if not tree.is_dir():
            check_out(commit, tree)
        trained = output / f"{commit}-s{seed}"
        if not (trained / "results.json").is_file():
            logging.info("%s: training, seed %d", commit, seed)
            train = [sys.executable, "train.py", f"seed={seed}", "logger=csv", *overrides]
            run([*train, f"hydra.run.dir={trained}"], tree)
        logging.info("%s: predicting %s, seed %d", commit, cases, seed)
        maps = scored / "label_maps"
        predict = [sys.executable, "predict.py", f"checkpoint={trained}/best.ckpt"]
        run([*predict, f"input={cases}", f"output={maps}", "pictures=false"], tree)
        score = [sys.executable, "evaluate.py", f"predictions={maps}", "wandb=disabled"]
        run([*score, f"input={cases}", f"output={scored}"], HERE)
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


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


def summary(rows_by_seed: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, str]:
    """Summarise the scores of one revision.

    Args:
        rows_by_seed: For each seed, a row for every case.

    Returns:
        For each region, the mean Dice over the cases that have it, as mean and standard deviation
        over seeds, and the share of the cases without it in which it was predicted all the same.
    """
    from statistics import fmean, stdev

    line = {}
    for region in REGIONS:
        dice, alarms = [], []
        for rows in rows_by_seed:
            having = [row for row in rows if float(row[f"true_voxels_{region}"]) > 0]
            without = [row for row in rows if float(row[f"true_voxels_{region}"]) == 0]
            dice.append(fmean(float(row[f"dice_{region}"]) for row in having) if having else None)
            alarms += [float(row[f"voxels_{region}"]) > 0 for row in without]
        defined = [value for value in dice if value is not None]
        spread = f" ± {stdev(defined):.3f}" if len(defined) > 1 else ""
        cases = len(rows_by_seed[0]) - len(alarms) // len(rows_by_seed)
        line[f"{region} ({cases} cases)"] = f"{fmean(defined):.3f}{spread}" if defined else "-"
        if alarms:
            line[f"{region} false alarms"] = f"{sum(alarms)} of {len(alarms)}"
    return line


if __name__ == "__main__":
    with command():
        main()
