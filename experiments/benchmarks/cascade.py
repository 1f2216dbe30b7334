"""Time of a cascade against what it finds, over the threshold of its detector.

Each threshold runs the networks of `checkpoint` where the detector fires, and the first row runs
them everywhere. Cases are test cases of every checkpoint, and are scored on the grid of their own
files, at the threshold of the networks. Seconds are those of the networks, the detector's included:
reading, preprocessing and writing are the same for all rows. All take turns in one process.

The detector's own threshold was chosen on its validation cases, and is marked; no other row of the
table is one to choose.
"""

import argparse
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.progress import track

from experiments.command import command
from experiments.tables import markdown, write_csv
from files import write_text, written_whole

if TYPE_CHECKING:
    from datamodules.cases import Case
    from experiments.prediction import Predictor

THRESHOLDS = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.997)


class Scored(NamedTuple):
    """What was found in a case, and what it took.

    Attributes:
        seconds: Time of the networks and the detector.
        share: How many voxels the networks got, over how many they get without a detector.
        dice: Mean over the regions that the case has; NaN if it has none.
        lesions: Components of the first region.
        detected: Those in which a voxel was predicted.
        false_positives: Predicted components that touch none.
    """

    seconds: float
    share: float
    dice: float
    lesions: int
    detected: int
    false_positives: int


class Point(NamedTuple):
    """A row of the table: the scores of all cases with a detector's threshold.

    Attributes:
        name: The threshold, or "no detector".
        seconds: Mean over the cases.
        share: Mean over the cases.
        dice: Mean over the cases that have a region.
        sensitivity: Detected lesions of all cases, over all lesions.
        false_positives: Mean over the cases.
    """

    name: str
    seconds: float
    share: float
    dice: float
    sensitivity: float
    false_positives: float

    @classmethod
    def of_cases(cls, name: str, cases: Sequence[Scored]) -> "Point":
        lesions = sum(case.lesions for case in cases)
        return cls(
            name=name,
            seconds=float(np.mean([case.seconds for case in cases])),
            share=float(np.mean([case.share for case in cases])),
            dice=float(np.nanmean([case.dice for case in cases])),
            sensitivity=sum(case.detected for case in cases) / lesions,
            false_positives=float(np.mean([case.false_positives for case in cases])),
        )


def scored(probabilities: np.ndarray, truth: np.ndarray, threshold: float) -> Scored:
    """Score probabilities (R, X, Y, Z) of a case against its masks (R, X, Y, Z).

    Returns:
        The scores, with NaN in place of time and share.
    """
    from lightning_modules.metrics.lesions import COUNTS, match

    prediction = probabilities > threshold
    both = (prediction & truth).sum((1, 2, 3))
    either = prediction.sum((1, 2, 3)) + truth.sum((1, 2, 3))
    has = truth.any(axis=(1, 2, 3))
    found = match(probabilities[0].astype(np.float32), truth[0], thresholds=[threshold])
    counts = dict(zip(COUNTS, found.counts[0], strict=True))
    return Scored(
        seconds=float("nan"),
        share=float("nan"),
        dice=float(np.mean(2 * both[has] / either[has])) if has.any() else float("nan"),
        lesions=len(found.lesions),
        detected=int(counts["detected"]),
        false_positives=int(counts["false_positives"]),
    )


def rows_of(points: Sequence[Point], own: str) -> list[dict[str, str]]:
    """Format the points of the curve as a table, the first of which has no detector.

    Args:
        points: In the order of the rows.
        own: Name of the point at the detector's own threshold, which is marked.
    """
    return [
        {
            "detector's threshold": f"{point.name} (its own)" if point.name == own else point.name,
            "share of voxels": f"{point.share:.3f}",
            "seconds a case": f"{point.seconds:.2f}",
            "times as fast": f"{points[0].seconds / point.seconds:.1f}",
            "Dice": f"{point.dice:.3f}",
            "sensitivity": f"{point.sensitivity:.3f}",
            "FP a patient": f"{point.false_positives:.2f}",
        }
        for point in points
    ]


def draw(points: Sequence[Point], own: str, path: Path) -> None:
    """Draw Dice and sensitivity against seconds a case, the first point as a line."""
    from matplotlib.figure import Figure

    alone, *curve = points
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), ("dice", "sensitivity"), strict=True):
        values = [getattr(point, score) for point in curve]
        axes.plot([point.seconds for point in curve], values, "o-", ms=4, color="#457b9d")
        axes.plot(alone.seconds, getattr(alone, score), "D", color="#1d3557", label=alone.name)
        for point, value in zip(curve, values, strict=True):
            if point.name == own:
                label = f"detector's own threshold, {own}"
                axes.plot(point.seconds, value, "*", ms=13, color="#e63946", label=label)
        axes.set(xlabel="seconds a case", ylabel=score.capitalize().replace("Dice", "Dice, mean"))
        axes.set(xlim=(0, None), ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def measured(
    predictors: Mapping[str, "Predictor"], cases: Sequence["Case"], repeats: int
) -> list[Point]:
    """Measure every predictor on every case; the fastest of the repeats counts."""
    from datamodules.preprocessing import on_scan_grid

    scores: dict[str, list[Scored]] = {name: [] for name in predictors}
    for case in track(cases, "measuring"):
        seconds = dict.fromkeys(predictors, float("inf"))
        for repeat, (name, predictor) in product(range(repeats), predictors.items()):
            estimate = predictor.estimate(case)
            seconds[name] = min(seconds[name], estimate.seconds)
            if repeat == repeats - 1:
                restored = on_scan_grid(
                    case, predictor.data_set, estimate.volume.affine, estimate.probabilities
                )
                found = scored(restored.probabilities, restored.truth, predictor.trained.threshold)
                scores[name].append(found._replace(seconds=seconds[name], share=estimate.share))
    return [Point.of_cases(name, of_cases) for name, of_cases in scores.items()]


def predictors_of(
    options: Mapping[str, Any], folder: Path, thresholds: Sequence[float]
) -> tuple[dict[str, "Predictor"], str]:
    """Make predictors without a detector, and with each threshold of it.

    Args:
        options: The values of conf/predict.yaml.
        folder: Folder of the cases.
        thresholds: Those to try, beside the detector's own.

    Returns:
        Predictors by the names of their points, and the name at the detector's own threshold.
    """
    from experiments.cascade import Everywhere, WhereItFires
    from experiments.prediction import Predictor

    cascade = Predictor.from_options(options).in_folder(folder)
    where = cascade.where
    assert isinstance(where, WhereItFires)
    predictors = {"no detector": replace(cascade, where=Everywhere())}
    for threshold in sorted({*thresholds, where.threshold}):
        own_where = replace(where, threshold=threshold)
        predictors[f"{threshold:.4g}"] = replace(cascade, where=own_where)
    return predictors, f"{where.threshold:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.cascade",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("detector", type=Path, help="checkpoint, or the folder of a run")
    parser.add_argument("checkpoint", type=Path, help="of the networks that run where it fires")
    parser.add_argument("cases", type=Path, help="folder of cases with masks")
    parser.add_argument("output", type=Path, help="gets cascade.md, cascade.csv and cascade.png")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=THRESHOLDS, help="beside the detector's own"
    )
    parser.add_argument("--margin-mm", type=float, default=5, help="default: %(default)s")
    parser.add_argument("--flips", action="store_true", help="average all mirror images")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=2, help="default: %(default)s")
    arguments = parser.parse_args()

    import torch

    from experiments.evaluation import cases_of_part

    options = {
        "checkpoint": str(arguments.checkpoint),
        "detector": str(arguments.detector),
        "detector_threshold": "checkpoint",
        "detector_margin_mm": arguments.margin_mm,
        "thresholds": "checkpoint",
        "precision": 32,
        "flips": arguments.flips,
        "device": arguments.device,
        "probabilities": False,
        "pictures": False,
        "again": False,
    }
    predictors, own = predictors_of(options, arguments.cases, arguments.thresholds)
    checkpoints = [arguments.checkpoint, arguments.detector]
    cases = cases_of_part(predictors[own].cases(), "test", checkpoints)
    points = measured(predictors, cases, arguments.repeats)
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    table = markdown(rows_of(points, own))
    note = (
        f"{len(cases)} test cases, margin {arguments.margin_mm:g} mm, fastest of "
        f"{arguments.repeats}, {on}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    write_text(arguments.output / "cascade.md", f"{table}\n\n{note}\n")
    write_csv(arguments.output / "cascade.csv", [point._asdict() for point in points])
    draw(points, own, arguments.output / "cascade.png")
    print(f"{table}\n\n{note}")


if __name__ == "__main__":
    with command():
        main()
