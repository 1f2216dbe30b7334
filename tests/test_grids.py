"""Voxel grids, against SciPy, nibabel and padding."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from grids import bounding_box, components, cut, spacing_mm
from tests.conftest import affine_of

SHAPE = (20, 24, 18)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR"])
def test_spacing_is_that_of_nibabel(axes: str):
    affine = affine_of(axes, (0.7, 1.3, 2.5))
    np.testing.assert_allclose(spacing_mm(affine), nib.affines.voxel_sizes(affine))
    turned = affine_of("RAS", (2, 2, 2))
    turned[:2, :2] = np.array([[1.2, -1.6], [1.6, 1.2]])
    np.testing.assert_allclose(spacing_mm(turned), 2)


@pytest.mark.parametrize("share", [1e-4, 1e-3, 0.01, 1])
def test_bounding_boxes_are_those_of_scipy(share: float):
    draw = np.random.default_rng(0)
    for _ in range(20):
        mask = draw.random(SHAPE) < share
        if mask.any():
            assert bounding_box(mask) == ndimage.find_objects(mask.astype(int))[0]


def test_the_box_of_nothing_is_empty():
    mask = np.zeros(SHAPE, bool)
    assert mask[bounding_box(mask)].shape == (0, 0, 0)


@pytest.mark.parametrize("channels", [(), (2,)])
@pytest.mark.parametrize("start", [(-3, 0, 5), (18, 20, -4), (30, 0, 0), (-30, 0, 0), (2, 3, 4)])
def test_cut_is_a_padded_slice(start: tuple[int, int, int], channels: tuple[int, ...]):
    shape = (*channels, *SHAPE)
    volume = 1 + np.arange(np.prod(shape)).reshape(shape)
    padded = np.pad(volume, [(0, 0)] * len(channels) + [(40, 40)] * 3)
    x, y, z = (s + 40 for s in start)
    box = cut(volume, start, (8, 5, 6))
    np.testing.assert_array_equal(box, padded[..., x : x + 8, y : y + 5, z : z + 6])
    assert box.dtype == volume.dtype
    assert not np.shares_memory(box, volume)


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5])
def test_components_are_those_of_scipy_with_26_neighbours(share: float):
    mask = np.random.default_rng(0).random(SHAPE) < share
    numbers, count = components(mask)
    expected = np.empty(SHAPE, np.int32)
    assert count == ndimage.label(mask, ndimage.generate_binary_structure(3, 3), output=expected)
    np.testing.assert_array_equal(numbers, expected)
    assert numbers.dtype == np.int32


def test_voxels_that_share_a_corner_are_one_component():
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    numbers, count = components(mask)
    assert count == 2
    assert numbers[0, 0, 0] == numbers[1, 1, 1] != numbers[3, 3, 3]
