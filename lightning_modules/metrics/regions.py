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

from lightning_modules.metrics.border import border_mm
from lightning_modules.metrics.cases import CaseMetrics
from lightning_modules.metrics.hausdorff import hausdorff95

# Scores of a region in an evaluation, on the grid that the case is stored on.
SCORES = ("dice", "sensitivity", "specificity", "hd95_mm", "hd95_pooled_mm", "border_mm")


class Convention(NamedTuple):
    """Rules for the scores of empty masks.

    Attributes:
        agreed: Dice and sensitivity if truth and prediction are empty.
        agreed_mm: HD95 if truth and prediction are empty.
        false_alarm: Dice and sensitivity if only the truth is empty.
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
    # Scores are over the cases that have the region. What is predicted in the others stands beside
    # them: mixed in, one voxel more or less would move such a case from 1 to 0.
    "nan": Convention(math.nan, math.nan, math.nan, missing_mm=lambda extent_mm: math.nan),
}


def dice(
    prediction: Bool[Tensor, "b r x y z"],
    truth: Bool[Tensor, "b r x y z"],
    outside: Int[Tensor, "b r"],
) -> Float64[Tensor, "b r"]:
    """Compute Dice of each region of each case; NaN if the case does not have the region.

    Args:
        prediction: Predicted masks.
        truth: True masks.
        outside: Number of true voxels outside the volume, which count as missed.
    """
    sums = (2, 3, 4)
    overlap = (prediction & truth).sum(sums).double()
    true = truth.sum(sums) + outside
    total = prediction.sum(sums) + true
    return torch.where(true == 0, torch.nan, 2 * overlap / total.clamp(min=1))


def region_scores(
    prediction: Bool[np.ndarray, "x y z"],
    truth: Bool[np.ndarray, "x y z"],
    spacing_mm: Sequence[float] = (1, 1, 1),
    convention: str = "nan",
) -> dict[str, float]:
    """Compute `SCORES` of one region of one case.

    `border_mm` is not defined if a mask is empty, whatever the convention: it has a sign.
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
    if true:
        dice = 2 * hit / (predicted + true)
    else:
        dice = empty.false_alarm if predicted else empty.agreed
    return {
        "dice": dice,
        "sensitivity": sensitivity,
        "specificity": 1 - (predicted - hit) / background if background else empty.agreed,
        "hd95_mm": hd95_mm,
        "hd95_pooled_mm": hd95_pooled_mm,
        "border_mm": border_mm(prediction, truth, spacing_mm),
    }


def case_scores(
    prediction: Bool[np.ndarray, "r x y z"],
    truth: Bool[np.ndarray, "r x y z"],
    regions: Sequence[str],
    spacing_mm: Sequence[float] = (1, 1, 1),
    convention: str = "nan",
) -> dict[str, float]:
    """Compute the row of a case in an evaluation, on the uncropped grid that it is stored on.

    Args:
        prediction: Predicted masks.
        truth: True masks.
        regions: Names of the first axis.
        spacing_mm: Edges of a voxel along X, Y and Z.
        convention: Name of the rules for empty masks, one of `CONVENTIONS`.

    Returns:
        `<score>_<region>` for all of `SCORES`; `voxels_<region>` and `true_voxels_<region>`, the
        sizes of both masks; `false_alarm_mm3_<region>`, the volume predicted in a case that does
        not have the region, NaN in a case that has it.
    """
    row: dict[str, float] = {}
    for region, found, true in zip(regions, prediction, truth, strict=True):
        scores = region_scores(found, true, spacing_mm, convention)
        scores |= {"voxels": int(found.sum()), "true_voxels": int(true.sum())}
        volume_mm3 = scores["voxels"] * math.prod(spacing_mm)
        scores["false_alarm_mm3"] = math.nan if scores["true_voxels"] else volume_mm3
        row |= {f"{name}_{region}": value for name, value in scores.items()}
    return row


class RegionMetrics(CaseMetrics):
    """Computes Dice of every region during training, on the volumes that the network sees.

    The Dice of a region is a mean over the cases that have the region. What is predicted in the
    other cases has scores of its own.

    Args:
        regions: Names of the output channels, in order.
        spacing_mm: Edge of a voxel.
        threshold: Probability above which a voxel belongs to a region.
    """

    def __init__(
        self, regions: Sequence[str], spacing_mm: float = 1.0, threshold: float = 0.5
    ) -> None:
        super().__init__(threshold)
        self.regions = list(regions)
        self.voxel_mm3 = spacing_mm**3

    def update(self, probability: Float[Tensor, "b r x y z"], batch: Mapping[str, Any]) -> None:
        prediction = probability > self.threshold
        scores = dice(prediction, batch["mask"], batch["outside"]).float()
        alarms_mm3 = prediction.sum((2, 3, 4)).float() * self.voxel_mm3
        alarms_mm3[~scores.isnan()] = torch.nan
        # Every device has float32, which is exact for an index below 2**24.
        index = batch["index"][:, None].float()
        self.records.append(torch.cat([index, scores, alarms_mm3], dim=1).flatten())

    def rows(self) -> dict[int, dict[str, float]]:
        """Return the scores of every case by its index in the data set, in rising order.

        `dice_<region>` is NaN in a case that does not have the region. `false_alarm_mm3_<region>`
        is the volume predicted in such a case, and NaN in the others.
        """
        names = [f"{score}_{r}" for score in ("dice", "false_alarm_mm3") for r in self.regions]
        with self.over_all_ranks():
            table = self.flat_records().view(-1, 1 + len(names)).tolist()
        return {
            int(index): dict(zip(names, scores, strict=True))
            for index, *scores in sorted(table, key=lambda row: row[0])
        }

    def compute(self) -> dict[str, float | Tensor]:
        """Return scores over all cases, without those that are not defined.

        `dice_<region>` is the mean over the cases that have the region, and `dice` the mean of
        these. `without_<region>` is the number of the other cases, `false_alarms_<region>` the
        share of them in which the region is predicted, `false_alarm_mm3_<region>` its mean volume
        in them.
        """
        rows = self.rows().values()
        scores: dict[str, float | Tensor] = {}
        for region in self.regions:
            by_case = torch.tensor([row[f"dice_{region}"] for row in rows])
            alarms_mm3 = torch.tensor([row[f"false_alarm_mm3_{region}"] for row in rows])
            without = by_case.isnan()
            scores[f"without_{region}"] = float(without.sum())
            if not without.all():
                scores[f"dice_{region}"] = by_case[~without].mean()
            if without.any():
                scores[f"false_alarms_{region}"] = (alarms_mm3[without] > 0).float().mean()
                scores[f"false_alarm_mm3_{region}"] = alarms_mm3[without].mean()
        by_region = (scores.get(f"dice_{region}") for region in self.regions)
        defined = [score for score in by_region if score is not None]
        if defined:
            scores["dice"] = torch.stack([torch.as_tensor(value) for value in defined]).mean()
        return scores
