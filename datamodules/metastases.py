"""Brain metastases: one folder per case, one mask of lesions."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules.cases import Case, check_choice
from errors import InputError

MODALITIES = ("t1ce", "t1", "t2", "flair")
_FILE = re.compile(r"(?:[^.].*[_-])?(?P<kind>t1ce|t1|t2|flair|seg)\.nii(\.gz)?")


class Metastases:
    """A folder with a folder per case: `CASE/t1ce.nii.gz`, `CASE/seg.nii.gz`.

    The case's name may stand before the modality (`CASE/CASE_t1ce.nii.gz`), and the files may be
    `.nii`. Any whole number above 0 in a mask is lesion, so that masks which number the lesions do
    too; a case without lesions has a mask of zeros, a case to predict has none.

    Args:
        root: The folder.
        modalities: Which of t1ce, t1, t2, flair, in the order of the network's channels.

    Raises:
        InputError: A modality that there is not, or one given twice.
    """

    regions: Sequence[str] = ("lesion",)

    def __init__(self, root: str | Path, modalities: Sequence[str] = ("t1ce",)) -> None:
        self.root = Path(root)
        self.modalities: Sequence[str] = tuple(modalities)
        check_choice("modalities", self.modalities, MODALITIES)

    def prepare(self) -> None:
        """Nothing is missing: the files are the user's."""

    def cases(self) -> list[Case]:
        """All cases, sorted by name.

        Raises:
            InputError: No folder, no case, or a modality that is missing or there twice.
        """
        expected = f"expected CASE/{self.modalities[0]}.nii.gz and CASE/seg.nii.gz"
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder; {expected}")
        cases = []
        for folder in sorted(self.root.iterdir()):
            files: dict[str, Path] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if match := _FILE.fullmatch(path.name):
                    if (kind := match["kind"]) in files:
                        raise InputError(
                            f"{folder}: its {kind} is there twice: {files[kind].name}, {path.name}"
                        )
                    files[kind] = path
            if files:
                cases.append(self._case(folder, files))
        if not cases:
            raise InputError(f"{self.root}: no case found; {expected}")
        return cases

    def _case(self, folder: Path, files: dict[str, Path]) -> Case:
        for modality in self.modalities:
            if modality not in files:
                raise InputError(
                    f"{folder}: expected {modality}.nii.gz, found {', '.join(sorted(files))}"
                )
        images = {modality: files[modality] for modality in self.modalities}
        return Case(folder.name, images, files.get("seg"))

    def canonical_labels(self, labels: np.ndarray, case: Case) -> np.ndarray:
        """1 where a mask file (X, Y, Z) is a positive whole number, uint8.

        Raises:
            InputError: A label that is negative or no whole number.
        """
        nearest = np.round(labels)
        wrong = (nearest < 0) | (np.abs(labels - nearest) > 1e-4)
        if wrong.any():
            raise InputError(
                f"{case.mask}: expected whole numbers from 0 on, found label {labels[wrong][0]:g}"
            )
        return (nearest > 0).astype(np.uint8)

    def to_regions(self, labels: np.ndarray) -> np.ndarray:
        """Canonical labels (X, Y, Z) as the one mask (1, X, Y, Z)."""
        return (labels > 0)[None]

    def to_labels(self, regions: np.ndarray) -> np.ndarray:
        """The mask (1, X, Y, Z) as labels (X, Y, Z), uint8."""
        return regions[0].astype(np.uint8)

    def at(self, root: str | Path) -> "Metastases":
        """Cases with the same modalities in another folder."""
        return Metastases(root, self.modalities)
