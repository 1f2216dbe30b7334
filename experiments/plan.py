"""What a command of train.py would train, and what that costs on this machine: `plan=true`.

Memory is predicted without allocating it, time is measured for a few seconds, and nothing is
written: no folder, no log, no cache.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from datamodules.cache import available_cores
from datamodules.cases import Case
from datamodules.phantom import MODALITIES, Phantoms
from datamodules.phantom.data_sets import case_name
from datamodules.splits import with_masks
from experiments.calibration import Timed, device_of, predicted, slowdown, time_step, time_volume
from experiments.combinations import check_arguments
from experiments.cost import KINDS, MIB, Step
from experiments.jobs import Job
from experiments.memory_limit import changes_that_fit
from experiments.results import device_name
from experiments.statistics import prospect
from experiments.sweep import BASELINE_CELL, Cell, Run
from hydra_plugins.one_factor_sweeper import looks_of
from lightning_modules.checkpoint import build
from lightning_modules.memory import keep_freed

BUDGET_S = 20.0  # of all measurements together, about
BRAIN_MM = (135, 170, 140)  # sides of a brain, where no case is in the cache: mean of 64 phantoms
PHANTOM_IMAGE_BYTES = 260_000  # of a compressed image at 2 mm
GIGA = 1e9


@dataclass(frozen=True)
class Data:
    """What a run reads, and what of it is not on disk yet.

    Attributes:
        validation: Number of validation cases that are scored.
        test: Number of test cases that are scored.
        sides: Mean sides of a volume, in voxels.
        phantoms: Phantoms that have to be made.
        phantom_bytes: What they take on disk.
        uncached: Cases that have to be preprocessed.
        cache_bytes: What they take on disk.
        cache: Folder of the cache.
        root: Folder of the data set.
    """

    validation: int
    test: int
    sides: tuple[int, int, int]
    phantoms: int
    phantom_bytes: float
    uncached: int
    cache_bytes: float
    cache: Path
    root: Path


@dataclass(frozen=True)
class Network:
    """What a run's network and data cost, whatever the seed.

    Attributes:
        step: Predicted cost of a training step.
        step_time: How long it takes.
        volume_time: How long a whole volume takes.
        data: What is read.
    """

    step: Step
    step_time: Timed
    volume_time: Timed
    data: Data


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone.

    Attributes:
        label: What tells them from the other runs of a sweep.
        jobs: The runs, each once.
        network: What they cost.
    """

    label: str
    jobs: Sequence[Job]
    network: Network

    @property
    def remaining(self) -> list[Job]:
        """The runs that would be trained."""
        return [job for job in self.jobs if job.config.again or not job.folder.is_finished]

    @property
    def steps(self) -> int:
        """Training steps of a run, if nothing stops it early."""
        return epochs_and_steps(self.jobs[0].plain)[1]

    @property
    def run_s(self) -> float:
        """Seconds of a run: its steps, its validations, and the test of its best checkpoint."""
        plain, network = self.jobs[0].plain, self.network
        epochs, steps = epochs_and_steps(plain)
        validations = epochs // plain["trainer"]["check_val_every_n_epoch"] + 1
        devices = number_of_devices(plain["trainer"]["devices"])
        volumes = validations * math.ceil(network.data.validation / devices)
        volumes += math.ceil(network.data.test / devices)
        return steps * network.step_time.seconds + volumes * network.volume_time.seconds

    @property
    def hours(self) -> float:
        """Hours of all runs that are left."""
        return len(self.remaining) * self.run_s / 3600

    @property
    def checkpoint_bytes(self) -> float:
        """What the checkpoints of the runs that are left take on disk."""
        memory = self.network.step.memory
        callbacks = self.jobs[0].plain["callbacks"].values()
        kept = sum("ModelCheckpoint" in str(callback.get("_target_")) for callback in callbacks)
        return len(self.remaining) * kept * (memory.weights + memory.moments) * MIB


def epochs_and_steps(plain: Mapping[str, Any]) -> tuple[int, int]:
    """Return the epochs of a run, and its training steps, if nothing stops it early."""
    trainer, data = plain["trainer"], plain["data"]
    devices = number_of_devices(trainer["devices"])
    batches = data["patches_per_epoch"] / (data["batch_size"] * devices)
    batches = math.ceil(batches) if devices == 1 else math.floor(batches)  # see `EpochSampler`
    batches = limited(batches, trainer.get("limit_train_batches"))
    batches = limited(batches, trainer.get("overfit_batches") or None)
    return trainer["max_epochs"], trainer["max_epochs"] * batches


def number_of_devices(devices: int | str | Sequence[int]) -> int:
    """Return the devices of a trainer; those that it would look for itself count as one."""
    if isinstance(devices, str):
        return 1
    return max(devices, 1) if isinstance(devices, int) else len(devices)


def limited(batches: int, limit: float | None) -> int:
    """Limit a number of batches as Lightning does: to a number, or a share if that is a float."""
    if limit is None:
        return batches
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


def data_of(plain: Mapping[str, Any]) -> Data:
    """Find out what a run reads, and what of it is there.

    Raises:
        InputError: The data set or the split cannot be used.
    """
    module = build(plain["data"])
    data_set, cache = module.data_set, module.cache
    root, count = Path(data_set.root), plain["data"]["data_set"].get("count")
    if count is None:
        cases = data_set.cases()
        made = len(cases)
    else:  # phantoms, which may not have been made yet
        cases = [Case(case_name(index), {}, Path("seg.nii.gz")) for index in range(count)]
        folders = {folder.name for pattern in ("*", "[HL]GG/*") for folder in root.glob(pattern)}
        made = len(folders & {case.name for case in cases})
    parts = module.split(with_masks(cases))
    folder = cache.root / cache.key(data_set)
    cached = [folder / case.name for case in cases if (folder / case.name / "case.json").is_file()]
    spacing_mm, crop = plain["data"]["cache"]["spacing_mm"], plain["data"]["cache"]["crop"]
    shapes = [np.load(case / "image.npy", mmap_mode="r").shape[1:] for case in cached[:20]]
    shapes = shapes or [[mm / spacing_mm for mm in (BRAIN_MM if crop == "brain" else crop)]]
    x, y, z = (round(float(side)) for side in np.mean(shapes, axis=0))
    inputs = plain["inputs"]
    channels = inputs["channels"] // (2 if inputs["mirrored"] else 1)
    images = len(MODALITIES if isinstance(data_set, Phantoms) else data_set.modalities)
    phantom = images * PHANTOM_IMAGE_BYTES * (2 / spacing_mm) ** 3
    return Data(
        validation=limited(len(parts.validation), plain["trainer"].get("limit_val_batches")),
        test=limited(len(parts.test), plain["trainer"].get("limit_test_batches")),
        sides=(x, y, z),
        phantoms=len(cases) - made,
        phantom_bytes=(len(cases) - made) * phantom,
        uncached=len(cases) - len(cached),
        cache_bytes=(len(cases) - len(cached)) * x * y * z * (2 * channels + 1),
        cache=folder,
        root=root,
    )


def rows_of(jobs: Sequence[Job]) -> list[Row]:
    """Predict and measure what the runs of a command cost; seeds share a row.

    Raises:
        InputError: A data set, a split or a constructor's argument cannot be used.
    """
    by_folder = {job.folder.path: job for job in jobs}
    by_label: dict[str, list[Job]] = {}
    for job in by_folder.values():
        by_label.setdefault(_label(job, jobs), []).append(job)
    budget_s = min(3.0, max(0.3, BUDGET_S / 2 / len(by_label)))
    progress = track(by_label.items(), "measuring", console=Console(stderr=True), transient=True)
    return [Row(label, group, _network(group[0], budget_s)) for label, group in progress]


def _label(job: Job, jobs: Sequence[Job]) -> str:
    """Say what tells a run from the others of its sweep, but for its seed."""
    cell = job.config.cell
    if cell.factor != "none":
        return cell.factor if cell.factor == cell.level else f"{cell.factor}={cell.level}"
    own = [
        override
        for override in job.overrides
        if not override.startswith("seed=") and any(override not in o.overrides for o in jobs)
    ]
    return " ".join(own) or str(job.config.choices.model)


def _network(job: Job, budget_s: float) -> Network:
    check_arguments(job.config)
    if "memory" in job.config.callbacks:  # as in training
        keep_freed()
    data = data_of(job.plain)
    step = predicted(job)
    step_time = time_step(job, step, budget_s)
    volume_time = time_volume(job, data.sides, step, step_time.seconds, budget_s)
    return Network(step, step_time, volume_time, data)


def show_plan(jobs: Sequence[Job], limit_gb: float | None = None) -> None:
    """Print what a command would train, what that costs, and what would make it fit in memory.

    Args:
        jobs: The runs of the command.
        limit_gb: Memory of a GPU in 10^9 bytes.

    Raises:
        InputError: See `rows_of`; or nothing makes a training step fit in the memory.
    """
    rows = rows_of(jobs)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(_table("Runs", [_costs_of_runs(row) for row in rows]))
    console.print(_table("A training step, MiB at its peak", [_costs_of_step(row) for row in rows]))
    for sentence in (*totals(rows), *precisions(rows), *prospects(jobs)):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    if limit_gb is not None:
        show_changes(rows, limit_gb, console)


def show_changes(rows: Sequence[Row], limit_gb: float, console: Console) -> None:
    """Print the changes with which the largest training step of every model fits in memory.

    Raises:
        InputError: None fits.
    """
    limit_mib = limit_gb * GIGA / MIB
    largest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.network.step.memory.peak):
        largest[row.jobs[0].config.choices.model] = row
    for model, row in largest.items():
        peak = row.network.step.memory.peak
        title = f"model={model}: at most {limit_mib:.0f} MiB; {row.label} takes {peak:.0f}"
        if peak <= limit_mib:
            console.print(f"{title}: it fits.", highlight=False, markup=False)
            continue
        lines = [
            {"peak": f"{change.memory.peak:.0f}", "change": change.overrides}
            for change in changes_that_fit(row.jobs[0], limit_mib)
        ]
        console.print(_table(f"{title}. What fits, the smallest change first", lines))
    device = "GPU" if device_of(rows[0].jobs[0]).type == "cuda" else "CPU"
    console.print(
        f"Predicted as on a {device}; a GPU's driver and the workspaces of its convolutions come "
        "on top.",
        highlight=False,
        soft_wrap=True,
    )


def _table(title: str, lines: Sequence[Mapping[str, str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in lines[0]:
        words = column in ("", "change")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for line in lines:
        table.add_row(*line.values())
    return table


def _costs_of_runs(row: Row) -> dict[str, str]:
    network = row.network
    return {
        "": row.label,
        "runs": str(len(row.jobs)),
        "done": str(len(row.jobs) - len(row.remaining)),
        "steps": str(row.steps),
        "a step": _seconds(network.step_time),
        "volumes": f"{network.data.validation} + {network.data.test}",
        "a volume": _seconds(network.volume_time),
        "a run": duration(row.run_s),
        "left": duration(row.hours * 3600),
    }


def _costs_of_step(row: Row) -> dict[str, str]:
    step = row.network.step
    return {
        "": row.label,
        "parameters": f"{step.cost.parameters:,}",
        "GFLOP": f"{step.gflops:.1f}",
        **{kind: f"{getattr(step.memory, kind):.0f}" for kind in KINDS},
        "peak": f"{step.memory.peak:.0f}",
    }


def _seconds(timed: Timed) -> str:
    return f"{timed.seconds:.3g} s" + ("" if timed.scale == 1 else f" (x{timed.scale:.3g})")


def duration(seconds: float) -> str:
    """Write a duration in the unit that suits it.

    >>> duration(5400)
    '1.5 h'
    """
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def totals(rows: Sequence[Row]) -> list[str]:
    """Say how long all runs take, and what they leave on disk."""
    runs, left = sum(len(row.jobs) for row in rows), sum(len(row.remaining) for row in rows)
    device = device_of(rows[0].jobs[0])
    cores = "" if device.type == "cuda" else f", {available_cores()} cores"
    hours = sum(row.hours for row in rows)
    waiting = [row for row in rows if row.remaining]
    sets = {row.network.data.root: row.network.data for row in waiting}
    caches = {row.network.data.cache: row.network.data for row in waiting}
    phantoms = sum(data.phantoms for data in sets.values())
    uncached = sum(data.uncached for data in caches.values())
    sizes = {
        "checkpoints": sum(row.checkpoint_bytes for row in rows),
        f"cache of {uncached} cases": sum(data.cache_bytes for data in caches.values()),
        f"{phantoms} phantoms": sum(data.phantom_bytes for data in sets.values()),
    }
    parts = ", ".join(f"{name} {size / GIGA:.2f}" for name, size in sizes.items() if size)
    first = (
        f"{runs} run{'s' if runs > 1 else ''}, {runs - left} done: {duration(hours * 3600)} left, "
        f"at most, in one process on this machine ({device_name()}{cores})"
    )
    not_timed = "Not in it: loading patches, metrics and pictures"
    if phantoms or uncached:
        not_timed += ", making phantoms and cache"
    if any(row.jobs[0].config.compile for row in rows):
        not_timed += ", compiling and what it saves"
    lines = [f"{first}. {not_timed}.", f"Disk: {sum(sizes.values()) / GIGA:.2f} GB ({parts})."]
    if any(row.network.step_time.scale != 1 or row.network.volume_time.scale != 1 for row in rows):
        lines.append("(x...): a part was run, and its time multiplied.")
    return lines


def precisions(rows: Sequence[Row]) -> list[str]:
    """Say how much longer a step takes in another precision than float32, as measured."""
    lines = {}
    for row in rows:
        precision = row.jobs[0].plain["trainer"]["precision"]
        if precision not in ("32-true", *lines):
            times = slowdown(row.jobs[0], row.network.step_time, BUDGET_S / 10)
            lines[precision] = (
                f"{precision} takes {times:.2g} times as long as 32-true on this machine."
            )
    return list(lines.values())


def prospects(jobs: Sequence[Job]) -> list[str]:
    """Say what a sweep over factors will be able to tell, judging by its runs that are finished."""
    report = jobs[0].plain.get("report")
    if not report:
        return []
    runs = [
        Run(Cell(job.config.cell.factor, str(job.config.cell.level)), job.config.seed, job.folder)
        for job in jobs
    ]
    seeds = len({run.seed for run in runs})
    if seeds < 2:
        return ["One seed says nothing about the next one: no level can be decided with it."]
    levels = len({run.cell for run in runs} - {BASELINE_CELL})
    pilots: dict[Cell, list[Run]] = {}
    for run in runs:
        if run.folder.is_finished:
            pilots.setdefault(run.cell, []).append(run)
    pilots = {cell: pilot for cell, pilot in pilots.items() if len(pilot) > 1}
    baseline = pilots.pop(BASELINE_CELL, [])
    if not baseline or not pilots:
        return [
            "What the sweep can tell is not known before two seeds of the baseline and of one "
            "level are finished."
        ]
    if len({tuple(run.scores) for pilot in (baseline, *pilots.values()) for run in pilot}) > 1:
        return ["What the sweep can tell is not known: its finished runs have other test cases."]
    last = looks_of(seeds, report["looks"], report["alpha"])[-1]
    lines = [f"What the sweep can tell four times in five, for half of {len(pilots)} levels:"]
    for region, margin in report["margin"].items():
        found = [
            prospect(differences, seeds, last["alpha"], levels, len(report["margin"]))
            for pilot in pilots.values()
            if len(differences := _differences(baseline, pilot, region)) > 1
        ]
        detectable, provable = np.median(found, axis=0) if found else (np.nan, np.nan)
        lines.append(
            f"{region}: that a difference of {detectable:.3f} is not 0, and that one of 0 is "
            f"within {provable:.3f} (after {seeds} seeds, {levels} levels). The margin is "
            f"{margin:g}{', too narrow: it cannot decide' if not provable <= margin else ''}."
        )
    return lines


def _differences(baseline: Sequence[Run], level: Sequence[Run], region: str) -> np.ndarray:
    """Level minus baseline (S, N) of the S seeds that both have."""
    by_seed = {run.seed: run.dice(region) for run in baseline}
    return np.array([run.dice(region) - by_seed[run.seed] for run in level if run.seed in by_seed])
