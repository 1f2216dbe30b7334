"""Segment new cases with a trained network, onto their own grid. See conf/predict.yaml."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from errors import InputError

if TYPE_CHECKING:
    from datamodules.cases import Case, DataSet


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
        logging.error(str(error).splitlines()[0])
        raise SystemExit(1) from None


def predict(checkpoint: Path, source: Path, output: Path, *, pictures: bool, device: str) -> None:
    """Write `output/CASE.nii.gz` for every case in `source`; print scores where there are masks.

    Raises:
        InputError: The checkpoint or a case cannot be used; label maps written before stay.
    """
    import torch
    from rich.progress import Progress

    from datamodules.cache import Preprocessing, restore
    from datamodules.cases import write_labels
    from lightning_modules.checkpoint import load
    from lightning_modules.pictures import draw_case

    module, config = load(checkpoint)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    module = module.to(device)
    threshold = float(module.threshold)
    data_set = instantiate(config["data"]["data_set"], _convert_="all").at(source)
    # All of the brain, whatever crop the patches of the training came from.
    preprocess = Preprocessing(config["data"]["cache"]["spacing_mm"], crop="brain")
    cases = data_set.cases()
    output.mkdir(parents=True, exist_ok=True)
    with Progress() as progress, torch.inference_mode():
        for case in progress.track(cases, description="predicting"):
            volume = preprocess(case, data_set)
            image = torch.from_numpy(volume.image).float()[None].to(module.device)
            probabilities = module(image)[0].cpu().numpy()
            reference = case.images[data_set.modalities[0]]
            regions = restore(probabilities, volume.affine, reference) > threshold
            written = output / f"{case.name}.nii.gz"
            write_labels(written, data_set.to_labels(regions), reference)

            title = case.name
            masks = {"prediction": probabilities > threshold}
            if case.mask is not None:
                masks = {"truth": data_set.to_regions(volume.labels), **masks}
                title = f"{case.name}: {scores(written, case, data_set)}"
                progress.console.print(title)
            if pictures:
                rows = {
                    name: dict(zip(data_set.regions, by_region, strict=True))
                    for name, by_region in masks.items()
                }
                figure = draw_case(volume.image[-1].astype("float32"), rows, title)
                figure.savefig(output / f"{case.name}.png", dpi=80)


def scores(written: Path, case: "Case", data_set: "DataSet") -> str:
    """Dice of each region between two label files, on the grid that they are stored on."""
    import torch

    from datamodules.cases import read_volume
    from lightning_modules.metrics.regions import dice

    assert case.mask is not None
    prediction, truth = (
        torch.from_numpy(data_set.to_regions(labels))[None]
        for labels in (
            read_volume(written)[0].astype("uint8"),
            data_set.canonical_labels(read_volume(case.mask)[0], case),
        )
    )
    nothing_outside = torch.zeros(truth.shape[:2], dtype=torch.int64)
    values = dice(prediction, truth, nothing_outside)[0].tolist()
    return "Dice " + "  ".join(
        f"{region} {value:.3f}" for region, value in zip(data_set.regions, values, strict=True)
    )


if __name__ == "__main__":
    main()
