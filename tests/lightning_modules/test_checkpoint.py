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


@pytest.mark.parametrize("kept", [0, 1, 100, 5_000, 20_000, -1, -100, -5_000])
def test_a_checkpoint_that_is_cut_is_refused(tmp_path: Path, kept: int):
    path = tmp_path / "cut.ckpt"
    torch.save({"config": {}, "state_dict": {"weight": torch.arange(8_000)}}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="not a readable checkpoint") as error:
        checkpoint.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", range(60, 40_000, 3_331))
def test_a_damaged_checkpoint_is_refused_or_read(tmp_path: Path, place: int):
    path = tmp_path / "damaged.ckpt"
    torch.save({"config": {}, "state_dict": {"weight": torch.arange(8_000)}}, path)
    content = bytearray(path.read_bytes())
    content[place : place + 20] = bytes(255 - byte for byte in content[place : place + 20])
    path.write_bytes(content)
    with pytest.raises(InputError) as error:  # at the latest for a configuration without parts
        checkpoint.read(path)
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
