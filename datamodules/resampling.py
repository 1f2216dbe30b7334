"""Bring a box of a volume to the size of a patch: its image trilinearly, its labels by region."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import grids

# A voxel of a scaled patch belongs to a region that has this share of it. Interpolation rounds
# convex shapes off, so that one half would shrink small lesions: against analytic balls of a radius
# of 2 voxels, .45 scores a Dice of .89 and .5 one of .87; from a radius of 5 on the two are equal.
LEAST_SHARE = 0.45
ROUNDING = 1e-4  # so that a share that equals the least one counts on every machine


def resample_image(box: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Resample an image as `F.interpolate(..., mode="trilinear", align_corners=False)` does.

    Args:
        box: Channels (C, X, Y, Z), of any floating-point type, on any device.
        size: Shape of the result without its channels.

    Returns:
        (C, *size), float32; the very values of the box if it has this size already.
    """
    if box.shape[1:] == size:
        return box.float()
    box = box.float()
    if box.device.type != "cpu":
        return F.interpolate(box[None], size, mode="trilinear", align_corners=False)[0]
    # PyTorch has no vectorised kernel for three axes. For two it has one if the channels come last
    # in memory, and voxels along z can stand for channels: that takes a third of the time in all.
    planes = F.interpolate(box.movedim(-1, 1), size[:2], mode="bilinear", align_corners=False)
    rows = planes.movedim(1, -1).flatten(1, 2)  # (C, X * Y, Z)
    resampled = F.interpolate(rows, size[2], mode="linear", align_corners=False)
    return resampled.unflatten(1, size[:2])


def resample_labels(
    labels: np.ndarray, size: tuple[int, int, int], nesting: np.ndarray
) -> np.ndarray:
    """Resample labels so that every region follows the image, which is interpolated trilinearly.

    Nearest neighbours would lag the image by up to half a voxel. Instead, each region is a mask of
    zeros and ones that is interpolated as the image is, and holds where it reaches `LEAST_SHARE`.
    A part of a region that reaches it nowhere near keeps its nearest voxels, so that the smallest
    lesions do not vanish from the labels while the image still shows them.

    Args:
        labels: (X, Y, Z) uint8, canonical.
        size: Shape of the result. Its corners are those of `labels`, as with
            `F.interpolate(..., align_corners=False)`.
        nesting: (256,), a number for each label. A label and all labels of higher numbers form a
            region; it lies inside the regions of labels of lower numbers.

    Returns:
        Labels of shape `size`, uint8.
    """
    if labels.shape == size:
        return labels
    resampled = np.zeros(size, np.uint8)
    axes = [interpolation(*sides) for sides in zip(labels.shape, size, strict=True)]
    # Only the surroundings of a region can be in it, and they are a small part of most patches.
    outer = _widened(grids.bounding_box(labels > 0))
    found = labels[outer]
    region = found > 0
    inner = tuple(slice(0, side) for side in found.shape)
    for label in sorted(range(1, found.max(initial=0) + 1), key=lambda label: nesting[label]):
        its_own = found == label
        if not its_own.any():
            continue
        nearest = region[inner]
        shares = torch.from_numpy(nearest).float()
        target: list[slice] = []
        for number, (axis, around, inside) in enumerate(zip(axes, outer, inner, strict=True)):
            start, stop = around.start + inside.start, min(around.start + inside.stop, axis.source)
            reached = axis.reached(start, stop)
            # Each turn interpolates the first axis and puts it last: after three, all is in order.
            shares = shares.movedim(0, -1) @ axis.weights[reached, start:stop].T
            # What is nearest beyond the box lies in no region, nor does the box's outermost voxel.
            nearest = nearest.take(axis.nearest[reached].clip(start, stop - 1) - start, number)
            target.append(reached)
        is_inside = shares.numpy() >= LEAST_SHARE - ROUNDING
        is_inside |= nearest & ~_dilated(is_inside)
        np.copyto(resampled[tuple(target)], label, where=is_inside)
        region &= ~its_own
        inner = _widened(grids.bounding_box(region))
    return resampled


class Interpolation(NamedTuple):
    """Linear interpolation along one axis, from S to N voxels.

    Attributes:
        source: S.
        weights: (N, S), weight of each voxel in each of the result.
        nearest: (N,), the voxel of the largest weight; the first of two.
        first: (N,), the first voxel with a weight above 0.
        last: (N,), the last one.
    """

    source: int
    weights: Tensor
    nearest: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def reached(self, start: int, stop: int) -> slice:
        """Return which of the N voxels have a share of the voxels from `start` up to `stop`."""
        return slice(int(np.searchsorted(self.last, start)), int(np.searchsorted(self.first, stop)))

    def used(self, start: int, stop: int) -> slice:
        """Return which of the S voxels have a share in those from `start` up to `stop`."""
        return slice(int(self.first[start]), int(self.last[stop - 1]) + 1)


@cache
def interpolation(source: int, length: int) -> Interpolation:
    """Return the interpolation of `source` voxels to `length` ones."""
    identity = torch.eye(source)[None]
    weights = F.interpolate(identity, length, mode="linear", align_corners=False)[0].T.contiguous()
    has_weight = weights.numpy() > 0
    return Interpolation(
        source,
        weights,
        nearest=weights.argmax(1).numpy(),
        first=has_weight.argmax(1),
        last=source - 1 - has_weight[:, ::-1].argmax(1),
    )


def _widened(box: tuple[slice, ...]) -> tuple[slice, ...]:
    """Widen a box by a voxel at each side; its end may lie beyond the volume."""
    return tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)


def _dilated(mask: np.ndarray) -> np.ndarray:
    """Add the 26 neighbours of all true voxels to a mask (X, Y, Z)."""
    dilated = mask.copy()
    dilated[1:] |= mask[:-1]
    dilated[:-1] |= mask[1:]
    mask = dilated.copy()
    dilated[:, 1:] |= mask[:, :-1]
    dilated[:, :-1] |= mask[:, 1:]
    mask = dilated.copy()
    dilated[:, :, 1:] |= mask[:, :, :-1]
    dilated[:, :, :-1] |= mask[:, :, 1:]
    return dilated
