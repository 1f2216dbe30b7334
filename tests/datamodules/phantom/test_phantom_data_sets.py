"""Folders of phantoms on disk, and the command that writes them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock

from datamodules.phantom import MODALITIES, make_phantom, write_phantoms
from datamodules.phantom.patient import VERSION
from errors import InputError
from files import PREFIX
from tests.conftest import ROOT

COMMAND = (sys.executable, "-m", "datamodules.phantom")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms")
    write_phantoms(root, 3, spacing_mm=6, seed=0, workers=1)
    return root


def volumes(root: Path) -> dict[str, bytes]:
    """The voxels of all files of a folder of gliomas."""
    return {
        str(path.relative_to(root)): np.asarray(
            nib.Nifti1Image.from_filename(path).dataobj
        ).tobytes()
        for path in sorted(root.glob("*/*/*.nii.gz"))
    }


def test_files(written: Path) -> None:
    folders = sorted(written.glob("*GG/phantom_*"))
    assert [folder.name for folder in sorted(folders, key=lambda f: f.name)] == [
        f"phantom_{index:04d}" for index in range(3)
    ]
    for folder in folders:
        case = make_phantom(0, int(folder.name[-4:]), 6)
        assert folder.parent.name == case.grade
        for name, volume in {**case.images, "seg": case.labels}.items():
            image = nib.Nifti1Image.from_filename(folder / f"{folder.name}_{name}.nii.gz")
            assert image.get_data_dtype() == volume.dtype
            np.testing.assert_array_equal(image.dataobj, volume)
            for affine in (image.get_sform(), image.get_qform()):
                np.testing.assert_allclose(affine, case.affine, atol=1e-5)
    settings = json.loads((written / "phantoms.json").read_text())
    assert settings == {
        "version": VERSION,
        "seed": 0,
        "spacing_mm": 6.0,
        "kind": "glioma",
        "modalities": sorted(MODALITIES),
        "families": ["classic"],
    }


def test_extending_keeps_what_is_there_and_equals_writing_at_once(
    written: Path, tmp_path: Path
) -> None:
    write_phantoms(tmp_path, 1, spacing_mm=6, seed=0, workers=1)
    first = next(tmp_path.glob("*/*/*_t1.nii.gz"))
    before = first.stat().st_mtime_ns
    write_phantoms(tmp_path, 3, spacing_mm=6, seed=0, workers=2)
    assert first.stat().st_mtime_ns == before
    assert volumes(tmp_path) == volumes(written)


def test_other_settings_are_refused(written: Path) -> None:
    before = volumes(written)
    for settings in ({"spacing_mm": 6, "seed": 1}, {"spacing_mm": 5, "seed": 0}):
        with pytest.raises(InputError, match=r"phantoms\.json") as error:
            write_phantoms(written, 4, **settings, workers=1)
        assert "\n" not in str(error.value)
        assert all(str(value) in str(error.value) for value in settings.values())
    assert volumes(written) == before


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="spacing_mm"):
        write_phantoms(tmp_path / "new", 1, spacing_mm=0, seed=0)
    with pytest.raises(InputError, match="count"):
        write_phantoms(tmp_path / "new", -1, spacing_mm=6, seed=0)
    assert not (tmp_path / "new").exists()


def test_a_case_that_fails_half_way_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = nib.save, []

    def full_disk(image: nib.Nifti1Image, path: Path) -> None:
        if saved:
            raise OSError("no space left on device")
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_phantoms(tmp_path, 1, spacing_mm=6, seed=0, workers=1)
    assert saved
    assert not list(tmp_path.glob("*GG/*"))
    assert not list(tmp_path.rglob("*.nii.gz"))

    monkeypatch.undo()
    write_phantoms(tmp_path, 1, spacing_mm=6, seed=0, workers=1)
    assert len(volumes(tmp_path)) == 5


def test_a_case_that_another_process_wrote_first_stays(written: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".phantoms.lock"):  # as the other process holds it while it writes
        late = subprocess.Popen(
            [*COMMAND, str(tmp_path), "--cases", "3", "--spacing-mm", "6"], cwd=ROOT
        )
        time.sleep(1)
        assert late.poll() is None
        assert not volumes(tmp_path)
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(written, tmp_path, ignore=hidden, dirs_exist_ok=True)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*.nii.gz")}
    assert late.wait() == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*.nii.gz")} == before
    assert volumes(tmp_path) == volumes(written)
    assert not [path for path in tmp_path.rglob(".*") if path.is_dir()]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )


def test_command_line(written: Path, tmp_path: Path) -> None:
    done = run(str(tmp_path), "--cases", "1", "--spacing-mm", "6", "--seed", "0", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert set(volumes(tmp_path)) < set(volumes(written))

    refused = run(str(written), "--cases", "1", "--spacing-mm", "6", "--seed", "9")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


def test_help_and_typos_load_nothing_heavy() -> None:
    command = "import sys; from datamodules.phantom.__main__ import main; main(['--help'])"
    code = f"try:\n {command}\nfinally:\n print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "--spacing-mm" in done.stdout
    assert {"scipy", "nibabel", "nilearn", "rich", "torch"}.isdisjoint(done.stderr.split())

    start = time.monotonic()
    assert run("--casse", "1").returncode == 2
    assert time.monotonic() - start < 5  # under a second on an idle machine


def test_phantoms_are_not_written_among_other_files(tmp_path: Path) -> None:
    """The folder of scans that `data.data_set.root=FOLDER` names without `data=brats`."""
    (tmp_path / "BraTS2021_00000").mkdir()
    with pytest.raises(InputError, match=r"expected an empty folder .* found BraTS2021_00000"):
        write_phantoms(tmp_path, 1, spacing_mm=6, seed=0, workers=1)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["BraTS2021_00000"]


@pytest.mark.parametrize("content", ["", "{", "[]", b"\xff\xfe", '{"version": 1}'])
def test_broken_settings_are_one_line(tmp_path: Path, content: str | bytes) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "phantoms.json").write_bytes(raw)
    with pytest.raises(InputError, match=r"phantoms.json: expected .*; remove the folder") as error:
        write_phantoms(tmp_path, 1, spacing_mm=6, seed=0, workers=1)
    assert "\n" not in str(error.value)


def test_killed_while_it_writes_a_case_the_command_goes_on(written: Path, tmp_path: Path) -> None:
    command = [*COMMAND, str(tmp_path / "new"), "--cases", "3", "--spacing-mm", "6"]
    process = subprocess.Popen([*command, "--workers", "1"], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "new").glob(f"*/{PREFIX}*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    write_phantoms(tmp_path / "new", 3, spacing_mm=6, seed=0, workers=1)
    assert volumes(tmp_path / "new") == volumes(written)
    assert not list((tmp_path / "new").glob(f"*/{PREFIX}*"))
