"""The processes of a run that trains on several devices: how they start, and that all of them end.

The first process of a run, of rank 0, does all that is done once: it claims the folder, and writes
results, checkpoints, tables and logs. When the training starts, Lightning lets it start the others,
each with the command that describes this run.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from errors import InputError

if TYPE_CHECKING:
    import pytorch_lightning as pl

# Seconds that the first process waits for the others at the end, and that another one, which has
# failed, waits for the first: as a rule that has failed too, and says why.
END_S = 60
FAILED_S = 10
# What Lightning tells the other processes, and would take for its own rank in the next run.
VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def is_first() -> bool:
    """Tell whether this process is the only one of its run, or the first."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def all_ranks(trainer: "pl.Trainer") -> Iterator[None]:
    """Wrap all that a trainer does in a run; none of its processes outlives the first.

    Raises:
        InputError: The processes cannot be started from here.
    """
    from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

    launcher: Any = trainer.strategy.launcher
    starts_others = isinstance(launcher, _SubprocessScriptLauncher) and (
        not launcher.cluster_environment.creates_processes_externally
    )
    arguments, before = sys.argv[:], {name: os.environ.get(name) for name in VARIABLES}
    if starts_others:
        describe_this_run()
    elif not is_first():
        end_with_parent()
    patience_s = 0
    try:
        yield
        patience_s = END_S
    except BaseException:
        if not is_first():
            time.sleep(FAILED_S)
        raise
    finally:
        if trainer.world_size > 1:
            leave_group()
        if starts_others:
            end_others(launcher.procs, patience_s)
            sys.argv = arguments
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def end_others(processes: list[subprocess.Popen], patience_s: float) -> None:
    """Wait for processes to end, and kill those that take longer than that."""
    latest = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(latest - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    processes.clear()  # else Lightning, which watches them, ends this process too


def leave_group() -> None:
    """Leave the group of processes, so that the next run of a sweep can have its own."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def describe_this_run() -> None:
    """Let the command line describe this run alone: the other processes are started with it.

    That of a sweep describes all of its runs.

    Raises:
        InputError: A launcher of Hydra has started this process, with another command.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    if os.path.basename(sys.argv[0]) != "train.py":
        launcher = hydra.runtime.choices["hydra/launcher"]
        raise InputError(
            f"trainer.devices: expected 1 with hydra/launcher={launcher}, whose processes cannot "
            "start others; found several"
        )
    OmegaConf.set_readonly(hydra.run, False)  # pyright: ignore[reportArgumentType]
    hydra.run.dir = hydra.runtime.output_dir
    once = ["hydra/job_logging=disabled"]  # the first process has the log
    if hydra.mode is not RunMode.MULTIRUN:
        sys.argv += once
        return
    flags = [word for word in sys.argv[1:] if word.startswith("--config")]
    others = [word for word in hydra.overrides.hydra if not word.startswith("hydra.mode=")]
    sys.argv[1:] = [*flags, *hydra.overrides.task, *others, "hydra.mode=RUN", *once]


def end_with_parent() -> None:
    """Let the system end this process with the one that started it, however that ends (Linux)."""
    if sys.platform == "linux" and os.environ.get("LOCAL_RANK", "0") != "0":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
