"""Read and write NIfTI files; whatever is wrong with a file is one `InputError`."""

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import grids
from errors import InputError
from files import written_whole

if TYPE_CHECKING:
    from nibabel.spatialimages import SpatialImage

PATIENT = "patient "  # begins a description in the header that names the patient
MAX_COSINE = 1e-3  # between two axes; rounding in a header leaves less
MAX_VOXELS = 2**30  # four times a head at 0.25 mm; more is a damaged header, and fills the memory
DEFLATE_RATIO = 1032  # by which gzip can shrink a file at most
SAME_GRID_VOXELS = 0.1  # images of one case may differ by rounding in their headers, not by more


def open_volume(path: Path) -> "SpatialImage":
    """Read the header of one image or mask; its voxels stay on disk.

    Raises:
        InputError: The file is not readable, holds more than one volume, is too short for the
            volume that its header describes, has complex voxels, or has axes that are not
            orthogonal.
    """
    import nibabel as nib
    from nibabel.spatialimages import SpatialImage

    with _errors_that_name(path):
        image = nib.load(path)
        if not isinstance(image, SpatialImage):
            raise ValueError(type(image).__name__)
        if len(image.shape) < 3 or any(size != 1 for size in image.shape[3:]):
            raise InputError(f"{path}: expected one 3-D volume, found shape {image.shape}")
        _check_size(image, path)
        if (stored := image.get_data_dtype()).kind == "c":
            raise InputError(f"{path}: expected real numbers in its voxels, found {stored}")
        _check_axes(image.affine, path)
        return image


def has_orientation(path: Path) -> bool:
    """Whether a header says where its axes point; without, left and right are a guess.

    Raises:
        InputError: The errors of `open_volume`.
    """
    header: Any = open_volume(path).header
    codes = ("qform_code", "sform_code")
    return any(int(header[code]) for code in codes if code in header)


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one image or mask and bring its axes into RAS order.

    Returns:
        Voxels (X, Y, Z) as float32, scaled as the header says; affine (4, 4), voxel to mm, RAS.

    Raises:
        InputError: The errors of `open_volume`; the file is truncated or damaged; a voxel is NaN or
            infinite.
    """
    import nibabel as nib

    image = open_volume(path)
    with _errors_that_name(path):
        if path.suffix == ".gz" and isinstance(image, nib.Nifti1Image):
            # The checksum stands behind the last voxel, where nibabel stops reading.
            image = type(image).from_bytes(gzip.decompress(path.read_bytes()))
        image = nib.as_closest_canonical(image)
        with np.errstate(over="ignore"):  # a voxel beyond float32 is infinite, and refused below
            voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    voxels = voxels.reshape(voxels.shape[:3])
    if bad := voxels.size - np.count_nonzero(np.isfinite(voxels)):
        raise InputError(f"{path}: expected finite voxels, found {bad} NaN or infinite")
    return voxels, image.affine


def check_same_grid(
    paths: Sequence[Path], shapes: Sequence[tuple[int, ...]], affines: Sequence[np.ndarray]
) -> None:
    """Check that volumes lie on the grid of the first one.

    Args:
        paths: File of each volume, for the message.
        shapes: Voxels of each volume along X, Y and Z, RAS.
        affines: (4, 4) of each volume, RAS.

    Raises:
        InputError: A shape differs, or a corner voxel lies `SAME_GRID_VOXELS` or more away.
    """
    for path, shape, affine in zip(paths, shapes, affines, strict=True):
        expected = f"{path}: expected the grid of {paths[0]}, found"
        if shape != shapes[0]:
            raise InputError(f"{expected} {_times(shape)} voxels beside {_times(shapes[0])}")
        shift_mm = np.linalg.norm(corners(shape) @ (affine - affines[0]).T, axis=1).max()
        shift_voxels = shift_mm / grids.spacing_mm(affines[0]).min()
        if shift_voxels >= SAME_GRID_VOXELS:
            differences = _differences(affine, affines[0], _axis_codes(path), _axis_codes(paths[0]))
            raise InputError(
                f"{expected} corners {shift_mm:.3g} mm ({shift_voxels:.3g} voxels) away: "
                f"{differences}"
            )


def corners(shape: Sequence[int]) -> np.ndarray:
    """Return the centres of the eight corner voxels of a volume, homogeneous (8, 4)."""
    return np.array(
        [(*np.multiply(unit, np.subtract(shape, 1)), 1) for unit in np.ndindex(2, 2, 2)]
    )


def _differences(found: np.ndarray, expected: np.ndarray, *codes: str) -> str:
    """Say in what two affines (4, 4) differ: orientation on disk, spacing, angle or position."""
    spacings = [grids.spacing_mm(affine) for affine in (found, expected)]
    parts = []
    if codes[0] != codes[1]:
        parts.append(f"axes {codes[0]} beside {codes[1]}")
    if not np.allclose(*spacings, rtol=1e-3):
        found_mm, expected_mm = (_times(np.round(spacing, 3)) for spacing in spacings)
        parts.append(f"voxels of {found_mm} beside {expected_mm} mm")
    turn = (found[:3, :3] / spacings[0]).T @ (expected[:3, :3] / spacings[1])
    degrees = np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    if degrees > 0.1:
        parts.append(f"axes turned by {degrees:.1f} degrees")
    shift_mm = np.round(found[:3, 3] - expected[:3, 3], 2) + 0.0  # without -0
    if shift_mm.any():
        parts.append(f"an origin shifted by {', '.join(f'{mm:g}' for mm in shift_mm)} mm")
    return ", ".join(parts)


def _axis_codes(path: Path) -> str:
    """Directions of a file's axes on disk, such as LPS."""
    import nibabel as nib

    return "".join(map(str, nib.orientations.aff2axcodes(open_volume(path).affine)))


def _times(sizes: Sequence[float] | np.ndarray) -> str:
    """Format sizes along the axes, such as 240 x 240 x 155."""
    return " x ".join(f"{size:g}" for size in sizes)


def identify(path: Path) -> list[str]:
    """Say whose scan an image is, whatever the name, folder, header and orientation of its file.

    Returns:
        A hash of the voxels in RAS order; and the description in the header, if it is that of a
        patient (see `PATIENT`), which an image of another spacing shares. Two images that have an
        entry in common show the same patient.

    Raises:
        InputError: The errors of `read_volume`.
    """
    return identity_of(read_volume(path)[0], path)


def identity_of(voxels: np.ndarray, path: Path) -> list[str]:
    """Say whose scan an image is whose voxels (X, Y, Z), RAS, have been read; see `identify`."""
    digest = hashlib.sha256(voxels.tobytes()).hexdigest()
    described = description(path)
    return [f"voxels {digest[:24]}", *([described] if described.startswith(PATIENT) else [])]


def description(path: Path) -> str:
    """Read what the header of a file says that the volume is; empty if it does not.

    Raises:
        InputError: The file is not readable.
    """
    import nibabel as nib

    with _errors_that_name(path):
        header: Any = nib.load(path).header
    return str(header["descrip"].item(), "latin-1") if "descrip" in header else ""


def write_volume(path: Path, voxels: np.ndarray, reference: Path, description: str) -> None:
    """Write a label map or probabilities on the grid of an image file.

    Args:
        path: File to write, `.nii.gz`; it appears when all of it is written.
        voxels: (X, Y, Z) or (X, Y, Z, R), in the orientation of the reference on disk.
        reference: Image file from which the affine and the codes of its space are taken.
        description: What the header is to say that the volume is, at most 79 characters.
    """
    import nibabel as nib

    original = nib.load(reference)
    assert isinstance(original, nib.Nifti1Image)
    image = nib.Nifti1Image(voxels, original.affine, original.header, dtype=voxels.dtype)
    # The reference's display range is that of a scan: a label map would be shown black.
    image.header["cal_min"] = image.header["cal_max"] = 0
    image.header["descrip"] = description
    with written_whole(path) as partial:
        nib.save(image, partial)


@contextmanager
def _errors_that_name(path: Path) -> Iterator[None]:
    """Turn every error that nibabel raises for a broken file into an InputError with its path."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        yield
    except (
        OSError,
        EOFError,
        MemoryError,
        OverflowError,
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


def _check_size(image: "SpatialImage", path: Path) -> None:
    """Refuse a volume that the file cannot hold before memory is allocated for it."""
    voxels = math.prod(image.shape)
    if not 0 < voxels <= MAX_VOXELS:
        raise InputError(
            f"{path}: expected at most {MAX_VOXELS:.2g} voxels, found a header of "
            f"{_times(image.shape[:3])}"
        )
    needed = voxels * image.get_data_dtype().itemsize
    stored = path.stat().st_size * (DEFLATE_RATIO if path.suffix == ".gz" else 1)
    if path.suffix in (".gz", ".nii") and stored < needed:
        raise InputError(
            f"{path}: expected a readable NIfTI file, found: a header of {_times(image.shape[:3])} "
            f"voxels, which {path.stat().st_size} bytes cannot hold"
        )


def _check_axes(affine: np.ndarray | None, path: Path) -> None:
    """Refuse sheared axes: ITK would silently resample them as if they were orthogonal."""
    if affine is None:
        raise InputError(f"{path}: expected an affine, found none")
    sizes_mm = grids.spacing_mm(affine)
    if not (np.isfinite(affine).all() and sizes_mm.all()):
        raise InputError(f"{path}: expected an affine with three axes, found {affine[:3].tolist()}")
    directions = affine[:3, :3] / sizes_mm
    if (cosine := np.abs(directions.T @ directions - np.eye(3)).max()) > MAX_COSINE:
        degrees = np.degrees(np.arccos(min(cosine, 1)))
        raise InputError(f"{path}: expected orthogonal axes, found two at {degrees:.1f} degrees")
