"""Voxel grids: their spacing, boxes in them, and what hangs together on them."""

from collections.abc import Sequence

import numpy as np


def spacing_mm(affine: np.ndarray) -> np.ndarray:
    """Edges of a voxel (3,) in mm, from the affine (4, 4) of its grid."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all true voxels of a mask (X, Y, Z); empty if there is none."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        inside = mask[tuple(box)]  # the other axes need only be looked at within the box so far
        others = tuple(other for other in range(mask.ndim) if other != axis)
        occupied = np.flatnonzero(inside.any(axis=others))
        if not occupied.size:
            return (slice(0, 0),) * mask.ndim
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def cut(
    volume: np.ndarray, start: Sequence[int] | np.ndarray, size: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Copy a box out of (..., X, Y, Z); zero (background) where it reaches beyond the volume.

    Args:
        volume: May be memory mapped: only the box is read.
        start: First voxel along X, Y and Z; may be negative.
        size: Sides of the box in voxels.
    """
    inside, target = [], []
    for first, side, extent in zip(start, size, volume.shape[-3:], strict=True):
        low = min(max(first, 0), extent)
        high = max(min(first + side, extent), low)
        inside.append(slice(low, high))
        target.append(slice(low - first, high - first) if high > low else slice(0))
    box = np.zeros((*volume.shape[:-3], *size), volume.dtype)
    box[(..., *target)] = volume[(..., *inside)]
    return box


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Label the 26-connected components of a mask (X, Y, Z).

    Returns:
        Number of each voxel's component, from 1, int32 (X, Y, Z), 0 outside; number of components.
    """
    from scipy import ndimage

    numbers = np.empty(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3, 3, 3), bool), output=numbers)  # scipy's default is 6-connected
    return numbers, int(numbers.max(initial=0))


def component_boxes(mask: np.ndarray) -> list[tuple[slice, ...]]:
    """Return the bounding box of each 26-connected component of a mask (X, Y, Z)."""
    from scipy import ndimage

    return ndimage.find_objects(components(mask)[0])
