"""The report of a sweep over factors: on made-up scores, and after a sweep that was killed."""

import csv
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from errors import InputError
from experiments import krivov2018, null_report
from experiments.command import command
from experiments.cost import Cost
from experiments.null_report import compare_all
from experiments.results import Results
from experiments.run import RunFolder
from experiments.sweep import BASELINE_CELL, Cell, read_sweep
from lightning_modules.callbacks import SeedEveryStep
from tests.conftest import ROOT

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
COST = Cost(parameters=1000, widths=[8, 16], gflops=1.5, memory_mib=20.0)


def write_run(folder: Path, scores: np.ndarray, shift: float = 0.0) -> None:
    """Write a finished run whose Dice of every region is `scores` (N,) of N cases plus a shift."""
    folder.mkdir(parents=True)
    rows = [
        {"case": f"case_{number}", **{f"dice_{r}": value + shift for r in ("WT", "TC", "ET")}}
        for number, value in enumerate(scores)
    ]
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for version, epochs in enumerate(((0, 1), (1, 2))):  # stopped in epoch 1 and resumed
        path = folder / f"csv/version_{version}/metrics.csv"
        path.parent.mkdir(parents=True)
        path.write_text(
            "epoch,step,val/dice\n" + "".join(f"{e},{e},{(e + version) / 10}\n" for e in epochs)
        )
    Results(
        run=folder.name,
        choices={},
        metrics={},
        cost=COST,
        epochs=3,
        fit_s=60.0,
        test_s=6.0,
        peak_memory_mib=500.0,
        device="cpu",
    ).write(RunFolder(folder))


BATCH, SHALLOW = Cell("norm", "batch"), Cell("model.depth", "2")
SHIFTS = {BASELINE_CELL: 0.0, BATCH: 0.0, SHALLOW: -0.2}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three seeds of a baseline, of a level that changes nothing, and of a level that harms."""
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0.6, 0.8, 12)
    planned = []
    for (factor, level), shift in SHIFTS.items():
        for seed in range(3):
            run = f"{factor}-{level}-s{seed}"
            planned.append({"run": run, "seed": seed, "factor": factor, "level": level})
            noise = rng.normal(0, 0.004, 12) + rng.normal(0, 0.002)
            write_run(tmp_path / run, difficulty + noise, shift)
    plan = {
        "stated": "2020-01-01T00:00:00+00:00",
        "report": {"margin": {"WT": 0.02, "TC": 0.02, "ET": 0.02}, "alpha": 0.05},
        "commands": [
            "python train.py experiment=null_report factors=norm",
            "python train.py experiment=null_report factors=model.depth",
        ],
        "cells": planned,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


def test_verdicts_of_a_planted_effect_and_of_none(sweep: Path):
    found = compare_all(read_sweep(sweep))
    assert len(found) == 6
    for region in ("WT", "TC", "ET"):
        crippled = found[SHALLOW, region]
        assert crippled.verdict == "different"
        assert crippled.difference == pytest.approx(-0.2, abs=0.01)
        assert crippled.low < -0.2 < crippled.high
        assert found[BATCH, region].verdict == "equivalent"


def test_report_of_a_whole_sweep(sweep: Path):
    page = null_report.write_report(sweep)
    output = sweep / "report"
    assert page == output / "null_report.html"
    text = (output / "null_report.md").read_text()
    assert "6 comparisons with the baseline: 3 different, 3 equivalent, 0 undecided." in text
    assert "9 of 9 runs are finished; 12 test cases" in text
    with (output / "null_report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["factor"], row["region"]) for row in rows[:3]] == [
        ("norm", "WT"),
        ("norm", "TC"),
        ("norm", "ET"),
    ]
    html = page.read_text()
    assert html.count('class="verdict different"') == 3
    assert not re.search(r"<script|<link|<img|\bsrc=|url\(", html.replace("url(#", ""))
    targets = re.findall(r'href="([^"]*)"', html)
    assert sum(target.startswith("..") for target in targets) == 9
    for target in targets:  # symbols of the page itself, and folders of runs
        assert target.startswith("#") or (output / target / "results.json").is_file()


def test_report_of_a_half_done_sweep(sweep: Path):
    for run in ("model.depth-2-s0", "model.depth-2-s1", "model.depth-2-s2", "norm-batch-s2"):
        (sweep / run / "results.json").unlink()
    null_report.write_report(sweep)
    text = (sweep / "report/null_report.md").read_text()
    assert "5 of 9 runs are finished" in text
    for line in (
        "- model.depth=2 seed=0 (model.depth-2-s0)",
        "- norm=batch seed=2 (",
        "python train.py experiment=null_report factors=model.depth",
    ):
        assert line in text
    found = compare_all(read_sweep(sweep))
    assert found[BATCH, "WT"].level_seeds == 2
    # It was planned, so it belongs to the family, although it has no finished run.
    assert found[SHALLOW, "WT"].level_seeds == 0
    assert found[SHALLOW, "WT"].verdict == "undecided"


def test_one_seed_decides_nothing(sweep: Path):
    for run in sweep.glob("*-s[12]/results.json"):
        run.unlink()
    null_report.write_report(sweep)
    found = compare_all(read_sweep(sweep))
    assert {comparison.verdict for comparison in found.values()} == {"undecided"}
    assert all(math.isnan(comparison.low) for comparison in found.values())


def test_a_baseline_alone_is_a_report(sweep: Path):
    for run in sweep.glob("[nm]*-s*/results.json"):
        run.unlink()
    null_report.write_report(sweep)
    assert (
        "6 comparisons with the baseline: 0 different, 0 equivalent, 6 undecided"
        in (sweep / "report/null_report.md").read_text()
    )


def test_learning_curve_of_a_resumed_run(sweep: Path):
    run = read_sweep(sweep).runs_of(BATCH)[0]
    assert run.learning_curve().tolist() == [[0, 0.0], [1, 0.2], [2, 0.3]]


def test_other_test_cases_are_refused(sweep: Path):
    path = sweep / "norm-batch-s1/cases.csv"
    path.write_text(path.read_text().replace("case_3", "case_99"))
    with pytest.raises(InputError, match=r"norm-batch-s1: tested on other cases than"):
        read_sweep(sweep)


@pytest.mark.process
def test_what_is_no_sweep_is_one_line(tmp_path: Path):
    command = ["-m", "experiments.null_report", str(tmp_path / "nowhere")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "nowhere/plan.json: not found; expected the folder of a sweep" in done.stderr


def test_without_a_baseline_there_is_no_report(sweep: Path):
    for run in sweep.glob("baseline*/results.json"):
        run.unlink()
    with pytest.raises(InputError, match="the baseline has no finished run yet"):
        null_report.main([str(sweep)])


def test_cells_show_unequal_budgets(sweep: Path):
    run = RunFolder(sweep / "model.depth-2-s0")
    assert Results.read(run).cost == COST
    replace(Results.read(run), cost=replace(COST, parameters=7)).write(run)
    rows = null_report.cell_rows(read_sweep(sweep))
    assert [row["parameters"] for row in rows] == ["1,000", "1,000", "7"]


@pytest.fixture
def run_sweep(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `python train.py ...` in this process; return its exit code."""

    def run(folder: Path, *arguments: str) -> int:
        ours = [o for o in tiny if not o.startswith(("run_dir", "trainer.max_epochs"))]
        words = ["train.py", *arguments, *ours, "logger=csv", f"hydra.sweep.dir={folder}"]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words)
            patch.chdir(ROOT)
            try:
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            except SystemExit as stop:
                return int(stop.code or 0)
            except PowerCutError:
                return 1
        return 0

    return run


class PowerCutError(Exception):
    """The machine stops in the middle of a training step."""


@pytest.mark.process
def test_a_killed_sweep_ends_with_the_same_table(
    run_sweep: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["experiment=null_report", "factors=norm", "seed=0,1", "trainer.max_epochs=2"]
    arguments += ["patches.epochs_per_validation=1"]  # a checkpoint is written at a validation
    assert run_sweep(tmp_path / "whole", *arguments) == 0
    planned = json.loads((tmp_path / "whole/plan.json").read_text())["cells"]
    assert [(cell["seed"], cell["factor"], cell["level"]) for cell in planned] == [
        (0, "baseline", "baseline"),
        (0, "norm", "batch"),
        (1, "baseline", "baseline"),
        (1, "norm", "batch"),
    ]

    start_step = SeedEveryStep.on_train_batch_start
    trained = []

    def die(self, trainer, module, batch, batch_idx):
        trained.append(trainer.default_root_dir)
        if trainer.current_epoch == 1 and "batch-s0" in trainer.default_root_dir:
            raise PowerCutError("power is out")
        start_step(self, trainer, module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SeedEveryStep, "on_train_batch_start", die)
        assert run_sweep(tmp_path / "killed", *arguments) == 1
    # The report is written all the same.
    text = (tmp_path / "killed/report/null_report.md").read_text()
    assert "3 of 4 runs are finished" in text
    (missing,) = [
        run for run in (tmp_path / "killed").glob("aeunet-*") if not RunFolder(run).is_finished
    ]
    assert f"- norm=batch seed=0 ({missing.name})" in text
    assert "PowerCutError: power is out" in (missing / "train.log").read_text()

    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            SeedEveryStep,
            "on_train_batch_start",
            lambda self, trainer, *rest: (
                trained.append((trainer.default_root_dir, trainer.current_epoch)),
                start_step(self, trainer, *rest),
            )[1],
        )
        assert run_sweep(tmp_path / "killed", *arguments) == 0
    assert set(trained) == {(str(missing), 1)}  # no other run, and not its first epoch
    for name in ("null_report.csv", "forest.png"):
        whole, killed = (tmp_path / s / "report" / name for s in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), name


@pytest.mark.parametrize("wants", [null_report, krivov2018], ids=["null report", "detection"])
def test_a_report_that_fails_is_one_line_and_an_exit_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wants: Any
):
    (tmp_path / "plan.json").write_text("{")
    settings = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    report = wants.WriteReport()
    report.on_multirun_start(config=settings)
    report.on_multirun_end(config=settings)
    with pytest.raises(SystemExit) as stop, command():
        pass
    assert stop.value.code == 1
    assert str(tmp_path) in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]


@pytest.mark.process
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome found")
def test_the_page_opens_in_a_browser(sweep: Path):
    page = null_report.write_report(sweep)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2000"]
    picture = sweep / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True, timeout=120)
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or ()}
    # The colours of verdicts are there if the style was applied and the figure was drawn.
    assert {(0xD1, 0x49, 0x5B), (0x2A, 0x9D, 0x8F)} <= colours
