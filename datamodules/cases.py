"""What every data set consists of: cases, how their files are read, and how they are split."""

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from errors import InputError

if TYPE_CHECKING:
    from nibabel.spatialimages import SpatialImage


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


def check_choice(key: str, chosen: Sequence[str], known: Iterable[str]) -> None:
    """See that a value is a choice of what is known.

    Raises:
        InputError: Nothing chosen, something unknown, or something twice.
    """
    known = list(known)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
        raise InputError(
            f"{key}: expected a choice of {', '.join(known)}, each at most once; "
            f"found {', '.join(chosen) or 'none'}"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file comes out as one InputError that names it."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        yield
    except (
        OSError,
        EOFError,
        zlib.error,
        TypeError,
        ValueError,
        ImageFileError,
        HeaderDataError,
    ) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: expected a readable NIfTI file, found: {reason}") from error


def open_volume(path: Path) -> "SpatialImage":
    """The header of one image or mask; its voxels are not read yet.

    Raises:
        InputError: Not a readable file; not one volume; axes that are not orthogonal.
    """
    import nibabel as nib
    from nibabel.spatialimages import SpatialImage

    with _readable(path):
        image = nib.load(path)
        if not isinstance(image, SpatialImage):
            raise ValueError(type(image).__name__)
        if len(image.shape) < 3 or any(size != 1 for size in image.shape[3:]):
            raise InputError(f"{path}: expected one 3-D volume, found shape {image.shape}")
        _check_axes(image.affine, path)
        return image


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One image or mask, its axes in RAS order by its affine.

    Returns:
        Voxels (X, Y, Z) as float32, scaled as the header says; affine (4, 4), voxel to mm, RAS.

    Raises:
        InputError: As `open_volume`; a truncated file; voxels that are NaN or infinite.
    """
    import nibabel as nib

    image = open_volume(path)
    with _readable(path):
        image = nib.as_closest_canonical(image)
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    voxels = voxels.reshape(voxels.shape[:3])
    if bad := voxels.size - np.count_nonzero(np.isfinite(voxels)):
        raise InputError(f"{path}: expected finite voxels, found {bad} NaN or infinite")
    return voxels, image.affine


def write_volume(path: Path, voxels: np.ndarray, reference: Path) -> None:
    """Write a label map, or probabilities, on the grid of an image file, at once and whole.

    Args:
        path: To be written, `.nii.gz`.
        voxels: (X, Y, Z) or (X, Y, Z, R), in the reference's own orientation.
        reference: Its affine and its codes of space are those of the file.
    """
    import nibabel as nib

    original = nib.load(reference)
    assert isinstance(original, nib.Nifti1Image)
    image = nib.Nifti1Image(voxels, original.affine, original.header, dtype=voxels.dtype)
    image.header["cal_min"] = image.header["cal_max"] = 0  # the scan's display range
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    nib.save(image, partial)
    partial.replace(path)


class Compared(NamedTuple):
    """A prediction beside the truth, on the grid that they are stored on, RAS.

    Attributes:
        prediction: (R, X, Y, Z), bool.
        truth: (R, X, Y, Z), bool.
        spacing_mm: Edges of a voxel.
        affine: (4, 4), voxel to mm.
    """

    prediction: np.ndarray
    truth: np.ndarray
    spacing_mm: tuple[float, ...]
    affine: np.ndarray


def compared(labels: np.ndarray, written: Path, case: Case, data_set: DataSet) -> Compared:
    """A predicted label map beside the mask of its case.

    Args:
        labels: (X, Y, Z), canonical, RAS.
        written: The file that they are from.
        case: Has the mask.
        data_set: Knows its labels.

    Raises:
        InputError: A mask that cannot be used, or none, or of another grid.
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
        spacing_mm=tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()),
        affine=affine,
    )


def _check_axes(affine: np.ndarray | None, path: Path) -> None:
    """Sheared axes cannot be resampled as if they were orthogonal, which ITK would do silently."""
    if affine is None:
        raise InputError(f"{path}: expected an affine, found none")
    sizes_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and sizes_mm.all()):
        raise InputError(f"{path}: expected an affine with three axes, found {affine[:3].tolist()}")
    directions = affine[:3, :3] / sizes_mm
    if (cosine := np.abs(directions.T @ directions - np.eye(3)).max()) > 1e-3:
        degrees = np.degrees(np.arccos(min(cosine, 1)))
        raise InputError(f"{path}: expected orthogonal axes, found two at {degrees:.1f} degrees")


@dataclass(frozen=True)
class Split:
    """Which case is for what. Each list is sorted by name."""

    train: list[Case]
    validation: list[Case]
    test: list[Case]

    def write(self, path: str | Path) -> None:
        """Write the names of the cases as JSON; `FileSplit` reads it."""
        names = {part: [case.name for case in cases] for part, cases in vars(self).items()}
        Path(path).write_text(json.dumps(names, indent=1) + "\n")


@dataclass(frozen=True)
class FractionSplit:
    """Cases drawn at random, in equal shares of each grade.

    Args:
        validation: Share of the cases, rounded; at least one case unless 0.
        test: The same.
        seed: Of the draw.

    Raises:
        InputError: Shares outside [0, 1), or that leave none for training; when called, too few
            cases.
    """

    validation: float
    test: float
    seed: int

    def __post_init__(self) -> None:
        if not (
            0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1
        ):
            raise InputError(
                f"split: expected shares in [0, 1) with a sum below 1, found "
                f"validation={self.validation}, test={self.test}"
            )

    def __call__(self, cases: Sequence[Case]) -> Split:
        rest = _by_name(cases)
        sizes = {
            part: max(1, round(share * len(cases))) if share else 0
            for part, share in (("test", self.test), ("validation", self.validation))
        }
        if sum(sizes.values()) >= len(cases):
            raise InputError(
                f"split: {len(cases)} cases are too few for {sizes['validation']} of validation, "
                f"{sizes['test']} of test and one of training"
            )
        parts: dict[str, list[Case]] = {}
        for part, size in sizes.items():
            rest, parts[part] = self._draw(rest, size)
        return Split(train=rest, **parts)

    def _draw(self, cases: list[Case], size: int) -> tuple[list[Case], list[Case]]:
        if size == 0:
            return cases, []
        from sklearn.model_selection import train_test_split

        # A stratum of n / size cases is one case of the smaller part: with less it has no share.
        strata = _strata(cases, least=-(-len(cases) // min(size, len(cases) - size)))
        rest, drawn = train_test_split(
            range(len(cases)), test_size=size, stratify=strata, random_state=self.seed
        )
        return [cases[i] for i in sorted(rest)], [cases[i] for i in sorted(drawn)]


@dataclass(frozen=True)
class FoldSplit:
    """One fold of a cross-validation, in equal shares of each grade.

    Fold `fold` is the test part and the one after it the validation part, so that over all folds
    every case is tested once, validated once, and never both in one run.

    Args:
        folds: Number of folds, at least 3.
        fold: Which one, from 0.
        seed: Of the draw; the same for all folds of one cross-validation.

    Raises:
        InputError: Fewer than three folds or no such fold; when called, fewer cases than folds.
    """

    folds: int
    fold: int
    seed: int

    def __post_init__(self) -> None:
        if self.folds < 3 or not 0 <= self.fold < self.folds:
            raise InputError(
                f"split: expected folds >= 3 and fold from 0 to folds - 1, found "
                f"folds={self.folds}, fold={self.fold}"
            )

    def __call__(self, cases: Sequence[Case]) -> Split:
        from sklearn.model_selection import StratifiedKFold

        cases = _by_name(cases)
        if len(cases) < self.folds:
            raise InputError(f"split: {len(cases)} cases are too few for {self.folds} folds")
        splitter = StratifiedKFold(self.folds, shuffle=True, random_state=self.seed)
        strata = _strata(cases, least=self.folds)
        folds = [[cases[i] for i in held_out] for _, held_out in splitter.split(cases, strata)]
        test, validation, *train = folds[self.fold :] + folds[: self.fold]
        return Split(
            _by_name(list(chain.from_iterable(train))), _by_name(validation), _by_name(test)
        )


@dataclass(frozen=True)
class FileSplit:
    """The split in a JSON file: {"train": [case names], "validation": [...], "test": [...]}.

    Cases that the file leaves out are in no part: a study of fewer cases is a file that names
    fewer.

    Raises:
        InputError: When called: no such file, another content, a case that does not exist or that
            is named twice.
    """

    path: str | Path

    def __call__(self, cases: Sequence[Case]) -> Split:
        parts = ("train", "validation", "test")
        expected = f'expected {{"train": [case names], ...}} with the keys {", ".join(parts)}'
        try:
            names = json.loads(Path(self.path).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: {expected}, found: {error}") from error
        if not (
            isinstance(names, dict)
            and set(names) == set(parts)
            and all(isinstance(part, list) for part in names.values())
        ):
            raise InputError(f"{self.path}: {expected}, found other content")
        by_name = {case.name: case for case in cases}
        for name, times in Counter(name for part in parts for name in names[part]).items():
            if name not in by_name:
                raise InputError(f"{self.path}: there is no case {name!r} among {len(cases)} cases")
            if times > 1:
                raise InputError(f"{self.path}: case {name!r} is named {times} times")
        return Split(*(_by_name([by_name[name] for name in names[part]]) for part in parts))


def _by_name(cases: Sequence[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: case.name)


def _strata(cases: list[Case], least: int) -> list[str]:
    """Grade of each case; a grade with fewer than `least` cases joins the most common one."""
    counts = Counter(case.grade for case in cases)
    common = min(counts, key=lambda grade: (-counts[grade], grade))
    return [case.grade if counts[case.grade] >= least else common for case in cases]
