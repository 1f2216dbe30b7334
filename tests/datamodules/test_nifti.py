"""Reading and writing of single NIfTI files."""

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.nifti import (
    PATIENT,
    check_same_grid,
    description,
    has_orientation,
    identify,
    open_volume,
    read_volume,
    write_volume,
)
from errors import InputError
from tests.conftest import affine_of, write_image


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "IRA", "ALS"])
def test_axes_come_in_ras_order_and_voxels_stay_where_they_are(tmp_path, axes):
    rng = np.random.default_rng(0)
    voxels = rng.integers(-300, 3000, (5, 6, 7)).astype(np.int16)
    affine = affine_of(axes, (1.5, 2, 3), (11, -7, 5))
    path = write_image(tmp_path / "a.nii.gz", voxels, affine)

    read, read_affine = read_volume(path)

    assert "".join(nib.orientations.aff2axcodes(read_affine)) == "RAS"
    assert read.dtype == np.float32
    for index in [(0, 0, 0), (4, 5, 6), (1, 3, 2)]:
        mm = affine @ (*index, 1)
        there = np.rint(np.linalg.inv(read_affine) @ mm)[:3].astype(int)
        assert read[tuple(there)] == voxels[index]


def test_scaling_in_the_header_is_applied(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    image.header.set_data_dtype(np.int16)
    raw = nib.Nifti1Image(np.arange(24).reshape(2, 3, 4) * 0.5 + 3, np.eye(4), image.header)
    nib.save(raw, tmp_path / "a.nii")
    assert nib.Nifti1Image.from_filename(tmp_path / "a.nii").header["scl_slope"] != 1
    np.testing.assert_allclose(
        read_volume(tmp_path / "a.nii")[0].ravel(), np.arange(24) * 0.5 + 3, atol=1e-3
    )


def test_a_single_volume_in_four_dimensions_is_read(tmp_path):
    voxels = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    read, _ = read_volume(write_image(tmp_path / "a.nii.gz", voxels[..., None]))
    np.testing.assert_array_equal(read, voxels)


def sheared():
    affine = np.eye(4)
    affine[0, 1] = np.tan(np.radians(10))
    return affine


@pytest.mark.parametrize(
    ("voxels", "affine", "message"),
    [
        (np.zeros((2, 3, 4, 2)), np.eye(4), r"expected one 3-D volume, found shape \(2, 3, 4, 2\)"),
        (np.zeros((2, 3)), np.eye(4), r"expected one 3-D volume, found shape \(2, 3\)"),
        (np.full((2, 3, 4), np.nan), np.eye(4), "expected finite voxels, found 24 NaN or infinite"),
        (np.zeros((2, 3, 4)), sheared(), r"expected orthogonal axes, found two at 80\.0 degrees"),
    ],
)
def test_a_volume_that_cannot_be_used_is_named(tmp_path, voxels, affine, message):
    path = write_image(tmp_path / "a.nii.gz", voxels.astype(np.float32), affine)
    with pytest.raises(InputError, match=f"^{path}: {message}$"):
        read_volume(path)


def test_a_voxel_beyond_float32_is_infinite(tmp_path):
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.full((2, 3, 4), 1e300), np.eye(4)), path)
    with pytest.raises(InputError, match="expected finite voxels, found 24 NaN or infinite"):
        read_volume(path)


def test_a_wrong_checksum_is_named(tmp_path):
    """One bit of the checksum, which stands behind all that nibabel reads."""
    noise = np.random.default_rng(0).standard_normal((30, 30, 30))
    path = write_image(tmp_path / "a.nii.gz", noise)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}: expected a readable NIfTI file, found: CRC"):
        read_volume(path)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("size", [30000, 1000])
def test_a_header_larger_than_its_file_takes_no_memory(tmp_path, ending, size):
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.eye(4))
    raw = bytearray(image.to_bytes())
    raw[42:48] = np.array([size] * 3, np.int16).tobytes()
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(bytes(raw)) if ending == ".nii.gz" else bytes(raw))
    tracemalloc.start()
    with pytest.raises(InputError, match=f"^{path}: .* a header of {size} x {size} x {size}"):
        read_volume(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_complex_voxels_are_named(tmp_path):
    path = write_image(tmp_path / "a.nii.gz", np.full((2, 3, 4), 1 + 2j, np.complex64))
    with pytest.raises(InputError, match=f"^{path}: expected real numbers .*, found complex64$"):
        read_volume(path)


def test_a_header_without_axes_is_told_from_one_with_them(tmp_path):
    path = write_image(tmp_path / "a.nii", np.zeros((2, 3, 4), np.int16))
    assert has_orientation(path)
    raw = bytearray(path.read_bytes())
    raw[252:256] = bytes(4)
    path.write_bytes(raw)
    assert not has_orientation(path)


@pytest.mark.parametrize(
    ("affine", "found"),
    [
        (affine_of("LPS", (1, 1, 1), (50, 0, 0)), r"an origin shifted by 50, 0, 0 mm"),
        (affine_of("LPS", (3, 3, 3), (0, 0, 0)), r"voxels of 3 x 3 x 3 beside 1 x 1 x 1 mm.*"),
        (np.eye(4), r"axes RAS beside LPS, an origin shifted by 8, 9, 0 mm"),
    ],
)
def test_another_grid_is_described(tmp_path, affine, found):
    voxels = np.zeros((9, 10, 11), np.uint8)
    first = write_image(tmp_path / "a.nii", voxels, affine_of("LPS", (1, 1, 1), (0, 0, 0)))
    other = write_image(tmp_path / "b.nii", voxels, affine)
    volumes = [read_volume(path) for path in (first, other)]
    with pytest.raises(InputError, match=rf"^{other}: expected the grid of {first}, .*: {found}$"):
        check_same_grid(
            [first, other], [voxels.shape for voxels, _ in volumes], [a for _, a in volumes]
        )


def test_a_colour_image_is_named(tmp_path):
    colour = np.zeros((2, 3, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    path = write_image(tmp_path / "a.nii.gz", colour)
    with pytest.raises(InputError, match=f"^{path}: expected a readable NIfTI file, found: .+$"):
        read_volume(path)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [0, 20, 0.5, 0.95])
def test_a_truncated_file_is_named(tmp_path, ending, kept):
    noise = np.random.default_rng(0).standard_normal((12, 13, 14)).astype(np.float32)
    path = write_image(tmp_path / f"a{ending}", noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(InputError, match=f"^{path}: expected a readable NIfTI file, found: .+$"):
        read_volume(path)


def test_other_content_and_no_file_are_named(tmp_path):
    path = tmp_path / "a.nii.gz"
    for make in (lambda: None, lambda: path.write_text("hello"), lambda: path.unlink()):
        make()
        with pytest.raises(InputError, match=f"^{path}: expected a readable NIfTI file, found: "):
            open_volume(path)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR"])
@pytest.mark.parametrize("trailing", [(), (2,)])
def test_a_written_volume_lies_on_the_grid_of_its_reference(tmp_path, axes, trailing):
    reference = write_image(tmp_path / "a.nii.gz", np.ones((5, 6, 7)), affine_of(axes, (1.5, 2, 3)))
    voxels = np.random.default_rng(0).integers(0, 5, (5, 6, 7, *trailing)).astype(np.uint8)
    write_volume(tmp_path / "b.nii.gz", voxels, reference, "labels")
    written = nib.load(tmp_path / "b.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert description(tmp_path / "b.nii.gz") == "labels"
    np.testing.assert_array_equal(np.asarray(written.dataobj), voxels)
    np.testing.assert_array_equal(written.affine, nib.load(reference).affine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_a_scan_is_told_by_its_voxels_alone(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (5, 6, 7)).astype(np.int16)
    identity = identify(write_image(tmp_path / "a.nii.gz", voxels))
    assert len(identity) == 1
    others = {
        "name.nii": (voxels, np.eye(4)),
        "type.nii.gz": (voxels.astype(np.float32), np.eye(4)),
        "affine.nii.gz": (voxels, affine_of("RAS", (2, 2, 2), (9, 9, 9))),
        "orientation.nii.gz": (voxels[::-1, ::-1], affine_of("LPS")),
        "order.nii.gz": (voxels.transpose(2, 0, 1), affine_of("SRA")),
    }
    for name, (same, affine) in others.items():
        path = write_image(tmp_path / name, np.ascontiguousarray(same), affine)
        assert identify(path) == identity, name
    changed = voxels.copy()
    changed[4, 5, 6] += 1
    assert identify(write_image(tmp_path / "other.nii", changed)) != identity


def test_a_patient_in_the_header_is_an_identity_of_its_own(tmp_path):
    found = {}
    for name, described, side in (("a", "patient 7", 4), ("b", "patient 7", 8), ("c", "SPM", 8)):
        image = nib.Nifti1Image(np.full((side,) * 3, ord(name), np.int16), np.eye(4))
        image.header["descrip"] = described
        nib.save(image, tmp_path / f"{name}.nii")
        found[name] = identify(tmp_path / f"{name}.nii")
    assert set(found["a"]) & set(found["b"]) == {f"{PATIENT}7"}
    assert len(found["c"]) == 1


FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refusal(read: Callable[[Path], object], path: Path) -> str | None:
    """The message with which a file is refused; None if it is read."""
    try:
        read(path)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
@FUZZ
@given(
    changes=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=8),
    kept=st.one_of(st.none(), st.integers(0, 700)),
)
def test_any_header_is_read_or_refused_in_one_line(tmp_path, ending, changes, kept):
    voxels = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    path = write_image(tmp_path / f"a.{ending}", voxels)
    content = path.read_bytes()
    content = bytearray(gzip.decompress(content) if ending == "nii.gz" else content)
    for place, value in changes:
        content[place] = value
    content = bytes(content[:kept])
    path.write_bytes(gzip.compress(content) if ending == "nii.gz" else content)
    for read in (open_volume, read_volume, has_orientation, identify):
        line = refusal(read, path)
        assert line is None or (str(path) in line and "\n" not in line)


@FUZZ
@given(content=st.binary(max_size=600))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path, content):
    for ending in ("nii", "nii.gz"):
        path = tmp_path / f"a.{ending}"
        path.write_bytes(content)
        line = refusal(read_volume, path)
        assert line is not None
        assert "\n" not in line
