"""What a case suffers from: gliomas, which displace the tissue around them, or metastases."""

from typing import NamedTuple, Protocol

import numpy as np

from datamodules.phantom.anatomy import Focus, Geometry, Tissue
from datamodules.phantom.atlas import load_atlas
from datamodules.phantom.fields import Grid, RandomStreams, interpolate, sigmoid
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

NECROSIS, OEDEMA, ENHANCING = 1, 2, 4  # BraTS labels


class PathologyMaps(NamedTuple):
    """Fractions of the pathological classes on a grid, each (X, Y, Z), 0 to 1.

    Attributes:
        core: The tumour core, enhancing part included.
        enhancing: The enhancing part of the core.
        oedema: Oedema, which lies outside the core.
    """

    core: np.ndarray
    enhancing: np.ndarray
    oedema: np.ndarray


class Pathology(Protocol):
    """What a case suffers from.

    Attributes:
        grade: "HGG" or "LGG"; empty for metastases.
        foci: The tumours that displace tissue.
    """

    grade: str
    foci: list[Focus]

    def __init__(self, random: RandomStreams, warp: Warp) -> None: ...

    def spread(self, geometry: Geometry, tissue: Tissue) -> None:
        """Settle what depends on distant voxels; call it once, before `maps`.

        Args:
            geometry: Geometry of the head.
            tissue: Healthy tissue on the coarse grid of the geometry.
        """
        ...

    def maps(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> PathologyMaps:
        """Evaluate the pathology on a grid, from the healthy tissue on the same grid."""
        ...

    def labels(self, maps: PathologyMaps) -> np.ndarray:
        """Return what a rater would draw (X, Y, Z), uint8."""
        ...


def draw_grade(random: RandomStreams) -> str:
    """Draw the grade of a glioma, "HGG" or "LGG"."""
    return "HGG" if random.has("hgg") else "LGG"


def draw_enhancement(random: RandomStreams) -> bool:
    """Decide whether a glioma takes up contrast agent; low grades often do not."""
    return random.has(f"enhancing_{draw_grade(random).lower()}")


def draw_foci(random: RandomStreams, warp: Warp) -> list[Focus]:
    """Draw the tumours of a glioma: one, or two or three if it is multifocal.

    The second and the third lie 25 to 60 mm from the first and are smaller.
    """
    from scipy.spatial.transform import Rotation

    generator = random.generator("foci")
    sites_mm = load_atlas().glioma_sites_mm
    count = int(generator.integers(2, 4)) if random.has("multifocal") else 1
    foci: list[Focus] = []
    for number in range(count):
        site_mm = sites_mm[generator.integers(len(sites_mm))]
        if number == 0:
            distance_mm = np.linalg.norm(sites_mm - site_mm, axis=1)
            sites_mm = sites_mm[(distance_mm > 25) & (distance_mm < 60)]
        item = str(number)
        radius_mm = random.draw("radius_mm", item) * (0.5 if foci else 1)
        rotation = Rotation.random(rng=generator).as_matrix()
        foci.append(
            Focus(
                centre_mm=warp.from_mni_mm(site_mm),
                radius_mm=radius_mm,
                axes=rotation / random.draw_per_axis("elongation", item),
                push_mm=min(random.draw("push_mm", item), 0.4 * radius_mm),
                push_reach_mm=random.draw("push_reach_mm", item),
            )
        )
    return foci


class Glioma:
    """One tumour, or several near each other: core, enhancing rim, oedema and mass effect."""

    def __init__(self, random: RandomStreams, warp: Warp) -> None:
        self.random = random
        self.grade = draw_grade(random)
        self.enhances = draw_enhancement(random)
        self.foci = draw_foci(random, warp)

    def spread(self, geometry: Geometry, tissue: Tissue) -> None:
        """Find how far oedema reaches, and the score above which it has the volume drawn."""
        random, grid = self.random, geometry.coarse
        core = sigmoid(_core_depth_mm(random, geometry, tissue, grid) / 2)
        self.reach = _oedema_reach(random, tissue, core, grid)
        outside = core < 0.5
        ratio = random.draw(f"oedema_ratio_{self.grade.lower()}")
        share = min(ratio * np.mean(~outside) / np.mean(outside), 0.3)
        score = _oedema_score(random, tissue, self.reach, grid)[outside]
        self.oedema_threshold = float(np.quantile(score, 1 - share))

    def maps(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> PathologyMaps:
        """Evaluate core, enhancing rim and oedema on a grid."""
        random = self.random
        depth_mm = _core_depth_mm(random, geometry, tissue, grid)
        core = sigmoid(depth_mm / 0.6)
        enhancing = np.zeros_like(core)
        if self.enhances:
            rim_mm = random.draw("rim_mm") * (1 + 0.6 * random.smooth_field("rim", 9.0, grid))
            rim_mm -= 2.0 * (random.smooth_field("gaps", 7.0, grid) > 1.2)
            enhancing = core * sigmoid((rim_mm - depth_mm) / 0.5)
        reach = interpolate(self.reach, geometry.coarse, grid)
        score = _oedema_score(random, tissue, reach, grid) - self.oedema_threshold
        oedema = sigmoid(score / 0.25) * (1 - core) * (1 - tissue.csf)
        return PathologyMaps(core, enhancing, oedema)

    def labels(self, maps: PathologyMaps) -> np.ndarray:
        """Return the BraTS labels: 0, 1 necrotic or non-enhancing core, 2 oedema, 4 enhancing."""
        labels = np.zeros(maps.core.shape, np.uint8)
        labels[maps.oedema > 0.5] = OEDEMA
        labels[maps.core > 0.5] = NECROSIS
        labels[maps.enhancing > 0.5] = ENHANCING
        return labels


def _core_depth_mm(
    random: RandomStreams, geometry: Geometry, tissue: Tissue, grid: Grid
) -> np.ndarray:
    """Return the distance to the border of a lobulated core (X, Y, Z), positive inside."""
    depth_mm = interpolate(geometry.core_depth_mm, geometry.coarse, grid)
    depth_mm += random.draw("lobes_mm") * random.smooth_field("lobes", 9.0, grid)
    depth_mm += 0.8 * random.smooth_field("border of core", 4.0, grid)
    depth_mm -= 6 * tissue.csf * (tissue.depth_mm > 6)  # grows around ventricles, not into them
    return np.minimum(depth_mm, tissue.depth_mm)


def _oedema_reach(
    random: RandomStreams, tissue: Tissue, core: np.ndarray, grid: Grid
) -> np.ndarray:
    """Return how easily oedema gets from the core to a voxel (X, Y, Z): a logarithm, 0 in the core.

    The core is smoothed repeatedly, and each voxel passes on only what its tissue lets through. The
    logarithm then falls like a distance along white matter. A coarse grid is enough, because the
    fine borders of oedema come from the tissue.
    """
    from scipy.ndimage import gaussian_filter

    speed = np.exp(0.35 * random.smooth_field("fingers", 9.0, grid))
    through = np.clip((tissue.white + 0.12 * tissue.grey) * speed, 0, 1)
    reached = core
    for _ in range(28):
        reached = np.maximum(core, through * gaussian_filter(reached, 1.0))
    return np.log(reached + 1e-6)


def _oedema_score(
    random: RandomStreams, tissue: Tissue, reach: np.ndarray, grid: Grid
) -> np.ndarray:
    """Rank voxels (X, Y, Z) by how early oedema gets there: near the core and in white matter."""
    ease = np.log(tissue.white + 0.15 * tissue.grey + 0.01)
    score = reach + 0.8 * ease + 0.25 * random.smooth_field("edge of oedema", 5.0, grid)
    return np.where(tissue.depth_mm < 0.5, -20, score)


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
        oedema_mm = np.full(grid.shape, -100, np.float32)
        for number, (centre_mm, radius_mm) in enumerate(
            zip(self.centres_mm, self.radii_mm, strict=True)
        ):
            offset_mm = points_mm - centre_mm.astype(np.float32).reshape(3, 1, 1, 1)
            inside_mm = float(radius_mm) - np.sqrt(np.square(offset_mm).sum(axis=0))
            if radius_mm > RING_FROM_MM:
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
        return PathologyMaps(core, enhancing, oedema)

    def labels(self, maps: PathologyMaps) -> np.ndarray:
        """Return 1 in lesions, without oedema, and 0 elsewhere."""
        return (maps.core > 0.5).astype(np.uint8)


KINDS: dict[str, type[Pathology]] = {"glioma": Glioma, "metastases": BrainMetastases}
