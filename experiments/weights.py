"""Write the networks of finished runs as weights to pass on: no run, no folders, no code.

    python -m experiments.weights runs/frey2019 FOLDER

Each file of safetensors holds one network with its configuration; `predict.py checkpoint=FOLDER`
averages the probabilities of those of a folder. Thresholds beside them are those of
`thresholds=checkpoint`.
"""

import argparse
from pathlib import Path

from errors import InputError
from experiments.command import command
from experiments.operating_point import CORE, THRESHOLDS_NAME
from experiments.run import finished_runs

OWN = object()  # cases of the runs themselves


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, help="folder of a run, or of several")
    parser.add_argument("output", type=Path, help="folder of the weights; it must not have others")
    parser.add_argument("--half", action="store_true", help="rounded to float16: half the size")
    parser.add_argument(
        "--mean", action="store_true",
        help="one network with the mean of the weights of runs that were fine-tuned from the same",
    )  # fmt: skip
    parser.add_argument(
        "--thresholds", nargs="?", type=Path, const=OWN, metavar="CASES",
        help="chosen over all mirror images on the cases of a folder, which no run must have seen; "
        "without a folder on the validation cases of the runs",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.mean and arguments.thresholds is OWN:
        parser.error(
            "--thresholds: expected a folder of cases with --mean, since the validation cases of "
            "one run may be training cases of another; found none"
        )
    write_weights(arguments.runs, arguments.output, half=arguments.half, mean=arguments.mean)
    if arguments.thresholds is not None:
        unseen = None if arguments.thresholds is OWN else arguments.thresholds
        write_thresholds(arguments.runs, arguments.output, unseen)


def write_weights(
    runs: Path, output: Path, *, half: bool = False, mean: bool = False
) -> list[Path]:
    """Write the best checkpoint of each finished run of a folder, see `export`; returns the files.

    Args:
        runs: Folder of a run, or of several.
        output: Folder of the weights.
        half: Round the weights to float16.
        mean: Average the weights of all runs to those of one network, with the folder's name.

    Raises:
        InputError: There is no finished run, a checkpoint cannot be used, or the output has weights
            of other runs, which would be averaged with them.
    """
    from lightning_modules.checkpoint import WEIGHTS, export

    finished = finished_runs(runs)
    checkpoints = {run.path.name: [run.best] for run in finished}
    if mean:
        checkpoints = {runs.resolve().name: [run.best for run in finished]}
    written = {output / f"{name}{WEIGHTS}": paths for name, paths in checkpoints.items()}
    if others := set(output.glob(f"*{WEIGHTS}")) - set(written):
        raise InputError(
            f"{output}: expected no weights, or those of the same runs; found {min(others).name}"
        )
    for path, paths in written.items():
        export(paths, path, half=half)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return list(written)


def write_thresholds(runs: Path, output: Path, unseen: Path | None = None) -> None:
    """Choose thresholds, and a least volume of ET, as evaluate.py does, and write them to weights.

    Of WT only components with tumour core are kept, because that is what carries over to scans that
    differ from those of the training (experiments/results/transfer).

    Args:
        runs: Folder of a run, or of several, whose data are where they were in training.
        output: Folder of their weights.
        unseen: Folder of cases to choose them on, instead of the validation cases of the runs.

    Raises:
        InputError: The runs have no validation cases, or their data are gone; or there is no case
            with a mask in the folder, or one that a network has seen.
    """
    from experiments.evaluation import best_point, cases_of_part, check_all_unseen
    from experiments.prediction import Predictor
    from experiments.trained import find_checkpoints

    common = {"detector": None, "flips": True, "thresholds": "checkpoint", "device": "auto"}
    common |= {"weights": None, "precision": "32", "probabilities": False, "pictures": False}

    def predictor(folder: Path) -> Predictor:
        return Predictor.from_options({**common, "checkpoint": folder, "again": False})

    written = predictor(output)
    if unseen is None:
        chosen_with = predictor(runs)
        cases = cases_of_part(chosen_with.cases(), "validation", runs)
    else:
        chosen_with = written.in_folder(unseen)
        cases = cases_of_part(chosen_with.cases(), "all", output)
        check_all_unseen(find_checkpoints(output), cases)
    regions = chosen_with.data_set.regions
    least_volume = [region for region in ("ET",) if region in regions]
    with_core = ["WT"] if {"WT", CORE} <= set(regions) else []
    point = best_point(chosen_with, cases, least_volume, with_core)
    point.write(output / THRESHOLDS_NAME, written.networks)


if __name__ == "__main__":
    with command():
        main()
