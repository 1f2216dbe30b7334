"""Synthetic tumours, written as ordinary data sets: `python -m datamodules.phantom --help`.

A phantom is anatomy (nilearn's MNI152 tissue maps, deformed and refolded per case), pathology
(gliomas: core, enhancing rim, oedema that creeps along white matter, mass effect; or metastases:
many, mostly small, at the grey-white border) and image formation
(contrast, texture, bias field, thick slices, misregistration, noise, skull stripping), each drawn
from ranges wide enough to contain real scans. Everything random but the voxel noise is drawn in
millimetres, on control grids that do not know the voxel size: a case is the same patient at 1 mm
and at 2 mm.

In here volumes are (X, Y, Z) in RAS order and positions are mm from the lower corner of the field
of view; only `_stored` knows how a file is oriented.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from datamodules.brats import BraTS
from datamodules.cases import Case, check_choice
from datamodules.metastases import Metastases
from errors import InputError

VERSION = 2  # of the generator; raise it when the same (seed, index) gives other voxels
FIELD_OF_VIEW_MM = (240.0, 240.0, 155.0)
MODALITIES = ("t1", "t1ce", "t2", "flair")
NECROSIS, OEDEMA, ENHANCING = 1, 2, 4  # BraTS labels

# Intensity of each class over that of white matter, (lowest, highest) in the order of MODALITIES.
# Measured on real cases; class medians come out a little nearer to 1, by partial volume.
CONTRAST = {
    "gm": ((0.63, 0.86), (0.64, 0.92), (1.05, 1.42), (0.96, 1.15)),
    "csf": ((0.28, 0.60), (0.22, 0.70), (1.90, 2.90), (0.20, 0.62)),
    "oedema": ((0.61, 0.96), (0.58, 1.00), (1.30, 1.80), (1.30, 1.70)),
    "core": ((0.36, 0.98), (0.36, 1.10), (1.38, 2.29), (1.25, 1.60)),
    "cyst": ((0.32, 0.50), (0.30, 0.55), (2.30, 3.90), (0.60, 1.15)),
    "enhancing": ((0.65, 1.00), (1.15, 2.10), (1.40, 1.70), (1.25, 1.55)),
    "vessel": ((0.45, 1.10), (1.30, 2.30), (0.40, 1.10), (0.40, 1.00)),
    "bright": ((-0.15, 0.0), (-0.15, 0.0), (0.0, 0.35), (0.0, 0.45)),  # added, not replacing
    "plexus": ((0.60, 0.90), (1.10, 1.70), (1.50, 2.20), (0.70, 1.20)),
}

# Standard deviation of each class's texture, of white matter, (lowest, highest).
TEXTURE = {
    "healthy, coarse": (0.01, 0.05),
    "healthy, fine": (0.005, 0.03),
    "oedema, coarse": (0.02, 0.10),
    "oedema, fine": (0.01, 0.06),
    "core, coarse": (0.03, 0.15),
    "core, fine": (0.01, 0.08),
}

# Ranges that a case draws from, (lowest, highest).
RANGES = {
    # anatomy
    "brain_scale": (0.84, 1.00),  # of the MNI152 brain, which is larger than most
    "axis_scale": (0.96, 1.04),
    "rotation_deg": (-7.0, 7.0),
    "shift_mm": (-4.0, 4.0),
    "cortex_mm": (1.8, 3.0),
    "sulcus_mm": (0.7, 1.9),  # half width
    "sulcus_depth_mm": (11.0, 19.0),
    "gyrus_mm": (3.9, 5.6),  # control spacing; sulci are about 2.5 times that apart
    "atrophy": (-0.20, 0.15),  # added to the score of CSF
    # pathology
    "radius_mm": (12.0, 27.0),  # of the core, 7 to 80 ml, as gliomas of BraTS have
    "elongation": (0.75, 1.3),
    "lobes_mm": (0.5, 3.0),
    "rim_mm": (1.5, 8.0),
    "oedema_ratio_hgg": (1.0, 3.5),  # volume over that of the core
    "oedema_ratio_lgg": (0.3, 2.2),
    "push_mm": (0.0, 7.0),  # mass effect at the edge of the core
    "push_reach_mm": (15.0, 35.0),
    "metastasis_rim_mm": (1.2, 3.0),
    "metastasis_oedema": (0.5, 2.0),  # its reach beyond the border, over the radius
    # image formation
    "noise": (0.007, 0.04),  # of white matter
    "bias": (0.01, 0.16),  # sd of the logarithm of the smooth field
    "misregistration_mm": (0.0, 0.6),  # per axis
    "slice_mm": (3.0, 6.0),
    "blur_mm": (0.0, 0.7),
    "ringing": (0.2, 0.6),
    "white_matter_log10": (2.2, 3.1),  # raw values
    "brain_margin_mm": (-1.5, 1.5),  # what skull stripping leaves (+) or takes (-)
}

# Shares of the cases that have a property.
CHANCES = {
    "hgg": 0.65,
    "enhancing_lgg": 0.15,
    "enhancing_hgg": 0.95,
    "cyst": 0.2,
    "multifocal": 0.2,
    "hyperintensities": 0.3,  # small, in healthy white matter; not labelled
    "cut_field_of_view": 0.1,
    "ringing": 0.35,  # spline resampling: overshoot, negative voxels
    "tenfold_modality": 0.15,
    "ras": 0.5,
}
# Metastases: how many (a gamma distribution, rounded down; about one case in twelve has none, the
# median is 4), and how large (log-normal).
METASTASES_SHAPE, METASTASES_SCALE, MOST_METASTASES = 1.6, 3.4, 12
METASTASIS_RADIUS_MM, METASTASIS_LOG_SD = 2.8, 0.5
LEAST_METASTASIS_MM, LARGEST_METASTASIS_MM = 1.5, 12.0
RING_FROM_MM = 4.5  # radius from which a metastasis may have a necrotic centre and oedema

# Shares of the modalities acquired in thick slices.
THICK_SLICES = {"t1": 0.25, "t1ce": 0.15, "t2": 0.45, "flair": 0.45}
SPLINE_SD = 0.479**1.5  # of a cubic B-spline of white noise, 3-D


class Phantom(NamedTuple):
    """One synthetic examination, in the voxel order of its file.

    Attributes:
        images: int16 volume (X, Y, Z) per modality; exactly 0 outside the brain.
        labels: uint8 (X, Y, Z). Gliomas: 0, 1 necrotic or non-enhancing core, 2 oedema, 4
            enhancing. Metastases: 0, 1 lesion, oedema not included.
        affine: Voxel indices to mm (4, 4); diagonal, LPS or RAS.
        grade: "HGG" or "LGG"; empty for metastases.
    """

    images: dict[str, np.ndarray]
    labels: np.ndarray
    affine: np.ndarray
    grade: str


def _within(
    stream: np.random.Generator, limits: tuple[float, float], size: int | None = None
) -> np.ndarray:
    """Of a triangular distribution: both ends are drawn, but seldom, and seldom together.

    The ranges hold the extremes of real cases; a patient is extreme in few things at once.
    """
    low, high = limits
    return np.asarray(stream.triangular(low, (low + high) / 2, high, size))


class _Draw:
    """The random numbers of one case: every step has a stream of its own.

    A step that draws more, or in another order, leaves all other steps as they were.
    """

    def __init__(self, seed: int, index: int) -> None:
        self.seed, self.index = seed, index
        self._controls: dict[str, np.ndarray] = {}

    def stream(self, step: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.index, zlib.crc32(step.encode())])

    def value(self, name: str, step: str = "") -> float:
        """From RANGES[name]."""
        return float(_within(self.stream(f"{name} {step}"), RANGES[name]))

    def values(self, name: str, step: str = "") -> np.ndarray:
        """Three from RANGES[name], one per axis."""
        return _within(self.stream(f"{name} {step}"), RANGES[name], size=3)

    def happens(self, name: str) -> bool:
        """With the probability CHANCES[name]."""
        return self.stream(name).random() < CHANCES[name]

    def field(self, step: str, length_mm: float, grid: "_Grid") -> np.ndarray:
        """Smooth random field (X, Y, Z) of mean 0 and variance 1, the same on every grid."""
        if step not in self._controls:
            shape = [int(extent_mm / length_mm) + 6 for extent_mm in FIELD_OF_VIEW_MM]
            self._controls[step] = self.stream(step).standard_normal(shape, dtype=np.float32)
        return _spline(self._controls[step], length_mm, (-2 * length_mm,) * 3, grid) / SPLINE_SD


class _Grid(NamedTuple):
    """A box of voxels inside the field of view, RAS."""

    spacing_mm: float
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, spacing_mm: float) -> "_Grid":
        shape = tuple(int(np.ceil(extent_mm / spacing_mm)) for extent_mm in FIELD_OF_VIEW_MM)
        return cls(spacing_mm, (0, 0, 0), shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.subtract(self.stop, self.start))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(map(slice, self.start, self.stop))

    def axes_mm(self) -> list[np.ndarray]:
        """Positions of the voxel centres along each axis."""
        return [
            ((np.arange(start, stop) + 0.5) * self.spacing_mm).astype(np.float32)
            for start, stop in zip(self.start, self.stop, strict=True)
        ]

    def points_mm(self) -> np.ndarray:
        """Positions of the voxel centres (3, X, Y, Z)."""
        return np.stack(np.meshgrid(*self.axes_mm(), indexing="ij"))

    def slabs(self, thickness: int = 12) -> Iterator[tuple[slice, "_Grid"]]:
        """The grid in pieces that fit a processor's cache, and where in the grid they lie."""
        for first in range(self.start[0], self.stop[0], thickness):
            last = min(first + thickness, self.stop[0])
            rows = slice(first - self.start[0], last - self.start[0])
            yield rows, _Grid(self.spacing_mm, (first, *self.start[1:]), (last, *self.stop[1:]))

    def at(self, spacing_mm: float) -> "_Grid":
        """The same box in voxels of another size, a little larger where they do not fit."""
        factor = self.spacing_mm / spacing_mm
        whole = _Grid.whole(spacing_mm)
        start = tuple(int(np.floor(index * factor)) for index in self.start)
        stop = tuple(
            min(int(np.ceil(index * factor)), last)
            for index, last in zip(self.stop, whole.stop, strict=True)
        )
        return _Grid(spacing_mm, start, stop)

    def around(self, inside: np.ndarray) -> "_Grid":
        """The box that holds the true voxels of this grid, and one more on each side."""
        start, stop = [], []
        for axis in range(3):
            hit = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis}))) + self.start[axis]
            start.append(max(0, hit[0] - 1))
            stop.append(min(self.stop[axis], hit[-1] + 2))
        return _Grid(self.spacing_mm, tuple(start), tuple(stop))


# --- random fields -------------------------------------------------------------------------------


def _spline(
    controls: np.ndarray, length_mm: float, first_mm: Sequence[float], grid: _Grid
) -> np.ndarray:
    """Cubic B-spline on a grid (X, Y, Z).

    Args:
        controls: Values (A, B, C); smoothed, not met, by the spline.
        length_mm: From one control to the next.
        first_mm: Position of the first control (3,).
        grid: Where to evaluate.
    """
    values = controls
    for axis_mm, start_mm, count in zip(grid.axes_mm(), first_mm, controls.shape, strict=True):
        position = (axis_mm[:, None] - start_mm) / length_mm
        distance = np.abs(position - np.arange(count, dtype=np.float32))
        near = (4 - 6 * distance**2 + 3 * distance**3) / 6
        weights = np.where(distance < 1, near, np.maximum(2 - distance, 0) ** 3 / 6)
        values = np.tensordot(values, weights.astype(np.float32), axes=(0, 1))  # cycles the axes
    return values


def _between(volume: np.ndarray, coarse: _Grid, grid: _Grid) -> np.ndarray:
    """A smooth volume of a coarse grid on a fine one."""
    pad = 4
    controls = np.pad(volume, pad, mode="edge").astype(np.float32)
    first_mm = [(start + 0.5 - pad) * coarse.spacing_mm for start in coarse.start]
    return _spline(controls, coarse.spacing_mm, first_mm, grid)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(x)


# --- anatomy -------------------------------------------------------------------------------------


class _Template(NamedTuple):
    """The MNI152 maps, cropped to the brain; `depth_mm` and `surface_mm` on 2 mm voxels.

    Attributes:
        white, grey: Tissue probabilities (X, Y, Z), 1 mm.
        origin_mm: MNI position of the first voxel (3,); of the first 2 mm voxel too.
        depth_mm: Distance to the surface of the brain (X', Y', Z'), negative outside.
        surface_mm: Where folds are looked up (3, X', Y', Z'): nearly the nearest surface point.
        folding: Where sulci are random (X', Y', Z'), 0 to 1: all but cerebellum and brainstem.
        hosts_mm: MNI positions (N, 3) in which a glioma may start.
        borders_mm: MNI positions (N, 3) between grey and white matter, where metastases sit.
    """

    white: np.ndarray
    grey: np.ndarray
    origin_mm: np.ndarray
    depth_mm: np.ndarray
    surface_mm: np.ndarray
    folding: np.ndarray
    hosts_mm: np.ndarray
    borders_mm: np.ndarray

    def sample(
        self, volume: np.ndarray, points_mm: Sequence[np.ndarray] | np.ndarray
    ) -> np.ndarray:
        """A map of this template at MNI positions (3, ...), linearly interpolated."""
        from scipy.ndimage import map_coordinates

        spacing_mm = 1 if volume.shape == self.white.shape else 2
        voxels = [
            (axis_mm - float(first_mm)) / spacing_mm
            for axis_mm, first_mm in zip(points_mm, self.origin_mm, strict=True)
        ]
        return map_coordinates(volume, voxels, order=1, mode="nearest", prefilter=False)


@cache
def _template() -> _Template:
    """Loaded and measured once per process."""
    from nilearn import datasets
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    maps = [
        load(resolution=1)
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_wm_template,
            datasets.load_mni152_gm_template,
        )
    ]
    t1, white, grey = (np.asarray(image.dataobj, dtype=np.float32) for image in maps)
    brain = t1 > 0.2 * t1.max()
    margin = 12  # voxels = mm
    box = tuple(
        slice(max(hit[0] - margin, 0), hit[-1] + margin)
        for hit in (np.flatnonzero(brain.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1)))
    )
    white, grey, brain = white[box], grey[box], brain[box]
    origin_mm = np.asarray(maps[0].affine)[:3, 3] + [axis.start for axis in box]

    coarse = brain[::2, ::2, ::2]
    inside_mm, nearest = distance_transform_edt(  # pyright: ignore[reportGeneralTypeIssues]
        coarse, sampling=2, return_indices=True
    )
    depth_mm = inside_mm - distance_transform_edt(~coarse, sampling=2)
    depth_mm = gaussian_filter(depth_mm.astype(np.float32), 0.7)
    voxels_mm = 2 * np.indices(coarse.shape, dtype=np.float32)
    surface_mm = np.stack([gaussian_filter(2 * n.astype(np.float32), 1.5) for n in nearest])
    surface_mm = 0.8 * surface_mm + 0.2 * voxels_mm  # sulci that lean a little

    x, y, z = voxels_mm + origin_mm[:, None, None, None]
    cerebellum = (z < -14) & (y < -34)
    brainstem = (abs(x) < 20) & (z < -8) & (y < -8) & (y > -50)
    below = gaussian_filter((cerebellum | brainstem).astype(np.float32), 2)
    host = (white[::2, ::2, ::2] > 0.5) & (depth_mm > 9) & (below < 0.05) & (abs(x) > 6)
    balance = white[::2, ::2, ::2] - grey[::2, ::2, ::2]
    tissue = white[::2, ::2, ::2] + grey[::2, ::2, ::2]
    border = (abs(balance) < 0.3) & (tissue > 0.8) & (depth_mm > 5) & ~brainstem
    hosts_mm, borders_mm = (
        np.stack([axis[place] for axis in (x, y, z)], axis=1) for place in (host, border)
    )
    return _Template(white, grey, origin_mm, depth_mm, surface_mm, 1 - below, hosts_mm, borders_mm)


class _Warp(NamedTuple):
    """Where in the template a position of the case lies: affine, plus a smooth deformation."""

    draw: _Draw
    matrix: np.ndarray  # (3, 3), case mm to MNI mm
    centre_mm: np.ndarray  # (3,), case
    target_mm: np.ndarray  # (3,), MNI: of the centre

    def deformation_mm(self, grid: _Grid) -> np.ndarray:
        """Displacement (3, X, Y, Z) in the template."""
        return np.stack(
            [
                3.5 * self.draw.field(f"deform far {axis}", 45.0, grid)
                + 1.0 * self.draw.field(f"deform near {axis}", 16.0, grid)
                for axis in "xyz"
            ]
        )

    def __call__(self, points_mm: np.ndarray) -> np.ndarray:
        """The affine part: MNI positions of case positions, both (3, ...)."""
        shift_mm = self.target_mm - self.matrix @ self.centre_mm
        moved = np.tensordot(self.matrix.astype(np.float32), points_mm, axes=1)
        return moved + shift_mm.astype(np.float32).reshape(3, *[1] * (points_mm.ndim - 1))

    def inverse(self, point_mm: np.ndarray) -> np.ndarray:
        """Case position of an MNI position (3,), but for the deformation."""
        return np.linalg.solve(self.matrix, point_mm - self.target_mm) + self.centre_mm


def _warp(draw: _Draw) -> _Warp:
    """A head of its own size and pose."""
    from scipy.spatial.transform import Rotation

    scale = draw.value("brain_scale") * draw.values("axis_scale")
    rotation = Rotation.from_euler("xyz", draw.values("rotation_deg"), degrees=True)
    centre_mm = np.divide(FIELD_OF_VIEW_MM, 2) + draw.values("shift_mm")
    template = _template()
    middle_mm = template.origin_mm + np.divide(template.white.shape, 2)
    return _Warp(draw, np.diag(1 / scale) @ rotation.as_matrix(), centre_mm, middle_mm)


@dataclass(frozen=True)
class _Focus:
    """One tumour of a case: an ellipsoid before noise makes it irregular."""

    centre_mm: np.ndarray
    radius_mm: float
    axes: np.ndarray  # (3, 3): rotation over relative half axes
    push_mm: float
    push_reach_mm: float

    def depth_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Distance to the border (X, Y, Z), positive inside, of points (3, X, Y, Z)."""
        offset_mm = points_mm - self.centre_mm.astype(np.float32).reshape(3, 1, 1, 1)
        offset = np.tensordot(self.axes.astype(np.float32), offset_mm, axes=1)
        return self.radius_mm - np.sqrt(np.square(offset).sum(axis=0))

    def displacement_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """By how much the tissue now at a position was pushed there (3, X, Y, Z)."""
        offset_mm = points_mm - self.centre_mm.astype(np.float32).reshape(3, 1, 1, 1)
        distance_mm = np.sqrt(np.square(offset_mm).sum(axis=0)) + 1e-3
        beyond_mm = np.maximum(distance_mm - self.radius_mm, 0)
        inside = np.minimum(distance_mm / self.radius_mm, 1)
        push_mm = self.push_mm * inside * np.exp(-beyond_mm / self.push_reach_mm)
        return offset_mm * (push_mm / distance_mm)


def _foci(draw: _Draw, warp: _Warp) -> list[_Focus]:
    """The tumours of a case; the second and third of a multifocal one lie near and are smaller."""
    from scipy.spatial.transform import Rotation

    stream = draw.stream("foci")
    hosts_mm = _template().hosts_mm
    count = int(stream.integers(2, 4)) if draw.happens("multifocal") else 1
    foci: list[_Focus] = []
    for number in range(count):
        if foci:
            distance_mm = np.linalg.norm(hosts_mm - warp(foci[0].centre_mm), axis=1)
            hosts_mm = hosts_mm[(distance_mm > 25) & (distance_mm < 60)]
        radius_mm = draw.value("radius_mm", str(number)) * (0.5 if foci else 1)
        axes = Rotation.random(rng=stream).as_matrix() / draw.values("elongation", str(number))
        foci.append(
            _Focus(
                centre_mm=warp.inverse(hosts_mm[stream.integers(len(hosts_mm))]),
                radius_mm=float(radius_mm),
                axes=axes,
                push_mm=min(draw.value("push_mm", str(number)), 0.4 * radius_mm),
                push_reach_mm=float(draw.value("push_reach_mm", str(number))),
            )
        )
    return foci


class _Survey(NamedTuple):
    """All of the geometry that is smooth, on coarse grids of the box around the brain.

    Attributes:
        coarse: 4 mm.
        mni_mm: Where in the template the tissue comes from (3, X, Y, Z), mass effect included.
        core_mm: Distance to the border of the ellipsoidal cores, positive inside.
        fine: 2 mm.
        depth_mm: Distance to the surface of the brain (X', Y', Z'), positive inside.
        fold_mm: Signed distance to the nearest sulcus (X', Y', Z'), about.
    """

    coarse: _Grid
    mni_mm: np.ndarray
    core_mm: np.ndarray
    fine: _Grid
    depth_mm: np.ndarray
    fold_mm: np.ndarray


def _survey(draw: _Draw, warp: _Warp, foci: list[_Focus]) -> _Survey:
    """The head with its tumours, displaced."""
    template = _template()
    whole = _Grid.whole(4.0)
    skull_mm = warp(whole.points_mm()) + warp.deformation_mm(whole)
    outline_mm = template.sample(template.depth_mm, skull_mm)
    coarse = whole.around(outline_mm > 0)
    fine = coarse.at(2.0)

    deformation_mm = warp.deformation_mm(coarse)
    points_mm = coarse.points_mm()
    core_mm = np.full(coarse.shape, -100, np.float32)
    for focus in foci:
        core_mm = np.maximum(core_mm, focus.depth_mm(points_mm))
    skull_mm = warp(points_mm) + deformation_mm
    for focus in foci:
        points_mm = points_mm - focus.displacement_mm(points_mm)
    mni_mm = warp(points_mm) + deformation_mm

    # The skull stays where it is: the depth knows of no displacement.
    depth_mm = template.sample(
        template.depth_mm, [_between(axis, coarse, fine) for axis in skull_mm]
    )
    fold_mm = template.sample(_folds(draw), [_between(axis, coarse, fine) for axis in mni_mm])
    return _Survey(coarse, mni_mm, core_mm, fine, depth_mm, fold_mm)


def _folds(draw: _Draw) -> np.ndarray:
    """Signed distance to the nearest random sulcus in mm, on the template's 2 mm voxels.

    The zero level of a smooth field is a labyrinth of sheets like the folds of the cortex; looked
    up near the closest surface point, it becomes sheets that stand upright on the surface.
    """
    from scipy.ndimage import map_coordinates

    template = _template()
    gyrus_mm = draw.value("gyrus_mm")
    shell = (template.depth_mm > -4) & (template.depth_mm < 24)
    points = template.surface_mm[:, shell] / np.float32(gyrus_mm) + 3
    controls = draw.stream("folds").standard_normal(
        [int(axis.max()) + 4 for axis in points], dtype=np.float32
    )
    fold_mm = np.full(shell.shape, 3, np.float32)
    field = map_coordinates(controls, points, order=2, prefilter=False) / 0.55**1.5
    fold_mm[shell] += template.folding[shell] * (0.8 * gyrus_mm * field - 3)
    return fold_mm


class _Tissue(NamedTuple):
    """Healthy anatomy on a grid, all (X, Y, Z): fractions that sum to 1, and where they lie."""

    white: np.ndarray
    grey: np.ndarray
    csf: np.ndarray
    depth_mm: np.ndarray
    mni_mm: list[np.ndarray]  # x, y, z


def _tissue(draw: _Draw, survey: _Survey, grid: _Grid) -> _Tissue:
    """Healthy tissue, displaced by the tumours.

    The template's maps are averages of 152 brains: right in the depth, smeared in the cortex. So
    near the surface a ribbon of grey matter along random sulci takes over.
    """
    template = _template()
    mni_mm = [_between(axis, survey.coarse, grid) for axis in survey.mni_mm]
    depth_mm = _between(survey.depth_mm, survey.fine, grid)
    sulcus_mm = np.abs(_between(survey.fold_mm, survey.fine, grid))
    near = depth_mm > -4  # what lies further out is never seen
    white, grey = np.zeros_like(depth_mm), np.zeros_like(depth_mm)
    near_mm = [axis[near] for axis in mni_mm]
    white[near] = template.sample(template.white, near_mm)
    grey[near] = template.sample(template.grey, near_mm)
    balance = white - grey  # 1 white, -1 grey
    csf = 1 - white - grey

    sulcus_depth_mm = 3 * draw.field("sulcus depth", 20.0, grid)
    sulcus_depth_mm += draw.value("sulcus_depth_mm")
    shallow = _sigmoid((sulcus_depth_mm - depth_mm) / 1.5)
    cortex_mm = draw.value("cortex_mm") + 0.4 * draw.field("cortex", 6.0, grid)
    ribbon = np.clip((np.minimum(sulcus_mm, depth_mm) - cortex_mm) / 2, -1, 1)
    width_mm = float(np.hypot(draw.value("sulcus_mm"), grid.spacing_mm / 3))
    fissure = shallow * np.exp(-np.square(sulcus_mm / width_mm))
    fissure += grey * np.exp(-np.square(mni_mm[0] / width_mm))  # between the hemispheres

    balance += 0.15 * draw.field("border", 3.0, grid)
    balance += shallow * (0.9 * ribbon - 0.45 * balance)
    liquid = 2.2 * np.maximum(csf + draw.value("atrophy"), 1.1 * fissure) - 1
    liquid += np.maximum(0.6 - depth_mm, 0)
    sharpness = 4.5 / max(grid.spacing_mm, 1)
    csf = _sigmoid(sharpness * (liquid - np.abs(balance)))
    white = (1 - csf) * _sigmoid(2 * sharpness * balance)
    return _Tissue(white, 1 - csf - white, csf, depth_mm, mni_mm)


def _ventricles(tissue: _Tissue) -> np.ndarray:
    """Fluid deep in the brain, softly (X, Y, Z); of 4 mm voxels."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(tissue.csf * (tissue.depth_mm > 22), 1.2)


# --- pathology -----------------------------------------------------------------------------------


class _Lesion(NamedTuple):
    """Soft fractions of the pathological classes on a grid, all (X, Y, Z), each 0 to 1.

    `core` includes what enhances, and `enhancing` is that part of it; oedema lies outside the core.
    """

    core: np.ndarray
    enhancing: np.ndarray
    oedema: np.ndarray


class _Pathology(Protocol):
    """What a case suffers from."""

    grade: str
    foci: list[_Focus]  # those that push tissue away

    def __init__(self, draw: _Draw, warp: _Warp) -> None: ...

    def spread(self, survey: _Survey, tissue: _Tissue) -> None:
        """Decide on the coarse grid, whose tissue this is, what depends on many voxels."""
        ...

    def lesion(self, survey: _Survey, tissue: _Tissue, grid: _Grid) -> _Lesion:
        """Where it is on a grid."""
        ...

    def labels(self, lesion: _Lesion) -> np.ndarray:
        """What a rater would draw (X, Y, Z), uint8."""
        ...


def _core_depth_mm(draw: _Draw, survey: _Survey, tissue: _Tissue, grid: _Grid) -> np.ndarray:
    """Distance to the border of the core (X, Y, Z), positive inside: a lobulated ellipsoid."""
    depth_mm = _between(survey.core_mm, survey.coarse, grid)
    depth_mm += draw.value("lobes_mm") * draw.field("lobes", 9.0, grid)
    depth_mm += 0.8 * draw.field("border of core", 4.0, grid)
    depth_mm -= 6 * tissue.csf * (tissue.depth_mm > 6)  # grows around ventricles, not into them
    return np.minimum(depth_mm, tissue.depth_mm)


def _reach(draw: _Draw, tissue: _Tissue, core: np.ndarray, grid: _Grid) -> np.ndarray:
    """How easily oedema gets from the core to a voxel (X, Y, Z): logarithm, 0 in the core.

    Repeated smoothing where each voxel passes on what its tissue lets through; the logarithm falls
    like a distance along white matter. Coarse: the fine borders come from the tissue itself.
    """
    from scipy.ndimage import gaussian_filter

    speed = np.exp(0.35 * draw.field("fingers", 9.0, grid))
    through = np.clip((tissue.white + 0.12 * tissue.grey) * speed, 0, 1)
    reached = core
    for _ in range(28):
        reached = np.maximum(core, through * gaussian_filter(reached, 1.0))
    return np.log(reached + 1e-6)


def _oedema_score(draw: _Draw, tissue: _Tissue, reach: np.ndarray, grid: _Grid) -> np.ndarray:
    """Where oedema goes first (X, Y, Z): high near the core and in white matter."""
    ease = np.log(tissue.white + 0.15 * tissue.grey + 0.01)
    score = reach + 0.8 * ease + 0.25 * draw.field("edge of oedema", 5.0, grid)
    return np.where(tissue.depth_mm < 0.5, -20, score)


class _Glioma:
    """One tumour, or two or three near each other: core, enhancing rim, oedema, mass effect."""

    def __init__(self, draw: _Draw, warp: _Warp) -> None:
        self.draw = draw
        self.grade = _grade(draw)
        self.foci = _foci(draw, warp)

    def spread(self, survey: _Survey, tissue: _Tissue) -> None:
        """Find how far the oedema reaches, and the score at which it has the volume drawn."""
        draw, grid = self.draw, survey.coarse
        core = _sigmoid(_core_depth_mm(draw, survey, tissue, grid) / 2)
        self.reach = _reach(draw, tissue, core, grid)
        outside = core < 0.5
        ratio = draw.value(f"oedema_ratio_{self.grade.lower()}")
        share = min(ratio * np.mean(~outside) / np.mean(outside), 0.3)
        score = _oedema_score(draw, tissue, self.reach, grid)[outside]
        self.oedema_threshold = float(np.quantile(score, 1 - share))

    def lesion(self, survey: _Survey, tissue: _Tissue, grid: _Grid) -> _Lesion:
        draw = self.draw
        depth_mm = _core_depth_mm(draw, survey, tissue, grid)
        core = _sigmoid(depth_mm / 0.6)
        enhancing = np.zeros_like(core)
        if draw.happens(f"enhancing_{self.grade.lower()}"):
            rim_mm = draw.value("rim_mm") * (1 + 0.6 * draw.field("rim", 9.0, grid))
            rim_mm -= 2.0 * (draw.field("gaps", 7.0, grid) > 1.2)
            enhancing = core * _sigmoid((rim_mm - depth_mm) / 0.5)
        reach = _between(self.reach, survey.coarse, grid)
        score = _oedema_score(draw, tissue, reach, grid) - self.oedema_threshold
        return _Lesion(core, enhancing, _sigmoid(score / 0.25) * (1 - core) * (1 - tissue.csf))

    def labels(self, lesion: _Lesion) -> np.ndarray:
        """BraTS labels."""
        labels = np.zeros(lesion.core.shape, np.uint8)
        labels[lesion.oedema > 0.5] = OEDEMA
        labels[lesion.core > 0.5] = NECROSIS
        labels[lesion.enhancing > 0.5] = ENHANCING
        return labels


class _Metastases:
    """None to a dozen balls at the grey-white border, the larger ones with a ring and oedema."""

    grade = ""
    foci: list[_Focus] = []  # noqa: RUF012  (too small to push anything away)

    def __init__(self, draw: _Draw, warp: _Warp) -> None:
        self.draw = draw
        stream = draw.stream("metastases")
        count = min(int(stream.gamma(METASTASES_SHAPE, METASTASES_SCALE)), MOST_METASTASES)
        radii_mm = METASTASIS_RADIUS_MM * np.exp(METASTASIS_LOG_SD * stream.standard_normal(count))
        self.radii_mm = np.clip(radii_mm, LEAST_METASTASIS_MM, LARGEST_METASTASIS_MM)
        places_mm = stream.choice(_template().borders_mm, count)
        self.centres_mm = [warp.inverse(place_mm) for place_mm in places_mm]
        self.has_oedema = (self.radii_mm > RING_FROM_MM) & (stream.random(count) < 0.7)

    def spread(self, survey: _Survey, tissue: _Tissue) -> None:
        """Nothing depends on far voxels."""

    def lesion(self, survey: _Survey, tissue: _Tissue, grid: _Grid) -> _Lesion:
        draw = self.draw
        points_mm = grid.points_mm()
        depth_mm = np.full(grid.shape, -100, np.float32)
        ring = np.zeros(grid.shape, bool)
        oedema_mm = np.full(grid.shape, -100, np.float32)
        for number, (centre_mm, radius_mm) in enumerate(
            zip(self.centres_mm, self.radii_mm, strict=True)
        ):
            offset_mm = points_mm - centre_mm.astype(np.float32).reshape(3, 1, 1, 1)
            inside_mm = float(radius_mm) - np.sqrt(np.square(offset_mm).sum(axis=0))
            if radius_mm > RING_FROM_MM:
                ring |= inside_mm > 0
            if self.has_oedema[number]:
                reach_mm = radius_mm * draw.value("metastasis_oedema", str(number))
                oedema_mm = np.maximum(oedema_mm, inside_mm + float(reach_mm))
            depth_mm = np.maximum(depth_mm, inside_mm)
        # Irregular in proportion: a small one stays nearly a ball, and none is cut in two.
        depth_mm += 0.35 * draw.field("border of metastases", 4.0, grid)
        core = _sigmoid(depth_mm / 0.3)
        rim_mm = draw.value("metastasis_rim_mm")
        enhancing = core * np.where(ring, _sigmoid((rim_mm - depth_mm) / 0.4), 1)
        oedema_mm += 2.0 * draw.field("fingers", 9.0, grid) - 6 * (1 - tissue.white)
        oedema = _sigmoid(oedema_mm) * (1 - core) * (1 - tissue.csf)
        return _Lesion(core, enhancing, oedema)

    def labels(self, lesion: _Lesion) -> np.ndarray:
        """1 is lesion."""
        return (lesion.core > 0.5).astype(np.uint8)


KINDS: dict[str, type[_Pathology]] = {"glioma": _Glioma, "metastases": _Metastases}


# --- image formation -----------------------------------------------------------------------------


def _bystanders(
    draw: _Draw, tissue: _Tissue, ventricles: np.ndarray, grid: _Grid
) -> dict[str, np.ndarray]:
    """Fractions (X, Y, Z) of what nobody labels: vessels and dura, choroid plexus, bright spots."""
    first, second = (draw.field(f"vessels {n}", 9.0, grid) for n in (1, 2))
    width = 0.13 + 0.04 * grid.spacing_mm
    vessel = np.exp(-(first**2 + second**2) / width**2)  # lines where two sheets cross
    vessel *= np.clip(1 - tissue.depth_mm / 25, 0, 1) * (1 - tissue.white)
    x_mm, _, z_mm = tissue.mni_mm
    sinus = _sigmoid(3 - abs(x_mm)) * _sigmoid(2.5 - tissue.depth_mm) * (z_mm > 5)
    patches = _sigmoid(3 * draw.field("dura", 14.0, grid) - 1)
    dura = _sigmoid((0.5 - tissue.depth_mm) / 0.5) * patches
    patches = _sigmoid(6 * draw.field("plexus", 5.0, grid) - 6)
    bright = np.clip(2.5 * ventricles, 0, 1)  # caps of the ventricles
    if draw.happens("hyperintensities"):
        bright += _sigmoid(8 * (draw.field("hyperintensities", 3.5, grid) - 2.6))
    return {
        "vessel": np.clip(vessel + sinus + 0.7 * dura, 0, 1),
        "plexus": tissue.csf * (tissue.depth_mm > 20) * patches,
        "bright": bright * tissue.white,
    }


def _maps(
    draw: _Draw, tissue: _Tissue, lesion: _Lesion, bystanders: dict[str, np.ndarray], grid: _Grid
) -> dict[str, np.ndarray]:
    """What an image is a weighted sum of: every class's fraction, and its textures (X, Y, Z)."""
    plexus, vessel = bystanders["plexus"], bystanders["vessel"]
    outside = 1 - lesion.core
    healthy = (outside - lesion.oedema) * (1 - vessel) * (1 - plexus)
    core = lesion.core - lesion.enhancing
    coarse = draw.field("coarse texture", 14.0, grid)
    fine = draw.field("fine texture", 4.0, grid)
    return {
        "white": healthy * tissue.white,
        "gm": healthy * tissue.grey,
        "csf": healthy * tissue.csf,
        "bright": healthy * bystanders["bright"],
        "oedema": lesion.oedema,
        "core": core,
        "enhancing": lesion.enhancing,
        "vessel": (outside - lesion.oedema) * vessel,
        "plexus": (outside - lesion.oedema) * (1 - vessel) * plexus,
        "healthy, coarse": healthy * coarse,
        "healthy, fine": healthy * fine,
        "oedema, coarse": lesion.oedema * coarse,
        "oedema, fine": lesion.oedema * fine,
        "core, coarse": lesion.core * coarse,
        "core, fine": lesion.core * fine,
    }


def _weights(draw: _Draw, modality: str) -> dict[str, float]:
    """Intensity of every map of `_maps`, white matter 1."""
    stream = draw.stream(f"contrast {modality}")
    column = MODALITIES.index(modality)
    weights = {name: float(_within(stream, ranges[column])) for name, ranges in CONTRAST.items()}
    cyst = weights.pop("cyst")
    if draw.happens("cyst"):
        weights["core"] = cyst
    weights["white"] = 1.0
    for name, limits in TEXTURE.items():
        weights[name] = float(stream.choice([-1, 1]) * _within(stream, limits))
    return weights


def _mixture(draw: _Draw, modality: str, maps: dict[str, np.ndarray], grid: _Grid) -> np.ndarray:
    """Image without noise or blur (X, Y, Z): white matter is 1, times the bias field."""
    weights = _weights(draw, modality)
    image = np.zeros(grid.shape, np.float32)
    for name, volume in maps.items():
        image += weights[name] * volume
    bias = draw.value("bias", modality) * draw.field(f"bias {modality}", 70.0, grid)
    return image * np.exp(bias)


def _acquire(draw: _Draw, modality: str, image: np.ndarray, grid: _Grid) -> np.ndarray:
    """What a scanner and the usual resampling to the case's grid make of an ideal image."""
    from scipy.ndimage import correlate1d

    stream = draw.stream(f"acquire {modality}")
    shift_mm = draw.value("misregistration_mm", modality) * stream.uniform(-1, 1, size=3)
    thick = stream.random() < THICK_SLICES[modality]
    slice_axis = int(stream.choice(3, p=[0.15, 0.15, 0.7]))
    slice_mm = draw.value("slice_mm", modality)
    for axis in range(3):
        sigma_mm = draw.value("blur_mm", modality)
        if thick and axis == slice_axis:
            sigma_mm = slice_mm / 2.355
        kernel = _shifted_gaussian(sigma_mm / grid.spacing_mm, shift_mm[axis] / grid.spacing_mm)
        image = correlate1d(image, kernel, axis=axis, mode="nearest")
    if thick and slice_mm > 1.5 * grid.spacing_mm:
        image = _stepped(image, slice_axis, slice_mm / grid.spacing_mm)
    noise = draw.stream(f"noise {modality}").standard_normal(image.shape, dtype=np.float32)
    noise *= draw.value("noise", modality)
    noise += image
    return noise


def _shifted_gaussian(sigma: float, shift: float) -> np.ndarray:
    """Weights of a kernel that blurs and moves in one go; both in voxels."""
    sigma = float(np.hypot(sigma, 0.35))  # a narrower one could not stand between two voxels
    reach = int(np.ceil(2.5 * sigma + abs(shift)))
    weights = np.exp(-np.square((np.arange(-reach, reach + 1) - shift) / sigma) / 2)
    return weights / weights.sum()


def _stepped(image: np.ndarray, axis: int, step: float) -> np.ndarray:
    """Only every `step`-th slice was measured; those between are interpolated."""
    position = np.arange(image.shape[axis], dtype=np.float32) / step
    below = np.floor(position)
    share = np.reshape(position - below, [-1 if other == axis else 1 for other in range(3)])
    last = image.shape[axis] - 1

    def slices(number: np.ndarray) -> np.ndarray:
        return np.take(image, np.minimum(np.round(number * step), last).astype(int), axis=axis)

    return (1 - share) * slices(below) + share * slices(below + 1)


def _brain_mask(draw: _Draw, tissue: _Tissue, grid: _Grid) -> np.ndarray:
    """What skull stripping calls brain (X, Y, Z): a rind too much here, a bite too much there."""
    margin_mm = draw.value("brain_margin_mm") + 0.7 * draw.field("rind", 12.0, grid)
    bites_mm = 8 * np.maximum(draw.field("bites", 8.0, grid) - 2.6, 0)
    mask = tissue.depth_mm > bites_mm - np.minimum(margin_mm, 3)
    if draw.happens("cut_field_of_view"):
        z_mm = grid.axes_mm()[2]
        cut_mm = draw.stream("cut").uniform(5, 25)
        mask &= z_mm > z_mm[0] + cut_mm
    return mask


def _quantised(draw: _Draw, modality: str, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """int16 in a scale of the scanner's own, 0 outside the mask; negative only by ringing."""
    from scipy.ndimage import gaussian_filter

    image = np.maximum(image, 0.01)
    image *= mask
    if draw.happens("ringing"):
        blurred = gaussian_filter(image, 1.0, truncate=2.5)
        image += draw.value("ringing", modality) * (image - blurred)
    scale = 10 ** draw.value("white_matter_log10", modality)
    if draw.happens("tenfold_modality") and modality == draw.stream("tenfold").choice(MODALITIES):
        scale *= 10
    volume = np.zeros(mask.shape, np.int16)
    volume[mask] = np.clip(np.round(image[mask] * scale), -32768, 32767)
    return volume


def _grade(draw: _Draw) -> str:
    return "HGG" if draw.happens("hgg") else "LGG"


def _stored(volume: np.ndarray, grid: _Grid, ras: bool) -> np.ndarray:
    """A boxed RAS volume in the whole field of view, in the voxel order of the file."""
    whole = np.zeros(_Grid.whole(grid.spacing_mm).shape, volume.dtype)
    whole[grid.slices] = volume
    return np.ascontiguousarray(whole if ras else whole[::-1, ::-1])


def _affine(spacing_mm: float, ras: bool) -> np.ndarray:
    """Of a file (4, 4), voxel indices to mm: the middle of the field of view is the origin."""
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = spacing_mm / 2 - np.divide(FIELD_OF_VIEW_MM, 2)
    if not ras:  # index i of the file is index last - i in RAS
        last = np.array(_Grid.whole(spacing_mm).shape[:2]) - 1
        affine[:2, 3] += last * spacing_mm
        affine[[0, 1], [0, 1]] = -spacing_mm
    return affine


def make_phantom(
    seed: int,
    index: int,
    spacing_mm: float,
    kind: str = "glioma",
    modalities: Sequence[str] = MODALITIES,
) -> Phantom:
    """Phantom number `index` of the stream `seed`.

    Args:
        seed: Of the data set.
        index: Of the case; every pair of seed and index is a patient of its own.
        spacing_mm: Edge of a voxel; 1 gives the grid of BraTS, 240 x 240 x 155.
        kind: "glioma" or "metastases".
        modalities: Which to make; no choice changes the others.
    """
    from threadpoolctl import threadpool_limits

    # Sums over several threads round differently; and there is a process per core already.
    with threadpool_limits(1):
        return _phantom(_Draw(seed, index), spacing_mm, KINDS[kind], modalities)


def _phantom(
    draw: _Draw, spacing_mm: float, kind: type[_Pathology], modalities: Sequence[str]
) -> Phantom:
    """What `make_phantom` makes, from the random numbers of one case."""
    warp = _warp(draw)
    pathology = kind(draw, warp)
    survey = _survey(draw, warp, pathology.foci)
    tissue = _tissue(draw, survey, survey.coarse)
    pathology.spread(survey, tissue)
    ventricles = _ventricles(tissue)

    grid = survey.coarse.at(spacing_mm)
    ideal = {modality: np.empty(grid.shape, np.float32) for modality in modalities}
    labels, mask = np.empty(grid.shape, np.uint8), np.empty(grid.shape, bool)
    for rows, slab in grid.slabs():
        tissue = _tissue(draw, survey, slab)
        lesion = pathology.lesion(survey, tissue, slab)
        mask[rows] = _brain_mask(draw, tissue, slab)
        labels[rows] = pathology.labels(lesion) * mask[rows]
        near_ventricles = _between(ventricles, survey.coarse, slab)
        maps = _maps(draw, tissue, lesion, _bystanders(draw, tissue, near_ventricles, slab), slab)
        for modality, image in ideal.items():
            image[rows] = _mixture(draw, modality, maps, slab)

    ras = draw.happens("ras")
    images = {}
    for modality in modalities:
        image = _acquire(draw, modality, ideal.pop(modality), grid)
        images[modality] = _stored(_quantised(draw, modality, image, mask), grid, ras)
    return Phantom(images, _stored(labels, grid, ras), _affine(spacing_mm, ras), pathology.grade)


# --- the data set on disk ------------------------------------------------------------------------


class _Settings(NamedTuple):
    """What all phantoms of a folder have in common."""

    seed: int
    spacing_mm: float
    kind: str
    modalities: Sequence[str]


def write_phantoms(
    root: Path,
    count: int,
    *,
    spacing_mm: float,
    seed: int,
    kind: str = "glioma",
    modalities: Sequence[str] = MODALITIES,
    workers: int | None = None,
) -> None:
    """Write the first `count` phantoms of a seed.

    Gliomas have the layout of BraTS 2019,
    `root/{HGG,LGG}/phantom_0000/phantom_0000_{t1,t1ce,t2,flair,seg}.nii.gz`; metastases have no
    folder of a grade. Cases that are there stay as they are, so a run that was stopped goes on,
    and a larger count only adds.

    Args:
        root: Folder of the data set; made where missing.
        count: How many cases the data set has afterwards, at least.
        spacing_mm: Edge of a voxel.
        seed: Of all cases.
        kind: "glioma" or "metastases".
        modalities: Which to write.
        workers: Processes; as many as there are cores by default.

    Raises:
        InputError: The folder holds phantoms of other settings, or these are none.
    """
    from rich.progress import track

    if not 0.5 <= spacing_mm <= 8:
        raise InputError(f"spacing_mm: 0.5 to 8 expected, {spacing_mm:g} found")
    if count < 0:
        raise InputError(f"count: 0 or more cases expected, {count} found")
    if kind not in KINDS:
        raise InputError(f"kind: expected one of {', '.join(KINDS)}, found {kind}")
    check_choice("modalities", modalities, MODALITIES)
    root = Path(root)
    settings = _Settings(seed, float(spacing_mm), kind, sorted(modalities))
    _claim(root, {"version": VERSION, **settings._asdict()})
    jobs = [(root, settings, index) for index in range(count)]
    jobs = [job for job in jobs if not _folder(*job).exists()]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        for job in track(jobs, "phantoms", disable=not jobs):
            _write_case(*job)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = [pool.submit(_write_case, *job) for job in jobs]
        for future in track(as_completed(futures), "phantoms", total=len(futures)):
            future.result()


class Phantoms(BraTS):
    """Phantoms as a BraTS data set that makes itself when it is first used.

    Args:
        root: Folder of the data set.
        count: How many cases it has; the first of those in the folder, if there are more.
        spacing_mm: Edge of a voxel.
        seed: Of all cases.
        modalities: As of `BraTS`.
        regions: As of `BraTS`.
    """

    def __init__(
        self,
        root: str | Path,
        count: int,
        spacing_mm: float,
        seed: int = 0,
        modalities: Sequence[str] = MODALITIES,
        regions: Sequence[str] = ("WT", "TC", "ET"),
    ) -> None:
        super().__init__(root, modalities, regions)
        self.count = count
        self.spacing_mm = spacing_mm
        self.seed = seed

    def prepare(self) -> None:
        write_phantoms(self.root, self.count, spacing_mm=self.spacing_mm, seed=self.seed)

    def cases(self) -> list[Case]:
        return super().cases()[: self.count]


class MetastasisPhantoms(Metastases):
    """Phantoms with metastases, as a data set that makes itself when it is first used.

    Args:
        root: Folder of the data set.
        count: How many cases it has; the first of those in the folder, if there are more.
        spacing_mm: Edge of a voxel.
        seed: Of all cases.
        modalities: As of `Metastases`; those that are made.
        regions: As of `Metastases`.
    """

    def __init__(
        self,
        root: str | Path,
        count: int,
        spacing_mm: float,
        seed: int = 0,
        modalities: Sequence[str] = ("t1ce",),
        regions: Sequence[str] = ("lesion",),
    ) -> None:
        super().__init__(root, modalities, regions)
        self.count = count
        self.spacing_mm = spacing_mm
        self.seed = seed

    def prepare(self) -> None:
        write_phantoms(
            self.root,
            self.count,
            spacing_mm=self.spacing_mm,
            seed=self.seed,
            kind="metastases",
            modalities=self.modalities,
        )

    def cases(self) -> list[Case]:
        return super().cases()[: self.count]


def _claim(root: Path, settings: dict[str, object]) -> None:
    """Record the settings of a data set, or see that they are the recorded ones."""
    from filelock import FileLock

    root.mkdir(parents=True, exist_ok=True)
    path = root / "phantoms.json"
    with FileLock(root / ".phantoms.lock"):
        if not path.exists():
            path.write_text(json.dumps(settings, indent=2) + "\n")
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON ({error}); remove the folder") from None
    if found != settings:
        raise InputError(f"{path}: phantoms of {found} found, {settings} asked for")


def _folder(root: Path, settings: _Settings, index: int) -> Path:
    draw = _Draw(settings.seed, index)
    grade = _grade(draw) if settings.kind == "glioma" else ""
    return root / grade / f"phantom_{index:04d}"


def _write_case(root: Path, settings: _Settings, index: int) -> None:
    """Write one case under a hidden name, then rename its folder: it is whole or not there."""
    import nibabel as nib

    folder = _folder(root, settings, index)
    seed, spacing_mm, kind, modalities = settings
    phantom = make_phantom(seed, index, spacing_mm, kind, modalities)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}_", dir=root))
    try:
        for name, volume in {**phantom.images, "seg": phantom.labels}.items():
            image = nib.Nifti1Image(volume, phantom.affine)
            image.header.set_xyzt_units("mm")
            image.set_qform(phantom.affine, 1)
            nib.save(image, partial / f"{folder.name}_{name}.nii.gz")
        partial.chmod(0o755)  # mkdtemp's is for the owner only
        folder.parent.mkdir(exist_ok=True)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.phantom",
        description="Write synthetic tumours: gliomas as a BraTS data set, or metastases.",
    )
    parser.add_argument("root", type=Path, help="folder of the data set")
    parser.add_argument("--cases", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--spacing-mm", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--kind", choices=KINDS, default="glioma", help="default: %(default)s")
    parser.add_argument(
        "--modalities", nargs="+", default=MODALITIES, choices=MODALITIES, help="default: all"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    given = parser.parse_args(arguments)
    try:
        write_phantoms(
            given.root,
            given.cases,
            spacing_mm=given.spacing_mm,
            seed=given.seed,
            kind=given.kind,
            modalities=given.modalities,
            workers=given.workers,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
