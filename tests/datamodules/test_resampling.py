"""A patch shows the box that it was cut from: images trilinearly, labels by region."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

import grids
from datamodules.resampling import LEAST_SHARE, interpolation, resample_image, resample_labels
from tests.conftest import ball

NESTING = np.zeros(256, int)
NESTING[[2, 1, 4]] = 1, 2, 3  # oedema, around the core, around the enhancing tumour


@pytest.mark.parametrize("shape", [(9, 12, 7), (20, 11, 16), (1, 2, 30), (16, 12, 9)])
@pytest.mark.parametrize("channels", [1, 4, 8])
def test_images_are_interpolated_as_by_one_kernel_for_three_axes(
    shape: tuple[int, int, int], channels: int
):
    box = torch.randn(channels, *shape).half()
    size = (16, 12, 9)
    expected = F.interpolate(box[None].float(), size, mode="trilinear", align_corners=False)[0]
    resampled = resample_image(box, size)
    assert resampled.is_contiguous()
    torch.testing.assert_close(resampled, expected, atol=1e-5, rtol=0)


def test_an_image_of_the_size_of_the_patch_keeps_its_values():
    box = torch.randn(2, 5, 6, 7).half()
    assert torch.equal(resample_image(box, (5, 6, 7)), box.float())


@pytest.mark.parametrize(("source", "length"), [(9, 8), (8, 9), (5, 5), (1, 4), (7, 3)])
def test_what_an_axis_says_of_its_weights(source: int, length: int):
    axis = interpolation(source, length)
    weights = axis.weights.numpy()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    for voxel in range(length):
        used = np.flatnonzero(weights[voxel])
        assert (axis.first[voxel], axis.last[voxel]) == (used[0], used[-1])
        assert axis.nearest[voxel] == weights[voxel].argmax()
    for start in range(length):
        for stop in range(start + 1, length + 1):
            columns = np.flatnonzero(weights[start:stop].any(0))
            assert axis.used(start, stop) == slice(columns[0], columns[-1] + 1)
    for start in range(source):
        for stop in range(start + 1, source + 1):
            rows = np.flatnonzero(weights[:, start:stop].any(1))
            expected = slice(rows[0], rows[-1] + 1) if len(rows) else None
            reached = axis.reached(start, stop)
            assert reached == expected or (expected is None and reached.start == reached.stop)


def naive(labels: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """Resample labels over all of the volume, region by region, as the docstring says."""
    nearest = labels
    for axis, side in enumerate(size):
        weights = F.interpolate(torch.eye(labels.shape[axis])[None], side, mode="linear")[0].T
        nearest = nearest.take(weights.argmax(1).numpy(), axis)
    resampled = np.zeros(size, np.uint8)
    for label, region in ((2, (2, 1, 4)), (1, (1, 4)), (4, (4,))):
        if label not in labels:  # its region is that of the next label
            continue
        mask = torch.from_numpy(np.isin(labels, region)).float()[None, None]
        shares = F.interpolate(mask, size, mode="trilinear", align_corners=False)[0, 0].numpy()
        is_inside = shares >= LEAST_SHARE - 1e-4
        around = np.asarray(ndimage.binary_dilation(is_inside, np.ones((3, 3, 3))))
        resampled[is_inside | (np.isin(nearest, region) & (around == 0))] = label
    return resampled


def tumours() -> Iterator[tuple[np.ndarray, tuple[int, int, int]]]:
    """Make labels (X, Y, Z) of three nested regions, with a size to resample them to."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        shape = tuple(rng.integers(16, 28, 3).tolist())
        centre = tuple(rng.uniform(0, shape))
        labels = np.zeros(shape, np.uint8)
        for label, radius in ((2, 8), (4, 6), (1, 3)):
            labels[ball(shape, centre, radius + rng.uniform(-1, 1))] = label
        specks = rng.random(shape) < 0.002
        labels[specks] = rng.choice([1, 2, 4], specks.sum())
        yield labels, tuple(rng.integers(14, 30, 3).tolist())


def test_labels_are_those_of_a_naive_search():
    for labels, size in tumours():
        np.testing.assert_array_equal(resample_labels(labels, size, NESTING), naive(labels, size))


def test_regions_are_interpolated_as_the_image_is():
    """A region can have a large share of a voxel of which none of its labels has one."""
    for labels, size in tumours():
        resampled = resample_labels(labels, size, NESTING)
        assert resampled.shape == size
        for region in ((2, 1, 4), (1, 4), (4,)):
            mask = torch.from_numpy(np.isin(labels, region)).float()[None, None]
            shares = F.interpolate(mask, size, mode="trilinear", align_corners=False)
            expected = (shares >= LEAST_SHARE)[0, 0].numpy()
            found = np.isin(resampled, region)
            assert not (expected & ~found).any()
            assert not (found & (shares == 0)[0, 0].numpy()).any()
            assert (found != expected).mean() < 0.01


def test_a_lesion_of_one_voxel_is_in_every_patch_that_zooms_in():
    for voxel in product(range(7), repeat=3):
        labels = np.zeros((7, 7, 7), np.uint8)
        labels[voxel] = 2
        resampled = resample_labels(labels, (8, 8, 8), NESTING)
        assert (resampled == 2).any()
        _, lesions = grids.components(resampled > 0)
        assert lesions == 1


def test_a_volume_without_labels_stays_without():
    assert not resample_labels(np.zeros((20, 24, 18), np.uint8), (8, 9, 10), NESTING).any()
