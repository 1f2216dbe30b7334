"""The phantoms: what a reader, a trainer and a second machine may rely on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from datamodules import phantom
from datamodules.phantom import MODALITIES, Phantom, make_phantom, write_phantoms
from errors import InputError

ROOT = Path(__file__).parents[1]
SPACING_MM = 4.0
CASES = range(8)


def reoriented(case: Phantom, volume: np.ndarray) -> np.ndarray:
    image = nib.Nifti1Image(volume, case.affine)
    return np.asarray(nib.as_closest_canonical(image).dataobj)


def volume_ml(mask: np.ndarray, spacing_mm: float) -> float:
    return float(mask.sum() * spacing_mm**3 / 1000)


def healthy_tissue(index: int, spacing_mm: float) -> tuple[phantom._Tissue, tuple[slice, ...]]:
    """The tissue below the tumour, and where in the RAS field of view it lies."""
    draw = phantom._Draw(0, index)
    warp = phantom._warp(draw)
    survey = phantom._survey(draw, warp, phantom._foci(draw, warp))
    grid = survey.coarse.at(spacing_mm)
    return phantom._tissue(draw, survey, grid), grid.slices


@pytest.fixture(scope="module")
def cases() -> list[Phantom]:
    return [make_phantom(0, index, SPACING_MM) for index in CASES]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms")
    write_phantoms(root, 3, spacing_mm=6, seed=0, workers=1)
    return root


def volumes(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): np.asarray(
            nib.Nifti1Image.from_filename(path).dataobj
        ).tobytes()
        for path in sorted(root.glob("*/*/*.nii.gz"))
    }


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
        # Single voxels inside may round to zero; the background, never, to anything else.
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
        monkeypatch.setitem(phantom.CHANCES, "ras", share)
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
        near_mm = 60  # of the core: oedema does not turn up elsewhere
        near = binary_dilation(core, iterations=int(near_mm / SPACING_MM))
        assert oedema[near].sum() == oedema.sum()
    ratios = [np.sum(c.labels == 2) / np.isin(c.labels, (1, 4)).sum() for c in cases]
    assert 0.3 < np.median(ratios) < 3.5


def test_enhancement_belongs_to_high_grades(cases: list[Phantom]) -> None:
    enhances = {
        grade: [(case.labels == 4).any() for case in cases if case.grade == grade]
        for grade in ("HGG", "LGG")
    }
    assert np.mean(enhances["HGG"]) > 0.7
    assert np.mean(enhances["LGG"]) < 0.5


def test_oedema_follows_white_matter_and_spares_the_ventricles(cases: list[Phantom]) -> None:
    share: dict[str, list[float]] = {"white": [], "csf": []}
    for index in CASES[:6]:
        tissue, box = healthy_tissue(index, SPACING_MM)
        oedema = reoriented(cases[index], cases[index].labels)[box] == 2
        brain = tissue.depth_mm > 0
        share["white"].append(tissue.white[oedema].mean() / tissue.white[brain].mean())
        share["csf"].append(tissue.csf[oedema].mean() / tissue.csf[brain].mean())
    assert np.mean(share["white"]) > 1.4
    assert np.mean(share["csf"]) < 0.6


def test_measured_contrasts_lie_in_the_ranges_of_real_scans() -> None:
    """Medians over the median of white matter; the margin is for blur, bias and partial volume."""
    real = {  # the table of the design, in the order of MODALITIES
        "gm": [(0.65, 0.88), (0.66, 0.95), (0.92, 1.43), (0.91, 1.13)],
        "csf": [(0.36, 0.67), (0.25, 0.88), (1.8, 2.8), (0.34, 0.71)],
        "oedema": [(0.61, 1.0), (0.58, 1.08), (1.27, 1.77), (1.27, 1.64)],
        "core": [(0.32, 1.01), (0.32, 1.16), (1.38, 3.9), (1.09, 1.57)],
        "enhancing": [(0.65, 1.01), (1.1, 2.0), (1.46, 1.65), (1.27, 1.54)],
    }
    measured: dict[tuple[str, str], list[float]] = {}
    for index in CASES[:6]:
        case = make_phantom(0, index, 2)
        tissue, box = healthy_tissue(index, 2)
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
    assert phantom._Grid.whole(1.0).shape == (240, 240, 155)


def test_another_voxel_size_shows_the_same_patient() -> None:
    fine, coarse = make_phantom(0, 1, 1.5), make_phantom(0, 1, 3)
    halved = reoriented(fine, fine.labels) > 0
    halved = halved.reshape(80, 2, 80, 2, 52, 2).mean(axis=(1, 3, 5)) >= 0.5
    whole = reoriented(coarse, coarse.labels) > 0
    assert halved.sum() == pytest.approx(whole.sum(), rel=0.25)
    assert 2 * (halved & whole).sum() / (halved.sum() + whole.sum()) > 0.85


def test_files(written: Path) -> None:
    folders = sorted(written.glob("*GG/phantom_*"))
    assert [folder.name for folder in sorted(folders, key=lambda f: f.name)] == [
        f"phantom_{index:04d}" for index in range(3)
    ]
    for folder in folders:
        case = make_phantom(0, int(folder.name[-4:]), 6)
        assert folder.parent.name == case.grade
        for name, volume in {**case.images, "seg": case.labels}.items():
            image = nib.Nifti1Image.from_filename(folder / f"{folder.name}_{name}.nii.gz")
            assert image.get_data_dtype() == volume.dtype
            np.testing.assert_array_equal(image.dataobj, volume)
            for affine in (image.get_sform(), image.get_qform()):
                np.testing.assert_allclose(affine, case.affine, atol=1e-5)
    settings = json.loads((written / "phantoms.json").read_text())
    assert settings == {
        "version": phantom.VERSION,
        "seed": 0,
        "spacing_mm": 6.0,
        "kind": "glioma",
        "modalities": sorted(MODALITIES),
    }


def test_extending_keeps_what_is_there_and_equals_writing_at_once(
    written: Path, tmp_path: Path
) -> None:
    write_phantoms(tmp_path, 1, spacing_mm=6, seed=0, workers=1)
    first = next(tmp_path.glob("*/*/*_t1.nii.gz"))
    before = first.stat().st_mtime_ns
    write_phantoms(tmp_path, 3, spacing_mm=6, seed=0, workers=2)  # others, in other processes
    assert first.stat().st_mtime_ns == before
    assert volumes(tmp_path) == volumes(written)


def test_other_settings_are_refused(written: Path) -> None:
    before = volumes(written)
    for settings in ({"spacing_mm": 6, "seed": 1}, {"spacing_mm": 5, "seed": 0}):
        with pytest.raises(InputError, match=r"phantoms\.json") as error:
            write_phantoms(written, 4, **settings, workers=1)
        assert "\n" not in str(error.value)
        assert all(str(value) in str(error.value) for value in settings.values())
    assert volumes(written) == before


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="spacing_mm"):
        write_phantoms(tmp_path / "new", 1, spacing_mm=0, seed=0)
    with pytest.raises(InputError, match="count"):
        write_phantoms(tmp_path / "new", -1, spacing_mm=6, seed=0)
    assert not (tmp_path / "new").exists()


def test_a_case_that_fails_half_way_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = nib.save, []

    def full_disk(image: nib.Nifti1Image, path: Path) -> None:
        if saved:
            raise OSError("no space left on device")
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_phantoms(tmp_path, 1, spacing_mm=6, seed=0, workers=1)
    assert saved
    assert not list(tmp_path.glob("*GG/*"))
    assert not list(tmp_path.rglob("*.nii.gz"))

    monkeypatch.undo()
    write_phantoms(tmp_path, 1, spacing_mm=6, seed=0, workers=1)
    assert len(volumes(tmp_path)) == 5


def test_a_case_that_another_process_wrote_first_stays(written: Path) -> None:
    before = volumes(written)
    phantom._write_case(written, phantom._Settings(0, 6.0, "glioma", MODALITIES), 0)
    assert volumes(written) == before
    assert not [path for path in written.iterdir() if path.is_dir() and path.name.startswith(".")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "datamodules.phantom", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )


def test_command_line(written: Path, tmp_path: Path) -> None:
    done = run(str(tmp_path), "--cases", "1", "--spacing-mm", "6", "--seed", "0", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert set(volumes(tmp_path)) < set(volumes(written))

    refused = run(str(written), "--cases", "1", "--spacing-mm", "6", "--seed", "9")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


def test_help_and_typos_load_nothing_heavy() -> None:
    heavy = "import sys, datamodules.phantom as p; p.main(['--help'])"
    code = f"try:\n {heavy}\nfinally:\n print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "--spacing-mm" in done.stdout
    assert {"scipy", "nibabel", "nilearn", "rich", "torch"}.isdisjoint(done.stderr.split())

    start = time.monotonic()
    assert run("--casse", "1").returncode == 2
    assert time.monotonic() - start < 5  # under a second on an idle machine
