"""Where networks look for tumours: everywhere, or where a detector fires.

Krivov & Belyaev 2018 end with the wish for a segmentation "that will activate only on suspicious
regions, found by the D-Net"; Shirokikh et al. 2021 built one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import ndimage

from datamodules.cases import Case, DataSet
from datamodules.preprocessing import Volume, to_grid
from errors import InputError
from experiments.trained import Trained, find_checkpoints

ALL_LABELS = np.arange(256)


class Where(Protocol):
    """Chooses the voxels that networks are run for: the candidates."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the candidates of a case hang on beside its images, as JSON."""
        ...

    def in_folder(self, folder: Path) -> "Where":
        """Return the same for the cases in another folder."""
        ...

    def check(self, cases: Sequence[Case]) -> None:
        """Check that the folder has what is needed to find the candidates of cases.

        Raises:
            InputError: A case lacks a file.
        """
        ...

    def images(self, case: Case) -> Sequence[Path]:
        """List the images of a case that its candidates hang on."""
        ...

    def candidates(self, case: Case, volume: Volume) -> np.ndarray:
        """Find the candidates of a case.

        Args:
            case: The case.
            volume: What the networks see of it that are run for the candidates.

        Returns:
            (X, Y, Z) bool, on the grid of the volume.

        Raises:
            InputError: A file cannot be used.
        """
        ...


class Everywhere:
    """Makes every voxel a candidate."""

    settings: Mapping[str, Any] = {}

    def in_folder(self, folder: Path) -> "Everywhere":
        return self

    def check(self, cases: Sequence[Case]) -> None:
        pass

    def images(self, case: Case) -> Sequence[Path]:
        return ()

    def candidates(self, case: Case, volume: Volume) -> np.ndarray:
        return np.ones(volume.labels.shape, bool)


@dataclass(frozen=True)
class WhereItFires:
    """Makes the voxels candidates at which a detector fires, and those around them.

    Attributes:
        detector: Networks whose modalities, spacing and regions may be others than those of the
            networks that are run for the candidates.
        threshold: Probability of any region above which the detector fires.
        margin_mm: Candidates reach so far beyond the voxels that fire, along each axis.
        shares_volume: Whether the detector sees the same volume of a case as those networks.
    """

    detector: Trained
    threshold: float
    margin_mm: float
    shares_volume: bool

    @classmethod
    def from_options(cls, options: Mapping[str, Any], trained: Trained) -> "WhereItFires":
        """Load the detector of conf/predict.yaml.

        Args:
            options: The values of conf/predict.yaml.
            trained: The networks that are run for the candidates.

        Raises:
            InputError: A checkpoint that cannot be used, or a detector for other tumours.
        """
        detector = Trained.load(
            find_checkpoints(options["detector"]),
            flips=False,  # it is there to save time
            precision=str(options["precision"]),
            device=options["device"],
        )
        check_together(detector.data_set, trained.data_set)
        threshold = options["detector_threshold"]
        return cls(
            detector=detector.in_folder(trained.data_set.root),
            threshold=detector.threshold if threshold == "checkpoint" else float(threshold),
            margin_mm=float(options["detector_margin_mm"]),
            shares_volume=detector.sees() == trained.sees(),
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "detector": self.detector.checkpoints,
            "detector_threshold": self.threshold,
            "detector_margin_mm": self.margin_mm,
        }

    def in_folder(self, folder: Path) -> "WhereItFires":
        return replace(self, detector=self.detector.in_folder(folder))

    @cached_property
    def _cases(self) -> dict[str, Case]:
        """The cases of the folder by name, with the detector's images, without masks."""
        return {case.name: replace(case, mask=None) for case in self.detector.data_set.cases()}

    def check(self, cases: Sequence[Case]) -> None:
        for case in cases:
            self.images(case)

    def images(self, case: Case) -> Sequence[Path]:
        return list(self._cases[case.name].images.values())

    def candidates(self, case: Case, volume: Volume) -> np.ndarray:
        seen = volume if self.shares_volume else self.detector.volume(self._cases[case.name])
        probabilities = self.detector.probabilities(seen, np.ones(seen.labels.shape, bool))
        fires = np.logical_or.reduce(probabilities > self.threshold)
        return self.around(fires, seen, volume)

    def around(self, fires: np.ndarray, seen: Volume, volume: Volume) -> np.ndarray:
        """Grow a mask by the margin, and bring it to another grid.

        Args:
            fires: (X, Y, Z) bool, where the detector fires.
            seen: What the detector sees, on the same grid.
            volume: A volume on the grid that is wanted.

        Returns:
            Candidates (X', Y', Z') bool.
        """
        reach = math.ceil(self.margin_mm / self.detector.preprocessing.spacing_mm)
        grown = ndimage.maximum_filter(np.pad(fires, reach), 2 * reach + 1, mode="constant")
        corner = np.eye(4)
        corner[:3, 3] = -reach
        grid = (volume.labels.shape, volume.affine)
        return to_grid(grown[None].astype(np.float32), seen.affine @ corner, grid)[0] >= 0.5


def where_of(options: Mapping[str, Any], trained: Trained) -> Where:
    """Build what the values of conf/predict.yaml describe, for networks.

    Raises:
        InputError: See `WhereItFires.from_options`.
    """
    if options["detector"] is None:
        return Everywhere()
    return WhereItFires.from_options(options, trained)


def check_together(detector: DataSet, segmented: DataSet) -> None:
    """Check that a detector and a segmentation are of the same tumours.

    Args:
        detector: Data set that the detector was trained on.
        segmented: Data set of the networks that are run where it fires.

    Raises:
        InputError: They are for data sets of different kinds, or a region of the networks reaches
            beyond the detector's.
    """
    kinds = [type(data.in_folder(data.root)).__name__ for data in (segmented, detector)]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"detector: expected one for {kinds[0]}, as checkpoint is, found one for {kinds[1]}"
        )
    wanted, found = (
        set(ALL_LABELS[data.to_regions(ALL_LABELS).any(axis=0)]) for data in (segmented, detector)
    )
    if not wanted <= found:
        raise InputError(
            f"detector: expected one that finds all of {', '.join(segmented.regions)}, as "
            f"checkpoint predicts them, found one of {', '.join(detector.regions)}"
        )
