"""Score trained networks, or a folder of predictions, on cases with masks. See conf/evaluate.yaml.

Ends with table 1 and figures 3 to 5 of Frey & Nau 2019.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from errors import InputError
from predict import Predictor

if TYPE_CHECKING:
    from datamodules.cases import Case, DataSet
    from lightning_modules.operating_point import OperatingPoint

PARTS = ("train", "validation", "test")
THRESHOLDS_NAME = "thresholds.json"


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    try:
        evaluate(OmegaConf.to_container(config, throw_on_missing=True))  # pyright: ignore
    except (InputError, MissingMandatoryValue) as error:
        logging.error(str(error).splitlines()[0])
        raise SystemExit(1) from None


def evaluate(given: Mapping[str, Any]) -> Path:
    """Predict, unless there are predictions; score; write tables and figures.

    Returns:
        The Markdown file with the table.

    Raises:
        InputError: Checkpoints, cases or predictions that cannot be used.
    """
    from datamodules.brats import BraTSMasks
    from experiments.evaluation import report
    from lightning_modules.metrics.regions import CONVENTIONS

    if given["convention"] not in CONVENTIONS:
        raise InputError(
            f"convention: expected one of {', '.join(CONVENTIONS)}, found {given['convention']}"
        )
    output = Path(given["output"])
    if given["predictions"] is not None:
        predictions = BraTSMasks(given["predictions"])
        data_set: DataSet = BraTSMasks(given["input"])
        cases = [case for case in data_set.cases() if case.mask is not None]
        least_mm3: Mapping[str, float] = {}
    else:
        predictor = with_thresholds(given)
        least_mm3 = predictor.point.least_mm3
        data_set = predictor.data_set.in_folder(given["input"])
        cases = part_of(data_set.cases(), given["cases"], given)
        # Label maps have all that the networks found: the report tells what least volumes do.
        raw = predictor.at(replace(predictor.point, least_mm3={}))
        if failed := raw(cases, output / "predictions"):
            raise InputError(f"{len(failed)} of {len(cases)} cases failed: {', '.join(failed)}")
        predictions = BraTSMasks(output / "predictions", data_set.regions)
    text = report(predictions, data_set, cases, output, given["convention"], least_mm3)
    log_to_wandb(output, given["wandb"])
    print(text.read_text())
    print(f"tables and figures: {output}")
    return text


def with_thresholds(given: Mapping[str, Any]) -> Predictor:
    """The ensemble, at the thresholds asked for; chosen ones are written into the output."""
    if given["thresholds"] != "chosen":
        return Predictor.of(given)
    predictor = Predictor.of({**given, "thresholds": "checkpoint"})
    tuning = part_of(predictor.data_set.cases(), given["tuned_on"], given)
    point = choose(predictor, tuning, given["least_volume"])
    Path(given["output"]).mkdir(parents=True, exist_ok=True)
    point.write(Path(given["output"]) / THRESHOLDS_NAME, predictor.networks)
    return predictor.at(point)


def choose(
    predictor: Predictor, cases: "Sequence[Case]", with_least_volume: Sequence[str]
) -> "OperatingPoint":
    """Thresholds, and least volumes of some regions, with the best mean Dice on cases."""
    from rich.progress import track

    from lightning_modules.operating_point import Candidates

    data_set = predictor.data_set
    candidates = Candidates(data_set.regions, predictor.spacing_mm**3)
    for case in track(cases, "choosing thresholds"):
        volume, probabilities = predictor.estimate(case)
        candidates.add(probabilities, data_set.to_regions(volume.labels))
    point = candidates.choose(with_least_volume)
    without = replace(point, least_mm3={})
    for region, value in candidates.mean_dice(without).items():
        line = f"threshold of {region}: {point.thresholds[region]:g}, Dice {value:.3f}"
        if region in with_least_volume:
            better = candidates.mean_dice(point)[region]
            line += f"; with at least {point.least_mm3[region]:g} mm³ {better:.3f}"
        print(f"{line} ({len(cases)} cases)")
    return point


def part_of(cases: "Sequence[Case]", part: str, given: Mapping[str, Any]) -> "list[Case]":
    """The cases with a mask that are in one part of the split of every run, or "all".

    Raises:
        InputError: No such part, a run without its `split.json`, or no case left.
    """
    from lightning_modules.checkpoint import find

    with_mask = [case for case in cases if case.mask is not None]
    if part == "all":
        chosen = with_mask
    elif part not in PARTS:
        raise InputError(f"cases: expected one of {', '.join(PARTS)}, all; found {part}")
    else:
        names = {case.name for case in with_mask}
        for checkpoint in find(given["checkpoint"]):
            path = checkpoint.parent / "split.json"
            if not path.is_file():
                raise InputError(
                    f"{path}: expected beside the checkpoint, to tell the {part} cases; give "
                    "cases=all, and thresholds"
                )
            names &= set(json.loads(path.read_text())[part])
        chosen = [case for case in with_mask if case.name in names]
    if not chosen:
        raise InputError(f"cases={part}: expected cases with a mask, found none of {len(cases)}")
    return chosen


def log_to_wandb(output: Path, mode: Any) -> None:  # noqa: ANN401  (W&B checks the name)
    """The report as a Weights & Biases run: tables and figures."""
    import csv

    import wandb

    with wandb.init(
        project="brain-tumour", job_type="evaluation", name=output.name, dir=output, mode=mode
    ) as run:
        for name in ("cases", "table1"):
            header, *rows = csv.reader((output / f"{name}.csv").read_text().splitlines())
            table = wandb.Table(columns=list(header))
            for row in rows:
                table.add_data(*row)
            run.log({name: table})
        for figure in sorted(output.glob("figure*.png")):
            run.log({figure.stem: wandb.Image(str(figure))})


if __name__ == "__main__":
    main()
