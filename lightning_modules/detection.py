"""Finding lesions: sparse targets, lesion-wise scores, a threshold chosen on validation cases."""

from torch import Tensor, nn

from lightning_modules.inference import Inference, repeated
from lightning_modules.losses import SparseCrossEntropy
from lightning_modules.metrics import LesionReport
from lightning_modules.segmentation import (
    MakeMetrics,
    MakeOptimizer,
    MakeScheduler,
    SegmentationModule,
    VolumeBatch,
)


class DetectionModule(SegmentationModule):
    """Fits a network to where lesions are; scores it lesion by lesion (Krivov & Belyaev 2018).

    The threshold is the operating point: after every validation it is set to the one that finds
    most lesions (one to one) with at most `target_fp` false positives a patient, and goes into the
    checkpoint with the weights that it was chosen for. Test scores are those at that threshold.

    Args:
        network: As of `SegmentationModule`; its output may be coarser, by `loss.geometry`.
        loss: Against masks at full resolution.
        optimizer: Makes the optimizer of the parameters.
        scheduler: Makes the schedule of the optimizer; one step an epoch.
        inference: Logits of whole volumes, on the network's own grid.
        metrics: Makes the scores of a stage: `LesionMetrics`.
        target_fp: False positives a patient at the operating point, on the validation cases.
        channels_last: Memory layout of network and images.
    """

    loss: SparseCrossEntropy

    def __init__(
        self,
        network: nn.Module,
        loss: SparseCrossEntropy,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler,
        inference: Inference,
        metrics: MakeMetrics,
        target_fp: float = 1.0,
        channels_last: bool = True,
    ) -> None:
        super().__init__(
            network, loss, optimizer, scheduler, inference, metrics, channels_last=channels_last
        )
        self.target_fp = target_fp

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities (B, R, X, Y, Z) of whole volumes (B, C, X, Y, Z)."""
        return self.at_full_resolution(self.logits(image).sigmoid(), image)

    def at_full_resolution(self, coarse: Tensor, image: Tensor) -> Tensor:
        return repeated(coarse, self.loss.geometry.stride, image.shape[2:])

    def score(self, batch: VolumeBatch, stage: str) -> Tensor:
        """Score whole volumes; returns the predicted masks (B, R, X, Y, Z), for callbacks."""
        logits = self.logits(batch["image"])
        loss = self.loss.on_volume(logits, batch["mask"])["loss"]
        self.log(f"{stage}/loss", loss, batch_size=len(batch["image"]), sync_dist=True)
        probability = logits.sigmoid()
        self.metrics[stage].update(probability, batch["mask"], batch["index"])
        return self.at_full_resolution(probability > self.threshold, batch["image"])

    def log_metrics(self, stage: str) -> None:
        report: LesionReport = self.metrics[stage].compute()
        self.metrics[stage].reset()
        if stage == "val":
            self.threshold.fill_(report.choose(self.target_fp))
        scores = {**report.at(float(self.threshold)), "threshold": float(self.threshold)}
        # Lightning's checkpoints and sweeps cannot rank what is undefined: without lesions or
        # without detections there is no such score.
        known = {name: value for name, value in scores.items() if value == value}
        self.log_dict({f"{stage}/{name}": value for name, value in known.items()})

    def case_rows(self, stage: str) -> dict[int, dict[str, float]]:
        """Lesions of every case so far and what was found of them, by its index."""
        return self.metrics[stage].compute().rows(float(self.threshold))
