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
from hydra_plugins.one_factor_sweeper import BASELINE, PLAN_NAME, read_plan

# The mean over the regions, as `RegionMetrics` logs it. A sweep over factors is a study of Dice.
VALIDATION_DICE = "val/dice"


class Cell(NamedTuple):
    """A network of the sweep, which was trained with several seeds.

    Attributes:
        factor: Key of the value in which it differs from the baseline, as on the command line.
        level: That value.
    """

    factor: str
    level: str


BASELINE_CELL = Cell(BASELINE, BASELINE)


@dataclass(frozen=True)
class Run:
    """One run of a plan.

    Attributes:
        cell: The network that it trains.
        seed: Seed of its weights, patches and augmentation.
        folder: Folder of the run.
    """

    cell: Cell
    seed: int
    folder: RunFolder

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

    def dice(self, region: str) -> list[float]:
        """Dice of a region in every test case."""
        return [scores[f"dice_{region}"] for scores in self.scores.values()]

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
        margin: Region -> the smallest difference of Dice that matters.
        alpha: Error rate of the tests, over the whole family.
        stated: Time when margin and cells were written down, before the first run.
        commands: Commands that train the runs.
        finished: Runs that are finished, in the order of the plan.
        missing: The other runs of the plan.
    """

    folder: Path
    margin: dict[str, float]
    alpha: float
    stated: str
    commands: list[str]
    finished: list[Run]
    missing: list[Run]

    @property
    def cases(self) -> list[str]:
        """Names of the test cases, which all runs share."""
        return list(self.finished[0].scores)

    def levels(self) -> list[Cell]:
        """List the cells that have a finished run, without the baseline."""
        return [cell for cell in _cells(self.finished) if cell != BASELINE_CELL]

    def planned_levels(self) -> list[Cell]:
        """List all cells of the plan, without the baseline; those with a finished run first."""
        cells = _cells([*self.finished, *self.missing])
        return [cell for cell in cells if cell != BASELINE_CELL]

    def runs_of(self, cell: Cell) -> list[Run]:
        """List the finished runs of a cell, by seed."""
        runs = [run for run in self.finished if run.cell == cell]
        return sorted(runs, key=lambda run: run.seed)

    def dice(self, cell: Cell, region: str) -> np.ndarray:
        """Dice (S, N) of the S finished seeds of a cell, which may be none, in the N test cases."""
        runs = self.runs_of(cell)
        return np.array([run.dice(region) for run in runs]).reshape(len(runs), len(self.cases))


def _cells(runs: list[Run]) -> list[Cell]:
    return list(dict.fromkeys(run.cell for run in runs))


def read_sweep(folder: Path) -> Sweep:
    """Read the plan of a sweep, and find its finished runs.

    Raises:
        InputError: There is no plan or no finished run of the baseline, or two runs were tested on
            different cases.
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
    if not any(run.cell == BASELINE_CELL for run in finished):
        raise InputError(f"{folder}: the baseline has no finished run yet; nothing to compare with")
    for run in finished:
        if list(run.scores) != list(finished[0].scores):
            raise InputError(
                f"{run.folder.path}: tested on other cases than {finished[0].folder.path}"
            )
    return Sweep(
        folder=folder,
        margin=plan["report"]["margin"],
        alpha=plan["report"]["alpha"],
        stated=plan["stated"],
        commands=plan["commands"],
        finished=finished,
        missing=[run for run in runs if run not in finished],
    )
