"""The report on D-Net and the U-Net: from training on tiny data to table 1."""

import csv
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch.utils.data import DataLoader

import train
from datamodules.cache import Cache, CachedCase
from datamodules.metastases import Metastases
from datamodules.patches import Volumes, collate_volumes
from errors import InputError
from experiments import krivov2018
from experiments.krivov2018 import RetestedRun, retest, write_report
from experiments.results import Results
from experiments.run import RunFolder
from lightning_modules.checkpoint import load
from lightning_modules.metrics import LesionMetrics, LesionReport
from lightning_modules.metrics.lesions import COUNTS
from lightning_modules.networks.geometry import Geometry
from tests.conftest import ROOT, write_metastases

Compose = Callable[..., DictConfig]

MODELS = {
    "dnet": ["model=dnet", "patches.size=60"],
    "unet": ["model=unet", "patches.size=16", "model.depth=3"],
}


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Overrides for either network: eight small cases, all but one with a bright lesion."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for number in range(8):
        labels = np.zeros((24, 22, 26), np.uint8)
        x, y, z = rng.integers(4, 16, 3)
        if number:
            labels[x : x + 4, y : y + 4, z : z + 4] = 1
        write_metastases(root / f"case_{number}", labels)
    return [
        "data=metastases",
        f"data.data_set.root={root}",
        f"data.cache.root={tmp_path}/cache",
        "split.validation=0.25",
        "split.test=0.25",
        "split.seed=21",  # two cases each for validation and testing
        "patches.per_epoch=8",
        "patches.batch_size=4",
        "data.num_workers=0",
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=false",
        "logger=csv",
    ]


@pytest.fixture
def runs(composed: Compose, small: list[str], tmp_path: Path) -> Path:
    """A finished run of each network, as a sweep leaves them."""
    for model, overrides in MODELS.items():
        folder = tmp_path / "runs" / model
        train.train(composed(*small, *overrides, f"run_dir={folder}"))
    return tmp_path / "runs"


@pytest.mark.process
def test_runs_are_tested_and_reported(runs: Path):
    for model in MODELS:
        module, _ = load(runs / model / "best.ckpt")
        assert 0 < module.threshold < 1
        assert module.threshold != 0.5  # it was chosen, and kept with the weights
        header, *rows = (runs / model / "cases.csv").read_text().splitlines()
        assert header.startswith("case,lesions,detected,false_positives,one_to_one")
        assert len(rows) == 2
        volume = torch.randn(1, 1, 21, 18, 23)
        with torch.inference_mode():
            assert module(volume).shape == volume.shape

    text = write_report(runs).read_text()
    assert "2 runs, 2 test cases" in text
    for column in ("sensitivity", "FP a patient", "one-to-one sensitivity", "seconds a volume"):
        assert column in text
    assert "| U-Net, paper (other data) | 0.771 | 0.62" in text
    assert "D-Net is" in text
    for name in ("froc.png", "example.png", "table.csv"):
        assert (runs / "report" / name).stat().st_size > 100


@pytest.mark.process
def test_runs_are_tested_on_other_cases_but_not_on_those_of_their_training(runs: Path):
    new = runs.parent / "new"
    for number, side in enumerate((0, 3, 5)):
        labels = np.zeros((20, 24, 22), np.uint8)
        labels[5 : 5 + side, 6 : 6 + side, 7 : 7 + side] = 1
        write_metastases(new / f"new_{number}", labels)
    text = write_report(runs, cases=new)
    assert text == runs / "report-new" / "table.md"
    assert "2 runs, 3 test cases with 2 lesions" in text.read_text()
    with pytest.raises(InputError, match="trained"):
        write_report(runs, cases=runs.parent / "data")
    (new / "empty").mkdir()
    with pytest.raises(InputError, match="expected"):
        write_report(runs, cases=new / "empty")


@pytest.mark.process
def test_scores_of_the_report_are_those_of_the_run(runs: Path):
    """A run that is tested again, from its checkpoint alone, scores what it has logged."""
    for model in MODELS:
        run = RunFolder(runs / model)
        tested = retest(run)
        assert tested.threshold == pytest.approx(Results.read(run).metrics["test/threshold"])
        for name, score in tested.report.scores(tested.threshold).items():
            logged = Results.read(run).metrics.get(f"test/{name}", np.nan)
            assert score == pytest.approx(logged, nan_ok=True), name


@pytest.mark.process
@pytest.mark.parametrize("experiment", ["detection", "krivov2018"])
def test_experiment_runs_from_the_command_line(
    small: list[str], tmp_path: Path, experiment: str, capsys: pytest.CaptureFixture[str]
):
    """The README's command on tiny data, one seed, small patches; the report is written twice."""
    overrides = [o for o in small if not o.startswith(("patches.batch_size", "patches.per_epoch"))]
    overrides += [
        "seed=0",
        "filters.base=8",
        "patches.size=64",  # fills whole boxes of D-Net, and suits the U-Net's four poolings
        "patches.batch_size=2",
        "patches.per_epoch=4",
        f"hydra.sweep.dir={tmp_path}/runs",
    ]
    if experiment == "detection":  # it sets what only phantoms have
        overrides += [f"~data.data_set.{key}" for key in ("count", "spacing_mm", "families")]
    if experiment == "krivov2018":  # one network will do
        overrides.append("model=dnet")
    done = cli("train.py", f"experiment={experiment}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| D-Net |" in done.stdout
    assert ("| U-Net |" in done.stdout) == (experiment == "detection")
    krivov2018.main([str(tmp_path / "runs"), "--target-fp", "1"])
    assert "| D-Net |" in capsys.readouterr().out


def scored(cases: list[CachedCase], data_set: Metastases, probability: float) -> LesionReport:
    """Score one probability in every voxel that the network sees, as test cases are scored."""
    metric = LesionMetrics(Geometry(halo=0, stride=1), spacing_mm=2)
    volumes = Volumes(cases, data_set, scan_grids=True)
    for batch in DataLoader(volumes, collate_fn=collate_volumes):
        metric.update(torch.full(batch["mask"].shape, probability), batch)
    return metric.report()


def balls(centres: list[tuple[int, int, int]], side: int = 40) -> np.ndarray:
    """Make a cube of labels with a lesion of 7 voxels, radius 1, around each centre."""
    labels = np.zeros((side,) * 3, np.uint8)
    for centre in centres:
        for axis, step in product(range(3), (-1, 0, 1)):
            labels[tuple(np.add(centre, step * np.eye(3, dtype=int)[axis]))] = 1
    return labels


def test_small_lesions_stay_in_the_truth_whatever_the_grid_of_the_network(tmp_path: Path):
    rng = np.random.default_rng(0)
    grid = list(product(range(3, 39, 6), repeat=3))
    centres = [tuple(grid[i] + rng.integers(0, 2, 3)) for i in rng.permutation(len(grid))[:60]]
    write_metastases(tmp_path / "data" / "A", balls(centres, side=41))
    data_set = Metastases(tmp_path / "data")
    cases = Cache(tmp_path / "cache", 2, "brain", workers=1).build(data_set.cases(), data_set)
    assert len(cases[0].lesions) < 45  # the others are gone from the network's grid
    report = scored(cases, data_set, probability=0.01)
    assert report.lesions_per_case() == [60]
    diameter_mm = np.cbrt(6 * 7 / np.pi)
    np.testing.assert_allclose(report.lesions[:, 1], diameter_mm, rtol=1e-5)
    assert report.scores(0.5)["sensitivity"] == 0
    scores = scored(cases, data_set, probability=0.99).scores(0.5)
    assert scores["sensitivity"] == 1


def test_lesions_that_a_crop_cuts_off_are_missed(tmp_path: Path):
    write_metastases(tmp_path / "data" / "A", balls([(20, 20, 20), (4, 4, 4), (36, 20, 20)]))
    data_set = Metastases(tmp_path / "data")
    cases = Cache(tmp_path / "cache", 2, (20, 20, 20)).build(data_set.cases(), data_set)
    report = scored(cases, data_set, probability=0.99)
    assert report.lesions_per_case() == [3]
    assert report.scores(0.5)["sensitivity"] == pytest.approx(1 / 3)


@pytest.mark.process
def test_a_run_counts_all_lesions_of_its_test_cases(
    composed: Compose, small: list[str], tmp_path: Path
):
    """The network sees voxels of 2 mm in the middle of the brain; a small lesion lies outside."""
    large = np.zeros((26, 26, 26), np.uint8)
    large[10:16, 10:16, 10:16] = 1
    for number in range(1, 8):
        labels = large | balls([(2, 2, 2)], side=26)
        write_metastases(tmp_path / "data" / f"case_{number}", labels)
    folder = tmp_path / "run"
    overrides = ["data.cache.spacing_mm=2", "data.cache.crop=[20,20,20]", f"run_dir={folder}"]
    train.train(composed(*small, *MODELS["dnet"], *overrides))
    rows = list(csv.DictReader((folder / "cases.csv").read_text().splitlines()))
    expected = [0 if row["case"] == "case_0" else 2 for row in rows]
    assert sum(expected) >= 2
    assert [int(row["lesions"]) for row in rows] == expected
    assert retest(RunFolder(folder)).report.lesions_per_case() == expected


class AsItIs(torch.nn.Module):
    """A network whose probabilities are the sigmoid of the image."""

    device = torch.device("cpu")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.sigmoid()


def test_figure_2_shows_segmentations_below_probabilities_on_black_air(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scan = torch.zeros(1, 16, 16, 16)
    scan[:, 2:14, 2:14, 2:14] = torch.randn(1, 12, 12, 12, generator=torch.manual_seed(0))
    truth = torch.zeros(1, 16, 16, 16, dtype=torch.bool)
    truth[:, 6:9, 6:9, 6:9] = True
    tested = [
        krivov2018.RetestedRun(model, 0, AsItIs(), None, 0.5, 0.0, 0)  # pyright: ignore
        for model in ("unet", "dnet")
    ]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    volume = {"image": scan, "mask": truth, "case": "A"}
    krivov2018.draw_figure_2(tested, volume, tmp_path / "figure.png")
    panels = {ax.get_title(): ax.images[0] for ax in figures[0].axes if ax.get_title()}
    assert list(panels) == [
        "scan", "D-Net, probability", "U-Net, probability",
        "truth", "D-Net, above 0.5", "U-Net, above 0.5",
    ]  # fmt: skip
    for name in ("scan", "truth", "D-Net, above 0.5"):
        shown = panels[name].get_array()
        assert shown[0, 0] == panels[name].get_clim()[0] < -1  # a corner: air
    assert panels["D-Net, probability"].get_clim() == (0, 1)


@pytest.mark.process
def test_report_without_runs_is_one_clear_line(tmp_path: Path):
    done = cli("-m", "experiments.krivov2018", str(tmp_path))
    assert done.returncode == 1
    expected = "expected a finished run, or a folder of such, found none"
    assert done.stderr == f"{tmp_path}: {expected}\n"


def counted(model: str, seed: int, detected: list[int], alarms: list[int]) -> RetestedRun:
    """A run on three patients with 2, 1 and 1 lesions, of which some are found."""
    counts = np.zeros((3, 1, len(COUNTS)))
    counts[:, 0, COUNTS.index("detected")] = detected
    counts[:, 0, COUNTS.index("one_to_one")] = detected
    counts[:, 0, COUNTS.index("false_positives")] = alarms
    lesions = np.array([[0, 5, 1], [0, 5, 1], [1, 5, 1], [2, 5, 1]], float)
    report = LesionReport(np.array([0.5]), np.arange(3), counts, lesions)
    return RetestedRun(model, seed, AsItIs(), report, 0.5, 0.0, 0)  # pyright: ignore


def test_the_difference_is_d_net_minus_u_net_over_the_seeds_of_both():
    tested = [
        counted("unet", 1, [1, 0, 0], [0, 0, 1]),
        counted("unet", 0, [1, 1, 0], [0, 1, 1]),
        counted("unet", 7, [0, 0, 0], [9, 9, 9]),  # no D-Net has this seed
        counted("dnet", 0, [2, 1, 0], [0, 0, 1]),
        counted("dnet", 1, [2, 1, 1], [1, 1, 1]),
        counted("dnet", 8, [0, 0, 0], [9, 9, 9]),
    ]
    (row,) = krivov2018.difference_row(tested)
    assert row["network"] == "D-Net minus U-Net, 2 pairs"
    # 7 and 3 of 8 lesions; 4 and 3 false positives in 6 patients.
    assert row["sensitivity"].startswith("0.500 [")
    assert row["FP a patient"].startswith("0.167 [")
    # Paired the other way round, both seeds have a difference of 2 lesions, and nothing varies.
    swapped = [replace(run, seed=1 - run.seed) if run.model == "unet" else run for run in tested]
    (other,) = krivov2018.difference_row([run for run in swapped if run.seed in (0, 1)])
    assert other["sensitivity"] == "0.500"
    assert krivov2018.difference_row(tested[:4]) == []  # one pair
