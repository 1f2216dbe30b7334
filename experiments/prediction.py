"""Cases in, label maps out: what `predict.py` does, and the first half of `evaluate.py`."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import Progress

from datamodules.cases import Case, DataSet, compared
from datamodules.nifti import description, identify, open_volume, write_volume
from datamodules.preprocessing import Volume, restore
from errors import InputError
from experiments.cascade import Where, where_of
from experiments.combinations import check_writable
from experiments.operating_point import OperatingPoint
from experiments.tables import CaseRows
from experiments.trained import Trained, find_checkpoints, networks_of, own_thresholds
from files import read_json, write_json, written_whole
from lightning_modules.checkpoint import check_unseen
from lightning_modules.memory import keep_freed
from lightning_modules.metrics.regions import dice
from lightning_modules.pictures import draw_case

SETTINGS_NAME = "predicted_with.json"
ROWS_NAME = "predictions.csv"
ROWS_START = "case,volume_mm3_"  # how such a file begins
MARK = "predict.py "  # begins the description in the header of a file that `Predictor` has written


def label_map(folder: Path, case: str) -> Path:
    """Return the file in a folder of predictions that holds the label map of a case."""
    return folder / f"{case}.nii.gz"


class Estimate(NamedTuple):
    """What networks predict of a case.

    Attributes:
        volume: The preprocessed case.
        probabilities: (R, X, Y, Z) float32 on its grid, 0 where there is no candidate.
        expected_dice: (R,), see `Averaged.agreement`.
        share: How many voxels the networks got, over how many they get without a detector.
        seconds: Time that networks and detector took.
    """

    volume: Volume
    probabilities: np.ndarray
    expected_dice: np.ndarray
    share: float
    seconds: float


@dataclass(frozen=True)
class Predictor:
    """Predicts label maps of cases, on the grid of their own files.

    Attributes:
        trained: Networks and their input.
        where: Chooses the voxels that they are run for.
        point: Thresholds and least volumes of the regions.
        networks: What tells the networks from others: checkpoints, flips, the detector.
        precision: Precision of the networks, a key of `PRECISIONS`.
        probabilities: Write them too.
        pictures: Write them too.
        again: Predict cases that are in the output already.
    """

    trained: Trained
    where: Where
    point: OperatingPoint
    networks: Mapping[str, Any]
    precision: str = "32"
    probabilities: bool = False
    pictures: bool = True
    again: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Predictor":
        """Build what conf/predict.yaml describes.

        Raises:
            InputError: Checkpoints, thresholds or a precision that cannot be used.
        """
        keep_freed()
        paths = find_checkpoints(networks_of(options))
        precision = str(options["precision"])
        trained = Trained.load(paths, options["flips"], precision, options["device"])
        where = where_of(options, trained)
        thresholds = options["thresholds"]
        if thresholds == "checkpoint":
            thresholds = str(own_thresholds(paths) or thresholds)
        networks = {
            "checkpoint": trained.checkpoints,
            "flips": options["flips"],
            **where.settings,
        }
        return cls(
            trained=trained,
            where=where,
            point=OperatingPoint.from_option(
                thresholds, trained.data_set.regions, trained.threshold, networks
            ),
            networks=networks,
            precision=precision,
            probabilities=options["probabilities"],
            pictures=options["pictures"],
            again=options["again"],
        )

    @property
    def data_set(self) -> DataSet:
        """Data set of the cases to predict; see `Trained`."""
        return self.trained.data_set

    @property
    def spacing_mm(self) -> float:
        """Edge of a voxel of the volumes that the networks see."""
        return self.trained.preprocessing.spacing_mm

    def with_point(self, point: OperatingPoint) -> "Predictor":
        """Return a predictor of the same networks with other thresholds."""
        return replace(self, point=point)

    def in_folder(self, folder: Path, et_label: int | None = None) -> "Predictor":
        """Return a predictor of the same networks for the cases in another folder.

        Args:
            folder: Folder of cases, with masks or without.
            et_label: Label of ET, 3 or 4, if no mask of the folder has any; 4 by default.

        Raises:
            InputError: The networks have no ET, or it has another label.
        """
        moved = self.trained.in_folder(folder, et_label)
        return replace(self, trained=moved, where=self.where.in_folder(folder))

    def cases(self) -> list[Case]:
        """List the cases of the data set, sorted by name.

        Raises:
            InputError: There is none, or one lacks what the networks or the detector see.
        """
        cases = self.data_set.cases()
        self.where.check(cases)
        return cases

    def __call__(self, cases: Sequence[Case], output: Path) -> list[str]:
        """Write a label map and a row of every case; print scores where there are masks.

        Cases that are in the output already are left alone, unless their scans have changed since
        or other networks have predicted them. A case that cannot be used does not keep the others
        from being predicted.

        Returns:
            The names of those that could not be used.

        Raises:
            InputError: The folder holds what other networks or thresholds have predicted, or files
                of the user's under the names of what is written.
        """
        check_writable("output", output)
        output.mkdir(parents=True, exist_ok=True)
        self.claim(output, cases)
        failed = []
        with Progress() as progress:
            for case in progress.track(cases, description="predicting"):
                try:
                    if self._is_done(case, output) and not self.again:
                        continue
                    title = self.predict(case, output)
                except InputError as error:
                    progress.console.print(f"failed: {error}", markup=False)
                    failed.append(case.name)
                else:
                    progress.console.print(title, markup=False)
        return failed

    def claim(self, output: Path, cases: Sequence[Case]) -> None:
        """Write down what the label maps of a folder are made with.

        Raises:
            InputError: The folder holds label maps of other networks or thresholds, and `again` is
                false; or a file that is no prediction under the name of one.
        """
        rows = self.rows(output).path
        others = [path for path in [rows] if path.exists() and not _begins(path, ROWS_START)]
        volumes = (path for case in cases for path in self._volumes(case, output))
        others += (p for p in volumes if p.exists() and not description(p).startswith(MARK))
        if others:
            raise InputError(
                f"{others[0]}: expected no file, or one that predict.py has written, found "
                "another; give another output"
            )
        path, settings = output / SETTINGS_NAME, self._settings()
        if path.exists() and not self.again:
            advice = "give another output, or again=true to replace what is there"
            found = read_json(path, advice)
            for key in {**settings, **found}:
                if found.get(key) != settings.get(key):
                    raise InputError(
                        f"{path}: {key} is {found.get(key)} there and {settings.get(key)} here; "
                        f"{advice}"
                    )
        write_json(path, settings)

    def _settings(self) -> dict[str, Any]:
        """What tells the label maps of these networks from those of others, as JSON."""
        settings = {**self.networks, "precision": self.precision, **asdict(self.point)}
        return json.loads(json.dumps(settings | {"file_values": self.data_set.file_values}))

    def _mark(self, case: Case) -> str:
        """Make the description of what is predicted for a case: a hash of networks and scans.

        It lies in the header of each file, so that no file is ever taken for that of other scans
        or networks, whenever a process was killed.
        """
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        own = [case.images[name] for name in self.data_set.modalities if name in case.images]
        for path in dict.fromkeys([*own, *self.where.images(case)]):
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise InputError(f"{path}: expected a file, found: {error.strerror}") from error
        return MARK + digest.hexdigest()[:32]

    def _volumes(self, case: Case, output: Path) -> list[Path]:
        """Return the NIfTI files that are written for a case, the label map last."""
        probabilities = output / f"{case.name}_probabilities.nii.gz"
        return [*([probabilities] if self.probabilities else []), label_map(output, case.name)]

    def rows(self, output: Path) -> CaseRows:
        """Return the table in a folder of predictions: a row for each case that is done.

        Its columns are the volume of each region in the label map, and the Dice that the networks
        expect of it (see `Averaged.agreement`); the seconds that networks and detector took; and
        the modalities that the case lacks.
        """
        regions = self.data_set.regions
        by_region = [f"{name}_{r}" for name in ("volume_mm3", "expected") for r in regions]
        return CaseRows(output / ROWS_NAME, ["case", *by_region, "seconds", "missing"])

    def _picture(self, case: Case, output: Path) -> Path:
        return output / f"{case.name}.png"

    def _is_done(self, case: Case, output: Path) -> bool:
        """Whether all that is asked for is there, for these scans and by these networks."""
        if case.name not in self.rows(output).read():
            return False
        if self.pictures and not self._picture(case, output).is_file():
            return False
        paths = self._volumes(case, output)
        if not all(path.is_file() for path in paths):
            return False
        mark = self._mark(case)
        return all(description(path) == mark for path in paths)

    def estimate(self, case: Case) -> Estimate:
        """Preprocess a case, and predict its probabilities.

        Raises:
            InputError: A scan or a mask that cannot be used.
        """
        volume = self.trained.volume(case)
        start = time.perf_counter()
        candidates = self.where.candidates(case, volume)
        probabilities, expected_dice = self.trained.predicted(volume, candidates)
        return Estimate(
            volume=volume,
            probabilities=probabilities,
            expected_dice=expected_dice,
            share=self.trained.share(candidates),
            seconds=time.perf_counter() - start,
        )

    def predict(self, case: Case, output: Path) -> str:
        """Predict and write one case, its row last; returns its name, scores and what it took.

        A mask that cannot be used is left out with a warning: it only takes part in the scores.

        Raises:
            InputError: A scan that cannot be used.
        """
        regions, data_set = self.data_set.regions, self.data_set
        mark = self._mark(case)
        # What is there is of other scans or networks, and must not outlive an error or a kill.
        self.rows(output).remove(case.name)
        for path in (*self._volumes(case, output), self._picture(case, output)):
            path.unlink(missing_ok=True)
        try:
            estimate = self.estimate(case)
        except InputError as error:
            if case.mask is None:
                raise
            case = replace(case, mask=None)
            estimate = self.estimate(case)  # fails again if a scan is to blame
            logging.warning("%s; the case is predicted without its mask", error)
        volume = estimate.volume
        reference = case.reference
        probabilities = restore(estimate.probabilities, volume.affine, reference)
        voxel_mm3 = float(abs(np.linalg.det(np.asarray(open_volume(reference).affine)[:3, :3])))
        brain_voxels = int((volume.image != 0).any(0).sum())
        brain_mm3 = brain_voxels * self.spacing_mm**3
        found = self.point.masks(
            probabilities, regions, int(brain_mm3 / voxel_mm3), voxel_mm3, case.name
        )
        *others, written = self._volumes(case, output)
        for path in others:
            write_volume(path, np.moveaxis(probabilities, 0, -1), reference, mark)
        labels = data_set.to_labels(found)
        write_volume(written, in_files(labels, data_set), reference, mark)

        expected_dice = dict(zip(regions, estimate.expected_dice.tolist(), strict=True))
        told = []
        if case.mask is not None:
            told.append(dice_of_file(written, case, data_set))
        if defined := [
            f"{r} {value:.2f}" for r, value in expected_dice.items() if not math.isnan(value)
        ]:
            told.append(f"expected Dice {'  '.join(defined)}")
        title = f"{case.name}: {'; '.join(told)}" if told else case.name
        if self.pictures:
            masks = {"truth": data_set.to_regions(volume.labels)} if case.mask is not None else {}
            masks["prediction"] = self.point.masks(
                estimate.probabilities, regions, brain_voxels, self.spacing_mm**3, case.name
            )
            rows = {
                name: dict(zip(regions, by_region, strict=True))
                for name, by_region in masks.items()
            }
            scan = volume.image[data_set.modalities.index([*case.images][-1])]
            figure = draw_case(scan.astype("float32"), rows, title)
            with written_whole(self._picture(case, output)) as partial:
                figure.savefig(partial, dpi=80)
        volumes_mm3 = data_set.to_regions(labels).sum((1, 2, 3)) * voxel_mm3
        volumes = dict(zip(regions, volumes_mm3.tolist(), strict=True))
        self.rows(output).put(
            {
                "case": case.name,
                **{f"volume_mm3_{region}": round(value, 3) for region, value in volumes.items()},
                **{
                    f"expected_{region}": round(value, 4) for region, value in expected_dice.items()
                },
                "seconds": round(estimate.seconds, 2),
                "missing": " ".join(m for m in data_set.modalities if m not in case.images),
            }
        )
        share_percent, seconds = 100 * estimate.share, estimate.seconds
        return f"{title}; networks ran on {share_percent:.0f} % of the volume in {seconds:.1f} s"


def predict_folder(options: Mapping[str, Any]) -> None:
    """Do what conf/predict.yaml describes.

    Raises:
        InputError: Options or cases that cannot be used.
    """
    check_writable("output", Path(options["output"]))
    predictor = Predictor.from_options(options)
    predictor = predictor.in_folder(Path(options["input"]), options["et_label"])
    cases = predictor.cases()
    warn_of_seen_cases(checkpoints_of(options), cases, predictor.data_set)
    if failed := predictor(cases, Path(options["output"])):
        raise InputError(f"{len(failed)} of {len(cases)} cases failed: {', '.join(failed)}")


def checkpoints_of(options: Mapping[str, Any]) -> list[Path]:
    """List all checkpoints that conf/predict.yaml names, the detector's too."""
    named = [networks_of(options), options["detector"]]
    return [path for paths in named if paths is not None for path in find_checkpoints(paths)]


def warn_of_seen_cases(
    checkpoints: Sequence[Path], cases: Sequence[Case], data_set: DataSet
) -> None:
    """Say in the log if a network was trained on cases: it predicts them better than new ones."""
    identities = {}
    for case in cases:
        with suppress(InputError):  # said when the case is predicted, which others follow
            identities[case.name] = identify(case.reference)
    for checkpoint in checkpoints:
        try:
            check_unseen(checkpoint, identities)
        except InputError as error:
            logging.warning("%s; scores of these cases say nothing about new ones", error)


def _begins(path: Path, text: str) -> bool:
    with path.open("rb") as file:
        return file.read(len(text)) == text.encode()


def in_files(labels: np.ndarray, data_set: DataSet) -> np.ndarray:
    """Translate canonical labels (X, Y, Z) to the values of a data set's files, uint8."""
    values = np.zeros(256, np.uint8)
    for label, value in data_set.file_values.items():
        values[label] = value
    return values[labels]


def dice_of_file(written: Path, case: Case, data_set: DataSet) -> str:
    """Dice of each region of a predicted label map, on the grid that it is stored on."""
    both = compared(written, case, data_set, data_set)
    prediction, truth = (torch.from_numpy(masks)[None] for masks in (both.prediction, both.truth))
    nothing_outside = torch.zeros(truth.shape[:2], dtype=torch.int64)
    scores = dice(prediction, truth, nothing_outside)[0].tolist()
    volumes_mm3 = both.prediction.sum((1, 2, 3)) * np.prod(both.spacing_mm)
    return "Dice " + "  ".join(
        f"{region} none ({volume_mm3:.0f} mm³ predicted)"
        if np.isnan(score)
        else f"{region} {score:.3f}"
        for region, score, volume_mm3 in zip(data_set.regions, scores, volumes_mm3, strict=True)
    )
