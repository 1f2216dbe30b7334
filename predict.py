"""Segment new cases with one trained network or several, onto their own grid; conf/predict.yaml."""

import logging

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from errors import InputError


@hydra.main(version_base="1.3", config_path="conf", config_name="predict")
def main(config: DictConfig) -> None:
    try:
        options = OmegaConf.to_container(config, throw_on_missing=True)
        from experiments.prediction import predict_folder  # heavy: not for a typo or `--help`

        predict_folder(options)  # pyright: ignore[reportArgumentType]
    except (InputError, MissingMandatoryValue) as error:
        logging.error(str(error).splitlines()[0])
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
