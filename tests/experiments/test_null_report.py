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
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

import train
from errors import InputError
from experiments import krivov2018, null_report
from experiments.benchmarks import controls
from experiments.command import command
from experiments.cost import Cost
from experiments.results import Results
from experiments.run import RunFolder
from experiments.statistics import compare
from experiments.sweep import BASELINE_CELL, Cell, read_sweep
from experiments.verdicts import collapses, is_needless, is_settled, judge
from hydra_plugins.one_factor_sweeper import looks_of
from lightning_modules.callbacks import SeedEveryStep
from tests.conftest import ROOT

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
COST = Cost(parameters=1000, widths=[8, 16], gflops=1.5, memory_mib=20.0)


def write_run(folder: Path, scores: np.ndarray, shift: float = 0.0) -> None:
    """Write a finished run whose Dice of every region is `scores` (N,) of N cases plus a shift.

    There is no ET in the first case, and 5 mm3 of it are predicted there.
    """
    folder.mkdir(parents=True)
    rows = [
        {
            "case": f"case_{number}",
            **{f"dice_{r}": value + shift for r in ("WT", "TC", "ET")},
            **{f"false_alarm_mm3_{r}": math.nan for r in ("WT", "TC", "ET")},
        }
        for number, value in enumerate(scores)
    ]
    rows[0] |= {"dice_ET": math.nan, "false_alarm_mm3_ET": 5.0}
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


def write_sweep(
    folder: Path,
    shifts: dict[Cell, float] = SHIFTS,
    seeds: int = 3,
    looks: tuple[int, ...] = (),
    sd: float = 0.002,
) -> Path:
    """Write a finished sweep, whose cells have an own shift, and `sd` between their own seeds."""
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0.6, 0.8, 12)
    of_seed = rng.normal(0, 0.02, seeds)  # alike in all cells
    planned = []
    for (factor, level), shift in shifts.items():
        for seed in range(seeds):
            run = f"{factor}-{level}-s{seed}"
            planned.append(
                {"run": run, "seed": seed, "factor": factor, "level": level, "family": 0}
            )
            noise = rng.normal(0, 0.004, 12) + rng.normal(0, sd) + of_seed[seed]
            write_run(folder / run, difficulty + noise, shift)
    plan = {
        "stated": "2020-01-01T00:00:00+00:00",
        "report": {"margin": {"WT": 0.02, "TC": 0.03}, "reason": "raters", "alpha": 0.05},
        "seeds": list(range(seeds)),
        "looks": looks_of(seeds, looks, 0.05),
        "commands": [
            "python train.py experiment=null_report factors=norm",
            "python train.py experiment=null_report factors=model.depth",
        ],
        "cells": planned,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three seeds of a baseline, of a level that changes nothing, and of a level that harms."""
    return write_sweep(tmp_path)


def remove(folder: Path, *patterns: str) -> None:
    """Make finished runs unfinished."""
    for pattern in patterns:
        for file in folder.glob(f"{pattern}/results.json"):
            file.unlink()


def words(folder: Path) -> list[str]:
    """Return the verdicts on the two levels."""
    verdicts = judge(read_sweep(folder))
    return [verdicts[cell].verdict for cell in (BATCH, SHALLOW)]


def test_verdicts_of_a_planted_effect_and_of_none(sweep: Path):
    found = judge(read_sweep(sweep))
    assert [level.verdict for level in found.values()] == ["equivalent", "different"]
    for region in ("WT", "TC"):
        crippled = found[SHALLOW].regions[region]
        estimate = crippled.comparison.estimate
        low, high = estimate.interval(0.95)
        assert crippled.verdict == "different"
        assert estimate.difference == pytest.approx(-0.2, abs=0.01)
        assert low < -0.2 < high
        assert found[BATCH].regions[region].verdict == "equivalent"
    # No run of three has collapsed: up to 63 % would still do so in one of twenty sweeps.
    assert found[BATCH].assumption == "if at most 63% of runs collapse"
    assert found[SHALLOW].assumption == ""


def test_a_difference_below_the_margin_is_both(tmp_path: Path):
    shifts = {BASELINE_CELL: 0.0, BATCH: 0.01, SHALLOW: 0.0}
    folder = write_sweep(tmp_path, shifts, seeds=8)
    assert words(folder) == ["different, but less than the margin", "equivalent"]
    null_report.write_report(folder)
    text = (folder / "report/null_report.md").read_text()
    assert "1 equivalent; 1 different, but less than the margin; 0 undecided." in text


def test_the_sensitivity_is_that_after_the_correction(sweep: Path):
    """Two levels, two regions, one look."""
    found = judge(read_sweep(sweep))[BATCH].regions["WT"]
    estimate = found.comparison.estimate
    assert found.detectable == estimate.detectable(0.05 / 4) > estimate.detectable(0.05)
    assert found.provable == estimate.provable(0.05 / 2)


def test_a_level_that_is_equivalent_in_one_region_only_is_undecided(sweep: Path):
    path = sweep / "plan.json"
    path.write_text(path.read_text().replace('"TC": 0.03', '"TC": 0.0001'))
    level = judge(read_sweep(sweep))[BATCH]
    assert level.verdict == "undecided"
    assert [found.verdict for found in level.regions.values()] == ["equivalent", "undecided"]


def test_verdicts_are_given_at_looks_only(tmp_path: Path):
    """The looks are after 3 and 6 seeds; what is between them decides nothing."""
    folder = write_sweep(tmp_path, seeds=6, looks=(3,))
    (first, last) = read_sweep(folder).looks
    assert (first.seeds, last.seeds) == (3, 6)
    assert first.alpha + last.alpha == pytest.approx(0.05)
    remove(folder, "*-s[2-5]")
    assert words(folder) == ["undecided", "undecided"]
    level = judge(read_sweep(folder))[SHALLOW]
    assert (level.look, level.seeds) == (-1, 2)
    assert math.isnan(level.regions["WT"].detectable)


def test_a_decided_level_keeps_its_verdict_and_trains_no_more(tmp_path: Path):
    """One level is decided at the first look; the other vacillates from seed to seed."""
    folder = write_sweep(tmp_path, seeds=6, looks=(3,))
    for seed, sign in zip(range(6), (1, -1) * 3, strict=True):
        run = folder / f"norm-batch-s{seed}"
        shutil.rmtree(run)
        write_run(run, np.linspace(0.5, 0.8, 12), 0.1 * sign)
    sweep = read_sweep(folder)
    verdicts = judge(sweep)
    assert (verdicts[SHALLOW].verdict, verdicts[SHALLOW].seeds) == ("different", 3)
    assert (verdicts[BATCH].verdict, verdicts[BATCH].seeds) == ("undecided", 6)
    settled = {
        (cell, seed) for cell in SHIFTS for seed in range(6)
        if is_settled(verdicts, sweep, cell, seed)
    }  # fmt: skip
    assert settled == {(SHALLOW, seed) for seed in (3, 4, 5)}  # the other needs the baseline
    # What was trained beyond the look changes nothing, as little as what was not.
    remove(folder, "model.depth-2-s[345]")
    assert judge(read_sweep(folder))[SHALLOW].regions.keys() == {"WT", "TC"}
    assert words(folder) == ["undecided", "different"]
    null_report.write_report(folder)
    text = (folder / "report/null_report.md").read_text()
    assert "15 of 18 planned runs are finished" in text
    assert "## Missing\n\nNothing." in text


def test_a_run_that_can_change_nothing_is_needless(tmp_path: Path):
    folder = write_sweep(tmp_path, seeds=6, looks=(3,))
    run = RunFolder(folder / "norm-batch-s5")
    assert is_needless(run, "norm", "batch", 5)
    assert is_needless(run, "baseline", "baseline", 5)  # both levels are decided
    assert not is_needless(run, "norm", "batch", 2)
    assert not is_needless(run, "none", "none", 5)
    assert not is_needless(RunFolder(folder / "elsewhere/run"), "norm", "batch", 5)
    remove(folder, "*")
    assert not is_needless(run, "norm", "batch", 5)


def test_a_needless_run_is_not_trained(
    composed: Callable[..., Any], tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    asked = []
    monkeypatch.setattr(
        "experiments.verdicts.is_needless",
        lambda *place, **cell: asked.append((*place, *cell.values())) or True,
    )
    config = composed(*tiny, "logger=csv", "cell.factor=norm", "cell.level='3'", "seed=7")
    assert math.isnan(train.train(config))
    folder = RunFolder(Path(config.run_dir))
    assert asked == [(folder, "norm", "3", 7)]
    assert not folder.is_finished


def test_a_later_family_changes_no_verdict(sweep: Path):
    path = sweep / "plan.json"
    plan = json.loads(path.read_text())
    before = judge(read_sweep(sweep))
    for level in range(40):
        cell = {"factor": "activation", "level": str(level), "seed": 0, "family": 1}
        plan["cells"].append({**cell, "run": f"activation-{level}-s0"})
    path.write_text(json.dumps(plan))
    assert [len(family) for family in read_sweep(sweep).families()] == [2, 40]
    after = judge(read_sweep(sweep))
    for cell, level in before.items():
        assert after[cell].verdict == level.verdict
        assert after[cell].regions["WT"].provable == level.regions["WT"].provable


def test_labels_are_swapped_in_every_way(tmp_path: Path):
    """Against a naive loop that swaps the runs, tests both regions, and corrects by Bonferroni.

    With two regions, a level differs by Holm's correction exactly if it does by Bonferroni's.
    """
    sweep = read_sweep(write_sweep(tmp_path, seeds=5, sd=0.02))
    _, *rows = controls.rows_of(sweep)
    assert [(row["seeds"], row["cases"], row["ways"], row["alpha spent"]) for row in rows] == [
        ("5", "12", "32", "0.050")
    ] * 2
    for row, cell in zip(rows, sweep.levels(), strict=True):
        different = 0
        for swaps in product((False, True), repeat=5):
            smallest = 1.0
            for region in sweep.margin:
                arms: list[Any] = [{}, {}]
                for seed, swap in enumerate(swaps):
                    arms[swap][seed] = sweep.dice(BASELINE_CELL, region)[seed]
                    arms[not swap][seed] = sweep.dice(cell, region)[seed]
                found = compare(*arms).estimate.p_difference()
                smallest = min(smallest, 2 * float(found))
            different += smallest <= 0.05
        assert row["different"] == f"{different / 32:.3f}"
    assert rows[1]["different"] == f"{2 / 32:.3f}"  # a difference that all seeds show, both ways


def test_half_of_the_baseline_is_compared_with_the_other_and_a_planted_difference_is_found(
    tmp_path: Path,
):
    """Six seeds give 20 halves and 6 ways to pair each with the other, here for `compare`.

    The seeds of `write_sweep` vary by .02, in which .05 is not found with three of them, but .5 is.
    """
    sweep = read_sweep(write_sweep(tmp_path, seeds=6))
    again = controls.rows_of(sweep)[0]
    assert (again["factor"], again["level"]) == ("baseline", "again")
    assert (again["seeds"], again["ways"], again["alpha spent"]) == ("3", "120", "0.050")
    dice = {region: sweep.dice(BASELINE_CELL, region) for region in sweep.margin}
    for planted, share in ((0.0, again["different"]), (0.05, again["with 0.05 planted"])):
        different = 0
        for order in permutations(range(6)):
            one, other = order[:3], order[3:]
            if list(one) != sorted(one):  # the same pairs in another order
                continue
            smallest = 1.0
            for by_seed in dice.values():
                arms = [
                    {pair: by_seed[seed] + plus for pair, seed in enumerate(half)}
                    for half, plus in ((other, 0.0), (one, planted))
                ]
                smallest = min(smallest, 2 * float(compare(*arms).estimate.p_difference()))
            different += smallest <= 0.05
        assert share == f"{different / 120:.3f}"
    ways = controls.halves(np.array([[dice["WT"][seed] for seed in range(6)]]))
    assert ways.shape == (120, 1, 3, 12)
    look = sweep.looks[-1]._replace(seeds=3)
    assert controls.rate(np.repeat(ways, 2, 1) + 0.5, [look]) == 1.0


def test_collapses_are_counted_by_arm(sweep: Path):
    """One run of three never learns ET: it has Dice 0, and predicts none where there is none."""
    shutil.rmtree(sweep / "norm-batch-s1")
    write_run(sweep / "norm-batch-s1", np.zeros(12))
    path = sweep / "norm-batch-s1/cases.csv"
    path.write_text(path.read_text().replace(",5.0", ",0.0"))
    read = read_sweep(sweep)
    assert collapses(read, BATCH, "ET", [0, 1, 2]).count == 1
    assert collapses(read, BATCH, "ET", [0, 2]).count == 0
    assert collapses(read, BASELINE_CELL, "ET", [0, 1, 2]).bound == pytest.approx(
        1 - 0.05 ** (1 / 3)
    )
    baseline, batch, _ = null_report.outcome_rows(read)
    assert (baseline["collapses ET"], batch["collapses ET"]) == ("0 (≤ 63%)", "1 (≤ 86%)")
    assert (baseline["false alarms ET"], batch["false alarms ET"]) == ("3 of 3", "2 of 3")
    assert "false alarms WT" not in baseline  # all cases have it
    assert words(sweep)[0] == "undecided"


def test_report_of_a_whole_sweep(sweep: Path):
    page = null_report.write_report(sweep)
    output = sweep / "report"
    assert page == output / "null_report.html"
    text = (output / "null_report.md").read_text()
    assert (
        "2 levels: 1 different; 1 equivalent; 0 different, but less than the margin; 0 undecided."
        in text
    )
    assert "9 of 9 planned runs are finished, 12 test cases." in text
    assert "margin of Dice WT 0.02, TC 0.03 (reason: raters)" in text
    assert "| norm | batch | 3 | equivalent, if at most 63% of runs collapse | " in text
    assert "| model.depth | 2 | 3 | different | -0." in text
    with (output / "null_report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["factor"], row["region"], row["verdict"]) for row in rows] == [
        ("norm", "WT", "equivalent"),
        ("norm", "TC", "equivalent"),
        ("model.depth", "WT", "different"),
        ("model.depth", "TC", "different"),
    ]
    html = page.read_text()
    colours = null_report.VERDICT_COLOURS
    assert html.count(f'style="background: {colours["different"]}"') == 3  # level, WT and TC
    assert not re.search(r"<script|<link|<img|\bsrc=|url\(", html.replace("url(#", ""))
    targets = re.findall(r'href="([^"]*)"', html)
    assert sum(target.startswith("..") for target in targets) == 9
    for target in targets:  # symbols of the page itself, and folders of runs
        assert target.startswith("#") or (output / target / "results.json").is_file()


def test_the_claim_of_the_paper_stands_beside_what_came_out(tmp_path: Path):
    """Both are of the factors that the paper writes of, whose levels change nothing, and harm."""
    folder = write_sweep(tmp_path)
    no_improvement = 'Other levels "did not lead to an improvement in model performance"'
    said = null_report.claims(read_sweep(folder), judge(read_sweep(folder)))
    assert list(said) == ["model.depth", "norm"]
    assert said["norm"].startswith(
        f"{no_improvement} (section 2.1). Here, batch is equivalent (WT "
    )
    assert ", 3 seeds). So none is better than the baseline by as " in said["norm"]
    assert "2 is different (WT -0." in said["model.depth"]
    assert said["model.depth"].endswith(
        "So none is better than the baseline by as much as the margin."
    )
    page = null_report.write_report(folder)
    text = page.with_suffix(".md").read_text()
    assert f"- `norm`: {said['norm']}" in text
    assert no_improvement.replace('"', "&#34;") in page.read_text()


@pytest.mark.parametrize(
    ("shift", "claim", "ending"),
    [
        (0.2, "norm", "So batch came out better than the baseline."),
        (-0.2, "norm", "So none is better than the baseline by as much as the margin."),
        (-0.2, "activation", "So batch came out worse than the baseline."),
        (0.0, "activation", "So none is worse than the baseline by as much as the margin."),
    ],
)
def test_what_came_out_has_the_direction_of_the_claim(
    tmp_path: Path, shift: float, claim: str, ending: str
):
    sweep = read_sweep(write_sweep(tmp_path, {BASELINE_CELL: 0.0, BATCH: shift}))
    levels = {"batch": judge(sweep)[BATCH]}
    assert null_report.outcome(null_report.CLAIMS[claim], levels) == ending


def test_what_is_undecided_stays_open(tmp_path: Path):
    sweep = read_sweep(write_sweep(tmp_path, {BASELINE_CELL: 0.0, BATCH: 0.01}, sd=0.05))
    levels = {"batch": judge(sweep)[BATCH]}
    found = null_report.outcome(null_report.CLAIMS["norm"], levels)
    assert found == "Whether batch is better stays open."


def test_report_of_a_half_done_sweep(sweep: Path):
    remove(sweep, "model.depth-2-s*", "norm-batch-s2")
    null_report.write_report(sweep)
    text = (sweep / "report/null_report.md").read_text()
    assert "5 of 9 planned runs are finished" in text
    for line in (
        "- model.depth=2 seed=0 (model.depth-2-s0)",
        "- norm=batch seed=2 (",
        "python train.py experiment=null_report factors=model.depth",
    ):
        assert line in text
    found = judge(read_sweep(sweep))
    comparison = found[BATCH].regions["WT"].comparison
    assert (comparison.seeds, comparison.baseline_only) == (2, 1)
    # It was planned, so it belongs to the family, although it has no finished run.
    assert found[SHALLOW].seeds == 0
    assert words(sweep) == ["undecided", "undecided"]


def test_one_seed_decides_nothing(sweep: Path):
    remove(sweep, "*-s[12]")
    null_report.write_report(sweep)
    found = judge(read_sweep(sweep))
    assert {level.verdict for level in found.values()} == {"undecided"}
    for level in found.values():
        assert np.isnan(level.regions["WT"].comparison.estimate.interval(0.95)).all()
    for name in ("null_report.md", "null_report.html"):
        assert "nan" not in (sweep / "report" / name).read_text().split("Cost")[0]


def test_a_baseline_alone_is_a_report(sweep: Path):
    remove(sweep, "[nm]*-s*")
    null_report.write_report(sweep)
    text = (sweep / "report/null_report.md").read_text()
    assert "0 different, but less than the margin; 2 undecided." in text


def test_what_is_kept_of_a_sweep_makes_the_same_report_and_goes_on(sweep: Path):
    before = null_report.write_report(sweep).with_suffix(".md").read_text()
    copy = sweep / "copy"
    remove(sweep, "norm-batch-s2")
    null_report.main([str(sweep), "--keep", str(copy)])
    assert {run.name for run in read_sweep(copy).missing} == {"norm-batch-s2"}
    write_run(sweep / "again", np.full(12, 0.7))
    shutil.rmtree(sweep / "norm-batch-s2")
    (sweep / "again").rename(sweep / "norm-batch-s2")
    null_report.main([str(sweep), "--keep", str(copy)])
    kept, whole = read_sweep(copy), read_sweep(sweep)
    assert not kept.missing
    for mine, theirs in zip(kept.finished, whole.finished, strict=True):
        assert mine.scores.keys() == theirs.scores.keys()
        for region in ("WT", "TC", "ET"):
            np.testing.assert_allclose(mine.dice(region), theirs.dice(region), rtol=1e-5)
        np.testing.assert_array_equal(mine.learning_curve(), theirs.learning_curve())
    pages = [null_report.write_report(folder).with_suffix(".md") for folder in (copy, sweep)]
    assert pages[0].read_text() == pages[1].read_text() != before
    assert sum(file.stat().st_size for file in (copy / "norm-batch-s2").rglob("*.*")) < 5000


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
    remove(sweep, "baseline*")
    with pytest.raises(InputError, match="the baseline has no finished run yet"):
        null_report.main([str(sweep)])


def test_cells_show_unequal_budgets(sweep: Path):
    run = RunFolder(sweep / "model.depth-2-s0")
    assert Results.read(run).cost == COST
    replace(Results.read(run), cost=replace(COST, parameters=7)).write(run)
    rows = null_report.cost_rows(read_sweep(sweep))
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
    arguments = ["experiment=null_report_brats", "factors=norm", "seed=0,1", "trainer.max_epochs=2"]
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
    assert "3 of 4 planned runs are finished" in text
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
