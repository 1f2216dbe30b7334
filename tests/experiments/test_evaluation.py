"""From checkpoints or label maps to table 1 and the figures of Frey & Nau."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import train
from datamodules import template
from datamodules.brats import BraTS
from errors import InputError
from experiments import frey2019
from experiments.evaluation import THRESHOLDS_NAME, cases_of_part, evaluate
from experiments.operating_point import OperatingPoint
from experiments.prediction import ROWS_NAME
from lightning_modules import pictures
from tests.conftest import ROOT, write_brats

Compose = Callable[..., DictConfig]


def options(**values: object) -> dict:
    """Read conf/evaluate.yaml and change some of its values."""
    config = OmegaConf.merge(
        OmegaConf.load(ROOT / "conf/predict.yaml"),
        OmegaConf.load(ROOT / "conf/evaluate.yaml"),
        {"device": "cpu", "wandb": "disabled"},
        {name: str(value) if isinstance(value, Path) else value for name, value in values.items()},
    )
    return dict(OmegaConf.to_container(config))  # pyright: ignore


def rows_of(path: Path) -> dict[str, dict[str, float]]:
    """Read the scores of every case."""
    with path.open() as file:
        return {
            row.pop("case"): {name: float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        }


@pytest.fixture
def label_maps(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions that are shifted by 0, 1 and 2 voxels, and truths without scans."""
    truths = write_brats(tmp_path / "truths", cases=3)
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    for number, case in enumerate(sorted(truths.iterdir())):
        mask = nib.load(case / f"{case.name}_seg.nii.gz")
        labels = np.roll(np.asanyarray(mask.dataobj), number, axis=0)
        nib.save(nib.Nifti1Image(labels, mask.affine), predictions / f"{case.name}.nii.gz")
        for scan in case.glob("*_t*.nii.gz"):
            scan.unlink()
        (case / f"{case.name}_flair.nii.gz").unlink()
    return predictions, truths


def test_label_maps_are_scored_without_a_network(label_maps: tuple[Path, Path], tmp_path: Path):
    """Dice, sensitivity and specificity agree with those computed here from the files."""
    predictions, truths = label_maps
    text = evaluate(options(predictions=predictions, input=truths, output=tmp_path / "out"))
    rows = rows_of(text.parent / "cases.csv")
    assert list(rows) == [f"BraTS2021_0000{i}" for i in range(3)]
    for name, row in rows.items():
        found = np.asanyarray(nib.load(predictions / f"{name}.nii.gz").dataobj)
        truth = np.asanyarray(nib.load(truths / name / f"{name}_seg.nii.gz").dataobj)
        for region, labels in {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}.items():
            p, t = np.isin(found, labels), np.isin(truth, labels)
            assert row[f"dice_{region}"] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
            assert row[f"sensitivity_{region}"] == pytest.approx((p & t).sum() / t.sum())
            assert row[f"specificity_{region}"] == pytest.approx((~p & ~t).sum() / (~t).sum())
    assert rows["BraTS2021_00000"]["hd95_mm_WT"] == 0
    assert rows["BraTS2021_00001"]["hd95_mm_WT"] == 1
    borders_mm = [row["border_mm_WT"] for row in rows.values()]
    assert borders_mm[0] == 0
    mean_mm = np.mean(borders_mm)
    told = f"The border of WT lies {abs(mean_mm):.2f} mm {'outside' if mean_mm > 0 else 'inside'} "
    assert f"{told}the true one, in the mean over 3 cases" in text.read_text()
    # Label maps without networks are not expected to reach any Dice.
    assert not [name for name in rows["BraTS2021_00000"] if name.startswith("expected")]

    table = list(csv.DictReader((text.parent / "table1.csv").read_text().splitlines()))
    assert [line[""] for line in table] == ["Mean", "Std", "Median"]
    values = [row["dice_ET"] for row in rows.values()]
    for line, number in zip(
        table, (np.mean(values), np.std(values, ddof=1), np.median(values)), strict=True
    ):
        assert line["Dice ET"] == f"{number:.3f}"
    assert "| ET | 3 | 0 | 0 | 0 |" in text.read_text()
    # Figures 3 and 5 need scans.
    assert sorted(path.name for path in text.parent.glob("*.png")) == ["figure4.png"]
    with Image.open(text.parent / "figure4.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_the_label_of_et_is_that_of_each_folder(label_maps: tuple[Path, Path], tmp_path: Path):
    """Truths with label 3 for ET, as in 2023, are compared with predictions with label 4."""
    predictions, truths = label_maps
    for path in truths.rglob("*_seg.nii.gz"):
        mask = nib.load(path)
        labels = np.asanyarray(mask.dataobj).copy()
        labels[labels == 4] = 3
        nib.save(nib.Nifti1Image(labels, mask.affine), path)
    text = evaluate(options(predictions=predictions, input=truths, output=tmp_path / "out"))
    assert rows_of(text.parent / "cases.csv")["BraTS2021_00000"]["dice_ET"] == 1


@pytest.mark.parametrize("source", ["folders", "table"])
def test_results_come_by_grade_with_the_number_of_cases(
    label_maps: tuple[Path, Path], tmp_path: Path, source: str
):
    """Two HGG; one LGG that has no ET, in which ET is predicted."""
    predictions, truths = label_maps
    names = sorted(path.name for path in truths.iterdir())
    grade_of = dict(zip(names, ("HGG", "LGG", "HGG"), strict=True))
    path = truths / names[1] / f"{names[1]}_seg.nii.gz"
    mask = nib.load(path)
    labels = np.asanyarray(mask.dataobj)
    nib.save(nib.Nifti1Image(np.where(labels == 4, 1, labels).astype(np.uint8), mask.affine), path)
    if source == "folders":
        for name, grade in grade_of.items():
            (truths / grade).mkdir(exist_ok=True)
            (truths / name).rename(truths / grade / name)
    else:
        lines = ["Grade,BraTS_2020_subject_ID", *(f"{g},{n}" for n, g in grade_of.items())]
        (truths / "name_mapping.csv").write_text("\n".join(lines))
    text = evaluate(options(predictions=predictions, input=truths, output=tmp_path / "out"))
    rows = rows_of(text.parent / "cases.csv")
    high, low = csv.DictReader((text.parent / "grades.csv").read_text().splitlines())
    assert [high["grade"], high["cases"], low["grade"], low["cases"]] == ["HGG", "2", "LGG", "1"]
    mean = (rows[names[0]]["dice_ET"] + rows[names[2]]["dice_ET"]) / 2
    assert (high["Dice ET"], high["with ET"]) == (f"{mean:.3f}", "2")
    assert high["false alarms ET"] == "0 of 0"
    assert (low["Dice ET"], low["with ET"], low["false alarms ET"]) == ("-", "0", "1 of 1")
    assert low["Dice WT"] == f"{rows[names[1]]['dice_WT']:.3f}"
    assert "| LGG | 1 | - |" in text.read_text()


def test_without_grades_the_report_says_so(label_maps: tuple[Path, Path], tmp_path: Path):
    predictions, truths = label_maps
    text = evaluate(options(predictions=predictions, input=truths, output=tmp_path / "out"))
    assert "There are no results by grade" in text.read_text()
    assert not (text.parent / "grades.csv").exists()


def test_figure_3_shows_the_t1_on_black_air(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    truths = write_brats(tmp_path / "truths", cases=1)
    (case,) = truths.iterdir()
    t1 = nib.load(case / f"{case.name}_t1.nii.gz")
    voxels = np.asanyarray(t1.dataobj).astype(np.float32)
    background = voxels == 0
    voxels = np.where(background, -1, voxels - 150)  # z-scores are published like this
    nib.save(nib.Nifti1Image(voxels, t1.affine), case / f"{case.name}_t1.nii.gz")
    drawn = {}

    def draw_case(scan: np.ndarray, rows: object, title: str) -> Figure:
        drawn[title] = scan
        return Figure()

    monkeypatch.setattr(pictures, "draw_case", draw_case)
    masks = frey2019.BraTSMasks(truths)
    pair = frey2019.pairs_of(masks, masks.cases())[0]
    frey2019.draw_figure_3(pair, masks, masks, tmp_path / "figure3.png")
    scan = drawn[f"{case.name}, T1"]
    assert (scan[background] == 0).all()
    brain = voxels[~background]
    np.testing.assert_allclose(scan[~background], brain - brain.min(), atol=1e-3)


def test_what_cannot_be_scored_is_one_clear_line(label_maps: tuple[Path, Path], tmp_path: Path):
    predictions, truths = label_maps
    asked = options(predictions=predictions, input=truths, output=tmp_path / "out")
    with pytest.raises(InputError, match=r"convention: expected one of brats2020, .*found brats"):
        evaluate({**asked, "convention": "brats"})
    with pytest.raises(InputError, match="nowhere: no such folder"):
        evaluate({**asked, "predictions": str(tmp_path / "nowhere")})
    small = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    nib.save(small, predictions / "BraTS2021_00001.nii.gz")
    with pytest.raises(InputError, match=r"00001.nii.gz: expected the grid of .*_seg.nii.gz"):
        evaluate(asked)
    (predictions / "BraTS2021_00002.nii.gz").unlink()
    with pytest.raises(InputError, match="expected a prediction of each of 3 cases, found none of"):
        evaluate(asked)


@pytest.fixture
def runs(composed: Compose, tiny: list[str], tmp_path: Path, bright_networks: None) -> Path:
    """Two finished runs of a sweep, whose networks are replaced by `BrighterThan` when loaded."""
    for seed in (0, 1):
        folder = tmp_path / "runs" / str(seed)
        train.train(composed(*tiny, "logger=csv", f"seed={seed}", f"run_dir={folder}"))
    return tmp_path / "runs"


@pytest.mark.process
def test_a_sweep_is_predicted_and_scored(
    runs: Path, brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(template, "LEAST_OVERLAP", 0)  # the brains of these cases are balls
    output = tmp_path / "out"
    asked = options(checkpoint=runs, input=brats, output=output, wandb="offline")
    text = evaluate(asked)
    tested = json.loads((runs / "0" / "split.json").read_text())["test"]
    assert list(rows_of(output / "cases.csv")) == tested
    # The tumour is all that is bright, so its outline is predicted without an error.
    assert {row["dice_WT"] for row in rows_of(output / "cases.csv").values()} == {1.0}
    lines = (output / "predictions" / ROWS_NAME).read_text().splitlines()
    predicted = list(csv.DictReader(lines))
    for row, known in zip(rows_of(output / "cases.csv").values(), predicted, strict=True):
        for region in ("WT", "TC", "ET"):
            assert row[f"expected_{region}"] == float(known[f"expected_{region}"])
            assert 0.5 < row[f"expected_{region}"] <= 1
    names = {path.name for path in output.iterdir()}
    assert {"table1.md", "table1.csv", THRESHOLDS_NAME, "predictions", "wandb"} <= names
    assert "Figure 5 is drawn on the MNI152 template of nilearn" in text.read_text()
    for figure in ("figure3", "figure4", "figure5"):
        with Image.open(output / f"{figure}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    point = OperatingPoint.read(output / THRESHOLDS_NAME, {})
    assert set(point.thresholds) == {"WT", "TC", "ET"}
    assert set(point.least_mm3) == {"ET"}
    assert "With least volumes" in text.read_text()
    settings = json.loads((output / "predictions" / "predicted_with.json").read_text())
    assert len(settings["checkpoint"]) == 2
    assert settings["flips"] is True


@pytest.mark.process
def test_parts_are_those_that_no_run_has_trained_on(runs: Path, brats: Path):
    for seed, test in ((0, [0, 1]), (1, [1, 2])):
        names = [f"BraTS2021_0000{i}" for i in range(6)]
        split = {
            "train": [name for i, name in enumerate(names) if i not in test and i < 5],
            "validation": names[5:],
            "test": [names[i] for i in test],
        }
        (runs / str(seed) / "split.json").write_text(json.dumps(split))
    cases = BraTS(brats).cases()
    assert [case.name for case in cases_of_part(cases, "test", runs)] == ["BraTS2021_00001"]
    assert len(cases_of_part(cases, "all", runs)) == 6
    with pytest.raises(InputError, match="cases: expected one of train, validation, test, all"):
        cases_of_part(cases, "tests", runs)
    (runs / "1" / "split.json").unlink()
    with pytest.raises(InputError, match=r"split\.json: expected beside the checkpoint"):
        cases_of_part(cases, "test", runs)


def test_every_pair_of_files_is_read_once(
    label_maps: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    predictions, truths = label_maps
    read = []

    def compare(pair: frey2019.Pair, *arguments: object) -> object:
        read.append(pair.case.name)
        return original(pair, *arguments)

    original = frey2019.compare
    monkeypatch.setattr(frey2019, "compare", compare)
    masks = frey2019.BraTSMasks(predictions), frey2019.BraTSMasks(truths)
    output = tmp_path / "out"
    text = frey2019.write_report(*masks, masks[1].cases(), output, least_mm3={"ET": 1e6})
    assert read == [f"BraTS2021_0000{i}" for i in range(3)]
    # All of ET is below the least volume, so the second table has a Dice of 0 for it.
    first, second = text.read_text().split("With least volumes")
    assert "| Mean | 0.000 |" in second
    assert "| Mean | 0.000 |" not in first
    kept = frey2019.write_report(*masks, masks[1].cases(), output, least_mm3={"ET": 1})
    assert 'of {"ET": 1}: the same' in kept.read_text()
