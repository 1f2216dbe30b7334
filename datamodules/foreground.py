"""Which voxels of a scan belong to the brain, and the refusal of scans that show more than that.

Data sets such as BraTS come skull-stripped, with one value in every voxel outside the brain, and
the brain is all that has another value. Noise in the air would make nearly the whole volume brain
by that rule, so there the brain is separated from the air by its intensity.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

import grids
from errors import InputError

EXPECTED = "expected a skull-stripped brain on a constant background"
MAX_LITRES = 2.2  # a brain with its CSF has less; a whole head has 3 and more
MAX_NOISE = 1 / 8  # of the intensity of tissue; noisier air cannot be told from dark tissue
MAX_GAP = 0.5  # bone has less than this share of the intensity around it; stripped brains have .9
SHELL_MM = 2.0  # thickness of the shells in which scalp, bone and brain are looked for
SHELLS = 10  # from the surface of a head inwards

ALL_AXES = (0, 1, 2)
IN_PLANE = (0, 1)  # axes of an axial slice


def find_foreground(image: np.ndarray, spacing_mm: np.ndarray, path: Path) -> np.ndarray:
    """Find the voxels of the brain: those unlike the background, and those that they enclose.

    The background is the value most common on the faces of the volume: 0 in BraTS, but below 0 in
    images that were z-scored before they were published. Negative voxels inside a brain are tissue,
    since spline resampling makes them.

    The background counts as constant if one of the twelve edges of the volume has this value
    throughout: a brain reaches few of them, even where the field of view cuts through it.
    Otherwise the air is noisy, and the brain is the largest piece of what is brighter than the air.
    With noise of 5 % of the tissue's intensity, this gives the same voxels up to a Dice of .98.

    Args:
        image: (X, Y, Z), RAS.
        spacing_mm: Edges of a voxel (3,).
        path: File of the image, for messages.

    Returns:
        (X, Y, Z), bool; False everywhere if all voxels have one value.

    Raises:
        InputError: The scan shows more than `MAX_LITRES`; or its air is noisy, and there is bone
            around the brain or no air around the tissue.
    """
    values, counts = np.unique(_faces(image), return_counts=True)
    background = values[counts.argmax()]
    strides = np.maximum(1, np.floor(SHELL_MM / spacing_mm + 1e-3)).astype(int)
    coarse = tuple(slice(None, None, stride) for stride in strides)
    coarse_mm = strides * spacing_mm
    if any((edge == background).all() for edge in _edges(image)):
        foreground = filled(image != background)
        _check_volume(filled(foreground[coarse], IN_PLANE), coarse_mm, path)
        return foreground
    relative, tissue = _separate_from_air(image, path)
    # Bone is as dark as air and open at the neck, but within an axial slice the scalp encloses it.
    head = filled(tissue[coarse], IN_PLANE)
    _check_volume(head, coarse_mm, path)
    check_bone(head, relative[coarse], coarse_mm, path)
    pieces, _ = grids.components(tissue)
    return filled(pieces == np.bincount(pieces[tissue]).argmax())


def _faces(volume: np.ndarray, axes: Sequence[int] = ALL_AXES) -> np.ndarray:
    """Return all voxels on the faces of a volume (X, Y, Z) at both ends of some axes, flat."""
    return np.concatenate([volume.take((0, -1), axis).ravel() for axis in axes])


def _edges(volume: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the voxels (N,) along each of the twelve edges of a volume (X, Y, Z)."""
    for axis in ALL_AXES:
        along = np.moveaxis(volume, axis, -1)
        yield from (along[i, j] for i in (0, -1) for j in (0, -1))


def filled(mask: np.ndarray, axes: Sequence[int] = ALL_AXES) -> np.ndarray:
    """Fill the holes of a mask (X, Y, Z).

    Holes are background that does not reach the faces of the mask's bounding box. Along all axes
    this equals `ndimage.binary_fill_holes` in a third of its time.

    Args:
        mask: Mask to fill; it stays as it is.
        axes: Axes along which the background hangs together: of all three, or of a slice, whose
            holes may be open to other slices.
    """
    if not mask.any():
        return mask
    filled = mask.copy()
    box = grids.bounding_box(mask)
    neighbours = np.zeros((3, 3, 3), bool)
    for axis in axes:
        np.moveaxis(neighbours, axis, 0)[:, 1, 1] = True
    pieces = np.zeros(mask[box].shape, np.int32)
    ndimage.label(~mask[box], neighbours, output=pieces)
    is_open = np.zeros(pieces.max() + 1, bool)
    is_open[_faces(pieces, axes)] = True
    is_open[0] = False  # piece 0 is the mask itself
    filled[box] = ~is_open[pieces]
    return filled


def _separate_from_air(image: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Separate the tissue in an image (X, Y, Z) from noisy air.

    Returns:
        Intensities, 0 in the mean of the air and 1 in the median of the tissue; mask of the tissue.

    Raises:
        InputError: The edges of the volume are not in air.
    """
    from SimpleITK import GetImageFromArray, OtsuThresholdImageFilter

    air, above = map(float, np.quantile(np.concatenate(list(_edges(image))), (0.5, 0.84)))
    noise = above - air  # one standard deviation; also of noise that was clipped at 0
    smooth = ndimage.gaussian_filter(image, sigma=1)
    otsu = OtsuThresholdImageFilter()
    otsu.Execute(GetImageFromArray(smooth))
    contrast = float(np.median(image[smooth > otsu.GetThreshold()])) - air
    if not noise < MAX_NOISE * contrast:
        raise InputError(
            f"{path}: {EXPECTED}, found no air: the edges of the volume have values of {air:.4g} ± "
            f"{noise:.2g}, the brightest tissue is {contrast:.2g} above them"
        )
    bright = image - air > max(3 * noise, 0.05 * contrast)
    # The majority of the 27 voxels around each drops what the noise has added and fills what it has
    # taken, and leaves a flat surface where it is.
    majority = ndimage.uniform_filter(bright.astype(np.float32), size=3) > 0.5
    return (image - air) / contrast, majority


def _check_volume(head: np.ndarray, spacing_mm: np.ndarray, path: Path) -> None:
    """Refuse a mask (X, Y, Z) that is too large for a brain, which has nothing around it."""
    litres = head.sum() * spacing_mm.prod() / 1e6
    if litres > MAX_LITRES:
        raise InputError(
            f"{path}: {EXPECTED}, found {litres:.1f} litres, where a brain has at most {MAX_LITRES}"
        )


def check_bone(
    head: np.ndarray, intensities: np.ndarray, spacing_mm: np.ndarray, path: Path
) -> None:
    """Refuse a head whose outer shells are bright, dark and bright: scalp, bone and brain.

    Args:
        head: Mask (X, Y, Z).
        intensities: (X, Y, Z), 0 in the air and 1 in the median of the tissue.
        spacing_mm: Edges of a voxel (3,).
        path: File of the image, for messages.

    Raises:
        InputError: The median of a shell is below `MAX_GAP` of the brightest ones on both sides.
    """
    shell_mm = max(SHELL_MM, spacing_mm.min())
    depth_mm = np.asarray(ndimage.distance_transform_edt(head, sampling=spacing_mm))
    shells = [
        intensities[(depth_mm > shell * shell_mm) & (depth_mm <= (shell + 1) * shell_mm)]
        for shell in range(SHELLS)
    ]
    profile = [np.median(shell) for shell in shells if shell.size]
    for shell in range(1, len(profile) - 1):
        around = min(max(profile[:shell]), max(profile[shell + 1 :]))
        if profile[shell] < MAX_GAP * around:
            raise InputError(
                f"{path}: {EXPECTED}, found bone: {(shell + 0.5) * shell_mm:.2g} mm below the "
                f"surface the tissue has {profile[shell]:.2f} times its median intensity, on both "
                f"sides {around:.2f} times and more"
            )
