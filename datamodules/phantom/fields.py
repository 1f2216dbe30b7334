"""Voxel grids, the random numbers of one case, and smooth random fields on the grids.

Random fields are splines over control values whose spacing is in millimetres and does not depend on
the voxel size. The same case therefore looks the same at 1 mm and at 2 mm.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from datamodules.phantom.ranges import CLASSIC, FIELD_OF_VIEW_MM, Laws
from grids import bounding_box

SPLINE_SD = 0.479**1.5  # standard deviation of a 3-D cubic B-spline over white noise


class Grid(NamedTuple):
    """A box of voxels inside the field of view, in RAS order.

    Attributes:
        spacing_mm: Edge of a voxel.
        start: Index of the first voxel along each axis (3,), in the grid of the field of view.
        stop: Index after the last voxel along each axis (3,).
    """

    spacing_mm: float
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, spacing_mm: float) -> "Grid":
        """Return the grid of the whole field of view."""
        shape = tuple(int(np.ceil(extent_mm / spacing_mm)) for extent_mm in FIELD_OF_VIEW_MM)
        return cls(spacing_mm, (0, 0, 0), shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of voxels along each axis (3,)."""
        return tuple(np.subtract(self.stop, self.start))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the box lies in a volume of the whole field of view."""
        return tuple(map(slice, self.start, self.stop))

    def axes_mm(self) -> list[np.ndarray]:
        """Return the positions of the voxel centres along each axis."""
        return [
            ((np.arange(start, stop) + 0.5) * self.spacing_mm).astype(np.float32)
            for start, stop in zip(self.start, self.stop, strict=True)
        ]

    def points_mm(self) -> np.ndarray:
        """Return the positions of the voxel centres (3, X, Y, Z)."""
        return np.stack(np.meshgrid(*self.axes_mm(), indexing="ij"))

    def slabs(self, thickness: int = 12) -> Iterator[tuple[slice, "Grid"]]:
        """Split the grid along X into slabs that fit a processor's cache.

        Yields:
            Where the slab lies along X in a volume on this grid, and the grid of the slab.
        """
        for first in range(self.start[0], self.stop[0], thickness):
            last = min(first + thickness, self.stop[0])
            rows = slice(first - self.start[0], last - self.start[0])
            yield rows, Grid(self.spacing_mm, (first, *self.start[1:]), (last, *self.stop[1:]))

    def resized(self, spacing_mm: float) -> "Grid":
        """Cover the same box with voxels of another size; it grows where they do not fit."""
        factor = self.spacing_mm / spacing_mm
        whole = Grid.whole(spacing_mm)
        start = tuple(int(np.floor(index * factor)) for index in self.start)
        stop = tuple(
            min(int(np.ceil(index * factor)), last)
            for index, last in zip(self.stop, whole.stop, strict=True)
        )
        return Grid(spacing_mm, start, stop)

    def around(self, mask: np.ndarray) -> "Grid":
        """Return the part of this box that holds a mask (X, Y, Z) and one voxel on each side."""
        box = bounding_box(mask)
        start = tuple(
            first + max(side.start - 1, 0) for side, first in zip(box, self.start, strict=True)
        )
        stop = tuple(
            min(first + side.stop + 1, last)
            for side, first, last in zip(box, self.start, self.stop, strict=True)
        )
        return Grid(self.spacing_mm, start, stop)


class RandomStreams:
    """The random numbers of one case, with an independent stream for every step.

    A step that draws more numbers, or in another order, leaves all other steps unchanged.

    Args:
        seed: Seed of the data set.
        index: Index of the case in the data set.
        laws: What is drawn from.
    """

    def __init__(self, seed: int, index: int, laws: Laws = CLASSIC) -> None:
        self.seed, self.index, self.laws = seed, index, laws
        self._controls: dict[str, np.ndarray] = {}

    def generator(self, step: str) -> np.random.Generator:
        """Return a new generator at the beginning of a step's stream."""
        return np.random.default_rng([self.seed, self.index, zlib.crc32(step.encode())])

    def draw(self, name: str, item: str = "") -> float:
        """Draw a value from the range of a name; each `item`, such as a modality, has its own."""
        return float(draw_triangular(self.generator(f"{name} {item}"), self.laws.ranges[name]))

    def draw_per_axis(self, name: str, item: str = "") -> np.ndarray:
        """Draw three values (3,) from the range of a name, one for each axis."""
        return draw_triangular(self.generator(f"{name} {item}"), self.laws.ranges[name], size=3)

    def has(self, name: str) -> bool:
        """Decide whether the case has a property, with the probability of its name."""
        return self.generator(name).random() < self.laws.chances[name]

    def fractal_field(self, step: str, length_mm: float, grid: Grid) -> np.ndarray:
        """Draw a random field (X, Y, Z) of mean 0 and variance 1, smooth and fine at once.

        Three smooth fields are added up, each with half the length and half the amplitude of the
        one before.
        """
        field = sum(
            self.smooth_field(f"{step} {octave}", length_mm / 2**octave, grid) / 2**octave
            for octave in range(3)
        )
        return np.asarray(field) / np.sqrt(1 + 1 / 4 + 1 / 16)

    def smooth_field(self, step: str, length_mm: float, grid: Grid) -> np.ndarray:
        """Draw a smooth random field (X, Y, Z) of mean 0 and variance 1.

        Args:
            step: Name of the field; the same name gives the same field on every grid.
            length_mm: Distance between the control values; larger is smoother.
            grid: Where to evaluate the field.
        """
        if step not in self._controls:
            shape = [int(extent_mm / length_mm) + 6 for extent_mm in FIELD_OF_VIEW_MM]
            self._controls[step] = self.generator(step).standard_normal(shape, dtype=np.float32)
        first_mm = (-2 * length_mm,) * 3
        return (
            evaluate_spline(self._controls[step], length_mm, first_mm, grid.axes_mm()) / SPLINE_SD
        )


def draw_triangular(
    generator: np.random.Generator, limits: tuple[float, float], size: int | None = None
) -> np.ndarray:
    """Draw from a symmetric triangular distribution: (size,), or () without a size.

    The ranges hold the extremes of real cases, but a patient is extreme in few things at once. So
    both ends of a range occur, but seldom, and seldom together with those of other ranges.
    """
    low, high = limits
    if low == high:
        return np.full(size or (), low)
    return np.asarray(generator.triangular(low, (low + high) / 2, high, size))


def evaluate_spline(
    controls: np.ndarray,
    length_mm: float,
    first_mm: Sequence[float],
    axes_mm: Sequence[np.ndarray],
) -> np.ndarray:
    """Evaluate a cubic B-spline on a grid (X, Y, Z).

    Args:
        controls: Control values (A, B, C). The spline smooths them and does not pass through them.
        length_mm: Distance between neighbouring controls.
        first_mm: Position of the first control (3,).
        axes_mm: Positions of the grid along each axis: (X,), (Y,) and (Z,).
    """
    values = controls
    for axis_mm, start_mm, count in zip(axes_mm, first_mm, controls.shape, strict=True):
        position = (axis_mm[:, None] - start_mm) / length_mm
        distance = np.abs(position - np.arange(count, dtype=np.float32))
        wide, narrow = np.maximum(2 - distance, 0), np.maximum(1 - distance, 0)
        weights = (wide * wide * wide - 4 * narrow * narrow * narrow) / 6
        # Each product removes the first axis and appends the new one: three restore the order.
        values = np.tensordot(values, weights.astype(np.float32), axes=(0, 1))
    return values


def interpolate(volume: np.ndarray, coarse: Grid, grid: Grid) -> np.ndarray:
    """Interpolate a smooth volume (X', Y', Z') of a coarse grid on a fine one (X, Y, Z)."""
    pad = 4
    controls = np.pad(volume, pad, mode="edge").astype(np.float32)
    first_mm = [(start + 0.5 - pad) * coarse.spacing_mm for start in coarse.start]
    return evaluate_spline(controls, coarse.spacing_mm, first_mm, grid.axes_mm())


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)): soft borders have 0.5 where `x` is 0."""
    from scipy.special import expit

    return expit(x)
