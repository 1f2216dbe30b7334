"""`hydra/sweeper=one_factor`: a baseline, and every other level of every factor by itself.

Every swept key is a factor, and the first of its values is the baseline's. A cell differs from the
baseline in one factor; all cells are repeated for every `seed`. `factors=norm,model.depth` keeps
the other factors at their baseline. Before the first cell starts, the plan is written beside the
runs (`plan.json`): which cells there are, and the margin that the report will judge them by. Hydra
finds sweepers in packages called `hydra_plugins` only, hence this folder.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from files import write_json

PLAN_NAME = "plan.json"
BASELINE = "baseline"
SEED = "seed"
FACTORS = "factors"


@dataclass
class OneFactorSweeperConf:
    """The options of Hydra's own sweeper."""

    _target_: str = "hydra_plugins.one_factor_sweeper.OneFactorSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(
    group="hydra/sweeper", name="one_factor", node=OneFactorSweeperConf, provider="one_factor"
)


class OneFactorSweeper(BasicSweeper):
    """Hydra's own sweeper with other jobs, which it writes down before the first starts."""

    def sweep(self, arguments: list[str]) -> Any:  # noqa: ANN401  (the parent's)
        """Launch all cells of `hydra.sweeper.params` and the command line's overrides."""
        self.command = shlex.join(["python", "train.py", *arguments])
        return super().sweep(arguments)

    def split_arguments(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Batches of jobs, each a list of overrides.

        All cells of a seed come before the next seed, so that a sweep that is stopped half-way has
        as many runs of every cell.
        """
        levels = {override.get_key_element(): values_of(override) for override in overrides}
        seeds = levels.pop(SEED, ["0"])
        levels = only(levels.pop(FACTORS, None), levels)
        jobs = [
            [f"{key}={value}" for key, value in {**values, SEED: seed}.items()]
            for seed in seeds
            for values in cells(levels)
        ]
        return [list(batch) for batch in self.split_overrides_to_chunks(jobs, max_batch_size)]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose every job, as Hydra does before the first starts, and write the plan."""
        assert self.hydra_context is not None
        assert self.config is not None
        planned = []
        for overrides in batch:
            config = self.hydra_context.config_loader.load_sweep_config(
                self.config, list(overrides)
            )
            HydraConfig.instance().set_config(config)  # what `${hydra:...}` refers to
            cell = {"run": config.hydra.sweep.subdir, "seed": config.seed}
            planned.append({**cell, "factor": config.cell.factor, "level": config.cell.level})
        HydraConfig.instance().set_config(self.config)
        add_to_plan(
            Path(self.config.hydra.sweep.dir) / PLAN_NAME,
            {
                "stated": datetime.now(UTC).isoformat(timespec="seconds"),
                "report": OmegaConf.to_container(self.config.report, resolve=True),
                "commands": [self.command],
                "cells": planned,
            },
        )


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
    """The values that an override sweeps over, or its only one."""
    if override.is_discrete_sweep():
        return [str(value) for value in override.sweep_string_iterator()]
    if override.is_sweep_override():
        raise CompactHydraException(
            f"{override.get_key_element()}: expected values between commas, found an interval"
        )
    return [override.get_value_element_as_str()]


def cells(levels: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    """The overrides of the baseline, then of every cell; `cell` says which one it is."""
    baseline = {key: values[0] for key, values in levels.items()}
    yield {**baseline, "cell.factor": BASELINE, "cell.level": BASELINE}
    for key, (_, *others) in levels.items():
        for value in others:
            yield {**baseline, key: value, "cell.factor": key, "cell.level": f"'{value}'"}


def add_to_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write a plan. Sweeps with the same baseline and margin share a plan, and so their runs.

    Raises:
        CompactHydraException: The file has another baseline or another margin.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            plan = merged(json.loads(path.read_text()), plan, path)
        write_json(path, plan)


def merged(earlier: dict[str, Any], plan: dict[str, Any], path: Path) -> dict[str, Any]:
    """Add the new cells of a plan to the one in the file; raises what `add_to_plan` raises."""
    if earlier["report"] != plan["report"]:
        raise CompactHydraException(
            f"{path}: report is {earlier['report']} there and {plan['report']} here; what was "
            "stated before the runs stands: give this sweep a name=... of its own"
        )
    for seed, run in baselines(plan).items():
        expected = baselines(earlier).get(seed, run)
        if run != expected:
            raise CompactHydraException(
                f"{path}: the baseline of seed {seed} is {expected} there and {run} here; give "
                "this sweep a name=... of its own"
            )
    known = {cell["run"] for cell in earlier["cells"]}
    return {
        **earlier,
        "commands": [*dict.fromkeys([*earlier["commands"], *plan["commands"]])],
        "cells": earlier["cells"] + [c for c in plan["cells"] if c["run"] not in known],
    }


def baselines(plan: dict[str, Any]) -> dict[int, str]:
    """Run of the baseline by seed."""
    return {cell["seed"]: cell["run"] for cell in plan["cells"] if cell["factor"] == BASELINE}
