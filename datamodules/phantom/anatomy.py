"""Healthy anatomy of one case: MNI152 tissue maps, deformed, refolded and displaced by tumours.

Positions in the case are mm from the lower corner of the field of view; positions in the template
are MNI mm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from datamodules.phantom.fields import Grid, RandomStreams, interpolate, sigmoid
from datamodules.phantom.ranges import FIELD_OF_VIEW_MM
from datamodules.template import template
from grids import bounding_box


class Template(NamedTuple):
    """The MNI152 tissue maps, cropped to the brain, and what is measured on them.

    Attributes:
        white: Probability of white matter (X, Y, Z), 1 mm.
        grey: Probability of grey matter (X, Y, Z), 1 mm.
        origin_mm: MNI position of the first voxel (3,), of the 1 mm and of the 2 mm grid.
        depth_mm: Distance to the surface of the brain (X', Y', Z'), negative outside; 2 mm.
        surface_mm: Near the closest point of the surface, in mm from the origin (3, X', Y', Z');
            2 mm. Random sulci are looked up there.
        folding: Weight of the random sulci (X', Y', Z'), 0 to 1, near 0 in the cerebellum and the
            brainstem; 2 mm.
        glioma_sites_mm: MNI positions (N, 3) in which a glioma may start.
        metastasis_sites_mm: MNI positions (N, 3) between grey and white matter, where metastases
            sit.
    """

    white: np.ndarray
    grey: np.ndarray
    origin_mm: np.ndarray
    depth_mm: np.ndarray
    surface_mm: np.ndarray
    folding: np.ndarray
    glioma_sites_mm: np.ndarray
    metastasis_sites_mm: np.ndarray

    def sample(
        self, volume: np.ndarray, points_mm: Sequence[np.ndarray] | np.ndarray
    ) -> np.ndarray:
        """Interpolate a map of this template linearly at MNI positions (3, ...)."""
        from scipy.ndimage import map_coordinates

        spacing_mm = 1 if volume.shape == self.white.shape else 2
        voxels = [
            (axis_mm - float(first_mm)) / spacing_mm
            for axis_mm, first_mm in zip(points_mm, self.origin_mm, strict=True)
        ]
        return map_coordinates(volume, voxels, order=1, mode="nearest", prefilter=False)


@cache
def load_template() -> Template:
    """Load the template and measure it, once in each process."""
    from nilearn import datasets
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    white, grey = (
        np.asarray(load(resolution=1).dataobj, dtype=np.float32)
        for load in (datasets.load_mni152_wm_template, datasets.load_mni152_gm_template)
    )
    average = template(spacing_mm=1)
    brain = average.voxels > 0
    margin = 12  # voxels = mm
    box = tuple(
        slice(max(side.start - margin, 0), side.stop - 1 + margin) for side in bounding_box(brain)
    )
    white, grey, brain = white[box], grey[box], brain[box]
    origin_mm = average.affine[:3, 3] + [side.start for side in box]

    coarse = brain[::2, ::2, ::2]
    inside_mm, nearest = distance_transform_edt(  # pyright: ignore[reportGeneralTypeIssues]
        coarse, sampling=2, return_indices=True
    )
    depth_mm = inside_mm - distance_transform_edt(~coarse, sampling=2)
    depth_mm = gaussian_filter(depth_mm.astype(np.float32), 0.7)
    voxels_mm = 2 * np.indices(coarse.shape, dtype=np.float32)
    surface_mm = np.stack([gaussian_filter(2 * axis.astype(np.float32), 1.5) for axis in nearest])
    surface_mm = 0.8 * surface_mm + 0.2 * voxels_mm  # makes sulci lean a little

    x, y, z = voxels_mm + origin_mm[:, None, None, None]
    cerebellum = (z < -14) & (y < -34)
    brainstem = (abs(x) < 20) & (z < -8) & (y < -8) & (y > -50)
    below = gaussian_filter((cerebellum | brainstem).astype(np.float32), 2)
    deep_white = (white[::2, ::2, ::2] > 0.5) & (depth_mm > 9) & (below < 0.05) & (abs(x) > 6)
    balance = white[::2, ::2, ::2] - grey[::2, ::2, ::2]
    tissue = white[::2, ::2, ::2] + grey[::2, ::2, ::2]
    grey_white_border = (abs(balance) < 0.3) & (tissue > 0.8) & (depth_mm > 5) & ~brainstem
    glioma_sites_mm, metastasis_sites_mm = (
        np.stack([axis[sites] for axis in (x, y, z)], axis=1)
        for sites in (deep_white, grey_white_border)
    )
    return Template(
        white=white,
        grey=grey,
        origin_mm=origin_mm,
        depth_mm=depth_mm,
        surface_mm=surface_mm,
        folding=1 - below,
        glioma_sites_mm=glioma_sites_mm,
        metastasis_sites_mm=metastasis_sites_mm,
    )


class Warp(NamedTuple):
    """Map from the case to the template: an affine map plus a smooth deformation.

    Attributes:
        random: Random numbers of the case.
        matrix: Linear part of the affine map (3, 3), case mm to MNI mm.
        centre_mm: Centre of the head in the case (3,).
        target_mm: MNI position of that centre (3,).
    """

    random: RandomStreams
    matrix: np.ndarray
    centre_mm: np.ndarray
    target_mm: np.ndarray

    def to_mni_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Apply the affine map to positions of the case (3, ...)."""
        shift_mm = self.target_mm - self.matrix @ self.centre_mm
        moved = np.tensordot(self.matrix.astype(np.float32), points_mm, axes=1)
        return moved + shift_mm.astype(np.float32).reshape(3, *[1] * (points_mm.ndim - 1))

    def from_mni_mm(self, point_mm: np.ndarray) -> np.ndarray:
        """Apply the inverse of the affine map to one MNI position (3,)."""
        return np.linalg.solve(self.matrix, point_mm - self.target_mm) + self.centre_mm

    def deformation_mm(self, grid: Grid) -> np.ndarray:
        """Return the smooth displacement in the template (3, X, Y, Z), to add to `to_mni_mm`."""
        return np.stack(
            [
                3.5 * self.random.smooth_field(f"deform far {axis}", 45.0, grid)
                + 1.0 * self.random.smooth_field(f"deform near {axis}", 16.0, grid)
                for axis in "xyz"
            ]
        )


def draw_warp(random: RandomStreams) -> Warp:
    """Draw the size, the pose and the shape of the head."""
    from scipy.spatial.transform import Rotation

    scale = random.draw("brain_scale") * random.draw_per_axis("axis_scale")
    rotation = Rotation.from_euler("xyz", random.draw_per_axis("rotation_deg"), degrees=True)
    centre_mm = np.divide(FIELD_OF_VIEW_MM, 2) + random.draw_per_axis("shift_mm")
    template = load_template()
    middle_mm = template.origin_mm + np.divide(template.white.shape, 2)
    return Warp(random, np.diag(1 / scale) @ rotation.as_matrix(), centre_mm, middle_mm)


@dataclass(frozen=True)
class Focus:
    """An ellipsoidal tumour that pushes tissue away, before noise makes its border irregular.

    Attributes:
        centre_mm: Position in the case (3,).
        radius_mm: Mean half axis.
        axes: A rotation divided by the relative half axes (3, 3).
        push_mm: Displacement of the tissue at the border.
        push_reach_mm: Distance from the border at which the displacement has fallen to 1/e.
    """

    centre_mm: np.ndarray
    radius_mm: float
    axes: np.ndarray
    push_mm: float
    push_reach_mm: float

    def depth_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Return the distance of points (3, X, Y, Z) to the border (X, Y, Z), positive inside."""
        offset_mm = points_mm - self.centre_mm.astype(np.float32).reshape(3, 1, 1, 1)
        offset = np.tensordot(self.axes.astype(np.float32), offset_mm, axes=1)
        return self.radius_mm - np.sqrt(np.square(offset).sum(axis=0))

    def displacement_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Return how far the tissue now at a point was pushed to get there (3, X, Y, Z)."""
        offset_mm = points_mm - self.centre_mm.astype(np.float32).reshape(3, 1, 1, 1)
        distance_mm = np.sqrt(np.square(offset_mm).sum(axis=0)) + 1e-3
        beyond_mm = np.maximum(distance_mm - self.radius_mm, 0)
        inside = np.minimum(distance_mm / self.radius_mm, 1)
        push_mm = self.push_mm * inside * np.exp(-beyond_mm / self.push_reach_mm)
        return offset_mm * (push_mm / distance_mm)


class Geometry(NamedTuple):
    """Everything smooth about the shape of a head, on two coarse grids of a box around the brain.

    Attributes:
        coarse: The grid of `mni_mm` and `core_depth_mm`, 4 mm.
        mni_mm: MNI positions that the tissue comes from (3, X, Y, Z), mass effect included.
        core_depth_mm: Distance to the border of the nearest focus (X, Y, Z), positive inside.
        fine: The grid of `depth_mm` and `sulcus_mm`, 2 mm.
        depth_mm: Distance to the surface of the brain (X', Y', Z'), positive inside.
        sulcus_mm: Approximate signed distance to the nearest sulcus (X', Y', Z').
    """

    coarse: Grid
    mni_mm: np.ndarray
    core_depth_mm: np.ndarray
    fine: Grid
    depth_mm: np.ndarray
    sulcus_mm: np.ndarray


def build_geometry(random: RandomStreams, warp: Warp, foci: list[Focus]) -> Geometry:
    """Build the head and let its tumours displace the tissue."""
    template = load_template()
    whole = Grid.whole(4.0)
    skull_mm = warp.to_mni_mm(whole.points_mm()) + warp.deformation_mm(whole)
    outline_mm = template.sample(template.depth_mm, skull_mm)
    coarse = whole.around(outline_mm > 0)
    fine = coarse.resized(2.0)

    deformation_mm = warp.deformation_mm(coarse)
    points_mm = coarse.points_mm()
    core_depth_mm = np.full(coarse.shape, -100, np.float32)
    for focus in foci:
        core_depth_mm = np.maximum(core_depth_mm, focus.depth_mm(points_mm))
    skull_mm = warp.to_mni_mm(points_mm) + deformation_mm
    for focus in foci:
        points_mm = points_mm - focus.displacement_mm(points_mm)
    mni_mm = warp.to_mni_mm(points_mm) + deformation_mm

    # The skull does not give way, so the depth is measured without the displacement by tumours.
    depth_mm = template.sample(
        template.depth_mm, [interpolate(axis, coarse, fine) for axis in skull_mm]
    )
    sulcus_mm = template.sample(
        _draw_sulci(random), [interpolate(axis, coarse, fine) for axis in mni_mm]
    )
    return Geometry(coarse, mni_mm, core_depth_mm, fine, depth_mm, sulcus_mm)


def _draw_sulci(random: RandomStreams) -> np.ndarray:
    """Return the signed distance in mm to the nearest random sulcus, on the template's 2 mm grid.

    The zero level of a smooth field is a labyrinth of sheets like the folds of the cortex. The
    field is looked up near the closest surface point, so that the sheets stand upright on the
    surface.
    """
    from scipy.ndimage import map_coordinates

    template = load_template()
    gyrus_mm = random.draw("gyrus_mm")
    shell = (template.depth_mm > -4) & (template.depth_mm < 24)
    points = template.surface_mm[:, shell] / np.float32(gyrus_mm) + 3
    controls = random.generator("folds").standard_normal(
        [int(axis.max()) + 4 for axis in points], dtype=np.float32
    )
    sulcus_mm = np.full(shell.shape, 3, np.float32)
    field = map_coordinates(controls, points, order=2, prefilter=False) / 0.55**1.5
    sulcus_mm[shell] += template.folding[shell] * (0.8 * gyrus_mm * field - 3)
    return sulcus_mm


class Tissue(NamedTuple):
    """Healthy tissue on a grid.

    Attributes:
        white, grey, csf: Fractions of a voxel (X, Y, Z), which sum to 1.
        depth_mm: Distance to the surface of the brain (X, Y, Z), positive inside.
        mni_mm: MNI positions that the tissue comes from: x, y and z, each (X, Y, Z).
    """

    white: np.ndarray
    grey: np.ndarray
    csf: np.ndarray
    depth_mm: np.ndarray
    mni_mm: list[np.ndarray]


def healthy_tissue(random: RandomStreams, geometry: Geometry, grid: Grid) -> Tissue:
    """Make the healthy tissue on a grid, displaced by the tumours.

    The template's maps are averages of 152 brains: right in the depth, but smeared in the cortex.
    Near the surface a ribbon of grey matter along random sulci replaces them.
    """
    template = load_template()
    mni_mm = [interpolate(axis, geometry.coarse, grid) for axis in geometry.mni_mm]
    depth_mm = interpolate(geometry.depth_mm, geometry.fine, grid)
    sulcus_mm = np.abs(interpolate(geometry.sulcus_mm, geometry.fine, grid))
    near = depth_mm > -4  # skull stripping removes what lies further out
    white, grey = np.zeros_like(depth_mm), np.zeros_like(depth_mm)
    near_mm = [axis[near] for axis in mni_mm]
    white[near] = template.sample(template.white, near_mm)
    grey[near] = template.sample(template.grey, near_mm)
    balance = white - grey  # 1 in white matter, -1 in grey matter
    csf = 1 - white - grey

    sulcus_depth_mm = 3 * random.smooth_field("sulcus depth", 20.0, grid)
    sulcus_depth_mm += random.draw("sulcus_depth_mm")
    shallow = sigmoid((sulcus_depth_mm - depth_mm) / 1.5)
    cortex_mm = random.draw("cortex_mm") + 0.4 * random.smooth_field("cortex", 6.0, grid)
    ribbon = np.clip((np.minimum(sulcus_mm, depth_mm) - cortex_mm) / 2, -1, 1)
    width_mm = float(np.hypot(random.draw("sulcus_mm"), grid.spacing_mm / 3))
    fissure = shallow * np.exp(-np.square(sulcus_mm / width_mm))
    fissure += grey * np.exp(-np.square(mni_mm[0] / width_mm))  # between the hemispheres

    balance += 0.15 * random.smooth_field("border", 3.0, grid)
    balance += shallow * (0.9 * ribbon - 0.45 * balance)
    liquid = 2.2 * np.maximum(csf + random.draw("atrophy"), 1.1 * fissure) - 1
    liquid += np.maximum(0.6 - depth_mm, 0)
    sharpness = 4.5 / max(grid.spacing_mm, 1)
    csf = sigmoid(sharpness * (liquid - np.abs(balance)))
    white = (1 - csf) * sigmoid(2 * sharpness * balance)
    return Tissue(white, 1 - csf - white, csf, depth_mm, mni_mm)


def ventricles(tissue: Tissue) -> np.ndarray:
    """Return a soft map (X, Y, Z) of the fluid deep in the brain, from tissue on a 4 mm grid."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(tissue.csf * (tissue.depth_mm > 22), 1.2)
