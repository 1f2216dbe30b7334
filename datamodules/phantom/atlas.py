"""The average brain that phantoms are made from: MNI152 tissue maps and what is measured on them.

Positions are MNI mm.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from datamodules.template import template
from grids import bounding_box, components

VENTRICLE_REACH_MM = 15.0  # depth of the tissue that gives way to a ventricle


class Lattice(NamedTuple):
    """A box of points that smooth displacements are tabulated on.

    Attributes:
        spacing_mm: Distance between neighbouring points.
        first_mm: Position of the first point (3,).
        shape: Number of points along each axis (3,).
    """

    spacing_mm: float
    first_mm: tuple[float, float, float]
    shape: tuple[int, int, int]

    def axes_mm(self) -> list[np.ndarray]:
        """Return the positions of the points along each axis."""
        return [
            first_mm + self.spacing_mm * np.arange(count, dtype=np.float32)
            for first_mm, count in zip(self.first_mm, self.shape, strict=True)
        ]

    def points_mm(self) -> np.ndarray:
        """Return the positions of the points (3, A, B, C)."""
        return np.stack(np.meshgrid(*self.axes_mm(), indexing="ij"))

    def sample(self, vectors: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
        """Interpolate vectors (3, A, B, C) linearly at positions (3, ...)."""
        return np.stack(
            [sample(axis, points_mm, self.first_mm, self.spacing_mm) for axis in vectors]
        )


# Both are symmetric about the mid-sagittal plane x = 0.
HEAD = Lattice(7.5, (-90.0, -127.5, -90.0), (25, 31, 27))  # the brain and 10 mm or more around it
VENTRICLES = Lattice(4.0, (-56.0, -84.0, -36.0), (29, 36, 24))  # and what gives way to them


class Atlas(NamedTuple):
    """The MNI152 tissue maps, cropped to the brain, and what is measured on them.

    Attributes:
        white: Probability of white matter (X, Y, Z), 1 mm.
        grey: Probability of grey matter (X, Y, Z), 1 mm.
        origin_mm: Position of the first voxel (3,), of the 1 mm and of the 2 mm grid.
        depth_mm: Distance to the surface of the brain (X', Y', Z'), negative outside; 2 mm.
        surface_mm: A position near the closest point of the surface, in mm from the origin
            (3, X', Y', Z'); 2 mm. Random sulci are looked up there.
        folding: Weight of the random sulci (X', Y', Z'), 0 to 1, near 0 in the cerebellum and the
            brainstem; 2 mm.
        ventricles: Weight of the lateral and the third ventricles (X', Y', Z'), 0 to 1; 2 mm.
        ventricle_flow: Direction in which tissue moves when the ventricles grow (3, A', B', C'),
            on `VENTRICLES`. Its length is 1 at their border, and falls to 0 in their middle, at the
            surface of the brain and far from the ventricles.
        inner: Weight of the depth of the brain (A, B, C), from 0 at its surface and outside to 1 at
            a depth of 20 mm, on `HEAD`.
        below: Weight of the cerebellum and the brainstem (A, B, C), 0 to 1, on `HEAD`.
        glioma_sites_mm: Positions (N, 3) in which a glioma may start.
        metastasis_sites_mm: Positions (N, 3) between grey and white matter, where metastases sit.
    """

    white: np.ndarray
    grey: np.ndarray
    origin_mm: np.ndarray
    depth_mm: np.ndarray
    surface_mm: np.ndarray
    folding: np.ndarray
    ventricles: np.ndarray
    ventricle_flow: np.ndarray
    inner: np.ndarray
    below: np.ndarray
    glioma_sites_mm: np.ndarray
    metastasis_sites_mm: np.ndarray

    def sample(
        self, volume: np.ndarray, points_mm: Sequence[np.ndarray] | np.ndarray
    ) -> np.ndarray:
        """Interpolate a 1 mm or a 2 mm map of this atlas linearly at positions (3, ...)."""
        spacing_mm = 1 if volume.shape == self.white.shape else 2
        return sample(volume, points_mm, self.origin_mm, spacing_mm)


def sample(
    volume: np.ndarray,
    points_mm: Sequence[np.ndarray] | np.ndarray,
    first_mm: Sequence[float] | np.ndarray,
    spacing_mm: float,
) -> np.ndarray:
    """Interpolate a volume (X, Y, Z) linearly at positions (3, ...); constant beyond its border.

    Args:
        volume: Values on a grid.
        points_mm: Where to interpolate.
        first_mm: Position of the first voxel (3,).
        spacing_mm: Edge of a voxel.
    """
    from scipy.ndimage import map_coordinates

    voxels = [
        (axis_mm - float(start_mm)) / spacing_mm
        for axis_mm, start_mm in zip(points_mm, first_mm, strict=True)
    ]
    return map_coordinates(volume, voxels, order=1, mode="nearest", prefilter=False)


@cache
def load_atlas() -> Atlas:
    """Load the tissue maps and measure them, once in each process."""
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
    white, grey = white[box], grey[box]
    origin_mm = average.affine[:3, 3] + [side.start for side in box]

    # The mask has holes of one voxel near the third ventricle, which must not count as surface.
    outside, _ = components(~brain[box][::2, ::2, ::2])
    coarse = outside != outside[0, 0, 0]
    inside_mm, nearest = distance_transform_edt(  # pyright: ignore[reportGeneralTypeIssues]
        coarse, sampling=2, return_indices=True
    )
    depth_mm = inside_mm - distance_transform_edt(~coarse, sampling=2)
    depth_mm = gaussian_filter(depth_mm.astype(np.float32), 0.7)
    voxels_mm = 2 * np.indices(coarse.shape, dtype=np.float32)
    surface_mm = np.stack([gaussian_filter(2 * axis.astype(np.float32), 1.5) for axis in nearest])
    surface_mm = 0.8 * surface_mm + 0.2 * voxels_mm  # makes sulci lean a little

    points_mm = voxels_mm + origin_mm[:, None, None, None]
    x, y, z = points_mm
    cerebellum = (z < -14) & (y < -34)
    brainstem = (abs(x) < 20) & (z < -8) & (y < -8) & (y > -50)
    below = (cerebellum | brainstem).astype(np.float32)
    folding = 1 - gaussian_filter(below, 2)
    white_2mm, grey_2mm = white[::2, ::2, ::2], grey[::2, ::2, ::2]
    deep_white = (white_2mm > 0.5) & (depth_mm > 9) & (folding > 0.95) & (abs(x) > 6)
    balance, tissue = white_2mm - grey_2mm, white_2mm + grey_2mm
    grey_white_border = (abs(balance) < 0.3) & (tissue > 0.8) & (depth_mm > 5) & ~brainstem
    glioma_sites_mm, metastasis_sites_mm = (
        np.stack([axis[sites] for axis in (x, y, z)], axis=1)
        for sites in (deep_white, grey_white_border)
    )
    ventricles, ventricle_flow = _measure_ventricles(1 - tissue, depth_mm, points_mm)
    head_mm, near_mm = HEAD.points_mm(), VENTRICLES.points_mm()
    return Atlas(
        white=white,
        grey=grey,
        origin_mm=origin_mm,
        depth_mm=depth_mm,
        surface_mm=surface_mm,
        folding=folding,
        ventricles=ventricles,
        ventricle_flow=np.stack([sample(axis, near_mm, origin_mm, 2) for axis in ventricle_flow]),
        inner=np.clip(sample(depth_mm, head_mm, origin_mm, 2) / 20, 0, 1),
        below=sample(gaussian_filter(below, 4), head_mm, origin_mm, 2),
        glioma_sites_mm=glioma_sites_mm,
        metastasis_sites_mm=metastasis_sites_mm,
    )


def _measure_ventricles(
    csf: np.ndarray, depth_mm: np.ndarray, points_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Measure `Atlas.ventricles` and `Atlas.ventricle_flow`, both on the 2 mm grid."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    x, y, z = points_mm
    numbers, _ = components((csf > 0.5) & (depth_mm > 20) & (z > -5) & (z < 30) & (y > -60))
    lateral = numbers == 1 + np.argmax(np.bincount(numbers.ravel())[1:])  # the largest
    third = (csf > 0.35) & (abs(x) < 5) & (y > -30) & (y < 6) & (z > -14) & (z < 8)
    inside = lateral | third
    outside_mm = distance_transform_edt(~inside, sampling=2)
    inside_mm = distance_transform_edt(inside, sampling=2)
    # The border runs half a voxel from the centres of the voxels next to it.
    distance_mm = np.where(inside, 1 - inside_mm, outside_mm - 1).astype(np.float32)  # pyright: ignore[reportOperatorIssue]
    distance_mm = gaussian_filter(distance_mm, 0.75)
    direction = np.stack([np.gradient(distance_mm, 2.0, axis=axis) for axis in range(3)])
    near = np.exp(-np.square(np.maximum(distance_mm, 0) / VENTRICLE_REACH_MM))
    near *= np.clip(depth_mm / 15, 0, 1)  # the skull does not give way
    flow = np.stack([gaussian_filter(axis * near, 1.0) for axis in direction])
    border = np.linalg.norm(flow[:, abs(distance_mm) < 1], axis=0)
    return gaussian_filter(inside.astype(np.float32), 0.5), flow / border.mean()
