"""A run that is killed at any moment ends, when it is started again, as if it had never been."""

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
from lightning_modules import checkpoint

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


def kill(config: DictConfig) -> None:
    """Train in a process of its own, and see that it is killed."""
    process = os.fork()
    if process == 0:
        try:
            train.train(config)
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
    kill(composed(*common, *dying))
    train.train(composed(*common))
    assert_same(tmp_path / "run", wholes[kind])
