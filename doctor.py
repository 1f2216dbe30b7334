"""Examine a data set before training on it, or scans to segment; see conf/doctor.yaml."""

import sys
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.command import command, job
from experiments.schema import checked


@hydra.main(version_base="1.3", config_path="conf", config_name="doctor")
def main(config: DictConfig) -> None:
    with job():
        # The rest of `data` refers to networks and patches, which the doctor does not have.
        own = {"data": {"data_set": config.data.data_set}}
        options = checked(OmegaConf.create({"workers": config.workers, "json": config.json, **own}))
        from experiments.doctor import report  # heavy: not for a typo or `--help`

        data_set = instantiate(options.data.data_set, _convert_="all")
        if not report(data_set, options.workers, options.json):
            raise SystemExit(1)


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv):  # Hydra takes seconds to say the same
        print(OmegaConf.load(Path(__file__).parent / "conf/doctor.yaml").hydra.help.template)
    else:
        with command():
            main()
