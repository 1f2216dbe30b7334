"""Fit a network, score its best checkpoint, and measure what that took."""

import logging
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import wandb
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, Timer
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from datamodules.patches import PatchDataModule
from experiments.compilation import compile_network
from experiments.cost import predict_step
from experiments.ranks import is_first
from experiments.results import Results, device_name, peak_memory_mib
from experiments.run import RunFolder
from lightning_modules.checkpoint import check_unseen
from lightning_modules.segmentation import SegmentationModule
from lightning_modules.waiting import WaitingShare

# What Lightning says about choices that are meant.
MEANT = (
    "The '.*_dataloader' does not have many workers",  # reading is cheap, see data.num_workers
    "Checkpoint directory .* exists and is not empty",  # a run's folder holds all of it
    "You requested to overfit but enabled train dataloader shuffling",  # our sampler: no shuffling
    "It is recommended to use `self.log",  # what is logged is the same in all processes
    "Grad strides do not match",  # of kernels of one voxel, which are equal in both
    "The dirpath has changed from",  # a checkpoint of another run is continued in this folder
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 under torch 2.13
)


def prepare_process(folder: RunFolder) -> None:
    """Keep W&B's files beside the runs, and Lightning from warnings that are no news."""
    for variable, value in {
        "WANDB_ERROR_REPORTING": "false",  # no usage reports, unless the user says so
        "WANDB_DATA_DIR": str(folder.path.parent / "wandb"),
        "WANDB_CACHE_DIR": str(folder.path.parent / "wandb"),
    }.items():
        os.environ.setdefault(variable, value)
    for message in MEANT:
        warnings.filterwarnings("ignore", message)
    rank_zero = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    rank_zero.addFilter(is_no_advertisement)


def is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def fit_and_test(
    module: SegmentationModule,
    datamodule: PatchDataModule,
    trainer: pl.Trainer,
    folder: RunFolder,
    config: dict[str, Any],
    resume: str | Path | None,
    *,
    anew: bool = False,
) -> Results:
    """Train a module, then validate and test the best checkpoint that came out of it.

    All processes of a run on several devices call this, and get the same scores.

    A part of the split without cases is left out. Without validation cases no checkpoint is better
    than another: the last one is taken for the best, and training does not stop early.

    Args:
        module: Module to train.
        datamodule: Serves patches and whole volumes.
        trainer: Writes its checkpoints into the folder.
        folder: Folder of the run.
        config: The resolved configuration, for the loggers.
        resume: Checkpoint to continue from.
        anew: Whether to forget what the folder has of an earlier run, once all is checked.

    Raises:
        InputError: The data cannot be used, or the checkpoint has seen cases of the test part.
    """
    shape = (datamodule.batch_size, config["model"]["in_channels"], *datamodule.sampler.size)
    step = predict_step(
        module,
        shape,
        len(datamodule.regions),
        trainer.precision,
        trainer.strategy.root_device.type,
    )
    datamodule.prepare_data()  # faults of the user's files show before a logger starts
    datamodule.setup("fit")
    parts = datamodule.parts
    for start in filter(None, (resume, config["finetune"])):
        test_cases = datamodule.cache.build(parts.test, datamodule.data_set)
        check_unseen(start, {case.name: case.identity for case in test_cases})
    if not parts.validation:
        train_without_validation(trainer)
    if anew and is_first():
        folder.clear()
    if config["compile"]:
        compile_network(module, trainer, shape)
    timer, waiting = Timer(), WaitingShare()
    trainer.callbacks += [timer, waiting]  # pyright: ignore[reportAttributeAccessIssue]
    exit_code = 1
    try:
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
        trainer.fit(module, datamodule, ckpt_path=resume)
        # Training that had stopped before this process began counts too.
        progress: Any = trainer.fit_loop.epoch_progress.current
        epochs = progress.processed
        metrics: dict[str, Tensor] = {}
        start = time.monotonic()
        # The last validation was of the last weights: its scores would stand beside the test
        # scores of other weights, in the results, in the CSV and in the summary of W&B.
        if parts.validation:
            trainer.validate(module, datamodule, ckpt_path=folder.best, verbose=False)
            metrics |= trainer.callback_metrics
        if parts.test:
            trainer.test(module, datamodule, ckpt_path=folder.best, verbose=False)
            metrics |= trainer.callback_metrics
        test_s = time.monotonic() - start
        exit_code = 0
    except SIGTERMException:  # its exit code would be 0, as if all were done
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        wandb.finish(exit_code=exit_code)  # else the next job of a sweep logs into the same run
    chosen = {group: name for group, name in config["choices"].items() if name and "/" not in group}
    return Results(
        run=folder.path.name,
        choices=dict(sorted(chosen.items())),
        metrics={name: float(value) for name, value in metrics.items()},
        cost=step.cost,
        epochs=epochs,
        fit_s=timer.time_elapsed(),
        test_s=test_s,
        peak_memory_mib=peak_memory_mib(),
        device=device_name(),
        waiting=waiting.share,
    )


def train_without_validation(trainer: pl.Trainer) -> None:
    """Take out of a trainer what waits for validation scores that will never come."""
    trainer.limit_val_batches = 0
    callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in list(callbacks):
        if isinstance(callback, ModelCheckpoint):
            callback.monitor = None  # keeps the last weights
        elif isinstance(callback, EarlyStopping):
            callbacks.remove(callback)
