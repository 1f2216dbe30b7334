"""One phantom: it can be reproduced, and it looks like a patient."""

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from datamodules.phantom import MODALITIES, Phantom, make_phantom
from datamodules.phantom.anatomy import Tissue, build_geometry, healthy_tissue
from datamodules.phantom.fields import Grid, RandomStreams
from datamodules.phantom.gliomas import draw_enhancement, draw_foci, draw_grade
from datamodules.phantom.ranges import CHANCES
from datamodules.phantom.shape import draw_warp

SPACING_MM = 4.0
CASES = range(8)


def reoriented(case: Phantom, volume: np.ndarray) -> np.ndarray:
    """A volume of a case in RAS order."""
    image = nib.Nifti1Image(volume, case.affine)
    return np.asarray(nib.as_closest_canonical(image).dataobj)


def volume_ml(mask: np.ndarray, spacing_mm: float) -> float:
    return float(mask.sum() * spacing_mm**3 / 1000)


def tissue_of_glioma(index: int, spacing_mm: float) -> tuple[Tissue, tuple[slice, ...]]:
    """The healthy tissue that a glioma grows in, and where in the RAS field of view it lies."""
    random = RandomStreams(0, index)
    warp = draw_warp(random)
    geometry = build_geometry(random, warp, draw_foci(random, warp))
    grid = geometry.coarse.resized(spacing_mm)
    return healthy_tissue(random, geometry, grid), grid.slices


@pytest.fixture(scope="module")
def cases() -> list[Phantom]:
    return [make_phantom(0, index, SPACING_MM) for index in CASES]


def test_same_seed_and_index_give_the_same_voxels(cases: list[Phantom]) -> None:
    again = make_phantom(0, 3, SPACING_MM)
    np.testing.assert_array_equal(again.labels, cases[3].labels)
    for modality in MODALITIES:
        np.testing.assert_array_equal(again.images[modality], cases[3].images[modality])


def test_another_seed_or_index_is_another_patient(cases: list[Phantom]) -> None:
    brains = [reoriented(case, case.images["t1"]) != 0 for case in cases]
    brains.append(reoriented(other := make_phantom(1, 0, SPACING_MM), other.images["t1"]) != 0)
    for number, brain in enumerate(brains[1:]):
        assert np.mean(brains[number] ^ brain) > 0.005


def test_format(cases: list[Phantom]) -> None:
    for case in cases:
        assert tuple(case.images) == MODALITIES
        assert case.labels.dtype == np.uint8
        assert set(np.unique(case.labels)) <= {0, 1, 2, 4}
        assert case.grade in {"HGG", "LGG"}
        for image in case.images.values():
            assert image.dtype == np.int16
            assert image.shape == case.labels.shape == (60, 60, 39)


def test_background_is_zero_and_the_brain_is_the_same_in_all_modalities(
    cases: list[Phantom],
) -> None:
    for case in cases:
        nonzero = np.stack(list(case.images.values())) != 0
        brain = nonzero.any(axis=0)
        assert 700 < volume_ml(brain, SPACING_MM) < 2100
        # Single voxels of the brain may be rounded to zero. The background is always zero.
        assert nonzero.sum(axis=(1, 2, 3)).min() > 0.97 * brain.sum()
        assert not brain[[0, -1]].any()
        assert not case.labels[~brain].any()


def test_both_orientations_occur_and_show_the_same_patient(
    cases: list[Phantom], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {nib.aff2axcodes(case.affine) for case in cases}
    assert codes == {("L", "P", "S"), ("R", "A", "S")}

    turned = []
    for share in (0.0, 1.0):
        monkeypatch.setitem(CHANCES, "ras", share)
        turned.append(make_phantom(0, 0, 6))
    assert nib.aff2axcodes(turned[0].affine) == ("L", "P", "S")
    lps, ras = (
        nib.as_closest_canonical(nib.Nifti1Image(case.images["t1"], case.affine)) for case in turned
    )
    np.testing.assert_array_equal(lps.dataobj, ras.dataobj)
    np.testing.assert_allclose(lps.affine, ras.affine)


def test_tumours_are_nested_and_of_plausible_size(cases: list[Phantom]) -> None:
    for case in cases:
        core, oedema = np.isin(case.labels, (1, 4)), case.labels == 2
        assert 3 < volume_ml(core, SPACING_MM) < 200
        assert volume_ml(core | oedema, SPACING_MM) < 450
        near_mm = 60  # all oedema lies within this distance of the core
        near = binary_dilation(core, iterations=int(near_mm / SPACING_MM))
        assert oedema[near].sum() == oedema.sum()
    ratios = [np.sum(c.labels == 2) / np.isin(c.labels, (1, 4)).sum() for c in cases]
    assert 0.3 < np.median(ratios) < 3.5


def test_one_glioma_in_twelve_does_not_enhance_and_nearly_all_of_these_are_low_grades() -> None:
    count = 4000
    streams = [RandomStreams(5, index) for index in range(count)]
    grades = np.array([draw_grade(random) for random in streams])
    enhances = np.array([draw_enhancement(random) for random in streams])
    empty = int(np.sum(~enhances))
    within = 3 * np.sqrt(count * 1 / 12 * 11 / 12)  # three standard deviations of a binomial
    assert abs(empty - count / 12) < within
    assert np.mean(grades[~enhances] == "LGG") > 0.85


def test_label_maps_have_enhancing_tumour_where_the_case_enhances(cases: list[Phantom]) -> None:
    for index, case in zip(CASES, cases, strict=True):
        assert (case.labels == 4).any() == draw_enhancement(RandomStreams(0, index))


def test_oedema_follows_white_matter_and_spares_the_ventricles(cases: list[Phantom]) -> None:
    share: dict[str, list[float]] = {"white": [], "csf": []}
    for index in CASES[:6]:
        tissue, box = tissue_of_glioma(index, SPACING_MM)
        oedema = reoriented(cases[index], cases[index].labels)[box] == 2
        brain = tissue.depth_mm > 0
        share["white"].append(tissue.white[oedema].mean() / tissue.white[brain].mean())
        share["csf"].append(tissue.csf[oedema].mean() / tissue.csf[brain].mean())
    assert np.mean(share["white"]) > 1.4
    assert np.mean(share["csf"]) < 0.6


def test_measured_contrasts_lie_in_the_ranges_of_real_scans() -> None:
    """Compare medians relative to white matter; blur, bias and partial volume need a margin."""
    real = {  # measured on real scans, in the order of MODALITIES
        "gm": [(0.65, 0.88), (0.66, 0.95), (0.92, 1.43), (0.91, 1.13)],
        "csf": [(0.36, 0.67), (0.25, 0.88), (1.8, 2.8), (0.34, 0.71)],
        "oedema": [(0.61, 1.0), (0.58, 1.08), (1.27, 1.77), (1.27, 1.64)],
        "core": [(0.32, 1.01), (0.32, 1.16), (1.38, 3.9), (1.09, 1.57)],
        "enhancing": [(0.65, 1.01), (1.1, 2.0), (1.46, 1.65), (1.27, 1.54)],
    }
    measured: dict[tuple[str, str], list[float]] = {}
    for index in CASES[:6]:
        case = make_phantom(0, index, 2)
        tissue, box = tissue_of_glioma(index, 2)
        labels = reoriented(case, case.labels)[box]
        healthy = np.logical_not(binary_dilation(labels > 0, iterations=2))
        masks = {
            "white": healthy & (tissue.white > 0.95) & (tissue.depth_mm > 8),
            "gm": healthy & (tissue.grey > 0.9) & (tissue.depth_mm > 4),
            "csf": healthy & (tissue.csf > 0.95) & (tissue.depth_mm > 20),
            "oedema": labels == 2,
            "core": labels == 1,
            "enhancing": labels == 4,
        }
        for modality in MODALITIES:
            image = reoriented(case, case.images[modality])[box]
            white = np.median(image[masks["white"]])
            for name in real:
                if masks[name].sum() > 100:
                    ratio = np.median(image[masks[name]]) / white
                    measured.setdefault((name, modality), []).append(float(ratio))
    for (name, modality), ratios in measured.items():
        low, high = real[name][MODALITIES.index(modality)]
        margin = 0.15 * (low + high) / 2
        assert low - margin < np.median(ratios) < high + margin, (name, modality, ratios)
        inside = [low - 2 * margin < ratio < high + 2 * margin for ratio in ratios]
        assert np.mean(inside) >= 0.75, (name, modality, ratios)
    assert {name for name, _ in measured} == set(real)


def test_grid_of_one_mm_is_that_of_brats() -> None:
    assert Grid.whole(1.0).shape == (240, 240, 155)


def test_another_voxel_size_shows_the_same_patient() -> None:
    fine, coarse = make_phantom(0, 1, 1.5), make_phantom(0, 1, 3)
    halved = reoriented(fine, fine.labels) > 0
    halved = halved.reshape(80, 2, 80, 2, 52, 2).mean(axis=(1, 3, 5)) >= 0.5
    whole = reoriented(coarse, coarse.labels) > 0
    assert halved.sum() == pytest.approx(whole.sum(), rel=0.25)
    assert 2 * (halved & whole).sum() / (halved.sum() + whole.sum()) > 0.85
