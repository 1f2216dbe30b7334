"""Score trained networks, or a folder of predictions, on cases with masks. See conf/evaluate.yaml.

Ends with table 1 and figures 3 to 5 of Frey & Nau 2019.
"""

import hydra
from omegaconf import DictConfig, OmegaConf

from experiments.command import command, job
from experiments.schema import checked


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    with job():
        options = OmegaConf.to_container(checked(config))
        from experiments.evaluation import evaluate  # heavy: not for a typo or `--help`

        evaluate(options)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    with command():
        main()
