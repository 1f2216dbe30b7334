"""Write the networks of finished runs as weights to pass on: no run, no folders, no code.

    python -m experiments.weights runs/frey2019 FOLDER

Each file of safetensors holds one network with its configuration; `predict.py checkpoint=FOLDER`
averages those of a folder. Thresholds beside them are those of `thresholds=checkpoint`.
"""

import argparse
from pathlib import Path

from errors import InputError
from experiments.command import command
from experiments.operating_point import CORE, THRESHOLDS_NAME
from experiments.run import finished_runs


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
        "--thresholds", action="store_true",
        help="chosen on the validation cases of the runs, over all mirror images",
    )  # fmt: skip
    arguments = parser.parse_args()
    write_weights(arguments.runs, arguments.output, half=arguments.half)
    if arguments.thresholds:
        write_thresholds(arguments.runs, arguments.output)


def write_weights(runs: Path, output: Path, *, half: bool = False) -> list[Path]:
    """Write the best checkpoint of each finished run of a folder, see `export`; returns the files.

    Raises:
        InputError: There is no finished run, a checkpoint cannot be used, or the output has weights
            of other runs, which would be averaged with them.
    """
    from lightning_modules.checkpoint import WEIGHTS, export

    written = {output / f"{run.path.name}{WEIGHTS}": run for run in finished_runs(runs)}
    if others := set(output.glob(f"*{WEIGHTS}")) - set(written):
        raise InputError(
            f"{output}: expected no weights, or those of the same runs; found {min(others).name}"
        )
    for path, run in written.items():
        export(run.best, path, half=half)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return list(written)


def write_thresholds(runs: Path, output: Path) -> None:
    """Choose thresholds, and a least volume of ET, as evaluate.py does, and write them to weights.

    Of WT only components with tumour core are kept, because that is what carries over to scans that
    differ from those of the training (experiments/results/transfer).

    Args:
        runs: Folder of a run, or of several, whose data are where they were in training.
        output: Folder of their weights.

    Raises:
        InputError: The runs have no validation cases, or their data are gone.
    """
    from experiments.evaluation import best_point, cases_of_part
    from experiments.prediction import Predictor

    common = {"detector": None, "flips": True, "thresholds": "checkpoint", "device": "auto"}
    common |= {"weights": None, "precision": "32", "probabilities": False, "pictures": False}
    trained, written = (
        Predictor.from_options({**common, "checkpoint": folder, "again": False})
        for folder in (runs, output)
    )
    cases = cases_of_part(trained.cases(), "validation", runs)
    regions = trained.data_set.regions
    least_volume = [region for region in ("ET",) if region in regions]
    with_core = ["WT"] if {"WT", CORE} <= set(regions) else []
    point = best_point(trained, cases, least_volume, with_core)
    point.write(output / THRESHOLDS_NAME, written.networks)


if __name__ == "__main__":
    with command():
        main()
