"""Patches have exact shares of lesions, lie anywhere, and show true voxels at every scale."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
import torchio as tio
from scipy.ndimage import zoom

import grids
from datamodules.resampling import LEAST_SHARE
from datamodules.sampling import BalancedSampler
from tests.datamodules.conftest import lesions_at

SHAPE = (20, 24, 18)


def ramp(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Make an image (3, X, Y, Z) whose channels are the coordinates of the voxel."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float16)


def labels_with(*voxels: tuple[int, int, int], shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Make a label map (X, Y, Z) with oedema in single voxels."""
    labels = np.zeros(shape, np.uint8)
    for voxel in voxels:
        labels[voxel] = 2
    return labels


@pytest.mark.parametrize("share", [0, 0.25, 1 / 3, 0.5, 0.9, 1])
def test_share_is_exact_in_every_run_of_patches(share: float):
    sampler = BalancedSampler(8, lesion_share=share)
    wanted = [sampler.wants_lesion(i) for i in range(600)]
    for length in (2, 7, 12, 100):
        for start in range(0, 600 - length):
            count = sum(wanted[start : start + length])
            assert abs(count - length * Fraction(share).limit_denominator(10_000)) < 1
    counted = [sampler.lesion_patches_before(i) for i in range(600)]
    assert counted == [sum(wanted[:i]) for i in range(600)]


def test_half_alternates_so_that_every_even_batch_is_half():
    sampler = BalancedSampler(8, lesion_share=0.5)
    for start in range(0, 64, 4):
        assert sum(sampler.wants_lesion(i) for i in range(start, start + 4)) == 2


@pytest.mark.parametrize("voxel", [(0, 0, 0), (19, 23, 17), (10, 0, 17), (9, 12, 8)])
@pytest.mark.parametrize("scale", [(1, 1), (0.9, 1.1), (0.5, 0.6)])
def test_patch_contains_the_lesion_wherever_it_lies(
    voxel: tuple[int, int, int], scale: tuple[float, float]
):
    sampler = BalancedSampler(8, scale=scale)
    labels = labels_with(voxel)
    for seed in range(20):
        torch.manual_seed(seed)
        patch = sampler.draw(ramp(), labels, np.flatnonzero(labels))
        assert patch.image.shape == (3, 8, 8, 8)
        assert patch.image.dtype == torch.float32
        assert set(patch.labels.unique().tolist()) == {0, 2}  # resampling makes no new label


def test_every_box_around_the_voxel_is_as_likely():
    sampler = BalancedSampler(4)
    labels = labels_with((10, 1, 17))
    torch.manual_seed(0)
    starts = np.array(
        [sampler.draw(ramp(), labels, np.flatnonzero(labels)).image[:, 0, 0, 0].tolist()
         for _ in range(2000)]
    )  # fmt: skip
    # x: anywhere around 10; y: the border allows 0 and 1; z: only the last box.
    assert {axis: set(starts[:, axis]) for axis in range(3)} == {
        0: {7, 8, 9, 10},
        1: {0, 1},
        2: {14},
    }
    counts = np.unique(starts[:, 0], return_counts=True)[1]
    assert counts.min() > 500 - 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_lesion_voxels_are_drawn_uniformly():
    sampler = BalancedSampler(1)
    voxels = [(0, 0, 0), (5, 6, 7), (19, 23, 17)]
    labels = labels_with(*voxels)
    torch.manual_seed(0)
    found = [
        tuple(sampler.draw(ramp(), labels, np.flatnonzero(labels)).image.flatten().int().tolist())
        for _ in range(900)
    ]
    assert set(found) == set(voxels)
    assert min(found.count(voxel) for voxel in voxels) > 300 - 5 * np.sqrt(900 * 2 / 9)


def test_no_lesion_asked_for_means_anywhere():
    sampler = BalancedSampler(4)
    labels = labels_with((10, 10, 10))
    torch.manual_seed(0)
    patches = [sampler.draw(ramp(), labels, np.empty(0, np.int32)) for _ in range(300)]
    starts = np.array([patch.image[:, 0, 0, 0].tolist() for patch in patches])
    assert starts.min(0).tolist() == [0, 0, 0]
    assert starts.max(0).tolist() == [16, 20, 14]
    assert 0 < sum(bool(patch.labels.any()) for patch in patches) < 30


def test_volume_smaller_than_the_patch_is_centred_in_zeros():
    sampler = BalancedSampler(12)
    small = np.ones((1, 6, 12, 20), np.float16)
    patch = sampler.draw(small, np.zeros((6, 12, 20), np.uint8), np.empty(0, np.int32))
    assert patch.image[0, :, 0, 0].tolist() == [0] * 3 + [1] * 6 + [0] * 3
    assert patch.image.sum() == 6 * 12 * 12


def test_scaled_patch_shows_its_whole_source_box():
    """A patch of 8 voxels at scale 0.8 shows 10 voxels of the volume, none of them padded."""
    sampler = BalancedSampler(8, scale=(0.8, 0.8))
    torch.manual_seed(0)
    patch = sampler.draw(ramp(), labels_with(), np.empty(0, np.int32))
    x = patch.image[0, :, 0, 0]
    torch.testing.assert_close(x.diff(), torch.full((7,), 10 / 8))
    assert x[0] % 1 == pytest.approx(0.125)  # half a fine voxel inside the box, as at the other end


def test_scaling_agrees_with_scipy():
    rng = np.random.default_rng(0)
    image = rng.random((1, 16, 16, 16)).astype(np.float32)
    labels = (image[0] > 0.5).astype(np.uint8)
    sampler = BalancedSampler(8, scale=(0.5, 0.5))
    patch = sampler.draw(image, labels, np.empty(0, np.int32))
    expected = zoom(image[0], 0.5, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(patch.image[0].numpy(), expected, atol=1e-6)
    shares = zoom(labels.astype(np.float32), 0.5, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_array_equal(patch.labels.numpy(), shares >= LEAST_SHARE)


@pytest.mark.parametrize(
    ("radius", "least_dice"), [(2, 0.87), (2.5, 0.905), (5, 0.955), (15, 0.984)]
)
def test_labels_of_a_scaled_patch_are_the_balls_that_the_image_shows(
    radius: float, least_dice: float
):
    """Labels of the nearest voxels score .83, .85, .93 and .976 in this test."""
    rng = np.random.default_rng(0)
    shape = (96, 96, 96)
    lattice = (16, 48, 80) if radius < 10 else (28, 68)
    scores = []
    for scale in (0.9, 1.1):
        centres = [rng.uniform(-0.5, 0.5, 3) + voxel for voxel in product(lattice, repeat=3)]
        labels = in_any_ball(torch.from_numpy(ramp(shape)), centres, radius)
        sampler = BalancedSampler(80, scale=(scale, scale))
        torch.manual_seed(0)
        patch = sampler.draw(ramp(shape), labels.numpy().astype(np.uint8), np.empty(0, np.int32))
        # The image is the coordinates, so it says where in the volume each voxel of the patch lies.
        expected = in_any_ball(patch.image, centres, radius)
        common = ((patch.labels > 0) & expected).sum()
        scores.append(2 * common / ((patch.labels > 0).sum() + expected.sum()))
    assert np.mean(scores) >= least_dice


def in_any_ball(places: torch.Tensor, centres: list[np.ndarray], radius: float) -> torch.Tensor:
    """Make the mask (X, Y, Z) of the places (3, X, Y, Z) within a radius of any of the centres."""
    mask = torch.zeros(places.shape[1:], dtype=torch.bool)
    for centre in centres:
        away = [axis - float(middle) for axis, middle in zip(places.float(), centre, strict=True)]
        mask |= away[0] ** 2 + away[1] ** 2 + away[2] ** 2 <= radius**2
    return mask


def test_labels_at_scale_1_are_those_of_the_volume():
    labels = np.random.default_rng(0).choice([0, 1, 2, 4], SHAPE).astype(np.uint8)
    patch = BalancedSampler(8).draw(ramp(), labels, np.empty(0, np.int32))
    start = patch.image[:, 0, 0, 0].int().tolist()
    np.testing.assert_array_equal(patch.labels.numpy(), grids.cut(labels, start, (8, 8, 8)))


def test_torchio_queue_can_use_the_sampler_too():
    labels = labels_with((3, 3, 3))
    subject = tio.Subject(
        image=tio.ScalarImage(tensor=torch.from_numpy(ramp())),
        labels=tio.LabelMap(tensor=torch.from_numpy(labels)[None]),
    )
    patches = list(BalancedSampler(8)(subject, 6))
    assert [patch.spatial_shape for patch in patches] == [(8, 8, 8)] * 6
    assert sum(bool(patch["labels"].data.any()) for patch in patches) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"lesion_share": 1.5}, "lesion_share"), ({"scale": (1.1, 0.9)}, "scale")],
)
def test_nonsense_is_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        BalancedSampler(8, **arguments)


def test_no_random_volume_gives_a_mislabelled_patch():
    """Patches are as asked for with random volumes, lesions, patch sizes, halos and scales."""
    rng = np.random.default_rng(0)
    kinds = {True: 0, False: 0}
    for seed in range(150):
        torch.manual_seed(seed)
        shape = tuple(rng.integers(5, 26, 3))
        labels = (rng.random(shape) < rng.choice([0.0, 0.001, 0.01, 0.1])).astype(np.uint8)
        image = rng.standard_normal((1, *shape)).astype(np.float16)
        halo = int(rng.integers(0, 4))
        side = int(rng.integers(1, 9)) + 2 * halo
        lesion_in = str(rng.choice(["output", "patch"]))
        scale = (1.0, 1.0) if rng.random() < 0.3 else (0.7, 1.4)
        sampler = BalancedSampler(
            side, scale=scale, others="lesion_free", halo=halo, lesion_in=lesion_in  # pyright: ignore
        )  # fmt: skip
        margin = halo if lesion_in == "output" else 0
        inside = (slice(margin, side - margin),) * 3
        if labels.any():
            kinds[True] += 1
            patch = sampler.draw(image, labels, np.flatnonzero(labels))
            assert patch.labels[inside].any()
        if sampler.has_lesion_free_patch(labels):
            kinds[False] += 1
            assert not sampler.draw(image, labels, labels[:0]).labels[inside].any()
    assert min(kinds.values()) > 80


def test_free_starts_are_all_that_a_naive_search_finds():
    sampler = BalancedSampler(12, others="lesion_free", halo=4)
    labels = (np.random.default_rng(0).random((9, 8, 10)) < 0.03).astype(np.uint8)
    padded = np.pad(labels, 4)
    naive = [
        (x - 4, y - 4, z - 4)
        for x in range(9 - 4 + 1)
        for y in range(8 - 4 + 1)
        for z in range(10 - 4 + 1)
        if not padded[x + 4 : x + 8, y + 4 : y + 8, z + 4 : z + 8].any()
    ]
    assert 0 < len(naive) < 6 * 5 * 7
    assert list(map(tuple, sampler._lesion_free_starts(labels).tolist())) == naive


def test_a_volume_that_is_nearly_full_still_gives_its_free_box():
    labels = np.ones((12, 12, 12), np.uint8)
    labels[3:7, 5:9, 8:12] = 0
    sampler = BalancedSampler(4, others="lesion_free", scale=(0.9, 1.1))
    image = np.stack(np.meshgrid(*map(np.arange, labels.shape), indexing="ij")).astype(np.float16)
    for seed in range(5):
        torch.manual_seed(seed)
        patch = sampler.draw(image, labels, labels[:0])
        assert not patch.labels.any()
        assert patch.image[:, 0, 0, 0].tolist() == [3, 5, 8]
    with pytest.raises(ValueError, match="expected a lesion-free patch, found none in this volume"):
        sampler.draw(image, np.ones_like(labels), labels[:0])


def test_halo_may_reach_beyond_the_volume_but_the_output_not():
    labels = lesions_at((0, 0, 0), side=10)
    image = np.ones((1, 10, 10, 10), np.float16)
    sampler = BalancedSampler(12, halo=4)
    for seed in range(20):
        torch.manual_seed(seed)
        patch = sampler.draw(image, labels, np.flatnonzero(labels))
        assert patch.image[0, 4:8, 4:8, 4:8].all()
        assert patch.labels[4, 4, 4] == 1
        assert not patch.image[0, :4].any()


def test_patches_of_air_alone_are_those_that_are_zero_where_it_counts():
    rng = np.random.default_rng(0)
    sampler = BalancedSampler(8, scale=(0.6, 1.6), halo=2)
    labels = labels_with()
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        image = np.zeros((2, *SHAPE), np.float16)
        image[(rng.integers(2), *(rng.integers(side) for side in SHAPE))] = 1
        box = sampler.draw_box(image, labels, labels[:0])
        counted = sampler.patch(image, box).image[..., 2:-2, 2:-2, 2:-2]
        assert sampler._shows_air_alone(image, box) == (not counted.any())
        found.append(bool(counted.any()))
    assert 2 < sum(found) < 198
