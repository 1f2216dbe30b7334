"""Segment new cases with one trained network or several, onto their own grid; conf/predict.yaml."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from datamodules.cases import Case, DataSet
    from datamodules.preprocessing import Preprocessing, Volume
    from datamodules.sampling import Cut
    from lightning_modules.inference import Ensemble
    from lightning_modules.operating_point import OperatingPoint

SETTINGS_NAME = "predicted_with.json"
PRECISIONS = {"32": "float32", "16": "float16", "bf16": "bfloat16"}


@hydra.main(version_base="1.3", config_path="conf", config_name="predict")
def main(config: DictConfig) -> None:
    try:
        predictor = Predictor.of(OmegaConf.to_container(config, throw_on_missing=True))  # pyright: ignore
        cases = predictor.data_set.in_folder(config.input).cases()
        failed = predictor(cases, Path(config.output))
    except (InputError, MissingMandatoryValue) as error:
        logging.error(str(error).splitlines()[0])
        raise SystemExit(1) from None
    if failed:
        logging.error("%d of %d cases failed: %s", len(failed), len(cases), ", ".join(failed))
        raise SystemExit(1)


@dataclass(frozen=True)
class Predictor:
    """Cases in, label maps out.

    Attributes:
        ensemble: One network or more.
        data_set: What the networks were trained on: modalities, regions, labels.
        preprocessing: Of the volumes that the networks see.
        cut: Cuts the channels that they see out of a volume.
        point: Thresholds and least volumes of the regions.
        networks: What tells the ensemble from others: its checkpoints, whether it flips.
        precision: Of the ensemble, by its name.
        device: Name, or "auto".
        probabilities: Write them too.
        pictures: Write them too.
        again: Predict what is there already.
    """

    ensemble: "Ensemble"
    data_set: "DataSet"
    preprocessing: "Preprocessing"
    cut: "Cut"
    point: "OperatingPoint"
    networks: Mapping[str, Any]
    precision: str = "32"
    device: str = "auto"
    probabilities: bool = False
    pictures: bool = True
    again: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Predictor":
        """From the values of conf/predict.yaml.

        Raises:
            InputError: Checkpoints, thresholds or a precision that cannot be used.
        """
        import torch

        from datamodules.preprocessing import Preprocessing
        from lightning_modules.checkpoint import build, find, fingerprint, load_ensemble
        from lightning_modules.memory import keep_freed

        keep_freed()
        paths = find(given["checkpoint"])
        precision = PRECISIONS.get(str(given["precision"]))
        if precision is None:
            raise InputError(
                f"precision: expected one of {', '.join(PRECISIONS)}, found {given['precision']}"
            )
        flip_axes = (0, 1, 2) if given["flips"] else ()
        ensemble, config = load_ensemble(paths, flip_axes, getattr(torch, precision))
        data_set = build(config["data"]["data_set"])
        trained_on: Preprocessing = build(config["data"]["cache"]).preprocessing
        threshold = float(ensemble.members[0].threshold)  # pyright: ignore[reportArgumentType]
        networks = {"checkpoint": [fingerprint(path) for path in paths], "flips": given["flips"]}
        point = operating_point(given["thresholds"], data_set.regions, threshold, networks)
        return cls(
            ensemble=ensemble,
            data_set=data_set,
            # All of the brain, whatever crop the patches of the training came from.
            preprocessing=Preprocessing(trained_on.spacing_mm, "brain", trained_on.extras),
            cut=build(config["data"]["sampler"]).cut,
            point=point,
            networks=networks,
            precision=str(given["precision"]),
            device=given["device"],
            probabilities=given["probabilities"],
            pictures=given["pictures"],
            again=given["again"],
        )

    @property
    def spacing_mm(self) -> float:
        """Edge of a voxel of the volumes that the networks see."""
        return self.preprocessing.spacing_mm

    def at(self, point: "OperatingPoint") -> "Predictor":
        """The same networks at other thresholds."""
        return replace(self, point=point)

    def __call__(self, cases: Sequence["Case"], output: Path) -> list[str]:
        """Write `output/CASE.nii.gz` for every case; print scores where there are masks.

        Cases that are there already are left alone; after one that cannot be used, the others
        follow.

        Returns:
            The names of those that could not be used.

        Raises:
            InputError: The folder holds what other networks or thresholds have predicted.
        """
        from rich.progress import Progress

        output.mkdir(parents=True, exist_ok=True)
        self.claim(output)
        failed = []
        with Progress() as progress:
            for case in progress.track(cases, description="predicting"):
                if (output / f"{case.name}.nii.gz").exists() and not self.again:
                    continue
                try:
                    title = self.predict(case, output)
                except InputError as error:
                    progress.console.print(f"failed: {error}", markup=False)
                    failed.append(case.name)
                else:
                    progress.console.print(title, markup=False)
        return failed

    def claim(self, output: Path) -> None:
        """Write down what the label maps of a folder are made with; see that it is no other."""
        path = output / SETTINGS_NAME
        settings = {**self.networks, "precision": self.precision, **asdict(self.point)}
        settings = json.loads(json.dumps(settings))
        if path.exists() and not self.again and (found := json.loads(path.read_text())) != settings:
            key = next(key for key in settings if found.get(key) != settings[key])
            raise InputError(
                f"{path}: {key} is {found.get(key)} there and {settings[key]} here; give another "
                "output, or again=true to replace what is there"
            )
        path.write_text(json.dumps(settings, indent=1) + "\n")

    def estimate(self, case: "Case") -> "tuple[Volume, np.ndarray]":
        """A case on the grid that the networks see, and probabilities (R, X, Y, Z) there."""
        import torch

        from datamodules.sampling import whole

        volume = self.preprocessing(case, self.data_set)
        image = torch.from_numpy(whole(volume.image, self.cut)).float()[None]
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return volume, self.ensemble.on(image, device)[0].numpy()

    def predict(self, case: "Case", output: Path) -> str:
        """Predict and write one case; returns its name and scores.

        Raises:
            InputError: A file that cannot be used.
        """
        import numpy as np

        from datamodules.nifti import open_volume, write_volume
        from datamodules.preprocessing import restore
        from lightning_modules.pictures import draw_case

        regions, data_set = self.data_set.regions, self.data_set
        volume, estimate = self.estimate(case)
        reference = case.images[data_set.modalities[0]]
        probabilities = restore(estimate, volume.affine, reference)
        voxel_mm3 = float(abs(np.linalg.det(np.asarray(open_volume(reference).affine)[:3, :3])))
        brain_mm3 = int((volume.image != 0).any(0).sum()) * self.spacing_mm**3
        found = self.point.masks(
            probabilities, regions, int(brain_mm3 / voxel_mm3), voxel_mm3, case.name
        )
        if self.probabilities:
            path = output / f"{case.name}_probabilities.nii.gz"
            write_volume(path, np.moveaxis(probabilities, 0, -1), reference)
        written = output / f"{case.name}.nii.gz"
        write_volume(written, data_set.to_labels(found), reference)

        thresholds = np.array([self.point.thresholds[region] for region in regions])
        title = case.name
        masks = {"prediction": estimate > thresholds[:, None, None, None]}
        if case.mask is not None:
            masks = {"truth": data_set.to_regions(volume.labels), **masks}
            title = f"{case.name}: {dice_of(written, case, data_set)}"
        if self.pictures:
            rows = {
                name: dict(zip(regions, by_region, strict=True))
                for name, by_region in masks.items()
            }
            last = volume.image[len(data_set.modalities) - 1]  # extras stand behind it
            figure = draw_case(last.astype("float32"), rows, title)
            figure.savefig(output / f"{case.name}.png", dpi=80)
        return title


def operating_point(
    given: str | float | Mapping[str, float],
    regions: Sequence[str],
    of_checkpoint: float,
    networks: Mapping[str, Any],
) -> "OperatingPoint":
    """What `thresholds` stands for: see conf/predict.yaml.

    Args:
        given: The value.
        regions: That need a threshold.
        of_checkpoint: The threshold that the checkpoint has.
        networks: Those that it is for.

    Raises:
        InputError: A region without threshold, or a file that is none of `evaluate.py`.
    """
    from lightning_modules.operating_point import PAPER, OperatingPoint

    if given == "checkpoint":
        return OperatingPoint(dict.fromkeys(regions, of_checkpoint))
    if given == "paper":
        point = OperatingPoint(PAPER)
    elif isinstance(given, str):
        point = OperatingPoint.read(Path(given), networks)
    elif isinstance(given, Mapping):
        point = OperatingPoint(given)
    else:
        point = OperatingPoint(dict.fromkeys(regions, float(given)))
    if missing := [region for region in regions if region not in point.thresholds]:
        raise InputError(
            f"thresholds: expected one for each of {', '.join(regions)}, found none for "
            f"{', '.join(missing)}"
        )
    return point


def dice_of(written: Path, case: "Case", data_set: "DataSet") -> str:
    """Dice of each region of a predicted label map, on the grid that it is stored on."""
    import torch

    from datamodules.cases import compared
    from datamodules.nifti import read_volume
    from lightning_modules.metrics.regions import dice

    both = compared(read_volume(written)[0].astype("uint8"), written, case, data_set)
    prediction, truth = (torch.from_numpy(masks)[None] for masks in (both.prediction, both.truth))
    nothing_outside = torch.zeros(truth.shape[:2], dtype=torch.int64)
    values = dice(prediction, truth, nothing_outside)[0].tolist()
    return "Dice " + "  ".join(
        f"{region} {value:.3f}" for region, value in zip(data_set.regions, values, strict=True)
    )


if __name__ == "__main__":
    main()
