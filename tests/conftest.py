"""Tiny data for all tests: real NIfTI files, made here, seconds in all."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

import train  # noqa: F401  (registers the resolvers of the configuration)
from lightning_modules import checkpoint

ROOT = Path(__file__).parents[1]
RAS_1MM = np.eye(4)
MODALITIES = ("t1", "t1ce", "t2", "flair")

# Tensors of tests are too small to be worth a second thread, here and in commands that tests run.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> np.ndarray:
    """Make a mask that is True within a radius of a point, the surface included."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return np.linalg.norm(grid - np.array(centre), axis=-1) <= radius


def affine_of(
    axes: str,
    spacing_mm: tuple[float, ...] = (1, 1, 1),
    origin_mm: tuple[float, ...] = (-40, 13, 7),
) -> np.ndarray:
    """Make the affine (4, 4) of a grid whose axes point to these directions, such as "LPS"."""
    affine = np.zeros((4, 4))
    for axis, letter in enumerate(axes):
        row = next(row for row, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[row, axis] = spacing_mm[axis] * (1 if letter in "RAS" else -1)
    affine[:3, 3] = origin_mm
    affine[3, 3] = 1
    return affine


def write_image(path: Path, voxels: np.ndarray, affine: np.ndarray = RAS_1MM) -> Path:
    """Write a NIfTI file and the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def write_case(
    folder: Path,
    images: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    affine: np.ndarray = RAS_1MM,
    prefix: str = "",
) -> None:
    """Write a file per modality and, if there are labels, a mask, as `<prefix>t1.nii.gz`."""
    masks = {} if labels is None else {"seg": labels}
    for kind, voxels in {**images, **masks}.items():
        write_image(folder / f"{prefix}{kind}.nii.gz", voxels, affine)


def make_arrays(
    shape: tuple[int, ...] = (20, 24, 16), seed: int = 0, background: float = 0.0
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Make an off-centre head with a tumour of three labels.

    Returns:
        Modality -> image; canonical labels; mask of the head; all (X, Y, Z).
    """
    rng = np.random.default_rng(seed)
    x, y, z = np.array(shape) / 2
    brain = ball(shape, (x + 1, y - 2, z + 0.5), min(shape) / 2 - 2)
    labels = np.zeros(shape, np.uint8)
    for label, radius in ((2, 4.2), (1, 3.1), (4, 1.6)):
        labels[ball(shape, (x + 2, y - 3, z + 1), radius) & brain] = label
    images = {}
    for n, modality in enumerate(MODALITIES):
        voxels = 10**n * (rng.normal(3, 1, shape) + labels)  # below 0 here and there
        voxels[brain & (voxels == background)] += 1
        images[modality] = np.where(brain, voxels, background).astype(np.float32)
    return images, labels, brain


def write_brats(
    root: Path, cases: int = 4, shape: tuple[int, int, int] = (24, 28, 20), with_masks: bool = True
) -> Path:
    """A BraTS-2021 folder of brains that are balls with a bright tumour of three labels."""
    for index in range(cases):
        rng = np.random.default_rng(index)
        name = f"BraTS2021_{index:05d}"
        brain = ball(shape, tuple((n - 1) / 2 for n in shape), min(shape) / 2 - 1)
        centre = tuple((n - 1) / 2 + rng.uniform(-2, 2) for n in shape)
        labels = np.zeros(shape, np.uint8)
        for label, radius in ((2, 5.0), (1, 3.5), (4, 2.0)):
            labels[ball(shape, centre, radius)] = label
        images = {}
        for channel, modality in enumerate(MODALITIES):
            image = 100 + 5 * rng.standard_normal(shape) + 40 * labels * (1 + channel)
            images[modality] = np.where(brain, image, 0).astype(np.int16)
        write_case(root / name, images, labels if with_masks else None, prefix=f"{name}_")
    return root


def write_metastases(folder: Path, labels: np.ndarray, prefix: str = "") -> None:
    """Write a case in the layout of `Metastases`: bright lesions in noise, a voxel of air around.

    The crop to the brain gives the labels back as they are.
    """
    rng = np.random.default_rng(list(folder.name.encode()))  # no two cases are the same scan
    image = (100 + rng.standard_normal(labels.shape) * 5 + 80 * labels).astype(np.int16)
    image, labels = np.pad(image, 1), np.pad(labels, 1)
    write_case(folder, {"t1ce": image}, labels.astype(np.uint8), prefix=prefix)


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
        "split.seed=3",  # three cases to train on, one for validation, two to test
        "patches=aeunet_proxy",
        "patches.size=16",
        "inference.patch_size=16",
        "inference.overlap=0.5",
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


def untrained(composed: Callable[..., DictConfig], *overrides: str) -> dict[str, Any]:
    """What a checkpoint of a network has in it, without training."""
    config = composed(*overrides)
    module = instantiate(config.module, _convert_="all")
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    return {"state_dict": module.state_dict(), "config": plain, "seen": {}}


def options_of(command: str, **values: object) -> dict:
    """The values of conf/predict.yaml or conf/evaluate.yaml, some of them changed."""
    files = [ROOT / f"conf/{name}.yaml" for name in ("predict", "evaluate")]
    config = OmegaConf.merge(
        *map(OmegaConf.load, files[: 1 if command == "predict" else 2]),
        {"device": "cpu", "pictures": False, "flips": False},
        {key: str(value) if isinstance(value, Path) else value for key, value in values.items()},
    )
    return dict(OmegaConf.to_container(config))


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
