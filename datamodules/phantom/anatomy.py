"""Healthy anatomy of one case: MNI152 tissue maps, deformed, refolded and displaced by tumours.

Positions in the case are mm from the lower corner of the field of view; positions in the atlas are
MNI mm.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datamodules.phantom.atlas import load_atlas
from datamodules.phantom.fields import Grid, RandomStreams, interpolate, sigmoid
from datamodules.phantom.ranges import CSF_PER_YEAR, SULCUS_MM_PER_YEAR
from datamodules.phantom.shape import Warp, years_from_middle_age


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
    atlas = load_atlas()
    # A rough box comes first, because most of the field of view is empty.
    rough = Grid.whole(8.0)
    skull_mm = warp.outline_to_mni_mm(rough.points_mm())
    box = rough.around(atlas.sample(atlas.depth_mm, skull_mm) > 0).resized(4.0)
    skull_mm = warp.outline_to_mni_mm(box.points_mm())
    coarse = box.around(atlas.sample(atlas.depth_mm, skull_mm) > 0)
    fine = coarse.resized(2.0)
    first, last = (np.subtract(corner, box.start) for corner in (coarse.start, coarse.stop))
    skull_mm = skull_mm[(slice(None), *map(slice, first, last))]

    points_mm = coarse.points_mm()
    core_depth_mm = np.full(coarse.shape, -100, np.float32)
    for focus in foci:
        core_depth_mm = np.maximum(core_depth_mm, focus.depth_mm(points_mm))
    for focus in foci:
        points_mm = points_mm - focus.displacement_mm(points_mm)
    mni_mm = warp.to_mni_mm(points_mm) if foci else warp.ventricles.to_atlas(skull_mm)

    # The skull does not give way, so the depth is measured without the displacement by tumours.
    depth_mm = atlas.sample(atlas.depth_mm, [interpolate(axis, coarse, fine) for axis in skull_mm])
    sulcus_mm = atlas.sample(
        _draw_sulci(random), [interpolate(axis, coarse, fine) for axis in mni_mm]
    )
    return Geometry(coarse, mni_mm, core_depth_mm, fine, depth_mm, sulcus_mm)


def _draw_sulci(random: RandomStreams) -> np.ndarray:
    """Return the signed distance in mm to the nearest random sulcus, on the 2 mm grid of the atlas.

    The zero level of a smooth field is a labyrinth of sheets like the folds of the cortex. The
    field is looked up near the closest surface point, so that the sheets stand upright on the
    surface.
    """
    from scipy.ndimage import map_coordinates

    atlas = load_atlas()
    gyrus_mm = random.draw("gyrus_mm")
    shell = (atlas.depth_mm > -4) & (atlas.depth_mm < 24)
    points = atlas.surface_mm[:, shell] / np.float32(gyrus_mm) + 3
    controls = random.generator("folds").standard_normal(
        [int(axis.max()) + 4 for axis in points], dtype=np.float32
    )
    sulcus_mm = np.full(shell.shape, 3, np.float32)
    field = map_coordinates(controls, points, order=2, prefilter=False) / 0.55**1.5
    sulcus_mm[shell] += atlas.folding[shell] * (0.8 * gyrus_mm * field - 3)
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

    The maps of the atlas are averages of 152 brains: right in the depth, but smeared in the cortex.
    Near the surface a ribbon of grey matter along random sulci replaces them.
    """
    atlas = load_atlas()
    mni_mm = [interpolate(axis, geometry.coarse, grid) for axis in geometry.mni_mm]
    depth_mm = interpolate(geometry.depth_mm, geometry.fine, grid)
    sulcus_mm = np.abs(interpolate(geometry.sulcus_mm, geometry.fine, grid))
    near = depth_mm > -4  # skull stripping removes what lies further out
    white, grey = np.zeros_like(depth_mm), np.zeros_like(depth_mm)
    near_mm = [axis[near] for axis in mni_mm]
    white[near] = atlas.sample(atlas.white, near_mm)
    grey[near] = atlas.sample(atlas.grey, near_mm)
    balance = white - grey  # 1 in white matter, -1 in grey matter
    csf = 1 - white - grey

    sulcus_depth_mm = 3 * random.smooth_field("sulcus depth", 20.0, grid)
    sulcus_depth_mm += random.draw("sulcus_depth_mm")
    shallow = random.laws.folding * sigmoid((sulcus_depth_mm - depth_mm) / 1.5)
    cortex_mm = random.draw("cortex_mm") + 0.4 * random.smooth_field("cortex", 6.0, grid)
    ribbon = np.clip((np.minimum(sulcus_mm, depth_mm) - cortex_mm) / 2, -1, 1)
    years = years_from_middle_age(random)
    half_width_mm = random.draw("sulcus_mm") + SULCUS_MM_PER_YEAR * years
    width_mm = float(np.hypot(half_width_mm, grid.spacing_mm / 3))
    fissure = shallow * np.exp(-np.square(sulcus_mm / width_mm))
    x_mm, y_mm, z_mm = mni_mm
    between = sigmoid((np.maximum(z_mm - 5, y_mm - 10)) / 2)  # not in brainstem and cerebellum
    fissure += grey * between * np.exp(-np.square(x_mm / width_mm))  # between the hemispheres

    balance += 0.15 * random.smooth_field("border", 3.0, grid)
    balance += shallow * (0.9 * ribbon - 0.45 * balance)
    # Where the atlas is certain that there is fluid, or that there is none, age changes nothing.
    csf += 4 * csf * (1 - csf) * (random.draw("atrophy") + CSF_PER_YEAR * years)
    liquid = 3 * np.maximum(csf, 1.1 * fissure) - 1.36
    liquid += np.maximum(0.6 - depth_mm, 0)
    sharpness = 4.5 / max(grid.spacing_mm, 1)
    csf = sigmoid(sharpness * (liquid - np.abs(balance)))
    white = (1 - csf) * sigmoid(2 * sharpness * balance)
    return Tissue(white, 1 - csf - white, csf, depth_mm, mni_mm)


def ventricles(tissue: Tissue) -> np.ndarray:
    """Return a soft map (X, Y, Z) of the fluid deep in the brain, from tissue on a 4 mm grid."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(tissue.csf * (tissue.depth_mm > 22), 1.2)
