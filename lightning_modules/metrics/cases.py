"""What all metrics of a stage have in common: `update`, `compute`, `rows`, and a threshold."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric


class CaseMetrics(Metric):
    """Scores predicted probabilities against the truth, case by case, at a threshold.

    Cases are told apart by their index in the data set, so that a case that two ranks have both
    seen counts once. A subclass keeps its state in one dimension: torchmetrics can only then gather
    it from a rank that has no case.

    Args:
        threshold: Probability above which a voxel is predicted. It is stored in checkpoints, beside
            the weights that it was chosen for.

    Attributes:
        best_is_highest: Scores whose best value, and not the last, belongs in the summary of a run.
    """

    full_state_update = False
    best_is_highest: Sequence[str] = ()
    records: list[Tensor]

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(threshold))
        self.add_state("records", default=[], dist_reduce_fx="cat")

    def update(self, probability: Float[Tensor, "b r x y z"], batch: Mapping[str, Any]) -> None:
        """Add the cases of a `VolumeBatch`."""
        raise NotImplementedError

    def compute(self) -> dict[str, float | Tensor]:
        """Scores over all cases, by name; those that are not defined are left out."""
        raise NotImplementedError

    def rows(self) -> dict[int, dict[str, float]]:
        """Scores of every case, by its index in the data set, in order."""
        raise NotImplementedError

    def flat_records(self) -> Tensor:
        """All records so far in one dimension, those of other ranks included while synchronised."""
        # torchmetrics has made one tensor of the list once it has gathered it from all ranks.
        return torch.cat(self.records) if isinstance(self.records, list) else self.records

    @contextmanager
    def over_all_ranks(self) -> Iterator[None]:
        """Within the block, the records are those of all ranks, as they are within `compute`."""
        with self.sync_context(should_sync=not self._is_synced, should_unsync=not self._is_synced):
            yield
