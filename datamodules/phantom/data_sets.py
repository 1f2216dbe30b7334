"""Folders of phantoms, and data sets that write their phantoms when they are first used."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from datamodules.brats import BraTS
from datamodules.cases import Case, check_choice
from datamodules.metastases import Metastases
from datamodules.nifti import PATIENT
from datamodules.phantom.families import FAMILIES, KINDS
from datamodules.phantom.fields import RandomStreams
from datamodules.phantom.gliomas import draw_grade
from datamodules.phantom.patient import VERSION, make_phantom
from datamodules.phantom.ranges import MODALITIES
from errors import InputError
from files import read_json, write_json, written_whole


class _Settings(NamedTuple):
    """What all phantoms of a folder have in common."""

    seed: int
    spacing_mm: float
    kind: str
    modalities: Sequence[str]
    families: Sequence[str]

    def family(self, index: int) -> str:
        """Return the family of a case: they take turns."""
        return self.families[index % len(self.families)]


def write_phantoms(
    root: Path,
    count: int,
    *,
    spacing_mm: float,
    seed: int,
    kind: str = "glioma",
    modalities: Sequence[str] = MODALITIES,
    families: Sequence[str] = ("classic",),
    workers: int | None = None,
) -> None:
    """Write the first `count` phantoms of a seed.

    Gliomas have the layout of BraTS 2019,
    `root/{HGG,LGG}/phantom_0000/phantom_0000_{t1,t1ce,t2,flair,seg}.nii.gz`; metastases have no
    folder for the grade. Cases that exist stay as they are: an interrupted run can be continued,
    and a larger count only adds cases. Only one process at a time writes to a folder; another one
    waits for it.

    Args:
        root: Folder of the data set; created if it does not exist.
        count: How many cases the data set has afterwards, at least.
        spacing_mm: Edge of a voxel, 0.5 to 8.
        seed: Seed of the data set.
        kind: "glioma" or "metastases".
        modalities: Which images to write.
        families: Keys of `FAMILIES`, which take turns from case to case.
        workers: Number of processes; by default, one per core.

    Raises:
        InputError: A setting is out of its range, or the folder holds phantoms of other settings.
    """
    from filelock import FileLock

    if not 0.5 <= spacing_mm <= 8:
        raise InputError(f"spacing_mm: 0.5 to 8 expected, {spacing_mm:g} found")
    if count < 0:
        raise InputError(f"count: 0 or more cases expected, {count} found")
    if kind not in KINDS:
        raise InputError(f"kind: expected one of {', '.join(KINDS)}, found {kind}")
    check_choice("modalities", modalities, MODALITIES)
    check_choice("families", families, tuple(FAMILIES))
    root = Path(root)
    settings = _Settings(seed, float(spacing_mm), kind, sorted(modalities), list(families))
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".phantoms.lock"):
        _check_settings(root / "phantoms.json", {"version": VERSION, **settings._asdict()})
        _write_missing(root, settings, count, workers or os.cpu_count() or 1)


def _check_settings(path: Path, settings: dict[str, object]) -> None:
    """Record the settings of a new data set, or check that they are the recorded ones.

    Raises:
        InputError: The folder holds phantoms of other settings, or files that are no phantoms.
    """
    if not path.exists():
        if others := sorted(file.name for file in path.parent.glob("[!.]*")):
            raise InputError(
                f"{path.parent}: expected an empty folder to write phantoms to, found "
                f"{', '.join(others[:3])}; for real scans, say data=brats or data=metastases"
            )
        write_json(path, settings)
    advice = "remove the folder, or choose another"
    found = read_json(path, advice)
    if found != settings:
        raise InputError(
            f"{path}: expected phantoms of {settings}, found those of {found}; {advice}"
        )


def _write_missing(root: Path, settings: _Settings, count: int, workers: int) -> None:
    """Write those of the first `count` cases that do not exist yet."""
    from rich.progress import track

    jobs = [(root, settings, index) for index in range(count)]
    jobs = [job for job in jobs if not _case_folder(*job).exists()]
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in track(jobs, "phantoms", disable=not jobs):
            _write_case(*job)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = [pool.submit(_write_case, *job) for job in jobs]
        for future in track(as_completed(futures), "phantoms", total=len(futures)):
            future.result()


def case_name(index: int) -> str:
    """Name a case, whether it has been made or not."""
    return f"phantom_{index:04d}"


def _case_folder(root: Path, settings: _Settings, index: int) -> Path:
    """Return the folder of a case, which for gliomas lies in the folder of its grade."""
    laws = FAMILIES[settings.family(index)].laws
    random = RandomStreams(settings.seed, index, laws)
    grade = draw_grade(random) if settings.kind == "glioma" else ""
    return root / grade / case_name(index)


def _write_case(root: Path, settings: _Settings, index: int) -> None:
    """Make one case and write its folder whole."""
    import nibabel as nib

    folder = _case_folder(root, settings, index)
    seed, spacing_mm, kind, modalities, _ = settings
    phantom = make_phantom(seed, index, spacing_mm, kind, modalities, settings.family(index))
    with written_whole(folder) as partial:
        partial.mkdir()
        for name, volume in {**phantom.images, "seg": phantom.labels}.items():
            image = nib.Nifti1Image(volume, phantom.affine)
            image.header.set_xyzt_units("mm")
            image.set_qform(phantom.affine, 1)
            image.header["descrip"] = f"{PATIENT}phantom seed={seed} index={index}"
            nib.save(image, partial / f"{folder.name}_{name}.nii.gz")


class _WrittenOnFirstUse:
    """Mixin in front of a data set class: its files are phantoms that `prepare` writes.

    Args:
        root: Folder of the data set.
        count: How many cases the data set has; if the folder holds more, the first ones.
        spacing_mm: Edge of a voxel.
        seed: Seed of the data set.
        families: Keys of `FAMILIES`, which take turns from case to case.
        choices: What else the data set class takes, such as `modalities`.
    """

    root: Path

    def __init__(
        self,
        root: str | Path,
        count: int,
        spacing_mm: float,
        seed: int = 0,
        families: Sequence[str] = ("classic",),
        **choices: Sequence[str],
    ) -> None:
        super().__init__(root, **choices)  # pyright: ignore[reportCallIssue]
        self.count = count
        self.spacing_mm = spacing_mm
        self.seed = seed
        self.families = families

    def cases(self) -> list[Case]:
        """Return the first `count` cases, sorted by name."""
        return super().cases()[: self.count]  # pyright: ignore[reportAttributeAccessIssue]

    def _write(self, kind: str, modalities: Sequence[str]) -> None:
        write_phantoms(
            self.root,
            self.count,
            spacing_mm=self.spacing_mm,
            seed=self.seed,
            kind=kind,
            modalities=modalities,
            families=self.families,
        )


class Phantoms(_WrittenOnFirstUse, BraTS):
    """Phantoms with gliomas: a BraTS data set that is written when it is first used.

    Args:
        root: Folder of the data set.
        count: How many cases the data set has; if the folder holds more, the first ones.
        spacing_mm: Edge of a voxel.
        seed: Seed of the data set, 0 by default.
        families: Keys of `FAMILIES`, which take turns from case to case; `classic` by default.
        choices: `modalities` and `regions`, see `BraTS`.
    """

    def prepare(self) -> None:
        """Write the missing cases, all modalities of them whatever the choice is."""
        self._write("glioma", MODALITIES)


class MetastasisPhantoms(_WrittenOnFirstUse, Metastases):
    """Phantoms with metastases: a data set that is written when it is first used.

    Args:
        root: Folder of the data set.
        count: How many cases the data set has; if the folder holds more, the first ones.
        spacing_mm: Edge of a voxel.
        seed: Seed of the data set, 0 by default.
        families: Keys of `FAMILIES`, which take turns from case to case; `classic` by default.
        choices: `modalities`, see `Metastases`; only these are written.
    """

    def prepare(self) -> None:
        """Write the missing cases."""
        self._write("metastases", self.modalities)
