"""Values that cannot be used end in one line, before anything heavy is imported or written."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf, open_dict

import datamodules.brats
import datamodules.metastases
import datamodules.phantom
import datamodules.splits
import experiments.trained
import lightning_modules.metrics.lesions
import lightning_modules.metrics.regions
import train
from errors import InputError
from experiments import combinations, schema
from experiments.command import BUSY, BusyError, LogJobReturn, command, job, sweep_flag_first
from experiments.rules import FLAGS
from experiments.schema import checked
from hydra_plugins.one_factor_sweeper import add_to_plan, read_plan
from tests.conftest import ROOT

REFERENCE = re.compile(r"\$\{[\w.]+\}")  # to another key, whose value is checked there
OPTIONS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted((ROOT / "conf").iterdir())
    if folder.is_dir() and folder.name != "hydra"
}


@cache
def composed_once(*overrides: str, name: str = "config") -> DictConfig:
    """Compose a configuration as an entry point does, without the node `hydra`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(name, list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
        if name == "config":
            config.choices = OmegaConf.to_container(config.choices, resolve=True)
    return config


@cache
def plain_once(*overrides: str, name: str) -> dict[str, Any]:
    """Compose a configuration as plain dictionaries, references not resolved."""
    plain: Any = OmegaConf.to_container(composed_once(*overrides, name=name))
    return plain


@pytest.fixture(autouse=True)
def without_hydra() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


def with_values(config: DictConfig, *overrides: str) -> DictConfig:
    """Set values as Hydra does, from the text of the command line."""
    config = config.copy()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        with open_dict(config):
            if override.is_delete():
                parent, _, name = override.key_or_group.rpartition(".")
                del OmegaConf.select(config, parent)[name]
            else:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    return config


def line_of(config: DictConfig) -> str:
    with pytest.raises(InputError) as error:
        checked(config)
    assert "\n" not in str(error.value)
    return str(error.value)


MODEL_DNET, MODEL_UNET = "model=dnet", "model=unet"
NULL_REPORT = "experiment=null_report"
TRAIN_CASES = {  # base configuration -> override -> line
    (): {
        "filters.base=0": "filters.base: expected a whole number from 1 on, found 0",
        "filters.base=-16": "filters.base: expected a whole number from 1 on, found -16",
        "filters.base=8.5": "filters.base: expected a whole number from 1 on, found 8.5",
        "plan=maybe": "plan: expected true or false, found maybe",
        "plan=true": "plan: expected plan=true on the command line, with no flag but -m, found it "
        "elsewhere",
        "vram_gb=6": "vram_gb: expected plan=true beside it, found a run to be trained",
        "vram_gb=0": "vram_gb: expected a number above 0, or null, found 0",
        "filters.ratio=0": "filters.ratio: expected a number above 0, found 0",
        "filters.ratio=-2": "filters.ratio: expected a number above 0, found -2",
        "model.bottleneck=0": "model.bottleneck: expected a whole number from 1 on, found 0",
        "model.depth=3.5": "model.depth: expected a whole number from 2 to 6, found 3.5",
        "model.depth=7": "model.depth: expected a whole number from 2 to 6, found 7",
        "model.dropout=1": "model.dropout: expected a number from 0 and below 1, found 1",
        "model.prior=0": "model.prior: expected a number above 0 and below 1, found 0",
        "model.in_channels=3": "model.in_channels: expected 4, the channels of the inputs, found 3",
        "region_weights.ET=0": "region_weights.ET: expected a number above 0, found 0",
        "region_weights.WT=-1": "region_weights.WT: expected a number above 0, found -1",
        "patches.window=0": "patches.window: expected a whole number from 1 on, or three as "
        "[x, y, z], found 0",
        "inference.patch_size=0": "inference.patch_size: expected a whole number from 1 on, or "
        "three as [x, y, z], found 0",
        "patches.size=0": "patches.size: expected a whole number from 1 on, or three as "
        "[x, y, z], found 0",
        "patches.size=[16,16]": "patches.size: expected a whole number from 1 on, or three as "
        "[x, y, z], found [16, 16]",
        "patches.size=20": "patches.size: expected sides divisible by 8, as 4 levels need, "
        "found 20",
        "patches.overlap=1": "patches.overlap: expected a number from 0 and below 1, found 1",
        "patches.batch_size=0": "patches.batch_size: expected a whole number from 1 on, found 0",
        "patches.batch_size=-2": "patches.batch_size: expected a whole number from 1 on, found -2",
        "patches.batch_size=x": "patches.batch_size: expected a whole number from 1 on, found x",
        "patches.per_epoch=0": "patches.per_epoch: expected a whole number from 1 on, found 0",
        "patches.per_epoch=-4": "patches.per_epoch: expected a whole number from 1 on, found -4",
        "metrics.scores.threshold=2": "metrics.scores.threshold: expected a number above 0 and "
        "below 1, found 2",
        "trainer.max_epochs=-1": "trainer.max_epochs: expected a whole number from 1 on, found -1",
        "trainer.max_epochs=0": "trainer.max_epochs: expected a whole number from 1 on, found 0",
        "trainer.max_epochs=1.5": "trainer.max_epochs: expected a whole number from 1 on, "
        "found 1.5",
        "trainer.max_epochs=abc": "trainer.max_epochs: expected a whole number from 1 on, "
        "found abc",
        "trainer.max_epochs=true": "trainer.max_epochs: expected a whole number from 1 on, "
        "found true",
        "trainer.check_val_every_n_epoch=10": "trainer.check_val_every_n_epoch: expected at most "
        "the 9 of trainer.max_epochs, found 10",
        "trainer.accelerator=gpux": "trainer.accelerator: expected auto, cpu, gpu, cuda, mps or "
        "tpu, found gpux",
        "optimizer.lr=-1": "optimizer.lr: expected a number from 0 on, found -1",
        "optimizer.lr=nan": "optimizer.lr: expected a number from 0 on, found nan",
        "optimizer.lr=abc": "optimizer.lr: expected a number from 0 on, found abc",
        "optimizer.lr=null": "optimizer.lr: expected a number from 0 on, found null",
        "seed=-1": "seed: expected a whole number from 0 to 4294967295, found -1",
        "seed=abc": "seed: expected a whole number from 0 to 4294967295, found abc",
        "seed=null": "seed: expected a whole number from 0 to 4294967295, found null",
        "seed=1e11": "seed: expected a whole number from 0 to 4294967295, found 100000000000.0",
        "seed=100000000000": "seed: expected a whole number from 0 to 4294967295, found "
        "100000000000",
        "data.num_workers=-1": "data.num_workers: expected a whole number from 0 on, found -1",
        "data.data_set.count=0": "data.data_set.count: expected a whole number from 1 on, found 0",
        "data.data_set.spacing_mm=0": "data.data_set.spacing_mm: expected a number from 0.5 to 8, "
        "found 0",
        "data.cache.spacing_mm=0": "data.cache.spacing_mm: expected a number above 0, found 0",
        "data.cache.crop=[9,9]": "data.cache.crop: expected brain or [3 values, each a number "
        "above 0], found [9, 9]",
        "data.cache.crop=[9,9,1]": "data.cache.crop: expected brain or three sides of at least "
        "2 mm, found [9, 9, 1]",
        "data.data_set.modalities=[t1,t9]": "data.data_set.modalities: expected a list of one "
        "or more of t1, t1ce, t2, flair, each at most once, found [t1, t9]",
        "data.data_set.modalities=[t1,t1]": "data.data_set.modalities: expected a list of one "
        "or more of t1, t1ce, t2, flair, each at most once, found [t1, t1]",
        "data.data_set.modalities=[]": "data.data_set.modalities: expected a list of one or more",
        "data.data_set.regions=[lesion]": "data.data_set.regions: expected some of WT, TC, ET, "
        "found [lesion]",
        "data.data_set.regions=[WT,TC]": "region_weights: expected a weight for each of WT, TC, "
        "found those of WT, TC, ET",
        "data.sampler.lesion_share=1.1": "data.sampler.lesion_share: expected a number from 0 to "
        "1, found 1.1",
        "patches.others=nowhere": "patches.others: expected anywhere or lesion_free, found nowhere",
        "augmentation.scale=[1.1,0.9]": "augmentation.scale: expected [low, high], each a number "
        "above 0, found [1.1, 0.9]",
        "split.test=1": "split.test: expected a number from 0 and below 1, found 1",
        "split.validation=0.9": "split: expected validation + test below 1, found 0.9 + 0.15",
        "again=maybe": "again: expected true or false, found maybe",
        "again=2": "again: expected true or false, found 2",
        "again=null": "again: expected true or false, found null",
        "logger.wandb.offline=never": "logger.wandb.offline: expected true or false, found never",
        "name=../out": "name: expected the name of a folder in runs/, found ../out",
        "name=/tmp/out": "name: expected the name of a folder in runs/, found /tmp/out",
        "name=''": "name: expected the name of a folder in runs/, found ''",
        "name=null": "name: expected the name of a folder in runs/, found null",
        "objective=val/dise": "objective: expected val/ and one of dice, dice_WT, ",
        "objective=7": "objective: expected a text, found 7",
        "metrics.ranked_by=accuracy": "metrics.ranked_by: expected one of dice, dice_WT, ",
        "callbacks.best.monitor=val/foo": "callbacks.best.monitor: expected val/ and one of ",
        "callbacks.early_stopping.monitor=null": "callbacks.early_stopping.monitor: expected a "
        "text, found null",
        "callbacks.early_stopping.monitor=loss": "callbacks.early_stopping.monitor: expected val/",
        "callbacks.early_stopping.patience=-1": "callbacks.early_stopping.patience: expected a "
        "whole number from 0 on, found -1",
        "callbacks.slices=null": "callbacks.slices: expected keys of its own (~callbacks.slices "
        "removes it), found null",
        "filters=3": "filters: expected keys of its own, found 3",
        "~patches.size": "Interpolation key 'patches.size' not found",
    },
    ("augmentation=wide",): {
        "augmentation.noise.probability=2": "augmentation.noise.probability: expected a number "
        "from 0 to 1, found 2",
        "augmentation.noise.sd=[0.3,0]": "augmentation.noise.sd: expected [low, high], each a "
        "number from 0 on, found [0.3, 0]",
        "augmentation.gamma.exponent=[0,1]": "augmentation.gamma.exponent: expected [low, high], "
        "each a number above 0, found [0, 1]",
        "augmentation.ringing.kept=[0.5,1.1]": "augmentation.ringing.kept: expected [low, high], "
        "each a number above 0 to 1, found",
        "augmentation.blur=null": "augmentation.blur: expected keys of its own, found null",
    },
    ("callbacks=averaged",): {
        "callbacks.average.decay=1": "callbacks.average.decay: expected a number from 0 and below "
        "1, found 1",
    },
    (MODEL_DNET,): {
        "patches.size=70": "patches.size: expected sides of 52 + a multiple of 4, found 70",
        "patches.size=48": "patches.size: expected sides of 52 + a multiple of 4, found 48",
        "patches.batch_size=3": "patches.batch_size: expected a divisor of patches.per_epoch=160 "
        "of which a share of 0.5 is a whole number, as patches.others=lesion_free makes batches "
        "exact, found 3",
        "callbacks.threshold.target_fp=-1": "callbacks.threshold.target_fp: expected a number from "
        "0 on, found -1",
    },
    (MODEL_DNET, "norm=group"): {"seed=1": "norm: expected one for DNet, found GroupNorm, for "},
    (MODEL_DNET, "inference=whole_volume"): {
        "seed=1": "inference: expected one for DNet, found WholeVolume, for AEUNet, UNet3D only"
    },
    (MODEL_DNET, "metrics=regions"): {
        "seed=1": "callbacks.threshold: expected metrics=lesions, which it looks at, found"
    },
    (MODEL_UNET, "loss=autoencoder", "region_weights=lesion"): {
        "seed=1": "loss: expected one for UNet3D, found AutoencoderLoss, for AEUNet only"
    },
    (MODEL_UNET,): {"model.depth=6": "model.depth: expected a whole number from 2 to 5, found 6"},
    (MODEL_UNET, "data=phantom"): {
        "seed=1": "data.data_set.regions: expected 1, as many as the network has outputs "
        "(data=phantom_metastases and data=metastases have 1), found 3: WT, TC, ET"
    },
    ("data=metastases",): {
        "seed=1": "region_weights: expected a weight for each of lesion, found those of WT, TC, ET"
    },
    ("split=folds",): {"split.fold=5": "split.fold: expected a whole number from 0 to 4, found 5"},
    ("split=file",): {"seed=1": "split.path: expected a text, found nothing"},
    (NULL_REPORT,): {
        "report.margin.WT=abc": "report.margin.WT: expected a number above 0, found abc",
        "report.margin.WT=0": "report.margin.WT: expected a number above 0, found 0",
        "report.margin.XX=0.1": "report.margin: expected margins for some of WT, TC, ET, found "
        "[WT, TC, XX]",
        "report.alpha=0.5": "report.alpha: expected a number above 0 and below 0.5, found 0.5",
        "report.looks=[5,1]": "report.looks: expected a list of values, each a whole number from 2 "
        "on, found [5, 1]",
        "report.looks=5": "report.looks: expected a list of values, each a whole number from 2 on, "
        "found 5",
    },
}


@pytest.mark.parametrize(
    ("base", "override", "line"),
    [
        pytest.param(base, override, line, id=" ".join([*base, override]))
        for base, cases in TRAIN_CASES.items()
        for override, line in cases.items()
    ],
)
def test_a_value_of_train_that_cannot_be_used_is_one_line(
    base: tuple[str, ...], override: str, line: str
):
    assert line_of(with_values(composed_once(*base), override)).startswith(line)


@pytest.mark.parametrize(
    ("name", "overrides", "line"),
    [
        ("predict", ["device=foo"], "device: expected auto, cpu, cuda, cuda:1 or mps, found foo"),
        ("predict", ["device=cuda:x"], "device: expected auto, cpu, cuda, cuda:1 or mps, found"),
        ("predict", ["flips=maybe"], "flips: expected true or false, found maybe"),
        ("predict", ["pictures=2"], "pictures: expected true or false, found 2"),
        ("predict", ["precision=8"], "precision: expected 32, 16 or bf16, found 8"),
        ("predict", ["et_label=2"], "et_label: expected 3, 4 or null, found 2"),
        ("predict", ["thresholds=2"], "thresholds: expected checkpoint, paper, a number above 0"),
        ("predict", ["thresholds={WT: 0}"], "thresholds: expected checkpoint, paper, a number"),
        ("predict", ["thresholds=chosen"], "thresholds: expected checkpoint, paper, numbers above"),
        ("predict", ["checkpoint=nowhere"], "checkpoint: expected a file or the folder of a run, "),
        ("predict", ["checkpoint=3"], "checkpoint: expected a checkpoint, the folder of a run, or"),
        ("predict", ["checkpoint=[]"], "checkpoint: expected one or more, or weights, found none"),
        ("predict", ["weights=brain"], "weights: expected glioma, metastases or null, found b"),
        (
            "predict",
            ["weights=glioma"],
            "weights: expected null, as there is a checkpoint, found g",
        ),
        ("predict", ["detector=nowhere"], "detector: expected a file or the folder of a run, fou"),
        ("predict", ["detector=3"], "detector: expected null or a checkpoint, the folder of a run"),
        ("predict", ["detector=[]"], "detector: expected one or more, found none"),
        (
            "predict",
            ["detector_threshold=1"],
            "detector_threshold: expected checkpoint or a numbe",
        ),
        (
            "predict",
            ["detector_threshold=0.3"],
            "detector_threshold: expected checkpoint, as there is no detector, found 0.3",
        ),
        ("predict", ["detector_margin_mm=-1"], "detector_margin_mm: expected a number from 0 on"),
        ("predict", ["input=nowhere"], "input: expected a folder, found nothing at nowhere"),
        ("predict", ["output=FILE"], "output: expected a folder to write to, found the file "),
        ("predict", ["output=FILE/deeper"], "output: expected a folder to write to, found the fi"),
        ("predict", ["~output", "+output=???"], "output: expected a text, found nothing"),
        ("evaluate", ["with_core=[ET]"], "with_core: expected a list of none or more of WT"),
        ("evaluate", ["least_volume=[XX]"], "least_volume: expected a list of none or more of WT"),
        ("evaluate", ["least_volume=ET"], "least_volume: expected a list of none or more of WT"),
        ("evaluate", ["cases=tset"], "cases: expected train, validation, test or all, found tset"),
        ("evaluate", ["tuned_on=test"], "tuned_on: expected validation or train, found test"),
        ("evaluate", ["convention=brats"], "convention: expected nan, brats2020 or brats2023, fo"),
        ("evaluate", ["wandb=no"], "wandb: expected online, offline or disabled, found no"),
        ("evaluate", ["predictions=nowhere"], "predictions: expected a folder, found nothing at"),
        ("evaluate", ["checkpoint=[]"], "checkpoint: expected one or more, or weights, found none"),
    ],
)
def test_a_value_of_predict_or_evaluate_that_cannot_be_used_is_one_line(
    name: str, overrides: list[str], line: str, tmp_path: Path
):
    file = tmp_path / "file"
    file.touch()
    common = [f"checkpoint={file}", f"input={tmp_path}", f"output={tmp_path}/output"]
    config = with_values(composed_once(name=name), *common)
    checked(config)
    overrides = [override.replace("FILE", str(file)) for override in overrides]
    assert line_of(with_values(config, *overrides)).startswith(line)


@pytest.mark.parametrize("workers", [0, -1, 1.5, "abc", True])
def test_a_number_of_workers_of_the_doctor_is_one_from_1_on(workers: object):
    config = DictConfig({"workers": workers, "json": None})
    assert line_of(config).startswith("workers: expected null or a whole number from 1 on, found")


@pytest.mark.parametrize("written", ["no", "off", "0", "false", "False", "yes", "on", "1", "true"])
def test_the_booleans_of_yaml_mean_what_they_say(written: str, tmp_path: Path):
    """Hydra reads `again=no` as a text, and a text is true."""
    expected = FLAGS[written.lower()]
    base = composed_once()
    config = checked(with_values(base, f"again={written}", f"inputs.mirrored={written}"))
    assert (config.again, config.inputs.mirrored) == (expected, expected)
    options = [f"checkpoint={tmp_path}", f"input={tmp_path}", f"output={tmp_path}"]
    options += [f"{key}={written}" for key in ("flips", "pictures", "probabilities", "again")]
    plain = checked(with_values(composed_once(name="predict"), *options))
    assert {plain[key] for key in ("flips", "pictures", "probabilities", "again")} == {expected}


def test_nan_names_a_convention(tmp_path: Path):
    """Hydra reads `convention=nan` as a number."""
    options = [f"checkpoint={tmp_path}", f"input={tmp_path}", f"output={tmp_path}"]
    config = with_values(composed_once(name="evaluate"), *options, "convention=nan")
    assert math.isnan(config.convention)
    assert checked(config).convention == "nan"


def test_nothing_else_is_changed():
    """A run that has been trained keeps its name."""
    for overrides in ([], [MODEL_DNET], [NULL_REPORT]):
        config = composed_once(*overrides)
        assert OmegaConf.to_container(checked(config)) == OmegaConf.to_container(config)


def everything() -> list[list[str]]:
    """Make few choices that have every option of every group, each with what goes with it."""
    own = {"model", "experiment", "callbacks", "equal_compute"}
    dnet = {"inference": ["exact_tiles", "whole_volume"], "metrics": ["lesions"]}
    levels = {
        group: [option for option in options if option not in dnet.get(group, [])]
        for group, options in OPTIONS.items()
        if group not in own
    }
    levels["patches"] = [option for option in levels["patches"] if option.startswith("aeunet")]
    levels["data"] = ["brats", "phantom"]
    levels["region_weights"] = ["equal", "whole", "enhancing"]
    rounds = max(map(len, levels.values()))
    columns = [list(islice(cycle(options), rounds)) for options in levels.values()]
    choices = [
        [f"{group}={option}" for group, option in zip(levels, row, strict=True)]
        for row in zip(*columns, strict=True)
    ]
    for row in choices:
        if "split=file" in row:
            row.append("split.path=split.json")
        if "loss=cross_entropy" in row:  # has no weights
            row.remove(next(choice for choice in row if choice.startswith("region_weights")))
    choices += [["region_weights=whole"], ["data=metastases", "region_weights=lesion"]]
    choices += [["data=phantom_metastases", "region_weights=lesion", "inference=whole_volume"]]
    for option in OPTIONS["patches"]:
        model = option.partition("_")[0]
        if model != "aeunet":
            choices.append([f"model={model}", f"patches={option}"])
    choices += [["callbacks=averaged"]]
    choices += [[NULL_REPORT, f"equal_compute={option}"] for option in OPTIONS["equal_compute"]]
    return choices + [[f"experiment={option}"] for option in OPTIONS["experiment"]]


def values_of(raw: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, parent[name]) for key, parent, name in schema.leaves(raw)]


def test_every_option_passes_and_every_key_has_a_rule_or_is_free():
    chosen: dict[str, set[str]] = {group: set() for group in OPTIONS}
    places: list[tuple[str, Any]] = []
    for overrides in everything():
        config = composed_once(*overrides)
        checked(config)
        places += values_of(plain_once(*overrides, name="config"))
        for group, option in config.choices.items():
            chosen.get(group, set()).add(option)
    for name in ("predict", "evaluate", "doctor"):
        places += values_of(plain_once(name=name))
    assert {group: options - {None} for group, options in chosen.items()} == {
        group: set(options) for group, options in OPTIONS.items()
    }
    without = {
        key
        for key, value in places
        if schema.rule_of(key) is None
        and not schema.is_free(key)
        and not REFERENCE.fullmatch(str(value))
    }
    assert without == set()
    keys = {key for key, _ in places}
    used = {pattern for key in keys for pattern in schema.RULES if schema.matches(key, pattern)}
    optional = {"data.cache.workers", "data.sampler.lesion_in"}
    optional |= {"inference.batch_size", "inference.least_side"}
    assert set(schema.RULES) - used == optional  # arguments that conf/ leaves at their defaults


def test_names_are_those_that_the_code_has():
    assert tuple(datamodules.brats.ENDINGS) == schema.MODALITIES
    assert tuple(datamodules.phantom.FAMILIES) == schema.FAMILIES
    assert tuple(datamodules.brats.REGIONS) == combinations.REGIONS["BraTS"]
    assert combinations.REGIONS["Metastases"] == datamodules.metastases.REGIONS
    assert set(lightning_modules.metrics.regions.CONVENTIONS) == set(schema.CONVENTIONS)
    assert tuple(experiments.trained.PRECISIONS) == schema.PRECISIONS
    assert datamodules.splits.PARTS == schema.PARTS


def test_scores_are_those_that_the_metrics_compute():
    import numpy as np
    import torch

    from lightning_modules.metrics import LesionMetrics, RegionMetrics
    from lightning_modules.networks.geometry import Geometry

    truth = torch.zeros(1, 1, 40, 40, 40, dtype=torch.bool)
    for start, side in ((0, 2), (6, 6), (20, 14)):  # lesions of every bin of sizes
        truth[..., start : start + side, start : start + side, start : start + side] = True
    batch = {"mask": truth, "index": torch.tensor([0]), "outside": torch.zeros(1, 1)}
    lesions = LesionMetrics(Geometry(0, 1))
    lesions.update(truth.float(), batch)
    assert set(lesions.compute()) == set(combinations.LESION_SCORES)

    masks = torch.tensor(np.array([1, 0])).view(2, 1, 1, 1, 1).bool()
    regions = RegionMetrics(["WT"])
    regions.update(
        masks.float(),
        {"mask": masks, "index": torch.arange(2), "outside": torch.zeros(2, 1, dtype=torch.int64)},
    )
    config = {
        "metrics": {"scores": {"_target_": "lightning_modules.metrics.RegionMetrics"}},
        "data": {"data_set": {"regions": ["WT"]}},
    }
    assert {*regions.compute(), "loss"} == set(combinations.scores(config))


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**64, 10**400, 1e400, 1.0, -0.0, 1e-320, math.nan]),
    st.floats(),
    st.text(st.characters(exclude_characters="$"), max_size=8),
    st.sampled_from(["", " ", "no", "???", "abc", "a\nb", "nan", "None", "[1]", "../x", "²"]),
    st.lists(st.one_of(st.integers(), st.floats(), st.text("ab", max_size=2)), max_size=4),
    st.dictionaries(st.text("ab", min_size=1, max_size=2), st.integers(), max_size=2),
)
BASES = [((), "config"), ((MODEL_DNET,), "config"), ((NULL_REPORT,), "config")]
BASES += [((), "predict"), ((), "evaluate")]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), value=WRONG)
def test_any_value_of_any_key_passes_or_is_one_line(data: st.DataObject, value: Any):
    base, name = data.draw(st.sampled_from(BASES))
    raw = deepcopy(plain_once(*base, name=name))
    places = [place for place in schema.leaves(raw) if not place[0].startswith("choices")]
    _, parent, key = data.draw(st.sampled_from(places))
    if data.draw(st.booleans()):
        parent[key] = value
    else:
        del parent[key]
    message = ""
    try:
        schema.check(raw)
    except InputError as error:
        message = str(error)
    assert "\n" not in message


def test_the_flag_of_sweeps_may_stand_behind_overrides():
    arguments = ["norm=group,batch", "-m", "seed=0,1"]
    assert sweep_flag_first(arguments) == ["-m", "norm=group,batch", "seed=0,1"]
    assert sweep_flag_first(["--multirun", "a=1"]) == ["--multirun", "a=1"]
    assert sweep_flag_first(["a=1", "--cfg", "job"]) == ["a=1", "--cfg", "job"]


def test_a_run_that_another_process_trains_is_left_to_it(
    composed: Callable[..., DictConfig], tiny: list[str], tmp_path: Path
):
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run/.claim"),
        pytest.raises(BusyError, match="run: another process is training this run"),
    ):
        train.train(composed(*tiny))


def test_a_second_equal_command_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from hydra.types import RunMode

    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    for mode in (RunMode.RUN, RunMode.MULTIRUN):
        monkeypatch.setattr(HydraConfig, "get", lambda mode=mode: OmegaConf.create({"mode": mode}))
        if mode is RunMode.RUN:
            with pytest.raises(SystemExit) as ended, job():
                raise BusyError("run: another process is training this run")
            assert ended.value.code == BUSY == os.EX_TEMPFAIL
        else:
            with job():
                raise BusyError("run: another process is training this run")
            assert "run: another process is training this run; skipped" in caplog.text


def test_a_job_of_a_sweep_says_in_one_line_what_the_user_can_mend(caplog: Any):
    for error, traceback in ((InputError("nowhere: no such folder"), 0), (KeyError("bug"), 1)):
        caplog.clear()
        returned = JobReturn(status=JobStatus.FAILED)
        returned.return_value = error
        LogJobReturn().on_job_end(DictConfig({}), returned)
        (record,) = caplog.records
        assert bool(record.exc_info) == traceback
        assert ("nowhere: no such folder" in record.message) != traceback


def test_a_folder_that_cannot_be_made_is_one_line(caplog: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as ended, command():
        (Path(__file__) / "deeper").mkdir()
    assert ended.value.code == 1
    assert caplog.records[-1].message == f"{__file__}/deeper: Not a directory"
    with pytest.raises(FileNotFoundError), command():  # a fault of the program
        Path("nowhere").read_bytes()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "+optimizer.lrr=0.1",
            "optimizer.lrr: expected an argument of Adam, one of params, lr, betas",
        ),
        ("+module.threshold=2", "module.threshold: expected an argument of SegmentationModule"),
        ("+callbacks.slices.case=3", "callbacks.slices.case: expected an argument of LogSlices"),
        ("+trainer.max_epoch=3", "trainer.max_epoch: expected an argument of Trainer, one of "),
        ("~data.batch_size", "data.batch_size: expected, as PatchDataModule needs it; found none"),
        (
            "+callbacks.x={_target_: no.where}",
            "callbacks.x._target_: expected a constructor, found no.where",
        ),
    ],
)
def test_an_argument_that_a_constructor_does_not_take_is_one_line(override: str, line: str):
    config = checked(with_values(composed_once(), override))
    with pytest.raises(InputError) as error:
        combinations.check_arguments(config)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_all_constructors_of_conf_take_what_they_are_given():
    for overrides in everything():
        combinations.check_arguments(composed_once(*overrides))


def test_what_a_run_begins_with_has_to_be_there(tmp_path: Path):
    with pytest.raises(InputError, match=r"data.data_set.root: expected a folder of cases, found"):
        combinations.check_sources(
            with_values(composed_once(), "~data.data_set.count", "data.data_set.root=nowhere")
        )
    config = composed_once("split=file", f"split.path={tmp_path}/split.json")
    with pytest.raises(InputError, match=r"split.path: .*, found nothing at .*split.json"):
        combinations.check_sources(config)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"cells": 3}', '{"cells": [3]}', "\0"])
def test_a_broken_plan_is_one_line(tmp_path: Path, content: str):
    path = tmp_path / "plan.json"
    path.write_text(content)
    for read in (lambda: read_plan(path), lambda: add_to_plan(path, {"cells": []})):
        with pytest.raises((InputError, CompactHydraException)) as error:
            read()
        assert str(error.value).startswith(f"{path}: expected ")
        assert "\n" not in str(error.value)


HEAVY = {"torch", "pytorch_lightning", "torchio", "monai", "wandb", "scipy"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("train.py", ["filters.base=0"], "filters.base: expected a whole number from 1 on"),
        ("train.py", ["patches.size=20"], "patches.size: expected sides divisible by 8"),
        ("train.py", ["norm=group,batch", "-m", "seed=-1"], "seed: expected a whole number from"),
        ("train.py", ["-m", "model.depth=4,9"], "model.depth: expected a whole number from 2 to"),
        ("train.py", [NULL_REPORT, "report.margin.WT=x"], "report.margin.WT: expected a number"),
        ("train.py", [NULL_REPORT, MODEL_DNET], "downsampling: not a group of this model"),
        (
            "train.py",
            ["experiment=detection", "model=aeunet"],
            "an experiment takes the patches of its own model",
        ),
        ("train.py", ["plan=true", "patches.size=20"], "patches.size: expected sides divisible by"),
        (
            "train.py",
            ["plan=true", "-m", "model.depth=4,9"],
            "model.depth: expected a whole number",
        ),
        ("train.py", ["plan=true", "vram_gb=0"], "vram_gb: expected a number above 0, or null"),
        (
            "train.py",
            ["plan=true", "data=brats", "data.data_set.root=x"],
            "data.data_set.root: exp",
        ),
        ("predict.py", ["checkpoint=a", "input=b", "output=c", "flips=x"], "flips: expected true"),
        ("evaluate.py", ["input=b", "output=c", "least_volume=[XX]"], "least_volume: expected a"),
    ],
)
def test_the_command_says_it_before_anything_heavy_is_imported_or_written(
    script: str, arguments: list[str], line: str, tmp_path: Path
):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    imports, said = [], done.stdout.splitlines()
    for text in done.stderr.splitlines():
        (imports if text.startswith("import time:") else said).append(text)
    assert done.returncode == 1
    assert len(said) == 1
    assert line in said[0]
    assert not HEAVY & {text.split("|")[-1].strip() for text in imports}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_sweep_over_data_that_are_not_there_has_no_traceback(tmp_path: Path):
    arguments = ["experiment=frey2019", "logger=csv", "data.data_set.root=nowhere"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in said
    assert said.count("data.data_set.root: expected a folder of cases, found no folder at") == 3


def test_help_says_what_values_may_be():
    from experiments.usage import usage

    assert "filters.base: a whole number from 1 on" in usage()
    assert f"{BUSY}, another process is training the same run" in usage()
    for name in ("predict", "evaluate"):
        config = yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())
        described = set(re.findall(r"^  (\w+)  ", config["hydra"]["help"]["template"], re.M))
        values = set(config) - {"defaults", "hydra", "pictures"}
        assert described >= values
