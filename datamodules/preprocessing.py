"""Preprocessing, done once: cases as memory-mapped float16 arrays.

Reading and resampling four NIfTI files takes seconds, cutting a patch out of an uncompressed,
memory-mapped array a millisecond. So everything that does not change from epoch to epoch happens
here and is written to disk.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
from scipy import ndimage

from datamodules.cases import Case, DataSet, open_volume, read_volume
from errors import InputError

VERSION = 1  # of what `Preprocessing` computes and `Cache` writes: raise it when either changes

SAME_GRID_VOXELS = 0.1  # images of one case may differ by rounding in their headers, not by more
SAME_SPACING = 1e-3  # relative; closer than this, resampling would only blur


@dataclass(frozen=True, eq=False)
class Volume:
    """A preprocessed case.

    Attributes:
        image: (C, X, Y, Z) float16: mean 0 and standard deviation 1 in each modality's foreground,
            exactly 0 outside it. Behind the modalities come the channels of the extras.
        labels: (X, Y, Z) uint8, canonical; zeros where the case has no mask.
        affine: (4, 4), voxel of these arrays to mm, RAS.
        outside: Canonical label -> number of its voxels, at this spacing, that the crop cut away.
            They are missed by every prediction, and counted as such.
        extras: What each extra has found beside its channels, as JSON, by the extra's name.
    """

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    outside: Mapping[int, int]
    extras: Mapping[str, Mapping[str, Any]]


class Extra(Protocol):
    """Channels beyond the modalities, computed from the whole brain, before it is cropped."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that determines the channels beside the case, as JSON."""
        ...

    def __call__(
        self, name: str, images: Mapping[str, np.ndarray], affine: np.ndarray
    ) -> tuple[np.ndarray, Mapping[str, Any]]:
        """Channels (E, X, Y, Z) of a case, 0 where there is nothing to say, and facts, as JSON.

        The images (X, Y, Z) are by modality, in their own units, 0 outside the brain.
        """
        ...


class Preprocessing:
    """RAS order, isotropic spacing, z-scores inside the brain, a crop around the brain.

    Args:
        spacing_mm: Edge of a voxel.
        crop: "brain" for the bounding box of the brain, or the extent in mm of a box centred on
            it, padded with 0 where it reaches beyond the scan, so that all cases have one shape.
        extras: Further channels, by name.

    Raises:
        InputError: Anything else; when called, files that cannot be used.
    """

    def __init__(
        self,
        spacing_mm: float,
        crop: Literal["brain"] | Sequence[float],
        extras: Mapping[str, Extra] = MappingProxyType({}),
    ) -> None:
        if not spacing_mm > 0:
            raise InputError(f"spacing_mm: expected more than 0, found {spacing_mm}")
        if isinstance(crop, str) and crop != "brain":
            raise InputError(f'crop: expected "brain" or three extents in mm, found "{crop}"')
        if not isinstance(crop, str) and not (
            len(crop) == 3 and all(extent_mm >= spacing_mm for extent_mm in crop)
        ):
            raise InputError(
                f'crop: expected "brain" or three extents of at least {spacing_mm:g} mm, '
                f"found {list(crop)}"
            )
        self.spacing_mm = float(spacing_mm)
        self.crop = crop if isinstance(crop, str) else tuple(float(extent) for extent in crop)
        self.extras = dict(extras)

    def __call__(self, case: Case, data_set: DataSet) -> Volume:
        """Preprocess one case; its mask may be None."""
        paths = [case.images[modality] for modality in data_set.modalities]
        images, affines = zip(*map(read_volume, paths), strict=True)
        labels = np.zeros(images[0].shape, np.uint8)
        if case.mask is not None:
            mask, mask_affine = read_volume(case.mask)
            paths, affines = [*paths, case.mask], (*affines, mask_affine)
            _check_same_grid(paths, [*images, mask], affines)
            labels = data_set.canonical_labels(mask, case)
        else:
            _check_same_grid(paths, images, affines)

        foregrounds = [_foreground(image) for image in images]
        affine = affines[0]
        if not np.allclose(_spacing_mm(affine), self.spacing_mm, rtol=SAME_SPACING):
            grid = _isotropic_grid(labels.shape, affine, self.spacing_mm)
            resampled = [
                _resample_image(image, foreground, affine, grid)
                for image, foreground in zip(images, foregrounds, strict=True)
            ]
            images, foregrounds = zip(*resampled, strict=True)
            labels = _resample_labels(labels, affine, grid)
            affine = grid[1]

        start, shape = self._box(np.logical_or.reduce(foregrounds), case)
        image = np.zeros((len(images), *shape), np.float16)
        for channel, (modality, voxels, foreground) in enumerate(
            zip(data_set.modalities, images, foregrounds, strict=True)
        ):
            mean, deviation = _moments(voxels[foreground], case.images[modality])
            z_scores = (cut(voxels, start, shape) - mean) / deviation
            image[channel] = np.where(cut(foreground, start, shape), z_scores, 0)
        brains = {
            modality: _above_background(voxels, foreground)
            for modality, voxels, foreground in zip(
                data_set.modalities, images, foregrounds, strict=True
            )
            if self.extras
        }
        facts = {}
        for name, extra in self.extras.items():
            channels, facts[name] = extra(case.name, brains, affine)
            image = np.concatenate([image, cut(channels, start, shape).astype(np.float16)])
        inside = cut(labels, start, shape)
        offset = np.eye(4)
        offset[:3, 3] = start
        return Volume(
            image=image,
            labels=inside,
            affine=affine @ offset,
            outside={
                int(label): int((labels == label).sum() - (inside == label).sum())
                for label in np.unique(labels[labels > 0])
            },
            extras=facts,
        )

    def _box(self, brain: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """First voxel, which may lie outside the volume, and shape of the crop."""
        low, high = _bounding_box(brain)
        if not (high > low).all():
            files = ", ".join(str(path) for path in case.images.values())
            raise InputError(f"{files}: expected a brain, found one value in every voxel")
        if self.crop == "brain":
            return low, high - low
        shape = np.array([round(float(extent) / self.spacing_mm) for extent in self.crop])
        return (low + high - shape) // 2, shape


def restore(array: np.ndarray, affine: np.ndarray, reference: Path) -> np.ndarray:
    """Bring probabilities from the preprocessed grid back to that of an original image.

    Args:
        array: (R, X, Y, Z), floating point.
        affine: (4, 4), of the preprocessed volume.
        reference: Image file whose grid is wanted.

    Returns:
        (R, X, Y, Z) float32 in the orientation and shape of `reference`; 0 outside the crop.
    """
    original = open_volume(reference)
    shape, target = original.shape[:3], np.asarray(original.affine)
    to_array = np.linalg.inv(affine) @ target  # voxel of the original -> voxel of the array
    whole = np.round(to_array)
    shift_voxels = np.abs(_corners(shape) @ (to_array - whole).T).max()
    if shift_voxels >= SAME_GRID_VOXELS or round(abs(np.linalg.det(whole))) != 1:
        return _resample(array, affine, (shape, target))

    # The same voxels in another order: copied, not interpolated.
    restored = np.zeros((len(array), *shape), np.float32)
    axes = np.abs(whole[:3, :3]).argmax(axis=0)  # axis of the array for each of the original
    origins, targets = [], []
    for axis, size in enumerate(shape):
        index = (whole[axes[axis], axis] * np.arange(size) + whole[axes[axis], 3]).astype(int)
        covered = (index >= 0) & (index < array.shape[1 + axes[axis]])
        origins.append(index[covered])
        targets.append(np.flatnonzero(covered))
    channels = np.arange(len(array))
    reordered = array.transpose(0, *(1 + axes))
    restored[np.ix_(channels, *targets)] = reordered[np.ix_(channels, *origins)]
    return restored


def _corners(shape: Sequence[int]) -> np.ndarray:
    """The centres of the eight corner voxels, homogeneous (8, 4)."""
    return np.array(
        [(*np.multiply(unit, np.subtract(shape, 1)), 1) for unit in np.ndindex(2, 2, 2)]
    )


def _spacing_mm(affine: np.ndarray) -> np.ndarray:
    return np.linalg.norm(affine[:3, :3], axis=0)


def _check_same_grid(
    paths: Sequence[Path], volumes: Sequence[np.ndarray], affines: Sequence[np.ndarray]
) -> None:
    """The first image's affine is used for all of them, so they must agree."""
    shape = volumes[0].shape
    for path, volume, affine in zip(paths, volumes, affines, strict=True):
        if volume.shape != shape:
            raise InputError(
                f"{path}: expected the grid of {paths[0]}, "
                f"found shape {volume.shape} beside {shape}"
            )
        shift_mm = np.linalg.norm(_corners(shape) @ (affine - affines[0]).T, axis=1).max()
        shift_voxels = shift_mm / _spacing_mm(affines[0]).min()
        if shift_voxels >= SAME_GRID_VOXELS:
            raise InputError(
                f"{path}: expected the grid of {paths[0]}, found corners {shift_mm:.3g} mm "
                f"({shift_voxels:.3g} voxels) away"
            )


def _bounding_box(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First voxel of the box around a mask and the one past its last; equal if there is none."""
    profiles = [mask.any(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    occupied = [np.flatnonzero(profile) for profile in profiles]
    low = np.array([indices[0] if indices.size else 0 for indices in occupied])
    high = np.array([indices[-1] + 1 if indices.size else 0 for indices in occupied])
    return low, high


def _faces(volume: np.ndarray) -> np.ndarray:
    """All voxels on the border of a volume, flat."""
    faces = (volume[[0, -1]], volume[:, [0, -1]], volume[:, :, [0, -1]])
    return np.concatenate([face.ravel() for face in faces])


def _foreground(image: np.ndarray) -> np.ndarray:
    """Voxels of the head: not the background's value, or enclosed by such voxels.

    The background is the value most common on the volume's border: 0 in BraTS, but below 0 in
    images that came z-scored. Negative voxels in a brain are tissue (spline resampling makes them).
    """
    values, counts = np.unique(_faces(image), return_counts=True)
    foreground = image != values[counts.argmax()]
    if not foreground.any():
        return foreground
    box = tuple(map(slice, *_bounding_box(foreground)))
    # ndimage.binary_fill_holes in a third of its time: what does not reach the box's border.
    pieces = np.zeros(foreground[box].shape, np.int32)
    ndimage.label(~foreground[box], output=pieces)
    is_open = np.zeros(pieces.max() + 1, bool)
    is_open[_faces(pieces)] = True
    is_open[0] = False  # the foreground itself
    foreground[box] = ~is_open[pieces]
    return foreground


def _above_background(voxels: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """The image with 0 around the brain, and no tissue darker than that (z-scored on disk)."""
    darkest = min(0, voxels.min(initial=0, where=foreground))
    return np.where(foreground, voxels - darkest, 0)


def _moments(voxels: np.ndarray, path: Path) -> tuple[float, float]:
    """Mean and standard deviation of a modality's foreground."""
    if voxels.size:
        mean, deviation = voxels.mean(dtype=np.float64), voxels.std(dtype=np.float64)
        if deviation > 1e-6 * abs(mean):
            return float(mean), float(deviation)
    raise InputError(f"{path}: expected different values in the brain, found one or no brain")


def cut(
    volume: np.ndarray, start: Sequence[int] | np.ndarray, size: Sequence[int] | np.ndarray
) -> np.ndarray:
    """A copy of a box of (..., X, Y, Z), zero (background) where it reaches beyond the volume."""
    inside, target = [], []
    for first, side, extent in zip(start, size, volume.shape[-3:], strict=True):
        low = min(max(first, 0), extent)
        high = max(min(first + side, extent), low)
        inside.append(slice(low, high))
        target.append(slice(low - first, high - first) if high > low else slice(0))
    box = np.zeros((*volume.shape[:-3], *size), volume.dtype)
    box[(..., *target)] = volume[(..., *inside)]
    return box


Grid = tuple[tuple[int, ...], np.ndarray]


def _isotropic_grid(shape: tuple[int, ...], affine: np.ndarray, spacing_mm: float) -> Grid:
    """Shape and affine of the largest grid of a spacing within a volume, centred on it."""
    zoom = spacing_mm / _spacing_mm(affine)
    # The small number: 30 voxels of 0.1 mm are 3 of 1 mm, not 2.
    new_shape = np.maximum(1, np.floor(shape / zoom + 1e-3)).astype(int)
    to_old = np.diag([*zoom, 1])
    to_old[:3, 3] = (np.subtract(shape, 1) - (new_shape - 1) * zoom) / 2
    return tuple(new_shape.tolist()), affine @ to_old


def _resample(
    channels: Iterable[np.ndarray], affine: np.ndarray, grid: Grid, antialias: bool = True
) -> np.ndarray:
    """Volumes (X, Y, Z) on another grid, linearly: (C, X, Y, Z) float32, 0 outside.

    On a coarser grid, linear interpolation looks at 8 voxels and drops the rest; `antialias`
    smooths with a Gaussian first.
    """
    import torch
    from torchio import ScalarImage
    from torchio.transforms import Resample

    shape, target = grid
    zoom = _spacing_mm(target).max() / _spacing_mm(affine)
    resampled = []
    for voxels in channels:  # one by one: ITK is slower with vector images
        # Zeros add nothing, so only the box of the rest is worth the time, with a margin that
        # the Gaussian, of a standard deviation below zoom / 2, does not leave.
        low, high = _bounding_box(voxels != 0)
        low = np.maximum(low - np.ceil(2 * zoom).astype(int) - 1, 0)
        high = np.minimum(high + np.ceil(2 * zoom).astype(int) + 1, voxels.shape)
        source = np.ascontiguousarray(voxels[tuple(map(slice, low, high))], np.float32)
        offset = np.eye(4)
        offset[:3, 3] = low
        image = ScalarImage(tensor=torch.from_numpy(source)[None], affine=affine @ offset)
        smooth = antialias and (zoom > 1.01).any() and min(source.shape) >= 4  # ITK's minimum
        transform = Resample((shape, target), antialias=bool(smooth), copy=False)
        resampled.append(transform(image).numpy()[0])
    return np.stack(resampled)


def _resample_image(
    image: np.ndarray, foreground: np.ndarray, affine: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its foreground on another grid.

    Averaged over the foreground only: the brain's rim does not fade into the background, whatever
    value that has.
    """
    weighted, weight = _resample([image * foreground, foreground], affine, grid)
    resampled_foreground = weight >= 0.5
    return weighted / np.where(resampled_foreground, weight, 1), resampled_foreground


def _resample_labels(labels: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Labels on another grid: at each voxel the one with the largest share, never a new one.

    At a tie the higher label wins, and any label wins over background: with background first, a
    2 mm grid would lose a tenth of the oedema. No smoothing: it would erase small lesions.
    """
    values = np.unique(labels[labels > 0])[::-1]
    if values.size == 0:
        return np.zeros(grid[0], np.uint8)
    one_hot = (labels == value for value in values)
    shares = _resample(one_hot, affine, grid, antialias=False)
    is_labelled = shares.max(axis=0) >= 1 - shares.sum(axis=0) - 1e-4
    return np.where(is_labelled, values[shares.argmax(axis=0)], 0).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class CachedCase:
    """A preprocessed case on disk.

    The arrays are memory-mapped, read-only, when first used, once per process; pickling leaves
    them behind.

    Attributes:
        case: Where it came from.
        folder: Its files.
        affine: (4, 4), voxel of the arrays to mm, RAS.
        outside: Canonical label -> number of voxels that the crop cut away.
    """

    case: Case
    folder: Path
    affine: np.ndarray
    outside: Mapping[int, int]

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def has_mask(self) -> bool:
        return self.case.mask is not None

    @cached_property
    def image(self) -> np.ndarray:
        """(C, X, Y, Z) float16."""
        return np.load(self.folder / "image.npy", mmap_mode="r")

    @cached_property
    def labels(self) -> np.ndarray:
        """(X, Y, Z) uint8, canonical."""
        return np.load(self.folder / "labels.npy", mmap_mode="r")

    @cached_property
    def lesion(self) -> np.ndarray:
        """Sorted flat indices (N,), int32 in C order, of the voxels with a label."""
        return np.load(self.folder / "lesion.npy", mmap_mode="r")

    @cached_property
    def lesions(self) -> list[np.ndarray]:
        """The voxels of `lesion` by lesion: 26-connected components, each sorted."""
        from scipy.ndimage import label

        if not len(self.lesion):
            return []
        voxels = np.stack(np.unravel_index(self.lesion, self.labels.shape))
        low, high = voxels.min(1), voxels.max(1) + 1
        box = self.labels[tuple(map(slice, low, high))] > 0
        numbers = np.empty(box.shape, np.int32)
        label(box, np.ones((3, 3, 3)), output=numbers)
        numbers = numbers[tuple(voxels - low[:, None])]
        return [self.lesion[numbers == number] for number in range(1, numbers.max() + 1)]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Cache:
    """Preprocessed cases in `root/<key>/<case>/`, made when missing or older than their files.

    The key stands for all that determines the arrays beside the files themselves. Processes that
    build one cache at the same time share the work.

    Args:
        root: Folder of all caches.
        spacing_mm: As in `Preprocessing`.
        crop: As in `Preprocessing`.
        workers: Cases at a time; by default one per core that this process may use, at most 8.
        extras: As in `Preprocessing`.
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
        self.workers = workers or min(8, _available_cores())

    def key(self, data_set: DataSet) -> str:
        """Name of the folder for a data set's cases."""
        determining: dict[str, Any] = {
            "version": VERSION,
            "spacing_mm": self.preprocessing.spacing_mm,
            "crop": self.preprocessing.crop,
            "modalities": list(data_set.modalities),
            "labels": type(data_set).__name__,
        }
        # By their names: without any, the key is that of a cache that knew of none.
        determining |= {
            f"extras.{name}": dict(extra.settings)
            for name, extra in self.preprocessing.extras.items()
        }
        return hashlib.sha256(json.dumps(determining).encode()).hexdigest()[:12]

    def build(self, cases: Sequence[Case], data_set: DataSet) -> list[CachedCase]:
        """The cases in the given order, preprocessed where that is still to do.

        Raises:
            InputError: Of the first case that cannot be used; what was finished stays.
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
        with _one_itk_thread(), ThreadPoolExecutor(self.workers) as pool, Progress() as progress:
            task = progress.add_task("preprocessing", total=len(cases))
            try:
                # Cases that another process is at come last: the two share the work.
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
        """Preprocess and write one case; None if another process is doing it and not `wait`."""
        from filelock import FileLock, Timeout

        final, partial = folder / case.name, folder / f".{case.name}.partial"
        try:
            with FileLock(folder / f".{case.name}.lock", timeout=-1 if wait else 0):
                if cached := _open(final, case):
                    return cached
                sources = _sources(case)  # before reading: a later change makes them differ
                volume = self.preprocessing(case, data_set)
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                partial.mkdir()
                try:
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
                        "affine": volume.affine.tolist(),
                        "outside": volume.outside,
                        "extras": volume.extras,
                    }
                    (partial / "case.json").write_text(json.dumps(facts, indent=1) + "\n")
                    shutil.rmtree(final, ignore_errors=True)
                    partial.rename(final)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                return _open(final, case)
        except Timeout:
            return None


def _open(folder: Path, case: Case) -> CachedCase | None:
    """A case of the cache; None if it is not there or its files have changed since."""
    try:
        facts = json.loads((folder / "case.json").read_text())
    except FileNotFoundError:
        return None
    if facts["sources"] != _sources(case):
        return None
    outside = {int(label): count for label, count in facts["outside"].items()}
    return CachedCase(case, folder, np.array(facts["affine"]), outside)


def _sources(case: Case) -> dict[str, dict[str, Any]]:
    """What tells whether a case's files are the ones that a cached case was made from.

    By name, not by path: a data set may move.
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


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS; honours what a cluster's scheduler set
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _one_itk_thread() -> Iterator[None]:
    """The cases run in parallel; ITK's own threads on top would be cores squared."""
    from SimpleITK import ProcessObject

    threads = ProcessObject.GetGlobalDefaultNumberOfThreads()
    ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
