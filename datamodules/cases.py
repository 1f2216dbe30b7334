"""What every data set consists of: its cases, and what their labels mean."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

import grids
from datamodules.nifti import read_volume
from errors import InputError


@dataclass(frozen=True)
class Case:
    """One examination of one patient.

    Attributes:
        name: Unique within its data set; names every file made from the case.
        images: One file per modality, in the order of the network's input channels.
        mask: File of the label map; None where there is none (cases to predict).
        grade: Stratum for splits, such as "HGG" or "LGG"; empty where unknown.
    """

    name: str
    images: Mapping[str, Path]
    mask: Path | None
    grade: str = ""


class DataSet(Protocol):
    """Where cases come from, and what their labels mean.

    Attributes:
        modalities: Modalities of every case, in the order of the network's input channels.
        regions: Regions to segment, in the order of the network's output channels.
        file_values: Canonical label -> its value in this data set's files, for label maps that are
            written for its cases.
    """

    modalities: Sequence[str]
    regions: Sequence[str]

    @property
    def file_values(self) -> Mapping[int, int]: ...

    def prepare(self) -> None:
        """Make what is missing on disk; called once, in one process."""
        ...

    def cases(self) -> list[Case]:
        """List all cases, sorted by name."""
        ...

    def canonical_labels(self, labels: np.ndarray, case: Case) -> np.ndarray:
        """Translate the voxels of a mask file (X, Y, Z) to canonical labels, uint8.

        Canonical labels are the same whatever the year or the source of the data set.

        Raises:
            InputError: The mask holds a value that the data set's convention does not have.
        """
        ...

    def to_regions(self, labels: np.ndarray) -> np.ndarray:
        """Turn canonical labels (X, Y, Z) into boolean masks (R, X, Y, Z), one per region."""
        ...

    def to_labels(self, regions: np.ndarray) -> np.ndarray:
        """Turn masks (R, X, Y, Z) into canonical labels (X, Y, Z), uint8.

        Masks that contradict each other are made consistent.
        """
        ...

    def in_folder(self, root: Path) -> "DataSet":
        """Return a data set of the same kind in another folder, to predict new cases."""
        ...


def check_choice(key: str, chosen: Sequence[str], known: Iterable[str]) -> None:
    """Check the value of a configuration key that takes a choice of known names.

    Raises:
        InputError: The choice is empty, has an unknown name, or has a name twice.
    """
    known = list(known)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
        raise InputError(
            f"{key}: expected a choice of {', '.join(known)}, each at most once; "
            f"found {', '.join(chosen) or 'none'}"
        )


class Compared(NamedTuple):
    """A prediction beside the truth, on the grid of the files, in RAS order.

    Attributes:
        prediction: Masks (R, X, Y, Z), bool.
        truth: Masks (R, X, Y, Z), bool.
        spacing_mm: Edges of a voxel along X, Y and Z.
        affine: (4, 4), voxel to mm.
    """

    prediction: np.ndarray
    truth: np.ndarray
    spacing_mm: tuple[float, ...]
    affine: np.ndarray


def compared(labels: np.ndarray, written: Path, case: Case, data_set: DataSet) -> Compared:
    """Read the mask of a case and put it beside a predicted label map.

    Args:
        labels: Predicted canonical labels (X, Y, Z), RAS.
        written: File that the prediction was read from, for error messages.
        case: Case that was predicted.
        data_set: Data set whose labels and regions are meant.

    Raises:
        InputError: The case has no mask, or one that cannot be used or is on another grid.
    """
    if case.mask is None:
        raise InputError(f"{case.name}: expected a mask to compare {written} with, found none")
    truth, affine = read_volume(case.mask)
    if labels.shape != truth.shape:
        raise InputError(
            f"{written}: expected the grid of {case.mask}, found {labels.shape} beside "
            f"{truth.shape} voxels"
        )
    return Compared(
        prediction=data_set.to_regions(labels),
        truth=data_set.to_regions(data_set.canonical_labels(truth, case)),
        spacing_mm=tuple(grids.spacing_mm(affine).tolist()),
        affine=affine,
    )
