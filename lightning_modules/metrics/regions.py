"""Overlap of regions, case by case."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def dice(prediction: Tensor, truth: Tensor, outside: Tensor) -> Tensor:
    """Dice of each region of each case; 1 where truth and prediction are empty (`brats2020`).

    Args:
        prediction: (B, R, X, Y, Z), bool.
        truth: (B, R, X, Y, Z), bool.
        outside: (B, R), true voxels that lie outside the volume; they count as missed.

    Returns:
        (B, R), float64.
    """
    sums = (2, 3, 4)
    overlap = (prediction & truth).sum(sums).double()
    total = prediction.sum(sums) + truth.sum(sums) + outside
    return torch.where(total == 0, 1.0, 2 * overlap / total.clamp(min=1))


class RegionMetrics(Metric):
    """Dice of every case and region, and its mean over the cases.

    Keeps a row per case. Rows are told apart by the index of the case, so that a case that two
    ranks have both seen counts once.
    """

    full_state_update = False
    index: list[Tensor]
    dice: list[Tensor]

    def __init__(self, regions: Sequence[str]) -> None:
        super().__init__()
        self.names = [f"dice_{region}" for region in regions]
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("dice", default=[], dist_reduce_fx="cat")

    def update(self, prediction: Tensor, truth: Tensor, outside: Tensor, index: Tensor) -> None:
        """Add cases: masks (B, R, X, Y, Z), voxels cut off (B, R), place in the data set (B,)."""
        self.index.append(index)
        # float32 is what every device has; the sums behind it were exact.
        self.dice.append(dice(prediction, truth, outside).float())

    def compute(self) -> dict[str, Tensor]:
        """`dice_<region>` and their mean `dice`, each the mean over the cases."""
        rows = self.rows().values()
        by_region = torch.tensor([list(row.values()) for row in rows]).mean(0)
        return {**dict(zip(self.names, by_region, strict=True)), "dice": by_region.mean()}

    def rows(self) -> dict[int, dict[str, float]]:
        """Scores of each case by name, by its index, in order."""
        index = _concatenated(self.index).tolist()
        by_case = dict(zip(index, _concatenated(self.dice).tolist(), strict=True))
        return {
            number: dict(zip(self.names, by_case[number], strict=True))
            for number in sorted(by_case)
        }


def _concatenated(state: list[Tensor] | Tensor) -> Tensor:
    """A list state is a tensor already once torchmetrics has gathered it from all ranks."""
    return torch.cat(state) if isinstance(state, list) else state
