"""Where a case lies in the MNI152 template, and how like it each place is.

Frey & Nau 2019, sections 2.3 and 3.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from errors import InputError

GRIDS_MM = (4.0, 2.0)  # coarse to fine; a finer one costs time and changes little
# Of the voxels of each grid. All of them take three times as long and move the brain by 0.4 mm.
SAMPLED = (0.5, 0.1)
SEED = 1  # of the draw; ITK takes 0 for the time of day
MARGIN_MM = 6.0  # around the brain, so that its outline counts
LEAST_OVERLAP = 0.85  # Dice of the two brains; good fits have .95

LEAST_INSIDE = 0.25  # of a ball; with less there is too little to correlate
LEAST_VARIANCE = 1e-6  # in a ball, of that in the brain; below it, all values are the same


class Template(NamedTuple):
    """The MNI152 T1 of nilearn, which stands in for the average of 305 subjects.

    Attributes:
        voxels: (X, Y, Z) float32, RAS, 0 outside the brain.
        affine: (4, 4), voxel to MNI mm.
    """

    voxels: np.ndarray
    affine: np.ndarray


@cache
def template(spacing_mm: int = 1) -> Template:
    """The template, at 1 mm or at another whole number of mm; not to be written to."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    image = load_mni152_template(resolution=spacing_mm)
    brain = load_mni152_brain_mask(resolution=spacing_mm)
    # Resampling leaves ringing outside the brain.
    voxels = np.where(brain.get_fdata() > 0, image.get_fdata(), 0).astype(np.float32)
    return Template(voxels, np.asarray(image.affine))


class Registration(NamedTuple):
    """Where a case lies in the template, by translation, rotation and scaling.

    Attributes:
        to_template: (4, 4), mm of the case to mm of the template, RAS both.
        overlap: Dice of the two brains.
    """

    to_template: np.ndarray
    overlap: float

    @property
    def failed(self) -> bool:
        return self.overlap < LEAST_OVERLAP

    def resample(
        self, volume: np.ndarray, affine: np.ndarray, like: Template, order: int = 1
    ) -> np.ndarray:
        """A volume of the case (X, Y, Z) on the template's grid, 0 outside it, float32."""
        from scipy.ndimage import affine_transform

        to_voxel = np.linalg.inv(affine) @ np.linalg.inv(self.to_template) @ like.affine
        return affine_transform(
            volume.astype(np.float32), to_voxel, output_shape=like.voxels.shape, order=order
        )

    def template_on(self, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
        """The template on a grid of the case: (X, Y, Z) float32, 0 outside its brain."""
        from scipy.ndimage import affine_transform

        source = template(max(1, round(float(_spacing_mm(affine).mean()))))
        to_voxel = np.linalg.inv(source.affine) @ self.to_template @ affine
        return affine_transform(source.voxels, to_voxel, output_shape=tuple(shape), order=1)

    def mirrored_voxels(self, affine: np.ndarray) -> np.ndarray:
        """(4, 4): voxel of a grid of the case to the one that lies opposite in the template."""
        to_template = self.to_template @ affine
        return np.linalg.inv(to_template) @ np.diag([-1.0, 1, 1, 1]) @ to_template


def register(t1: np.ndarray, affine: np.ndarray) -> Registration:
    """Fit the template to a brain, by mutual information (9 degrees of freedom).

    On one thread, the same brain gives the same fit: the voxels that count are drawn with a seed.

    Args:
        t1: (X, Y, Z), 0 outside the brain.
        affine: (4, 4), voxel to mm, RAS.

    Raises:
        InputError: Nothing but zeros.
    """
    import SimpleITK as sitk  # noqa: N813  (everybody calls it so)
    import torch
    from scipy.ndimage import binary_dilation
    from torchio import LabelMap, ScalarImage

    reference = template(2)
    spacing_mm = float(_spacing_mm(affine).mean())
    margin = max(1, round(MARGIN_MM / spacing_mm))
    # Smoothing and shrinking the air around a head would take most of the time.
    t1, affine = _around(t1, affine, margin + 2)
    brain = t1 != 0
    near = binary_dilation(brain, iterations=margin)

    def as_sitk(voxels: np.ndarray, to_mm: np.ndarray) -> sitk.Image:
        image = ScalarImage(tensor=torch.from_numpy(voxels.astype(np.float32))[None], affine=to_mm)
        return sitk.Cast(image.as_sitk(), sitk.sitkFloat32)

    fixed, moving = as_sitk(t1, affine), as_sitk(reference.voxels, reference.affine)
    mask = LabelMap(tensor=torch.from_numpy(near.astype(np.uint8))[None], affine=affine).as_sitk()
    transform = sitk.CenteredTransformInitializer(
        fixed,
        moving,
        sitk.ScaleVersor3DTransform(),
        sitk.CenteredTransformInitializerFilter.MOMENTS,
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    method.SetMetricFixedMask(sitk.Cast(mask, sitk.sitkUInt8))
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentagePerLevel(SAMPLED, seed=SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-3, numberOfIterations=150
    )
    method.SetOptimizerScalesFromPhysicalShift()
    shrink = [max(1, round(grid_mm / spacing_mm)) for grid_mm in GRIDS_MM]
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel([grid_mm / 2 for grid_mm in GRIDS_MM])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)

    # ITK's axes point to the left and to the back: conjugate by the change of signs.
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    columns = [np.array(transform.TransformPoint(tuple(unit))) - origin for unit in np.eye(3)]
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = np.stack(columns, axis=1), origin
    signs = np.diag([-1.0, -1.0, 1.0, 1.0])
    fitted = Registration(signs @ lps @ signs, overlap=0.0)
    inside = fitted.resample(brain, affine, reference) > 0.5
    standard = reference.voxels > 0
    overlap = 2 * (inside & standard).sum() / max(inside.sum() + standard.sum(), 1)
    return fitted._replace(overlap=float(overlap))


def _spacing_mm(affine: np.ndarray) -> np.ndarray:
    return np.linalg.norm(affine[:3, :3], axis=0)


def _bounds(mask: np.ndarray) -> list[slice]:
    """The box around the true voxels of (X, Y, Z)."""
    from scipy.ndimage import find_objects

    boxes = find_objects(mask.astype(np.uint8))
    if not boxes:
        raise InputError("t1: expected a brain, found none")
    return list(boxes[0])


def _around(t1: np.ndarray, affine: np.ndarray, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """A brain's box, zeros where it reaches beyond the scan, and its affine."""
    box = _bounds(t1 != 0)
    offset = np.eye(4)
    offset[:3, 3] = [side.start - margin for side in box]
    return np.pad(t1[tuple(box)], margin), affine @ offset


def ball(radius_mm: float, spacing_mm: Sequence[float]) -> np.ndarray:
    """Voxels whose centre lies within a radius of the middle one: (X, Y, Z) bool, odd sides."""
    reach = [int(radius_mm / side_mm + 1e-6) for side_mm in spacing_mm]
    axes = np.ogrid[tuple(slice(-steps, steps + 1) for steps in reach)]
    x, y, z = (steps * side_mm for steps, side_mm in zip(axes, spacing_mm, strict=True))
    return x**2 + y**2 + z**2 <= radius_mm**2 * (1 + 1e-6)


def local_correlation(
    first: np.ndarray, second: np.ndarray, inside: np.ndarray, neighbourhood: np.ndarray
) -> np.ndarray:
    """Pearson's r of two images in a ball around every voxel, of its voxels inside a mask.

    Six sums over the ball, of 1, x, y, x², y² and xy, as convolutions by FFT in float64: as exact
    as one loop over all balls to 1e-9, and independent of the size of the ball.

    Args:
        first, second: (X, Y, Z).
        inside: (X, Y, Z), bool.
        neighbourhood: Of a voxel, bool, odd sides and symmetric; see `ball`.

    Returns:
        (X, Y, Z) float32; NaN outside the mask, and where less than `LEAST_INSIDE` of the ball is
        in it or one of the images has one value in it.

    Raises:
        InputError: Nothing inside.
    """
    box = tuple(_bounds(inside))
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
    """Sums over a neighbourhood of every voxel of volumes of one shape."""

    def __init__(self, shape: tuple[int, ...], neighbourhood: np.ndarray) -> None:
        from scipy.fft import next_fast_len, rfftn

        self.shape = shape
        # The transform is periodic: zeros as wide as a radius keep the far ends apart.
        self.padded: list[int] = []
        for axis, (side, width) in enumerate(zip(shape, neighbourhood.shape, strict=True)):
            fast: Any = next_fast_len(max(side + width // 2, width), real=axis == 2)
            self.padded.append(fast)
        kernel = np.zeros(self.padded)
        kernel[tuple(map(slice, neighbourhood.shape))] = neighbourhood
        centre = [-(width // 2) for width in neighbourhood.shape]
        # Symmetric around voxel 0: its transform is real.
        spectrum: Any = rfftn(np.roll(kernel, centre, (0, 1, 2)))
        self.kernel = spectrum.real.copy()

    def __call__(self, volume: np.ndarray) -> np.ndarray:
        from scipy.fft import irfftn, rfftn

        transformed = np.asarray(rfftn(volume, self.padded))
        transformed *= self.kernel
        sums = np.asarray(irfftn(transformed, self.padded, overwrite_x=True))
        return sums[tuple(map(slice, self.shape))]


def _standardised(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 inside, 0 outside: nothing cancels in the sums of squares."""
    values = image[inside].astype(np.float64)
    standard = np.zeros(image.shape)
    standard[inside] = (values - values.mean()) / max(float(values.std()), 1e-12)
    return standard


def similarity(
    t1: np.ndarray, affine: np.ndarray, registration: Registration, radius_mm: float
) -> np.ndarray:
    """Local similarity of a brain to the healthy template (section 2.3, figure 2).

    Args:
        t1: (X, Y, Z), 0 outside the brain.
        affine: (4, 4), voxel to mm, RAS.
        registration: Of the same scan.
        radius_mm: Of the searchlight.

    Returns:
        Pearson's r (X, Y, Z), float32; NaN where there is none.
    """
    healthy = registration.template_on(t1.shape, affine)
    spacing_mm = _spacing_mm(affine).tolist()
    return local_correlation(t1, healthy, t1 != 0, ball(radius_mm, spacing_mm))


def _fit(
    name: str, images: Mapping[str, np.ndarray], affine: np.ndarray
) -> tuple[Registration, dict[str, Any]]:
    """Register a case's T1, and say what came out; in the log, if it does not fit."""
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
    """The similarity as a channel of the cache: r, "normalized" (section 2.3) as modalities are.

    Mean 0 and deviation 1 over the brain, 0 elsewhere. A scan that does not fit the template gets
    a channel of 0, which says nothing, and a line in the log.

    Attributes:
        radius_mm: Of the searchlight. The paper's "searchlight-sphere size of 7mm" may be its
            radius, as here, or its diameter: that is 3.5.

    Raises:
        InputError: A radius that is not positive; when called, no T1.
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
        """The channel (1, X, Y, Z) float32, and the fit and the moments of r."""
        registration, facts = _fit(name, images, affine)
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
    """The modalities of the opposite hemisphere as channels of the cache, z-scored as these are.

    Opposite across the template's plane: where a head lies askew, this is nearer to the truth than
    the middle of its box, which `sampling.cut_with_mirrored` takes. Each voxel is the nearest one
    to its mirror image. A scan that does not fit the template gets channels of 0.
    """

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "mirrored by the template"}

    def __call__(
        self, name: str, images: Mapping[str, np.ndarray], affine: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The channels (C, X, Y, Z) float32, in the order of the modalities, and the fit."""
        from scipy.ndimage import affine_transform

        registration, facts = _fit(name, images, affine)
        channels = np.zeros((len(images), *images["t1"].shape), np.float32)
        if not registration.failed:
            to_opposite = registration.mirrored_voxels(affine)
            for channel, image in zip(channels, images.values(), strict=True):
                standard = _standardised(image, image != 0).astype(np.float32)
                affine_transform(standard, to_opposite, output=channel, order=0)
        return channels, facts
