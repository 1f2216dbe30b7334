"""What a case suffers from: gliomas, which displace the tissue around them, or metastases."""

from typing import NamedTuple, Protocol

import numpy as np

from datamodules.phantom.anatomy import Focus, Geometry, Tissue
from datamodules.phantom.fields import Grid, RandomStreams
from datamodules.phantom.shape import Warp


class PathologyMaps(NamedTuple):
    """Fractions of the pathological classes on a grid, each (X, Y, Z), 0 to 1.

    Attributes:
        core: The tumour core, all of its parts included.
        enhancing: The enhancing part of the core.
        oedema: Oedema, which lies outside the core.
        fluid: The part of the core that is filled with fluid.
        blood: The part of the core that has bled.
    """

    core: np.ndarray
    enhancing: np.ndarray
    oedema: np.ndarray
    fluid: np.ndarray
    blood: np.ndarray


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

    def labels(self, maps: PathologyMaps, grid: Grid) -> np.ndarray:
        """Return what a rater would draw (X, Y, Z), uint8, from maps of all of the brain."""
        ...
