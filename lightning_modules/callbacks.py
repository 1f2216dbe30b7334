"""What a run leaves behind beside its weights: its configuration, rows, slices and pictures."""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from lightning_modules.checkpoint import CONFIG_KEY
from lightning_modules.memory import keep_freed
from lightning_modules.pictures import busiest_slice, draw_case, plane
from lightning_modules.segmentation import Batch, SegmentationModule, VolumeBatch


class SaveConfig(Callback):
    """Puts the resolved configuration into every checkpoint; `checkpoint.load` reads it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG_KEY] = self.config


class SeedEveryStep(Callback):
    """Seeds the noise of the bottleneck by the step, so that a resumed run repeats it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        sequence = np.random.SeedSequence([self.seed, trainer.global_step])
        torch.manual_seed(int(sequence.generate_state(1)[0]))


class KeepFreedMemory(Callback):
    """Lets a process that trains on a CPU keep the memory that it frees: `memory.keep_freed`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.strategy.root_device.type == "cpu":
            keep_freed()


class LogSlices(Callback):
    """Logs the slice with most tumour of the first validation cases, with both masks, to W&B."""

    def __init__(self, cases: int = 3, channel: int = -1) -> None:
        """Take the first `cases` cases, and this channel of their images (the last: FLAIR)."""
        self.cases = cases
        self.channel = channel

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401  (what `score` returns: masks, (B, R, X, Y, Z))
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx >= self.cases:
            return
        for logger in wandb_loggers(trainer):
            import wandb

            image = scan_of(trainer, batch["image"][0], self.channel)
            truth, prediction = as_array(batch["mask"][0]), as_array(outputs[0])
            position = busiest_slice(truth[0], axis=2)
            names = {0: "background", **dict(enumerate(regions_of(trainer), start=1))}
            masks = {
                name: {"mask_data": plane(innermost(regions), 2, position), "class_labels": names}
                for name, regions in {"truth": truth, "prediction": prediction}.items()
            }
            picture = wandb.Image(
                display_range(plane(image, 2, position)),
                masks=masks,
                caption=f"{batch['case'][0]}, axial {position}",
            )
            logger.experiment.log(
                {
                    f"val/slice/{batch['case'][0]}": picture,
                    "trainer/global_step": trainer.global_step,
                }
            )


class CaseTable(Callback):
    """Writes a row for every test case: its scores as CSV and as a W&B table."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.names: dict[int, str] = {}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401  (what `score` returns: masks, (B, R, X, Y, Z))
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.names.update(zip(batch["index"].tolist(), batch["case"], strict=True))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Called before the module's own hook, which starts its metrics anew.
        assert isinstance(pl_module, SegmentationModule)
        by_case = pl_module.case_rows("test")
        columns = ["case", *next(iter(by_case.values()))]
        rows = [
            [self.names[index], *(round(value, 6) for value in scores.values())]
            for index, scores in by_case.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        partial.replace(self.path)
        for logger in wandb_loggers(trainer):
            logger.log_table("test/cases", columns=columns, data=rows)


class CasePictures(Callback):
    """Draws test cases, truth and prediction in three planes, to PNG and to W&B."""

    def __init__(self, folder: str | Path, cases: int, channel: int = -1) -> None:
        """Draw the first `cases` cases, on this channel of their images (the last: FLAIR)."""
        self.folder = Path(folder)
        self.cases = cases
        self.channel = channel

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401  (what `score` returns: masks, (B, R, X, Y, Z))
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx >= self.cases:
            return
        regions = regions_of(trainer)
        self.folder.mkdir(parents=True, exist_ok=True)
        for item, case in enumerate(batch["case"]):
            rows = {
                name: dict(zip(regions, as_array(masks[item]), strict=True))
                for name, masks in {"truth": batch["mask"], "prediction": outputs}.items()
            }
            scan = scan_of(trainer, batch["image"][item], self.channel)
            figure = draw_case(scan, rows, title=case)
            path = self.folder / f"{case}.png"
            figure.savefig(path, dpi=80)
            for logger in wandb_loggers(trainer):
                logger.log_image("test/pictures", [str(path)], caption=[case])


def summarise_best(trainer: pl.Trainer, regions: Iterable[str]) -> None:
    """Let a run's summary in W&B, and so the table of runs, show its best validation scores.

    By default it is the last: what a run ended with, and not the checkpoint that is tested. By
    name: of two patterns, Lightning's `*` would win.
    """
    scores = {"val/dice": "max", **{f"val/dice_{region}": "max" for region in regions}}
    for logger in wandb_loggers(trainer):
        for metric, summary in {**scores, "val/loss": "min"}.items():
            logger.experiment.define_metric(
                metric, step_metric="trainer/global_step", summary=summary
            )


def wandb_loggers(trainer: pl.Trainer) -> Iterator[WandbLogger]:
    return (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))


def regions_of(trainer: pl.Trainer) -> list[str]:
    return list(trainer.lightning_module.loss.regions)  # pyright: ignore


def scan_of(trainer: pl.Trainer, image: Tensor, channel: int) -> np.ndarray:
    """One modality (X, Y, Z) of an image; what else a network sees stands behind the modalities."""
    data_set = trainer.datamodule.data_set  # pyright: ignore[reportAttributeAccessIssue]
    return as_array(image[: len(data_set.modalities)][channel])


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def innermost(regions: np.ndarray) -> np.ndarray:
    """Masks (R, X, Y, Z) as one map: 0, or 1 + the last region that a voxel belongs to."""
    numbers = np.arange(1, len(regions) + 1, dtype=np.uint8)
    return (regions * numbers[:, None, None, None]).max(0)


def display_range(values: np.ndarray) -> np.ndarray:
    """Intensities as bytes, from the darkest to the 99.5th percentile; nothing (0) is black."""
    low, high = values.min(), np.percentile(values, 99.5)
    values = np.where(values == 0, low, values)
    return (255 * np.clip((values - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)
