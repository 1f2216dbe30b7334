"""Files that cannot be loaded as a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

import train
from errors import InputError
from lightning_modules import checkpoint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such checkpoint"),
        (b"", "not a readable checkpoint"),
        (b"hello world", "not a readable checkpoint"),
        ({"state_dict": {}}, "expected a checkpoint written by train.py"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes | dict | None, message: str):
    path = tmp_path / "other.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.process
def test_weights_of_another_architecture_are_refused(
    composed: Callable[..., DictConfig], tiny: list[str], tmp_path: Path
):
    config = composed(*tiny, "logger=csv", "trainer=debug")
    train.train(config)
    content = checkpoint.read(Path(config.run_dir) / "best.ckpt")
    content["config"]["model"]["depth"] = content["config"]["module"]["network"]["depth"] = 3
    torch.save(content, tmp_path / "mixed.ckpt")
    with pytest.raises(InputError, match="weights of another architecture"):
        checkpoint.load(tmp_path / "mixed.ckpt")
