"""The jobs that a command line of train.py asks for: composed and checked, but not started.

Hydra makes the folder of a run before it calls `main`, and a sweeper that of its sweep. Here the
configurations are composed without either, by the same loader and the same sweeper.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from experiments.rules import FLAGS, refuse
from experiments.run import RunFolder
from experiments.schema import checked, checked_value

SWEEP_FLAGS = ("-m", "--multirun")
OWN_KEYS = ("plan", "vram_gb")  # of the command line; a job does not have them


@dataclass(frozen=True, eq=False)
class Job:
    """A run that could be started.

    Attributes:
        config: Its configuration, checked, as train.py gets it.
        overrides: The values of the command line that are its own.
    """

    config: DictConfig
    overrides: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.run_dir))

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The configuration as plain dictionaries, with all references resolved."""
        content: Any = OmegaConf.to_container(self.config, resolve=True)
        return content

    def changed(self, values: Mapping[str, Any]) -> "Job":
        """Return the job with other values, by key.

        Raises:
            InputError: A value is not what its key expects, or does not go with the others.
        """
        config = copy.deepcopy(self.config)
        for key, value in values.items():
            OmegaConf.update(config, key, value, force_add=True)
        return Job(checked(config), self.overrides)


def wants_plan(arguments: Sequence[str]) -> bool:
    """Tell whether a command line has `plan=true`, and no flag but that of a sweep."""
    answers = [argument.partition("=")[2] for argument in arguments if _key(argument) == "plan"]
    flags = [argument for argument in arguments if argument.startswith("-")]
    return bool(answers) and FLAGS.get(answers[-1].lower(), False) and set(flags) <= {*SWEEP_FLAGS}


def memory_limit_gb(arguments: Sequence[str]) -> float | None:
    """Return the value of `vram_gb` on a command line; None if there is none.

    Raises:
        InputError: It is no number above 0.
        HydraException: It cannot be read.
    """
    given = [argument for argument in arguments if _key(argument) == "vram_gb"]
    values = [override.value() for override in OverridesParser.create().parse_overrides(given)]
    return checked_value("vram_gb", values[-1]) if values else None


def composed_jobs(arguments: Sequence[str], conf: Path) -> list[Job]:
    """Compose the jobs of a command line, in the order in which they would be trained.

    Args:
        arguments: Arguments of train.py.
        conf: Folder of the configuration.

    Raises:
        HydraException: A job cannot be composed.
        InputError: A value cannot be used, or the sweeper does not know its jobs in advance.
    """
    overrides = [
        argument
        for argument in arguments
        if argument not in SWEEP_FLAGS and _key(argument) not in OWN_KEYS
    ]
    sweeps = any(flag in arguments for flag in SWEEP_FLAGS)
    before = HydraConfig.instance().cfg
    try:
        with initialize_config_dir(str(conf.absolute()), version_base="1.3", job_name="train"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            overrides += ["hydra.mode=MULTIRUN"] if sweeps else []
            mode = hydra.get_mode("config", overrides) or RunMode.RUN
            master = hydra.compose_config("config", overrides, mode)
            if mode is RunMode.RUN:
                return [_job(master, checked(master), Path(master.hydra.run.dir))]
            context = HydraContext(hydra.config_loader, Callbacks())
            sweeper = Plugins.instance().instantiate_sweeper(
                config=master, hydra_context=context, task_function=lambda config: None
            )
            all_jobs = getattr(sweeper, "all_jobs", None)  # see `CheckedSweeper`
            if all_jobs is None:
                refuse("plan", "hydra/sweeper=basic or one_factor", type(sweeper).__name__)
            return all_jobs(list(master.hydra.overrides.task), _job_of_sweep)
    finally:
        HydraConfig.instance().cfg = before


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+")


def _job_of_sweep(config: DictConfig, task: DictConfig) -> Job:
    folder = Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir
    return _job(config, task, folder, tuple(config.hydra.overrides.task))


def _job(
    config: DictConfig, task: DictConfig, folder: Path, overrides: tuple[str, ...] = ()
) -> Job:
    """Make a job of a configuration, composed and checked; references to Hydra's node end here."""
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(config)  # what `${hydra:...}` refers to
    task.run_dir = str(config.run_dir)
    task.choices = OmegaConf.to_container(config.choices, resolve=True)
    return Job(task, overrides)
