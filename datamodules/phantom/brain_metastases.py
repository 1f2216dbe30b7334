"""Metastases: many, mostly small, at the border of grey and white matter."""

import numpy as np

from datamodules.phantom.anatomy import Focus, Geometry, Tissue
from datamodules.phantom.atlas import load_atlas
from datamodules.phantom.fields import Grid, RandomStreams, sigmoid
from datamodules.phantom.pathology import PathologyMaps
from datamodules.phantom.ranges import (
    LARGEST_METASTASIS_MM,
    LEAST_METASTASIS_MM,
    METASTASES_SCALE,
    METASTASES_SHAPE,
    METASTASIS_LOG_SD,
    METASTASIS_RADIUS_MM,
    MOST_METASTASES,
    RING_FROM_MM,
)
from datamodules.phantom.shape import Warp


class BrainMetastases:
    """None to a dozen balls between grey and white matter; large ones have a ring and oedema."""

    def __init__(self, random: RandomStreams, warp: Warp) -> None:
        self.random = random
        self.grade = ""
        self.foci: list[Focus] = []  # metastases are too small to displace tissue
        generator = random.generator("metastases")
        count = min(int(generator.gamma(METASTASES_SHAPE, METASTASES_SCALE)), MOST_METASTASES)
        deviation = METASTASIS_LOG_SD * generator.standard_normal(count)
        radii_mm = METASTASIS_RADIUS_MM * np.exp(deviation)
        self.radii_mm = np.clip(radii_mm, LEAST_METASTASIS_MM, LARGEST_METASTASIS_MM)
        sites_mm = generator.choice(load_atlas().metastasis_sites_mm, count)
        self.centres_mm = [warp.from_mni_mm(site_mm) for site_mm in sites_mm]
        self.has_oedema = (self.radii_mm > RING_FROM_MM) & (generator.random(count) < 0.7)

    def spread(self, geometry: Geometry, tissue: Tissue) -> None:
        """Do nothing: no part of a metastasis depends on distant voxels."""

    def maps(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> PathologyMaps:
        """Evaluate the lesions, their rings and their oedema on a grid."""
        random = self.random
        points_mm = grid.points_mm()
        depth_mm = np.full(grid.shape, -100, np.float32)
        ring = np.zeros(grid.shape, bool)
        rugged = self._rugged(grid)
        oedema_mm = np.full(grid.shape, -100, np.float32)
        for number, (centre_mm, radius_mm) in enumerate(
            zip(self.centres_mm, self.radii_mm, strict=True)
        ):
            offset_mm = points_mm - centre_mm.astype(np.float32).reshape(3, 1, 1, 1)
            inside_mm = self._inside_mm(number, float(radius_mm), offset_mm, rugged)
            if self._has_ring(number):
                ring |= inside_mm > 0
            if self.has_oedema[number]:
                reach_mm = radius_mm * random.draw("metastasis_oedema", str(number))
                oedema_mm = np.maximum(oedema_mm, inside_mm + float(reach_mm))
            depth_mm = np.maximum(depth_mm, inside_mm)
        # The noise is weak, so that a small lesion stays nearly a ball and none is cut in two.
        depth_mm += 0.35 * random.smooth_field("border of metastases", 4.0, grid)
        core = sigmoid(depth_mm / 0.3)
        rim_mm = random.draw("metastasis_rim_mm")
        enhancing = core * np.where(ring, sigmoid((rim_mm - depth_mm) / 0.4), 1)
        oedema_mm += 2.0 * random.smooth_field("fingers", 9.0, grid) - 6 * (1 - tissue.white)
        oedema = sigmoid(oedema_mm) * (1 - core) * (1 - tissue.csf)
        nothing = np.zeros_like(core)
        return PathologyMaps(core, enhancing, oedema, nothing, nothing)

    def _rugged(self, grid: Grid) -> np.ndarray:
        """Return what makes borders rugged (X, Y, Z), of mean 0: nothing, as these are balls."""
        return np.zeros(grid.shape, np.float32)

    def _inside_mm(
        self, number: int, radius_mm: float, offset_mm: np.ndarray, rugged: np.ndarray
    ) -> np.ndarray:
        """Return the distance to the border of a lesion (X, Y, Z), positive inside.

        Args:
            number: Number of the lesion.
            radius_mm: Its radius.
            offset_mm: Positions relative to its centre (3, X, Y, Z).
            rugged: What makes its border rugged (X, Y, Z).
        """
        return radius_mm - np.sqrt(np.square(offset_mm).sum(axis=0))

    def _has_ring(self, number: int) -> bool:
        """Tell whether only the rim of a lesion enhances."""
        return self.radii_mm[number] > RING_FROM_MM

    def labels(self, maps: PathologyMaps, grid: Grid) -> np.ndarray:
        """Return 1 in lesions, without oedema, and 0 elsewhere."""
        return (maps.core > 0.5).astype(np.uint8)


class UnevenMetastases(BrainMetastases):
    """Metastases of uneven shape: longish, rugged, and with a ring at any size or none."""

    def _rugged(self, grid: Grid) -> np.ndarray:
        """Return a random field (X, Y, Z) of mean 0 and variance 1."""
        return self.random.fractal_field("rugged metastases", 9.0, grid)

    def _inside_mm(
        self, number: int, radius_mm: float, offset_mm: np.ndarray, rugged: np.ndarray
    ) -> np.ndarray:
        """Return the distance to the border of a rugged ellipsoid (X, Y, Z), positive inside."""
        from scipy.spatial.transform import Rotation

        random, item = self.random, str(number)
        rotation = Rotation.random(rng=random.generator(f"axes of metastasis {item}")).as_matrix()
        axes = rotation / random.draw_per_axis("metastasis_elongation", item)[:, None]
        stretched_mm = np.tensordot(axes.astype(np.float32), offset_mm, axes=1)
        inside_mm = super()._inside_mm(number, radius_mm, stretched_mm, rugged)
        return inside_mm + np.float32(radius_mm * random.draw("metastasis_rugged", item)) * rugged

    def _has_ring(self, number: int) -> bool:
        """Tell whether only the rim of a lesion enhances: the more likely, the larger it is."""
        chance = 0.6 * min(float(self.radii_mm[number]) / RING_FROM_MM, 1)
        return self.random.generator(f"ring of metastasis {number}").random() < chance
