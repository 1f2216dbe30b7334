"""What `plan=true` says of a command, and that it leaves nothing behind."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.hydra_config import HydraConfig
from rich.console import Console

import train
from datamodules.cases import Case
from datamodules.phantom.data_sets import case_name
from errors import InputError
from experiments import plan
from experiments.calibration import Timed, predicted, sides_of, slowdown, time_step
from experiments.cost import Cost, Memory, Step
from experiments.jobs import Job, composed_jobs, memory_limit_gb, wants_plan
from experiments.memory_limit import changes_that_fit
from experiments.plan import Data, Network, Row, data_of, duration, epochs_and_steps
from experiments.statistics import prospect
from experiments.sweep import Cell, Run
from lightning_modules.checkpoint import build
from tests.conftest import ROOT
from tests.experiments.test_null_report import write_run

TINY = {
    "aeunet": ["patches.size=16", "inference.patch_size=16", "model.bottleneck=4", "model.depth=2"],
    "dnet": ["patches.size=56", "patches.batch_size=2", "data.cache.spacing_mm=8"],
    "unet": ["patches.size=16", "data.cache.spacing_mm=8", "model.depth=2"],
}
PHANTOMS = ["data.data_set.root=phantoms", "data.data_set.count=20", "data.cache.root=cache"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and measurements that are over at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "BUDGET_S", 0.01)
    return tmp_path


@cache
def jobs_of(*arguments: str) -> list[Job]:
    return composed_jobs(arguments, ROOT / "conf")


def said(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    train.plan(["plan=true", *arguments])
    return capsys.readouterr().out


def rows_said(text: str) -> dict[str, list[list[str]]]:
    """Cells of the tables by what stands in the first column."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    rows: dict[str, list[list[str]]] = {}
    for line in filter(None, lines):
        rows.setdefault(line[0], []).append(line[1:])
    return rows


@pytest.mark.parametrize("model", TINY)
def test_a_plan_of_every_model_leaves_nothing_behind(model: str, capsys: Any, workplace: Path):
    before = HydraConfig.instance().cfg
    text = said(capsys, f"model={model}", *TINY[model], *PHANTOMS)
    assert HydraConfig.instance().cfg is before
    runs, step = rows_said(text)[model]
    (job,) = jobs_of(f"model={model}", *TINY[model], *PHANTOMS)
    cost = predicted(job)
    assert runs[:3] == ["1", "0", str(epochs_and_steps(job.plain)[1])]
    assert step[0] == f"{cost.cost.parameters:,}"
    assert step[-1] == f"{cost.memory.peak:.0f}"
    assert "1 run, 0 done" in text
    assert "20 phantoms" in text
    assert "cache of 20 cases" in text
    assert list(workplace.iterdir()) == []


def test_a_sweep_counts_every_run_once(capsys: Any, workplace: Path):
    jobs = jobs_of("-m", "norm=group,batch", "seed=0,1", *TINY["aeunet"], *PHANTOMS)
    plan.show_plan([*jobs, *jobs])
    rows = rows_said(text := capsys.readouterr().out)
    assert {label: row[0][0] for label, row in rows.items()} == {
        "norm=group": "2",
        "norm=batch": "2",
    }
    assert "4 runs, 0 done" in text
    assert list(workplace.iterdir()) == []


def test_an_experiment_is_a_sweep_by_itself_and_what_is_finished_costs_nothing(
    capsys: Any, workplace: Path
):
    arguments = ["experiment=null_report", "factors=norm", "seed=0,1", *TINY["aeunet"], *PHANTOMS]
    jobs = jobs_of(*arguments)
    for job in jobs[:2]:  # of the first seed
        job.folder.path.mkdir(parents=True)
        job.folder.results_file.touch()
    before = sorted(workplace.rglob("*"))
    plan.show_plan(jobs)
    rows = rows_said(text := capsys.readouterr().out)
    assert list(rows) == ["baseline", "norm=batch"]
    assert [row[0][:2] for row in rows.values()] == [["2", "1"], ["2", "1"]]
    assert "4 runs, 2 done" in text
    assert "not known before two seeds of the baseline and of one level are finished" in text
    for job in jobs[2:]:
        job.folder.path.mkdir(parents=True)
        job.folder.results_file.touch()
        before += [workplace / job.folder.path, workplace / job.folder.results_file]
    row = row_of(*jobs)
    assert (row.remaining, row.hours, row.checkpoint_bytes) == ([], 0, 0)
    assert len(row_of(jobs[0].changed({"again": True})).remaining) == 1
    assert sorted(workplace.rglob("*")) == sorted(before)


def test_the_jobs_are_those_that_would_be_trained():
    """Folders, order and values, without `plan` and `vram_gb`."""
    jobs = jobs_of("-m", "plan=true", "vram_gb=6", "model.depth=4,3", "name=a")
    assert [job.config.model.depth for job in jobs] == [4, 3]
    assert [(job.config.plan, job.config.vram_gb) for job in jobs] == [(False, None)] * 2
    (single,) = jobs_of("name=a", "model.depth=3")
    assert single.folder == jobs[1].folder
    assert single.folder.path.parent == Path("runs/a")
    assert single.plain["choices"]["norm"] == "group"
    smaller = single.changed({"patches.size": 16})
    assert smaller.plain["module"]["network"]["patch_size"] == 16
    assert single.plain["module"]["network"]["patch_size"] == 32
    with pytest.raises(InputError, match=r"patches\.size: expected sides divisible by 4"):
        single.changed({"patches.size": 18})


def test_a_sweeper_that_does_not_know_its_jobs_is_refused(monkeypatch: pytest.MonkeyPatch):
    from hydra.core.plugins import Plugins

    monkeypatch.setattr(Plugins, "instantiate_sweeper", lambda *_, **__: object())
    with pytest.raises(InputError, match="plan: expected hydra/sweeper=basic or one_factor, found"):
        jobs_of("-m", "seed=0,1")


@pytest.mark.parametrize(
    ("arguments", "wants"),
    [
        (["plan=true"], True),
        (["-m", "seed=0,1", "plan=yes"], True),
        (["++plan=True", "--multirun"], True),
        (["plan=true", "plan=false"], False),
        (["plan=maybe"], False),
        (["plan=true", "--cfg", "job"], False),
        (["myplan=true"], False),
        ([], False),
    ],
)
def test_when_a_plan_is_asked_for(arguments: list[str], wants: bool):
    assert wants_plan(arguments) is wants


def test_the_memory_limit_is_a_number():
    assert memory_limit_gb(["plan=true"]) is None
    assert memory_limit_gb(["vram_gb=6", "seed=1"]) == 6
    assert memory_limit_gb(["vram_gb=6", "vram_gb=4.5"]) == 4.5
    assert memory_limit_gb(["vram_gb=null"]) is None
    for value in ("0", "many", "-1", "[6]"):
        with pytest.raises(InputError, match="vram_gb: expected a number above 0, or null, found"):
            memory_limit_gb([f"vram_gb={value}"])


# Predictions by hand: 1000 MiB a batch of two cubes of 64, in proportion to everything.
def scaled_step(job: Job, batch_size: int | None = None) -> Step:
    plain = job.plain
    share = plain["data"]["batch_size"] / 2 * math.prod(sides_of(job)) / 64**3
    share *= plain["filters"]["base"] / 32
    share *= {"none": 1, "norms": 0.8, "blocks": 0.6, "levels": 0.5}[
        plain["model"]["checkpointing"]
    ]
    share *= 0.55 if plain["trainer"]["precision"] == "bf16-mixed" else 1
    return Step(Cost(0, [], 0.0, 1000 * share), 1.0, Memory(0.0, 0.0, 0.0, 1000 * share, 0.0))


LARGE = ["patches.size=64", "patches.batch_size=2", "filters.base=32"]


def changes(monkeypatch: pytest.MonkeyPatch, limit: float, *arguments: str) -> dict[str, float]:
    """Overrides of the changes that fit, in order, and what a step then takes."""
    monkeypatch.setattr("experiments.memory_limit.predicted", scaled_step)
    (job,) = jobs_of(*LARGE, *arguments)
    found = changes_that_fit(job, limit)
    assert [change.size for change in found] == sorted(change.size for change in found)
    assert all(change.memory.peak <= limit for change in found)
    return {change.overrides: round(change.memory.peak) for change in found}


def test_what_fits_as_it_is_needs_no_change(monkeypatch: pytest.MonkeyPatch):
    assert next(iter(changes(monkeypatch, 1000))) == ""


def test_the_checkpointing_that_computes_least_again_comes_first(monkeypatch: pytest.MonkeyPatch):
    """Of what suffices by itself, with and without bfloat16, nothing else has to shrink."""
    assert changes(monkeypatch, 650) == {
        "model.checkpointing=blocks": 600,
        "trainer.precision=bf16-mixed": 550,
    }


def test_the_largest_batch_patch_and_width_that_fit(monkeypatch: pytest.MonkeyPatch):
    found = changes(monkeypatch, 290)
    assert found == {
        "trainer.precision=bf16-mixed model.checkpointing=levels": 275,
        "model.checkpointing=levels patches.batch_size=1": 250,
        "model.checkpointing=levels patches.size=48": 211,
        "patches.size=40": 244,
        "model.checkpointing=levels filters.base=16": 250,
        "filters.base=8": 250,
    }


def test_what_the_configuration_has_already_is_not_offered(monkeypatch: pytest.MonkeyPatch):
    found = changes(monkeypatch, 270, "model.checkpointing=levels", "trainer.precision=bf16-mixed")
    assert found == {"patches.batch_size=1": 138, "patches.size=56": 184, "filters.base=24": 206}


def test_the_sides_of_a_patch_shrink_from_the_longest(monkeypatch: pytest.MonkeyPatch):
    """64 x 48 x 32 loses two steps of 8 along x, then one along x and one along y."""
    monkeypatch.setattr("experiments.memory_limit.predicted", scaled_step)
    (job,) = jobs_of("patches.size=[64,48,32]", "filters.base=8", "model.checkpointing=levels")
    found = changes_that_fit(job, scaled_step(job).memory.peak * 0.7)
    sizes = [change.overrides for change in found if "patches.size" in change.values]
    assert sizes == ["'patches.size=[40,48,32]'"]


def test_changes_are_those_that_the_configuration_allows(monkeypatch: pytest.MonkeyPatch):
    """D-Net's sides are 52 + a multiple of 4, and half a patch with a lesion is none."""
    monkeypatch.setattr("experiments.memory_limit.predicted", scaled_step)
    (job,) = jobs_of("model=dnet", "patches.batch_size=2", "patches.size=84", "filters.base=8")
    found = changes_that_fit(job, scaled_step(job).memory.peak * 0.4)
    assert [change.overrides for change in found] == [
        "trainer.precision=bf16-mixed model.checkpointing=blocks",
        "model.checkpointing=levels patches.size=76",
        "patches.size=60",
    ]


def test_memory_that_nothing_fits_in_is_one_line(monkeypatch: pytest.MonkeyPatch):
    line = r"vram_gb: expected at least 0\.\d+, which .* lead to, found 0\.001$"
    with pytest.raises(InputError, match=line):
        changes(monkeypatch, 0.001e9 / 2**20, "model.checkpointing=levels")


def test_every_change_is_predicted_to_fit(capsys: Any):
    """The real predictions: of checkpointing, the least that suffices."""
    (job,) = jobs_of(*TINY["aeunet"], *PHANTOMS)
    least = predicted(job.changed({"model.checkpointing": "levels"})).memory.peak
    step = predicted(job)
    assert step.memory.peak > least
    row = replace(row_of(job), network=replace(row_of(job).network, step=step))
    plan.show_changes([row], least * 2**20 / 1e9 + 1e-6, Console(width=200))
    offered = rows_said(capsys.readouterr().out)[f"{least:.0f}"]
    assert offered[0] == ["model.checkpointing=levels"]
    plan.show_changes([row], 6, Console(width=200))
    assert f"run takes {step.memory.peak:.0f}: it fits" in capsys.readouterr().out


def test_a_large_step_is_timed_in_part_and_scaled_by_its_operations(monkeypatch: Any):
    """A machine of 10 GFLOP a second: what takes longer than the budget is not run."""
    ran: list[tuple[int, ...]] = []

    def run_step(job: Job, patches: int, budget_s: float) -> float:
        ran.append((*sides_of(job), patches))
        return seconds * math.prod(ran[-1]) / (48 * 32 * 32 * 8)

    monkeypatch.setattr("experiments.calibration._run_step", run_step)
    (job,) = jobs_of("patches.size=[48,32,32]", "patches.batch_size=8", "model.depth=2")
    step = predicted(job)
    seconds = step.gflops / 10
    timed = time_step(job, step, budget_s=1.0)
    assert timed.seconds == pytest.approx(seconds, rel=0.05)
    assert timed.measured_at == ran[-1]
    assert timed.scale > 1
    assert all(seconds * math.prod(shape) / (48 * 32 * 32 * 8) <= 1 for shape in ran)
    ran.clear()
    whole = time_step(job, step, budget_s=100.0)
    assert ran == [(48, 32, 32, 8)]
    assert (whole.scale, whole.seconds) == (1, seconds)
    monkeypatch.setattr("experiments.calibration.free_memory_mib", lambda device: step.memory.peak)
    ran.clear()
    assert time_step(job, step, budget_s=100.0).scale > 1
    assert (48, 32, 32, 8) not in ran


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["patches.per_epoch=9", "patches.batch_size=2", "patches.epochs=3"], (3, 15)),
        (["patches.per_epoch=8", "patches.batch_size=2", "trainer.max_epochs=2"], (2, 8)),
        (["patches.per_epoch=8", "+trainer.limit_train_batches=2", "trainer.max_epochs=2"], (2, 4)),
        (["patches.per_epoch=8", "+trainer.limit_train_batches=0.5", "patches.epochs=2"], (2, 4)),
        (["patches.per_epoch=11", "trainer.devices=2", "patches.epochs=2"], (2, 4)),
        (["patches.per_epoch=11", "trainer.devices=[0]", "patches.epochs=2"], (2, 12)),
        (["trainer=overfit"], (50, 50)),
        (["trainer=debug"], (1, 1)),
        (["trainer=debug", "trainer.limit_train_batches=0"], (1, 0)),
    ],
)
def test_the_number_of_steps_by_hand(overrides: list[str], expected: tuple[int, int]):
    (job,) = jobs_of(*overrides)
    assert epochs_and_steps(job.plain) == expected


def row_of(*jobs: Job) -> Row:
    """Runs with 5 validation and 7 test cases; a step takes 2 s, a volume half a second."""
    step = Step(Cost(10, [8], 1.0, 40.0), 3.0, Memory(10.0, 10.0, 20.0, 0.0, 0.0))
    data = Data(5, 7, (8, 8, 8), 0, 0.0, 0, 0.0, Path("cache"), Path("root"))
    return Row("run", jobs, Network(step, Timed(2.0, (), 1.0), Timed(0.5, (), 1.0), data))


def test_hours_and_disk_by_hand():
    """4 steps; the validation cases after both epochs and at the end."""
    arguments = ["patches.per_epoch=4", "patches.batch_size=2", "patches.epochs=2"]
    (job,) = jobs_of(*arguments, "patches.epochs_per_validation=1")
    row = row_of(job, job)
    assert row.run_s == 4 * 2 + (3 * 5 + 7) * 0.5
    assert row.hours == 2 * row.run_s / 3600
    assert row.checkpoint_bytes == 2 * 2 * 30 * 2**20  # best and last: weights and moments


def test_what_is_there_of_the_data(tiny: list[str], workplace: Path):
    """Before and after the cache is built; tests have 3, 1 and 2 cases."""
    arguments = [argument for argument in tiny if not argument.startswith("data.cache.root")]
    (job,) = jobs_of(*arguments, "data.cache.root=cache", "data.cache.spacing_mm=2")
    data = data_of(job.plain)
    assert (data.validation, data.test, data.phantoms, data.uncached) == (1, 2, 0, 6)
    assert data.sides == (68, 85, 70)  # of a brain of 135 x 170 x 140 mm
    assert data.cache_bytes == 6 * 68 * 85 * 70 * (4 * 2 + 1)
    module = build(job.plain["data"])
    cached = module.cache.build(module.data_set.cases(), module.data_set)
    found = data_of(job.plain)
    assert (found.uncached, found.cache_bytes) == (0, 0)
    sides = np.mean([case.image.shape[1:] for case in cached], axis=0)
    assert found.sides == tuple(round(side) for side in sides)
    size = sum(file.stat().st_size for file in (workplace / "cache").rglob("image.npy"))
    assert size == pytest.approx(6 * math.prod(found.sides) * 8, rel=0.1)


def test_phantoms_that_are_there_are_not_made(workplace: Path):
    (job,) = jobs_of("data.data_set.spacing_mm=8", "data.data_set.count=9", *PHANTOMS[:1])
    module = build(job.plain["data"])
    missing = data_of(job.plain)
    assert missing.phantoms == 9
    assert missing.phantom_bytes == 9 * 4 * plan.PHANTOM_IMAGE_BYTES / 64
    for case in ("HGG/phantom_0000", "LGG/phantom_0008", "HGG/phantom_0009"):
        (workplace / "phantoms" / case).mkdir(parents=True)
    found = data_of(job.plain)
    assert found.phantoms == 7  # the tenth is not asked for
    assert (found.validation, found.test) == (missing.validation, missing.test)
    names = [case_name(index) for index in range(9)]
    parts = module.split([Case(name, {}, workplace) for name in names])
    assert (found.validation, found.test) == (len(parts.validation), len(parts.test))


def test_another_precision_is_compared_with_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("experiments.plan.slowdown", lambda *_: 28.04)
    (job,) = jobs_of(*TINY["aeunet"], *PHANTOMS)
    rows = [row_of(job), row_of(job.changed({"trainer.precision": "bf16-mixed"}))] * 2
    (line,) = plan.precisions(rows)
    assert line == "bf16-mixed takes 28 times as long as 32-true on this machine."


def test_the_slowdown_is_that_of_the_part_that_was_run(monkeypatch: pytest.MonkeyPatch):
    ran = []

    def run_step(job: Job, patches: int, budget_s: float) -> float:
        ran.append((*sides_of(job), patches, job.plain["trainer"]["precision"]))
        return 0.5

    monkeypatch.setattr("experiments.calibration._run_step", run_step)
    job = jobs_of(*TINY["aeunet"], *PHANTOMS)[0].changed({"trainer.precision": "bf16-mixed"})
    assert slowdown(job, Timed(60.0, (16, 16, 8, 2), 4.0), 1.0) == 60 / 4 / 0.5
    assert ran == [(16, 16, 8, 2, "32-true")]


def test_durations():
    words = [duration(seconds) for seconds in (0, 59, 90, 5400, 2 * 86400)]
    assert words == ["0 s", "59 s", "1.5 min", "1.5 h", "2.0 days"]


def test_a_pilot_says_what_a_sweep_can_tell():
    """Two seeds of three are finished."""
    jobs = jobs_of("experiment=null_report", "factors=norm", "seed=0,1,2", *TINY["aeunet"])
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0.6, 0.8, 12)
    for job in jobs[:4]:
        write_run(job.folder.path, difficulty + rng.normal(0, 0.02, 12), rng.normal(0, 0.01))
    title, *lines = plan.prospects(jobs)
    assert title == "What the sweep can tell four times in five, for half of 1 levels:"
    runs = [Run(Cell("", ""), job.config.seed, job.folder) for job in jobs[:4]]
    alpha = jobs[0].plain["report"]["alpha"]
    for line, region, margin in zip(lines, ("WT", "TC"), (0.02, 0.03), strict=True):
        scores = [run.dice(region) for run in runs]
        differences = np.array([scores[1] - scores[0], scores[3] - scores[2]])
        hoped = prospect(differences, seeds=3, alpha=alpha, levels=1, regions=2)
        assert line.startswith(f"{region}: that a difference of {hoped.detectable:.3f} is not 0, ")
        assert f"within {hoped.provable:.3f} (after 3 seeds, 1 levels)" in line
        assert f"The margin is {margin}" in line
        assert line.endswith(", too narrow: it cannot decide.") == (hoped.provable > margin)
    (one,) = plan.prospects(jobs[:2])
    assert one.startswith("One seed says nothing")
    assert plan.prospects(jobs_of(*TINY["aeunet"], *PHANTOMS)) == []
