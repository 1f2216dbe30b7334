"""Checkpoints come from anyone: none may run code, and those of this project load."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from errors import InputError
from experiments.prediction import Predictor
from lightning_modules import checkpoint
from lightning_modules.constructors import allowed
from tests.conftest import untrained

ROOT = Path(__file__).parents[2]
MODELS = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml"))


def place(config: dict[str, Any], key: str, node: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = node


def filled(node: Any, mark: Path, malicious: Path) -> Any:
    """Replace MARK and PICKLE in a node of `HOSTILE` by two paths."""
    if isinstance(node, dict):
        return {key: filled(child, mark, malicious) for key, child in node.items()}
    if isinstance(node, list):
        return [filled(child, mark, malicious) for child in node]
    if isinstance(node, str):
        return node.replace("MARK", str(mark)).replace("PICKLE", str(malicious))
    return node


class Runs:
    """Unpickling an object of this class makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (self.folder,)


# Each would make the folder MARK or read the pickle PICKLE, which makes it: key and node.
HOSTILE = {
    "a pickle": ("module.metrics", {"_target_": "pandas.read_pickle", "_args_": ["PICKLE"]}),
    "a pickle by address": (
        "data.cache.extras.evil",
        {"_target_": "pandas.read_pickle", "filepath_or_buffer": "file://PICKLE"},
    ),
    "torch.load": (
        "module.loss",
        {"_target_": "torch.load", "_args_": ["PICKLE"], "weights_only": False},
    ),
    "joblib": ("data.cache.extras.evil", {"_target_": "joblib.load", "_args_": ["PICKLE"]}),
    "numpy": (
        "data.cache.extras.evil",
        {"_target_": "numpy.load", "_args_": ["PICKLE"], "allow_pickle": True},
    ),
    "a system call": ("module.inference", {"_target_": "os.mkdir", "_args_": ["MARK"]}),
    "posix": ("module.inference", {"_target_": "posix.mkdir", "_args_": ["MARK"]}),
    "a method": ("module.loss", {"_target_": "pathlib.Path.mkdir", "_args_": ["MARK"]}),
    "a process": ("module.loss", {"_target_": "subprocess.run", "args": ["mkdir", "MARK"]}),
    "a name behind a module of ours": (
        "module.optimizer",
        {"_target_": "lightning_modules.checkpoint.Path.mkdir", "_args_": ["MARK"]},
    ),
    "a module that one of ours imports": (
        "module.scheduler",
        {"_target_": "datamodules.cache.os.mkdir", "_args_": ["MARK"]},
    ),
    "a function of ours that conf/ does not name": (
        "data.split",
        {"_target_": "files.write_text", "_args_": ["MARK/x", "y"]},
    ),
    "a constructor of another part": (
        "module.loss",
        {"_target_": "pytorch_lightning.loggers.WandbLogger", "offline": False},
    ),
    "deep in a list": (
        "data.sampler.augmentation",
        {"transforms": [[{"a": [{"_target_": "os.mkdir", "_args_": ["MARK"]}]}]]},
    ),
    "partial": (
        "module.optimizer",
        {"_target_": "functools.partial", "_args_": [{"_target_": "os.mkdir"}, "MARK"]},
    ),
    "Hydra's own": ("module.loss", {"_target_": "hydra.utils.call", "_args_": ["MARK"]}),
    "builtins": (
        "module.loss",
        {"_target_": "builtins.exec", "_args_": ["import os; os.mkdir('MARK')"]},
    ),
    "another import": (
        "module.loss",
        {"_target_": "importlib.import_module", "_args_": ["MARK"]},
    ),
    "an interpolation": ("data.data_set.root", "${oc.env:HOME}"),
    "an interpolated target": (
        "module.loss",
        {"_target_": "${oc.decode:os.mkdir}", "_args_": ["MARK"]},
    ),
    "a target that is no text": ("module.loss", {"_target_": ["os.mkdir"], "_args_": ["MARK"]}),
    "no configuration": ("module", "os.mkdir"),
}


@pytest.mark.parametrize("way", HOSTILE)
def test_no_configuration_in_a_checkpoint_runs_code(
    way: str, composed: Callable[..., DictConfig], tiny: list[str], tmp_path: Path
) -> None:
    mark, malicious = tmp_path / "mark", tmp_path / "evil.pkl"
    malicious.write_bytes(pickle.dumps(Runs(str(mark))))
    key, node = HOSTILE[way]
    content = untrained(composed, *tiny)
    place(content["config"], key, filled(node, mark, malicious))
    path = tmp_path / "evil.ckpt"
    torch.save(content, path)
    options = {"checkpoint": path, "precision": 32, "flips": False, "device": "cpu"}
    with pytest.raises(InputError) as error:
        Predictor.from_options({**options, "weights": None})
    assert str(path) in str(error.value)
    assert key in str(error.value)
    assert "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize("place_in", ["state_dict", "config", "seen"])
def test_no_object_in_a_checkpoint_runs_code(
    place_in: str, composed: Callable[..., DictConfig], tiny: list[str], tmp_path: Path
) -> None:
    content = untrained(composed, *tiny)
    content[place_in]["evil"] = Runs(str(tmp_path / "mark"))
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("model", MODELS)
def test_checkpoints_of_every_model_load(
    model: str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(untrained(composed, f"model={model}"), path)
    loaded = checkpoint.load(path)
    for part in ("data_set", "cache", "sampler"):
        checkpoint.build(loaded.config["data"][part])


def test_constructors_are_those_of_modules_and_data() -> None:
    assert "lightning_modules.networks.aeunet.AEUNet" in allowed()
    assert not {name for name in allowed() if name.startswith(("hydra", "pytorch_lightning"))}
