"""A fault planted in each of many phantoms is found, and nothing in those without."""

import gzip
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import grids
from datamodules.brats import BraTS
from datamodules.cases import Case
from datamodules.checks import Coarse, Finding, skull
from datamodules.doctor import diagnose
from datamodules.metastases import Metastases
from datamodules.phantom import MetastasisPhantoms, write_phantoms
from experiments.doctor import report
from tests.conftest import MODALITIES, ROOT, ball

pytestmark = pytest.mark.process  # phantoms take half a second each

KINDS = (*MODALITIES, "seg")


class Files:
    """The files of one phantom, to be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str) -> Path:
        return self.folder / f"{self.folder.name}_{kind}.nii.gz"

    def edit(self, kind: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change the voxels of a file."""
        image = nib.load(self.path(kind))
        voxels = change(np.asanyarray(image.dataobj).copy())
        nib.save(nib.Nifti1Image(voxels, image.affine), self.path(kind))

    def edit_header(self, kind: str, offset: int, *values: int) -> None:
        """Write 16-bit numbers into a header."""
        raw = bytearray(gzip.decompress(self.path(kind).read_bytes()))
        struct.pack_into(f"<{len(values)}h", raw, offset, *values)
        self.path(kind).write_bytes(gzip.compress(raw))

    def swap(self, one: str, other: str) -> None:
        spare = self.folder / "spare"
        self.path(one).rename(spare)
        self.path(other).rename(self.path(one))
        spare.rename(self.path(other))


def relabel(files: Files, new: dict[int, int]) -> None:
    files.edit("seg", lambda labels: np.vectorize(lambda n: new.get(n, n))(labels).astype(np.uint8))


def set_voxel(files: Files, kind: str, value: float) -> None:
    """Set a voxel inside the brain."""

    def change(voxels: np.ndarray) -> np.ndarray:
        voxels = voxels.astype(np.float32)
        voxels[tuple(np.argwhere(voxels)[1000])] = value
        return voxels

    files.edit(kind, change)


def shift_header(files: Files, kind: str, scale: float, shift_mm: float) -> None:
    image = nib.load(files.path(kind))
    affine = image.affine @ np.diag([scale, scale, scale, 1])
    affine[0, 3] += shift_mm
    voxels = np.asanyarray(image.dataobj)
    nib.save(nib.Nifti1Image(voxels, affine), files.path(kind))


def with_skull(image: np.ndarray) -> np.ndarray:
    """Put two voxels of dark bone and two of bright scalp around a brain."""
    distance = np.asarray(ndimage.distance_transform_edt(image == 0))
    bright = int(np.median(image[image > 0]))
    image[(distance > 0) & (distance <= 2)] = bright // 10
    image[(distance > 2) & (distance <= 4)] = bright
    return image


def for_all(
    kinds: tuple[str, ...], change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[Files], object]:
    """Make a fault that changes the voxels of several files."""
    return lambda files: [files.edit(kind, change) for kind in kinds]


def in_the_air(labels: np.ndarray) -> np.ndarray:
    moved = np.zeros_like(labels)
    box = grids.bounding_box(labels > 0)
    size = [side.stop - side.start for side in box]
    moved[tuple(slice(0, side) for side in size)] = labels[box]
    return moved


def damage_checksum(files: Files) -> None:
    content = bytearray(files.path("t1").read_bytes())
    content[-6] ^= 1
    files.path("t1").write_bytes(content)


def cut_off(files: Files) -> None:
    content = files.path("flair").read_bytes()
    files.path("flair").write_bytes(content[: len(content) // 2])


def sheared(files: Files) -> None:
    image = nib.load(files.path("t2"))
    affine = image.affine.copy()
    affine[0, 1] = affine[0, 0] / 5
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), files.path("t2"))


def of_another_case(files: Files) -> None:
    """Copy the scans of the first phantom."""
    first = Files(files.folder.parents[1] / "HGG" / "phantom_0000")
    for kind in KINDS:
        shutil.copy(first.path(kind), files.path(kind))


# Name -> damage, severity, words of the finding. The first ones need enhancing tumour: high grade.
FAULTS: dict[str, tuple[Callable[[Files], object], str, str]] = {
    "t1 and t1ce swapped": (lambda f: f.swap("t1", "t1ce"), "warning", "t1ce.*swapped"),
    "labels 2 and 4 swapped": (lambda f: relabel(f, {2: 4, 4: 2}), "warning", "seg.*swapped"),
    "labels 1 and 2 swapped": (lambda f: relabel(f, {1: 2, 2: 1}), "warning", "oedema .*swapped"),
    "labels 1 and 4 swapped": (lambda f: relabel(f, {1: 4, 4: 1}), "warning", "label 4 to enhance"),
    "t2 and flair swapped": (lambda f: f.swap("t2", "flair"), "warning", "CSF, found it in flair"),
    "t1 and t2 swapped": (lambda f: f.swap("t1", "t2"), "warning", "CSF, found it in t1:"),
    "t1ce and t2 swapped": (lambda f: f.swap("t1ce", "t2"), "warning", "CSF, found it in t1ce"),
    "t1 and flair swapped": (
        lambda f: f.swap("t1", "flair"),
        "warning",
        "flair.* in t1,",
    ),
    "t1ce and flair swapped": (lambda f: f.swap("t1ce", "flair"), "warning", "flair.*swapped"),
    "label 7": (lambda f: relabel(f, {2: 7}), "error", "seg.* found label 7"),
    "mask in the air": (lambda f: f.edit("seg", in_the_air), "error", "seg.* inside the brain"),
    "mask shifted": (
        lambda f: shift_header(f, "seg", 1, 50),
        "error",
        "seg.*: expected the grid of .*t1.* shifted by 50, 0, 0 mm",
    ),
    "t2 missing": (lambda f: f.path("t2").unlink(), "error", "has no t2"),
    "another case": (of_another_case, "error", "case phantom_0000, .*t1, t1ce, t2, flair"),
    "checksum": (damage_checksum, "error", "t1.nii.gz: .* CRC check failed"),
    "cut off": (cut_off, "error", "flair.nii.gz: expected a readable NIfTI file"),
    "no image": (lambda f: f.path("t1").write_text("hello"), "error", "t1.nii.gz: expected a read"),
    "outlier": (lambda f: set_voxel(f, "t2", 3e37), "error", "t2.*expected no outliers.* 3e\\+37"),
    "NaN": (lambda f: set_voxel(f, "t2", np.nan), "error", "t2.*found 1 NaN"),
    "complex": (for_all(("t1",), np.complex64), "error", "t1.*expected real numbers"),
    "huge header": (
        lambda f: f.edit_header("flair", 42, 30000, 30000, 30000),
        "error",
        "flair.*found a header of 30000 x 30000 x 30000",
    ),
    "no axes": (
        lambda f: [f.edit_header(kind, 252, 0, 0) for kind in KINDS],
        "warning",
        "t1.* found neither in 5 of 5 files",
    ),
    "sheared": (sheared, "error", "t2.*expected orthogonal axes"),
    "skull": (for_all(MODALITIES, with_skull), "error", "stripped brain .* litres"),
    "skull in one": (for_all(("t2",), with_skull), "error", "t2.*stripped brain .* litres"),
    "constant": (for_all(("t1ce",), np.zeros_like), "error", "t1ce.*expected different values"),
    "one turned": (for_all(("t2",), lambda v: v[:, ::-1]), "warning", "t2.*a Dice of"),
    "upside down": (for_all(KINDS, lambda v: v[:, :, ::-1]), "warning", "top at inferior"),
    "back to front": (for_all(KINDS, lambda v: v[:, ::-1]), "warning", "front at .* posterior"),
    "a copy": (
        lambda f: shutil.copy(f.path("t1"), f.path("t1ce")),
        "error",
        "t1ce.*expected another image than t1",
    ),
    "no mask": (lambda f: f.path("seg").unlink(), "warning", "expected a mask as the others have"),
    "empty mask": (for_all(("seg",), np.zeros_like), "note", "no voxel has a label"),
    "wrong spacing": (
        lambda f: [shift_header(f, kind, 0.5, 0) for kind in KINDS],
        "warning",
        "t1.*expected a brain of 0.5 litres",
    ),
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor") / "phantoms"
    write_phantoms(root, len(FAULTS) + 4, spacing_mm=4, seed=0, workers=1)
    return root


def test_nothing_is_found_in_an_untouched_set(phantoms: Path):
    count, findings = diagnose(BraTS(phantoms), workers=2)
    assert count == len(FAULTS) + 4
    assert findings == []


def test_every_planted_fault_is_found(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = tmp_path / "faults"
    shutil.copytree(phantoms, root)
    # The first phantom stays as it is: it is copied to another one. High grades come first.
    folders = [*sorted(root.glob("HGG/*"))[1:], *sorted(root.glob("LGG/*"))]
    planted = dict(zip(FAULTS, folders, strict=False))
    before = {}
    for name, folder in planted.items():
        FAULTS[name][0](Files(folder))
    for path in root.rglob("*.nii.gz"):
        before[path] = path.read_bytes()
    written = tmp_path / "findings.json"

    assert not report(BraTS(root), workers=2, json=str(written))

    content = json.loads(written.read_text())
    findings = [Finding(**finding) for finding in content["findings"]]
    for name, folder in planted.items():
        _, severity, words = FAULTS[name]
        own = [f for f in findings if folder.name in (f.case, Path(f.message.split(":")[0]).name)]
        print(f"{name:24}", *(f"{f.severity}: {f.message}" for f in own), sep=" | ")
        assert any(f.severity == severity for f in own), (name, own)
        assert any(re.search(words, f.message) for f in own), (name, own)
    touched = {folder.name for folder in planted.values()}
    others = [f for f in findings if f.case and f.case not in touched]
    assert others == []
    assert {path: path.read_bytes() for path in root.rglob("*.nii.gz")} == before
    shown = capsys.readouterr().out
    assert "Left and right look alike" in shown


def test_bone_around_a_small_brain_is_found():
    """Its head is no larger than other brains are, and the air around it is constant."""
    centre = (30, 30, 30)
    for bone, found in ((0.2, True), (0.9, False)):
        image = np.zeros((61, 61, 61), np.float32)
        for radius, value in ((17, 900), (15, 1000 * bone), (13, 1000)):
            image[ball(image.shape, centre, radius)] = value
        case = Case("A", {"t1": Path("t1.nii.gz")}, None)
        scan = Coarse(case, {"t1": image}, {"t1": image > 0}, None, np.diag([4, 4, 4, 1]))
        assert [bool(re.search("t1.nii.gz: .* found bone", f.message)) for f in skull(scan)] == [
            True
        ] * found


def test_metastases_are_examined_too(tmp_path: Path):
    phantoms = MetastasisPhantoms(tmp_path / "data", 3, 4)
    phantoms.prepare()
    assert diagnose(Metastases(tmp_path / "data"), workers=1) == (3, [])
    (tmp_path / "data/phantom_0001/phantom_0001_t1ce.nii.gz").unlink()
    count, (finding,) = diagnose(Metastases(tmp_path / "data"), workers=1)
    assert (count, finding.severity) == (3, "error")
    assert "phantom_0001: expected t1ce.nii.gz" in finding.message


def test_the_command_ends_with_1_if_there_are_errors(brats: Path, tmp_path: Path):
    """And with one line if there is no data set; balls of 5 cm³ are small brains."""
    shutil.copytree(brats, tmp_path / "bad")
    (tmp_path / "bad/BraTS2021_00002/BraTS2021_00002_t2.nii.gz").write_bytes(b"broken")
    for root, code, expected in (
        (brats, 0, "6 cases: 0 errors, 6 warnings"),
        (tmp_path / "bad", 1, "6 cases: 1 errors, 6 warnings"),
        (tmp_path / "nowhere", 1, "nowhere: no such folder"),
    ):
        done = subprocess.run(
            [sys.executable, "doctor.py", "data=brats", f"data.data_set.root={root}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (code, "")
        assert expected in done.stdout


def test_help_is_said_at_once():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "doctor.py", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "python doctor.py data=brats data.data_set.root=FOLDER" in done.stdout
    assert not re.search(r"\| (numpy|torch|rich|scipy)$", done.stderr, re.MULTILINE)
