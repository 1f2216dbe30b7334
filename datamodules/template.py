"""Registration of a case to the MNI152 template (Frey & Nau 2019, sections 2.3 and 3)."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

import grids
from errors import InputError

GRIDS_MM = (4.0, 2.0)  # coarse to fine; a finer grid costs time and changes little
# Share of the voxels of each grid that is compared. Comparing all of them takes three times as long
# and moves the brain by 0.4 mm.
SAMPLED_SHARES = (0.5, 0.1)
SEED = 1  # of the draw of these voxels; ITK takes 0 for the time of day
MARGIN_MM = 6.0  # around the brain, so that its outline counts
LEAST_OVERLAP = 0.85  # Dice of the two brains; good fits reach 0.95


class Template(NamedTuple):
    """The MNI152 T1 of nilearn, used in place of the paper's average of 305 subjects.

    Attributes:
        voxels: (X, Y, Z) float32, RAS, 0 outside the brain.
        affine: (4, 4), voxel to MNI mm.
    """

    voxels: np.ndarray
    affine: np.ndarray


@cache
def template(spacing_mm: int = 1) -> Template:
    """Load the template at a whole number of mm; callers share its arrays and must not write."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    image = load_mni152_template(resolution=spacing_mm)
    brain = load_mni152_brain_mask(resolution=spacing_mm)
    # nilearn's resampling leaves ringing outside the brain.
    voxels = np.where(brain.get_fdata() > 0, image.get_fdata(), 0).astype(np.float32)
    return Template(voxels, np.asarray(image.affine))


class Registration(NamedTuple):
    """The fit of a case to the template: translation, rotation and scaling along each axis.

    Attributes:
        to_template: (4, 4), mm of the case to mm of the template, both RAS.
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
        """Resample a volume of the case to the grid of a template.

        Args:
            volume: (X, Y, Z) on a grid of the case.
            affine: (4, 4), voxel of that grid to mm.
            like: Template with the wanted grid.
            order: Order of the spline; 1 is linear, 0 the nearest voxel.

        Returns:
            (X', Y', Z') float32, 0 outside the volume.
        """
        from scipy.ndimage import affine_transform

        to_voxel = np.linalg.inv(affine) @ np.linalg.inv(self.to_template) @ like.affine
        return affine_transform(
            volume.astype(np.float32), to_voxel, output_shape=like.voxels.shape, order=order
        )

    def template_on(self, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
        """Resample the template to a grid of the case: (X, Y, Z) float32, 0 outside its brain."""
        from scipy.ndimage import affine_transform

        source = template(max(1, round(float(grids.spacing_mm(affine).mean()))))
        to_voxel = np.linalg.inv(source.affine) @ self.to_template @ affine
        return affine_transform(source.voxels, to_voxel, output_shape=tuple(shape), order=1)

    def mirrored_voxels(self, affine: np.ndarray) -> np.ndarray:
        """Map each voxel of a grid of the case to its mirror image across the template's plane.

        Args:
            affine: (4, 4), voxel of the grid to mm.

        Returns:
            (4, 4), voxel to voxel.
        """
        to_template = self.to_template @ affine
        return np.linalg.inv(to_template) @ np.diag([-1.0, 1, 1, 1]) @ to_template


def register(t1: np.ndarray, affine: np.ndarray) -> Registration:
    """Fit a brain to the template by mutual information, with 9 degrees of freedom.

    On one thread the same brain gives the same fit, because the draw of the voxels is seeded.

    Args:
        t1: (X, Y, Z), 0 outside the brain.
        affine: (4, 4), voxel to mm, RAS.

    Raises:
        InputError: All voxels are 0.
    """
    import SimpleITK as sitk  # noqa: N813  (the alias of its documentation)
    import torch
    from scipy.ndimage import binary_dilation
    from torchio import LabelMap, ScalarImage

    reference = template(2)
    spacing_mm = float(grids.spacing_mm(affine).mean())
    margin = max(1, round(MARGIN_MM / spacing_mm))
    # Without this, most of the time would go into smoothing and shrinking the air around the head.
    t1, affine = _cropped(t1, affine, margin + 2)
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
    method.SetMetricSamplingPercentagePerLevel(SAMPLED_SHARES, seed=SEED)
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

    # ITK's first two axes point to the left and to the back (LPS); ours are RAS.
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


def _cropped(t1: np.ndarray, affine: np.ndarray, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Crop a scan to its brain and a margin in voxels, zeros beyond the scan; and its affine.

    Raises:
        InputError: All voxels are 0.
    """
    brain = t1 != 0
    if not brain.any():
        raise InputError("t1: expected a brain, found none")
    box = grids.bounding_box(brain)
    offset = np.eye(4)
    offset[:3, 3] = [side.start - margin for side in box]
    return np.pad(t1[box], margin), affine @ offset
