"""Segment new cases with one trained network or several, onto their own grid; conf/predict.yaml."""

import hydra
from omegaconf import DictConfig, OmegaConf

from experiments.command import command, job
from experiments.schema import checked


@hydra.main(version_base="1.3", config_path="conf", config_name="predict")
def main(config: DictConfig) -> None:
    with job():
        options = OmegaConf.to_container(checked(config))
        from experiments.prediction import predict_folder  # heavy: not for a typo or `--help`

        predict_folder(options)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    with command():
        main()
