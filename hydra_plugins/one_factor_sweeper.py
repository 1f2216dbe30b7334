"""`hydra/sweeper=one_factor`: a baseline, and every other level of every factor by itself.

The first value of every swept key is the baseline's. A cell differs from the baseline in one
factor; all cells are repeated for every `seed`. Before the first cell starts, the plan is written
beside the runs (`plan.json`): which cells there are, and the margin that the report will judge
them by. Hydra finds sweepers in packages called `hydra_plugins` only, hence this folder.
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

PLAN_NAME = "plan.json"
BASELINE = "baseline"
SEED = "seed"


@dataclass
class OneFactorSweeperConf:
    """Options of `hydra.sweeper`, as of Hydra's own sweeper."""

    _target_: str = "hydra_plugins.one_factor_sweeper.OneFactorSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(
    group="hydra/sweeper", name="one_factor", node=OneFactorSweeperConf, provider="one_factor"
)


class OneFactorSweeper(BasicSweeper):
    """Makes the jobs of Hydra's own sweeper another way, and writes them down."""

    def sweep(self, arguments: list[str]) -> Any:  # noqa: ANN401  (as of the parent)
        """Launch all cells of `hydra.sweeper.params` and the command line's overrides."""
        self.command = shlex.join(["python", "train.py", *arguments])
        return super().sweep(arguments)

    def split_arguments(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Batches of jobs, a job a list of overrides; seed by seed, so that half is balanced."""
        levels = {override.get_key_element(): values_of(override) for override in overrides}
        seeds = levels.pop(SEED, ["0"])
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
    """The baseline, then the baseline with one factor changed; each says what it is."""
    baseline = {key: values[0] for key, values in levels.items()}
    yield {**baseline, "cell.factor": BASELINE, "cell.level": BASELINE}
    for key, (_, *others) in levels.items():
        for value in others:
            yield {**baseline, key: value, "cell.factor": key, "cell.level": f"'{value}'"}


def add_to_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write a plan; sweeps with the same baseline and margin share one, and so their runs.

    Raises:
        CompactHydraException: The file has another baseline or another margin.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            plan = merged(json.loads(path.read_text()), plan, path)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(plan, indent=1) + "\n")
        partial.replace(path)


def merged(earlier: dict[str, Any], plan: dict[str, Any], path: Path) -> dict[str, Any]:
    """What stands in the file, and the cells that are new; raises as `add_to_plan`."""
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
    """Seed -> run of the baseline."""
    return {cell["seed"]: cell["run"] for cell in plan["cells"] if cell["factor"] == BASELINE}
