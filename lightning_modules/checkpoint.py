"""Checkpoints: weights, the configuration that rebuilds the module, the cases it has seen."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import InputError
from files import written_whole
from lightning_modules.constructors import check_constructors
from lightning_modules.inference import Ensemble
from lightning_modules.segmentation import SegmentationModule

CONFIG_KEY = "config"
STOPPED_KEY = "stopped"  # whether training was to stop early there
SEEN_KEY = "seen"  # part of the split -> identity of a patient -> name of the case
WEIGHTS = ".safetensors"  # ends the name of a checkpoint of what prediction needs, see `export`

# Keys of the configuration, below `data`, whose values the networks of an ensemble must share.
SHARED = {
    "data_set": ("modalities", "regions"),
    "cache": ("spacing_mm", "extras"),
    "sampler": ("mirrored",),
}


class Loaded(NamedTuple):
    """A module in evaluation mode, and the configuration of the run that trained it."""

    module: SegmentationModule
    config: dict[str, Any]


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file to the CPU, without executing code that it may contain.

    Raises:
        InputError: There is no such file, train.py has not written it, or its configuration names
            what conf/ does not.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        content = (
            _read_weights(path)
            if path.suffix == WEIGHTS
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # torch has no error of its own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(content, dict) or CONFIG_KEY not in content:
        raise InputError(
            f"{path}: expected a checkpoint written by train.py, with its configuration in it"
        )
    check_constructors(content[CONFIG_KEY], path)
    return content


def _read_weights(path: Path) -> dict[str, Any]:
    """Read a file of `export`, in the layout of a checkpoint."""
    with safe_open(path, "pt") as file:
        known = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {**known, "state_dict": weights}


def export(checkpoints: Sequence[Path], path: Path, *, half: bool = False) -> None:
    """Write what prediction needs of a checkpoint as a file that cannot hold code.

    Its header has the configuration of network, data and inference, and the cases that the network
    has seen; folders of the machine that trained it are left out.

    Args:
        checkpoints: Checkpoint of train.py. The weights of several are averaged to those of one
            network, which only makes sense if they were fine-tuned from the same one (Wortsman et
            al. 2022, "Model soups"). The configuration is that of the first.
        path: The file to write.
        half: Round the weights to float16, for half the size; networks still compute in float32.

    Raises:
        InputError: `read` refuses a checkpoint, they are of networks that differ in architecture,
            input or output, or a weight is beyond float16.
    """
    contents = [read(checkpoint) for checkpoint in checkpoints]
    config = {key: contents[0][CONFIG_KEY][key] for key in ("model", "module", "data", "seed")}
    for other, content in zip(checkpoints[1:], contents[1:], strict=True):
        check_same_network(other, config["model"])
        _check_same_task(other, content[CONFIG_KEY], checkpoints[0], config)
    seen: dict[str, dict[str, str]] = {}
    for content in contents:
        for part, cases in content[SEEN_KEY].items():
            seen.setdefault(part, {}).update(cases)
    for node in (config["data"]["data_set"], config["data"]["cache"]):
        node["root"] = Path(node["root"]).name
    header = {CONFIG_KEY: config, SEEN_KEY: seen}
    weights = _mean([content["state_dict"] for content in contents])
    if half:
        weights = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
        if beyond := [name for name, weight in weights.items() if not weight.isfinite().all()]:
            raise InputError(
                f"{checkpoints[0]}: expected weights below 65504, found more in {beyond[0]}"
            )
    with written_whole(path) as partial:
        save_file(weights, partial, {key: json.dumps(value) for key, value in header.items()})


def _mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average weights by name; what is no weight, as a count of steps, is that of the first."""
    return {
        name: torch.stack([state[name] for state in states]).mean(0)
        if weight.is_floating_point() and len(states) > 1
        else weight.contiguous()
        for name, weight in states[0].items()
    }


def first_readable(paths: Sequence[Path]) -> Path | None:
    """Find the checkpoint to go on from; one that cannot be read is left out with a warning.

    Everything random hangs on the seed and the step, so that training leads from any checkpoint of
    a run to the same weights.

    Args:
        paths: Checkpoints of one run, the latest first; they need not exist.

    Returns:
        The first that can be read and has more in it than weights, or None.
    """
    for path in paths:
        if path.is_file():
            try:
                content = read(path)
            except InputError as error:
                logging.warning("%s; going on from an earlier one, or from the start", error)
                continue
            if "optimizer_states" in content:
                return path
    return None


def load(path: str | Path) -> Loaded:
    """Rebuild a module from its checkpoint alone.

    Raises:
        InputError: `read` refuses the file, or its weights do not fit its configuration.
    """
    content = read(path)
    config = content[CONFIG_KEY]
    module = instantiate(config["module"], _convert_="all")
    try:
        module.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: weights of another architecture than its configuration ({reason})"
        ) from error
    return Loaded(module.eval(), config)


def fingerprint(path: Path) -> str:
    """Identify a checkpoint by its run, its name and a hash of its content, in one line."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return f"{path.parent.name}/{path.name} {digest}"


def load_ensemble(
    paths: Sequence[str | Path],
    flip_axes: Sequence[int] = (),
    precision: torch.dtype = torch.float32,
) -> tuple[Ensemble, dict[str, Any]]:
    """Load the networks of several checkpoints as an ensemble.

    Args:
        paths: At least one checkpoint.
        flip_axes: Axes of the mirror images that the `Ensemble` averages over.
        precision: Precision of the networks.

    Returns:
        The ensemble, and the configuration of the first checkpoint.

    Raises:
        InputError: `load` refuses a checkpoint, or the networks differ in input or output.
    """
    members = [load(path) for path in paths]
    first = members[0].config
    for path, member in zip(paths, members, strict=True):
        _check_same_task(path, member.config, paths[0], first)
    return Ensemble([member.module for member in members], flip_axes, precision), first


def _check_same_task(
    path: str | Path, config: Mapping[str, Any], first: str | Path, expected: Mapping[str, Any]
) -> None:
    """Refuse a network that sees or predicts something else than the first one."""
    for group, keys in SHARED.items():
        for key in keys:
            values = [c["data"][group].get(key) for c in (expected, config)]
            if values[0] != values[1]:
                raise InputError(
                    f"{path}: {key} is {values[1]} there and {values[0]} in {first}; an ensemble "
                    "takes networks with the same input and output"
                )


def build(node: Mapping[str, Any]) -> Any:  # noqa: ANN401  (whatever `_target_` names)
    """Build what a part of a checkpoint's configuration describes: its data set, its cache, ...

    Args:
        node: Part of a configuration that `read` has checked.
    """
    return instantiate(node, _convert_="all")


def check_unseen(path: str | Path, cases: Mapping[str, Sequence[str]]) -> None:
    """Refuse to test a network on patients that it was trained or validated on.

    Args:
        path: Checkpoint of the network.
        cases: Name of each case to test on -> the identities of its patient, of which one in common
            is enough (see `nifti.identify`). A name alone says nothing, since files are renamed.

    Raises:
        InputError: A file that `read` refuses, a checkpoint without its cases, or a case that the
            network has seen.
    """
    content = read(path)
    if SEEN_KEY not in content:
        raise InputError(
            f"{path}: expected a list of the cases that it was trained on, found none; an earlier "
            "version has written it, train it again"
        )
    found = {
        name: f"its {part} case {seen[identity]}"
        for part, seen in content[SEEN_KEY].items()
        for name, identities in cases.items()
        for identity in identities
        if identity in seen
    }
    if found:
        first = min(found)
        raise InputError(
            f"{path}: expected test cases that it has not seen, found {len(found)} of {len(cases)} "
            f"that it was trained or validated on, the first is {first}, {found[first]}"
        )


def check_same_network(path: str | Path, model: Mapping[str, Any]) -> None:
    """Refuse to continue from a checkpoint whose network differs from the configured one.

    Args:
        path: The checkpoint.
        model: Group `model` of the configuration.

    Raises:
        InputError: A value of `model` differs; the message names the first.
    """
    stored = read(path)[CONFIG_KEY]["model"]
    # The one changes no result, and the other only weights that are not trained yet.
    for key in sorted({*stored, *model} - {"checkpointing", "prior"}):
        if stored.get(key) != model.get(key):
            raise InputError(
                f"{path}: a checkpoint of another architecture: model.{key} is "
                f"{stored.get(key)!r} there and {model.get(key)!r} here"
            )
