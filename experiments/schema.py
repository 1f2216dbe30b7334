"""What every value of conf/ may be, and which values go together.

The entry points check the whole configuration before they import anything heavy and before Hydra
makes a folder. A value is named by its key on the command line. What the table does not list, such
as `+trainer.gradient_clip_val=1`, is compared with the signature of its constructor when a run
starts, before data are read.
"""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import InputError
from experiments.combinations import CHECKS, REGIONS, Plain
from experiments.rules import (
    FLAGS,
    Rule,
    choice,
    each,
    either,
    flag,
    number,
    one_of,
    refuse,
    rising,
    several,
    text,
    whole,
)

MODALITIES = ("t1", "t1ce", "t2", "flair")
FAMILIES = (  # of phantoms
    *("classic", "borders", "cores", "creeping", "lopsided", "low_grade"),
    *("watery", "swelling", "infiltrating"),
)
CONVENTIONS = ("nan", "brats2020", "brats2023")
PRECISIONS = ("32", "16", "bf16")
PARTS = ("train", "validation", "test")


def is_folder_name(value: object) -> bool:
    parts = value.split("/") if isinstance(value, str) else [""]
    return all(re.fullmatch(r"\w[\w .+-]*", part) for part in parts)


def is_thresholds(value: object) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(map(share_inside.accepts, value.values()))
    return share_inside.accepts(value) or text.accepts(value)


nothing = one_of(None)
share = number(0, 1)
share_inside = number(above=0, below=1)
positive = number(above=0)
at_least_0 = number(0)
seed = whole(0, 2**32 - 1)
sides = Rule(
    "a whole number from 1 on, or three as [x, y, z]",
    either(whole(1), several(whole(1), 3)).accepts,
)
batches = Rule(  # as Lightning counts them
    "a whole number from 0 on, or a share such as 0.5",
    lambda value: whole(0).accepts(value) or (isinstance(value, float) and share.accepts(value)),
)
checkpoint_or_null = Rule("a checkpoint or null", either(nothing, text).accepts)
checkpoints = Rule(
    "a checkpoint, the folder of a run, or a list of these",
    lambda value: (
        text.accepts(value) or (isinstance(value, list) and all(map(text.accepts, value)))
    ),
)

# Key -> what its value may be. `*` stands for any text, dots too; an exact key comes first.
RULES: dict[str, Rule] = {
    "name": Rule("the name of a folder in runs/", is_folder_name),
    "seed": seed,
    "again": flag,
    "compile": flag,
    "plan": flag,
    "vram_gb": Rule("a number above 0, or null", either(nothing, positive).accepts),
    "resume": checkpoint_or_null,
    "finetune": checkpoint_or_null,
    "objective": text,
    "factors": either(nothing, text),
    "filters.base": whole(1),
    "filters.ratio": positive,
    # Networks and what they are made of.
    "model.in_channels": whole(1),
    "model.out_channels": whole(1),
    "model.depth": whole(2, 6),
    "model.bottleneck": whole(1),
    "model.dropout": number(0, below=1),
    "model.prior": number(above=0, below=1),
    "model.checkpointing": one_of("none", "norms", "blocks", "levels"),
    "geometry.halo": whole(0),
    "geometry.stride": whole(1),
    "norm.groups": one_of(1, 2, 4, 8),
    "norm.least_channels": whole(1, 8),
    "norm.affine": flag,
    "activation.negative_slope": number(),
    "activation.inplace": flag,
    # Patches and data.
    "patches.size": sides,
    "patches.window": sides,
    "patches.overlap": number(0, below=1),
    "patches.batch_size": whole(1),
    "patches.per_epoch": whole(1),
    "patches.epochs": whole(1),
    "patches.epochs_per_validation": whole(1),
    "patches.learning_rate": at_least_0,
    "patches.others": one_of("anywhere", "lesion_free"),
    "data.data_set.root": text,
    "data.data_set.count": whole(1),
    "data.data_set.spacing_mm": number(0.5, 8),
    "data.data_set.seed": whole(0),
    "data.data_set.modalities": choice(*MODALITIES),
    "data.data_set.families": choice(*FAMILIES),
    "data.data_set.regions": choice(*REGIONS["BraTS"], *REGIONS["Metastases"]),
    "data.cache.root": text,
    "data.cache.spacing_mm": positive,
    "data.cache.crop": either(one_of("brain"), several(positive, 3)),
    "data.cache.workers": either(nothing, whole(1)),
    "data.sampler.lesion_share": share,
    "data.sampler.lesion_in": one_of("output", "patch"),
    "data.sampler.uniform_over": one_of("voxels", "lesions"),
    "data.sampler.patch_size": sides,
    "data.batch_size": whole(1),
    "data.patches_per_epoch": whole(1),
    "data.num_workers": whole(0),
    "inputs.channels": whole(1),
    "inputs.mirrored": flag,
    "inputs.extras.*.radius_mm": positive,
    "augmentation.scale": rising(positive),
    "augmentation.*.probability": share,
    "augmentation.contrast.offset": rising(number()),
    "augmentation.gamma.exponent": rising(positive),
    "augmentation.bias.strength": rising(at_least_0),
    "augmentation.blur.sd_mm": rising(at_least_0),
    "augmentation.slices.thickness_mm": rising(positive),
    "augmentation.ringing.kept": rising(number(above=0, high=1)),
    "augmentation.noise.sd": rising(at_least_0),
    "augmentation.intensity.scale": rising(positive),
    "augmentation.intensity.shift": rising(number()),
    "augmentation.transform*.scale": rising(positive),
    "augmentation.transform*.shift": rising(number()),
    "augmentation.transform*.axes": choice(0, 1, 2, least=0),
    "augmentation.transform*.flip_probability": share,
    "augmentation.transform*.modalities": whole(1),
    "augmentation.transform*.copy": flag,
    "split.validation": number(0, below=1),
    "split.test": number(0, below=1),
    "split.folds": whole(3),
    "split.fold": whole(0),
    "split.seed": whole(),
    "split.path": text,
    # Training.
    "loss.l2_weight": at_least_0,
    "loss.kl_weight": at_least_0,
    "loss.kl_voxels": whole(1),
    "loss*.smooth_mm3": at_least_0,
    "loss*.cross_entropy_weight": at_least_0,
    "region_weights.*": positive,
    "optimizer.lr": at_least_0,
    "optimizer.weight_decay": at_least_0,
    "optimizer.momentum": number(0, below=1),
    "optimizer.nesterov": flag,
    "optimizer.fused": flag,
    "scheduler.power": at_least_0,
    "scheduler.factor": share,
    "scheduler.total_iters": whole(1),
    "scheduler.T_max": whole(1),
    "inference.patch_size": sides,
    "inference.overlap": number(0, below=1),
    "inference.batch_size": whole(1),
    "inference.least_side": whole(1),
    "inference.voxels_at_once": whole(1),
    "metrics.ranked_by": text,
    "metrics.scores.threshold": share_inside,
    "trainer.max_epochs": whole(1),
    "trainer.check_val_every_n_epoch": whole(1),
    "trainer.precision": one_of(
        *("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
    ),
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "trainer.devices": either(one_of("auto", -1), whole(1), several(whole(0), 1)),
    "trainer.strategy": one_of("auto", "ddp"),
    "trainer.deterministic": either(flag, one_of("warn")),
    "trainer.log_every_n_steps": whole(0),
    "trainer.num_sanity_val_steps": whole(-1),
    "trainer.limit_*_batches": batches,
    "trainer.overfit_batches": batches,
    "trainer.use_distributed_sampler": flag,
    "*.default_root_dir": text,
    "*.enable_*": flag,
    # What watches the training, and what it leaves behind.
    "callbacks.best.monitor": either(text, nothing),
    "callbacks.*.monitor": text,
    "callbacks.*.mode": one_of("min", "max"),
    "callbacks.*.patience": whole(0),
    "callbacks.*.target_fp": at_least_0,
    "callbacks.*.cases": whole(0),
    "callbacks.*.decay": number(0, below=1),
    "callbacks.*.filename": text,
    "callbacks.*.path": text,
    "callbacks.*.folder": text,
    "callbacks.*.dirpath": text,
    "callbacks.*.logging_interval": either(one_of("epoch", "step"), nothing),
    "logger.*.save_dir": text,
    "logger.*.name": text,
    "logger.*.group": text,
    "logger.*.id": text,
    "logger.*.project": text,
    "logger.*.offline": flag,
    "logger.*.log_model": either(flag, one_of("all")),
    "report.margin.*": positive,
    "report.reason": text,
    "report.alpha": number(above=0, below=0.5),
    "report.looks": each(whole(2)),
    # predict.py and evaluate.py.
    "weights": one_of("glioma", "metastases", None),
    "checkpoint": checkpoints,
    "input": text,
    "output": text,
    "detector": either(nothing, checkpoints),
    "detector_threshold": either(one_of("checkpoint"), share_inside),
    "detector_margin_mm": at_least_0,
    "flips": flag,
    "thresholds": Rule(
        "checkpoint, paper, a number above 0 and below 1, one for each region as {WT: 0.5}, or a "
        "file of evaluate.py",
        is_thresholds,
    ),
    "et_label": one_of(3, 4, None),
    "probabilities": flag,
    "pictures": flag,
    "precision": Rule(one_of(*PRECISIONS).expected, lambda value: str(value) in PRECISIONS),
    "device": Rule(
        "auto, cpu, cuda, cuda:1 or mps",
        lambda value: (
            isinstance(value, str)
            and bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,2})?", value, re.ASCII))
        ),
    ),
    "cases": one_of(*PARTS, "all"),
    "predictions": either(nothing, text),
    "tuned_on": one_of("validation", "train"),
    "with_core": choice("WT", least=0),
    "least_volume": choice(*REGIONS["BraTS"], *REGIONS["Metastases"], least=0),
    "convention": Rule(one_of(*CONVENTIONS).expected, lambda value: str(value) in CONVENTIONS),
    "wandb": one_of("online", "offline", "disabled"),
    # doctor.py.
    "workers": either(nothing, whole(1)),
    "json": either(nothing, text),
    # Everywhere.
    "*._partial_": flag,
    "*._target_": text,
}

# Keys whose values are names, or lists of what has rules under a key of its own.
FREE = (
    "cell.*",
    "choices*",
    "run_dir",
    "inputs.extras",
    "augmentation.transform*.transforms",
    "augmentation.transform*.extras",
    "logger.*.tags",
    "trainer.callbacks",
    "trainer.logger",
    "trainer.plugins",
)


def checked(config: DictConfig) -> DictConfig:
    """Check a configuration, and write its flags, `no` and `off` too, as true and false.

    Args:
        config: The configuration of a job, composed, with or without its node `hydra`.

    Returns:
        A copy without the node `hydra`, in which nothing else is changed.

    Raises:
        InputError: A value is not what its key expects, or two values do not go together.
    """
    raw: Any = OmegaConf.to_container(config)
    hydra = raw.pop("hydra", None)
    check(raw, {"choices": hydra["runtime"]["choices"]} if hydra else {})
    return DictConfig(raw)


def check(raw: Plain, known: Plain | None = None) -> None:
    """Check a configuration whose references are not resolved yet; turn its flags to booleans.

    What the user has typed is checked first, so that a message names the key that was typed, and
    then what has been computed from it.

    Args:
        raw: The configuration.
        known: Nodes that take the place of those of `raw` when references are resolved.

    Raises:
        InputError: See `checked`.
    """
    computed = set()
    for key, parent, name in leaves(raw):
        if parent[name] == "???":
            refuse(key, described(key), "nothing")
        elif _refers(parent[name]):
            computed.add(key)
        else:
            parent[name] = checked_value(key, parent[name])
    plain = resolved({**raw, **(known or {})})
    for key, parent, name in leaves(plain):
        if key in computed:
            checked_value(key, parent[name])
    for check_together in CHECKS:
        check_together(plain)


def resolved(raw: Plain) -> Plain:
    """Resolve all references between the values of a configuration.

    Raises:
        InputError: A reference leads nowhere, or a value is missing.
    """
    # The folder is named after the configuration: as long as that is being checked, there is none.
    content = {**raw, "run_dir": "."} if "run_dir" in raw else raw
    try:
        plain: Any = OmegaConf.to_container(
            OmegaConf.create(content), resolve=True, throw_on_missing=True
        )
    except OmegaConfBaseException as error:
        line = " ".join(str(error).split())
        raise InputError(line.partition(" full_key:")[0]) from None
    return plain


def matches(key: str, pattern: str) -> bool:
    return key == pattern or fnmatchcase(key, pattern)


@cache
def rule_of(key: str) -> Rule | None:
    """Find the rule of a key; None if it has none."""
    if key in RULES:
        return RULES[key]
    return next((rule for pattern, rule in RULES.items() if matches(key, pattern)), None)


def is_free(key: str) -> bool:
    """Tell whether a key of conf/ needs no rule."""
    return any(matches(key, pattern) for pattern in FREE)


def described(key: str) -> str:
    """Say what the value of a key may be, for `--help`."""
    rule = rule_of(key)
    return "anything" if rule is None else rule.expected


@cache
def is_node(key: str) -> bool:
    """Tell whether the table has keys below a key, so that it is no value itself."""
    return any(pattern.startswith(f"{key}.") for pattern in RULES)


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:  # noqa: ANN401
    """Yield the key of every value, the dictionary that it lies in, and its name there.

    A dictionary is a value where a rule expects one, or something else.
    """
    for name, value in list(node.items()):
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and rule_of(key) is None:
            yield from leaves(value, f"{key}.")
        else:
            yield key, node, name


def _refers(value: object) -> bool:
    """Tell whether a value, or one in a list, is given by other values."""
    if isinstance(value, list):
        return any(map(_refers, value))
    return isinstance(value, str) and "${" in value


def checked_value(key: str, value: Any) -> Any:  # noqa: ANN401  (whatever YAML can hold)
    """Check one value.

    Returns:
        The value; a flag as a boolean, and the NaN that Hydra reads from `convention=nan` as text.

    Raises:
        InputError: It is not what its key expects.
    """
    rule = rule_of(key)
    if rule is None:
        if is_node(key) and not isinstance(value, dict):
            refuse(key, "keys of its own", value)
        return value
    if not rule.accepts(value):
        refuse(key, rule.expected, value)
    if rule is flag or (key == "trainer.deterministic" and value != "warn"):
        return FLAGS[str(value).lower()]
    return str(value) if key == "convention" else value
