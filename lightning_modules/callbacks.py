"""Callbacks: seeds, memory, the operating point, and the tables and pictures of a run."""

import csv
import logging
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from files import write_text, written_whole
from lightning_modules.checkpoint import CONFIG_KEY, SEEN_KEY, STOPPED_KEY, read
from lightning_modules.memory import keep_freed
from lightning_modules.pictures import busiest_slice, draw_case, plane
from lightning_modules.ranks import told_by_ranks
from lightning_modules.segmentation import Batch, SegmentationModule, VolumeBatch

Masks = Any  # what the steps return: predicted masks (B, R, X, Y, Z); Lightning's type is a union


class SaveConfig(Callback):
    """Stores the resolved configuration in every checkpoint, where `checkpoint.load` reads it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG_KEY] = self.config


class SaveSeenCases(Callback):
    """Puts into every checkpoint which cases it was trained and validated on.

    `checkpoint.check_unseen` reads them. A run that continues from a checkpoint keeps its cases.

    Args:
        start: Checkpoint whose network is trained on, if there is one: it has seen its cases.
    """

    def __init__(self, start: str | None = None) -> None:
        self.seen: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
        if start is not None:
            self._add(read(start))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        for part, seen in self.seen.items():
            cases = data.cache.build(getattr(data.parts, part), data.data_set)
            seen.update({identity: case.name for case in cases for identity in case.identity})

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._add(checkpoint)

    def _add(self, checkpoint: Mapping[str, Any]) -> None:
        for part, seen in checkpoint.get(SEEN_KEY, {}).items():
            self.seen[part].update(seen)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[SEEN_KEY] = self.seen


class RememberStop(Callback):
    """Keeps in every checkpoint whether training was to stop early there, which Lightning forgets.

    Without it, a run that stopped early and was killed while it was tested would train on.

    Args:
        is_same_run: Whether the run goes on from a checkpoint of its own. One that continues
            another run trains on, whether that one had stopped or not.
    """

    def __init__(self, is_same_run: bool) -> None:
        self.is_same_run = is_same_run

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[STOPPED_KEY] = trainer.should_stop

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.is_same_run and checkpoint.get(STOPPED_KEY, False):
            trainer.should_stop = True


class SeedEveryStep(Callback):
    """Seeds torch before every training step, by the run's seed, the step and the process.

    A resumed run then draws the same noise in the bottleneck as an uninterrupted one, and no two
    patches of a step that several processes take together have the same noise.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        sequence = np.random.SeedSequence([self.seed, trainer.global_step, trainer.global_rank])
        torch.manual_seed(int(sequence.generate_state(1)[0]))


class KeepFreedMemory(Callback):
    """Calls `memory.keep_freed` in a process that trains on a CPU."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.strategy.root_device.type == "cpu":
            keep_freed()


class AverageWeights(EMAWeightAveraging):
    """Validates, keeps and tests the moving average of the weights, which train on beneath it.

    Checkpoints hold both: the average, which `checkpoint.load` reads, and the weights, from which
    training goes on. It differs from Lightning's own callback in that

    - the average stays in the module until validation has ended, so that the scores and the
      threshold that are computed then are its own;
    - after training, the module keeps the weights of the checkpoint that it is to be scored with.

    Args:
        decay: What the average keeps of itself in a step: it looks back on about 1 / (1 - decay).
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__(decay=decay)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing: Lightning calls this before the module's own hook computes the scores."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class ChooseThreshold(Callback):
    """Chooses a detector's threshold after every validation: `LesionReport.best_threshold`.

    The scores of this validation are those at the new threshold. Checkpoints store it with the
    weights that it was chosen for, and test scores are taken at it.

    Args:
        target_fp: The largest number of false positives a patient on the validation cases.
    """

    def __init__(self, target_fp: float) -> None:
        self.target_fp = target_fp

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning calls this before the module's own hook, which computes the scores.
        assert isinstance(pl_module, SegmentationModule)
        report = pl_module.metrics["val"].report()
        pl_module.threshold = threshold = report.best_threshold(self.target_fp)
        found = report.scores(threshold)["false_positives"]
        if found > self.target_fp:
            logging.warning(
                "callbacks.threshold.target_fp: expected at most %g false positives a patient at "
                "some threshold, found %.3g at the highest, which is taken",
                *(self.target_fp, found),
            )


class LogSlices(Callback):
    """Logs axial slices of the first validation cases to W&B, with true and predicted masks.

    Each is the slice with the largest area of the outermost true region. Of several processes, the
    first logs those of its own cases.

    Args:
        cases: Number of cases to log.
        channel: Index of the modality to show; the last one of BraTS is FLAIR.
    """

    def __init__(self, cases: int = 3, channel: int = -1) -> None:
        self.cases = cases
        self.channel = channel

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Masks,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if int(batch["index"][0]) >= self.cases or not trainer.is_global_zero:
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
    """Writes the scores of every test case, as CSV and as a W&B table.

    Args:
        path: CSV file to write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.names: dict[int, str] = {}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Masks,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.names.update(zip(batch["index"].tolist(), batch["case"], strict=True))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning calls this before the module's own hook, which resets its metrics.
        assert isinstance(pl_module, SegmentationModule)
        by_case = pl_module.metrics["test"].rows()
        names = {index: name for told in told_by_ranks(self.names) for index, name in told.items()}
        if not trainer.is_global_zero:
            return
        columns = ["case", *next(iter(by_case.values()))]
        rows = [
            [names[index], *(round(value, 6) for value in scores.values())]
            for index, scores in by_case.items()
        ]
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        write_text(self.path, text.getvalue())
        for logger in wandb_loggers(trainer):
            logger.log_table("test/cases", columns=columns, data=rows)


class CasePictures(Callback):
    """Draws truth and prediction of the first test cases in three planes, as PNG and for W&B.

    Args:
        folder: Folder of the pictures, which is made if it is missing.
        cases: Number of cases to draw.
        channel: Index of the modality to show; the last one of BraTS is FLAIR.
    """

    def __init__(self, folder: str | Path, cases: int, channel: int = -1) -> None:
        self.folder = Path(folder)
        self.cases = cases
        self.channel = channel

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.names: dict[int, str] = {}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Masks,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        regions = regions_of(trainer)
        for item, (index, case) in enumerate(
            zip(batch["index"].tolist(), batch["case"], strict=True)
        ):
            if index >= self.cases:
                continue
            rows = {
                name: dict(zip(regions, as_array(masks[item]), strict=True))
                for name, masks in {"truth": batch["mask"], "prediction": outputs}.items()
            }
            scan = scan_of(trainer, batch["image"][item], self.channel)
            figure = draw_case(scan, rows, title=case)
            with written_whole(self.folder / f"{case}.png") as path:
                figure.savefig(path, dpi=80)
            self.names[index] = case

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = {index: name for told in told_by_ranks(self.names) for index, name in told.items()}
        for logger in wandb_loggers(trainer):  # does nothing in other processes than the first
            for _, case in sorted(names.items()):
                path = str(self.folder / f"{case}.png")
                logger.log_image("test/pictures", [path], caption=[case])


def wandb_loggers(trainer: pl.Trainer) -> Iterator[WandbLogger]:
    return (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))


def regions_of(trainer: pl.Trainer) -> list[str]:
    return list(trainer.datamodule.regions)  # pyright: ignore[reportAttributeAccessIssue]


def scan_of(
    trainer: pl.Trainer, image: Float[Tensor, "c x y z"], channel: int
) -> Float[np.ndarray, "x y z"]:
    """Take one modality from an image.

    Modalities are the first channels; similarity and mirrored patches come after them.
    """
    modalities = trainer.datamodule.modalities  # pyright: ignore[reportAttributeAccessIssue]
    return as_array(image[: len(modalities)][channel])


def as_array(tensor: Shaped[Tensor, "..."]) -> Shaped[np.ndarray, "..."]:
    return tensor.detach().cpu().numpy()


def innermost(regions: Bool[np.ndarray, "r x y z"]) -> UInt8[np.ndarray, "x y z"]:
    """Turn masks into labels: 1 + the last region that contains the voxel, or 0."""
    numbers = np.arange(1, len(regions) + 1, dtype=np.uint8)
    return (regions * numbers[:, None, None, None]).max(0)


def display_range(values: Float[np.ndarray, "x y"]) -> UInt8[np.ndarray, "x y"]:
    """Scale intensities between the lowest and the 99.5th percentile to bytes.

    The background, which is 0, becomes black.
    """
    low, high = values.min(), np.percentile(values, 99.5)
    values = np.where(values == 0, low, values)
    return (255 * np.clip((values - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)
