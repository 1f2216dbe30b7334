"""What `python train.py --help` prints. Hydra's own help takes seconds to list the same groups."""

from pathlib import Path

USAGE = """\
Train one configuration, test it on whole volumes. `-m` sweeps over values between commas.

Choices (GROUP=OPTION):
{groups}

Values (KEY=VALUE), among others:
  name  seed  filters.base  filters.ratio  model.depth  model.bottleneck  optimizer.lr
  trainer.max_epochs  patches.size  patches.batch_size  patches.per_epoch
  data.sampler.lesion_share  logger.wandb.offline=false  resume=CHECKPOINT  again=true

Examples:
  python train.py                                         the proxy on phantoms
  python train.py -m model=aeunet norm=group,batch        two runs
  python train.py experiment=null_report factors=norm     with a verdict
  python train.py data=brats data.data_set.root=FOLDER    your own scans
  python train.py --cfg job                               the whole configuration
  python train.py --hydra-help                            launchers, sweepers, completion"""


def usage() -> str:
    """The help text, with every group of conf/ and its options."""
    conf = Path(__file__).parents[1] / "conf"
    options = {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir()
    }
    lines = [f"  {group}: {', '.join(names)}" for group, names in options.items() if names]
    return USAGE.format(groups="\n".join(lines))
