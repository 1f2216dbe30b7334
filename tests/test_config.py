"""Every option of every group composes, builds and changes what it says; nothing else is taken."""

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torchio as tio
import yaml
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from datamodules.augmentation import RandomAppearance, RandomIntensity
from datamodules.cases import Case
from datamodules.splits import PARTS
from experiments.command import one_line
from experiments.cost import predict_step
from experiments.run import identity
from lightning_modules.networks.dnet import GEOMETRY
from tests.conftest import ROOT

Compose = Callable[..., DictConfig]

CONF = ROOT / "conf"
OPTIONS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir()
}
# Axes of ablations that are numbers; axes that are groups stand in the file of the model.
NUMBERS = {
    "filters.base": [8, 16],
    "filters.ratio": [1.5, 2, 2.5],
    "model.depth": [3, 4, 5],
    "model.bottleneck": [32, 128],
    "model.dropout": [0, 0.2],
}


def groups_of(model: str) -> set[str]:
    """The groups that the file of a model lists, and those that its loss lists."""
    groups: set[str] = set()
    files = [CONF / "model" / f"{model}.yaml"]
    while files:
        for entry in yaml.safe_load(files.pop().read_text()).get("defaults", []):
            if isinstance(entry, dict):
                ((group, option),) = entry.items()
                group = group.strip("/").partition("@")[0]
                groups.add(group)
                if group == "loss":
                    files.append(CONF / "loss" / f"{option}.yaml")
    return groups | ({"region_weights"} if model == "aeunet" else set())


def constructor_groups() -> list[str]:
    """Groups that some network takes as an argument: `norm: ${norm}`."""
    found: set[str] = set()
    for path in (CONF / "model").glob("*.yaml"):
        arguments = yaml.safe_load(path.read_text())["model"].values()
        found |= {str(value).strip("${}") for value in arguments} & set(OPTIONS)
    return sorted(found)


def small(model: str) -> list[str]:
    """Patches that a network takes: small ones, but for a halo."""
    halo = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())["geometry"]["halo"]
    return [f"patches.size={2 * halo + 4 if halo else 32}"]


def model_for(group: str, option: str) -> str:
    """A network that an option is about."""
    if group == "model":
        return option
    if group == "patches":
        return option.partition("_")[0]
    detectors = ("detection", "krivov2018", "real_scans_metastases")
    if option in ("exact_tiles", "lesions", "cross_entropy", *detectors):
        return "dnet"
    return "unet" if option == "whole_volume" else "aeunet"


def with_its_regions(composed: Compose, group: str, option: str) -> list[str]:
    """An option, and what goes with it: the weights of a data set's regions, or the reverse."""
    for data in OPTIONS["data"] if group == "region_weights" else [option]:
        regions = set(composed(f"data={data}").data.data_set.regions)
        for weights in OPTIONS["region_weights"] if group == "data" else [option]:
            if (
                set(yaml.safe_load((CONF / "region_weights" / f"{weights}.yaml").read_text()))
                == regions
            ):
                return [f"data={data}", f"region_weights={weights}"]
    raise AssertionError(f"{group}={option}: regions without weights")


def build(config: DictConfig) -> Any:
    return instantiate(config.module, _convert_="all")


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group, options in OPTIONS.items() for option in options],
)
def test_every_option_builds(composed: Compose, group: str, option: str):
    model = model_for(group, option)
    overrides = [f"model={model}", "filters.base=8"]
    if group in ("data", "region_weights"):
        overrides += with_its_regions(composed, group, option)
    elif group != "model":
        overrides += [f"{group}={option}"]
    overrides += ["experiment=null_report"] if group == "equal_compute" else []
    overrides += [] if group in ("experiment", "patches") else small(model)
    overrides += ["split.path=split.json"] if option == "file" else []
    config = composed(*overrides)
    module = build(config).eval()
    optimizer = module.configure_optimizers()["optimizer"]
    assert optimizer.param_groups[0]["lr"] > 0
    instantiate(config.data, _convert_="all")
    image = torch.randn(1, config.model.in_channels, 16, 16, 16)
    with torch.no_grad():
        assert module(image).shape == (1, config.model.out_channels, 16, 16, 16)


def test_every_yaml_is_an_option_of_a_group_and_says_what_it_is():
    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        assert path.parent == CONF or path.parent.parent == CONF or "hydra" in path.parts, path
        described = any(line.startswith("# ") for line in text.splitlines()[:3])
        assert described or len(text.splitlines()) <= 6, path


def test_few_options_reach_beyond_their_own_group():
    """A model and an experiment say all that they change in their own file; nothing else does.

    But for the networks at equal compute, which are trained for a length of their own.
    """
    reaching = {
        path.parent.name for path in CONF.rglob("*.yaml") if "@package _global_" in path.read_text()
    }
    assert reaching == {"model", "experiment", "equal_compute"}


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_every_axis_that_is_a_number_changes_the_network_or_is_refused(
    composed: Compose, model: str
):
    for axis, levels in NUMBERS.items():
        if axis.startswith("model.") and axis[6:] not in composed(f"model={model}").model:
            with pytest.raises(ConfigCompositionException, match=axis):
                composed(f"model={model}", f"{axis}={levels[0]}")
            continue
        networks = [
            str(build(composed(f"model={model}", *small(model), f"{axis}={level}")).network)
            for level in levels
        ]
        assert all(first != second for first, second in pairwise(networks)), axis


@pytest.mark.parametrize("model", OPTIONS["model"])
@pytest.mark.parametrize("group", [*constructor_groups(), "region_weights"])
def test_every_axis_that_is_a_group_changes_the_module_or_is_refused(
    composed: Compose, model: str, group: str
):
    """A network that ignored an axis would make a sweep of equal runs under several names."""
    overrides = [[f"model={model}", *small(model), f"{group}={o}"] for o in OPTIONS[group]]
    if group not in groups_of(model):
        for arguments in overrides:
            with pytest.raises(ConfigCompositionException) as error:
                composed(*arguments)
            assert one_line(error.value).startswith(f"{group}: not a group of this model")
        return
    refused, built = 0, []
    for arguments in overrides:
        config = composed(*arguments)
        try:
            module = build(config)
        except InstantiationException as error:
            refused += group in one_line(error)  # a level that this network cannot take
        else:
            built.append(str(module.network) + str(dict(module.loss.named_buffers())))
    assert len(set(built)) == len(built) == len(overrides) - refused >= 1


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "model=unet", "downsampling=stride,avg,max"],
        ["-m", "model=dnet", "region_weights=equal,whole"],
    ],
)
def test_a_sweep_over_an_axis_that_the_network_lacks_is_one_line(arguments: list[str]):
    done = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    group = arguments[-1].partition("=")[0]
    assert done.returncode == 1
    (line,) = (done.stdout + done.stderr).splitlines()
    assert f"{group}: not a group of this model" in line


@pytest.mark.parametrize(
    ("augmentation", "scale", "transforms"),
    [
        ("paper", [0.9, 1.1], ["RandomFlip", "RandomIntensity"]),
        ("spatial", [0.9, 1.1], ["RandomFlip"]),
        ("intensity", [1, 1], ["RandomFlip", "RandomIntensity"]),
        ("wide", [0.9, 1.1], ["RandomFlip", "RandomAppearance"]),
        ("none", [1, 1], []),
    ],
)
def test_an_augmentation_scales_flips_and_changes_intensities_as_its_name_says(
    composed: Compose, augmentation: str, scale: list[float], transforms: list[str]
):
    config = composed(f"augmentation={augmentation}", "inputs=both")
    data = instantiate(config.data, _convert_="all")
    assert list(data.sampler.scale) == scale
    transform = data.augmentation
    steps = list(transform.transforms) if isinstance(transform, tio.Compose) else [transform]
    assert [step.name for step in steps] == transforms
    assert not any(step.copy for step in (transform, *steps))
    for step in steps:
        if isinstance(step, tio.RandomFlip):
            assert (step.axes, step.flip_probability) == ((0, 1, 2), 0.5)
        if isinstance(step, RandomIntensity):
            assert (step.scale, step.shift) == ((0.9, 1.1), (-0.1, 0.1))
        if isinstance(step, RandomAppearance | RandomIntensity):
            assert step.modality_of_channels == [0, 1, 2, 3, None] * 2


@pytest.mark.parametrize("inputs", OPTIONS["inputs"])
@pytest.mark.parametrize(("augmentation", "step"), [("paper", "intensity"), ("wide", "appearance")])
def test_intensities_are_changed_of_as_many_channels_as_there_are(
    composed: Compose, inputs: str, augmentation: str, step: str
):
    config = composed(f"augmentation={augmentation}", f"inputs={inputs}")
    transform = instantiate(config.augmentation.transform, _convert_="all")
    assert len(transform[step].modality_of_channels) == config.inputs.channels


def test_each_part_of_the_wide_augmentation_has_keys_of_its_own(composed: Compose):
    parts = instantiate(composed("augmentation=wide").data, _convert_="all").augmentation
    names = list(parts["appearance"].parts)
    assert all(0 < part.probability < 1 for part in parts["appearance"].parts.values())
    assert len(set(names)) == len(names) == 10
    for name in names:
        config = composed("augmentation=wide", f"augmentation.{name}.probability=0")
        found = instantiate(config.data, _convert_="all").augmentation["appearance"].parts
        assert [other for other, part in found.items() if not part.probability] == [name]
    changes = ["augmentation.noise.sd=[1,2]", "augmentation.blur.sd_mm=[3,4]"]
    found = (
        instantiate(
            composed(
                "augmentation=wide", "data=phantom", "data.data_set.spacing_mm=4", *changes
            ).data,
            _convert_="all",
        )
        .augmentation["appearance"]
        .parts
    )
    assert (found["noise"].sd, found["blur"].sd_mm) == ((1, 2), (3, 4))
    assert found["blur"].spacing_mm == found["slices"].spacing_mm == 4


@pytest.mark.parametrize("data", OPTIONS["data"])
@pytest.mark.parametrize("model", OPTIONS["model"])
def test_a_data_option_writes_data_only(composed: Compose, data: str, model: str):
    chosen = OmegaConf.to_container(composed(f"model={model}", f"data={data}"))
    default = OmegaConf.to_container(composed(f"model={model}"))
    for config in (chosen, default):
        for key in ("data", "choices"):
            del config[key]  # pyright: ignore
    assert chosen == default


@pytest.mark.parametrize("data", OPTIONS["data"])
@pytest.mark.parametrize("model", OPTIONS["model"])
def test_length_is_that_of_trainer_and_patches_whatever_the_data(
    composed: Compose, data: str, model: str
):
    choice = [f"model={model}", f"data={data}"]
    assert composed(*choice, "trainer=debug").trainer.max_epochs == 1
    assert composed(*choice, "trainer=overfit").trainer.max_epochs == 50
    short = composed(*choice, "trainer.max_epochs=2")
    assert short.trainer.check_val_every_n_epoch == min(2, short.patches.epochs_per_validation)
    config = composed(*choice, "patches.size=60", "patches.batch_size=4", "patches.per_epoch=8")
    assert config.data.sampler.patch_size == 60
    assert (config.data.batch_size, config.data.patches_per_epoch) == (4, 8)


def test_regions_that_the_loss_has_no_weights_for_are_one_line(composed: Compose):
    with pytest.raises(Exception, match="region_weights") as error:
        build(composed("data=metastases"))
    assert one_line(error.value) == (
        "region_weights: expected a weight for each of lesion, found those of WT, TC, ET"
    )
    assert build(composed("data=metastases", "region_weights=lesion")).loss is not None


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("patches", OPTIONS["patches"])
def test_the_learning_rate_comes_with_the_patches(composed: Compose, patches: str, optimizer: str):
    choice = [f"model={model_for('patches', patches)}", f"patches={patches}"]
    config = composed(*choice, f"optimizer={optimizer}")
    assert config.optimizer.lr == config.patches.learning_rate > 0
    assert composed(*choice, "optimizer.lr=1e-5").optimizer.lr == 1e-5


def test_the_null_report_on_phantoms_asks_the_questions_of_the_paper(composed: Compose):
    """It differs in data, length, looks, and in the weights that are scored."""
    phantoms, brats = composed("experiment=null_report"), composed("experiment=null_report_brats")
    assert brats.patches == composed("patches=aeunet_paper").patches
    proxy = composed("patches=aeunet_proxy").patches
    own = {"epochs": 18, "epochs_per_validation": 6, "learning_rate": 1e-3}
    assert phantoms.patches == {**proxy, **own}
    for key in ("filters", "norm", "activation", "downsampling", "augmentation"):
        assert phantoms[key] == brats[key]
    for key in ("margin", "reason", "alpha"):
        assert phantoms.report[key] == brats.report[key]
    assert (phantoms.report.looks, brats.report.looks) == ([5], [5, 8, 12])
    assert phantoms.callbacks.best.monitor is None
    assert brats.callbacks.best.monitor == "val/dice"


def test_the_small_model_of_frey_and_nau_differs_from_the_large_one_in_its_filters(
    composed: Compose,
):
    """Section 2.1: "a simplified model with only 8 filters at the input stage"."""
    large = composed("experiment=frey2019", "split=fraction")
    small = composed("experiment=null_report_brats", f"split.test={large.split.test}")
    assert (large.filters.base, small.filters.base) == (32, 8)
    large.filters.base = small.filters.base
    assert identity(large) == identity(small)


def test_the_u_net_is_trained_for_as_much_longer_than_d_net_as_in_the_paper(composed: Compose):
    """240 hours against 22 on the same GPU (Krivov & Belyaev 2018, sections 2.1 and 2.2)."""
    gflops = {}
    for model in ("dnet", "unet"):
        config = composed("experiment=krivov2018", f"model={model}")
        size = config.patches.size
        sides = [size] * 3 if isinstance(size, int) else size
        shape = (1, config.model.in_channels, *sides)
        patch = predict_step(build(config), shape, regions=1).cost.gflops
        gflops[model] = patch * config.patches.per_epoch * config.trainer.max_epochs
    assert gflops["unet"] / gflops["dnet"] == pytest.approx(240 / 22, rel=0.01)


def test_numbers_of_frey_and_nau(composed: Compose):
    config = composed("experiment=frey2019")
    assert (config.filters.base, config.filters.ratio, config.model.depth) == (32, 2, 4)
    assert (config.optimizer.lr, config.trainer.max_epochs) == (1e-4, 50)
    assert (config.data.sampler.patch_size, config.inference.patch_size) == (80, 80)
    assert (config.data.patches_per_epoch, config.data.batch_size) == (2101, 1)
    assert config.data.cache.spacing_mm == 1
    assert list(config.data.cache.crop) == [160, 190, 140]
    assert config.data.augmentation == composed("augmentation=paper").data.augmentation
    assert list(config.data.sampler.scale) == [0.9, 1.1]
    assert config.callbacks.early_stopping.patience == 2
    assert (config.scheduler.power, config.scheduler.total_iters) == (0.9, 50)
    assert dict(config.loss.segmentation.weights) == {"WT": 0.33, "TC": 0.33, "ET": 0.33}
    assert (config.loss.l2_weight, config.loss.kl_weight) == (0.1, 0.1)
    small = composed(
        "experiment=frey2019", "data=phantom", "patches=aeunet_proxy", "filters.base=8"
    )
    assert (small.filters.base, small.data.sampler.patch_size) == (8, 32)


def test_numbers_of_krivov_and_belyaev(composed: Compose):
    config = composed("experiment=krivov2018")
    assert config.model._target_.endswith(".DNet")
    assert (config.data.sampler.patch_size, config.data.batch_size) == (68, 64)
    assert config.data.sampler.lesion_share == 0.5
    assert config.data.sampler.others == "lesion_free"
    assert config.filters == {"base": 16, "ratio": 2}
    assert (config.geometry.halo, config.geometry.stride) == GEOMETRY == (26, 4)
    assert instantiate(config.data.sampler).halo == 26
    for model in ("dnet", "unet"):
        config = composed("experiment=krivov2018", f"model={model}")
        assert list(config.data.sampler.scale) == [1, 1]
        assert not config.data.augmentation.transforms
    assert list(config.data.sampler.patch_size) == [144, 160, 128]
    assert (config.data.batch_size, config.data.sampler.halo) == (2, 0)
    assert config.split.test == 0.2


def test_norm_that_breaks_exact_tiles_is_refused(composed: Compose):
    with pytest.raises(Exception, match="norm: D-Net needs one that treats every voxel alike"):
        build(composed("model=dnet", "norm=group"))


def test_patch_that_does_not_fill_whole_boxes_is_refused(composed: Compose):
    with pytest.raises(Exception, match=r"patch_size: expected 52 \+ a multiple of 4, found 70"):
        build(composed("model=dnet", "patches.size=70"))


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "arguments", "answer", "code"),
    [
        ("train.py", ["--help"], "downsampling: avg, max, stride", 0),
        ("train.py", ["--cfg", "job"], "bottleneck: 128", 0),
        ("train.py", ["--cfg", "job", "experiment=krivov2018"], "dnet.DNet", 0),
        ("train.py", ["--cfg", "job", "--resolve", "experiment=krivov2018"], "patch_size: 68", 0),
        ("train.py", ["--cfg", "job", "--resolve"], "in_channels: 4", 0),
        ("train.py", ["norm=grop"], "Available options in 'norm'", 1),
        ("train.py", ["model.dpeth=4"], "Could not override 'model.dpeth'", 1),
        ("predict.py", ["--help"], "checkpoint=RUN/best.ckpt", 0),
        ("predict.py", ["chekpoint=a"], "Could not override 'chekpoint'", 1),
        ("predict.py", [], "input: expected a text, found nothing", 1),
        ("evaluate.py", ["--help"], "predictions=FOLDER", 0),
        ("evaluate.py", ["predctions=a"], "Could not override 'predctions'", 1),
        ("evaluate.py", [], "input: expected a text, found nothing", 1),
    ],
)
def test_help_and_typos_are_answered_without_torch(
    script: str, arguments: list[str], answer: str, code: int
):
    command = [sys.executable, "-X", "importtime", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert answer in done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(said) <= 1
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "hydra" in imported
    assert not imported & {"torch", "pytorch_lightning", "torchio", "monai", "wandb", "scipy"}


def test_every_network_is_a_choice():
    """File `aeunet.py` is class `AEUNet` is `model=aeunet`."""
    files = {path.stem for path in (ROOT / "lightning_modules/networks").glob("*.py")}
    parts = {
        "__init__",
        "background",
        "blocks",
        "checkpointing",
        "contracting",
        "geometry",
        "initial",
    }
    assert set(OPTIONS["model"]) == files - parts


@pytest.mark.parametrize(
    ("experiment", "sizes"), [("null_report", (57, 22, 201)), ("detection", (178, 39, 103))]
)
def test_the_parts_of_an_experiment_have_the_sizes_that_its_file_states(
    composed: Compose, experiment: str, sizes: tuple[int, int, int]
):
    config = composed(f"experiment={experiment}")
    names = [f"phantom_{number:04}" for number in range(config.data.data_set.count)]
    cases = [Case(name, {}, mask=Path(name)) for name in names]
    split = instantiate(config.split)(cases)
    assert tuple(len(getattr(split, part)) for part in PARTS) == sizes
