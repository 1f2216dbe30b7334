"""Files and folders that are there whole or not at all."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import files
from errors import InputError
from files import PREFIX, write_json, write_text, written_whole
from tests.conftest import ROOT


def content(folder: Path) -> dict[str, str]:
    """Path -> text of every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_file_appears_when_all_of_it_is_written(tmp_path: Path):
    path = tmp_path / "new" / "a.nii.gz"
    with written_whole(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        assert partial.parent == path.parent  # one file system
        assert partial.name.endswith("a.nii.gz")
        assert partial.name.startswith(".")
    assert content(tmp_path) == {"new/a.nii.gz": "half"}


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path):
    for text in ("old", "new"):
        with written_whole(tmp_path / "case") as partial:
            partial.mkdir()
            (partial / text).write_text(text)
            (partial / "inner").mkdir()
            (partial / "inner" / "file").write_text(text)
    assert content(tmp_path) == {"case/new": "new", "case/inner/file": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_folder", [False, True])
def test_an_exception_leaves_the_old_and_nothing_else(
    tmp_path: Path, error: type[BaseException], is_folder: bool
):
    target = tmp_path / "a"
    write_text(target / "file" if is_folder else target, "old")
    before = content(tmp_path)

    def fail() -> None:
        with written_whole(target) as partial:
            if is_folder:
                partial.mkdir()
            (partial / "file" if is_folder else partial).write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_killed_process_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    code = (
        "import sys, time; from pathlib import Path; from files import written_whole\n"
        "with written_whole(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n"
        "    Path(sys.argv[2]).touch()\n"
        "    time.sleep(60)\n"
    )
    begun = tmp_path / "begun"
    process = subprocess.Popen([sys.executable, "-c", code, path, begun], cwd=ROOT)
    try:
        while not begun.exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 3  # with `begun` and half of a file
    write_text(path, "new")
    assert content(tmp_path) == {"a.txt": "new", "begun": ""}


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path):
    (tmp_path / f"{PREFIX}{os.getpid()}-a").mkdir()
    (tmp_path / f"{PREFIX}{os.getpid()}-a" / "file").write_text("half")
    write_text(tmp_path / "a", "new")
    assert content(tmp_path) == {"a": "new"}


def test_what_another_process_is_writing_stays(tmp_path: Path):
    begun = tmp_path / f"{PREFIX}{os.getppid()}-a"
    begun.write_text("half")
    write_text(tmp_path / "a", "new")
    assert content(tmp_path) == {"a": "new", begun.name: "half"}


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(2**20)),
        lambda path: np.save(path, np.ones(2**17)),
        lambda path: torch.save(torch.ones(2**18), path),
    ],
    ids=["bytes", "numpy", "torch"],
)
def test_a_full_disk_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Any]
):
    """The limit is on the size of a file instead: a disk of a few kB takes root to make."""
    monkeypatch.setattr(files, "LEAST_FREE", 2**60)  # for torch, which raises a RuntimeError
    path = tmp_path / "a.npy"
    path.write_text("old")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, usual[1]))
    try:
        with pytest.raises(InputError, match="no room on the disk"), written_whole(path) as partial:
            write(partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert content(tmp_path) == {"a.npy": "old"}


def test_json_is_readable_by_people_too(tmp_path: Path):
    values = {"b": [1, 2.5], "a": None}
    write_json(tmp_path / "a.json", values)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == values
    assert list(json.loads(text)) == ["b", "a"]
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 2
