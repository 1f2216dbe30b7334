"""New cases in, label maps on their own grid out; pictures; what cannot be predicted."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import train
from errors import InputError
from lightning_modules import checkpoint
from lightning_modules.pictures import busiest_slice, draw_case, plane
from predict import SETTINGS_NAME, Predictor
from tests.conftest import ROOT, write_brats

Compose = Callable[..., DictConfig]


@pytest.fixture
def bright(composed: Compose, tiny: list[str], bright_networks: None) -> Path:
    """A checkpoint of an untrained network, loaded with `BrighterThan` in its place."""
    config = composed(*tiny, "logger=csv", "trainer.max_epochs=1", "trainer=debug")
    train.train(config)
    return Path(config.run_dir) / "best.ckpt"


def predict(
    checkpoint: Path | list[Path], source: Path, output: Path, **values: object
) -> list[str]:
    """As the command line does, with the values of conf/predict.yaml where none are given."""
    paths = checkpoint if isinstance(checkpoint, list) else [checkpoint]
    config = OmegaConf.merge(
        OmegaConf.load(ROOT / "conf" / "predict.yaml"),
        {"checkpoint": [str(path) for path in paths], "device": "cpu", **values},
    )
    predictor = Predictor.of(dict(OmegaConf.to_container(config)))  # pyright: ignore
    return predictor(predictor.data_set.in_folder(source).cases(), output)


def reoriented(folder: Path, codes: str) -> None:
    """Store all files of a folder in another orientation, off the origin."""
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        affine = image.affine.copy()
        affine[:3, 3] = (-30, 40, 7)
        image = nib.Nifti1Image(np.asanyarray(image.dataobj), affine)
        turn = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
        nib.save(image.as_reoriented(turn), path)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
def test_label_maps_lie_on_the_grid_of_the_case(bright: Path, tmp_path: Path, codes: str):
    new = write_brats(tmp_path / "new", cases=2)
    reoriented(new, codes)
    predict(bright, new, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *(f"BraTS2021_0000{i}.{end}" for i in range(2) for end in ("nii.gz", "png")),
        SETTINGS_NAME,
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
        # The tumour is all that is bright: its outline comes back voxel for voxel.
        np.testing.assert_array_equal(labels > 0, truth > 0)


def test_cases_without_masks_are_predicted(bright: Path, tmp_path: Path):
    new = write_brats(tmp_path / "new", cases=1, with_masks=False)
    predict(bright, new, tmp_path / "out")
    assert (tmp_path / "out/BraTS2021_00000.nii.gz").is_file()
    with Image.open(tmp_path / "out/BraTS2021_00000.png") as picture:
        assert np.asarray(picture).std() > 10


def test_scores_are_printed_where_there_are_masks(bright: Path, tmp_path: Path, capsys):
    new = write_brats(tmp_path / "new", cases=1)
    predict(bright, new, tmp_path / "out", pictures=False)
    assert "WT 1.000" in capsys.readouterr().out


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


def test_after_a_case_that_fails_the_others_follow(
    bright: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    new = write_brats(tmp_path / "new", cases=3)
    broken = new / "BraTS2021_00001" / "BraTS2021_00001_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    assert predict(bright, new, tmp_path / "out", pictures=False) == ["BraTS2021_00001"]
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    assert "BraTS2021_00001_t2.nii.gz" in capsys.readouterr().out.replace("\n", "")


def test_probabilities_lie_on_the_grid_of_the_case(bright: Path, tmp_path: Path):
    new = write_brats(tmp_path / "new", cases=1)
    reoriented(new, "LPS")
    predict(bright, new, tmp_path / "out", pictures=False, probabilities=True)
    labels = nib.load(tmp_path / "out/BraTS2021_00000.nii.gz")
    found = nib.load(tmp_path / "out/BraTS2021_00000_probabilities.nii.gz")
    assert found.shape == (*labels.shape, 3)
    assert found.get_data_dtype() == np.float32
    np.testing.assert_array_equal(found.affine, labels.affine)
    outline = np.asanyarray(found.dataobj)[..., 0] > 0.5
    np.testing.assert_array_equal(outline, np.asanyarray(labels.dataobj) > 0)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"WT": 0.5}, "found none for TC, ET"),
        ({"WT": 0.5, "TC": 2, "ET": 0.5}, "expected a number between 0 and 1 for TC, found 2"),
        ("nowhere.json", "nowhere.json: expected thresholds as written by evaluate.py"),
    ],
)
def test_thresholds_that_cannot_be_used(
    bright: Path, tmp_path: Path, thresholds: object, message: str
):
    with pytest.raises(InputError, match=message):
        predict(bright, tmp_path, tmp_path / "out", thresholds=thresholds)


def test_paper_thresholds_and_an_ensemble(bright: Path, tmp_path: Path):
    new = write_brats(tmp_path / "new", cases=1)
    predict([bright, bright], new, tmp_path / "out", pictures=False, thresholds="paper")
    labels = np.asanyarray(nib.load(tmp_path / "out/BraTS2021_00000.nii.gz").dataobj)
    truth = nib.load(new / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz")
    np.testing.assert_array_equal(labels > 0, np.asanyarray(truth.dataobj) > 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such checkpoint"),
        (b"", "not a readable checkpoint"),
        (b"hello world", "not a readable checkpoint"),
        ({"state_dict": {}}, "expected a checkpoint written by train.py"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes | dict | None, message: str):
    path = tmp_path / "other.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_are_refused(
    composed: Compose, tiny: list[str], tmp_path: Path
):
    config = composed(*tiny, "logger=csv", "trainer=debug")
    train.train(config)
    content = checkpoint.read(Path(config.run_dir) / "best.ckpt")
    content["config"]["model"]["depth"] = content["config"]["module"]["network"]["depth"] = 3
    torch.save(content, tmp_path / "mixed.ckpt")
    with pytest.raises(InputError, match="weights of another architecture"):
        checkpoint.load(tmp_path / "mixed.ckpt")


def test_busiest_slice():
    mask = np.zeros((5, 6, 7), bool)
    assert [busiest_slice(mask, axis) for axis in range(3)] == [2, 3, 3]
    mask[1, 2:5, 4] = mask[3, 2, 4] = True
    assert [busiest_slice(mask, axis) for axis in range(3)] == [1, 2, 4]


def test_planes_are_the_right_way_up():
    volume = np.zeros((2, 3, 4))
    volume[0, 0, 3] = 1  # left, posterior, superior
    assert plane(volume, 0, 0)[0, 0] == 1  # sagittal: superior up, posterior left
    assert plane(volume, 1, 0)[0, 0] == 1  # coronal: superior up, left on the left
    assert plane(volume, 2, 3)[-1, 0] == 1  # axial: posterior down, left on the left


def test_a_drawing_shows_the_regions_where_they_are(tmp_path: Path):
    image = np.ones((20, 20, 20), np.float32)
    mask = np.zeros((20, 20, 20), bool)
    mask[4:16, 4:16, 4:16] = True
    nothing = np.zeros_like(mask)
    pixels = {}
    for name, found in {"found": mask, "missed": nothing}.items():
        rows = {"truth": {"WT": mask}, "prediction": {"WT": found}}
        figure = draw_case(image, rows, title=name)
        assert [ax.get_title() for ax in figure.axes[::3]] == [
            "scan, sagittal 4", "truth, sagittal 4", "prediction, sagittal 4"
        ]  # fmt: skip
        figure.savefig(tmp_path / f"{name}.png", dpi=40)
        pixels[name] = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
    height = pixels["found"].shape[0]
    differs = np.abs(pixels["found"] - pixels["missed"]).sum(-1) > 100
    assert differs[int(0.65 * height) : int(0.95 * height)].mean() > 0.1  # the lowest row only
    assert differs[int(0.1 * height) : int(0.6 * height)].mean() == 0
