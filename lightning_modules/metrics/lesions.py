"""Which lesions were found, and what was found that is none, at every threshold.

Lesions are 26-connected components of the truth at full resolution; predicted components are
26-connected too. A lesion is detected if one of its voxels is; a false positive is a predicted
component that touches no lesion; false positives are averaged over all patients, the lesion-free
too (Krivov & Belyaev 2018, section 3, and the design's settled readings).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

from grids import components
from lightning_modules.metrics.cases import CaseMetrics
from lightning_modules.networks.geometry import Geometry

# Probabilities at equal steps of the logit, from .018 to .999994. They reach so far up because a
# network that saw lesions in half of its patches is too sure of lesions in whole volumes.
THRESHOLDS = tuple(float(1 / (1 + np.exp(-logit))) for logit in np.linspace(-4, 12, 49))

# Counts of a case at a threshold.
COUNTS = (
    "detected",  # lesions of which a voxel was predicted
    "false_positives",  # predicted components that touch no lesion
    "one_to_one",  # lesions detected if a predicted component may count for one lesion only
    "merged",  # detected lesions that share a predicted component with another lesion
    "split",  # lesions that two or more predicted components touch
    "dice",  # sum over the detected lesions of the Dice with all components that touch them
)
SIZE_BINS_MM = (0.0, 5.0, 10.0, float("inf"))  # diameters


class CaseLesions(NamedTuple):
    """The lesions of one case.

    Attributes:
        counts: (T, len(COUNTS)), one row a threshold.
        lesions: (L, 2): diameter in mm of the ball of equal volume, highest probability inside.
    """

    counts: np.ndarray
    lesions: np.ndarray


def match(
    probability: np.ndarray,
    truth: np.ndarray,
    stride: int = 1,
    spacing_mm: float = 1.0,
    thresholds: Sequence[float] = THRESHOLDS,
) -> CaseLesions:
    """Compare a prediction with the lesions of a case.

    A coarse prediction stands for its repetition at full resolution. Both have the same components,
    which are counted on the coarse grid: that is stride³ times as fast.

    Args:
        probability: (X', Y', Z'), the sides of `truth` over `stride`, rounded up.
        truth: (X, Y, Z), bool.
        stride: Voxels of `truth` along each side of a voxel of `probability`.
        spacing_mm: Edge of a voxel of `truth`.
        thresholds: Probabilities above which a voxel is predicted.
    """
    lesion_of, lesions = components(truth)
    voxels = np.argwhere(lesion_of)
    lesion = lesion_of[tuple(voxels.T)] - 1
    box = np.ravel_multi_index(tuple((voxels // stride).T), probability.shape)
    # Every pair of a lesion and a coarse voxel that overlap, and in how many voxels.
    pairs, overlap = np.unique(np.stack([lesion, box]), axis=1, return_counts=True)
    lesion, box = pairs
    volume = np.bincount(lesion, overlap, minlength=lesions)
    score = np.zeros(lesions)
    np.maximum.at(score, lesion, probability.ravel()[box])
    box_voxels = _box_voxels(truth, stride)
    counts = np.stack(
        [
            _count(probability, level, lesion, box, overlap, volume, box_voxels)
            for level in thresholds
        ]
    )
    diameter_mm = np.cbrt(6 * volume / np.pi) * spacing_mm
    return CaseLesions(counts, np.stack([diameter_mm, score], axis=1))


def _count(
    probability: np.ndarray,
    threshold: float,
    lesion: np.ndarray,
    box: np.ndarray,
    overlap: np.ndarray,
    volume: np.ndarray,
    box_voxels: np.ndarray,
) -> np.ndarray:
    """Compute COUNTS at one threshold, from (lesion, box, overlap in voxels) triples of a case."""
    component_of, predictions = components(probability > threshold)
    component = component_of.ravel()[box]
    hit = component > 0
    # Overlap in voxels of each lesion (rows) with each predicted component (columns).
    table = coo_array(
        (overlap[hit], (lesion[hit], component[hit] - 1)), shape=(len(volume), predictions)
    ).tocsr()
    table.sum_duplicates()
    touched_by = np.diff(table.indptr)  # components that touch a lesion
    touches = np.bincount(table.indices, minlength=predictions)  # lesions that a component touches
    shares = np.array([(touches[table.indices[a:b]] > 1).any() for a, b in _rows(table.indptr)])
    size = np.bincount(component_of.ravel(), box_voxels.ravel(), minlength=predictions + 1)[1:]
    found = touched_by > 0
    predicted = np.array([size[table.indices[a:b]].sum() for a, b in _rows(table.indptr)])
    dice = 2 * table.sum(axis=1)[found] / (volume[found] + predicted[found])
    matched = maximum_bipartite_matching(table, perm_type="column") if table.nnz else np.empty(0)
    return np.array(
        [
            found.sum(),
            (touches == 0).sum(),
            (matched >= 0).sum(),
            shares.sum(),
            (touched_by > 1).sum(),
            dice.sum(),
        ],
        dtype=np.float64,
    )


def _rows(indptr: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True))


def _box_voxels(truth: np.ndarray, stride: int) -> np.ndarray:
    """Count the voxels of the volume in each box (X', Y', Z'): fewer at the far ends."""
    sides = [
        np.minimum(stride, side - np.arange(0, side, stride)).astype(np.float64)
        for side in truth.shape
    ]
    return np.einsum("x,y,z->xyz", *sides)


class LesionReport(NamedTuple):
    """The lesions of all cases at every threshold.

    Attributes:
        thresholds: (T,), rising.
        cases: (N,), indices of the cases in the data set, rising.
        counts: (N, T, len(COUNTS)).
        lesions: (L, 3): index of the case, diameter in mm, highest probability inside.
    """

    thresholds: np.ndarray
    cases: np.ndarray
    counts: np.ndarray
    lesions: np.ndarray

    def froc(self, found: str = "detected") -> tuple[np.ndarray, np.ndarray]:
        """Sensitivity (T,), pooled over the lesions, and false positives a patient (T,).

        Args:
            found: The count that makes the sensitivity: "detected" or "one_to_one".
        """
        total = self.counts.sum(0)
        sensitivity = total[:, COUNTS.index(found)] / max(len(self.lesions), 1)
        return sensitivity, total[:, COUNTS.index("false_positives")] / len(self.cases)

    def best_threshold(self, target_fp: float) -> float:
        """Find the threshold that detects most lesions with at most so many false positives.

        A prediction that floods the brain is one component, which touches every lesion and is no
        false positive: by the rule of the paper nothing would be better. So lesions are counted one
        to one, and every higher threshold must keep to the target too. If none does, the highest
        threshold is returned.

        Args:
            target_fp: False positives a patient.
        """
        sensitivity, false_positives = self.froc("one_to_one")
        allowed = np.logical_and.accumulate((false_positives <= target_fp)[::-1])[::-1]
        if not allowed.any():
            return float(self.thresholds[-1])
        best = sensitivity[allowed].max()
        # Of equal sensitivities, the highest threshold has the fewest false positives.
        return float(self.thresholds[allowed & (sensitivity == best)][-1])

    def nearest(self, threshold: float) -> int:
        """Index of the nearest of the thresholds."""
        return int(np.abs(self.thresholds - threshold).argmin())

    def scores(self, threshold: float) -> dict[str, float]:
        """All scores at the nearest of the thresholds; NaN if there is nothing to score."""
        number = self.nearest(threshold)
        total = dict(zip(COUNTS, self.counts[:, number].sum(0).tolist(), strict=True))
        lesions, patients = len(self.lesions), len(self.cases)
        nothing = float("nan")
        by_patient = [
            row[COUNTS.index("detected")] / count
            for row, count in zip(
                self.counts[:, number].tolist(), self.lesions_per_case(), strict=True
            )
            if count
        ]
        scores = {
            "sensitivity": total["detected"] / lesions if lesions else nothing,
            "false_positives": total["false_positives"] / patients,
            "sensitivity_one_to_one": total["one_to_one"] / lesions if lesions else nothing,
            "sensitivity_by_patient": float(np.mean(by_patient)) if by_patient else nothing,
            "merged": total["merged"],
            "split": total["split"],
            "lesion_dice": total["dice"] / total["detected"] if total["detected"] else nothing,
        }
        for low, high in pairwise(SIZE_BINS_MM):
            inside = (self.lesions[:, 1] >= low) & (self.lesions[:, 1] < high)
            name = (
                f"sensitivity_{low:g}mm_up" if np.isinf(high) else f"sensitivity_{low:g}-{high:g}mm"
            )
            found = self.lesions[inside, 2] > self.thresholds[number]
            scores[name] = float(found.mean()) if inside.any() else nothing
        return scores

    def lesions_per_case(self) -> list[int]:
        """Number of lesions of each case (N,)."""
        return [int((self.lesions[:, 0] == index).sum()) for index in self.cases]

    def rows(self, threshold: float) -> dict[int, dict[str, float]]:
        """COUNTS of each case at the nearest of the thresholds, by its index."""
        number = self.nearest(threshold)
        return {
            int(index): {"lesions": count, **dict(zip(COUNTS, counts, strict=True))}
            for index, count, counts in zip(
                self.cases, self.lesions_per_case(), self.counts[:, number].tolist(), strict=True
            )
        }


class LesionMetrics(CaseMetrics):
    """Lesions found and false positives, at every threshold.

    Args:
        geometry: Halo and stride of the network. Probabilities come at full resolution; those of a
            network of stride s are constant in boxes of s³ voxels.
        spacing_mm: Edge of a voxel.
        thresholds: Probabilities at which lesions are counted, rising.
        threshold: The one that scores and rows are of, until another is chosen.
    """

    best_is_highest = ("sensitivity", "sensitivity_one_to_one", "sensitivity_by_patient")

    def __init__(
        self,
        geometry: Geometry,
        spacing_mm: float = 1.0,
        thresholds: Sequence[float] = THRESHOLDS,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(threshold)
        self.stride = geometry.stride
        self.spacing_mm = spacing_mm
        self.thresholds = tuple(thresholds)

    def update(self, probability: Float[Tensor, "b 1 x y z"], batch: Mapping[str, Any]) -> None:
        stride = self.stride
        coarse = probability[:, 0, ::stride, ::stride, ::stride].float().cpu().numpy()
        index = batch["index"]
        for values, truth, place in zip(coarse, batch["mask"][:, 0], index.tolist(), strict=True):
            case = match(values, truth.cpu().numpy(), stride, self.spacing_mm, self.thresholds)
            record = [[place, len(case.lesions)], case.counts.ravel(), case.lesions.ravel()]
            # float32 is what every device has, and exact for what is counted here.
            self.records.append(
                torch.tensor(np.concatenate(record), dtype=torch.float32, device=index.device)
            )

    def report(self) -> LesionReport:
        """The lesions of all cases, by index, at every threshold."""
        with self.over_all_ranks():
            rest = self.flat_records().cpu().numpy()
        shape = (len(self.thresholds), len(COUNTS))
        counts: dict[int, np.ndarray] = {}
        lesions: dict[int, np.ndarray] = {}
        while rest.size:
            index, size = rest[:2].astype(int).tolist()
            ends = np.cumsum([2, shape[0] * shape[1], 2 * size]).tolist()
            counts[index] = rest[ends[0] : ends[1]].reshape(shape)
            lesions[index] = np.insert(rest[ends[1] : ends[2]].reshape(-1, 2), 0, index, axis=1)
            rest = rest[ends[2] :]
        order = sorted(counts)
        return LesionReport(
            np.array(self.thresholds, np.float32),
            np.array(order),
            np.stack([counts[index] for index in order]),
            np.concatenate([lesions[index] for index in order]),
        )

    def compute(self) -> dict[str, float | Tensor]:
        """All scores at the threshold, and the threshold.

        A score that is not defined, without lesions or without detections, is left out: Lightning's
        checkpoints and sweeps cannot rank NaN.
        """
        threshold = float(self.threshold)
        scores = {**self.report().scores(threshold), "threshold": threshold}
        return {name: value for name, value in scores.items() if not np.isnan(value)}

    def rows(self) -> dict[int, dict[str, float]]:
        """COUNTS of every case at the threshold, by its index in the data set."""
        return self.report().rows(float(self.threshold))
