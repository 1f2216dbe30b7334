"""From new cases to label maps on their own grid, with pictures; and what cannot be predicted."""

import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import train
from datamodules.brats import BraTS
from datamodules.cases import Case
from datamodules.nifti import description
from errors import InputError
from experiments import trained
from experiments.prediction import MARK, ROWS_NAME, SETTINGS_NAME, Predictor, predict_folder
from tests.conftest import ROOT, write_brats, write_image

Compose = Callable[..., DictConfig]


@pytest.fixture
def bright(composed: Compose, tiny: list[str], bright_networks: None) -> Path:
    """A checkpoint whose network is replaced by `BrighterThan` when it is loaded."""
    config = composed(*tiny, "logger=csv", "trainer.max_epochs=1", "trainer=debug")
    train.train(config)
    return Path(config.run_dir) / "best.ckpt"


def options(**values: object) -> dict:
    """Read conf/predict.yaml and change some of its values."""
    config = OmegaConf.merge(
        OmegaConf.load(ROOT / "conf" / "predict.yaml"),
        {"device": "cpu"},
        {name: str(value) if isinstance(value, Path) else value for name, value in values.items()},
    )
    return dict(OmegaConf.to_container(config))  # pyright: ignore


def predict(
    checkpoint: Path | list[Path], source: Path, output: Path, **values: object
) -> list[str]:
    """Predict as the command line does, with some values of conf/predict.yaml changed."""
    paths = checkpoint if isinstance(checkpoint, list) else [checkpoint]
    predictor = Predictor.from_options(
        options(checkpoint=[str(path) for path in paths], **values)
    ).in_folder(source)
    return predictor(predictor.data_set.cases(), output)


def reorient(folder: Path, codes: str) -> None:
    """Store all files of a folder in another orientation, with the origin outside the brain."""
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        affine = image.affine.copy()
        affine[:3, 3] = (-30, 40, 7)
        image = nib.Nifti1Image(np.asanyarray(image.dataobj), affine)
        turn = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
        nib.save(image.as_reoriented(turn), path)


@pytest.mark.process
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
def test_label_maps_lie_on_the_grid_of_the_case(bright: Path, tmp_path: Path, codes: str):
    new = write_brats(tmp_path / "new", cases=2)
    reorient(new, codes)
    predict(bright, new, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *(f"BraTS2021_0000{i}.{end}" for i in range(2) for end in ("nii.gz", "png")),
        SETTINGS_NAME,
        ROWS_NAME,
    ]
    for case in sorted(new.iterdir()):
        reference = nib.load(case / f"{case.name}_t1.nii.gz")
        found = nib.load(tmp_path / "out" / f"{case.name}.nii.gz")
        assert found.shape == reference.shape
        assert found.get_data_dtype() == np.uint8
        assert "".join(nib.aff2axcodes(found.affine)) == codes
        np.testing.assert_array_equal(found.affine, reference.affine)
        labels = np.asanyarray(found.dataobj)
        truth = np.asanyarray(nib.load(case / f"{case.name}_seg.nii.gz").dataobj)
        assert set(np.unique(labels)) <= {0, 1, 2, 4}
        # The tumour is all that is bright, so its outline is predicted without an error.
        np.testing.assert_array_equal(labels > 0, truth > 0)


@pytest.mark.process
def test_cases_without_masks_are_predicted(bright: Path, tmp_path: Path):
    new = write_brats(tmp_path / "new", cases=1, with_masks=False)
    predict(bright, new, tmp_path / "out")
    assert (tmp_path / "out/BraTS2021_00000.nii.gz").is_file()
    with Image.open(tmp_path / "out/BraTS2021_00000.png") as picture:
        assert np.asarray(picture).std() > 10


@pytest.mark.process
def test_scores_are_printed_where_there_are_masks(bright: Path, tmp_path: Path, capsys):
    new = write_brats(tmp_path / "new", cases=1)
    predict(bright, new, tmp_path / "out", pictures=False)
    assert "WT 1.000" in capsys.readouterr().out


def rows_in(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / ROWS_NAME).open() as file:
        return {row["case"]: row for row in csv.DictReader(file)}


@pytest.mark.process
def test_each_case_has_a_row_of_volumes_and_of_what_is_expected(
    bright: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """All mirror images of this network are alike, so that it agrees with itself: Σp² / Σp."""
    new, out = write_brats(tmp_path / "new", cases=2), tmp_path / "out"
    for path in new.rglob("*.nii.gz"):
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1, -1, 1])), path)
    next(new.rglob("*00001_t1.nii.gz")).unlink()
    predict(bright, new, out, pictures=False, probabilities=True, flips=True)
    printed = " ".join(capsys.readouterr().out.split())
    rows = rows_in(out)
    assert list(rows) == ["BraTS2021_00000", "BraTS2021_00001"]
    assert [row["missing"] for row in rows.values()] == ["", "t1"]
    for name, row in rows.items():
        labels = np.asanyarray(nib.load(out / f"{name}.nii.gz").dataobj)
        found = np.asanyarray(nib.load(out / f"{name}_probabilities.nii.gz").dataobj)
        assert float(row["seconds"]) > 0
        for channel, (region, own) in enumerate({"WT": (1, 2, 4), "TC": (1, 4), "ET": 4}.items()):
            assert float(row[f"volume_mm3_{region}"]) == np.isin(labels, own).sum() > 0
            p = found[..., channel].astype(float)
            expected = (p**2).sum() / p.sum()
            assert float(row[f"expected_{region}"]) == pytest.approx(expected, abs=0.003)
        assert f"expected Dice WT {float(row['expected_WT']):.2f}" in printed


@pytest.mark.process
def test_rows_are_kept_with_their_label_maps_and_one_estimate_expects_nothing(
    bright: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    new, out = write_brats(tmp_path / "new", cases=3), tmp_path / "out"
    predict(bright, new, out, pictures=False)
    assert "expected" not in capsys.readouterr().out
    before = rows_in(out)
    assert {row["expected_WT"] for row in before.values()} == {"nan"}
    # Of three cases, one lacks its label map, one its row, and both are predicted anew.
    (out / "BraTS2021_00000.nii.gz").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    lines = (out / ROWS_NAME).read_text().splitlines(keepends=True)
    (out / ROWS_NAME).write_text("".join(line for line in lines if "_00001" not in line))
    predict(bright, new, out, pictures=False)
    rows = rows_in(out)
    assert list(rows) == list(before)
    assert rows["BraTS2021_00002"] == before["BraTS2021_00002"]
    times = [{**row, "seconds": ""} for row in (*rows.values(), *before.values())]
    assert times[:3] == times[3:]
    anew = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns > stamp]
    assert [path.name for path in anew] == ["BraTS2021_00001.nii.gz"]
    # A case that fails keeps no row of earlier scans.
    broken = next(new.rglob("*00001_t2.nii.gz"))
    broken.write_bytes(broken.read_bytes()[:200])
    assert predict(bright, new, out, pictures=False) == ["BraTS2021_00001"]
    assert list(rows_in(out)) == ["BraTS2021_00000", "BraTS2021_00002"]
    # Other thresholds: the rows are theirs, of the same cases.
    predict(bright, new, out, pictures=False, thresholds=0.9, again=True)
    assert list(rows_in(out)) == ["BraTS2021_00000", "BraTS2021_00002"]


def rewrite_et(folder: Path, label: int) -> None:
    """Give ET another label in all masks of a folder."""
    for path in folder.rglob("*_seg.nii.gz"):
        mask = nib.load(path)
        labels = np.asanyarray(mask.dataobj)
        labels = np.where(labels == 4, label, labels).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, mask.affine), path)


def labels_in(path: Path) -> set[int]:
    return set(np.unique(np.asanyarray(nib.load(path).dataobj)).tolist())


@pytest.mark.process
@pytest.mark.parametrize(
    ("masks", "et_label", "expected"), [(3, None, 3), (4, None, 4), (None, None, 4), (None, 3, 3)]
)
def test_et_has_the_label_of_the_input_even_if_the_training_folder_is_gone(
    bright: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    masks: int | None,
    et_label: int | None,
    expected: int,
):
    read = BraTS.cases

    def cases(data_set: BraTS) -> list[Case]:
        if data_set.root != tmp_path / "new":
            raise InputError(f"{data_set.root}: no such folder")
        return read(data_set)

    monkeypatch.setattr(BraTS, "cases", cases)
    new = write_brats(tmp_path / "new", cases=1, with_masks=masks is not None)
    if masks is not None:
        rewrite_et(new, masks)
    values = {"input": new, "output": tmp_path / "out", "et_label": et_label}
    predict_folder(options(checkpoint=bright, pictures=False, **values))
    assert labels_in(tmp_path / "out/BraTS2021_00000.nii.gz") - {0, 1, 2} == {expected}
    if masks is not None:
        assert "ET 0." in capsys.readouterr().out  # ET was found, and was scored as such


@pytest.mark.process
def test_a_folder_has_label_maps_of_one_convention(bright: Path, tmp_path: Path):
    new = write_brats(tmp_path / "new", cases=1, with_masks=False)
    asked = options(checkpoint=bright, input=new, output=tmp_path / "out", pictures=False)
    predict_folder(asked)
    with pytest.raises(InputError, match=r"file_values is .*'4': 4.* there and .*'4': 3.* here"):
        predict_folder({**asked, "et_label": 3})


@pytest.mark.process
def test_what_is_there_is_kept_and_other_settings_are_refused(
    bright: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    new = write_brats(tmp_path / "new", cases=2)
    out = tmp_path / "out"
    predict(bright, new, out, pictures=False)
    written = out / "BraTS2021_00000.nii.gz"
    stamp = written.stat().st_mtime_ns
    (out / "BraTS2021_00001.nii.gz").unlink()
    predict(bright, new, out, pictures=False)
    assert written.stat().st_mtime_ns == stamp
    assert (out / "BraTS2021_00001.nii.gz").is_file()
    with pytest.raises(InputError, match="flips is False there and True here"):
        predict(bright, new, out, pictures=False, flips=True)
    predict(bright, new, out, pictures=False, flips=True, again=True)
    assert written.stat().st_mtime_ns > stamp


@pytest.mark.process
def test_other_scans_of_the_same_names_are_predicted_anew(bright: Path, tmp_path: Path):
    """Files that are only touched are not."""
    new, out = write_brats(tmp_path / "new", cases=2), tmp_path / "out"
    predict(bright, new, out, pictures=False)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    for path in new.rglob("*.nii.gz"):
        path.touch()
    first, second = sorted(new.iterdir())
    for kind in ("t1", "t1ce", "t2", "flair"):
        scan = nib.load(second / f"{second.name}_{kind}.nii.gz")
        moved = np.flip(np.asanyarray(scan.dataobj), 0)
        nib.save(nib.Nifti1Image(moved, scan.affine), second / f"{second.name}_{kind}.nii.gz")
    (second / f"{second.name}_seg.nii.gz").unlink()
    before = np.asanyarray(nib.load(out / f"{second.name}.nii.gz").dataobj)
    predict(bright, new, out, pictures=False)
    kept, changed = (out / f"{case.name}.nii.gz" for case in (first, second))
    assert kept.stat().st_mtime_ns == stamps[kept]
    np.testing.assert_array_equal(np.asanyarray(nib.load(changed).dataobj), np.flip(before, 0))

    flair = second / f"{second.name}_flair.nii.gz"
    flair.write_bytes(flair.read_bytes()[:99])
    assert predict(bright, new, out, pictures=False) == [second.name]
    assert not changed.exists()  # a map of other scans must not be taken for theirs


@pytest.mark.process
def test_again_that_was_interrupted_leaves_no_maps_of_other_networks(
    bright: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    new, out = write_brats(tmp_path / "new", cases=3), tmp_path / "out"
    predict(bright, new, out, pictures=False, thresholds=0.5)
    old = {path.name: description(path) for path in out.glob("*.nii.gz")}
    whole = Predictor.predict

    def predict_first(predictor: Predictor, case: Case, output: Path) -> str:
        if case.name.endswith("1"):
            raise KeyboardInterrupt
        return whole(predictor, case, output)

    monkeypatch.setattr(Predictor, "predict", predict_first)
    with pytest.raises(KeyboardInterrupt):
        predict(bright, new, out, pictures=False, thresholds=0.4, again=True)
    monkeypatch.setattr(Predictor, "predict", whole)
    predict(bright, new, out, pictures=False, thresholds=0.4)
    for path in out.glob("*.nii.gz"):
        assert description(path).startswith(MARK)
        assert description(path) != old[path.name]


@pytest.mark.process
def test_files_of_the_user_are_neither_kept_nor_replaced(bright: Path, tmp_path: Path):
    new, out = write_brats(tmp_path / "new", cases=2), tmp_path / "out"
    own = write_image(out / "BraTS2021_00001.nii.gz", np.ones((3, 4, 5), np.uint8))
    content = own.read_bytes()
    for again in (False, True):
        with pytest.raises(InputError, match=f"^{own}: expected no file, or one that predict.py"):
            predict(bright, new, out, pictures=False, again=again)
    assert own.read_bytes() == content
    assert [path.name for path in out.iterdir()] == [own.name]
    table = own.rename(out / ROWS_NAME)
    with pytest.raises(InputError, match=f"^{table}: expected no file, or one that predict.py"):
        predict(bright, new, out, pictures=False, again=True)
    assert table.read_bytes() == content


@pytest.mark.process
@pytest.mark.parametrize("damage", ["label", "grid", "file"])
def test_a_mask_that_cannot_be_used_does_not_keep_its_scan_from_being_predicted(
    bright: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
):
    new, out = write_brats(tmp_path / "new", cases=2), tmp_path / "out"
    mask = new / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz"
    expected = np.asanyarray(nib.load(mask).dataobj) > 0
    if damage == "file":
        mask.write_bytes(b"broken")
    else:
        labels = np.full(expected.shape, 9 if damage == "label" else 1, np.uint8)
        write_image(mask, labels, np.diag([1.0, 1, 1 if damage == "label" else 2, 1]))
    assert predict(bright, new, out) == []
    found = np.asanyarray(nib.load(out / "BraTS2021_00000.nii.gz").dataobj) > 0
    np.testing.assert_array_equal(found, expected)
    assert f"{mask}: " in caplog.text
    assert "predicted without its mask" in caplog.text


@pytest.mark.process
def test_a_header_that_is_too_large_does_not_end_the_batch(bright: Path, tmp_path: Path):
    new, out = write_brats(tmp_path / "new", cases=2), tmp_path / "out"
    path = new / "BraTS2021_00000" / "BraTS2021_00000_t1.nii.gz"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[42:48] = np.array([30000] * 3, np.int16).tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))
    assert predict(bright, new, out, pictures=False) == ["BraTS2021_00000"]
    assert (out / "BraTS2021_00001.nii.gz").is_file()


@pytest.mark.process
def test_weights_that_are_no_numbers_are_refused(bright: Path, monkeypatch: pytest.MonkeyPatch):
    def poisoned(*arguments: object) -> tuple:
        ensemble, config = load_ensemble(*arguments)
        next(ensemble.members[0].parameters()).data.fill_(float("nan"))
        return ensemble, config

    load_ensemble = trained.load_ensemble
    monkeypatch.setattr(trained, "load_ensemble", poisoned)
    with pytest.raises(InputError, match=f"^{bright}: expected finite weights, found NaN"):
        Predictor.from_options(options(checkpoint=str(bright)))


@pytest.mark.parametrize("inside", [".", "below"])
def test_an_output_that_is_a_file_is_named_before_anything_is_read(tmp_path: Path, inside: str):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(
        InputError, match=f"^output: expected a folder to write to, found the file {path}$"
    ):
        predict_folder(options(checkpoint="none", input=tmp_path, output=path / inside))


@pytest.mark.process
@pytest.mark.parametrize("content", ["", "[]", '{"flips": 1', "\udcff"])
def test_settings_that_are_damaged_are_named_and_replaced_on_demand(
    bright: Path, tmp_path: Path, content: str
):
    new, out = write_brats(tmp_path / "new", cases=1), tmp_path / "out"
    out.mkdir()
    (out / SETTINGS_NAME).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=rf"{SETTINGS_NAME}: expected .* again=true to replace"):
        predict(bright, new, out, pictures=False)
    predict(bright, new, out, pictures=False, again=True)
    assert (out / "BraTS2021_00000.nii.gz").is_file()


@pytest.mark.process
def test_after_a_case_that_fails_the_others_follow(
    bright: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    new = write_brats(tmp_path / "new", cases=3)
    broken = new / "BraTS2021_00001" / "BraTS2021_00001_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    assert predict(bright, new, tmp_path / "out", pictures=False) == ["BraTS2021_00001"]
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    assert "BraTS2021_00001_t2.nii.gz" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.process
def test_probabilities_lie_on_the_grid_of_the_case(bright: Path, tmp_path: Path):
    new = write_brats(tmp_path / "new", cases=1)
    reorient(new, "LPS")
    predict(bright, new, tmp_path / "out", pictures=False, probabilities=True)
    labels = nib.load(tmp_path / "out/BraTS2021_00000.nii.gz")
    found = nib.load(tmp_path / "out/BraTS2021_00000_probabilities.nii.gz")
    assert found.shape == (*labels.shape, 3)
    assert found.get_data_dtype() == np.float32
    np.testing.assert_array_equal(found.affine, labels.affine)
    outline = np.asanyarray(found.dataobj)[..., 0] > 0.5
    np.testing.assert_array_equal(outline, np.asanyarray(labels.dataobj) > 0)


@pytest.mark.process
@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"WT": 0.5}, "found none for TC, ET"),
        ({"WT": 0.5, "TC": 2, "ET": 0.5}, "expected a number between 0 and 1 for TC, found 2"),
        ({"WT": "x"}, "expected a number between 0 and 1 for WT, found x"),
        ("nowhere.json", "nowhere.json: no such file; evaluate.py writes"),
    ],
)
def test_thresholds_that_cannot_be_used(
    bright: Path, tmp_path: Path, thresholds: object, message: str
):
    with pytest.raises(InputError, match=message):
        predict(bright, tmp_path, tmp_path / "out", thresholds=thresholds)


@pytest.mark.process
def test_paper_thresholds_and_an_ensemble(bright: Path, tmp_path: Path):
    new = write_brats(tmp_path / "new", cases=1)
    predict([bright, bright], new, tmp_path / "out", pictures=False, thresholds="paper")
    labels = np.asanyarray(nib.load(tmp_path / "out/BraTS2021_00000.nii.gz").dataobj)
    truth = nib.load(new / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz")
    np.testing.assert_array_equal(labels > 0, np.asanyarray(truth.dataobj) > 0)
