"""The shape of one head: size, pose and a smooth, invertible deformation of the average brain.

What makes one head differ from another is summed up as a stationary velocity field, which says
where the tissue of the average brain flows to. Following the flow for one unit of time is
invertible, and no tissue folds or tears (Arsigny et al. 2006, "A Log-Euclidean Framework for
Statistics on Diffeomorphisms").
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from datamodules.phantom.atlas import HEAD, VENTRICLES, Atlas, Lattice, load_atlas
from datamodules.phantom.fields import SPLINE_SD, RandomStreams, evaluate_spline
from datamodules.phantom.ranges import (
    FIELD_OF_VIEW_MM,
    LEAST_VENTRICLES_ML,
    LOBE_SIZE_MM,
    LOBES_MM,
    MIDDLE_AGE_YEARS,
    MOST_VENTRICLES_ML,
    SHAPE_SD_MM,
    VENTRICLES_LOG_PER_YEAR,
    VENTRICLES_LOG_SD,
    VENTRICLES_ML,
)

SQUARINGS = 4  # the first step covers 1/16 of the time, in which tissue moves about 1 mm at most
STEPS = 8  # of the integration at single points


class Deformation(NamedTuple):
    """A smooth, invertible deformation: tissue follows a stationary flow for one unit of time.

    Attributes:
        lattice: Where the flow and the displacement are tabulated.
        flow_mm: Velocity of the tissue from the atlas to the case (3, A, B, C).
        back_mm: Displacement (3, A, B, C) from each position to where its tissue comes from.
    """

    lattice: Lattice
    flow_mm: np.ndarray
    back_mm: np.ndarray

    @classmethod
    def from_flow(cls, lattice: Lattice, flow_mm: np.ndarray) -> "Deformation":
        """Integrate a flow (3, A, B, C) on a lattice by scaling and squaring."""
        points_mm = lattice.points_mm()
        back_mm = -flow_mm / np.float32(2**SQUARINGS)
        for _ in range(SQUARINGS):  # twice the time each: the displacement, and that from its end
            back_mm = back_mm + lattice.sample(back_mm, points_mm + back_mm)
        return cls(lattice, flow_mm, back_mm)

    def to_atlas(self, points_mm: np.ndarray) -> np.ndarray:
        """Return where the tissue at positions (3, ...) comes from."""
        return points_mm + self.lattice.sample(self.back_mm, points_mm)

    def from_atlas(self, points_mm: np.ndarray) -> np.ndarray:
        """Return where tissue from positions (3, N) ends: the inverse of `to_atlas`."""
        for _ in range(STEPS):
            half_step_mm = self.lattice.sample(self.flow_mm, points_mm) / (2 * STEPS)
            step_mm = self.lattice.sample(self.flow_mm, points_mm + half_step_mm) / STEPS
            points_mm = points_mm + step_mm
        return points_mm


class Warp(NamedTuple):
    """Map from the case to the atlas: an affine map and two deformations.

    Attributes:
        matrix: Linear part of the affine map (3, 3), case mm to MNI mm.
        centre_mm: Centre of the head in the case (3,).
        target_mm: MNI position of that centre (3,).
        head: Deformation of the whole head.
        ventricles: Growth of the ventricles, which the outline of the brain is not affected by. It
            is a deformation of its own, because it must act where the ventricles of the atlas are.
    """

    matrix: np.ndarray
    centre_mm: np.ndarray
    target_mm: np.ndarray
    head: Deformation
    ventricles: Deformation

    def outline_to_mni_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Map positions of the case (3, ...) to MNI positions without growth of the ventricles."""
        shift_mm = self.target_mm - self.matrix @ self.centre_mm
        moved_mm = np.tensordot(self.matrix.astype(np.float32), points_mm, axes=1)
        moved_mm += shift_mm.astype(np.float32).reshape(3, *[1] * (points_mm.ndim - 1))
        return self.head.to_atlas(moved_mm)

    def to_mni_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Map positions of the case (3, ...) to MNI positions (3, ...)."""
        return self.ventricles.to_atlas(self.outline_to_mni_mm(points_mm))

    def from_mni_mm(self, point_mm: np.ndarray) -> np.ndarray:
        """Map one MNI position (3,) to the case: the inverse of `to_mni_mm`."""
        moved_mm = self.head.from_atlas(self.ventricles.from_atlas(point_mm[:, None]))[:, 0]
        return np.linalg.solve(self.matrix, moved_mm - self.target_mm) + self.centre_mm


def years_from_middle_age(random: RandomStreams) -> float:
    """Draw the age of the patient, relative to `MIDDLE_AGE_YEARS`; each case has one age."""
    return random.draw("age_years") - MIDDLE_AGE_YEARS


def draw_warp(random: RandomStreams) -> Warp:
    """Draw the size, the pose and the shape of the head."""
    from scipy.spatial.transform import Rotation

    scale = random.draw("brain_scale") * random.draw_per_axis("axis_scale")
    rotation = Rotation.from_euler("xyz", random.draw_per_axis("rotation_deg"), degrees=True)
    centre_mm = np.divide(FIELD_OF_VIEW_MM, 2) + random.draw_per_axis("shift_mm")
    atlas = load_atlas()
    middle_mm = atlas.origin_mm + np.divide(atlas.white.shape, 2)
    matrix = np.diag(1 / scale) @ rotation.as_matrix()
    head_flow_mm = _draw_head_flow(random, atlas)
    head = Deformation.from_flow(HEAD, head_flow_mm)
    # By the flow of the head alone, the ventricles grow as its divergence says.
    weights = atlas.sample(atlas.ventricles, HEAD.points_mm())
    divergence = sum(
        np.gradient(flow_mm, HEAD.spacing_mm, axis=axis)
        for axis, flow_mm in enumerate(head_flow_mm)
    )
    growth = np.exp(np.average(divergence, weights=weights))
    ventricle_flow_mm = _draw_ventricle_flow(random, atlas, float(scale.prod() * growth))
    ventricles = Deformation.from_flow(VENTRICLES, ventricle_flow_mm)
    return Warp(matrix, centre_mm, middle_mm, head, ventricles)


def _draw_head_flow(random: RandomStreams, atlas: Atlas) -> np.ndarray:
    """Draw where the tissue of the atlas flows to (3, A, B, C), on `HEAD`."""
    flow_mm = np.zeros((3, *HEAD.shape), np.float32)
    for length_mm, (surface_mm, depth_mm) in SHAPE_SD_MM.items():
        deviation_mm = surface_mm + (depth_mm - surface_mm) * atlas.inner
        flow_mm += deviation_mm * _draw_nearly_symmetric(random, length_mm)
    for name in LOBES_MM:
        _add_lobe(flow_mm, random, name)
    axes_mm = np.ix_(*HEAD.axes_mm())
    flow_mm[1] += random.draw("petalia_mm") / 2 * np.tanh(axes_mm[0] / 20)

    # Cerebellum and brainstem grow and move as one, from the middle of the tentorium.
    growth, shift_mm = random.draw("cerebellum_growth"), random.draw_per_axis("cerebellum_mm")
    shift_mm[0] /= 3  # it stays near the middle
    for axis, middle_mm in enumerate((0.0, -50.0, -15.0)):
        offset_mm = axes_mm[axis] - middle_mm
        flow_mm[axis] += atlas.below * (growth * offset_mm + shift_mm[axis]).astype(np.float32)
    return flow_mm


def _draw_ventricle_flow(random: RandomStreams, atlas: Atlas, volume_scale: float) -> np.ndarray:
    """Draw how the ventricles grow (3, A, B, C), on `VENTRICLES`.

    Args:
        random: Random numbers of the case.
        atlas: The average brain.
        volume_scale: Volume of the ventricles relative to the atlas if they did not grow.
    """
    x, y, _ = np.ix_(*VENTRICLES.axes_mm())
    growth_mm = _draw_ventricle_growth_mm(random, volume_scale)
    growth_mm = growth_mm + random.draw("ventricle_asymmetry_mm") * np.tanh(x / 8)
    growth_mm = growth_mm + random.draw("ventricle_horns_mm") * np.tanh((y + 15) / 20)
    return atlas.ventricle_flow * growth_mm.astype(np.float32)


def _draw_nearly_symmetric(random: RandomStreams, length_mm: float) -> np.ndarray:
    """Draw a smooth random vector field (3, A, B, C) of variance 1 on `HEAD`.

    Most of it is the same on the left and on the right. The rest has opposite signs there.

    Args:
        random: Random numbers of the case.
        length_mm: Distance between the control values; larger is smoother.
    """
    axes_mm = HEAD.axes_mm()
    middles_mm = [float(axis[0] + axis[-1]) / 2 for axis in axes_mm]
    reach = [int(np.ceil(float(axis[-1] - axis[0]) / 2 / length_mm)) + 2 for axis in axes_mm]
    shape = (3, *(2 * count + 1 for count in reach))
    controls = random.generator(f"shape {length_mm:g}").standard_normal(shape, dtype=np.float32)
    mirrored = controls[:, ::-1] * np.array([-1, 1, 1], np.float32).reshape(3, 1, 1, 1)
    share = random.draw("asymmetry")
    even, odd = (controls + mirrored) / np.sqrt(2), (controls - mirrored) / np.sqrt(2)
    controls = (np.sqrt(1 - share**2) * even + share * odd).astype(np.float32)
    first_mm = [middle - count * length_mm for middle, count in zip(middles_mm, reach, strict=True)]
    return np.stack(
        [
            evaluate_spline(axis, length_mm, first_mm, axes_mm) / np.float32(SPLINE_SD)
            for axis in controls
        ]
    )


def _add_lobe(flow_mm: np.ndarray, random: RandomStreams, name: str) -> None:
    """Let a lobe grow or shrink, on the left a little more or less than on the right."""
    growth, difference = random.draw("lobe_growth", name), random.draw("lobe_asymmetry", name)
    for side in (-1, 1):
        axes_mm = HEAD.axes_mm()
        centre_mm = LOBES_MM[name] * np.array([side, 1, 1])
        offsets_mm = [axis - middle for axis, middle in zip(axes_mm, centre_mm, strict=True)]
        x, y, z = (np.exp(-np.square(offset / LOBE_SIZE_MM) / 2) for offset in offsets_mm)
        weight = (growth + side * difference / 2) * np.einsum("x,y,z->xyz", x, y, z)
        for axis, offset_mm in enumerate(np.ix_(*offsets_mm)):
            flow_mm[axis] += (weight * offset_mm).astype(np.float32)


def _draw_ventricle_growth_mm(random: RandomStreams, volume_scale: float) -> float:
    """Draw the volume of the lateral ventricles; return how far their border moves outwards."""
    logarithm = VENTRICLES_LOG_PER_YEAR * years_from_middle_age(random)
    logarithm += VENTRICLES_LOG_SD * random.generator("ventricles").standard_normal()
    volume_ml = np.clip(VENTRICLES_ML * np.exp(logarithm), LEAST_VENTRICLES_ML, MOST_VENTRICLES_ML)
    levels_mm, volumes_ml = _grown_ventricles()
    return float(np.interp(volume_ml / volume_scale, volumes_ml, levels_mm))


@cache
def _grown_ventricles() -> tuple[np.ndarray, np.ndarray]:
    """Return movements of the border in mm (N,) and the volumes of the atlas's ventricles in ml."""
    atlas = load_atlas()
    levels_mm = np.arange(-3.0, 8.0)
    a, b, c = VENTRICLES.shape
    fine = VENTRICLES._replace(spacing_mm=2.0, shape=(2 * a - 1, 2 * b - 1, 2 * c - 1))
    volumes_ml = []
    for level_mm in levels_mm:
        growth = Deformation.from_flow(VENTRICLES, np.float32(level_mm) * atlas.ventricle_flow)
        inside = atlas.sample(atlas.ventricles, growth.to_atlas(fine.points_mm())) > 0.5
        volumes_ml.append(inside.sum() * fine.spacing_mm**3 / 1000)
    return levels_mm, np.array(volumes_ml)
