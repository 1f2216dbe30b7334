"""A run that is killed at any moment ends, when it is started again, as if it had never been."""

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

import train
from datamodules.brats import BraTS
from datamodules.cache import Cache
from datamodules.nifti import write_volume
from experiments.prediction import ROWS_NAME, predict_folder
from files import PREFIX
from lightning_modules import checkpoint
from tests.conftest import options_of

Compose = Callable[..., DictConfig]

pytestmark = [
    pytest.mark.process,
    # Python 3.12 and later; the tests have one thread that computes.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

MOMENTS = (
    "on_fit_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_save_checkpoint",
    "on_fit_end",
    "on_test_start",
    "on_test_end",
)


class KillAt(pl.Callback):
    """Kills its own process.

    Args:
        moment: Name of the hook in which it does so.
        epoch: First epoch in which it does so, from 0.
    """

    def __init__(self, moment: str, epoch: int) -> None:
        def kill(trainer: pl.Trainer, *_: object) -> None:
            if trainer.current_epoch >= epoch:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, moment, kill)


def killed(work: Callable[[], object]) -> None:
    """Do something in a process of its own, and see that it is killed."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def outcome(folder: Path) -> dict[str, Any]:
    """What a run has to show for itself, less its times."""
    results = json.loads((folder / "results.json").read_text())
    return {key: results[key] for key in ("metrics", "epochs")} | {
        "cases": (folder / "cases.csv").read_text(),
        "split": (folder / "split.json").read_text(),
    }


def assert_same(folder: Path, whole: Path) -> None:
    assert outcome(folder) == outcome(whole)
    for name in ("last.ckpt", "best.ckpt"):
        expected = checkpoint.read(whole / name)["state_dict"]
        for key, tensor in checkpoint.read(folder / name)["state_dict"].items():
            assert torch.equal(tensor, expected[key]), f"{name}: {key}"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".partial")]


@pytest.fixture(scope="module")
def wholes() -> dict[str, Path]:
    """Runs that were never killed, by their kind."""
    return {}


KINDS = {
    "to the last epoch": ["trainer.max_epochs=3"],
    # Nothing changes, so that training stops after the second epoch.
    "stops early": [
        "trainer.max_epochs=9",
        "callbacks.early_stopping.patience=1",
        "optimizer.lr=0",
    ],
}


LATE = MOMENTS[3:]  # when a run that stops early may have stopped
CASES = [
    *[("to the last epoch", moment, False) for moment in MOMENTS],
    *[("stops early", moment, False) for moment in LATE],
    *[("to the last epoch", moment, True) for moment in ("on_train_batch_end", "on_test_start")],
]


@pytest.mark.parametrize(("kind", "moment", "again"), CASES)
def test_killed_at(
    composed: Compose,
    tiny: list[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    wholes: dict[str, Path],
    kind: str,
    moment: str,
    again: bool,
) -> None:
    common = [*tiny, "logger=csv", "trainer.check_val_every_n_epoch=1", *KINDS[kind]]
    if kind not in wholes:
        wholes[kind] = tmp_path_factory.mktemp("whole")
        train.train(composed(*common, f"run_dir={wholes[kind]}"))
    dying = [
        "+callbacks.kill._target_=tests.test_kills.KillAt",
        f"+callbacks.kill.moment={moment}",
        f"+callbacks.kill.epoch={0 if moment == 'on_fit_start' else 1}",
    ]
    if again:
        train.train(composed(*common))
        dying += ["again=true"]
    config = composed(*common, *dying)
    killed(lambda: train.train(config))
    train.train(composed(*common))
    assert_same(tmp_path / "run", wholes[kind])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def files(folder: Path) -> dict[str, bytes]:
    """Path -> content of every file that is no lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def test_killed_while_it_fills_the_cache(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set = BraTS(brats)

    def fill(root: Path) -> None:
        Cache(root, 1, "brain", workers=1).build(data_set.cases(), data_set)

    fill(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.cache.write_json", die)  # the last file of a case
        killed(lambda: fill(tmp_path / "killed"))
    assert any(path.name.startswith(PREFIX) for path in (tmp_path / "killed").rglob("*"))
    fill(tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("again", [False, True], ids=["", "again"])
def test_killed_while_it_predicts(
    composed: Compose,
    tiny: list[str],
    brats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bright_networks: None,
    again: bool,
) -> None:
    config = composed(*tiny, "logger=csv", "trainer=debug")
    train.train(config)
    asked = options_of("predict", checkpoint=f"{config.run_dir}/best.ckpt", input=brats)
    asked["pictures"] = False
    predict_folder({**asked, "output": str(tmp_path / "whole")})
    asked["output"] = str(tmp_path / "killed")
    if again:
        predict_folder({**asked, "thresholds": 0.9})
    written = []

    def write_and_die(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            die()
        written.append(path)
        write_volume(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("experiments.prediction.write_volume", write_and_die)
        killed(lambda: predict_folder({**asked, "again": again}))
    predict_folder(asked)
    contents = [files(tmp_path / name) for name in ("killed", "whole")]
    rows = [
        [row | {"seconds": ""} for row in csv.DictReader(content.pop(ROWS_NAME).decode().split())]
        for content in contents
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 6
    assert contents[0] == contents[1]
