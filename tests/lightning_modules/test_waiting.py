"""The share of waiting is that of the loader, not of steps, validations or callbacks."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_modules.waiting import WaitingShare

PAUSE_S = 0.03


class Slow(Dataset[Tensor]):
    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(self.pause_s)
        return torch.ones(1)


class Sleeper(pl.LightningModule):
    """Sleeps in its steps, in the transfer of its batches and in its hooks.

    Args:
        step_s: Pause in a training step.
        transfer_s: Pause in bringing a batch to the device.
        other_s: Pause in a hook that is none of these.
    """

    def __init__(self, step_s: float, transfer_s: float, other_s: float) -> None:
        super().__init__()
        self.pauses_s = {"step": step_s, "transfer": transfer_s, "other": other_s}
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        time.sleep(self.pauses_s["step"])
        return self.layer(batch).sum()

    def validation_step(self, batch: Tensor) -> None:
        pass

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        time.sleep(self.pauses_s["transfer"])
        return batch

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(self.pauses_s["other"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0)


def trained(
    load_s: float, step_s: float, transfer_s: float = 0, other_s: float = 0, **options: Any
) -> tuple[WaitingShare, pl.Trainer]:
    share = WaitingShare()
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[share], logger=False, accelerator="cpu", num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    # Validation waits for its data in all cases.
    loaders: Any = DataLoader(Slow(load_s)), DataLoader(Slow(PAUSE_S))
    trainer.fit(Sleeper(step_s, transfer_s, other_s), *loaders)
    return share, trainer


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_the_share_tells_a_slow_loader_from_slow_steps():
    slow_loader, trainer = trained(load_s=PAUSE_S, step_s=0)
    assert slow_loader.share > 0.7
    assert float(trainer.callback_metrics["train/waiting"]) > 0.7
    slow_transfer, _ = trained(load_s=0, step_s=0, transfer_s=PAUSE_S)
    assert slow_transfer.share > 0.7
    slow_steps, trainer = trained(load_s=0, step_s=PAUSE_S, other_s=PAUSE_S)
    assert slow_steps.share < 0.3
    assert float(trainer.callback_metrics["train/waiting"]) < 0.3


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_profiler_of_the_users_stays():
    share, trainer = trained(load_s=0, step_s=0, profiler=SimpleProfiler())
    assert isinstance(trainer.profiler, SimpleProfiler)
    assert math.isnan(share.share)
    assert "train/waiting" not in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # as a run's folder does
def test_a_run_goes_on_from_the_end_of_an_epoch(tmp_path: Path):
    """A checkpoint after validation lies before the end of its epoch, which ends unstarted."""
    loaders: Any = DataLoader(Slow(0)), DataLoader(Slow(0))
    for resumed in (False, True):
        checkpoints = ModelCheckpoint(tmp_path, "end", save_on_train_epoch_end=False)
        share = WaitingShare()
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[share, checkpoints], logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        resume = tmp_path / "end.ckpt" if resumed else None
        trainer.fit(Sleeper(0, 0, 0), *loaders, ckpt_path=resume)
        assert math.isnan(share.share) == resumed  # no step is left to measure
