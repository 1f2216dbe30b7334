"""Which values of a configuration go together, with each other and with what is on disk.

Each check of `CHECKS` gets a resolved configuration, each value of which has passed by itself. Keys
may be missing: predict.py has other ones than train.py, and users can remove some.
"""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from errors import InputError
from experiments.rules import refuse, shown

Plain = dict[str, Any]  # a configuration as plain dictionaries, lists and values

WEIGHTS_FOLDER = Path(__file__).parents[1] / "weights"  # networks that come with this repository
REGIONS = {"BraTS": ("WT", "TC", "ET"), "Metastases": ("lesion",)}  # by the class of the data set
REGIONS |= {"Phantoms": REGIONS["BraTS"], "MetastasisPhantoms": REGIONS["Metastases"]}


def _get(config: Plain, key: str, default: Any = None) -> Any:  # noqa: ANN401
    """Look a key with dots up; the default if a part of it is not there."""
    node: Any = config
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return default
        node = node[name]
    return node


def _class(config: Plain, node: str) -> str:
    """Name the class of a node; empty if there is none, or one that is not of this project."""
    target = str(_get(config, f"{node}._target_", ""))
    ours = target.startswith(("datamodules.", "lightning_modules.", "torch."))
    return target.rpartition(".")[2] if ours else ""


def _triple(size: int | Sequence[int]) -> list[int]:
    return [size] * 3 if isinstance(size, int) else list(size)


def check_split(config: Plain) -> None:
    validation, test = _get(config, "split.validation"), _get(config, "split.test")
    if validation is not None and test is not None and validation + test >= 1:
        refuse("split", "validation + test below 1", f"{validation:g} + {test:g}")
    fold, folds = _get(config, "split.fold"), _get(config, "split.folds")
    if fold is not None and folds is not None and fold >= folds:
        refuse("split.fold", f"a whole number from 0 to {folds - 1}", fold)


def check_regions(config: Plain) -> None:
    """Compare the regions of the data set with all that is said for each of them."""
    regions = _get(config, "data.data_set.regions")
    if regions is None:
        return
    listed = ", ".join(regions)
    known = REGIONS.get(_class(config, "data.data_set"), regions)
    if not set(regions) <= set(known):
        refuse("data.data_set.regions", f"some of {', '.join(known)}", regions)
    channels = _get(config, "model.out_channels", len(regions))
    if channels != len(regions):
        refuse(
            "data.data_set.regions",
            f"{channels}, as many as the network has outputs (data=phantom_metastases and "
            "data=metastases have 1)",
            f"{len(regions)}: {listed}",
        )
    if _class(config, "metrics.scores") == "LesionMetrics" and len(regions) > 1:
        refuse("data.data_set.regions", "one, as metrics=lesions counts lesions", regions)
    weights = _get(config, "region_weights")
    if weights is not None and set(weights) != set(regions):
        refuse("region_weights", f"a weight for each of {listed}", f"those of {', '.join(weights)}")
    margin = _get(config, "report.margin", {})
    if not set(margin) <= set(regions):
        refuse("report.margin", f"margins for some of {listed}", list(margin))


def check_patches(config: Plain) -> None:
    """Check that a network can take the patches, and that patches fill the batches."""
    size = _get(config, "patches.size")
    depth, halo = _get(config, "model.depth"), _get(config, "geometry.halo", 0)
    if size is not None and depth is not None and _class(config, "model") == "AEUNet":
        divisor = 2 ** (depth - 1)
        if any(side % divisor for side in _triple(size)):
            refuse("patches.size", f"sides divisible by {divisor}, as {depth} levels need", size)
    if size is not None and halo:
        stride = _get(config, "geometry.stride", 1)
        if any(side <= 2 * halo or (side - 2 * halo) % stride for side in _triple(size)):
            refuse("patches.size", f"sides of {2 * halo} + a multiple of {stride}", size)
    lesion_share, batch = _get(config, "data.sampler.lesion_share"), _get(config, "data.batch_size")
    patches = _get(config, "data.patches_per_epoch")
    if None not in (lesion_share, batch, patches) and (
        _get(config, "data.sampler.others") == "lesion_free"
    ):
        lesions = Fraction(lesion_share).limit_denominator(10_000) * batch
        if lesions.denominator > 1 or patches % batch:
            refuse(
                "patches.batch_size",
                f"a divisor of patches.per_epoch={patches} of which a share of {lesion_share:g} is "
                "a whole number, as patches.others=lesion_free makes batches exact",
                batch,
            )
    crop, spacing_mm = _get(config, "data.cache.crop"), _get(config, "data.cache.spacing_mm", 0)
    if isinstance(crop, list) and min(crop) < spacing_mm:
        refuse("data.cache.crop", f"brain or three sides of at least {spacing_mm:g} mm", crop)


# Class -> networks that have what it calls.
FITS = {
    "ExactTiles": ("DNet",),
    "SlidingWindow": ("AEUNet", "UNet3D"),
    "WholeVolume": ("AEUNet", "UNet3D"),
    "AutoencoderLoss": ("AEUNet",),
    "RegionDice": ("AEUNet", "UNet3D"),
    "GroupNorm": ("AEUNet", "UNet3D"),  # D-Net needs a norm that treats every voxel alike
    "InstanceNorm3d": ("AEUNet", "UNet3D"),
}
DEEPEST = {"AEUNet": 6, "UNet3D": 5}  # levels


def check_parts(config: Plain) -> None:
    """Check that the network has what loss, inference and norm call."""
    network = _class(config, "model")
    if network not in ("AEUNet", "UNet3D", "DNet"):
        return
    for group in ("inference", "loss", "norm"):
        part = _class(config, group)
        if network not in FITS.get(part, (network,)):
            refuse(group, f"one for {network}", f"{part}, for {', '.join(FITS[part])} only")
    depth, deepest = _get(config, "model.depth", 2), DEEPEST.get(network, 6)
    if depth > deepest:
        refuse("model.depth", f"a whole number from 2 to {deepest}", depth)
    channels, seen = _get(config, "inputs.channels"), _get(config, "model.in_channels")
    if channels != seen:
        refuse("model.in_channels", f"{shown(channels)}, the channels of the inputs", seen)
    if _get(config, "callbacks.threshold") and _class(config, "metrics.scores") == "RegionMetrics":
        refuse("callbacks.threshold", "metrics=lesions, which it looks at", "metrics=regions")


# Scores that a run can log. A test compares them with those that the metrics log.
REGION_SCORES = ("dice", "without", "false_alarms", "false_alarm_mm3")
LESION_SCORES = (
    *("sensitivity", "false_positives", "sensitivity_one_to_one", "sensitivity_by_patient"),
    *("merged", "split", "lesion_dice", "threshold"),
    *("sensitivity_0-5mm", "sensitivity_5-10mm", "sensitivity_10mm_up"),
)


def scores(config: Plain) -> list[str]:
    """List the scores of whole volumes; none if they are not this project's."""
    regions = _get(config, "data.data_set.regions", [])
    by_region = [f"{score}_{region}" for score in REGION_SCORES for region in regions]
    return {
        "RegionMetrics": ["dice", *by_region, "loss"],
        "LesionMetrics": [*LESION_SCORES, "loss"],
    }.get(_class(config, "metrics.scores"), [])


def check_scores(config: Plain) -> None:
    """Check that what a run ranks by, stops by and returns is something that it logs."""
    known = scores(config)
    if not known:
        return
    if _get(config, "metrics.ranked_by", known[0]) not in known:
        refuse("metrics.ranked_by", f"one of {', '.join(known)}", config["metrics"]["ranked_by"])
    watched = {"objective": _get(config, "objective", "val/loss")}
    for name, callback in _get(config, "callbacks", {}).items():
        monitor = _get({"_": callback}, "_.monitor", None)
        if monitor is not None:  # else it keeps the last weights
            watched[f"callbacks.{name}.monitor"] = monitor
    for key, score in watched.items():
        stage, _, name = score.partition("/")
        logged = stage in ("val", "test") and name in known
        if not logged and (stage != "train" or key == "objective"):
            refuse(key, f"val/ and one of {', '.join(known)}", score)


def check_trainer(config: Plain) -> None:
    epochs = _get(config, "trainer.max_epochs")
    every = _get(config, "trainer.check_val_every_n_epoch")
    if epochs is not None and every is not None and every > epochs:
        refuse(
            "trainer.check_val_every_n_epoch",
            f"at most the {epochs} of trainer.max_epochs",
            every,
        )
    for group in ("callbacks", "logger"):
        for name, part in _get(config, group, {}).items():
            if not isinstance(part, dict):
                key = f"{group}.{name}"
                refuse(key, f"keys of its own (~{key} removes it)", part)


def check_folders(config: Plain) -> None:
    """Check the files and folders that predict.py and evaluate.py are called with."""
    if "checkpoint" not in config:
        return
    detector, threshold = config.get("detector"), config.get("detector_threshold", "checkpoint")
    checkpoint, weights = config["checkpoint"], config.get("weights")
    if weights is not None:
        if checkpoint:
            refuse("weights", "null, as there is a checkpoint", weights)
        checkpoint = str(WEIGHTS_FOLDER / weights)
    for key, paths in (("checkpoint", checkpoint), ("detector", detector)):
        if paths is None or config.get("predictions") is not None:
            continue
        if not paths:
            refuse(key, "one or more" if key == "detector" else "one or more, or weights", "none")
        for path in [paths] if isinstance(paths, str) else paths:
            if not Path(path).exists():
                refuse(key, "a file or the folder of a run", f"nothing at {path}")
    if detector is None and threshold != "checkpoint":
        refuse("detector_threshold", "checkpoint, as there is no detector", threshold)
    thresholds = config["thresholds"]
    if isinstance(thresholds, str):
        known = ("checkpoint", "paper", *(["chosen"] if "tuned_on" in config else []))
        if thresholds not in known and not Path(thresholds).is_file():
            words = f"{', '.join(known)}, numbers above 0 and below 1, or a file of evaluate.py"
            refuse("thresholds", words, thresholds)
    for key in ("input", "predictions"):
        path = config.get(key)
        if path is not None and not Path(path).is_dir():
            refuse(key, "a folder", f"{'a file' if Path(path).exists() else 'nothing'} at {path}")
    check_writable("output", Path(config["output"]))


def check_writable(key: str, folder: Path) -> None:
    """Check that a folder can be made, and written to.

    Raises:
        InputError: It cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        refuse(key, "a folder to write to", f"the file {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        refuse(key, "a folder to write to", f"{there}, which you may not write to")


def check_plan(config: Plain) -> None:
    """Refuse what asks for a plan where none is made: `jobs.py` takes both values out before."""
    if config.get("plan"):
        refuse("plan", "plan=true on the command line, with no flag but -m", "it elsewhere")
    if config.get("vram_gb") is not None:
        refuse("vram_gb", "plan=true beside it", "a run to be trained")


CHECKS = (
    check_plan,
    check_split,
    check_regions,
    check_parts,
    check_patches,
    check_scores,
    check_trainer,
    check_folders,
)


def check_sources(config: DictConfig) -> None:
    """Check that the files are there that a run begins with.

    Raises:
        InputError: They are not.
    """
    data_set, split = config.data.data_set, config.get("split") or {}
    if "count" not in data_set and not Path(data_set.root).is_dir():  # phantoms are made
        refuse("data.data_set.root", "a folder of cases", f"no folder at {data_set.root}")
    if (path := split.get("path")) is not None and not Path(path).is_file():
        refuse("split.path", "a file with the cases of each part", f"nothing at {path}")


def check_arguments(config: DictConfig) -> None:
    """Check that the constructors that a configuration names take what it gives them.

    It imports them, so that it belongs to the start of a run, before data are read.

    Raises:
        InputError: There is no such constructor, or it does not take these arguments.
    """
    raw: Any = OmegaConf.to_container(config)
    waiting = [("", raw)]
    while waiting:
        key, node = waiting.pop()
        if isinstance(node, dict):
            if "_target_" in node:
                _check_call(key, node)
            waiting += [(f"{key}.{name}".strip("."), child) for name, child in node.items()]


def _check_call(key: str, node: Plain) -> None:
    from importlib import import_module
    from inspect import Parameter, signature

    target = str(node["_target_"])
    module, _, name = target.rpartition(".")
    try:
        taken = signature(getattr(import_module(module), name)).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        raise InputError(f"{key}._target_: expected a constructor, found {target}") from None
    passed = {name for name in node if name not in ("_target_", "_partial_", "_convert_")}
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    if unknown := sorted(passed - set(taken)):
        raise InputError(
            f"{key}.{unknown[0]}: expected an argument of {name}, one of "
            f"{', '.join(taken)}; found {unknown[0]}"
        )
    needed = {name for name, parameter in taken.items() if parameter.default is Parameter.empty}
    if (missing := sorted(needed - passed)) and not node.get("_partial_"):
        raise InputError(f"{key}.{missing[0]}: expected, as {name} needs it; found none")
