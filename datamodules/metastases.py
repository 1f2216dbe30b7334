"""Brain metastases: a folder with a folder per case, each with one mask of its lesions."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules.cases import Case, check_choice, usable
from errors import InputError

MODALITIES = ("t1ce", "t1", "t2", "flair")
REGIONS = ("lesion",)
_FILE = re.compile(r"(?:[^.].*[_-])?(?P<kind>t1ce|t1|t2|flair|seg)\.nii(\.gz)?")


class Metastases:
    """A folder with a folder per case: `CASE/t1ce.nii.gz`, `CASE/seg.nii.gz`.

    The name of the case may precede the modality (`CASE/CASE_t1ce.nii.gz`), and the files may be
    `.nii`. Every whole number above 0 in a mask is lesion, so masks that number their lesions can
    be used. A case without lesions has a mask of zeros; a case to predict has no mask.

    Args:
        root: Folder of the data set.
        modalities: Choice of t1ce, t1, t2 and flair, in the order of the network's input channels.
        regions: Regions to segment; "lesion" is the only one.

    Raises:
        InputError: A modality or region is unknown or given twice.
    """

    def __init__(
        self,
        root: str | Path,
        modalities: Sequence[str] = ("t1ce",),
        regions: Sequence[str] = REGIONS,
    ) -> None:
        self.root = Path(root)
        self.modalities: Sequence[str] = tuple(modalities)
        self.regions: Sequence[str] = tuple(regions)
        check_choice("modalities", self.modalities, MODALITIES)
        check_choice("regions", self.regions, REGIONS)

    def prepare(self) -> None:
        """Do nothing: the files are the user's."""

    def cases(self) -> list[Case]:
        """List all cases, sorted by name.

        Raises:
            InputError: The folder is missing or has no case, or a case lacks a modality or has one
                twice.
        """
        return usable(self.survey())

    def survey(self) -> tuple[list[Case], list[InputError]]:
        """List the cases that have all their files, sorted by name, and what is wrong with others.

        Raises:
            InputError: The folder is missing or has no case.
        """
        expected = f"expected CASE/{self.modalities[0]}.nii.gz and CASE/seg.nii.gz"
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder; {expected}")
        cases: list[Case] = []
        errors: list[InputError] = []
        # Hidden folders are cases that are being written, or that a killed process left.
        for folder in sorted(self.root.glob("[!.]*")):
            paths = sorted(folder.iterdir()) if folder.is_dir() else ()
            if any(_FILE.fullmatch(path.name) for path in paths):
                try:
                    cases.append(self._case(folder, paths))
                except InputError as error:
                    errors.append(error)
        if not cases and not errors:
            raise InputError(f"{self.root}: no case found; {expected}")
        return cases, errors

    def _case(self, folder: Path, paths: Sequence[Path]) -> Case:
        files: dict[str, Path] = {}
        for path in paths:
            if match := _FILE.fullmatch(path.name):
                if (kind := match["kind"]) in files:
                    raise InputError(
                        f"{folder}: its {kind} is there twice: {files[kind].name}, {path.name}"
                    )
                files[kind] = path
        for modality in self.modalities:
            if modality not in files:
                raise InputError(
                    f"{folder}: expected {modality}.nii.gz, found {', '.join(sorted(files))}"
                )
        images = {modality: files[modality] for modality in self.modalities}
        return Case(folder.name, images, files.get("seg"))

    def canonical_labels(self, labels: np.ndarray, case: Case) -> np.ndarray:
        """Set every positive whole number of a mask file (X, Y, Z) to 1, uint8.

        Raises:
            InputError: A value is negative or no whole number.
        """
        nearest = np.round(labels)
        wrong = (nearest < 0) | (np.abs(labels - nearest) > 1e-4)
        if wrong.any():
            raise InputError(
                f"{case.mask}: expected whole numbers from 0 on, found label {labels[wrong][0]:g}"
            )
        return (nearest > 0).astype(np.uint8)

    @property
    def file_values(self) -> dict[int, int]:
        """Canonical label -> its value in the files: lesions are not numbered."""
        return {0: 0, 1: 1}

    def to_regions(self, labels: np.ndarray) -> np.ndarray:
        """Turn canonical labels (X, Y, Z) into the one mask (1, X, Y, Z), bool."""
        return (labels > 0)[None]

    def to_labels(self, regions: np.ndarray) -> np.ndarray:
        """Turn the mask (1, X, Y, Z) into canonical labels (X, Y, Z), uint8."""
        return regions[0].astype(np.uint8)

    def in_folder(self, root: str | Path) -> "Metastases":
        """Return a data set with the same modalities and regions in another folder."""
        return Metastases(root, self.modalities, self.regions)
