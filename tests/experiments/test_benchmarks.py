"""Benchmarks: what they compute and refuse; what they measure is in experiments/README.md."""

import shutil
import subprocess
from pathlib import Path

import pytest

from errors import InputError
from experiments.benchmarks import hardware, revisions


def test_scores_are_over_the_cases_that_have_a_region():
    def row(true: int, found: int, dice: float) -> dict[str, float]:
        names = revisions.REGIONS
        return {
            f"{key}_{region}": value
            for region in names
            for key, value in (("true", true), ("found", found), ("dice", dice))
        }

    without, nan = 0, float("nan")
    line = revisions.summary(
        [
            [row(10, 9, 0.5), row(10, 0, 0.1), row(without, 4, nan)],
            [row(10, 9, 0.7), row(10, 5, 0.3), row(without, 0, nan)],
        ]
    )
    # Means of .3 and .5, whose standard deviation is .2 / sqrt(2).
    assert line["ET (2 cases)"] == "0.400 ± 0.141"
    assert line["ET false alarms"] == "1 of 2"


def test_label_maps_are_scored_against_the_masks(brats: Path, tmp_path: Path):
    for mask in brats.rglob("*_seg.nii.gz"):
        shutil.copy(mask, tmp_path / mask.name.replace("_seg", ""))
    rows = revisions.scores_of(tmp_path, brats)
    assert len(rows) == 6
    for row in rows:
        assert row["true_WT"] > row["true_TC"] > row["true_ET"] > 0
        assert [row[f"dice_{region}"] for region in revisions.REGIONS] == [1, 1, 1]


def test_a_commit_is_checked_out_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository = tmp_path / "repository"
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    (repository / "folder").mkdir(parents=True)
    (repository / "folder" / "file").write_text("first")
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "First"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    (repository / "folder" / "file").write_text("not committed")

    monkeypatch.setattr(revisions, "HERE", repository)
    commit, title = revisions.describe("HEAD")
    assert title == "First"
    revisions.check_out(commit, tmp_path / "tree")
    assert (tmp_path / "tree" / "folder" / "file").read_text() == "first"
    with pytest.raises(InputError, match=r"no-such: expected a commit of .*, found none"):
        revisions.describe("no-such")


def test_growth_is_an_exponent_and_a_plot(tmp_path: Path):
    sizes = (1.0, 2.0, 4.0, 8.0)
    growth = {
        "voxels": [(size, 3 * size, 5 * size**0.5) for size in sizes],
        "cases": [(size, 2 * size**2, float("nan")) for size in sizes],
    }
    rows = {row.pop("what grows"): row for row in hardware.tabulate_growth(growth)}
    times = {"exponent of time": "1.00", "exponent of memory": "0.50"}
    assert rows["voxels"] == {"from": "1", "to": "8", **times}
    times = {"exponent of time": "2.00", "exponent of memory": ""}
    assert rows["cases"] == {"from": "1", "to": "8", **times}
    hardware.draw_growth(growth, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_preparation_is_measured_for_all_sizes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "composed_jobs", lambda arguments, conf: None)
    growth = hardware.measure_preparation()
    assert [[size for size, _, _ in points] for points in growth.values()] == [
        [8, 16, 32, 64],
        [8, 16, 32, 64],
        [2, 4, 8, 16],
    ]
    assert all(seconds > 0 for points in growth.values() for _, seconds, _ in points)
