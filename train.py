"""Train one configuration and test it on whole volumes; `-m` sweeps. See conf/config.yaml.

Networks, data and Lightning are imported when a run starts, not before: `--help`, `--cfg job` and
a typo answer at once.
"""

import hashlib
import json
import logging
import math
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from errors import InputError

if TYPE_CHECKING:
    from lightning_modules.results import Results

# What does not change the result of a run: where it is written, how it is reported.
NOT_PART_OF_A_RUN = {
    *("hydra", "logger", "run_dir", "choices", "cell", "report"),
    *("resume", "again", "objective"),
}
# They refer to the run's folder, which is what is being named; whatever else they refer to is part
# of the name by itself.
NOT_RESOLVED = {"callbacks", "trainer"}


def run_id(*, _root_: DictConfig) -> str:
    """Name of a run: its main choices and a hash of its whole configuration.

    The same question has the same folder, however it was typed.
    """
    body: dict[str, Any] = {}
    for key in sorted(set(map(str, _root_)) - NOT_PART_OF_A_RUN):
        node = _root_._get_node(key)
        is_tree = OmegaConf.is_config(node)
        body[key] = (
            OmegaConf.to_container(node, resolve=key not in NOT_RESOLVED)
            if is_tree
            else _root_[key]
        )
    del body["data"]["num_workers"]  # changes no patch
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:8]
    choices = _root_.hydra.runtime.choices
    return f"{choices.model}-{choices.norm}-s{_root_.seed}-{digest}"


OmegaConf.register_new_resolver("run_id", run_id, replace=True)
OmegaConf.register_new_resolver("len", len, replace=True)
OmegaConf.register_new_resolver("basename", os.path.basename, replace=True)
OmegaConf.register_new_resolver("min", min, replace=True)
OmegaConf.register_new_resolver("sum", lambda *terms: sum(terms), replace=True)
OmegaConf.register_new_resolver("product", lambda *factors: math.prod(factors), replace=True)


USER_ERRORS = (InputError, FloatingPointError, InstantiationException)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    try:
        return train(config)
    except USER_ERRORS as error:
        # In a sweep, Hydra keeps the error for the end and goes on with the other jobs.
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        logging.error(one_line(error))
        raise SystemExit(1) from None


USAGE = """\
Train one configuration, test it on whole volumes. `-m` sweeps over values between commas.

Choices (GROUP=OPTION):
{groups}

Values (KEY=VALUE), among others:
  name  seed  filters.base  filters.ratio  model.depth  model.bottleneck  optimizer.lr
  trainer.max_epochs  data.batch_size  data.patches_per_epoch  data.sampler.patch_size
  data.sampler.lesion_share  logger.wandb.offline=false  resume=CHECKPOINT  again=true

Examples:
  python train.py                                         the proxy on phantoms
  python train.py -m model=aeunet norm=group,batch        two runs
  python train.py data=brats data.data_set.root=FOLDER    your own scans
  python train.py --cfg job                               the whole configuration
  python train.py --hydra-help                            launchers, sweepers, completion"""


def usage() -> str:
    """What `--help` prints. Hydra's own takes seconds to list the same groups."""
    options = {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted((Path(__file__).parent / "conf").iterdir())
        if folder.is_dir()
    }
    lines = [f"  {group}: {', '.join(names)}" for group, names in options.items() if names]
    return USAGE.format(groups="\n".join(lines))


def one_line(error: Exception) -> str:
    """The message of an error of the user's; Hydra wraps those of constructors."""
    if isinstance(error, InstantiationException):
        if not isinstance(error.__cause__, ValueError):
            raise error
        return str(error.__cause__)
    return str(error)


def train(config: DictConfig) -> float:
    """Run what `config` describes, or read what came out of it before; returns the objective."""
    from lightning_modules.results import Results, claimed, is_finished, show

    folder = Path(config.run_dir)
    with claimed(folder) as mine:
        if not mine:
            logging.warning("%s: another process is training it", folder)
            return math.nan
        if is_finished(folder) and not config.again:
            results = Results.read(folder)
            logging.info("finished before; again=true trains it again")
        else:
            results = run(config, folder)
            results.write(folder)
    show(results, folder)
    if config.objective not in results.metrics:
        known = ", ".join(sorted(results.metrics))
        raise InputError(f"objective: expected one of {known}; found {config.objective}")
    return results.metrics[config.objective]


def run(config: DictConfig, folder: Path) -> "Results":
    """Build, fit and test."""
    import pytorch_lightning as pl
    import wandb
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    from lightning_modules.callbacks import SaveConfig, summarise_best
    from lightning_modules.checkpoint import check_same_network
    from lightning_modules.cost import Cost
    from lightning_modules.results import (
        Results,
        Stopwatch,
        device_name,
        peak_memory_mib,
    )

    keep_wandb_at_home(folder)
    quieten_lightning()
    pl.seed_everything(config.seed, workers=True)
    build = partial(instantiate, _convert_="all")  # plain lists and dicts from here on
    module, datamodule, trainer = build(config.module), build(config.data), build(config.trainer)
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    trainer.callbacks.append(SaveConfig(plain))

    last = folder / "last.ckpt"
    resume = config.resume or (last if last.is_file() and not config.again else None)
    if resume is not None:
        check_same_network(resume, plain["model"])
    cost = Cost.of(
        module.network,
        plain["data"]["batch_size"],
        plain["model"]["in_channels"],
        plain["data"]["sampler"]["patch_size"],
    )
    datamodule.prepare_data()  # what the user's files have wrong shows before a logger starts
    watch = Stopwatch()
    exit_code = 1
    try:
        for logger in trainer.loggers:
            logger.log_hyperparams(plain)
        summarise_best(trainer, module.loss.regions)
        with watch("fit"):
            trainer.fit(module, datamodule, ckpt_path=resume)
        epochs = trainer.current_epoch
        metrics = dict(trainer.callback_metrics)
        with watch("test"):
            trainer.test(module, datamodule, ckpt_path=folder / "best.ckpt", verbose=False)
        metrics |= trainer.callback_metrics
        exit_code = 0
    except SIGTERMException:  # it says 0, as if all were done
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        wandb.finish(exit_code=exit_code)  # else the next job of a sweep logs into it
    return Results(
        run=folder.name,
        choices=dict(config.choices),
        metrics={name: float(value) for name, value in metrics.items()},
        cost=cost,
        epochs=epochs,
        checkpoint="best.ckpt",
        fit_s=watch.seconds["fit"],
        test_s=watch.seconds["test"],
        peak_memory_mib=peak_memory_mib(),
        device=device_name(),
    )


def keep_wandb_at_home(folder: Path) -> None:
    """Stage artifacts beside the runs and send no usage reports, unless the user says so."""
    for variable, value in {
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DATA_DIR": str(folder.parent / "wandb"),
        "WANDB_CACHE_DIR": str(folder.parent / "wandb"),
    }.items():
        os.environ.setdefault(variable, value)


def quieten_lightning() -> None:
    """Leave out what Lightning says of choices that are meant, and its advertisements."""
    for message in (
        "The '.*_dataloader' does not have many workers",  # reading is cheap, see data.num_workers
        "Checkpoint directory .* exists and is not empty",  # a run's folder holds all of it
        "You requested to overfit but enabled train dataloader shuffling",  # it is no shuffling
        "The dirpath has changed from",  # of checkpoints: another configuration, another folder
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 under torch 2.13
    ):
        warnings.filterwarnings("ignore", message)
    rank_zero = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    rank_zero.addFilter(is_no_advertisement)


def is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv):
        print(usage())
    else:
        main()
