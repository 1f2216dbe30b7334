"""From probabilities to masks: a threshold and a least volume for each region.

Both are chosen on validation or training cases, by the mean Dice, and kept in a file beside the
ensemble that they were chosen for (Frey & Nau 2019, section 2.3).
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from errors import InputError

PAPER = {"WT": 0.55, "TC": 0.5, "ET": 0.4}
GRID = tuple(round(0.05 * step, 2) for step in range(1, 20))
LEAST_MM3 = (0.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
FLOOD = 0.5  # of the brain: no region of a tumour has more


@dataclass(frozen=True)
class OperatingPoint:
    """What a voxel's probability, and a region's volume, must exceed.

    Attributes:
        thresholds: By region.
        least_mm3: By region: a smaller one is taken for a false alarm, and what lies within it goes
            to the region around it. Regions that are not named have no least volume.
    """

    thresholds: Mapping[str, float]
    least_mm3: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for region, threshold in self.thresholds.items():
            if not 0 < threshold < 1:
                raise InputError(
                    f"thresholds: expected a number between 0 and 1 for {region}, found {threshold}"
                )

    @classmethod
    def read(cls, path: Path, networks: Mapping[str, Any]) -> "OperatingPoint":
        """From a file that `write` has written; warns where it was chosen for other networks.

        Args:
            path: Of the file.
            networks: As of `write`, of those that it is read for.

        Raises:
            InputError: No such file, or another content.
        """
        try:
            content = json.loads(path.read_text())
            point = cls(content["thresholds"], content["least_mm3"])
            chosen_for = content["chosen_for"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: expected thresholds as written by evaluate.py, found: {error}"
            ) from error
        for key, value in json.loads(json.dumps(dict(networks))).items():
            if chosen_for.get(key) != value:
                logging.warning(
                    "%s: chosen for %s %s, used for %s", path, key, chosen_for.get(key), value
                )
        return point

    def write(self, path: Path, networks: Mapping[str, Any]) -> None:
        """As JSON, at once and whole.

        Args:
            path: Of the file.
            networks: What tells the networks from others that it was not chosen for.
        """
        partial = path.with_name(f".{os.getpid()}.{path.name}")
        partial.write_text(json.dumps({**asdict(self), "chosen_for": networks}, indent=1) + "\n")
        partial.replace(path)

    def masks(
        self,
        probabilities: np.ndarray,
        regions: Sequence[str],
        brain_voxels: int,
        voxel_mm3: float,
        case: str,
    ) -> np.ndarray:
        """Masks (R, X, Y, Z) of probabilities (R, X, Y, Z).

        A threshold that gives a region more than half of the brain was chosen for another network:
        for this case the lowest one of `GRID` that does not is taken instead, with a warning.

        Args:
            probabilities: On any grid.
            regions: Names of the first axis.
            brain_voxels: Of the case on this grid.
            voxel_mm3: Volume of a voxel.
            case: Its name, for the warning.
        """
        found = np.zeros(probabilities.shape, bool)
        for mask, probability, region in zip(found, probabilities, regions, strict=True):
            threshold = self.thresholds[region]
            for candidate in (threshold, *(t for t in GRID if t > threshold)):
                mask[:] = probability > candidate
                covered = int(mask.sum()) / max(brain_voxels, 1)
                if covered <= FLOOD:
                    break
                logging.warning(
                    "%s: threshold %g of %s refused: it marks %.0f %% of the brain",
                    case, candidate, region, 100 * covered,
                )  # fmt: skip
            else:
                mask[:] = False
        return without_small(found, regions, self.least_mm3, voxel_mm3)


def without_small(
    masks: np.ndarray, regions: Sequence[str], least_mm3: Mapping[str, float], voxel_mm3: float
) -> np.ndarray:
    """Masks (R, X, Y, Z) without the regions that are smaller than their least volume."""
    small = [
        mask.sum() * voxel_mm3 < least_mm3.get(region, 0)
        for mask, region in zip(masks, regions, strict=True)
    ]
    return masks & ~np.array(small)[:, None, None, None]


@dataclass
class Candidates:
    """Collects the Dice of every threshold and least volume, case by case.

    Regions are taken one by one: that one lies within another changes little at the thresholds
    that come into question, and would make the choice depend on the order.

    Args:
        regions: Names, in the order of the probabilities.
        voxel_mm3: Volume of a voxel.
    """

    regions: Sequence[str]
    voxel_mm3: float
    scores: list[np.ndarray] = field(default_factory=list)  # of each case (R, thresholds, volumes)

    def add(self, probabilities: np.ndarray, truth: np.ndarray) -> None:
        """A case: probabilities and masks (R, X, Y, Z)."""
        edges = (-np.inf, *GRID, np.inf)
        rows = []
        for probability, mask in zip(probabilities, truth, strict=True):
            # How many voxels lie above each threshold, in all and inside the region. Bins are
            # closed to the left and a threshold is not exceeded by itself: hence the negation.
            above, hit = (
                np.histogram(-values, [-edge for edge in reversed(edges)])[0].cumsum()[:-1][::-1]
                for values in (probability.ravel(), probability[mask])
            )
            kept = above[:, None] * self.voxel_mm3 >= np.array(LEAST_MM3)
            predicted, hit = above[:, None] * kept, hit[:, None] * kept
            total = predicted + mask.sum()
            rows.append(np.where(total == 0, 1.0, 2 * hit / np.maximum(total, 1)))
        self.scores.append(np.stack(rows))

    def choose(self, with_least_volume: Sequence[str] = ()) -> OperatingPoint:
        """The best mean Dice; among equals the threshold nearest to 0.5, and the least volume.

        Args:
            with_least_volume: Regions that get a least volume too.
        """
        mean = np.mean(self.scores, axis=0)
        thresholds: dict[str, float] = {}
        least_mm3: dict[str, float] = {}
        for region, table in zip(self.regions, mean, strict=True):
            volumes = len(LEAST_MM3) if region in with_least_volume else 1
            table = table[:, :volumes]
            candidates = np.argwhere(table >= table.max() - 1e-9)
            number, volume = min(
                candidates.tolist(), key=lambda place: (place[1], abs(GRID[place[0]] - 0.5))
            )
            thresholds[region] = GRID[number]
            if region in with_least_volume:
                least_mm3[region] = LEAST_MM3[volume]
        return OperatingPoint(thresholds, least_mm3)

    def mean_dice(self, point: OperatingPoint) -> dict[str, float]:
        """By region, of the cases added, at an operating point of this grid."""
        mean = np.mean(self.scores, axis=0)
        return {
            region: float(
                table[
                    GRID.index(point.thresholds[region]),
                    LEAST_MM3.index(point.least_mm3.get(region, 0.0)),
                ]
            )
            for region, table in zip(self.regions, mean, strict=True)
        }
