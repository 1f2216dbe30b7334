"""Train one configuration and test it on whole volumes; `-m` sweeps. See conf/config.yaml.

Networks, data and Lightning are imported when a run starts, not before: `--help`, `--cfg job` and
a typo answer at once.
"""

import logging
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from errors import InputError
from experiments.combinations import check_arguments, check_sources
from experiments.command import BusyError, command, job
from experiments.jobs import composed_jobs, memory_limit_gb, wants_plan
from experiments.ranks import all_ranks, is_first
from experiments.run import RunFolder
from experiments.schema import checked
from experiments.usage import usage

if TYPE_CHECKING:
    from experiments.results import Results


def run_name(*, _root_: DictConfig) -> str:
    """Name a run; what no run can have is refused here, before Hydra makes a folder.

    Raises:
        InputError: See `checked`.
    """
    return RunFolder.name(checked(_root_), _root_.hydra.runtime.choices)


def count(names: ListConfig, extra: int = 0, times: int = 1) -> int:
    """Count channels: the names of a list and `extra` more, all of them `times` times."""
    return (len(names) + extra) * times


def basename(path: str | None) -> str:
    """Return the last part of a path; empty as long as a run has no folder, as with `--cfg`."""
    return os.path.basename(path or "")


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("count", count, replace=True)
OmegaConf.register_new_resolver("basename", basename, replace=True)
OmegaConf.register_new_resolver("min", min, replace=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    with job():
        return train(config)
    return math.nan  # a job of a sweep that another process is training


def train(config: DictConfig) -> float:
    """Run what `config` describes, or read what came out of it before.

    Returns:
        The objective; NaN if it is a score of cases that the split does not have, in the further
        processes of a run on several devices, and if no verdict of a sweep waits for the run.

    Raises:
        InputError: A value, a file or the data cannot be used.
        BusyError: Another process is training the run.
    """
    config = checked(config)
    folder = RunFolder(Path(config.run_dir))
    if not folder.is_finished or config.again:
        check_sources(config)
    from experiments.results import Results, show  # heavy: not for a value that cannot be used
    from experiments.verdicts import is_needless

    with folder.claimed() as mine:
        if not mine:
            raise BusyError(f"{folder.path}: another process is training this run")
        if folder.is_finished and not config.again:
            results = Results.read(folder)
            logging.info("finished before; again=true trains it again")
        elif is_needless(folder, **config.cell, seed=config.seed):
            logging.info("not trained: its level is decided without it, see the report")
            return math.nan
        else:
            results = run(config, folder)
            if not is_first():
                return math.nan
            results.write(folder)
    show(results, folder)
    stage = str(config.objective).split("/")[0]
    if stage in ("val", "test") and not any(
        name.startswith(f"{stage}/") for name in results.metrics
    ):
        logging.warning(
            "objective: there is no %s, as the split has no such cases", config.objective
        )
        return math.nan
    if config.objective not in results.metrics:
        known = ", ".join(sorted(results.metrics))
        raise InputError(f"objective: expected one of {known}; found {config.objective}")
    return results.metrics[config.objective]


def run(config: DictConfig, folder: RunFolder) -> "Results":
    """Build, fit, validate and test."""
    import pytorch_lightning as pl

    from experiments.training import fit_and_test, prepare_process
    from lightning_modules.callbacks import RememberStop, SaveConfig, SaveSeenCases
    from lightning_modules.checkpoint import check_same_network, first_readable, load
    from lightning_modules.constructors import check_constructors
    from lightning_modules.networks.initial import initialise

    prepare_process(folder)
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    check_constructors(plain, "configuration")  # else no checkpoint of this run could be loaded
    check_arguments(config)
    pl.seed_everything(config.seed, workers=True)
    build = partial(instantiate, _convert_="all")  # plain lists and dicts from here on
    module, datamodule, trainer = build(config.module), build(config.data), build(config.trainer)
    initialise(module.network, config.seed)
    if config.finetune is not None:
        check_same_network(config.finetune, plain["model"])
        module.network.load_state_dict(load(config.finetune).module.network.state_dict())
    try:
        module.configure_optimizers()
    except ValueError as error:  # torch knows combinations that it refuses
        raise InputError(f"optimizer, scheduler: {error}") from error
    latest = None if config.again else first_readable([folder.last, folder.best])
    resume = latest or config.resume
    own = RememberStop(is_same_run=latest is not None)
    trainer.callbacks += [SaveConfig(plain), SaveSeenCases(config.finetune), own]
    if resume is not None:
        check_same_network(resume, plain["model"])
    with all_ranks(trainer):
        return fit_and_test(module, datamodule, trainer, folder, plain, resume, anew=config.again)


def plan(arguments: Sequence[str]) -> None:
    """Say what a command would train and what that costs; nothing is written.

    Raises:
        InputError: A value or the data cannot be used, or nothing fits in `vram_gb`.
    """
    limit_gb = memory_limit_gb(arguments)
    jobs = composed_jobs(arguments, Path(__file__).parent / "conf")
    for planned in jobs:
        check_sources(planned.config)
    from experiments.plan import show_plan  # heavy, as above

    show_plan(jobs, limit_gb)


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv):
        print(usage())
    else:
        with command():
            plan(sys.argv[1:]) if wants_plan(sys.argv[1:]) else main()
