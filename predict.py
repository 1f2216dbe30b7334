"""Segment new cases with a trained network; label maps on the grid of the cases. See conf/predict.yaml."""

import logging
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from errors import InputError

log = logging.getLogger("predict")


@hydra.main(version_base="1.3", config_path="conf", config_name="predict")
def main(config: DictConfig) -> None:
    try:
        predict(
            Path(config.checkpoint),
            Path(config.input),
            Path(config.output),
            pictures=config.pictures,
            device=config.device,
        )
    except (InputError, MissingMandatoryValue) as error:
        log.error(error)
        raise SystemExit(1) from None


def predict(checkpoint: Path, source: Path, output: Path, *, pictures: bool, device: str) -> None:
    """Write `output/CASE.nii.gz` for every case in `source`; print scores where there are masks.

    Raises:
        InputError: The checkpoint or a case cannot be used; label maps written before stay.
    """
    import torch
    from rich.progress import track

    from datamodules.cache import Preprocessing, restore
    from datamodules.cases import write_labels
    from lightning_modules.checkpoint import load
    from lightning_modules.pictures import draw_case

    module, config = load(checkpoint)
    data_set = instantiate(config["data"]["data_set"], _convert_="all").at(source)
    # All of the brain, whatever crop the patches of the training came from.
    preprocess = Preprocessing(config["data"]["cache"]["spacing_mm"], crop="brain")
    module = module.to(best_device() if device == "auto" else device)
    output.mkdir(parents=True, exist_ok=True)
    for case in track(data_set.cases(), "predicting"):
        volume = preprocess(case, data_set)
        image = torch.from_numpy(volume.image).float()[None].to(module.device)
        with torch.inference_mode():
            probabilities = module(image)[0].cpu().numpy()
        reference = case.images[data_set.modalities[0]]
        regions = restore(probabilities, volume.affine, reference) > module.threshold
        write_labels(output / f"{case.name}.nii.gz", data_set.to_labels(regions), reference)

        found = dict(zip(data_set.regions, probabilities > module.threshold, strict=True))
        rows = {"prediction": found}
        if case.mask is not None:
            truth = dict(zip(data_set.regions, data_set.to_regions(volume.labels), strict=True))
            rows = {"truth": truth, "prediction": found}
        if pictures:
            figure = draw_case(volume.image[-1].astype("float32"), rows, title=case.name)
            figure.savefig(output / f"{case.name}.png", dpi=80)


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
