"""Sweepers: Hydra's own, which checks every job before the first one starts, and `one_factor`.

`hydra/sweeper=one_factor` trains a baseline, and every other level of every factor by itself. Every
swept key is a factor, and the first of its values is the baseline's. A cell differs from the
baseline in one factor; all cells are repeated for every `seed`. `factors=norm,model.depth` keeps
the other factors at their baseline. Before the first cell starts, the plan is written beside the
runs (`plan.json`): which cells there are, their seeds, the margins that the report will judge them
by and why, and at which looks, each with the error rate that it may spend. Hydra finds sweepers in
packages called `hydra_plugins` only, hence this folder.
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from errors import InputError
from experiments.schema import checked
from files import read_json, write_json

T = TypeVar("T")
UseJob = Callable[[DictConfig, DictConfig], T]  # of a job's configuration, composed and checked

PLAN_NAME = "plan.json"
BASELINE = "baseline"
SEED = "seed"
FACTORS = "factors"
CELL_KEYS = {"run", "seed", "factor", "level", "family"}


@dataclass
class OneFactorSweeperConf:
    """The options of Hydra's own sweeper."""

    _target_: str = "hydra_plugins.one_factor_sweeper.OneFactorSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


@dataclass
class CheckedSweeperConf(OneFactorSweeperConf):
    """The same options."""

    _target_: str = "hydra_plugins.one_factor_sweeper.CheckedSweeper"


for name, node in {"basic": CheckedSweeperConf, "one_factor": OneFactorSweeperConf}.items():
    # `basic`, the sweeper of `-m`, takes the place of Hydra's own of that name.
    ConfigStore.instance().store(group="hydra/sweeper", name=name, node=node, provider="hydra")


class CheckedSweeper(BasicSweeper):
    """Hydra's own sweeper, which checks all jobs before the first one starts.

    A value that no run can have is found at once, and not after hours in which the other jobs of
    the sweep are trained. Hydra itself only composes the configurations of the jobs.
    """

    def split_arguments(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Return batches of jobs, each a list of overrides, that can be trained.

        Raises:
            HydraException: A job cannot be composed.
            InputError: The configuration of a job has a value that it cannot have.
        """
        batches = self.batches_of(overrides, max_batch_size)
        self.prepare([self.composed(job, self.planned) for batch in batches for job in batch])
        return batches

    def all_jobs(self, arguments: Sequence[str], use: UseJob[T]) -> list[T]:
        """Compose and check all jobs, start none, and write nothing.

        Args:
            arguments: The overrides of the command line.
            use: What to make of the configuration of each job, as composed and as checked.

        Raises:
            HydraException: A job cannot be composed.
            InputError: The configuration of a job has a value that it cannot have.
        """
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (batch,) = self.batches_of(overrides, None)
        return [self.composed(job, use) for job in batch]

    def batches_of(
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Return the batches of jobs that the overrides ask for: of all values with all others."""
        return BasicSweeper.split_arguments(overrides, max_batch_size)

    def composed(self, overrides: Sequence[str], use: UseJob[T]) -> T:
        """Compose and check the configuration of a job; return what `use` makes of it."""
        assert self.hydra_context is not None
        assert self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        HydraConfig.instance().set_config(config)  # what `${hydra:...}` refers to
        try:
            return use(config, checked(config))
        finally:
            HydraConfig.instance().set_config(self.config)

    def planned(self, config: DictConfig, task: DictConfig) -> dict[str, Any]:
        """Return what `prepare` has to know of a job."""
        return {}

    def prepare(self, jobs: list[dict[str, Any]]) -> None:
        """Do what has to be done before the first job starts."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Do nothing: all jobs have been composed already."""


class OneFactorSweeper(CheckedSweeper):
    """Trains a baseline and its cells, and writes them down before the first one starts."""

    def sweep(self, arguments: list[str]) -> Any:  # noqa: ANN401  (the parent's)
        """Launch all cells of `hydra.sweeper.params` and the command line's overrides."""
        self.command = shlex.join(["python", "train.py", *arguments])
        return super().sweep(arguments)

    def batches_of(
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Return batches of cells.

        All cells of a seed come before the next seed, so that a sweep that is stopped half-way has
        as many runs of every cell.
        """
        levels = {override.get_key_element(): values_of(override) for override in overrides}
        seeds = levels.pop(SEED, ["0"])
        levels = only(levels.pop(FACTORS, self.factors()), levels)
        jobs = [
            [f"{key}={value}" for key, value in {**values, SEED: seed}.items()]
            for seed in seeds
            for values in cells(levels)
        ]
        return [list(batch) for batch in self.split_overrides_to_chunks(jobs, max_batch_size)]

    def factors(self) -> list[str] | None:
        """Return the factors that the experiment names; None: all of them."""
        assert self.config is not None
        named = self.config.get(FACTORS)
        return None if named is None else str(named).split(",")

    def planned(self, config: DictConfig, task: DictConfig) -> dict[str, Any]:
        """Return the entry of a cell in the plan."""
        cell = {"run": config.hydra.sweep.subdir, "seed": config.seed}
        return {**cell, "factor": config.cell.factor, "level": config.cell.level, "family": 0}

    def prepare(self, jobs: list[dict[str, Any]]) -> None:
        """Write the plan."""
        assert self.config is not None
        report: Any = OmegaConf.to_container(self.config.report, resolve=True)
        seeds = list(dict.fromkeys(job["seed"] for job in jobs))
        add_to_plan(
            Path(self.config.hydra.sweep.dir) / PLAN_NAME,
            {
                "stated": datetime.now(UTC).isoformat(timespec="seconds"),
                "report": report,
                "seeds": seeds,
                "looks": looks_of(len(seeds), report["looks"], report["alpha"]),
                "commands": [self.command],
                "cells": jobs,
            },
        )


def looks_of(seeds: int, wanted: Sequence[int], alpha: float) -> list[dict[str, float]]:
    """Return the looks of a plan, each with the seeds that it takes and what it may spend of alpha.

    They are those that are wanted before the last seed, and one after it.
    """
    from experiments.statistics import spending  # heavy: not for a value that cannot be used

    looks = [*sorted({look for look in wanted if look < seeds}), seeds]
    return [
        {"seeds": look, "alpha": spent}
        for look, spent in zip(looks, spending(looks, alpha), strict=True)
    ]


def only(factors: list[str] | None, levels: dict[str, list[str]]) -> dict[str, list[str]]:
    """Keep all levels of the factors named, and the baseline's of all others; None names all.

    Raises:
        CompactHydraException: A factor that has no levels.
    """
    if factors is None:
        return levels
    known = [key for key, values in levels.items() if len(values) > 1]
    if unknown := [factor for factor in factors if factor not in known]:
        raise CompactHydraException(
            f"{FACTORS}: expected some of {', '.join(known)}, found {', '.join(unknown)}"
        )
    return {key: values if key in factors else values[:1] for key, values in levels.items()}


def values_of(override: Override) -> list[str]:
    """Return the values that an override sweeps over, or its only one."""
    if override.is_discrete_sweep():
        return [str(value) for value in override.sweep_string_iterator()]
    if override.is_sweep_override():
        raise CompactHydraException(
            f"{override.get_key_element()}: expected values between commas, found an interval"
        )
    return [override.get_value_element_as_str()]


def cells(levels: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    """Yield the overrides of the baseline, then of every cell; `cell` says which one it is."""
    baseline = {key: values[0] for key, values in levels.items()}
    yield {**baseline, "cell.factor": BASELINE, "cell.level": BASELINE}
    for key, (_, *others) in levels.items():
        for value in others:
            yield {**baseline, key: value, "cell.factor": key, "cell.level": f"'{value}'"}


def add_to_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write a plan. Sweeps with the same baseline and margins share a plan, and so their runs.

    Levels that come later are a family of their own: they change no verdict on those before.

    Raises:
        CompactHydraException: The file has another baseline or other margins, or lacks a seed.
        InputError: The file is no plan.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            plan = merged(read_plan(path), plan, path)
        write_json(path, plan)


def read_plan(path: Path) -> dict[str, Any]:
    """Read the plan of a sweep.

    Raises:
        InputError: There is none, or the file holds something else.
    """
    advice = "remove the file, and start the sweep again: what is finished is not run anew"
    plan = read_json(path, advice)
    cells, report = plan.get("cells"), plan.get("report")
    if (
        not isinstance(report, dict)
        or not isinstance(report.get("margin"), dict)
        or not {"alpha", "reason"} <= set(report)
        or not {"stated", "seeds", "looks", "commands"} <= set(plan)
        or not isinstance(cells, list)
        or not all(isinstance(cell, dict) and set(cell) >= CELL_KEYS for cell in cells)
    ):
        raise InputError(f"{path}: expected the plan of a sweep, found other JSON; {advice}")
    return plan


def merged(earlier: dict[str, Any], plan: dict[str, Any], path: Path) -> dict[str, Any]:
    """Add the new cells of a plan to the one in the file; raises what `add_to_plan` raises."""
    if earlier["report"] != plan["report"]:
        raise CompactHydraException(
            f"{path}: report is {earlier['report']} there and {plan['report']} here; what was "
            "stated before the runs stands: give this sweep a name=... of its own"
        )
    if unplanned := [seed for seed in plan["seeds"] if seed not in earlier["seeds"]]:
        raise CompactHydraException(
            f"{path}: seed expected some of {earlier['seeds']}, which were planned before the "
            f"first run, found {unplanned}: give this sweep a name=... of its own"
        )
    for seed, run in baselines(plan).items():
        expected = baselines(earlier).get(seed, run)
        if run != expected:
            raise CompactHydraException(
                f"{path}: the baseline of seed {seed} is {expected} there and {run} here; give "
                "this sweep a name=... of its own"
            )
    known = {cell["run"] for cell in earlier["cells"]}
    family = 1 + max(cell["family"] for cell in earlier["cells"])
    return {
        **earlier,
        "commands": [*dict.fromkeys([*earlier["commands"], *plan["commands"]])],
        "cells": earlier["cells"]
        + [{**cell, "family": family} for cell in plan["cells"] if cell["run"] not in known],
    }


def baselines(plan: dict[str, Any]) -> dict[int, str]:
    """Return the run of the baseline by seed."""
    return {cell["seed"]: cell["run"] for cell in plan["cells"] if cell["factor"] == BASELINE}
