"""Every option of every group composes, builds and changes what it says; names of runs."""

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from tests.conftest import ROOT

Compose = Callable[..., DictConfig]

OPTIONS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted((ROOT / "conf").iterdir())
    if folder.is_dir()
}
AXES = {  # what ablations sweep, with the groups among it: each must change the network
    "filters.base": [8, 16],
    "filters.ratio": [1.5, 2, 2.5],
    "model.depth": [3, 4, 5],
    "model.bottleneck": [32, 128],
    **{group: OPTIONS[group] for group in ("norm", "activation", "downsampling")},
}
AXES_OF = {
    "aeunet": set(AXES),
    "unet": {"filters.base", "filters.ratio", "model.depth", "norm", "activation"},
    "dnet": {"filters.base", "filters.ratio", "activation"},  # its depth and norm are given
}
SMALL = {
    "aeunet": ["data.sampler.patch_size=32"],
    "unet": ["data.sampler.patch_size=32"],
    "dnet": ["data.sampler.patch_size=68"],
}
MODEL_OF = {  # of options that are about detection
    ("model", "dnet"): "dnet",
    ("model", "unet"): "unet",
    ("data", "metastases"): "dnet",
    ("data", "phantom_metastases"): "dnet",
    ("experiment", "detection"): "dnet",
    ("experiment", "krivov2018"): "unet",
}


def build(composed: Compose, model: str, *overrides: str):
    config = composed(f"model={model}", *SMALL[model], "filters.base=8", *overrides)
    return instantiate(config.module, _convert_="all")


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group, options in OPTIONS.items() for option in options],
)
def test_every_option_builds(composed: Compose, group: str, option: str):
    mandatory = ["split.path=split.json"] if (group, option) == ("split", "file") else []
    model = MODEL_OF.get((group, option), "aeunet")
    small = SMALL[model] if group != "experiment" else ["filters.base=8"]
    chosen = [f"{group}={option}"] if group == "model" else [f"model={model}", f"{group}={option}"]
    config = composed(*chosen, *small, *mandatory)
    module = instantiate(config.module, _convert_="all").eval()
    optimizer = module.configure_optimizers()["optimizer"]
    assert optimizer.param_groups[0]["lr"] > 0
    instantiate(config.data, _convert_="all")
    image = torch.randn(1, config.model.in_channels, 16, 16, 16)
    with torch.no_grad():
        assert module(image).shape == (1, config.model.out_channels, 16, 16, 16)


@pytest.mark.parametrize(
    ("model", "axis"),
    [(model, axis) for model in OPTIONS["model"] for axis in sorted(AXES_OF[model])],
)
def test_every_axis_changes_every_network(composed: Compose, model: str, axis: str):
    """A network that ignored an axis would make a sweep of equal runs."""
    levels = AXES[axis]
    networks = [str(build(composed, model, f"{axis}={level}").network) for level in levels]
    assert all(first != second for first, second in pairwise(networks))
    assert len(set(networks)) == len(levels)


def test_numbers_of_the_paper(composed: Compose):
    config = composed("data=brats")
    assert config.data.sampler.patch_size == 80
    assert config.data.patches_per_epoch == 2101
    assert list(config.data.cache.crop) == [160, 190, 140]
    assert list(config.data.sampler.scale) == [0.9, 1.1]
    assert config.callbacks.early_stopping.patience == 2
    assert config.scheduler.power == 0.9
    assert dict(config.loss.weights) == {"WT": 0.33, "TC": 0.33, "ET": 0.33}
    assert (config.module.l2_weight, config.module.kl_weight) == (0.1, 0.1)


def test_the_full_experiment_has_the_numbers_of_the_paper(composed: Compose):
    config = composed("experiment=frey2019")
    assert (config.filters.base, config.filters.ratio) == (32, 2)
    assert (config.optimizer.lr, config.trainer.max_epochs) == (1e-4, 50)
    assert (config.data.sampler.patch_size, config.window.patch_size) == (80, 80)
    assert config.data.cache.spacing_mm == 1
    small = composed("experiment=frey2019", "data=phantom", "filters.base=8")
    assert (small.filters.base, small.data.sampler.patch_size) == (8, 32)


def test_numbers_of_the_other_paper(composed: Compose):
    config = composed("experiment=krivov2018", "model=dnet")
    assert config.data.sampler.patch_size == 68
    assert config.data.batch_size == 64
    assert config.data.sampler.lesion_share == 0.5
    assert config.data.sampler.others == "lesion_free"
    assert config.filters == {"base": 16, "ratio": 2}
    assert instantiate(config.data.sampler).halo == 26
    config = composed("experiment=krivov2018", "model=unet")
    assert list(config.data.sampler.patch_size) == [144, 160, 128]
    assert config.data.batch_size == 2
    assert config.split.test == 0.2


def test_norm_that_breaks_exact_tiles_is_refused(composed: Compose):
    config = composed("model=dnet", "norm=group")
    with pytest.raises(Exception, match="norm: D-Net needs one that treats every voxel alike"):
        instantiate(config.module, _convert_="all")


def test_patch_that_does_not_fill_whole_boxes_is_refused(composed: Compose):
    config = composed("model=dnet", "data.sampler.patch_size=70")
    with pytest.raises(Exception, match=r"patch_size: expected 52 \+ a multiple of 4, found 70"):
        instantiate(config.module, _convert_="all")


def run_name(*overrides: str) -> str:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
    return Path(config.hydra.run.dir).name


def test_name_of_a_run_is_what_it_asks_however_it_is_typed():
    first = run_name("norm=batch", "seed=3")
    assert first.startswith("aeunet-batch-s3-")
    assert first == run_name("seed=3", "norm=batch", "logger=csv", "data.num_workers=2")
    others = {first, run_name("norm=batch", "seed=3", "optimizer.lr=1e-5"), run_name("seed=3")}
    assert len(others) == 3


@pytest.mark.parametrize(
    ("script", "arguments", "answer", "code"),
    [
        ("train.py", ["--help"], "downsampling: avg, max, stride", 0),
        ("train.py", ["--cfg", "job"], "bottleneck: 128", 0),
        ("train.py", ["norm=grop"], "Available options in 'norm'", 1),
        ("train.py", ["model.dpeth=4"], "Key 'dpeth' is not in struct", 1),
        ("predict.py", ["--help"], "checkpoint=RUN/best.ckpt", 0),
        ("predict.py", ["chekpoint=a"], "Key 'chekpoint' is not in struct", 1),
        ("predict.py", [], "Missing mandatory value: checkpoint", 1),
        ("evaluate.py", ["--help"], "predictions=FOLDER", 0),
        ("evaluate.py", ["predctions=a"], "Key 'predctions' is not in struct", 1),
        ("evaluate.py", [], "Missing mandatory value: input", 1),
    ],
)
def test_help_and_typos_are_answered_without_torch(
    script: str, arguments: list[str], answer: str, code: int
):
    command = [sys.executable, "-X", "importtime", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert answer in done.stdout + done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "hydra" in imported
    assert not imported & {"torch", "pytorch_lightning", "torchio", "monai", "wandb", "scipy"}


def test_every_network_file_is_a_choice():
    """File `aeunet.py` is class `AEUNet` is `model=aeunet`."""
    files = {path.stem for path in (ROOT / "lightning_modules/networks").glob("*.py")}
    assert set(OPTIONS["model"]) == files - {"__init__", "blocks"}
