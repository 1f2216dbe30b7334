"""Input channels made with the template: local similarity, and the opposite hemisphere.

See Frey & Nau 2019, section 2.3.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import grids
from datamodules.template import LEAST_OVERLAP, Registration, register
from errors import InputError

LEAST_INSIDE = 0.25  # share of a ball inside the mask; fewer voxels are too few to correlate
LEAST_VARIANCE = 1e-6  # in a ball, relative to that in the mask; below it the image is constant


def ball(radius_mm: float, spacing_mm: Sequence[float]) -> np.ndarray:
    """Return the voxels whose centre lies within a radius of the middle one.

    Args:
        radius_mm: Radius of the ball.
        spacing_mm: Edges of a voxel along X, Y and Z.

    Returns:
        (X, Y, Z) bool, odd sides.
    """
    # The tolerances keep voxels on the surface, which rounding would drop.
    reach = [int(radius_mm / side_mm + 1e-6) for side_mm in spacing_mm]
    axes = np.ogrid[tuple(slice(-steps, steps + 1) for steps in reach)]
    x, y, z = (steps * side_mm for steps, side_mm in zip(axes, spacing_mm, strict=True))
    return x**2 + y**2 + z**2 <= radius_mm**2 * (1 + 1e-6)


def local_correlation(
    first: np.ndarray, second: np.ndarray, inside: np.ndarray, neighbourhood: np.ndarray
) -> np.ndarray:
    """Correlate two images in a ball around every voxel, over the voxels inside a mask.

    Pearson's r comes from six sums over the ball, of 1, x, y, x², y² and xy. Each sum is a
    convolution by FFT in float64: it agrees with a loop over all balls to 1e-9, and its cost does
    not depend on the size of the ball.

    Args:
        first, second: Images (X, Y, Z).
        inside: Mask (X, Y, Z), bool.
        neighbourhood: Voxels around each voxel, bool, symmetric and with odd sides; see `ball`.

    Returns:
        Pearson's r (X, Y, Z), float32; NaN outside the mask, where less than `LEAST_INSIDE` of the
        ball is inside it, and where an image is constant in the ball.

    Raises:
        InputError: The mask is empty.
    """
    if not inside.any():
        raise InputError("t1: expected a brain, found none")
    box = grids.bounding_box(inside)
    mask = inside[box].astype(np.float64)
    x, y = (_standardised(image[box], inside[box]) for image in (first, second))
    sums_over = _BallSums(mask.shape, neighbourhood)
    count = np.maximum(sums_over(mask).round(), 1)
    mean_x, mean_y = sums_over(x) / count, sums_over(y) / count
    variance_x = sums_over(x * x) / count - mean_x**2
    variance_y = sums_over(y * y) / count - mean_y**2
    covariance = sums_over(x * y) / count - mean_x * mean_y

    defined = inside[box] & (count >= LEAST_INSIDE * neighbourhood.sum())
    defined &= np.minimum(variance_x, variance_y) > LEAST_VARIANCE
    r = np.full(inside.shape, np.nan, np.float32)
    r[box][defined] = covariance[defined] / np.sqrt(variance_x[defined] * variance_y[defined])
    return r


class _BallSums:
    """Sums volumes of one shape over a neighbourhood of every voxel.

    Args:
        shape: Shape of the volumes (X, Y, Z).
        neighbourhood: See `local_correlation`.
    """

    def __init__(self, shape: tuple[int, ...], neighbourhood: np.ndarray) -> None:
        from scipy.fft import next_fast_len, rfftn

        self.shape = shape
        # The transform is periodic: zeros as wide as the radius keep opposite borders apart.
        self.padded: list[int] = []
        for axis, (side, width) in enumerate(zip(shape, neighbourhood.shape, strict=True)):
            fast: Any = next_fast_len(max(side + width // 2, width), real=axis == 2)
            self.padded.append(fast)
        kernel = np.zeros(self.padded)
        kernel[tuple(map(slice, neighbourhood.shape))] = neighbourhood
        centre = [-(width // 2) for width in neighbourhood.shape]
        # The kernel is symmetric around voxel 0, so its transform is real.
        spectrum: Any = rfftn(np.roll(kernel, centre, (0, 1, 2)))
        self.kernel = spectrum.real.copy()

    def __call__(self, volume: np.ndarray) -> np.ndarray:
        """Return the sums (X, Y, Z), float64."""
        from scipy.fft import irfftn, rfftn

        transformed = np.asarray(rfftn(volume, self.padded))
        transformed *= self.kernel
        sums = np.asarray(irfftn(transformed, self.padded, overwrite_x=True))
        return sums[tuple(map(slice, self.shape))]


def _standardised(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Scale an image (X, Y, Z) to mean 0 and standard deviation 1 inside a mask, 0 outside.

    With mean 0, the sums of squares lose no digits by cancellation.
    """
    values = image[inside].astype(np.float64)
    standard = np.zeros(image.shape)
    standard[inside] = (values - values.mean()) / max(float(values.std()), 1e-12)
    return standard


def similarity(
    t1: np.ndarray, affine: np.ndarray, registration: Registration, radius_mm: float
) -> np.ndarray:
    """Compute the local similarity of a brain to the healthy template (section 2.3, figure 2).

    Args:
        t1: (X, Y, Z), 0 outside the brain.
        affine: (4, 4), voxel to mm, RAS.
        registration: Fit of this scan to the template.
        radius_mm: Radius of the searchlight.

    Returns:
        Pearson's r (X, Y, Z), float32; NaN where it is not defined.
    """
    healthy = registration.template_on(t1.shape, affine)
    spacing_mm = grids.spacing_mm(affine).tolist()
    return local_correlation(t1, healthy, t1 != 0, ball(radius_mm, spacing_mm))


def _register_t1(
    name: str, images: Mapping[str, np.ndarray], affine: np.ndarray
) -> tuple[Registration, dict[str, Any]]:
    """Register the T1 of a case; log a warning where it does not fit.

    Returns:
        The fit, and the facts about it that the cache keeps.

    Raises:
        InputError: The case has no T1.
    """
    if "t1" not in images:
        raise InputError(
            f"inputs: registration needs t1 among data.data_set.modalities, found "
            f"{', '.join(images)}"
        )
    registration = register(images["t1"], affine)
    if registration.failed:
        logging.warning(
            "%s: does not fit the template (Dice of the brains %.2f, expected %.2f): what comes "
            "from there is 0",
            name,
            registration.overlap,
            LEAST_OVERLAP,
        )
    return registration, {
        "to_template": registration.to_template.tolist(),
        "overlap": registration.overlap,
        "failed": registration.failed,
    }


@dataclass(frozen=True)
class LocalSimilarity:
    """Local similarity to the template as one channel, "normalized" (section 2.3).

    As in every modality, the mean is 0 and the standard deviation 1 over the brain, and the channel
    is 0 elsewhere. A scan that does not fit the template gets zeros and a warning in the log.

    Attributes:
        radius_mm: Radius of the searchlight. The paper's "searchlight-sphere size of 7mm" may be
            the radius, as here, or the diameter, for which 3.5 is the value.

    Raises:
        InputError: The radius is not positive; when called, the case has no T1.
    """

    radius_mm: float = 7.0

    def __post_init__(self) -> None:
        if not self.radius_mm > 0:
            raise InputError(f"radius_mm: expected more than 0, found {self.radius_mm}")

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "local similarity", "radius_mm": float(self.radius_mm)}

    def __call__(
        self, name: str, images: Mapping[str, np.ndarray], affine: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Compute the channel (1, X, Y, Z) float32; the facts are the fit and the moments of r."""
        registration, facts = _register_t1(name, images, affine)
        channel = np.zeros(images["t1"].shape, np.float32)
        if registration.failed:
            return channel[None], facts
        r = similarity(images["t1"], affine, registration, self.radius_mm)
        known = ~np.isnan(r)
        mean, deviation = float(r[known].mean()), float(r[known].std())
        channel[known] = (r[known] - mean) / max(deviation, 1e-6)
        return channel[None], {**facts, "mean": mean, "deviation": deviation}


@dataclass(frozen=True)
class MirroredByTemplate:
    """The modalities of the opposite hemisphere as channels, z-scored as the modalities are.

    Opposite means mirrored at the mid-sagittal plane of the template. Where a head lies askew, this
    is more accurate than the middle of its bounding box, which `sampling.cut_with_mirrored` takes.
    Each voxel takes the value of the voxel nearest to its mirror image. A scan that does not fit
    the template gets channels of zeros and a warning in the log.

    Raises:
        InputError: When called, the case has no T1.
    """

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "mirrored by the template"}

    def __call__(
        self, name: str, images: Mapping[str, np.ndarray], affine: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Compute the channels (C, X, Y, Z) float32, one per modality; the facts are the fit."""
        from scipy.ndimage import affine_transform

        registration, facts = _register_t1(name, images, affine)
        channels = np.zeros((len(images), *images["t1"].shape), np.float32)
        if not registration.failed:
            to_opposite = registration.mirrored_voxels(affine)
            for channel, image in zip(channels, images.values(), strict=True):
                standard = _standardised(image, image != 0).astype(np.float32)
                affine_transform(standard, to_opposite, output=channel, order=0)
        return channels, facts
