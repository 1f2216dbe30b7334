"""D-Net and the U-Net from patches to Table 1."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

import train
from experiments.detection import bootstrap, write_report
from experiments.detection import main as report
from lightning_modules.checkpoint import load
from lightning_modules.losses import SparseCrossEntropy, pooled
from lightning_modules.networks.dnet import Geometry, geometry
from tests.conftest import ROOT, write_metastases

Compose = Callable[..., DictConfig]


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Overrides for either network: a few tiny cases with a bright lesion each."""
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
        "data.patches_per_epoch=8",
        "data.batch_size=4",
        "data.num_workers=0",
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=false",
        "logger=csv",
    ]


MODELS = {
    "dnet": ["model=dnet", "data.sampler.patch_size=60"],
    "unet": ["model=unet", "model.depth=3", "data.sampler.patch_size=16"],
}


def test_target_is_the_max_pooled_mask_inside_the_halo():
    mask = torch.zeros(1, 1, 68, 68, 68, dtype=torch.bool)
    mask[..., 26, 26, 26] = True  # first voxel of the first box
    mask[..., 41, 33, 26] = True  # last box of x, second of y
    mask[..., 25, 30, 30] = True  # in the halo
    loss = SparseCrossEntropy(geometry())
    certain = torch.full((1, 1, 4, 4, 4), -20.0)
    certain[0, 0, 0, 0, 0] = certain[0, 0, 3, 1, 0] = 20
    assert loss(certain, mask)["loss"] < 1e-6
    certain[0, 0, 0, 0, 0] = -20
    assert loss(certain, mask)["loss"].item() == pytest.approx(20 / 64, rel=1e-4)


def test_pooling_of_a_mask_rounds_sides_up():
    mask = torch.zeros(1, 1, 9, 8, 5, dtype=torch.bool)
    mask[..., 8, 7, 4] = True
    coarse = pooled(mask, 4)
    assert coarse.shape == (1, 1, 3, 2, 2)
    assert coarse.nonzero().tolist() == [[0, 0, 2, 1, 1]]


def test_voxelwise_loss_is_plain_cross_entropy():
    logits, mask = torch.randn(2, 1, 5, 5, 5), torch.rand(2, 1, 5, 5, 5) > 0.5
    expected = nn.functional.binary_cross_entropy_with_logits(logits, mask.float())
    assert SparseCrossEntropy(Geometry(0, 1))(logits, mask)["loss"] == expected


@pytest.mark.parametrize("model", MODELS)
def test_overfits_one_batch(composed: Compose, small: list[str], model: str):
    config = composed(*small, *MODELS[model])
    torch.manual_seed(0)
    module = instantiate(config.module, _convert_="all")
    image = torch.randn(4, 1, 60, 60, 60) if model == "dnet" else torch.randn(4, 1, 16, 16, 16)
    mask = torch.zeros(image.shape, dtype=torch.bool)
    mask[:2, :, 5:9, 5:9, 5:9] = model == "unet"
    mask[:2, :, 26:29, 27:30, 28:31] = model == "dnet"
    batch = {"image": image + 3 * mask, "mask": mask, "case": ["a"] * 4}
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = module.terms(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


@pytest.fixture
def runs(composed: Compose, small: list[str], tmp_path: Path) -> Path:
    """A finished run of each network, as a sweep leaves them."""
    for model, overrides in MODELS.items():
        folder = tmp_path / "runs" / model
        train.train(composed(*small, *overrides, f"run_dir={folder}"))
    return tmp_path / "runs"


def test_runs_are_tested_and_reported(runs: Path):
    for model in MODELS:
        loaded = load(runs / model / "best.ckpt")
        threshold = float(loaded.module.threshold)  # pyright: ignore[reportArgumentType]
        assert 0 < threshold < 1
        assert threshold != 0.5  # chosen, and kept with the weights
        header, *rows = (runs / model / "cases.csv").read_text().splitlines()
        assert header.startswith("case,lesions,detected,false_positives,one_to_one")
        assert len(rows) == 2
        volume = torch.randn(1, 1, 21, 18, 23)
        with torch.inference_mode():
            assert loaded.module(volume).shape == volume.shape

    text = write_report(runs).read_text()
    assert "2 test cases" in text
    for column in ("sensitivity", "FP a patient", "one-to-one sensitivity", "seconds a volume"):
        assert column in text
    assert "| U-Net, paper (other data) | 0.771 | 0.62" in text
    assert "D-Net is" in text
    for name in ("froc.png", "example.png", "table.csv"):
        assert (runs / "report" / name).stat().st_size > 100


@pytest.mark.parametrize("experiment", ["detection", "krivov2018"])
def test_experiment_runs_from_the_command_line(
    small: list[str], tmp_path: Path, experiment: str, capsys: pytest.CaptureFixture[str]
):
    """As the README has it, on tiny data, one seed, small patches; the report is rewritten too."""
    tiny = [o for o in small if not o.startswith(("data.patches", "data.batch"))]
    patches = "proxy" if experiment == "detection" else "paper"
    overrides = [
        *tiny,
        "seed=0",
        "filters.base=8",
        f"{patches}.dnet={{patch_size: 60, batch_size: 2, patches_per_epoch: 4}}",
        f"{patches}.unet={{patch_size: 32, batch_size: 2, patches_per_epoch: 4}}",
        f"hydra.sweep.dir={tmp_path}/runs",
    ]
    if experiment == "detection":  # what only phantoms have
        overrides += ["~data.data_set.count", "~data.data_set.spacing_mm"]
    if experiment == "krivov2018":  # one network will do
        overrides.append("model=dnet")
    done = cli("train.py", f"experiment={experiment}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| D-Net |" in done.stdout
    assert ("| U-Net |" in done.stdout) == (experiment == "detection")
    assert report([str(tmp_path / "runs"), "--target-fp", "1"]) == 0
    assert "| D-Net |" in capsys.readouterr().out


def test_report_without_runs_is_one_clear_line(tmp_path: Path):
    done = cli("-m", "experiments.detection", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}: no finished run found; expected */results.json\n"


def test_interval_of_a_ratio_over_patients():
    hits, of = np.array([[3.0, 0, 2, 1]]), np.array([4.0, 1, 2, 1])
    interval = bootstrap(hits, of)
    assert interval.value == 6 / 8
    assert 0 <= interval.low < 6 / 8 < interval.high <= 1
    same = bootstrap(np.repeat([[1.0]], 20, axis=1), np.full(20, 2.0))
    assert same == (0.5, 0.5, 0.5)
