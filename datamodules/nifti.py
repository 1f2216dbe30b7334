"""Read and write NIfTI files; whatever is wrong with a file is one `InputError`."""

import hashlib
import zlib
from collections.abc import Iterator
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


def open_volume(path: Path) -> "SpatialImage":
    """Read the header of one image or mask; its voxels stay on disk.

    Raises:
        InputError: The file is not readable, holds more than one volume, or has axes that are not
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
        _check_axes(image.affine, path)
        return image


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one image or mask and bring its axes into RAS order.

    Returns:
        Voxels (X, Y, Z) as float32, scaled as the header says; affine (4, 4), voxel to mm, RAS.

    Raises:
        InputError: The errors of `open_volume`; the file is truncated; a voxel is NaN or infinite.
    """
    import nibabel as nib

    image = open_volume(path)
    with _errors_that_name(path):
        image = nib.as_closest_canonical(image)
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    voxels = voxels.reshape(voxels.shape[:3])
    if bad := voxels.size - np.count_nonzero(np.isfinite(voxels)):
        raise InputError(f"{path}: expected finite voxels, found {bad} NaN or infinite")
    return voxels, image.affine


def identify(path: Path) -> list[str]:
    """Say whose scan an image is, whatever the name, folder, header and orientation of its file.

    Returns:
        A hash of the voxels in RAS order; and the description in the header, if it is that of a
        patient (see `PATIENT`), which an image of another spacing shares. Two images that have an
        entry in common show the same patient.

    Raises:
        InputError: The errors of `read_volume`.
    """
    voxels, _ = read_volume(path)
    digest = hashlib.sha256(voxels.tobytes()).hexdigest()
    header: Any = open_volume(path).header
    description = str(header["descrip"].item(), "latin-1")
    return [f"voxels {digest[:24]}", *([description] if description.startswith(PATIENT) else [])]


def write_volume(path: Path, voxels: np.ndarray, reference: Path) -> None:
    """Write a label map or probabilities on the grid of an image file.

    Args:
        path: File to write, `.nii.gz`; it appears when all of it is written.
        voxels: (X, Y, Z) or (X, Y, Z, R), in the orientation of the reference on disk.
        reference: Image file from which the affine and the codes of its space are taken.
    """
    import nibabel as nib

    original = nib.load(reference)
    assert isinstance(original, nib.Nifti1Image)
    image = nib.Nifti1Image(voxels, original.affine, original.header, dtype=voxels.dtype)
    # The reference's display range is that of a scan: a label map would be shown black.
    image.header["cal_min"] = image.header["cal_max"] = 0
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
