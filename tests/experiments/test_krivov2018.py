"""The report on D-Net and the U-Net: from training on tiny data to table 1."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

import train
from experiments import krivov2018
from experiments.krivov2018 import bootstrap, retest, write_report
from experiments.results import Results
from experiments.run import RunFolder
from lightning_modules.checkpoint import load
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
        overrides += ["~data.data_set.count", "~data.data_set.spacing_mm"]
    if experiment == "krivov2018":  # one network will do
        overrides.append("model=dnet")
    done = cli("train.py", f"experiment={experiment}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| D-Net |" in done.stdout
    assert ("| U-Net |" in done.stdout) == (experiment == "detection")
    krivov2018.main([str(tmp_path / "runs"), "--target-fp", "1"])
    assert "| D-Net |" in capsys.readouterr().out


@pytest.mark.process
def test_report_without_runs_is_one_clear_line(tmp_path: Path):
    done = cli("-m", "experiments.krivov2018", str(tmp_path))
    assert done.returncode == 1
    expected = "expected a finished run, or a folder of such, found none"
    assert done.stderr == f"{tmp_path}: {expected}\n"


def test_interval_of_a_ratio_over_patients():
    counts, totals = np.array([[3.0, 0, 2, 1]]), np.array([4.0, 1, 2, 1])
    interval = bootstrap(counts, totals)
    assert interval.value == 6 / 8
    assert 0 <= interval.low < 6 / 8 < interval.high <= 1
    same = bootstrap(np.repeat([[1.0]], 20, axis=1), np.full(20, 2.0))
    assert same == (0.5, 0.5, 0.5)
