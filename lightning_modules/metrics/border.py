"""How far a predicted border lies outside the true one, in the mean."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from scipy.spatial import KDTree

from grids import bounding_box
from lightning_modules.metrics.hausdorff import positions_mm, surface


def border_mm(
    prediction: Bool[np.ndarray, "x y z"],
    truth: Bool[np.ndarray, "x y z"],
    spacing_mm: Sequence[float] = (1, 1, 1),
) -> float:
    """Measure how far the border of a prediction lies outside that of the truth, in the mean.

    The surface of a mask consists of its voxels that have a face neighbour outside it. The signed
    distance of a voxel from a mask is the one to the nearest voxel of the mask's surface, between
    centres of voxels: positive outside the mask and negative inside. D(A, B) is the mean signed
    distance of A's surface from B. The result is (D(prediction, truth) - D(truth, prediction)) / 2:
    D alone would see what is predicted too far out, but not what is missed far from it.

    It is d for a ball of radius r + d against one of radius r with the same centre, positive where
    the prediction is too large, and has the other sign if the two masks are exchanged. Errors that
    cancel out, such as those of a shifted mask, leave it near 0: it is the bias of a border, and
    HD95 its error.

    Args:
        prediction: Predicted mask.
        truth: True mask.
        spacing_mm: Edges of a voxel along X, Y and Z.

    Returns:
        The mean in mm; NaN if either mask is empty.
    """
    if not (prediction.any() and truth.any()):
        return math.nan
    box = bounding_box(prediction | truth)
    masks = [np.pad(mask[box], 1) for mask in (prediction, truth)]
    surfaces = [surface(mask) for mask in masks]
    points = [positions_mm(own, spacing_mm) for own in surfaces]
    means = []
    for own, points_mm, other, others_mm in zip(
        surfaces, points, reversed(masks), reversed(points), strict=True
    ):
        distance_mm = KDTree(others_mm, 16, balanced_tree=False, compact_nodes=False).query(
            points_mm
        )[0]
        means.append(np.where(other[own], -distance_mm, distance_mm).mean())
    return float(means[0] - means[1]) / 2
