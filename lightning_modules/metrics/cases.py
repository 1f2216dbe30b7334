"""What all metrics have in common: they keep a record of every case, on whichever rank it is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class CaseRecords(Metric):
    """Keeps a record of every case.

    Cases are told apart by their index in the data set, so that a case counts once even if two
    ranks have seen it. A subclass appends one-dimensional tensors to `records`: torchmetrics cannot
    gather others from a rank that has seen no case.

    Attributes:
        records: What has been counted so far, in the subclass's own layout.
    """

    full_state_update = False
    records: list[Tensor]

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)  # the threshold may change between two calls
        self.add_state("records", default=[], dist_reduce_fx="cat")

    def flat_records(self) -> Float[Tensor, " n"]:
        """Join all records; within `over_all_ranks` they include those of the other ranks."""
        # After gathering them from all ranks, torchmetrics keeps one tensor instead of a list.
        return torch.cat(self.records) if isinstance(self.records, list) else self.records

    @contextmanager
    def over_all_ranks(self) -> Iterator[None]:
        """Gather the records of all ranks for the length of a `with` block, as `compute` does."""
        with self.sync_context(should_sync=not self._is_synced, should_unsync=not self._is_synced):
            yield


class MeanOverCases(CaseRecords):
    """Averages a number over the cases, each of which counts once."""

    def update(self, value: Float[Tensor, ""], index: Int[Tensor, " b"]) -> None:
        """Add the number of each case of a batch.

        Args:
            value: The number, which the cases of a batch share.
            index: Position of each case in the data set.
        """
        for place in index:
            self.records.append(torch.stack([place.float(), value.float()]))

    def compute(self) -> Tensor:
        """Return the mean."""
        with self.over_all_ranks():
            places, values = self.flat_records().view(-1, 2).T
        by_case = dict(zip(places.tolist(), values, strict=True))
        return torch.stack(list(by_case.values())).mean()


class CaseMetrics(CaseRecords):
    """Scores predicted probabilities against the truth, case by case, at a threshold.

    Args:
        threshold: Probability above which a voxel is predicted. It is stored in checkpoints, beside
            the weights that it was chosen for.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(threshold))

    def update(self, probability: Float[Tensor, "b r x y z"], batch: Mapping[str, Any]) -> None:
        """Add the cases of a batch.

        Args:
            probability: Predictions at full resolution.
            batch: A `VolumeBatch`, with `mask`, `outside` and `index`.
        """
        raise NotImplementedError

    def compute(self) -> dict[str, float | Tensor]:
        """Return the scores over all cases, by name, without those that are not defined."""
        raise NotImplementedError

    def rows(self) -> dict[int, dict[str, float]]:
        """Return the scores of every case by name, by the case's index in rising order."""
        raise NotImplementedError
