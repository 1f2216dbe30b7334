"""Training on patches, scoring on whole volumes."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypedDict

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from lightning_modules.inference import Inference
from lightning_modules.losses import gaussian_kl, reconstruction_l2

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
MakeMetrics = Callable[[], Metric]


class Loss(Protocol):
    """Terms by name of logits and masks of patches; `loss` is what is minimised."""

    regions: list[str]

    def __call__(self, logits: Tensor, mask: Tensor) -> dict[str, Tensor]: ...


class Batch(TypedDict):
    """Patches or whole volumes, as the data module serves them."""

    image: Tensor  # (B, C, X, Y, Z)
    mask: Tensor  # (B, R, X, Y, Z), bool
    case: list[str]


class VolumeBatch(Batch):
    """Whole volumes, for validation and testing."""

    outside: Tensor  # (B, R), true voxels that the crop has cut off
    index: Tensor  # (B,), place in the data set


class SegmentationModule(pl.LightningModule):
    """Fits a network to patches; validates and tests it on whole volumes.

    Args:
        network: `segment` gives logits (B, R, X, Y, Z); `forward` a named tuple with `logits`, and
            whatever else its training needs.
        loss: Sum over the regions.
        optimizer: Makes the optimizer of the parameters.
        scheduler: Makes the schedule of the optimizer; one step an epoch.
        inference: Whole volumes from patches.
        metrics: Makes the scores of a stage; they have rows by case.
        threshold: Probability above which a voxel belongs to a region.
        channels_last: Memory layout of network and images. On CPUs, 3-D convolutions of few
            channels take half the time with channels last.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler,
        inference: Inference,
        metrics: MakeMetrics,
        threshold: float = 0.5,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
        self.network: Any = network.to(memory_format=self.memory_format)  # pyright: ignore
        self.loss = loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.inference = inference
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(threshold))
        self.metrics: Any = nn.ModuleDict({stage: metrics() for stage in ("val", "test")})

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities (B, R, X, Y, Z) of whole volumes (B, C, X, Y, Z)."""
        return self.logits(image).sigmoid()

    def logits(self, image: Tensor) -> Tensor:
        return self.inference(self.arranged(image), self.network)

    def arranged(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=self.memory_format)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """All terms of the loss of a training batch by name; `loss` is what is minimised."""
        output = self.network(self.arranged(batch["image"]))
        return self.loss(output.logits, batch["mask"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self.terms(batch)
        self.stop_unless_finite(terms, batch)
        self.log_dict(
            {f"train/{name}": value for name, value in terms.items()},
            batch_size=len(batch["image"]),
            on_step=True,
            on_epoch=True,
        )
        return terms["loss"]

    def stop_unless_finite(self, terms: dict[str, Tensor], batch: Batch) -> None:
        finite = torch.stack([term.detach().isfinite() for term in terms.values()])
        if not finite.all():
            names = [name for name, ok in zip(terms, finite.tolist(), strict=True) if not ok]
            raise FloatingPointError(
                f"{', '.join(names)} not finite at step {self.global_step} "
                f"(epoch {self.current_epoch}), cases {', '.join(batch['case'])}: lower "
                "optimizer.lr or look at these images"
            )

    def validation_step(self, batch: VolumeBatch, batch_idx: int) -> Tensor:
        return self.score(batch, "val")

    def test_step(self, batch: VolumeBatch, batch_idx: int) -> Tensor:
        return self.score(batch, "test")

    def score(self, batch: VolumeBatch, stage: str) -> Tensor:
        """Score whole volumes; returns the predicted masks (B, R, X, Y, Z), for callbacks."""
        logits = self.logits(batch["image"])
        loss = self.loss(logits, batch["mask"])["loss"]
        self.log(f"{stage}/loss", loss, batch_size=len(batch["image"]), sync_dist=True)
        prediction = logits.sigmoid() > self.threshold
        self.metrics[stage].update(prediction, batch["mask"], batch["outside"], batch["index"])
        return prediction

    def on_validation_epoch_end(self) -> None:
        self.log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self.log_metrics("test")

    def log_metrics(self, stage: str) -> None:
        values = self.metrics[stage].compute()
        self.metrics[stage].reset()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})

    def case_rows(self, stage: str) -> dict[int, dict[str, float]]:
        """Scores of every case so far, by its index in the data set."""
        return self.metrics[stage].rows()

    def configure_optimizers(self) -> Any:  # noqa: ANN401  (Lightning's own union of eight types)
        optimizer = self.optimizer(self.network.parameters())
        schedule = {"scheduler": self.scheduler(optimizer), "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on along the schedule of this configuration, which may be of more epochs.

        A schedule's state holds its length, and equation 5 ends at a learning rate of 0: a
        finished run that is continued with the state that it saved would not learn any more.
        """
        if "lr_schedulers" not in checkpoint:  # weights alone, to be tested: nothing goes on
            return
        optimizer = self.optimizer(nn.Linear(1, 1).parameters())
        scheduler = self.scheduler(optimizer)
        for _ in range(checkpoint["lr_schedulers"][0]["last_epoch"]):
            optimizer.step()  # without gradients: a schedule wants to follow a step
            scheduler.step()
        checkpoint["lr_schedulers"] = [scheduler.state_dict()]
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group["lr"] = optimizer.param_groups[0]["lr"]


class AutoencoderModule(SegmentationModule):
    """Adds reconstruction and divergence (equation 4) to the loss in training.

    Validation has the terms of the regions alone: it runs on whole volumes, where there is no
    autoencoder. Reconstructed is all that the network is given, the "real input image" of
    equation 2, similarity and mirrored patch too: each channel counts as much as a modality.

    Args:
        l2_weight: Weight of the mean squared reconstruction error.
        kl_weight: Weight of the divergence of the bottleneck.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler,
        inference: Inference,
        metrics: MakeMetrics,
        threshold: float = 0.5,
        channels_last: bool = True,
        l2_weight: float = 0.1,
        kl_weight: float = 0.1,
    ) -> None:
        super().__init__(
            network, loss, optimizer, scheduler, inference, metrics, threshold, channels_last
        )
        self.l2_weight = l2_weight
        self.kl_weight = kl_weight

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        image = batch["image"]
        output = self.network(self.arranged(image))
        terms = self.loss(output.logits, batch["mask"])
        l2 = reconstruction_l2(output.reconstruction, image)
        kl = gaussian_kl(output.latent, voxels=image[0, 0].numel())
        loss = terms["loss"] + self.l2_weight * l2 + self.kl_weight * kl
        return {**terms, "l2": l2, "kl": kl, "loss": loss}
