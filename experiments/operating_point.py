"""From probabilities to masks: a threshold, a least volume and a condition for each region.

Both numbers are chosen on validation or training cases and kept in a file with the ensemble that
they were chosen for (Frey & Nau 2019, section 2.3): the threshold by the mean Dice over the cases
that have the region, the least volume by the false alarms in the cases that do not. The condition,
that oedema lies around a tumour core, is ours, and is asked for.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from errors import InputError
from files import read_json, write_json

CORE = "TC"  # what each component of the regions around it holds
THRESHOLDS_NAME = "thresholds.json"  # the file of an operating point
PAPER = {"WT": 0.55, "TC": 0.5, "ET": 0.4}
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
LEAST_MM3 = (0.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
LEAST_VOLUME_COST = 0.005  # of mean Dice, at most, for fewer false alarms
MOST_OF_BRAIN = 0.5  # no region of a tumour covers more


@dataclass(frozen=True)
class OperatingPoint:
    """What a voxel's probability, and a region's volume, must exceed.

    Attributes:
        thresholds: Probability by region.
        least_mm3: Volume by region. A smaller one is taken for a false alarm, and its voxels go to
            the region around it. A region that is not named has no least volume.
        with_core: Regions of which only components with tumour core are kept, see
            `without_coreless`.
    """

    thresholds: Mapping[str, float]
    least_mm3: Mapping[str, float] = field(default_factory=dict)
    with_core: Sequence[str] = ()

    def __post_init__(self) -> None:
        for region, threshold in self.thresholds.items():
            if not (isinstance(threshold, int | float) and 0 < threshold < 1):
                raise InputError(
                    f"thresholds: expected a number between 0 and 1 for {region}, found {threshold}"
                )

    @classmethod
    def from_option(
        cls,
        option: str | float | Mapping[str, float],
        regions: Sequence[str],
        trained_with: float,
        networks: Mapping[str, Any],
    ) -> "OperatingPoint":
        """Read the option `thresholds` of conf/predict.yaml.

        Args:
            option: "checkpoint", "paper", a number, numbers by region, or the path of a file.
            regions: Regions that need a threshold.
            trained_with: The threshold that the checkpoint holds.
            networks: What tells the networks from others, as in `write`.

        Raises:
            InputError: A region without threshold, a file that `evaluate.py` has not written, or
                one that needs regions which the networks lack.
        """
        if option == "checkpoint":
            return cls(dict.fromkeys(regions, trained_with))
        if option == "paper":
            point = cls(PAPER)
        elif isinstance(option, str):
            point = cls.read(Path(option), networks)
        elif isinstance(option, Mapping):
            point = cls(option)
        else:
            point = cls(dict.fromkeys(regions, float(option)))
        if missing := [region for region in regions if region not in point.thresholds]:
            raise InputError(
                f"thresholds: expected one for each of {', '.join(regions)}, found none for "
                f"{', '.join(missing)}"
            )
        check_cored(point.with_core, regions)
        return point

    @classmethod
    def read(cls, path: Path, networks: Mapping[str, Any]) -> "OperatingPoint":
        """Read a file that `write` has written; warn if it was chosen for other networks.

        Args:
            path: The file.
            networks: What tells the networks from others, as in `write`.

        Raises:
            InputError: No such file, or another content.
        """
        content = read_json(path, f"evaluate.py writes such a file, {THRESHOLDS_NAME}")
        try:
            cored = content.get("with_core", ())  # files of earlier versions lack it
            point = cls(content["thresholds"], content["least_mm3"], tuple(cored))
            chosen_for = dict(content["chosen_for"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: expected thresholds as written by evaluate.py, found others ({error})"
            ) from error
        for key, value in json.loads(json.dumps(dict(networks))).items():
            if chosen_for.get(key) != value:
                logging.warning(
                    "%s: chosen for %s %s, used for %s", path, key, chosen_for.get(key), value
                )
        return point

    def write(self, path: Path, networks: Mapping[str, Any]) -> None:
        """Write the operating point, and the networks that it was chosen for, as JSON.

        Args:
            path: The file.
            networks: What tells the networks from others that it was not chosen for.
        """
        write_json(path, {**asdict(self), "chosen_for": networks})

    def masks(
        self,
        probabilities: np.ndarray,
        regions: Sequence[str],
        brain_voxels: int,
        voxel_mm3: float,
        case: str,
    ) -> np.ndarray:
        """Turn probabilities (R, X, Y, Z) into masks (R, X, Y, Z).

        A threshold that marks more than half of the brain was chosen for another network: the next
        higher one of `THRESHOLDS` that does not is taken for this case, with a warning.

        Args:
            probabilities: On any grid.
            regions: Names of the first axis.
            brain_voxels: Number of voxels of the brain on this grid.
            voxel_mm3: Volume of a voxel.
            case: Name of the case, for the warning.
        """
        found = np.zeros(probabilities.shape, bool)
        for mask, probability, region in zip(found, probabilities, regions, strict=True):
            threshold = self.thresholds[region]
            for candidate in (threshold, *(t for t in THRESHOLDS if t > threshold)):
                mask[:] = probability > candidate
                covered = int(mask.sum()) / max(brain_voxels, 1)
                if covered <= MOST_OF_BRAIN:
                    break
                logging.warning(
                    "%s: threshold %g of %s refused: it marks %.0f %% of the brain",
                    case, candidate, region, 100 * covered,
                )  # fmt: skip
            else:
                mask[:] = False
        found = without_coreless(found, regions, self.with_core)
        return without_small(found, regions, self.least_mm3, voxel_mm3)


def check_cored(cored: Sequence[str], regions: Sequence[str]) -> None:
    """Check that the regions of networks have what a condition on their components is about.

    Args:
        cored: Regions of which only components with tumour core are to be kept.
        regions: Regions that the networks segment.

    Raises:
        InputError: One of them, or the core, is no region of the networks.
    """
    if cored and (missing := [region for region in (*cored, CORE) if region not in regions]):
        raise InputError(
            f"with_core: expected networks with {', '.join(cored)} and {CORE}, found none with "
            f"{', '.join(missing)}"
        )


def without_coreless(masks: np.ndarray, regions: Sequence[str], cored: Sequence[str]) -> np.ndarray:
    """Leave out components of regions without tumour core; if all are, keep the largest.

    What is bright on FLAIR and has no core is seldom a tumour. Voxels that share a corner are of
    one component.

    Args:
        masks: (R, X, Y, Z) of the regions.
        regions: Their names, the core's among them if any is `cored`.
        cored: Names of the regions that are treated so.
    """
    from scipy.ndimage import label

    kept = masks.copy()
    for region in cored:
        mask = masks[list(regions).index(region)]
        components = np.empty(mask.shape, np.int32)
        label(mask, np.ones((3, 3, 3)), output=components)
        if components.any():
            core = masks[list(regions).index(CORE)]
            held = np.unique(components[core & mask])
            largest = np.bincount(components.ravel())[1:].argmax() + 1
            chosen = held if held.size else [largest]
            kept[list(regions).index(region)] = np.isin(components, chosen)
    return kept


def without_small(
    masks: np.ndarray, regions: Sequence[str], least_mm3: Mapping[str, float], voxel_mm3: float
) -> np.ndarray:
    """Empty the masks (R, X, Y, Z) of regions that are smaller than their least volume."""
    small = [
        mask.sum() * voxel_mm3 < least_mm3.get(region, 0)
        for mask, region in zip(masks, regions, strict=True)
    ]
    return masks & ~np.array(small)[:, None, None, None]


@dataclass
class Candidates:
    """Collects Dice and false alarms of every threshold and least volume, case by case.

    Each region is tuned by itself, although one lies within another: in the range of useful
    thresholds that changes little, and the choice does not depend on an order of the regions.

    Args:
        regions: Names, in the order of the probabilities.
        voxel_mm3: Volume of a voxel.
    """

    regions: Sequence[str]
    voxel_mm3: float
    # A case: (R, thresholds, volumes). Dice is NaN in a case without the region, false alarms (0 or
    # 1) are NaN in a case with it.
    dice: list[np.ndarray] = field(default_factory=list)
    false_alarms: list[np.ndarray] = field(default_factory=list)

    def add(self, probabilities: np.ndarray, truth: np.ndarray) -> None:
        """Add a case: probabilities and masks (R, X, Y, Z)."""
        edges = (-np.inf, *THRESHOLDS, np.inf)
        dice, false_alarms = [], []
        for probability, mask in zip(probabilities, truth, strict=True):
            # Count the voxels above each threshold, in all and inside the region, by histograms.
            # Bins are closed to the left, but a threshold must be exceeded: hence the negation.
            above, hit = (
                np.histogram(-values, [-edge for edge in reversed(edges)])[0].cumsum()[:-1][::-1]
                for values in (probability.ravel(), probability[mask])
            )
            kept = above[:, None] * self.voxel_mm3 >= np.array(LEAST_MM3)
            predicted, hit = above[:, None] * kept, hit[:, None] * kept
            nothing = np.full(predicted.shape, np.nan)
            total = predicted + mask.sum()
            dice.append(2 * hit / total if mask.any() else nothing)
            false_alarms.append(nothing if mask.any() else (predicted > 0).astype(float))
        self.dice.append(np.stack(dice))
        self.false_alarms.append(np.stack(false_alarms))

    def best(
        self, with_least_volume: Sequence[str] = (), with_core: Sequence[str] = ()
    ) -> OperatingPoint:
        """Find the thresholds nearest to 0.5 whose mean Dice cannot be told from the best.

        A few cases prefer some threshold or other, and what they prefer by chance does not carry
        over. A threshold counts as good as the best one if its cases lose less than one standard
        error of that loss (the rule of one standard error, Breiman et al. 1984, Classification and
        Regression Trees, section 3.4.3; here of paired differences).

        A least volume is the smallest one with the fewest false alarms, of those that cost little
        Dice. A region that no case has keeps 0.5, and one that all cases have no least volume.

        Args:
            with_least_volume: Regions that get a least volume too.
            with_core: Regions of which only components with tumour core are kept. The thresholds
                are chosen as if all were.
        """
        thresholds: dict[str, float] = {}
        least_mm3: dict[str, float] = {}
        dice, false_alarms = mean_over_cases(self.dice), mean_over_cases(self.false_alarms)
        for place, region in enumerate(self.regions):
            scores, alarms = dice[place], false_alarms[place]
            candidates = as_good_as_best(np.stack([case[place, :, 0] for case in self.dice]))
            threshold = min(candidates.tolist(), key=lambda index: abs(THRESHOLDS[index] - 0.5))
            thresholds[region] = THRESHOLDS[threshold]
            if region in with_least_volume:
                cheap = scores[threshold] >= scores[threshold, 0] - LEAST_VOLUME_COST
                cheap |= np.isnan(scores[threshold])
                alarms_left = np.where(cheap, np.nan_to_num(alarms[threshold]), np.inf)
                least_mm3[region] = LEAST_MM3[int(alarms_left.argmin())]
        return OperatingPoint(thresholds, least_mm3, tuple(with_core))

    def mean_dice(self, point: OperatingPoint) -> dict[str, float]:
        """Mean Dice of each region over the cases that have it, at a point of this grid."""
        return self._at(mean_over_cases(self.dice), point)

    def false_alarm_rate(self, point: OperatingPoint) -> dict[str, float]:
        """Share of the cases without each region in which it is predicted; NaN if there is none."""
        return self._at(mean_over_cases(self.false_alarms), point)

    def cases_with(self, region: str) -> int:
        """Number of cases that have a region."""
        place = list(self.regions).index(region)
        return sum(not np.isnan(scores[place, 0, 0]) for scores in self.dice)

    def _at(self, means: np.ndarray, point: OperatingPoint) -> dict[str, float]:
        return {
            region: float(
                table[
                    THRESHOLDS.index(point.thresholds[region]),
                    LEAST_MM3.index(point.least_mm3.get(region, 0.0)),
                ]
            )
            for region, table in zip(self.regions, means, strict=True)
        }


def as_good_as_best(dice: np.ndarray) -> np.ndarray:
    """Find the places of thresholds whose mean Dice is within one standard error of the best.

    Args:
        dice: Of every case and threshold (cases, thresholds); NaN in cases that do not count.

    Returns:
        The places, in rising order; all if no case counts.
    """
    known = dice[~np.isnan(dice).any(1)]
    if not len(known):
        return np.arange(dice.shape[1])
    loss = known[:, [known.mean(0).argmax()]] - known
    error = loss.std(0, ddof=1) / len(known) ** 0.5 if len(known) > 1 else 0.0
    return np.flatnonzero(loss.mean(0) <= error + 1e-9)


def mean_over_cases(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Average tables of cases where they are not NaN; NaN where all of them are."""
    stacked = np.stack(tables)
    known = (~np.isnan(stacked)).sum(0)
    return np.where(known, np.nansum(stacked, 0) / np.maximum(known, 1), np.nan)
