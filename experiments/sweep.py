"""A sweep over factors: what was planned, which runs are finished, and what they scored."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from errors import InputError
from experiments.run import RunFolder
from experiments.tables import write_csv
from files import write_text
from hydra_plugins.one_factor_sweeper import BASELINE, PLAN_NAME, read_plan

# The mean over the regions, as `RegionMetrics` logs it. A sweep over factors is a study of Dice.
VALIDATION_DICE = "val/dice"
KEPT_SCORES = ("dice_", "false_alarm_mm3_")  # how those begin that a report needs of a case


class Cell(NamedTuple):
    """A network of the sweep, which was trained with several seeds.

    Attributes:
        factor: Key of the value in which it differs from the baseline, as on the command line.
        level: That value.
    """

    factor: str
    level: str


BASELINE_CELL = Cell(BASELINE, BASELINE)


class Look(NamedTuple):
    """A look at the runs, at which verdicts may be given.

    Attributes:
        seeds: Number of seeds, of those planned, that it looks at: the first ones.
        alpha: Error rate that it may spend.
    """

    seeds: int
    alpha: float


@dataclass(frozen=True)
class Run:
    """One run of a plan.

    Attributes:
        cell: The network that it trains.
        seed: Seed of its weights, patches and augmentation.
        folder: Folder of the run.
        family: Number of the family of its cell: cells that were planned together.
    """

    cell: Cell
    seed: int
    folder: RunFolder
    family: int = 0

    @classmethod
    def from_plan(cls, planned: Mapping[str, Any], folder: Path) -> "Run":
        """Read an entry of the plan of a sweep.

        Args:
            planned: The entry.
            folder: Folder of the sweep.
        """
        return cls(
            cell=Cell(planned["factor"], str(planned["level"])),
            seed=planned["seed"],
            folder=RunFolder(folder / planned["run"]),
            family=planned["family"],
        )

    @property
    def name(self) -> str:
        """Name of the run, and of its folder."""
        return self.folder.path.name

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """Test case -> score -> value, of a finished run."""
        with self.folder.cases_file.open(newline="") as file:
            return {
                row.pop("case"): {score: float(value) for score, value in row.items()}
                for row in csv.DictReader(file)
            }

    def dice(self, region: str) -> np.ndarray:
        """Dice (N,) of a region in every test case; NaN in a case that lacks it."""
        return np.array([scores[f"dice_{region}"] for scores in self.scores.values()])

    def false_alarms_mm3(self, region: str) -> np.ndarray:
        """Volume (N,) predicted of a region in cases that lack it; NaN in those that have it."""
        return np.array([scores[f"false_alarm_mm3_{region}"] for scores in self.scores.values()])

    def learning_curve(self) -> np.ndarray:
        """Epoch and validation Dice (E, 2).

        Where a run was resumed, an epoch can be there twice; the later one counts.
        """
        by_epoch: dict[int, float] = {}
        for path in self.folder.metrics_files:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if row.get(VALIDATION_DICE):
                        by_epoch[int(row["epoch"])] = float(row[VALIDATION_DICE])
        return np.array(sorted(by_epoch.items())).reshape(-1, 2)


@dataclass(frozen=True)
class Sweep:
    """The plan of a sweep, and what of it is finished.

    Attributes:
        folder: Folder of the runs.
        margin: Primary region -> the smallest difference of Dice that matters.
        reason: Why these margins.
        alpha: Error rate of each of the two tests, over a family and all looks.
        stated: Time when all this was written down, before the first run.
        seeds: Seeds that were planned, in the order in which they are trained.
        looks: When verdicts may be given.
        commands: Commands that train the runs.
        finished: Runs that are finished, in the order of the plan.
        missing: The other runs of the plan.
    """

    folder: Path
    margin: dict[str, float]
    reason: str
    alpha: float
    stated: str
    seeds: list[int]
    looks: list[Look]
    commands: list[str]
    finished: list[Run]
    missing: list[Run]

    @property
    def cases(self) -> list[str]:
        """Names of the test cases, which all runs share."""
        return list(self.finished[0].scores)

    @property
    def regions(self) -> list[str]:
        """Regions that are scored, the primary ones and the others."""
        columns = next(iter(self.finished[0].scores.values()))
        return [name.removeprefix("dice_") for name in columns if name.startswith("dice_")]

    def levels(self) -> list[Cell]:
        """List the cells that have a finished run, without the baseline."""
        return [cell for cell in _cells(self.finished) if cell != BASELINE_CELL]

    def runs_of(self, cell: Cell) -> list[Run]:
        """List the finished runs of a cell, by seed."""
        runs = [run for run in self.finished if run.cell == cell]
        return sorted(runs, key=lambda run: run.seed)

    def dice(self, cell: Cell, region: str) -> dict[int, np.ndarray]:
        """Dice (N,) of a region in the N test cases, by the finished seeds of a cell."""
        return {run.seed: run.dice(region) for run in self.runs_of(cell)}

    def families(self) -> list[list[Cell]]:
        """List the levels of the plan by the family that they were planned in."""
        families: dict[int, list[Cell]] = {}
        for run in [*self.finished, *self.missing]:
            if run.cell != BASELINE_CELL and run.cell not in families.setdefault(run.family, []):
                families[run.family].append(run.cell)
        return [families[number] for number in sorted(families)]


def keep(sweep: Sweep, folder: Path) -> None:
    """Copy what a report needs of the finished runs, some kilobytes each, to a folder of a sweep.

    It is to be committed as a long sweep goes on, so that a lost machine loses no run: copied back,
    the runs are finished there, and the same command trains the others. Checkpoints, pictures and
    what was logged of every step stay behind.

    Args:
        sweep: The sweep.
        folder: Gets `plan.json`, and a folder a run. What it has of other runs is left alone.
    """
    write_text(folder / PLAN_NAME, (sweep.folder / PLAN_NAME).read_text())
    for run in sweep.finished:
        copy = RunFolder(folder / run.name)
        rows = [
            {
                "case": case,
                **{k: f"{v:.6g}" for k, v in scores.items() if k.startswith(KEPT_SCORES)},
            }
            for case, scores in run.scores.items()
        ]
        curve = [{"epoch": int(e), VALIDATION_DICE: dice} for e, dice in run.learning_curve()]
        write_csv(copy.cases_file, rows)
        if curve:
            write_csv(copy.path / "csv" / "version_0" / "metrics.csv", curve)
        write_text(copy.results_file, run.folder.results_file.read_text())  # last: it is finished


def _cells(runs: list[Run]) -> list[Cell]:
    return list(dict.fromkeys(run.cell for run in runs))


def read_sweep(folder: Path) -> Sweep:
    """Read the plan of a sweep, and find its finished runs.

    Raises:
        InputError: There is no plan, or two runs were tested on different cases.
    """
    path = folder / PLAN_NAME
    if not path.is_file():
        raise InputError(
            f"{path}: not found; expected the folder of a sweep over factors, as "
            "`python train.py experiment=null_report` makes it"
        )
    plan = read_plan(path)
    runs = [Run.from_plan(planned, folder) for planned in plan["cells"]]
    finished = [run for run in runs if run.folder.is_finished]
    for run in finished:
        if list(run.scores) != list(finished[0].scores):
            raise InputError(
                f"{run.folder.path}: tested on other cases than {finished[0].folder.path}"
            )
    return Sweep(
        folder=folder,
        margin=plan["report"]["margin"],
        reason=plan["report"]["reason"],
        alpha=plan["report"]["alpha"],
        stated=plan["stated"],
        seeds=plan["seeds"],
        looks=[Look(**look) for look in plan["looks"]],
        commands=plan["commands"],
        finished=finished,
        missing=[run for run in runs if run not in finished],
    )
