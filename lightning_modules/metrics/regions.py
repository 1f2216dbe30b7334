"""Region-wise overlap and surface distance of each case.

Published scores differ more by the definition of HD95 and by the score of an empty mask than by the
network. So HD95 has two columns, one for each definition, and the rules for empty masks have names.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from lightning_modules.metrics.cases import CaseMetrics
from lightning_modules.metrics.hausdorff import hausdorff95

# Scores of a region in an evaluation, on the grid that the case is stored on.
SCORES = ("dice", "sensitivity", "specificity", "hd95_mm", "hd95_pooled_mm")


class Convention(NamedTuple):
    """Rules for the scores of empty masks.

    Attributes:
        agreed: Dice and sensitivity if truth and prediction are empty.
        agreed_mm: HD95 if truth and prediction are empty.
        false_alarm: Sensitivity if only the truth is empty.
        missing_mm: HD95 if one of them is empty, computed from the extents of the grid in mm.
    """

    agreed: float
    agreed_mm: float
    false_alarm: float
    missing_mm: Callable[[Sequence[float]], float]


CONVENTIONS = {
    # The diagonal of the BraTS grid is 373.13 mm.
    "brats2020": Convention(1.0, 0.0, 0.0, missing_mm=lambda extent_mm: math.hypot(*extent_mm)),
    "brats2023": Convention(1.0, 0.0, 0.0, missing_mm=lambda extent_mm: 374.0),
    # Means leave out NaN; tables give the number of cases beside them.
    "nan": Convention(math.nan, math.nan, math.nan, missing_mm=lambda extent_mm: math.nan),
}


def dice(
    prediction: Bool[Tensor, "b r x y z"],
    truth: Bool[Tensor, "b r x y z"],
    outside: Int[Tensor, "b r"],
) -> Float64[Tensor, "b r"]:
    """Compute Dice of each region of each case; 1 if truth and prediction are empty (`brats2020`).

    Args:
        prediction: Predicted masks.
        truth: True masks.
        outside: Number of true voxels outside the volume, which count as missed.
    """
    sums = (2, 3, 4)
    overlap = (prediction & truth).sum(sums).double()
    total = prediction.sum(sums) + truth.sum(sums) + outside
    return torch.where(total == 0, 1.0, 2 * overlap / total.clamp(min=1))


def region_scores(
    prediction: Bool[np.ndarray, "x y z"],
    truth: Bool[np.ndarray, "x y z"],
    spacing_mm: Sequence[float] = (1, 1, 1),
    convention: str = "brats2020",
) -> dict[str, float]:
    """Compute `SCORES` of one region of one case.

    Specificity depends on the amount of background, so masks must cover whole scans, not crops.

    Args:
        prediction: Predicted mask.
        truth: True mask.
        spacing_mm: Edges of a voxel along X, Y and Z.
        convention: Name of the rules for empty masks, one of `CONVENTIONS`.
    """
    empty = CONVENTIONS[convention]
    predicted, true = int(prediction.sum()), int(truth.sum())
    hit = int((prediction & truth).sum())
    background = truth.size - true
    if predicted and true:
        sensitivity = hit / true
        hd95_mm, hd95_pooled_mm = hausdorff95(prediction, truth, spacing_mm)
    elif predicted or true:
        sensitivity = 0.0 if true else empty.false_alarm
        extent_mm = [side * edge for side, edge in zip(truth.shape, spacing_mm, strict=True)]
        hd95_mm = hd95_pooled_mm = empty.missing_mm(extent_mm)
    else:
        sensitivity, hd95_mm, hd95_pooled_mm = empty.agreed, empty.agreed_mm, empty.agreed_mm
    return {
        "dice": 2 * hit / (predicted + true) if predicted + true else empty.agreed,
        "sensitivity": sensitivity,
        "specificity": 1 - (predicted - hit) / background if background else empty.agreed,
        "hd95_mm": hd95_mm,
        "hd95_pooled_mm": hd95_pooled_mm,
    }


def case_scores(
    prediction: Bool[np.ndarray, "r x y z"],
    truth: Bool[np.ndarray, "r x y z"],
    regions: Sequence[str],
    spacing_mm: Sequence[float] = (1, 1, 1),
    convention: str = "brats2020",
) -> dict[str, float]:
    """Compute the row of a case in an evaluation, on the uncropped grid that it is stored on.

    Args:
        prediction: Predicted masks.
        truth: True masks.
        regions: Names of the first axis.
        spacing_mm: Edges of a voxel along X, Y and Z.
        convention: Name of the rules for empty masks, one of `CONVENTIONS`.

    Returns:
        `<score>_<region>` for all of `SCORES`, and `voxels_<region>` and `true_voxels_<region>`,
        the volumes of both masks, which tell whether one was empty.
    """
    row: dict[str, float] = {}
    for region, found, true in zip(regions, prediction, truth, strict=True):
        scores = region_scores(found, true, spacing_mm, convention)
        scores |= {"voxels": int(found.sum()), "true_voxels": int(true.sum())}
        row |= {f"{name}_{region}": value for name, value in scores.items()}
    return row


class RegionMetrics(CaseMetrics):
    """Computes Dice of every region during training, on the volumes that the network sees.

    Args:
        regions: Names of the output channels, in order.
        threshold: Probability above which a voxel belongs to a region.
    """

    def __init__(self, regions: Sequence[str], threshold: float = 0.5) -> None:
        super().__init__(threshold)
        self.names = [f"dice_{region}" for region in regions]
        self.best_is_highest = ("dice", *self.names)

    def update(self, probability: Float[Tensor, "b r x y z"], batch: Mapping[str, Any]) -> None:
        scores = dice(probability > self.threshold, batch["mask"], batch["outside"])
        # Every device has float32, which is exact for an index below 2**24.
        rows = torch.cat([batch["index"][:, None].float(), scores.float()], dim=1)
        self.records.append(rows.flatten())

    def rows(self) -> dict[int, dict[str, float]]:
        with self.over_all_ranks():
            table = self.flat_records().view(-1, 1 + len(self.names)).tolist()
        return {
            int(index): dict(zip(self.names, scores, strict=True))
            for index, *scores in sorted(table, key=lambda row: row[0])
        }

    def compute(self) -> dict[str, float | Tensor]:
        """Return `dice_<region>`, each the mean over the cases, and the mean of these, `dice`."""
        table = torch.tensor([list(row.values()) for row in self.rows().values()])
        by_region = table.nanmean(0)
        return {**dict(zip(self.names, by_region, strict=True)), "dice": by_region.mean()}
