"""The LightningModule of all networks: it trains on patches and is scored on whole volumes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NotRequired, TypedDict

import pytorch_lightning as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import ParamsT

from errors import InputError
from lightning_modules.inference import Flip, Inference
from lightning_modules.losses import Loss, Terms
from lightning_modules.metrics import CaseMetrics, MeanOverCases
from lightning_modules.metrics.lesions import OnScanGrid
from lightning_modules.ranks import mean_of_ranks, told_by_ranks

MakeOptimizer = Callable[[ParamsT], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
MakeMetrics = Callable[[], CaseMetrics]


class Batch(TypedDict):
    """Training patches, as the data module serves them."""

    image: Float[Tensor, "b c x y z"]
    mask: Bool[Tensor, "b r x y z"]
    case: list[str]


class VolumeBatch(Batch):
    """Whole volumes, for validation and testing."""

    outside: Int[Tensor, "b r"]  # number of true voxels that the crop has cut off
    index: Int[Tensor, " b"]  # position of the case in the data set
    on_scan_grid: NotRequired[list[OnScanGrid]]  # of test cases


class SegmentationModule(pl.LightningModule):
    """Fits a network to patches; validates and tests it on whole volumes.

    All that depends on the task is in the objects that it is built from: a detector has another
    loss, inference and metrics than a network that segments regions.

    Args:
        network: `forward` turns patches into a named tuple with `logits` and whatever else the loss
            needs. The inference documents which further methods it calls.
        loss: Computes the terms to minimise, for patches and for whole volumes.
        optimizer: Makes the optimizer from the network's parameters. Its weight decay, if it has
            any, acts on the kernels of convolutions alone (Myronenko 2018).
        scheduler: Makes the learning rate schedule from the optimizer; it has one step an epoch.
        inference: Computes the logits of whole volumes at full resolution.
        metrics: Makes the metrics of a stage; it is called for validation and for testing.
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
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
        self.network: Any = network.to(memory_format=self.memory_format)  # pyright: ignore
        self.loss = loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.inference = inference
        self.metrics: Any = nn.ModuleDict({stage: metrics() for stage in ("val", "test")})
        self.volume_losses: Any = nn.ModuleDict({stage: MeanOverCases() for stage in self.metrics})

    @property
    def threshold(self) -> float:
        """Probability above which a voxel is predicted; it is stored in every checkpoint."""
        return float(self.metrics["test"].threshold)

    @threshold.setter
    def threshold(self, probability: float) -> None:
        for metrics in self.metrics.values():
            metrics.threshold.fill_(probability)

    def forward(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b r x y z"]:
        """Predict the probabilities of whole volumes at full resolution."""
        return probabilities(self.logits(image))

    def logits(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b r x y z"]:
        """Compute the logits of whole volumes at full resolution."""
        return self.inference(self.in_memory_format(image), self.network)

    def estimates(
        self,
        image: Float[Tensor, "b c x y z"],
        candidates: Bool[Tensor, "b x y z"],
        flips: Sequence[Flip],
    ) -> Iterator[Float[Tensor, "b r x y z"]]:
        """Yield the probabilities of candidates in each mirror image, mirrored back."""
        image = self.in_memory_format(image)
        for logits in self.inference.estimates(image, self.network, candidates, flips):
            yield probabilities(logits)

    def share(self, candidates: Bool[Tensor, "b x y z"]) -> float:
        """Return how many voxels the network gets for candidates, over how many it gets for all."""
        return self.inference.share(candidates)

    def in_memory_format(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        return image.contiguous(memory_format=self.memory_format)

    def terms(self, batch: Batch) -> Terms:
        """Compute all terms of the loss of training patches."""
        return self.loss(self.network(self.in_memory_format(batch["image"])), batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self.terms(batch)
        # What is logged, and what stops the training, is the same in all processes.
        means = mean_of_ranks(torch.stack([term.detach().float() for term in terms.values()]))
        mean_terms = dict(zip(terms, means, strict=True))
        self.stop_unless_finite(mean_terms, batch)
        self.log_dict(
            {f"train/{name}": value for name, value in mean_terms.items()},
            batch_size=len(batch["image"]),
            on_step=True,
            on_epoch=True,
        )
        return terms["loss"]

    def stop_unless_finite(self, terms: Terms, batch: Batch) -> None:
        """Stop training when a term is NaN or infinite.

        Raises:
            FloatingPointError: Names the terms, the step and the cases.
        """
        finite = torch.stack([term.detach().isfinite() for term in terms.values()])
        if not finite.all():
            names = [name for name, ok in zip(terms, finite.tolist(), strict=True) if not ok]
            cases = [case for cases in told_by_ranks(batch["case"]) for case in cases]
            raise FloatingPointError(
                f"{', '.join(names)} not finite at step {self.global_step} "
                f"(epoch {self.current_epoch}), cases {', '.join(cases)}: lower "
                "optimizer.lr or look at these images"
            )

    def validation_step(self, batch: VolumeBatch, batch_idx: int) -> Tensor:
        return self.score(batch, "val")

    def test_step(self, batch: VolumeBatch, batch_idx: int) -> Tensor:
        return self.score(batch, "test")

    def score(self, batch: VolumeBatch, stage: str) -> Bool[Tensor, "b r x y z"]:
        """Score whole volumes, and return the predicted masks for the callbacks."""
        logits = self.logits(batch["image"])
        loss = self.loss.on_volume(logits, batch)["loss"]
        self.volume_losses[stage].update(loss, batch["index"])
        probability = probabilities(logits)
        self.metrics[stage].update(probability, batch)
        return probability > self.metrics[stage].threshold

    def on_validation_epoch_end(self) -> None:
        self.log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self.log_metrics("test")

    def log_metrics(self, stage: str) -> None:
        scores = {**self.metrics[stage].compute(), "loss": self.volume_losses[stage].compute()}
        self.metrics[stage].reset()
        self.volume_losses[stage].reset()
        self.log_dict({f"{stage}/{name}": value for name, value in scores.items()})

    def configure_optimizers(self) -> Any:  # noqa: ANN401  (Lightning's own union of eight types)
        optimizer = self.make_optimizer(self.network)
        schedule = {"scheduler": self.scheduler(optimizer), "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def make_optimizer(self, network: nn.Module) -> Optimizer:
        """Make the optimizer of a network, whose weight decay acts on convolution kernels alone.

        Without weight decay, all parameters are one group.
        """
        optimizer = self.optimizer(network.parameters())
        if not optimizer.defaults.get("weight_decay"):
            return optimizer
        convolutions = [part for part in network.modules() if isinstance(part, nn.Conv3d)]
        kernels = [convolution.weight for convolution in convolutions]
        known = {id(kernel) for kernel in kernels}
        others = [weight for weight in network.parameters() if id(weight) not in known]
        return self.optimizer([{"params": kernels}, {"params": others, "weight_decay": 0.0}])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue on this configuration's schedule, which may be longer than the checkpoint's.

        The saved state of a schedule holds its length, and equation 5 ends at a learning rate of 0:
        a finished run that was continued with this state would not learn any more.

        Raises:
            InputError: The checkpoint was trained with another weight decay, which its state of the
                optimizer would bring back.
        """
        if "lr_schedulers" not in checkpoint:  # weights alone can be tested, but not continued
            return
        optimizer = self.make_optimizer(nn.Conv3d(1, 1, 1))
        saved, found = (
            groups[0].get("weight_decay", 0)
            for groups in (
                checkpoint["optimizer_states"][0]["param_groups"],
                optimizer.param_groups,
            )
        )
        if saved != found:
            raise InputError(
                f"optimizer.weight_decay: expected {saved}, as in the checkpoint to continue from, "
                f"found {found}"
            )
        scheduler = self.scheduler(optimizer)
        for _ in range(checkpoint["lr_schedulers"][0]["last_epoch"]):
            optimizer.step()  # changes nothing, but torch warns of a schedule without it
            scheduler.step()
        checkpoint["lr_schedulers"] = [scheduler.state_dict()]
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group["lr"] = optimizer.param_groups[0]["lr"]


def probabilities(logits: Float[Tensor, "b r *xyz"]) -> Float[Tensor, "b r *xyz"]:
    """Compute probabilities in float32: in bfloat16 all logits from 6.25 on would be equal."""
    return logits.float().sigmoid()
