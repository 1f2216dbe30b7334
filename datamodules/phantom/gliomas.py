"""Gliomas, which displace the tissue around them: how they grow, and how raters draw them."""

import numpy as np

from datamodules.phantom.anatomy import Focus, Geometry, Tissue
from datamodules.phantom.atlas import load_atlas
from datamodules.phantom.fields import Grid, RandomStreams, interpolate, sigmoid
from datamodules.phantom.pathology import PathologyMaps
from datamodules.phantom.shape import Warp

NECROSIS, OEDEMA, ENHANCING = 1, 2, 4  # BraTS labels


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
    atlas = load_atlas()
    sites_mm = atlas.metastasis_sites_mm if random.has("cortical") else atlas.glioma_sites_mm
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
        core = sigmoid(core_depth_mm(random, geometry, tissue, grid) / 2)
        self.reach = _oedema_reach(random, tissue, core, grid)
        outside = core < 0.5
        ratio = random.draw(f"oedema_ratio_{self.grade.lower()}")
        share = min(ratio * np.mean(~outside) / np.mean(outside), 0.3)
        score = self._oedema_score(tissue, self.reach, grid)[outside]
        self.oedema_threshold = float(np.quantile(score, 1 - share))

    def maps(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> PathologyMaps:
        """Evaluate core, enhancing rim and oedema on a grid."""
        random = self.random
        depth_mm = core_depth_mm(random, geometry, tissue, grid)
        core = sigmoid(depth_mm / 0.6)
        enhancing = self._rim(core, depth_mm, grid)
        oedema = self._oedema(geometry, tissue, grid) * (1 - core) * (1 - tissue.csf)
        nothing = np.zeros_like(core)
        return PathologyMaps(core, enhancing, oedema, nothing, nothing)

    def _rim(self, core: np.ndarray, depth_mm: np.ndarray, grid: Grid) -> np.ndarray:
        """Return the enhancing rim of a core (X, Y, Z), with gaps; nothing if none enhances."""
        random = self.random
        if not self.enhances:
            return np.zeros_like(core)
        rim_mm = random.draw("rim_mm") * (1 + 0.6 * random.smooth_field("rim", 9.0, grid))
        rim_mm -= 2.0 * (random.smooth_field("gaps", 7.0, grid) > 1.2)
        return core * sigmoid((rim_mm - depth_mm) / 0.5)

    def _oedema(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> np.ndarray:
        """Return where oedema has got to (X, Y, Z), the core included."""
        random = self.random
        reach = interpolate(self.reach, geometry.coarse, grid)
        score = self._oedema_score(tissue, reach, grid) - self.oedema_threshold
        return sigmoid(score / random.draw("oedema_edge"))

    def _oedema_score(self, tissue: Tissue, reach: np.ndarray, grid: Grid) -> np.ndarray:
        """Rank voxels (X, Y, Z) by how early oedema gets there.

        That is near the core, in white matter and, if the oedema is lopsided, on one side.
        """
        random = self.random
        ease = np.log(tissue.white + random.draw("grey_ease") * tissue.grey + 0.01)
        score = reach + 0.8 * ease + 0.25 * random.smooth_field("edge of oedema", 5.0, grid)
        if lopsided := random.draw("lopsided"):
            focus = self.foci[0]
            side = random.generator("side of oedema").standard_normal(3)
            side *= lopsided / focus.radius_mm / np.linalg.norm(side)
            offset_mm = grid.points_mm() - focus.centre_mm.astype(np.float32).reshape(3, 1, 1, 1)
            score += np.tensordot(side.astype(np.float32), offset_mm, axes=1)
        return np.where(tissue.depth_mm < 0.5, -20, score)

    def labels(self, maps: PathologyMaps, grid: Grid) -> np.ndarray:
        """Return the BraTS labels: 0, 1 necrotic or non-enhancing core, 2 oedema, 4 enhancing."""
        return brats_labels(maps.oedema > 0.5, maps.core > 0.5, maps.enhancing > 0.5)


def brats_labels(oedema: np.ndarray, core: np.ndarray, enhancing: np.ndarray) -> np.ndarray:
    """Return the BraTS labels (X, Y, Z) of masks, of which each covers those before it."""
    labels = np.zeros(core.shape, np.uint8)
    labels[oedema] = OEDEMA
    labels[core] = NECROSIS
    labels[enhancing] = ENHANCING
    return labels


def core_depth_mm(
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
    through = np.clip((tissue.white + random.draw("grey_through") * tissue.grey) * speed, 0, 1)
    reached = core
    for _ in range(28):
        reached = np.maximum(core, through * gaussian_filter(reached, 1.0))
    return np.log(reached + 1e-6)


class DrawnGlioma(Glioma):
    """A glioma with the soft and uneven look of real ones, and the smooth outlines of a rater.

    Its oedema fades out, and the rater's line runs where it can still be seen. Parts of the core
    may be filled with fluid or with blood, and what enhances may be nodules instead of a rim.
    """

    def maps(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> PathologyMaps:
        """Evaluate core, its parts, and oedema on a grid."""
        depth_mm = self._core_depth_mm(geometry, tissue, grid)
        core = sigmoid(depth_mm / self.random.draw("core_edge_mm"))
        oedema = self._oedema(geometry, tissue, grid) * (1 - core) * (1 - tissue.csf)
        enhancing = self._enhancing(core, depth_mm, grid)
        solid = core - enhancing
        fluid, blood = (solid * self._share(name, grid) for name in ("fluid", "blood"))
        return PathologyMaps(core, enhancing, oedema, fluid * (1 - blood), blood)

    def _core_depth_mm(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> np.ndarray:
        """Return the distance to the border of the core (X, Y, Z), positive inside."""
        return core_depth_mm(self.random, geometry, tissue, grid)

    def _enhancing(self, core: np.ndarray, depth_mm: np.ndarray, grid: Grid) -> np.ndarray:
        """Return the enhancing part of a core (X, Y, Z): a rim, or nodules."""
        random = self.random
        if not (self.enhances and random.has("nodular")):
            return self._rim(core, depth_mm, grid)
        nodules = random.fractal_field("nodules", 11.0, grid) - random.draw("nodules")
        return core * sigmoid(nodules / 0.25)

    def _share(self, name: str, grid: Grid) -> np.ndarray:
        """Return the share of a core that is filled with something (X, Y, Z), 0 to 1."""
        random = self.random
        if not random.has(name):
            return np.zeros(grid.shape, np.float32)
        return sigmoid((random.fractal_field(name, 12.0, grid) - random.draw(f"{name}_from")) / 0.2)

    def labels(self, maps: PathologyMaps, grid: Grid) -> np.ndarray:
        """Return the BraTS labels, of smoothed maps: raters follow no single voxel."""
        from scipy.ndimage import gaussian_filter

        random = self.random
        smoothing = random.draw("rater_smoothing_mm") / grid.spacing_mm
        whole = gaussian_filter(maps.core + maps.oedema, smoothing) > random.draw("rater_from")
        core = whole & (gaussian_filter(maps.core, smoothing) > 0.5)
        enhancing = core & (gaussian_filter(maps.enhancing, smoothing / 2) > 0.5)
        return brats_labels(whole, core, enhancing)


class SwellingGlioma(DrawnGlioma):
    """A core in a shell of oedema that crosses the borders of tissues, uneven in thickness."""

    def spread(self, geometry: Geometry, tissue: Tissue) -> None:
        """Do nothing: how far oedema reaches is drawn."""

    def _core_depth_mm(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> np.ndarray:
        """Return the distance to the border of a rugged core (X, Y, Z), positive inside."""
        random = self.random
        depth_mm = interpolate(geometry.core_depth_mm, geometry.coarse, grid)
        depth_mm += random.draw("rugged_mm") * random.fractal_field("rugged", 18.0, grid)
        depth_mm -= 6 * tissue.csf * (tissue.depth_mm > 6)
        return np.minimum(depth_mm, tissue.depth_mm)

    def _oedema(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> np.ndarray:
        """Return where oedema has got to (X, Y, Z), the core included."""
        random = self.random
        reach_mm = random.draw("reach_mm") * np.exp(
            random.draw("uneven") * random.fractal_field("reach", 24.0, grid)
        )
        depth_mm = interpolate(geometry.core_depth_mm, geometry.coarse, grid) + reach_mm
        depth_mm -= random.draw("spared_grey_mm") * tissue.grey
        return sigmoid(np.minimum(depth_mm, tissue.depth_mm) / random.draw("whole_edge_mm"))


class InfiltratingGlioma(SwellingGlioma):
    """A rugged region of infiltrated tissue; the core is where it is densest, often in patches."""

    def _core_depth_mm(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> np.ndarray:
        """Return how far the core reaches beyond a voxel (X, Y, Z), in mm, positive inside."""
        random = self.random
        depth_mm = interpolate(geometry.core_depth_mm, geometry.coarse, grid)
        patches_mm = random.draw("patches_mm") * random.fractal_field("patches", 20.0, grid)
        depth_mm = np.minimum(depth_mm + patches_mm, self._whole_depth_mm(geometry, tissue, grid))
        return depth_mm - 6 * tissue.csf * (tissue.depth_mm > 6)

    def _whole_depth_mm(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> np.ndarray:
        """Return the distance to the border of what is infiltrated (X, Y, Z), positive inside."""
        random = self.random
        depth_mm = interpolate(geometry.core_depth_mm, geometry.coarse, grid)
        depth_mm += random.draw("infiltrated_mm")
        depth_mm += random.draw("rugged_mm") * random.fractal_field("infiltrated", 22.0, grid)
        depth_mm += random.draw("along_white_mm") * (tissue.white - 0.5)
        return np.minimum(depth_mm, tissue.depth_mm)

    def _oedema(self, geometry: Geometry, tissue: Tissue, grid: Grid) -> np.ndarray:
        """Return what is infiltrated (X, Y, Z), the core included."""
        depth_mm = self._whole_depth_mm(geometry, tissue, grid)
        return sigmoid(depth_mm / self.random.draw("whole_edge_mm"))
