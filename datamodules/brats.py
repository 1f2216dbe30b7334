"""Folders of the BraTS challenge, of every year: file names, grades, labels and regions."""

import csv
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from datamodules.cases import Case, check_choice, usable
from datamodules.nifti import read_volume
from errors import InputError

# Modality -> endings of its file names: until 2021, and since 2023.
ENDINGS = {
    "t1": ("_t1", "-t1n"),
    "t1ce": ("_t1ce", "-t1c"),
    "t2": ("_t2", "-t2w"),
    "flair": ("_flair", "-t2f"),
}
# "_Segm" is there for BraTS20_Training_355, whose mask was released as W39_1998.09.19_Segm.nii.
MASK_ENDINGS = ("_seg", "-seg", "_Segm")
EXPECTED = "expected CASE_t1.nii.gz, CASE_t1ce.nii.gz, ... or CASE-t1n.nii.gz, CASE-t1c.nii.gz, ..."

# Region -> its canonical labels, from the outermost region to the innermost. The first label of
# each region belongs to no region inside it, so `to_labels` paints these labels in this order.
REGIONS = {"WT": (2, 1, 4), "TC": (1, 4), "ET": (4,)}
LABELS = (0, 1, 2, 4)  # background, necrotic and non-enhancing core, oedema, enhancing tumour

_KIND = {ending: modality for modality, endings in ENDINGS.items() for ending in endings}
_KIND |= dict.fromkeys(MASK_ENDINGS, "mask")
_FILE = re.compile(rf"(?P<case>[^.].*)(?P<ending>{'|'.join(_KIND)})\.nii(\.gz)?")


class BraTS:
    """A folder in the layout of any BraTS challenge since 2017, with or without masks.

    Files are found at any depth. The name of a case is the part of its file names before the
    modality, so a folder may hold one case or many. The grade comes from a folder HGG or LGG above
    the file, or from the column `Grade` of a `name_mapping*.csv`, if there is either.

    In the files ET is label 4 (2017-2020) or label 3 (since 2021). All cases of a data set share
    one convention; it is taken from the first mask, in the order of names, that has a 3 or a 4.
    Label maps that are predicted for the data set follow it too.

    Args:
        root: Folder of the data set.
        modalities: Choice of t1, t1ce, t2 and flair, in the order of the network's input channels.
        regions: Choice of WT, TC and ET, in the order of the network's output channels.
        et_label: Label of ET in the files, 3 or 4, of a data set in which no mask shows it.
        incomplete: Whether a case may lack modalities, all but one, as one to predict may.

    Raises:
        InputError: A modality or region is unknown or given twice; another label of ET.
    """

    def __init__(
        self,
        root: str | Path,
        modalities: Sequence[str] = ("t1", "t1ce", "t2", "flair"),
        regions: Sequence[str] = ("WT", "TC", "ET"),
        et_label: int = 4,
        incomplete: bool = False,
    ) -> None:
        if et_label not in (3, 4):
            raise InputError(f"et_label: expected 3 or 4, found {et_label}")
        self.et_label = et_label
        self.incomplete = incomplete
        self.root = Path(root)
        self.modalities: Sequence[str] = tuple(modalities)
        self.regions: Sequence[str] = tuple(regions)
        check_choice("modalities", self.modalities, ENDINGS)
        check_choice("regions", self.regions, REGIONS)

    def prepare(self) -> None:
        """Do nothing: the files are the user's."""

    def cases(self) -> list[Case]:
        """List all cases, sorted by name.

        Raises:
            InputError: The folder is missing or has no case, a case lacks a modality or has one
                twice, or two folders have a case of the same name.
        """
        return usable(self.survey())

    def survey(self) -> tuple[list[Case], list[InputError]]:
        """List the cases that have all their files, sorted by name, and what is wrong with others.

        Raises:
            InputError: The folder is missing or has no case.
        """
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder; {EXPECTED}")
        grades: dict[str, str] = {}
        errors: list[InputError] = []
        files_of: dict[tuple[Path, str], list[tuple[str, Path]]] = defaultdict(list)
        # os.walk follows links, which rglob does not: data sets are often folders of links.
        for folder, subfolders, names in os.walk(self.root, followlinks=True):
            # Hidden folders are cases that are being written, or that a killed process left.
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for name in sorted(names):
                if match := _FILE.fullmatch(name):
                    found = (_KIND[match["ending"]], Path(folder, name))
                    files_of[Path(folder), match["case"]].append(found)
                elif re.fullmatch(r"name_mapping.*\.csv", name):
                    grades |= _read_grades(Path(folder, name))
        _adopt_misnamed_masks(files_of)

        cases: dict[str, Case] = {}
        for (folder, name), files in sorted(files_of.items()):
            try:
                if name in cases:
                    other = next(iter(cases[name].images.values())).parent
                    raise InputError(
                        f"{folder}: case {name} is also in {other}; names must be unique"
                    )
                cases[name] = self._case(folder, name, files, grades.get(name, ""))
            except InputError as error:
                errors.append(error)
        if not files_of:
            raise InputError(f"{self.root}: no case found; {EXPECTED}")
        return [cases[name] for name in sorted(cases)], errors

    def _case(self, folder: Path, name: str, files: list[tuple[str, Path]], grade: str) -> Case:
        paths: dict[str, Path] = {}
        for kind, path in files:
            if kind in paths:
                raise InputError(
                    f"{folder}: case {name} has its {kind} twice: {paths[kind].name}, {path.name}"
                )
            paths[kind] = path
        present = [modality for modality in self.modalities if modality in paths]
        for modality in self.modalities:
            if modality not in paths and not (self.incomplete and present):
                patterns = " or ".join(f"{name}{end}.nii[.gz]" for end in ENDINGS[modality])
                raise InputError(f"{folder}: case {name} has no {modality}; looked for {patterns}")
        return Case(
            name=name,
            images={modality: paths[modality] for modality in present},
            mask=paths.get("mask"),
            grade=self._grade_of_folder(folder) or grade,
        )

    def _grade_of_folder(self, folder: Path) -> str:
        """Return HGG or LGG if a folder of the data set lies in a folder of this name, else ""."""
        folders = set(folder.relative_to(self.root).parts)
        return next((grade for grade in ("HGG", "LGG") if grade in folders), "")

    @cached_property
    def _et_in_files(self) -> tuple[int, str]:
        """Find the label that ET has in the files, and the reason for it, to show in messages."""
        for case in self.survey()[0]:
            # A mask that cannot be read is named when its own case is used, and not before: the
            # other cases do not depend on it.
            with suppress(InputError):
                if case.mask is None:
                    continue
                labels, _ = read_volume(case.mask)
                for value in (4, 3):
                    if _equal(labels, value).any():
                        return value, f"ET is {value} as in {case.mask}"
        reason = f"ET is taken to be {self.et_label}, as no mask in {self.root} has a 3 or a 4"
        return self.et_label, reason

    @property
    def file_values(self) -> dict[int, int]:
        """Canonical label -> its value in the files of this data set."""
        et, _ = self._et_in_files
        return dict(zip(LABELS, (0, 1, 2, et), strict=True))

    def canonical_labels(self, labels: np.ndarray, case: Case) -> np.ndarray:
        """Translate the voxels of a mask file (X, Y, Z) to the labels 0, 1, 2 and 4 (ET), uint8.

        Raises:
            InputError: The mask holds a value that the data set's convention does not have.
        """
        _, reason = self._et_in_files
        in_files = self.file_values
        labelled = labels != 0
        found = labels[labelled]
        canonical = np.zeros(found.shape, np.uint8)
        unknown = np.ones(found.shape, bool)
        for label, value in in_files.items():
            is_value = _equal(found, value)
            canonical[is_value] = label
            unknown &= ~is_value
        if unknown.any():
            raise InputError(
                f"{case.mask}: found label {found[unknown].min():g}, expected only "
                f"{', '.join(map(str, in_files.values()))} ({reason})"
            )
        label_map = np.zeros(labels.shape, np.uint8)
        label_map[labelled] = canonical
        return label_map

    def to_regions(self, labels: np.ndarray) -> np.ndarray:
        """Turn canonical labels (X, Y, Z) into boolean masks (R, X, Y, Z), one per region."""
        return np.stack([np.isin(labels, REGIONS[region]) for region in self.regions])

    def to_labels(self, regions: np.ndarray) -> np.ndarray:
        """Turn boolean masks (R, X, Y, Z) into canonical labels (X, Y, Z), uint8.

        A region counts only inside the regions around it: TC inside WT, ET inside TC. If inner
        regions are not among the regions of this data set, all of WT is label 2 and all of TC is
        label 1.
        """
        labels = np.zeros(regions.shape[1:], np.uint8)
        inside = np.ones(regions.shape[1:], bool)
        for region, (label, *_) in REGIONS.items():
            if region in self.regions:
                inside &= regions[self.regions.index(region)].astype(bool)
                labels[inside] = label
        return labels

    def in_folder(self, root: str | Path) -> "BraTS":
        """Return a BraTS data set with the same options in another folder.

        The label of ET is that of the masks there; without any it is `et_label` of this one. A case
        there may lack modalities, as long as it has one.
        """
        return BraTS(root, self.modalities, self.regions, self.et_label, incomplete=True)


class BraTSMasks(BraTS):
    """A folder of label maps: predictions, or masks whose scans may be missing.

    Files are `CASE.nii.gz` or masks in a BraTS layout, at any depth. ET is label 3 or 4, and grades
    are found, as in `BraTS`. A case has the scans that are found.

    Args:
        root: Folder of the label maps.
        regions: Choice of WT, TC and ET.
    """

    def __init__(self, root: str | Path, regions: Sequence[str] = ("WT", "TC", "ET")) -> None:
        super().__init__(root, regions=regions)

    def survey(self) -> tuple[list[Case], list[InputError]]:
        """List all cases that have a label map, sorted by name; the first error is raised.

        Raises:
            InputError: The folder is missing or has no label map, or a case has two.
        """
        expected = "expected CASE.nii.gz or CASE_seg.nii.gz"
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder; {expected}")
        grades: dict[str, str] = {}
        for path in sorted(self.root.rglob("name_mapping*.csv")):
            grades |= _read_grades(path)
        masks: dict[str, Path] = {}
        images: dict[str, dict[str, Path]] = defaultdict(dict)
        for path in sorted(self.root.rglob("[!.]*.nii*")):
            match = _FILE.fullmatch(path.name)
            name = match["case"] if match else path.name.split(".nii")[0]
            kind = _KIND[match["ending"]] if match else "mask"
            if name.endswith("_probabilities"):
                continue
            if kind != "mask":
                images[name][kind] = path
            elif name in masks:
                raise InputError(f"{path}: case {name} is also in {masks[name]}")
            else:
                masks[name] = path
        if not masks:
            raise InputError(f"{self.root}: no label map found; {expected}")
        return [
            Case(
                name, images[name], path, self._grade_of_folder(path.parent) or grades.get(name, "")
            )
            for name, path in sorted(masks.items())
        ], []


def _equal(labels: np.ndarray, value: int) -> np.ndarray:
    """Compare labels with a value, up to the rounding error that scaling in a header leaves."""
    return np.abs(labels - float(value)) < 1e-4


def _read_grades(path: Path) -> dict[str, str]:
    """Read case name -> grade; each column of names is one year that a case was part of.

    Raises:
        InputError: The file cannot be read, or is no CSV file in UTF-8.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return {
                name: row["Grade"]
                for row in csv.DictReader(file)
                for column, name in row.items()
                if row.get("Grade") and re.fullmatch(r"BraTS_\d{4}_subject_ID", column or "")
            }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: expected a CSV file in UTF-8, found: {error}") from error


def _adopt_misnamed_masks(files_of: dict[tuple[Path, str], list[tuple[str, Path]]]) -> None:
    """Give a mask that is named after no case to the one case in its folder, if it lacks one."""
    names_in: dict[Path, list[str]] = defaultdict(list)
    for folder, name in files_of:
        names_in[folder].append(name)
    for folder, names in names_in.items():
        kinds = {name: [kind for kind, _ in files_of[folder, name]] for name in names}
        masks_alone = [name for name in names if kinds[name] == ["mask"]]
        others = [name for name in names if name not in masks_alone]
        if len(masks_alone) == len(others) == 1 and "mask" not in kinds[others[0]]:
            files_of[folder, others[0]] += files_of.pop((folder, masks_alone[0]))
