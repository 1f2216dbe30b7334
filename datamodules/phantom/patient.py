"""One patient: anatomy, pathology and scanner put together, in the voxel order of a file."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from datamodules.phantom.anatomy import build_geometry, healthy_tissue, ventricles
from datamodules.phantom.families import FAMILIES
from datamodules.phantom.fields import Grid, RandomStreams, interpolate
from datamodules.phantom.pathology import Pathology, PathologyMaps
from datamodules.phantom.ranges import FIELD_OF_VIEW_MM, MODALITIES
from datamodules.phantom.scanner import (
    acquire,
    class_maps,
    draw_brain_mask,
    ideal_image,
    quantise,
)
from datamodules.phantom.shape import draw_warp

VERSION = 4  # to be raised when the same seed and index give other voxels than before


class Phantom(NamedTuple):
    """One synthetic examination, in the voxel order of its files.

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


def make_phantom(
    seed: int,
    index: int,
    spacing_mm: float,
    kind: str = "glioma",
    modalities: Sequence[str] = MODALITIES,
    family: str = "classic",
) -> Phantom:
    """Make one phantom.

    Args:
        seed: Seed of the data set.
        index: Index of the case; every pair of seed and index is a patient of its own.
        spacing_mm: Edge of a voxel; 1 gives the grid of BraTS, 240 x 240 x 155.
        kind: "glioma" or "metastases".
        modalities: Which images to make; one image does not depend on which others are made.
        family: A key of `FAMILIES`.
    """
    from threadpoolctl import threadpool_limits

    # Sums over several threads are rounded differently, and there is one process per core already.
    with threadpool_limits(1):
        laws, kinds = FAMILIES[family]
        return _make_phantom(RandomStreams(seed, index, laws), spacing_mm, kinds[kind], modalities)


def _make_phantom(
    random: RandomStreams, spacing_mm: float, kind: type[Pathology], modalities: Sequence[str]
) -> Phantom:
    """Make a phantom from the random numbers of its case."""
    warp = draw_warp(random)
    pathology = kind(random, warp)
    geometry = build_geometry(random, warp, pathology.foci)
    coarse_tissue = healthy_tissue(random, geometry, geometry.coarse)
    pathology.spread(geometry, coarse_tissue)
    coarse_ventricles = ventricles(coarse_tissue)

    grid = geometry.coarse.resized(spacing_mm)
    ideal = {modality: np.empty(grid.shape, np.float32) for modality in modalities}
    mask = np.empty(grid.shape, bool)
    whole_maps = PathologyMaps(*np.empty((len(PathologyMaps._fields), *grid.shape), np.float32))
    for rows, slab in grid.slabs():
        tissue = healthy_tissue(random, geometry, slab)
        pathology_maps = pathology.maps(geometry, tissue, slab)
        mask[rows] = draw_brain_mask(random, tissue, slab)
        for whole, part in zip(whole_maps, pathology_maps, strict=True):
            whole[rows] = part
        slab_ventricles = interpolate(coarse_ventricles, geometry.coarse, slab)
        maps = class_maps(random, tissue, pathology_maps, slab_ventricles, slab)
        for modality, image in ideal.items():
            image[rows] = ideal_image(random, modality, maps, slab)

    labels = pathology.labels(whole_maps, grid) * mask
    ras = random.has("ras")
    images = {}
    for modality in modalities:
        image = acquire(random, modality, ideal.pop(modality), grid)
        images[modality] = _in_file_order(quantise(random, modality, image, mask), grid, ras)
    affine = _file_affine(spacing_mm, ras)
    return Phantom(images, _in_file_order(labels, grid, ras), affine, pathology.grade)


def _in_file_order(volume: np.ndarray, grid: Grid, ras: bool) -> np.ndarray:
    """Put a volume on a grid into the whole field of view, in RAS or in LPS order."""
    whole = np.zeros(Grid.whole(grid.spacing_mm).shape, volume.dtype)
    whole[grid.slices] = volume
    return np.ascontiguousarray(whole if ras else whole[::-1, ::-1])


def _file_affine(spacing_mm: float, ras: bool) -> np.ndarray:
    """Return the affine of a file (4, 4); the middle of the field of view is its origin."""
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = spacing_mm / 2 - np.divide(FIELD_OF_VIEW_MM, 2)
    if not ras:  # index i of the file is index last - i in RAS
        last = np.array(Grid.whole(spacing_mm).shape[:2]) - 1
        affine[:2, 3] += last * spacing_mm
        affine[[0, 1], [0, 1]] = -spacing_mm
    return affine
