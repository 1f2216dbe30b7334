"""Preprocessing and its inverse, against oracles made by hand."""

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from datamodules.brats import BraTS
from datamodules.preprocessing import Preprocessing, on_scan_grid, restore
from errors import InputError
from tests.conftest import MODALITIES, affine_of, ball, make_arrays, write_case, write_image

SHAPE = (20, 24, 16)


@pytest.fixture
def make(tmp_path):
    """Write one case; returns it with its data set."""

    def make_case(images, labels, affine=None, **options):
        root = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        affine = np.eye(4) if affine is None else affine
        write_case(root / "A", images, labels, affine, prefix="A_")
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


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR"])
@pytest.mark.parametrize("spacing_mm", [1, 2])
def test_a_prediction_lies_beside_the_truth_on_disk(make, axes, spacing_mm):
    """What the crop cuts off is in the truth and is not predicted, whatever the axes on disk."""
    images, labels, _ = make_arrays()
    affine = affine_of(axes)
    case, data_set = make(images, labels, affine)
    volume = Preprocessing(spacing_mm, (8, 8, 8))(case, data_set)
    everywhere = np.ones((3, *volume.labels.shape), np.float32)
    found, truth, voxel_mm = on_scan_grid(case, data_set, volume.affine, everywhere)
    expected, ras = canonical(labels, affine)
    np.testing.assert_array_equal(truth, data_set.to_regions(expected))
    assert found.shape == truth.shape
    assert voxel_mm == pytest.approx((1, 1, 1))
    place_mm = coordinates_mm(expected.shape, ras)
    low = (volume.affine @ [0, 0, 0, 1])[:3, None, None, None]
    high = (volume.affine @ [*np.subtract(volume.labels.shape, 1), 1])[:3, None, None, None]
    inside = ((place_mm >= low - 1e-6) & (place_mm <= high + 1e-6)).all(0)
    assert found[0][inside].min() > 0.99
    assert not found[0][((place_mm < low - 2) | (place_mm > high + 2)).any(0)].any()
    assert (truth[0] & ~inside).any()


def test_without_a_mask_there_is_nothing_to_score(make):
    images, _, _ = make_arrays()
    case, data_set = make(images, None)
    with pytest.raises(InputError, match=r"^A: expected a mask to score"):
        on_scan_grid(case, data_set, np.eye(4), np.zeros((3, 4, 4, 4), np.float32))


# What cannot be used


def fails(message):
    return pytest.raises(InputError, match=f"^{message}$")


def test_volumes_on_another_grid_are_named(make):
    images, labels, _ = make_arrays()
    case, data_set = make(images, labels)
    t1, t2 = case.images["t1"], case.images["t2"]
    preprocess = Preprocessing(1, "brain")

    write_image(t2, images["t2"][:-1], np.eye(4))
    with fails(rf"{t2}: expected the grid of {t1}, found 19 x 24 x 16 voxels beside 20 x 24 x 16"):
        preprocess(case, data_set)
    for shift_mm in (0.2, -1.0):
        write_image(t2, images["t2"], affine_of("RAS", origin_mm=(0, shift_mm, 0)))
        size = f"{abs(shift_mm):.3g}"
        with fails(
            rf"{t2}: expected the grid of {t1}, found corners {size} mm \({size} voxels\) away: .*"
        ):
            preprocess(case, data_set)
    stretched = affine_of("RAS", (1, 1, 1.02), (0, 0, 0))  # the shift grows with the distance
    write_image(t2, images["t2"], stretched)
    with fails(rf"{t2}: .* found corners 0\.3 mm .*"):
        preprocess(case, data_set)
    write_image(t2, images["t2"], np.eye(4))
    assert case.mask is not None
    write_image(case.mask, labels, affine_of("RAS", origin_mm=(0, 0, 1)))
    with fails(rf"{case.mask}: expected the grid of {t1}, found corners 1 mm .*"):
        preprocess(case, data_set)


def test_rounding_in_headers_and_other_axis_orders_are_no_other_grid(make):
    images, labels, _ = make_arrays()
    case, data_set = make(images, labels)
    expected = Preprocessing(1, "brain")(case, data_set)
    write_image(case.images["t2"], images["t2"], affine_of("RAS", origin_mm=(0.05, 0, 0)))
    write_image(
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
    with fails(f"{case.images['t1']}: {message}"):
        Preprocessing(1, "brain")(case, data_set)


def test_an_outlier_that_would_press_all_others_together_is_named(make):
    images, labels, brain = make_arrays()
    images["t2"][tuple(np.argwhere(brain)[50])] = 3e37
    case, data_set = make(images, labels)
    with fails(rf"{case.images['t2']}: expected no outliers, found values from .* to 3e\+37 .*"):
        Preprocessing(1, "brain")(case, data_set)


def test_a_mask_in_the_air_is_named(make):
    images, _, brain = make_arrays()
    labels = np.zeros(brain.shape, np.uint8)
    labels[:3, :3, :3] = 2
    assert not (labels[brain] > 0).any()
    case, data_set = make(images, labels)
    with fails(f"{case.mask}: expected labels inside the brain, found 27 of 27 voxels outside it"):
        Preprocessing(1, "brain")(case, data_set)


def test_what_looks_wrong_is_logged(make, caplog):
    images, labels, _ = make_arrays()
    case, data_set = make({**images, "t1ce": images["t1"]}, labels)
    Preprocessing(1, "brain")(case, data_set)
    assert f"{case.images['t1ce']}: expected another image than t1, found the same" in caplog.text


def test_a_scan_that_is_not_stripped_is_named(make):
    images, labels, _ = make_arrays()
    images["flair"] = 500 + np.random.default_rng(0).normal(0, 60, SHAPE)
    case, data_set = make(images, labels)
    with fails(f"{case.images['flair']}: expected a skull-stripped brain on a constant .*"):
        Preprocessing(1, "brain")(case, data_set)


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_noise_in_the_air_changes_no_crop_and_hardly_a_value(make, noise):
    images, labels, brain = make_arrays((40, 44, 36))
    for modality, voxels in images.items():
        images[modality] = np.where(brain, 300 + 300 * voxels / np.ptp(voxels), 0)
    clean = Preprocessing(1, "brain")(*make(images, labels))
    rng = np.random.default_rng(0)
    for modality, voxels in images.items():
        air = np.abs(rng.normal(0, 300 * noise, voxels.shape))
        images[modality] = np.where(brain, voxels, air)
    found = Preprocessing(1, "brain")(*make(images, labels))
    assert found.image.shape == clean.image.shape
    assert dice(found.image != 0, clean.image != 0) > 0.98
    both = (found.image != 0) & (clean.image != 0)
    difference = np.abs(found.image.astype(float) - clean.image)[both]
    assert np.median(difference) < 0.05
    assert difference.max() < 0.5


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_voxels_that_are_no_numbers_are_counted(make, kind):
    images, labels, _ = make_arrays()
    case, data_set = make(images, labels)
    path = case.images["flair"] if kind == "image" else case.mask
    voxels = images["flair"] if kind == "image" else labels.astype(np.float32)
    voxels[3, 4, 5:7], voxels[1, 1, 1] = np.nan, np.inf
    write_image(path, voxels, np.eye(4))
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
