"""HD95, the 95th percentile of surface distances, in the two definitions that are in use."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.spatial import KDTree

from grids import bounding_box

PERCENTILE = 95
# `_shells` stops after so many shells, or when a smaller share of the voxels is left. They balance
# its time against that of the search for nearest neighbours; no result depends on them.
MAX_SHELLS = 4
MAX_SHARE_LEFT = 0.1


class Hausdorff95(NamedTuple):
    """HD95 in two definitions.

    They differ by a fifth in practice, and by far more if a mask has distant islands.

    Attributes:
        maximum_mm: The larger of the 95th percentiles of the two directed distances.
        pooled_mm: The 95th percentile of the distances of both directions together, which the
            online evaluation of BraTS 2017-2020 used.
    """

    maximum_mm: float
    pooled_mm: float


def hausdorff95(
    prediction: Bool[np.ndarray, "x y z"],
    truth: Bool[np.ndarray, "x y z"],
    spacing_mm: Sequence[float] = (1, 1, 1),
) -> Hausdorff95:
    """Measure HD95 between the surfaces of two masks, neither of which is empty.

    The surface of a mask consists of its voxels that have a face neighbour outside it.

    Args:
        prediction: Predicted mask.
        truth: True mask.
        spacing_mm: Edges of a voxel along X, Y and Z.
    """
    box = bounding_box(prediction | truth)
    surfaces = [surface(np.pad(mask[box], MAX_SHELLS)) for mask in (prediction, truth)]
    points = [positions_mm(own, spacing_mm) for own in surfaces]
    # Built for one query: balanced trees would take longer than they save.
    trees = [KDTree(own, 16, balanced_tree=False, compact_nodes=False) for own in points]
    shells = [_shells(*surfaces), _shells(*reversed(surfaces))]
    # The search for nearest neighbours takes most of the time, and only the largest distances
    # matter. So distances are measured from the outermost shell inwards, until no voxel that is
    # left can be farther away than any of the percentiles.
    distances_mm = [np.zeros(len(own)) for own in points]
    ranked = distances_mm
    outermost = max(1, *(int(shell.max()) for shell in shells))
    for inner_shells in range(outermost - 1, -1, -1):
        for distance_mm, shell, own, tree in zip(
            distances_mm, shells, points, reversed(trees), strict=True
        ):
            here = shell == inner_shells + 1
            distance_mm[here] = tree.query(own[here])[0]
        ranked = [*distances_mm, np.concatenate(distances_mm)]
        left_mm = inner_shells * math.hypot(*spacing_mm)  # the farthest that a voxel there can be
        if all(np.percentile(values, PERCENTILE, method="lower") >= left_mm for values in ranked):
            break
    first, second, pooled = (float(np.percentile(values, PERCENTILE)) for values in ranked)
    return Hausdorff95(maximum_mm=max(first, second), pooled_mm=pooled)


def surface(mask: Bool[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    """Find the voxels of a mask that have a face neighbour outside it.

    The outermost voxels of the volume must be false.
    """
    flat = mask.ravel()
    inside = flat.copy()
    for step in _steps(mask.shape):
        inside[step:] &= flat[:-step]
        inside[:-step] &= flat[step:]
    return (flat & ~inside).reshape(mask.shape)


def _steps(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the steps from a voxel to its neighbours along Z, Y and X in a flattened volume.

    Shifts of a flattened volume are fast. They join the end of a row to the start of the next, but
    the callers' volumes have a margin of false voxels there.
    """
    return 1, shape[2], shape[1] * shape[2]


def positions_mm(
    mask: Bool[np.ndarray, "x y z"], spacing_mm: Sequence[float]
) -> Float64[np.ndarray, "n 3"]:
    """Return the positions in mm of the true voxels of a mask."""
    # `np.argwhere` takes twice as long.
    index = np.unravel_index(np.flatnonzero(mask), mask.shape)
    return np.stack(index, axis=1) * np.asarray(spacing_mm, float)


def _shells(
    own: Bool[np.ndarray, "x y z"], other: Bool[np.ndarray, "x y z"]
) -> Int64[np.ndarray, " n"]:
    """Count how often one surface must grow by a voxel in all directions to reach another.

    It stops growing when few voxels are left; these get the last shell, however far they are.

    Args:
        own: The surface to reach.
        other: The surface that grows; the volume has a margin of `MAX_SHELLS` voxels around it.

    Returns:
        Shell of each of the N true voxels of `own`.
    """
    voxels, reached = np.flatnonzero(own), other.ravel()
    shell = np.zeros(len(voxels), np.int64)
    for _ in range(MAX_SHELLS):
        outside = ~reached[voxels]
        shell += outside
        if outside.mean() < MAX_SHARE_LEFT:
            break
        for step in _steps(other.shape):
            wider = reached.copy()
            wider[step:] |= reached[:-step]
            wider[:-step] |= reached[step:]
            reached = wider
    return shell
