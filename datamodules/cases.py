"""What every data set consists of: cases, and how they are split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Case:
    """One examination of one patient.

    Attributes:
        name: Unique within its data set; names every file made from it.
        images: One file per modality, in the order of the network's input channels.
        mask: The label map, or None where there is none (cases to predict).
        grade: Stratum for splits such as "HGG" or "LGG"; empty where unknown.
    """

    name: str
    images: Mapping[str, Path]
    mask: Path | None
    grade: str = ""


class DataSet(Protocol):
    """Where cases come from, and what their labels mean."""

    modalities: Sequence[str]
    regions: Sequence[str]

    def prepare(self) -> None:
        """Make what is missing on disk; called once, in one process."""
        ...

    def cases(self) -> list[Case]:
        """All cases, sorted by name."""
        ...

    def canonical_labels(self, labels: np.ndarray, case: Case) -> np.ndarray:
        """Label map of a mask file (X, Y, Z) as uint8 in the project's own convention.

        Raises:
            InputError: A value that the data set's convention does not have.
        """
        ...

    def to_regions(self, labels: np.ndarray) -> np.ndarray:
        """Canonical labels (X, Y, Z) as boolean masks (R, X, Y, Z), one per region."""
        ...

    def to_labels(self, regions: np.ndarray) -> np.ndarray:
        """Boolean masks (R, X, Y, Z) as a uint8 label map (X, Y, Z), regions made consistent."""
        ...

    def at(self, root: Path) -> "DataSet":
        """The same kind of data set in another folder; for predicting new cases."""
        ...
