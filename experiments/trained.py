"""Trained networks, and how the files of a case become what they see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from datamodules.brats import BraTS
from datamodules.cases import Case, DataSet
from datamodules.preprocessing import Preprocessing, Volume
from datamodules.sampling import Cut, whole
from errors import InputError
from experiments.combinations import WEIGHTS_FOLDER
from experiments.operating_point import THRESHOLDS_NAME
from experiments.run import finished_runs
from lightning_modules.checkpoint import WEIGHTS, build, fingerprint, load_ensemble
from lightning_modules.inference import Ensemble
from lightning_modules.segmentation import SegmentationModule

PRECISIONS = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}


def networks_of(options: Mapping[str, Any]) -> str | Path | Sequence[str | Path]:
    """Return the checkpoints that conf/predict.yaml names, or the folder of its weights."""
    weights = options["weights"]
    return options["checkpoint"] if weights is None else WEIGHTS_FOLDER / weights


def own_thresholds(paths: Sequence[Path]) -> Path | None:
    """Return the file of thresholds beside weights, or None; beside checkpoints there is none."""
    file = paths[0].parent / THRESHOLDS_NAME
    return file if paths[0].suffix == WEIGHTS and file.is_file() else None


def find_checkpoints(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Checkpoints: files as they are; of a folder, its weights, or the best of each finished run.

    Raises:
        InputError: A folder without a finished run, or nothing at all.
    """
    found: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if not path.is_dir():
            found.append(path)
        elif weights := sorted(path.glob(f"*{WEIGHTS}")):
            found += weights
        else:
            found += [run.best for run in finished_runs(path)]
    if not found:
        raise InputError("checkpoint: expected one or more, found none")
    return found


@dataclass(frozen=True)
class Trained:
    """An ensemble of trained networks, and their input.

    Attributes:
        ensemble: One network or more.
        checkpoints: Fingerprints of their checkpoints.
        threshold: Probability above which the first of them predicts a voxel.
        data_set: Data set of the cases to predict. After `load` it is the one that the networks
            were trained on, whose folder may be gone; see `in_folder`.
        preprocessing: Turns files into the volumes that the networks see.
        cut: Cuts the channels that the networks see out of a volume.
        device: Name of the device, or "auto".
    """

    ensemble: Ensemble
    checkpoints: Sequence[str]
    threshold: float
    data_set: DataSet
    preprocessing: Preprocessing
    cut: Cut
    device: str = "auto"

    @classmethod
    def load(
        cls, paths: Sequence[Path], flips: bool, precision: str, device: str = "auto"
    ) -> "Trained":
        """Load checkpoints.

        Args:
            paths: At least one checkpoint.
            flips: Whether all mirror images are averaged too.
            precision: Precision of the networks, a key of `PRECISIONS`.
            device: Name of the device, or "auto".

        Raises:
            InputError: Checkpoints or a precision that cannot be used.
        """
        if precision not in PRECISIONS:
            raise InputError(
                f"precision: expected one of {', '.join(PRECISIONS)}, found {precision}"
            )
        flip_axes = (0, 1, 2) if flips else ()
        ensemble, config = load_ensemble(paths, flip_axes, PRECISIONS[precision])
        modules = cast(list[SegmentationModule], ensemble.members)
        for path, module in zip(paths, modules, strict=True):
            if not all(bool(weights.isfinite().all()) for weights in module.parameters()):
                raise InputError(f"{path}: expected finite weights, found NaN or infinite ones")
        trained_on: Preprocessing = build(config["data"]["cache"]).preprocessing
        return cls(
            ensemble=ensemble,
            checkpoints=[fingerprint(path) for path in paths],
            threshold=modules[0].threshold,
            data_set=build(config["data"]["data_set"]),
            # All of the brain, whatever crop the patches of the training came from.
            preprocessing=Preprocessing(trained_on.spacing_mm, "brain", trained_on.extras),
            cut=build(config["data"]["sampler"]).cut,
            device=device,
        )

    def in_folder(self, folder: Path, et_label: int | None = None) -> "Trained":
        """Return the same networks for the cases in another folder.

        This folder, and not the one of the training, says which values its label maps have.

        Args:
            folder: Folder of cases, with masks or without.
            et_label: Label of ET, 3 or 4, if no mask of the folder has any; 4 by default.

        Raises:
            InputError: The networks have no ET, or it has another label.
        """
        data_set = self.data_set.in_folder(folder)
        if et_label is not None:
            if not isinstance(data_set, BraTS):
                raise InputError(
                    f"et_label: expected null, as {type(data_set).__name__} has no ET; found "
                    f"{et_label}"
                )
            data_set = BraTS(
                folder, data_set.modalities, data_set.regions, et_label, incomplete=True
            )
        return replace(self, data_set=data_set)

    def volume(self, case: Case) -> Volume:
        """Preprocess a case.

        Raises:
            InputError: A file cannot be used.
        """
        return self.preprocessing(case, self.data_set)

    def sees(self) -> Mapping[str, Any]:
        """What the volume of a case hangs on: networks that see the same can share it."""
        extras = {name: extra.settings for name, extra in self.preprocessing.extras.items()}
        return {
            "modalities": list(self.data_set.modalities),
            "spacing_mm": self.preprocessing.spacing_mm,
            "extras": extras,
        }

    def predicted(self, volume: Volume, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict the probabilities of candidates, and how far the estimates of them agree.

        The networks are not called if there is no candidate.

        Args:
            volume: What `volume` returns.
            candidates: (X, Y, Z) bool, on its grid.

        Returns:
            (R, X, Y, Z) float32, 0 where there is no candidate; (R,), see `Averaged`.
        """
        if not candidates.any():
            regions = len(self.data_set.regions)
            nothing = np.zeros((regions, *candidates.shape), np.float32)
            return nothing, np.full(regions, np.nan)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        image = torch.from_numpy(whole(volume.image, self.cut)).float()[None]
        found = self.ensemble.computed_on(image, torch.from_numpy(candidates)[None], device)
        return found.probabilities[0].numpy(), found.agreement[0].numpy()

    def probabilities(self, volume: Volume, candidates: np.ndarray) -> np.ndarray:
        """Predict the probabilities of candidates alone; see `predicted`."""
        return self.predicted(volume, candidates)[0]

    def share(self, candidates: np.ndarray) -> float:
        """Return how many voxels the networks get for candidates (X, Y, Z), over those for all."""
        return self.ensemble.share(torch.from_numpy(candidates)[None]) if candidates.any() else 0
