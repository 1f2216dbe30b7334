"""Overlap and distance of regions, case by case.

Published numbers differ by how a distance is defined and by what an empty mask scores more than by
the networks behind them: so there are two columns for HD95, and the rules for empty masks have
names.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor
from torchmetrics import Metric

PERCENTILE = 95
# How voxels are told apart before distances are measured: no result depends on these.
MOST_SHELLS, FEW = 4, 0.1

# What is scored in evaluations, on the grid that a case is stored on.
SCORES = ("dice", "sensitivity", "specificity", "hd95_mm", "hd95_pooled_mm")


class Convention(NamedTuple):
    """What is scored where a mask is empty.

    Attributes:
        agreed: Dice and sensitivity where truth and prediction are empty.
        agreed_mm: HD95 there.
        false_alarm: Sensitivity where only the truth is empty.
        missing_mm: HD95 where one of them is empty, from the extents of the grid in mm.
    """

    agreed: float
    agreed_mm: float
    false_alarm: float
    missing_mm: Callable[[Sequence[float]], float]


CONVENTIONS = {
    # The diagonal of the BraTS grid is 373.13 mm.
    "brats2020": Convention(1.0, 0.0, 0.0, missing_mm=lambda extent_mm: math.hypot(*extent_mm)),
    "brats2023": Convention(1.0, 0.0, 0.0, missing_mm=lambda extent_mm: 374.0),
    # Left out of means: with it goes the count of what was left out.
    "nan": Convention(math.nan, math.nan, math.nan, missing_mm=lambda extent_mm: math.nan),
}


def dice(prediction: Tensor, truth: Tensor, outside: Tensor) -> Tensor:
    """Dice of each region of each case; 1 where truth and prediction are empty (`brats2020`).

    Args:
        prediction: (B, R, X, Y, Z), bool.
        truth: (B, R, X, Y, Z), bool.
        outside: (B, R), true voxels that lie outside the volume; they count as missed.

    Returns:
        (B, R), float64.
    """
    sums = (2, 3, 4)
    overlap = (prediction & truth).sum(sums).double()
    total = prediction.sum(sums) + truth.sum(sums) + outside
    return torch.where(total == 0, 1.0, 2 * overlap / total.clamp(min=1))


def region_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float] = (1, 1, 1),
    convention: str = "brats2020",
) -> dict[str, float]:
    """`SCORES` of one region of one case.

    Specificity depends on how much background there is: give whole scans, not crops.

    Args:
        prediction: (X, Y, Z), bool.
        truth: (X, Y, Z), bool.
        spacing_mm: Edges of a voxel.
        convention: Name of the rules for empty masks.
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


class Hausdorff95(NamedTuple):
    """Two definitions that differ by a fifth in practice, and by far more with distant islands.

    Attributes:
        maximum_mm: Larger one of the 95th percentiles of the two directed distances.
        pooled_mm: 95th percentile of the distances of both directions together, which the online
            evaluation of BraTS 2017-2020 used.
    """

    maximum_mm: float
    pooled_mm: float


def hausdorff95(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float] = (1, 1, 1)
) -> Hausdorff95:
    """HD95 between the surfaces of two masks (X, Y, Z), neither of them empty.

    A surface are the voxels of a mask that have a face neighbour outside it.
    """
    box = bounding_box(prediction | truth)
    surfaces = [surface(np.pad(mask[box], MOST_SHELLS)) for mask in (prediction, truth)]
    points = [_positions(own, spacing_mm) for own in surfaces]
    # Built for one query: balanced trees would take longer than they save.
    trees = [KDTree(own, 16, balanced_tree=False, compact_nodes=False) for own in points]
    shells = [_shells(*surfaces), _shells(*reversed(surfaces))]
    # Only the largest distances matter, and looking for them takes the time: from the outermost
    # shell inwards, until what is left is nearer than all that is asked for.
    distances_mm = [np.zeros(len(own)) for own in points]
    ranked = distances_mm
    outermost = max(1, *(int(shell.max()) for shell in shells))
    for number in range(outermost - 1, -1, -1):
        for distance_mm, shell, own, tree in zip(
            distances_mm, shells, points, reversed(trees), strict=True
        ):
            here = shell == number + 1
            distance_mm[here] = tree.query(own[here])[0]
        ranked = [*distances_mm, np.concatenate(distances_mm)]
        left_mm = number * math.hypot(*spacing_mm)  # no voxel of the inner shells is further
        if all(np.percentile(values, PERCENTILE, method="lower") >= left_mm for values in ranked):
            break
    first, second, pooled = (float(np.percentile(values, PERCENTILE)) for values in ranked)
    return Hausdorff95(maximum_mm=max(first, second), pooled_mm=pooled)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Of the true voxels of a mask (X, Y, Z), which has some."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        inside = mask[tuple(box)]
        others = tuple(other for other in range(mask.ndim) if other != axis)
        hit = np.flatnonzero(inside.any(axis=others))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask (X, Y, Z) with a face neighbour outside it; its outermost ones are false."""
    flat = mask.ravel()
    inside = flat.copy()
    for step in _steps(mask.shape):
        inside[step:] &= flat[:-step]
        inside[:-step] &= flat[step:]
    return (flat & ~inside).reshape(mask.shape)


def _steps(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """From a voxel to the next along each axis, where volumes (X, Y, Z) lie in one dimension.

    Shifts are fast there, and a margin keeps the ends of rows and planes apart.
    """
    return 1, shape[2], shape[1] * shape[2]


def _positions(mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Of the N true voxels of a mask (X, Y, Z): (N, 3) in mm."""
    # `np.argwhere` takes twice as long.
    index = np.unravel_index(np.flatnonzero(mask), mask.shape)
    return np.stack(index, axis=1) * np.asarray(spacing_mm, float)


def _shells(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many times a surface must grow by a voxel in all directions to reach another's voxels.

    It grows until few are left; those are in the last shell, however far they are.

    Args:
        own: The voxels to reach (X, Y, Z), bool.
        other: The surface that grows (X, Y, Z), bool, with a margin of `MOST_SHELLS` voxels.

    Returns:
        (N,), of the N true voxels of `own`.
    """
    voxels, reached = np.flatnonzero(own), other.ravel()
    shell = np.zeros(len(voxels), np.int64)
    for _ in range(MOST_SHELLS):
        outside = ~reached[voxels]
        shell += outside
        if outside.mean() < FEW:
            break
        for step in _steps(other.shape):
            wider = reached.copy()
            wider[step:] |= reached[:-step]
            wider[:-step] |= reached[step:]
            reached = wider
    return shell


class CaseRows(Metric):
    """A row of scores for each case, and their means over the cases.

    Rows are told apart by the index of the case, so that a case that two ranks have both seen
    counts once. They are kept flat, in one dimension: torchmetrics takes ranks without any case
    only so.

    Args:
        names: Of the columns.
    """

    full_state_update = False
    table: list[Tensor]

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.add_state("table", default=[], dist_reduce_fx="cat")

    def add(self, index: Tensor, values: Tensor) -> None:
        """Add cases: places in the data set (B,), below 2**24, and scores (B, len(names))."""
        # float32 is what every device has.
        self.table.append(torch.cat([index[:, None].float(), values.float()], dim=1).flatten())

    def rows(self) -> dict[int, dict[str, float]]:
        """Scores of each case by name, by its index, in order."""
        # A list state is a tensor already once torchmetrics has gathered it from all ranks.
        flat = torch.cat(self.table) if isinstance(self.table, list) else self.table
        table = flat.view(-1, 1 + len(self.names)).tolist()
        return {
            int(index): dict(zip(self.names, values, strict=True))
            for index, *values in sorted(table, key=lambda row: row[0])
        }

    def compute(self) -> dict[str, Tensor]:
        """Means by name, NaN left out."""
        table = torch.tensor([list(row.values()) for row in self.rows().values()])
        return dict(zip(self.names, table.nanmean(0), strict=True))


class RegionMetrics(CaseRows):
    """Dice of every region in training: quick, on the volumes that the network sees."""

    def __init__(self, regions: Sequence[str]) -> None:
        super().__init__([f"dice_{region}" for region in regions])

    def update(self, prediction: Tensor, truth: Tensor, outside: Tensor, index: Tensor) -> None:
        """Add cases: masks (B, R, X, Y, Z), voxels cut off (B, R), place in the data set (B,)."""
        self.add(index, dice(prediction, truth, outside))

    def compute(self) -> dict[str, Tensor]:
        """`dice_<region>` and their mean `dice`, each the mean over the cases."""
        by_region = super().compute()
        return {**by_region, "dice": torch.stack(list(by_region.values())).mean()}


class EvaluationMetrics(CaseRows):
    """All of `SCORES` of every region, on the grid that a case is stored on, uncropped.

    Columns are `<score>_<region>`, and `voxels_<region>` and `true_voxels_<region>`, which tell
    where a mask was empty.

    Args:
        regions: Names.
        convention: Name of the rules for empty masks, one of `CONVENTIONS`.
    """

    def __init__(self, regions: Sequence[str], convention: str = "brats2020") -> None:
        counts = ("voxels", "true_voxels")
        super().__init__([f"{name}_{region}" for region in regions for name in (*SCORES, *counts)])
        self.convention = convention

    def update(
        self, prediction: Tensor, truth: Tensor, spacing_mm: Sequence[float], index: Tensor
    ) -> None:
        """Add cases: masks (B, R, X, Y, Z), edges of a voxel, place in the data set (B,)."""
        for found, true, number in zip(prediction, truth, index, strict=True):
            row: list[float] = []
            for mask, true_mask in zip(found.cpu().numpy(), true.cpu().numpy(), strict=True):
                scores = region_scores(mask, true_mask, spacing_mm, self.convention)
                row += [*scores.values(), int(mask.sum()), int(true_mask.sum())]
            self.add(number[None], torch.tensor(row, device=index.device)[None])
