"""Tiny data for all tests: real NIfTI files, made here, seconds in all."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

import train  # noqa: F401  (registers the resolvers of the configuration)
from lightning_modules import checkpoint

ROOT = Path(__file__).parents[1]
RAS_1MM = np.eye(4)

# Tensors of tests are too small to be worth a second thread, here and in commands that tests run.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def blob(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> np.ndarray:
    """A ball in a volume, bool."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return np.linalg.norm(grid - np.array(centre), axis=-1) <= radius


def write_brats(
    root: Path, cases: int = 4, shape: tuple[int, int, int] = (24, 28, 20), with_masks: bool = True
) -> Path:
    """A BraTS-2021 folder of brains that are balls with a bright tumour of three labels."""
    for index in range(cases):
        rng = np.random.default_rng(index)
        name = f"BraTS2021_{index:05d}"
        folder = root / name
        folder.mkdir(parents=True)
        brain = blob(shape, tuple((n - 1) / 2 for n in shape), min(shape) / 2 - 1)
        centre = tuple((n - 1) / 2 + rng.uniform(-2, 2) for n in shape)
        labels = np.zeros(shape, np.uint8)
        for label, radius in ((2, 5.0), (1, 3.5), (4, 2.0)):
            labels[blob(shape, centre, radius)] = label
        for channel, modality in enumerate(("t1", "t1ce", "t2", "flair")):
            image = 100 + 5 * rng.standard_normal(shape) + 40 * labels * (1 + channel)
            voxels = np.where(brain, image, 0).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, RAS_1MM), folder / f"{name}_{modality}.nii.gz")
        if with_masks:
            nib.save(nib.Nifti1Image(labels, RAS_1MM), folder / f"{name}_seg.nii.gz")
    return root


@pytest.fixture(scope="session")
def brats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cases with masks; not to be written to."""
    return write_brats(tmp_path_factory.mktemp("brats"), cases=6)


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(brats: Path, cache_root: Path, tmp_path: Path) -> list[str]:
    """Overrides that make any configuration train within a second or two."""
    return [
        "data=brats",
        f"data.data_set.root={brats}",
        f"data.cache.root={cache_root}",
        "data.cache.crop=brain",
        "split.validation=0.17",
        "split.test=0.34",
        "patches=aeunet_proxy",
        "patches.size=16",
        "patches.window=16",
        "patches.overlap=0.5",
        "patches.per_epoch=4",
        "patches.batch_size=2",
        "data.num_workers=0",
        "model.bottleneck=4",
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=false",
        f"run_dir={tmp_path}/run",
    ]


@pytest.fixture
def composed() -> Iterator[Callable[..., DictConfig]]:
    """Compose the configuration as train.py does: `composed("norm=batch")`."""

    def compose_config(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("config", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
            config.setdefault("run_dir", "runs/test")
        return config

    yield compose_config
    HydraConfig.instance().cfg = None


class BrighterThan(torch.nn.Module):
    """Calls every voxel a region whose FLAIR is above the region's threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.thresholds = torch.nn.Parameter(torch.tensor([0.1, 1.5, 2.5]).view(1, 3, 1, 1, 1))

    def segment(self, x: torch.Tensor) -> torch.Tensor:
        return 100 * (x[:, 3:] - self.thresholds)


@pytest.fixture
def bright_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are loaded with `BrighterThan` in place of their network."""
    load = checkpoint.load

    def load_bright(path: Path) -> checkpoint.Loaded:
        loaded = load(path)
        loaded.module.network = BrighterThan()
        return loaded

    monkeypatch.setattr(checkpoint, "load", load_bright)
