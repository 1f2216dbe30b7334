"""Choose thresholds, predict, score, report: what `evaluate.py` does."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import track

from datamodules.brats import BraTSMasks
from datamodules.cases import Case, DataSet
from datamodules.nifti import identify
from datamodules.splits import PARTS
from errors import InputError
from experiments.combinations import check_writable
from experiments.frey2019 import write_report
from experiments.operating_point import (
    THRESHOLDS_NAME,
    Candidates,
    OperatingPoint,
    check_cored,
)
from experiments.prediction import Predictor, checkpoints_of
from experiments.run import RunFolder
from experiments.trained import find_checkpoints, networks_of
from lightning_modules.checkpoint import check_unseen
from lightning_modules.metrics.regions import CONVENTIONS

LEARNED_FROM = ("train", "validation")


def evaluate(options: Mapping[str, Any]) -> Path:
    """Predict, unless there are predictions; score; write tables and figures.

    Cases that a network was trained or validated on are refused, under whatever name and in
    whatever folder they are, unless `cases` asks for that part of its split.

    Args:
        options: The values of conf/evaluate.yaml.

    Returns:
        The Markdown file with the table.

    Raises:
        InputError: Checkpoints, cases or predictions that cannot be used; cases that a network has
            seen.
    """
    if options["convention"] not in CONVENTIONS:
        raise InputError(
            f"convention: expected one of {', '.join(CONVENTIONS)}, found {options['convention']}"
        )
    output = Path(options["output"])
    check_writable("output", output)
    if options["predictions"] is not None:
        predictions = BraTSMasks(options["predictions"])
        data_set: DataSet = BraTSMasks(options["input"])
        cases = [case for case in data_set.cases() if case.mask is not None]
        least_mm3: Mapping[str, float] = {}
        expected: Mapping[str, Mapping[str, float]] = {}
    else:
        choose = options["thresholds"] == "chosen"
        trained = Predictor.from_options(
            {**options, "thresholds": "checkpoint"} if choose else options
        )
        predictor = trained.in_folder(Path(options["input"]), options["et_label"])
        data_set = predictor.data_set
        cases = cases_of_part(predictor.cases(), options["cases"], networks_of(options))
        if options["cases"] not in LEARNED_FROM:
            check_all_unseen(checkpoints_of(options), cases)
        if choose:
            predictor = predictor.with_point(chosen_point(trained, options))
        least_mm3 = predictor.point.least_mm3
        # Label maps keep all that the networks found: the report shows what least volumes change.
        unfiltered = predictor.with_point(replace(predictor.point, least_mm3={}))
        if failed := unfiltered(cases, output / "predictions"):
            raise InputError(f"{len(failed)} of {len(cases)} cases failed: {', '.join(failed)}")
        expected = expected_dice(unfiltered, output / "predictions")
        predictions = BraTSMasks(output / "predictions", data_set.regions)
    text = write_report(
        predictions, data_set, cases, output, options["convention"], least_mm3, expected
    )
    log_to_wandb(output, options["wandb"])
    print(text.read_text())
    print(f"tables and figures: {output}")
    return text


def check_all_unseen(checkpoints: Sequence[Path], cases: Sequence[Case]) -> None:
    """Refuse cases that a network was trained or validated on, see `check_unseen`."""
    identities = {case.name: identify(case.reference) for case in cases}
    for checkpoint in checkpoints:
        check_unseen(checkpoint, identities)


def expected_dice(predictor: Predictor, output: Path) -> dict[str, dict[str, float]]:
    """Read what the networks expect of their Dice: case -> `expected_<region>` -> value."""
    columns = [f"expected_{region}" for region in predictor.data_set.regions]
    return {
        case: {column: float(row[column]) for column in columns}
        for case, row in predictor.rows(output).read().items()
    }


def chosen_point(trained: Predictor, options: Mapping[str, Any]) -> OperatingPoint:
    """Choose thresholds on cases that the networks were trained with, and write them down.

    Args:
        trained: The networks, with the data set that they were trained on.
        options: The values of conf/evaluate.yaml.
    """
    tuning = cases_of_part(trained.data_set.cases(), options["tuned_on"], networks_of(options))
    point = best_point(trained, tuning, options["least_volume"], options["with_core"])
    point.write(Path(options["output"]) / THRESHOLDS_NAME, trained.networks)
    return point


def best_point(
    predictor: Predictor,
    cases: Sequence[Case],
    with_least_volume: Sequence[str],
    with_core: Sequence[str] = (),
) -> OperatingPoint:
    """Find thresholds, and least volumes of some regions, on cases: see `Candidates.best`.

    Raises:
        InputError: The networks lack a region that `with_core` is about.
    """
    data_set = predictor.data_set
    check_cored(with_core, data_set.regions)
    candidates = Candidates(data_set.regions, predictor.spacing_mm**3)
    for case in track(cases, "choosing thresholds"):
        estimate = predictor.estimate(case)
        candidates.add(estimate.probabilities, data_set.to_regions(estimate.volume.labels))
    point = candidates.best(with_least_volume, with_core)
    without = replace(point, least_mm3={})
    for region, value in candidates.mean_dice(without).items():
        having = candidates.cases_with(region)
        threshold = point.thresholds[region]
        line = f"threshold of {region}: {threshold:g}, Dice {value:.3f} ({having} cases)"
        if others := len(cases) - having:
            alarms = candidates.false_alarm_rate(without)[region]
            line += f", false alarms in {alarms:.0%} of {others} others"
            if region in with_least_volume:
                fewer = candidates.false_alarm_rate(point)[region]
                line += f", in {fewer:.0%} with at least {point.least_mm3[region]:g} mm³"
        print(line)
    return point


def cases_of_part(
    cases: Sequence[Case], part: str, checkpoints: str | Path | Sequence[str | Path]
) -> list[Case]:
    """Select the cases with a mask that are in one part of the split of every run.

    Args:
        cases: All cases.
        part: "train", "validation", "test", or "all".
        checkpoints: Checkpoints or folders of runs, as in conf/evaluate.yaml.

    Raises:
        InputError: No such part, a run without its split, or no case left.
    """
    with_mask = [case for case in cases if case.mask is not None]
    if part == "all":
        chosen = with_mask
    elif part not in PARTS:
        raise InputError(f"cases: expected one of {', '.join(PARTS)}, all; found {part}")
    else:
        names = {case.name for case in with_mask}
        for checkpoint in find_checkpoints(checkpoints):
            run = RunFolder(checkpoint.parent)
            if not run.split_file.is_file():
                raise InputError(
                    f"{run.split_file}: expected beside the checkpoint, to tell the {part} cases; "
                    "give cases=all, and thresholds"
                )
            names &= set(run.split()[part])
        chosen = [case for case in with_mask if case.name in names]
    if not chosen:
        raise InputError(f"cases={part}: expected cases with a mask, found none of {len(cases)}")
    return chosen


def log_to_wandb(output: Path, mode: Any) -> None:  # noqa: ANN401  (W&B checks the name)
    """Log the tables and figures of a report as a Weights & Biases run."""
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
