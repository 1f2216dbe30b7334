"""Where a case lies in the MNI152 template (Frey & Nau 2019, sections 2.3 and 3)."""

from typing import NamedTuple

import numpy as np

GRIDS_MM = (4.0, 2.0)  # coarse to fine; a finer one costs time and changes little
MARGIN_MM = 6.0  # around the brain, so that its outline counts
LEAST_OVERLAP = 0.85  # Dice of the two brains; good fits have .95


class Template(NamedTuple):
    """The MNI152 T1 of nilearn, which stands in for the average of 305 subjects.

    Attributes:
        voxels: (X, Y, Z) float32, RAS, 0 outside the brain.
        affine: (4, 4), voxel to MNI mm.
    """

    voxels: np.ndarray
    affine: np.ndarray


def template(spacing_mm: int = 1) -> Template:
    """The template, at 1 mm or at another whole number of mm."""
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


def register(t1: np.ndarray, affine: np.ndarray) -> Registration:
    """Fit the template to a brain, by mutual information (9 degrees of freedom).

    Args:
        t1: (X, Y, Z), 0 outside the brain.
        affine: (4, 4), voxel to mm, RAS.
    """
    import SimpleITK as sitk  # noqa: N813  (everybody calls it so)
    import torch
    from scipy.ndimage import binary_dilation
    from torchio import LabelMap, ScalarImage

    reference = template(2)
    brain = t1 != 0
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    near = binary_dilation(brain, iterations=max(1, round(MARGIN_MM / float(spacing_mm.mean()))))

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
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-3, numberOfIterations=150
    )
    method.SetOptimizerScalesFromPhysicalShift()
    shrink = [max(1, round(grid_mm / float(spacing_mm.mean()))) for grid_mm in GRIDS_MM]
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
