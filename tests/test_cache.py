"""Preprocessing against hand-made oracles, and the cache on disk."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from datamodules import cache as cache_module
from datamodules.brats import BraTS
from datamodules.cache import Cache, Preprocessing, restore
from datamodules.cases import Case
from errors import InputError

SHAPE = (20, 24, 16)
MODALITIES = ("t1", "t1ce", "t2", "flair")


def affine_of(axes, spacing_mm=(1, 1, 1), origin_mm=(-40, 13, 7)):
    affine = np.zeros((4, 4))
    for axis, letter in enumerate(axes):
        row = next(row for row, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[row, axis] = spacing_mm[axis] * (1 if letter in "RAS" else -1)
    affine[:3, 3] = origin_mm
    affine[3, 3] = 1
    return affine


def ball(shape, centre, radius):
    distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - np.array(centre), axis=-1)
    return distance <= radius


def make_arrays(shape=SHAPE, seed=0, background=0.0):
    """An off-centre head with a three-label tumour, as arrays."""
    rng = np.random.default_rng(seed)
    x, y, z = np.array(shape) / 2
    brain = ball(shape, (x + 1, y - 2, z + 0.5), min(shape) / 2 - 2)
    labels = np.zeros(shape, np.uint8)
    for label, radius in ((2, 4.2), (1, 3.1), (4, 1.6)):
        labels[ball(shape, (x + 2, y - 3, z + 1), radius) & brain] = label
    images = {}
    for n, modality in enumerate(MODALITIES):
        voxels = 10**n * (rng.normal(3, 1, shape) + labels)  # below 0 here and there
        voxels[brain & (voxels == background)] += 1
        images[modality] = np.where(brain, voxels, background).astype(np.float32)
    return images, labels, brain


def write(path, voxels, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def write_case(root, name, images, labels, affine):
    folder = root / name
    for modality, voxels in images.items():
        write(folder / f"{name}_{modality}.nii.gz", voxels, affine)
    if labels is not None:
        write(folder / f"{name}_seg.nii.gz", labels, affine)


@pytest.fixture
def make(tmp_path):
    """Write one case; returns it with its data set."""

    def make_case(images, labels, affine=None, **options):
        root = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        write_case(root, "A", images, labels, np.eye(4) if affine is None else affine)
        data_set = BraTS(root, **options)
        return data_set.cases()[0], data_set

    return make_case


def canonical(voxels, affine):
    image = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))
    return np.asarray(image.dataobj), image.affine


def coordinates_mm(shape, affine):
    """Where each voxel is: (3, X, Y, Z)."""
    return np.einsum("ij,jxyz->ixyz", affine[:3], [*np.indices(shape), np.ones(shape)])


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# Preprocessing


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "IRA"])
def test_the_same_spacing_only_reorients_crops_and_standardises(make, axes):
    images, labels, brain = make_arrays()
    affine = affine_of(axes)
    volume = Preprocessing(1, "brain")(*make(images, labels, affine))

    ras_brain, ras_affine = canonical(brain.astype(np.uint8), affine)
    ras_labels, _ = canonical(labels, affine)
    low, high = np.argwhere(ras_brain).min(0), np.argwhere(ras_brain).max(0) + 1
    box = tuple(map(slice, low, high))
    assert volume.image.dtype == np.float16
    assert volume.labels.dtype == np.uint8
    np.testing.assert_array_equal(volume.labels, ras_labels[box])
    np.testing.assert_allclose(volume.affine @ (0, 0, 0, 1), ras_affine @ (*low, 1))
    np.testing.assert_allclose(volume.affine[:3, :3], ras_affine[:3, :3])
    assert volume.outside == {1: 0, 2: 0, 4: 0}
    for channel, voxels in zip(volume.image, images.values(), strict=True):
        inside = voxels[brain].astype(np.float64)
        expected = np.where(brain, (voxels - inside.mean()) / inside.std(), 0)
        expected, _ = canonical(expected, affine)
        np.testing.assert_allclose(channel, expected[box], atol=3e-3)
        assert not channel[ras_brain[box] == 0].any()


@pytest.mark.parametrize("background", [0.0, -3.6, 100.0])
def test_the_background_is_what_the_border_shows(make, background):
    images, labels, _ = make_arrays(background=background)
    zero, *_ = make_arrays()
    volume = Preprocessing(1, "brain")(*make(images, labels))
    expected = Preprocessing(1, "brain")(*make(zero, labels))
    assert volume.image.shape == expected.image.shape
    np.testing.assert_allclose(volume.image, expected.image, atol=1e-2)


def test_scale_and_offset_of_a_modality_do_not_matter(make):
    images, labels, brain = make_arrays()
    other = {m: np.where(brain, 10 * v + 500, 0).astype(np.float32) for m, v in images.items()}
    preprocess = Preprocessing(1, "brain")
    np.testing.assert_allclose(
        preprocess(*make(images, labels)).image, preprocess(*make(other, labels)).image, atol=3e-3
    )


def test_the_brain_is_the_union_and_each_modality_has_its_own_foreground(make):
    images, labels, brain = make_arrays()
    images["t2"][12:] = 0  # a field of view that cuts through the brain
    volume = Preprocessing(1, "brain")(*make(images, labels))
    low, high = np.argwhere(brain).min(0), np.argwhere(brain).max(0) + 1
    assert volume.labels.shape == tuple(high - low)
    t2 = volume.image[2].astype(np.float64)
    assert not t2[12 - low[0] :].any()
    imaged = brain[low[0] : 12, low[1] : high[1], low[2] : high[2]]
    np.testing.assert_allclose(t2[: 12 - low[0]][imaged].mean(), 0, atol=1e-3)
    np.testing.assert_allclose(t2[: 12 - low[0]][imaged].std(), 1, atol=1e-3)


def test_a_dark_voxel_inside_the_brain_is_tissue(make):
    images, labels, brain = make_arrays()
    voxel = tuple(np.argwhere(brain).mean(0).astype(int))
    images["t1"][voxel] = 0
    volume = Preprocessing(1, "brain")(*make(images, labels))
    inside = images["t1"][brain]
    place = tuple(voxel - np.argwhere(brain).min(0))
    assert volume.image[0][place] == pytest.approx(-inside.mean() / inside.std(), abs=3e-3)


@pytest.mark.parametrize("crop", [(10, 8, 6), (30, 10, 17), (41, 40, 39)])
def test_a_crop_in_mm_has_its_shape_whatever_the_scan_and_counts_what_it_loses(make, crop):
    images, labels, brain = make_arrays()
    volume = Preprocessing(1, crop)(*make(images, labels))
    assert volume.image.shape == (4, *crop)
    assert volume.labels.shape == crop

    ones = np.argwhere(brain)
    start = volume.affine[:3, 3]
    middle = start + (np.array(crop) - 1) / 2
    np.testing.assert_allclose(middle, (ones.min(0) + ones.max(0)) / 2, atol=0.5)
    missed = {1: 0, 2: 0, 4: 0}
    for voxel in np.argwhere(labels):
        inside = all(0 <= voxel[i] - start[i] < crop[i] for i in range(3))
        if inside:
            assert volume.labels[tuple((voxel - start).astype(int))] == labels[tuple(voxel)]
        else:
            missed[int(labels[tuple(voxel)])] += 1
    assert volume.outside == missed
    assert (volume.labels > 0).sum() + sum(missed.values()) == (labels > 0).sum()


def test_without_a_mask_the_images_are_the_same(make):
    images, labels, _ = make_arrays()
    preprocess = Preprocessing(1.5, "brain")
    with_mask = preprocess(*make(images, labels))
    without = preprocess(*make(images, None))
    np.testing.assert_array_equal(with_mask.image, without.image)
    np.testing.assert_array_equal(with_mask.affine, without.affine)
    assert without.labels.shape == with_mask.labels.shape
    assert not without.labels.any()
    assert without.outside == {}


def test_two_modalities_are_two_channels_in_their_order(make):
    images, labels, _ = make_arrays()
    every = Preprocessing(1, "brain")(*make(images, labels)).image
    two = Preprocessing(1, "brain")(*make(images, labels, modalities=("flair", "t1"))).image
    np.testing.assert_array_equal(two, every[[3, 0]])


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (1, 1, 3), (0.7, 1.3, 2.5)])
@pytest.mark.parametrize("new_mm", [1.0, 1.5, 2.0])
def test_resampled_voxels_are_where_their_affine_says(make, spacing_mm, new_mm):
    """Images that hold their own coordinates hold them after resampling too."""
    shape, affine = (30, 32, 26), affine_of("LSP", spacing_mm)
    middle_mm = (affine @ (14, 17, 12, 1))[:3]
    mm = coordinates_mm(shape, affine)
    brain = np.linalg.norm(mm.T - middle_mm, axis=-1).T < 9.5
    images = {m: np.where(brain, mm[n % 3], 1e3) for n, m in enumerate(MODALITIES)}
    volume = Preprocessing(new_mm, "brain")(*make(images, None, affine))

    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), new_mm)
    new = coordinates_mm(volume.labels.shape, volume.affine)
    # Voxels whose neighbourhood is all brain; at the rim the weights are lopsided.
    inner = np.linalg.norm(new.T - middle_mm, axis=-1).T < 5
    assert inner.sum() > 50
    for n in range(3):
        slope, intercept = np.polyfit(new[n][inner], volume.image[n][inner].astype(float), 1)
        fitted = slope * new[n][inner] + intercept
        assert slope > 0
        np.testing.assert_allclose(volume.image[n][inner], fitted, atol=0.02)
        # And the zero of the z-score is the head's middle.
        assert -intercept / slope == pytest.approx(mm[n][brain].mean(), abs=0.3)


def test_a_coarser_grid_averages_and_does_not_pick(make):
    """White noise loses its variance: a picked voxel would keep it."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (24, 24, 24)).astype(np.float32)
    smooth = np.indices((24, 24, 24))[0] / 4 + noise
    brain = ball((24, 24, 24), (12, 12, 12), 11)
    images = {m: np.where(brain, smooth, 99).astype(np.float32) for m in MODALITIES}
    image = Preprocessing(3, "brain")(*make(images, None)).image[0].astype(float)
    x = np.indices(image.shape)[0][image != 0]
    residual = image[image != 0] - np.polyval(np.polyfit(x, image[image != 0], 1), x)
    # The z-score divides by sqrt(ramp + noise), about sqrt(1.6 + 1): picked voxels would keep 0.4.
    assert residual.var() < 0.1


def test_resampled_labels_are_majorities_and_never_new_values(make):
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[2:10, 2:10, 2:10] = 1
    labels[4:8, 4:8, 4:8] = 4  # 2.5 between would be an invented label
    images = {m: np.indices(labels.shape)[0] + 1.0 for m in MODALITIES}
    for voxels in images.values():
        voxels[[0, -1]] = voxels[:, [0, -1]] = voxels[:, :, [0, -1]] = 0
    volume = Preprocessing(2, (12, 12, 12))(*make(images, labels))
    blocks = labels.reshape(6, 2, 6, 2, 6, 2).transpose(0, 2, 4, 1, 3, 5).reshape(6, 6, 6, 8)
    np.testing.assert_array_equal(volume.labels, blocks.max(-1))  # every block has one value here


def test_a_tie_goes_to_the_lesion(make):
    images, _, brain = make_arrays((16, 16, 16))
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[7:9, 6:10, 6:10] = 2  # half of two layers of 2 mm voxels
    assert brain[labels > 0].all()
    volume = Preprocessing(2, "brain")(*make(images, labels))
    assert (volume.labels == 2).sum() == 2 * 2 * 2


# Back to the original grid


def rotated(degrees):
    affine = affine_of("LPS")
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ affine[:3, :3]
    return affine


@pytest.mark.parametrize("crop", ["brain", (17, 30, 12), (30, 30, 30)])
@pytest.mark.parametrize(
    "affine", [affine_of(axes) for axes in ("RAS", "LPS", "PSR", "AIL")] + [rotated((5, -9, 12))]
)
def test_at_equal_spacing_restoring_is_the_exact_inverse(make, affine, crop):
    images, labels, _ = make_arrays()
    case, data_set = make(images, labels, affine)
    volume = Preprocessing(1, crop)(case, data_set)
    rng = np.random.default_rng(0)
    probabilities = rng.random((2, *volume.labels.shape), dtype=np.float32)

    assert case.mask is not None
    regions = restore(data_set.to_regions(volume.labels), volume.affine, case.mask)
    assert regions.dtype == np.float32
    restored = data_set.to_labels(regions > 0.5)
    # What the crop cut away cannot come back.
    lost = sum(volume.outside.values())
    assert (restored != labels).sum() == lost
    assert (restored[restored > 0] == labels[restored > 0]).all()
    if crop != (17, 30, 12):
        np.testing.assert_array_equal(restored, labels)

    back = restore(probabilities, volume.affine, case.mask)
    assert back.shape == (2, *SHAPE)
    assert set(np.unique(back)) <= set(np.unique(probabilities)) | {0}
    # Independently: nibabel's own way to the same place.
    canonical_back, ras_affine = canonical(np.moveaxis(back, 0, -1), affine)
    start = np.rint(np.linalg.inv(ras_affine) @ volume.affine)[:3, 3].astype(int)
    margin = 30  # the crop may reach beyond the scan: paste it into more space, cut the scan out
    space = np.zeros(np.add(canonical_back.shape, (2 * margin, 2 * margin, 2 * margin, 0)))
    place = tuple(
        slice(margin + i, margin + i + n) for i, n in zip(start, volume.labels.shape, strict=True)
    )
    space[place] = np.moveaxis(probabilities, 0, -1)
    np.testing.assert_array_equal(canonical_back, space[(slice(margin, -margin),) * 3])


@pytest.mark.parametrize("affine", [affine_of("LPS"), affine_of("PSR"), rotated((5, -9, 12))])
def test_from_2_mm_a_lesion_comes_back_nearly_whole(make, affine):
    images, _, _ = make_arrays((24, 24, 24))
    labels = (2 * ball((24, 24, 24), (13.2, 9.4, 12.1), 6.3)).astype(np.uint8)
    case, data_set = make(images, labels, affine)
    volume = Preprocessing(2, "brain")(case, data_set)
    regions = restore(data_set.to_regions(volume.labels), volume.affine, case.images["t1"])
    assert regions.shape == (3, 24, 24, 24)
    assert regions.min() >= 0
    assert regions.max() <= 1
    assert dice(regions[0] >= 0.5, labels == 2) > 0.9
    assert not regions[1:].any()


def test_a_reference_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.nii").write_text("x")
    with pytest.raises(InputError, match=f"^{tmp_path}/a.nii: expected a readable NIfTI file"):
        restore(np.zeros((1, 2, 2, 2), np.float32), np.eye(4), tmp_path / "a.nii")


# What cannot be used


def fails(message):
    return pytest.raises(InputError, match=f"^{message}$")


def test_volumes_on_another_grid_are_named(make):
    images, labels, _ = make_arrays()
    case, data_set = make(images, labels)
    t1, t2 = case.images["t1"], case.images["t2"]
    preprocess = Preprocessing(1, "brain")

    write(t2, images["t2"][:-1], np.eye(4))
    with fails(
        rf"{t2}: expected the grid of {t1}, found shape \(19, 24, 16\) beside \(20, 24, 16\)"
    ):
        preprocess(case, data_set)
    for shift_mm in (0.2, -1.0):
        write(t2, images["t2"], affine_of("RAS", origin_mm=(0, shift_mm, 0)))
        size = f"{abs(shift_mm):.3g}"
        with fails(
            rf"{t2}: expected the grid of {t1}, found corners {size} mm \({size} voxels\) away"
        ):
            preprocess(case, data_set)
    write(t2, images["t2"], affine_of("RAS", (1, 1, 1.02), (0, 0, 0)))  # grows with the distance
    with fails(rf"{t2}: .* found corners 0\.3 mm .*"):
        preprocess(case, data_set)
    write(t2, images["t2"], np.eye(4))
    assert case.mask is not None
    write(case.mask, labels, affine_of("RAS", origin_mm=(0, 0, 1)))
    with fails(rf"{case.mask}: expected the grid of {t1}, found corners 1 mm .*"):
        preprocess(case, data_set)


def test_rounding_in_headers_and_other_axis_orders_are_no_other_grid(make):
    images, labels, _ = make_arrays()
    case, data_set = make(images, labels)
    expected = Preprocessing(1, "brain")(case, data_set)
    write(case.images["t2"], images["t2"], affine_of("RAS", origin_mm=(0.05, 0, 0)))
    write(
        case.images["t1ce"],
        np.ascontiguousarray(images["t1ce"][::-1, ::-1]),
        affine_of("LPS", origin_mm=(SHAPE[0] - 1, SHAPE[1] - 1, 0)),
    )
    volume = Preprocessing(1, "brain")(case, data_set)
    np.testing.assert_array_equal(volume.image, expected.image)
    np.testing.assert_array_equal(volume.affine, expected.affine)


def test_images_without_contrast_are_named(make):
    images, labels, brain = make_arrays()
    images["t2"] = np.where(brain, 7, 0).astype(np.float32)
    message = "expected different values in the brain, found one or no brain"
    for spacing_mm in (1, 2):
        case, data_set = make(images, labels)
        with fails(f"{case.images['t2']}: {message}"):
            Preprocessing(spacing_mm, "brain")(case, data_set)
    images["t2"][:] = 7  # everywhere, so that there is no foreground at all
    case, data_set = make(images, labels)
    with fails(f"{case.images['t2']}: {message}"):
        Preprocessing(1, "brain")(case, data_set)
    case, data_set = make({m: np.full(SHAPE, 5.0) for m in images}, labels)
    files = ", ".join(map(str, case.images.values()))
    with fails(f"{files}: expected a brain, found one value in every voxel"):
        Preprocessing(1, "brain")(case, data_set)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_voxels_that_are_no_numbers_are_counted(make, kind):
    images, labels, _ = make_arrays()
    case, data_set = make(images, labels)
    path = case.images["flair"] if kind == "image" else case.mask
    voxels = images["flair"] if kind == "image" else labels.astype(np.float32)
    voxels[3, 4, 5:7], voxels[1, 1, 1] = np.nan, np.inf
    write(path, voxels, np.eye(4))
    with fails(f"{path}: expected finite voxels, found 3 NaN or infinite"):
        Preprocessing(1, "brain")(case, data_set)


@pytest.mark.parametrize(
    ("spacing_mm", "crop", "message"),
    [
        (0, "brain", "spacing_mm: expected more than 0, found 0"),
        (1, "head", 'crop: expected "brain" or three extents in mm, found "head"'),
        (1, (10, 10), r'crop: expected "brain" or .* at least 1 mm, found \[10, 10\]'),
        (2, (10, 10, 1), r'crop: expected "brain" or .* at least 2 mm, found \[10, 10, 1\]'),
    ],
)
def test_options_without_a_meaning_are_named(spacing_mm, crop, message):
    with fails(message):
        Preprocessing(spacing_mm, crop)


# The cache


@pytest.fixture
def data_set(tmp_path):
    """Three cases: a tumour, a mask without one, no mask."""
    for seed, name in enumerate("ABC"):
        images, labels, _ = make_arrays(seed=seed)
        mask = {"A": labels, "B": np.zeros_like(labels), "C": None}[name]
        write_case(tmp_path / "data", name, images, mask, affine_of("LPS"))
    return BraTS(tmp_path / "data")


def written(folder):
    """Path -> time of last change, for every array in a cache."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*.npy"))}


def age(path):
    """Make a file look changed."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_what_is_cached_is_what_preprocessing_makes(tmp_path, data_set):
    cache = Cache(tmp_path / "cache", 1, (14, 10, 12), workers=2)
    cases = data_set.cases()
    cached = cache.build(cases[::-1], data_set)

    assert [case.name for case in cached] == ["C", "B", "A"]
    assert [case.has_mask for case in cached] == [False, True, True]
    for case, done in zip(cases[::-1], cached, strict=True):
        volume = Preprocessing(1, (14, 10, 12))(case, data_set)
        assert done.case == case
        assert done.folder == tmp_path / "cache" / cache.key(data_set) / case.name
        for array, expected, dtype in (
            (done.image, volume.image, np.float16),
            (done.labels, volume.labels, np.uint8),
            (done.lesion, [i for i, label in enumerate(volume.labels.flat) if label], np.int32),
        ):
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, expected)
        assert done.outside == volume.outside
        np.testing.assert_array_equal(done.affine, volume.affine)
    assert cached[2].lesion.size > 0
    assert cached[1].lesion.size == cached[0].lesion.size == 0
    assert sum(cached[2].outside.values()) > 0


def test_arrays_are_memory_mapped_read_only_and_opened_once(tmp_path, data_set):
    (case,) = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases()[:1], data_set)
    for name in ("image", "labels", "lesion"):
        array = getattr(case, name)
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert array.flags.c_contiguous
        assert getattr(case, name) is array


def test_a_pickled_case_leaves_its_arrays_behind(tmp_path, data_set):
    (case,) = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases()[:1], data_set)
    before = len(pickle.dumps(case))
    image = np.array(case.image)
    assert len(pickle.dumps(case)) == before < 2000
    copy = pickle.loads(pickle.dumps(case))
    assert "image" not in vars(copy)
    np.testing.assert_array_equal(copy.image, image)
    assert (copy.case, copy.outside) == (case.case, case.outside)


def test_complete_cases_are_not_touched_and_changed_ones_are_rebuilt(tmp_path, data_set, capsys):
    cache = Cache(tmp_path / "cache", 1, "brain")
    cases = data_set.cases()
    cache.build(cases, data_set)
    assert "preprocessing" in capsys.readouterr().out
    first = written(tmp_path / "cache")
    assert len(first) == 9

    cache.build(cases, data_set)
    assert written(tmp_path / "cache") == first
    assert capsys.readouterr().out == ""  # nothing to do, nothing to say

    age(cases[1].images["t2"])
    cache.build(cases, data_set)
    second = written(tmp_path / "cache")
    assert {path.parent.name for path in first if second[path] != first[path]} == {"B"}

    images, _, _ = make_arrays(seed=1)
    write(cases[2].images["t1"], 2 * images["t1"] + images["flair"], affine_of("LPS"))
    before = np.array(cache.build(cases, data_set)[2].image)
    np.testing.assert_array_equal(before, Preprocessing(1, "brain")(cases[2], data_set).image)


def test_a_mask_that_appears_or_goes_is_a_change(tmp_path, data_set):
    cache = Cache(tmp_path / "cache", 1, "brain")
    assert cache.build(data_set.cases(), data_set)[0].lesion.size > 0
    data_set.cases()[0].mask.unlink()
    (case, *_) = cache.build(data_set.cases(), data_set)
    assert not case.has_mask
    assert case.lesion.size == 0


def test_a_data_set_may_move(tmp_path, data_set):
    cache = Cache(tmp_path / "cache", 1, "brain")
    cache.build(data_set.cases(), data_set)
    first = written(tmp_path / "cache")
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    moved = BraTS(tmp_path / "elsewhere")
    cases = cache.build(moved.cases(), moved)
    assert written(tmp_path / "cache") == first
    assert cases[0].case.images["t1"].is_file()


def test_the_key_stands_for_what_determines_the_arrays(tmp_path, monkeypatch):
    class Other(BraTS):
        pass

    brats = BraTS(tmp_path)
    keys = [
        Cache(tmp_path, 1, "brain").key(brats),
        Cache(tmp_path, 2, "brain").key(brats),
        Cache(tmp_path, 1, (10, 10, 10)).key(brats),
        Cache(tmp_path, 1, (10, 10, 11)).key(brats),
        Cache(tmp_path, 1, "brain").key(BraTS(tmp_path, modalities=("t1", "t2"))),
        Cache(tmp_path, 1, "brain").key(BraTS(tmp_path, modalities=("t2", "t1"))),
        Cache(tmp_path, 1, "brain").key(Other(tmp_path)),
    ]
    monkeypatch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
    keys.append(Cache(tmp_path, 1, "brain").key(brats))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    same = Cache(tmp_path / "x", 1.0, "brain", workers=3).key(
        BraTS(tmp_path / "y", regions=("ET",))
    )
    assert same == keys[0]
    assert re.fullmatch("[0-9a-f]{12}", same)
    assert Cache(tmp_path, 1, [10.0, 10, 10]).key(brats) == keys[2]


def test_a_failing_case_is_named_and_the_others_stay(tmp_path, data_set):
    cases = data_set.cases()
    broken = cases[1].images["t1ce"]
    broken.write_bytes(broken.read_bytes()[:500])
    cache = Cache(tmp_path / "cache", 1, "brain", workers=1)
    with fails(f"{broken}: expected a readable NIfTI file, found: .*"):
        cache.build(cases, data_set)
    folder = tmp_path / "cache" / cache.key(data_set)
    finished = {path.name for path in folder.iterdir() if path.is_dir()}
    assert finished in ({"A"}, {"A", "C"})  # C only if it had begun when B failed

    first = written(tmp_path / "cache")
    images, *_ = make_arrays(seed=1)
    write(broken, images["t1ce"], affine_of("LPS"))
    assert len(cache.build(cases, data_set)) == 3
    assert first.items() <= written(tmp_path / "cache").items()


def test_an_interruption_leaves_nothing_half_written(tmp_path, data_set, monkeypatch):
    cache = Cache(tmp_path / "cache", 1, "brain", workers=1)
    save = np.save

    def interrupted(path, array):
        if Path(path).name == "labels.npy":
            raise KeyboardInterrupt
        save(path, array)

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.build(data_set.cases(), data_set)
    assert written(tmp_path / "cache") == {}
    monkeypatch.undo()
    # And what a killed process left behind is in nobody's way.
    partial = tmp_path / "cache" / cache.key(data_set) / ".A.partial"
    partial.mkdir()
    (partial / "image.npy").write_text("half")
    assert len(cache.build(data_set.cases(), data_set)) == 3
    assert not partial.exists()


def test_sources_that_vanish_are_named(tmp_path, data_set):
    case = Case("A", {"t1": tmp_path / "gone.nii"}, None)
    with fails(f"{tmp_path}/gone.nii: expected a file, found: No such file or directory"):
        Cache(tmp_path / "cache", 1, "brain").build(
            [case], BraTS(tmp_path / "data", modalities=("t1",))
        )


def test_the_same_files_give_the_same_bytes(tmp_path, data_set):
    for root in ("one", "two"):
        workers = 1 if root == "one" else 3
        Cache(tmp_path / root, 1.5, "brain", workers).build(data_set.cases(), data_set)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 3 * (4 + 1)  # arrays, case.json; the lock
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_a_case_was_made_from_is_beside_it(tmp_path, data_set):
    (case,) = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases()[:1], data_set)
    facts = json.loads((case.folder / "case.json").read_text())
    status = case.case.images["t1"].stat()
    assert facts["sources"]["t1"] == {
        "file": "A_t1.nii.gz",
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    assert set(facts["sources"]) == {*MODALITIES, "mask"}
    assert (facts["version"], facts["spacing_mm"], facts["crop"]) == (1, 1.0, "brain")


class _Slow(Preprocessing):
    """Notes which cases it is asked for, and leaves time for a collision."""

    def __init__(self) -> None:
        super().__init__(1, "brain")
        self.asked_for: list[str] = []

    def __call__(self, case, data_set):
        self.asked_for.append(case.name)
        time.sleep(0.3)
        return super().__call__(case, data_set)


def build_in_another_process(root, name):
    """Cases that this process preprocessed itself, and all that it got."""
    cache = Cache(root / "cache", 1, "brain", workers=1)
    cache.preprocessing = slow = _Slow()
    data_set = BraTS(root / "data")
    (root / f"{name}.ready").touch()
    while len(list(root.glob("*.ready"))) < 2:
        time.sleep(0.01)
    cached = cache.build(data_set.cases(), data_set)
    return slow.asked_for, [(case.name, case.image.sum()) for case in cached]


def test_two_processes_share_the_work(tmp_path):
    for seed in range(6):
        images, labels, _ = make_arrays(seed=seed)
        write_case(tmp_path / "data", f"case{seed}", images, labels, np.eye(4))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        futures = [pool.submit(build_in_another_process, tmp_path, name) for name in "ab"]
        (mine, my_cases), (yours, your_cases) = (future.result(timeout=60) for future in futures)
    assert sorted(mine + yours) == [f"case{seed}" for seed in range(6)]  # each of them once
    assert mine
    assert yours
    assert my_cases == your_cases
