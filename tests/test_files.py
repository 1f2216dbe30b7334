"""Files and folders that are there whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from files import write_json, write_text, written_whole
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
    write_text(path, "new")
    assert path.read_text() == "new"


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path):
    (tmp_path / f".partial-{os.getpid()}-a").mkdir()
    (tmp_path / f".partial-{os.getpid()}-a" / "file").write_text("half")
    write_text(tmp_path / "a", "new")
    assert content(tmp_path) == {"a": "new"}


def test_json_is_readable_by_people_too(tmp_path: Path):
    values = {"b": [1, 2.5], "a": None}
    write_json(tmp_path / "a.json", values)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == values
    assert list(json.loads(text)) == ["b", "a"]
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 2
