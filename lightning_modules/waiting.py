"""How much of the time of training goes by while it waits for its data."""

import math
import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import PassThroughProfiler

# What Lightning calls its actions.
FETCH, TO_DEVICE, STEP = "train_dataloader_next", "batch_to_device", "run_training_batch"


class StepClock(PassThroughProfiler):
    """Adds up the seconds that training waits for batches, and those of its steps.

    Lightning tells its profiler when it asks the loader for a batch, when it brings one to the
    device, where the data module finishes it, and when it trains on it. Validation, callbacks,
    loggers and checkpoints are neither.

    Args:
        trainer: Trainer that this is the profiler of.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__()
        self.trainer = trainer
        self.waiting_s = 0.0
        self.steps_s = 0.0
        self._started: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        self._started[action_name] = time.monotonic()

    def stop(self, action_name: str) -> None:
        seconds = time.monotonic() - self._started.pop(action_name)
        if action_name == STEP:
            self.steps_s += seconds
        elif self.trainer.training and action_name.endswith((FETCH, TO_DEVICE)):
            self.waiting_s += seconds


class WaitingShare(Callback):
    """Logs `train/waiting` after every epoch: the share of its time that training waited for data.

    It takes the place of Lightning's profiler. A profiler of the user's stays, and reports the same
    and more.
    """

    def __init__(self) -> None:
        self.waiting_s = self.steps_s = 0.0

    @property
    def share(self) -> float:
        """Share of the time of all epochs so far; NaN if nothing was measured."""
        total_s = self.waiting_s + self.steps_s
        return self.waiting_s / total_s if total_s else math.nan

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that goes on from the end of an epoch ends that epoch without starting it.
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.clock = StepClock(trainer)
        if isinstance(trainer.profiler, PassThroughProfiler):  # pyright: ignore
            trainer.profiler = self.clock  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        waiting_s, steps_s = self.clock.waiting_s, self.clock.steps_s
        if steps_s:
            self.waiting_s += waiting_s
            self.steps_s += steps_s
            pl_module.log("train/waiting", waiting_s / (waiting_s + steps_s), sync_dist=True)
