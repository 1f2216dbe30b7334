"""Cache preprocessed cases on disk, as memory-mapped float16 arrays.

Reading and resampling four NIfTI files takes seconds; cutting a patch out of an uncompressed,
memory-mapped array takes a millisecond. Everything that is the same in every epoch is therefore
computed once and written to disk.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

import grids
from datamodules.cases import Case, DataSet
from datamodules.nifti import identify
from datamodules.preprocessing import Extra, Preprocessing
from errors import InputError
from files import read_json, write_json, written_whole

VERSION = 1  # raise it when `Preprocessing` computes, or `Cache` writes, something else


@dataclass(frozen=True, eq=False)
class CachedCase:
    """A preprocessed case on disk.

    Each array is memory-mapped, read-only, on its first use in a process; pickling leaves the
    arrays behind, so that a case is cheap to send to a worker process.

    Attributes:
        case: Case that it was made from.
        folder: Folder of its files.
        affine: (4, 4), voxel of the arrays to mm, RAS.
        outside: Canonical label -> number of voxels that the crop cut away.
        identity: What tells the patient of the case from others, see `nifti.identify`.
    """

    case: Case
    folder: Path
    affine: np.ndarray
    outside: Mapping[int, int]
    identity: Sequence[str]

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def has_mask(self) -> bool:
        return self.case.mask is not None

    @cached_property
    def image(self) -> np.ndarray:
        """Channels (C, X, Y, Z), float16; see `preprocessing.Volume`."""
        return np.load(self.folder / "image.npy", mmap_mode="r")

    @cached_property
    def labels(self) -> np.ndarray:
        """Canonical labels (X, Y, Z), uint8."""
        return np.load(self.folder / "labels.npy", mmap_mode="r")

    @cached_property
    def lesion(self) -> np.ndarray:
        """Sorted flat indices (N,), int32 in C order, of all voxels with a label."""
        return np.load(self.folder / "lesion.npy", mmap_mode="r")

    @cached_property
    def lesions(self) -> list[np.ndarray]:
        """Sorted indices of each lesion, a 26-connected component of the voxels of `lesion`."""
        if not len(self.lesion):
            return []
        voxels = np.stack(np.unravel_index(self.lesion, self.labels.shape))
        # From the indices, not from the mask: only this box of the labels is read.
        low, high = voxels.min(1), voxels.max(1) + 1
        numbers, count = grids.components(self.labels[tuple(map(slice, low, high))] > 0)
        number_of = numbers[tuple(voxels - low[:, None])]
        return [self.lesion[number_of == number] for number in range(1, count + 1)]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Cache:
    """Keeps preprocessed cases in `root/<key>/<case>/`; a missing or outdated case is made anew.

    The key is a hash of all settings that determine the arrays. Processes that build one cache at
    the same time share the work.

    Args:
        root: Folder of all caches.
        spacing_mm: Edge of a voxel, see `Preprocessing`.
        crop: "brain", or three sides in mm, see `Preprocessing`.
        workers: Cases to preprocess at a time; by default one per core that this process may use,
            at most 8.
        extras: Further channels by name, see `Preprocessing`.
    """

    def __init__(
        self,
        root: str | Path,
        spacing_mm: float,
        crop: Literal["brain"] | Sequence[float],
        workers: int | None = None,
        extras: Mapping[str, Extra] = MappingProxyType({}),
    ) -> None:
        self.root = Path(root)
        self.preprocessing = Preprocessing(spacing_mm, crop, extras)
        self.workers = workers or min(8, available_cores())

    def key(self, data_set: DataSet) -> str:
        """Return the name of the folder for the cases of a data set."""
        determining: dict[str, Any] = {
            "version": VERSION,
            "spacing_mm": self.preprocessing.spacing_mm,
            "crop": self.preprocessing.crop,
            "modalities": list(data_set.modalities),
            "labels": type(data_set).__name__,
        }
        # One entry per extra, so that a cache without extras keeps the key of earlier versions.
        determining |= {
            f"extras.{name}": dict(extra.settings)
            for name, extra in self.preprocessing.extras.items()
        }
        return hashlib.sha256(json.dumps(determining).encode()).hexdigest()[:12]

    def build(self, cases: Sequence[Case], data_set: DataSet) -> list[CachedCase]:
        """Return the cases in the order given, and preprocess those that are not in the cache.

        Raises:
            InputError: A case cannot be used; the cases that were finished stay in the cache.
        """
        folder = self.root / self.key(data_set)
        by_name = {case.name: case for case in cases}
        cached = {
            name: done for name, case in by_name.items() if (done := _open(folder / name, case))
        }
        missing = [case for name, case in by_name.items() if name not in cached]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            cached |= self._build(missing, data_set, folder)
        return [cached[case.name] for case in cases]

    def _build(self, cases: list[Case], data_set: DataSet, folder: Path) -> dict[str, CachedCase]:
        from rich.progress import Progress

        built: dict[str, CachedCase] = {}
        with one_itk_thread(), ThreadPoolExecutor(self.workers) as pool, Progress() as progress:
            task = progress.add_task("preprocessing", total=len(cases))
            try:
                # The first pass skips the cases that another process holds the lock of, so that
                # the processes share the work; the second one waits for them.
                for wait in (False, True):
                    futures = {
                        case.name: pool.submit(self._build_case, case, data_set, folder, wait)
                        for case in cases
                        if case.name not in built
                    }
                    for name, future in futures.items():
                        if cached := future.result():
                            built[name] = cached
                            progress.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return built

    def _build_case(
        self, case: Case, data_set: DataSet, folder: Path, wait: bool
    ) -> CachedCase | None:
        """Preprocess and write one case.

        Returns:
            The case; None if another process is preprocessing it and `wait` is false.
        """
        from filelock import FileLock, Timeout

        final = folder / case.name
        try:
            with FileLock(folder / f".{case.name}.lock", timeout=-1 if wait else 0):
                if cached := _open(final, case):
                    return cached
                # Taken before the files are read: if one changes later, the case is outdated.
                sources = _sources(case)
                volume = self.preprocessing(case, data_set)
                with written_whole(final) as partial:
                    partial.mkdir()
                    np.save(partial / "image.npy", volume.image)
                    np.save(partial / "labels.npy", volume.labels)
                    lesion = np.flatnonzero(volume.labels).astype(np.int32)
                    np.save(partial / "lesion.npy", lesion)
                    facts = {
                        "version": VERSION,
                        "spacing_mm": self.preprocessing.spacing_mm,
                        "crop": self.preprocessing.crop,
                        "grade": case.grade,
                        "sources": sources,
                        "identity": identify(case.reference),
                        "affine": volume.affine.tolist(),
                        "outside": volume.outside,
                        "extras": volume.extras,
                    }
                    write_json(partial / "case.json", facts)
                return _open(final, case)
        except Timeout:
            return None


def _open(folder: Path, case: Case) -> CachedCase | None:
    """Open a case of the cache.

    Returns:
        The case; None if it is missing or damaged, if its files have changed since, or if a version
        that kept no identity wrote it.
    """
    sources = _sources(case)
    try:
        facts = read_json(folder / "case.json", "the case is preprocessed again")
        if facts["sources"] != sources:
            return None
        return CachedCase(
            case=case,
            folder=folder,
            affine=np.array(facts["affine"], float).reshape(4, 4),
            outside={int(label): count for label, count in facts["outside"].items()},
            identity=facts["identity"],
        )
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _sources(case: Case) -> dict[str, dict[str, Any]]:
    """Describe the files of a case by name, size and time of change, to notice when they change.

    Folders are left out, because a data set may be moved.

    Raises:
        InputError: A file is missing.
    """
    files = dict(case.images) | ({"mask": case.mask} if case.mask else {})
    sources = {}
    for kind, path in files.items():
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: expected a file, found: {error.strerror}") from error
        sources[kind] = {
            "file": path.name,
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
        }
    return sources


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # missing on macOS; honours the limits of a cluster's job
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_itk_thread() -> Iterator[None]:
    """Limit ITK to one thread, since the cases run in parallel already."""
    from SimpleITK import ProcessObject

    threads = ProcessObject.GetGlobalDefaultNumberOfThreads()
    ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
