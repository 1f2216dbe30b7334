"""What `python train.py --help` prints. Hydra's own help takes seconds to list the same groups."""

from pathlib import Path

from experiments.command import BUSY, TO_CHANGE
from experiments.schema import described

USAGE = """\
Train one configuration, test it on whole volumes. `-m` sweeps over values between commas.

Choices (GROUP=OPTION):
{groups}

Values (KEY=VALUE), among others:
{values}

Examples:
  python train.py                                         the proxy on phantoms
  python train.py -m model=aeunet norm=group,batch        two runs
  python train.py experiment=null_report factors=norm     with a verdict
  python train.py data=brats data.data_set.root=FOLDER    your own scans
  python train.py plan=true vram_gb=6                     what it costs; nothing is written
  python train.py --cfg job                               the whole configuration
  python train.py --hydra-help                            launchers, sweepers, completion

Exit codes: 0, the run is finished; {to_change}, a value or a file has to be changed, and one line
says which; {busy}, another process is training the same run."""

VALUES = (
    *("name", "seed", "filters.base", "filters.ratio", "model.depth", "model.bottleneck"),
    *("optimizer.lr", "trainer.max_epochs", "trainer.accelerator", "patches.size"),
    *("patches.batch_size", "patches.per_epoch", "data.num_workers", "data.cache.spacing_mm"),
    *("data.sampler.lesion_share", "split.validation", "split.test", "logger.wandb.offline"),
    *("resume", "finetune", "again", "plan", "vram_gb"),
)


def usage() -> str:
    """Return the help text, with every group of conf/ and its options, and what values may be."""
    conf = Path(__file__).parents[1] / "conf"
    options = {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir()
    }
    groups = [f"  {group}: {', '.join(names)}" for group, names in options.items() if names]
    values = [f"  {key}: {described(key)}" for key in VALUES]
    return USAGE.format(
        groups="\n".join(groups), values="\n".join(values), to_change=TO_CHANGE, busy=BUSY
    )
