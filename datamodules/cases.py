"""What every data set consists of: its cases, and what their labels mean."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

import grids
from datamodules.nifti import check_same_grid, read_volume
from errors import InputError


@dataclass(frozen=True)
class Case:
    """One examination of one patient.

    Attributes:
        name: Unique within its data set; names every file made from the case.
        images: One file per modality, in the order of the network's input channels; a case to
            predict may lack some.
        mask: File of the label map; None where there is none (cases to predict).
        grade: Stratum for splits, such as "HGG" or "LGG"; empty where unknown.
    """

    name: str
    images: Mapping[str, Path]
    mask: Path | None
    grade: str = ""

    @property
    def reference(self) -> Path:
        """The first image: its grid is that of predictions, and its header names the patient."""
        return next(iter(self.images.values()))


class DataSet(Protocol):
    """Where cases come from, and what their labels mean.

    Attributes:
        root: Folder of the data set.
        modalities: Modalities of every case, in the order of the network's input channels.
        regions: Regions to segment, in the order of the network's output channels.
        file_values: Canonical label -> its value in this data set's files, for label maps that are
            written for its cases.
    """

    root: Path
    modalities: Sequence[str]
    regions: Sequence[str]

    @property
    def file_values(self) -> Mapping[int, int]: ...

    def prepare(self) -> None:
        """Make what is missing on disk; called once, in one process."""
        ...

    def cases(self) -> list[Case]:
        """List all cases, sorted by name.

        Raises:
            InputError: The first error of `survey`.
        """
        ...

    def survey(self) -> tuple[list[Case], list[InputError]]:
        """List the cases that have all their files, sorted by name, and what is wrong with others.

        Raises:
            InputError: The folder is missing or has no case.
        """
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


def usable(surveyed: tuple[list[Case], list[InputError]]) -> list[Case]:
    """Return the cases of `DataSet.survey` if all of them can be used.

    Raises:
        InputError: The first error of the survey.
    """
    cases, errors = surveyed
    if errors:
        raise errors[0]
    return cases


def compared(written: Path, case: Case, predictions: DataSet, data_set: DataSet) -> Compared:
    """Read a predicted label map and the mask of its case.

    Args:
        written: File of the label map.
        case: Case that was predicted.
        predictions: Data set whose values the label map has.
        data_set: Data set whose values the mask has, and whose regions are meant.

    Raises:
        InputError: The case has no mask; the label map or the mask cannot be used; they do not lie
            on one grid.
    """
    if case.mask is None:
        raise InputError(f"{case.name}: expected a mask to compare {written} with, found none")
    (predicted, written_affine), (truth, affine) = read_volume(written), read_volume(case.mask)
    check_same_grid([case.mask, written], [truth.shape, predicted.shape], [affine, written_affine])
    labels = predictions.canonical_labels(predicted, replace(case, mask=written))
    return Compared(
        prediction=data_set.to_regions(labels),
        truth=data_set.to_regions(data_set.canonical_labels(truth, case)),
        spacing_mm=tuple(grids.spacing_mm(affine).tolist()),
        affine=affine,
    )
