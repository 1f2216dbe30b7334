"""Which lesions were found, and what was found that is none, at every threshold.

Lesions are 26-connected components of the truth at full resolution; predicted components are
26-connected too. A lesion is detected if one of its voxels is; a false positive is a predicted
component that touches no lesion; false positives are averaged over all patients, the lesion-free
too (Krivov & Belyaev 2018, section 3, and the design's settled readings).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.networks.dnet import Geometry

EVERY_NEIGHBOUR = np.ones((3, 3, 3), bool)  # 26-connected; scipy's default is 6

# Probabilities at equal steps of the logit, from .018 to .999994: where half of the patches have a
# lesion in training, networks are too sure of lesions in whole volumes.
THRESHOLDS = tuple(float(1 / (1 + np.exp(-logit))) for logit in np.linspace(-4, 12, 49))

# What is counted in a case at a threshold.
COUNTS = (
    "detected",  # lesions of which a voxel was predicted
    "false_positives",  # predicted components that touch no lesion
    "one_to_one",  # lesions detected if a predicted component may count for one lesion only
    "merged",  # detected lesions that share a predicted component with another lesion
    "split",  # lesions that two or more predicted components touch
    "dice",  # sum over the detected lesions: lesion against all components that touch it
)
SIZE_BINS_MM = (0.0, 5.0, 10.0, float("inf"))  # diameters


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """26-connected components of a mask (X, Y, Z): numbers from 1 (X, Y, Z), and how many."""
    numbers = np.empty(mask.shape, np.int32)
    ndimage.label(mask, EVERY_NEIGHBOUR, output=numbers)
    return numbers, int(numbers.max(initial=0))


class CaseLesions(NamedTuple):
    """One case.

    Attributes:
        counts: (T, len(COUNTS)), of each threshold.
        lesions: (L, 2): diameter in mm of the ball of equal volume; highest probability inside.
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

    A coarse prediction stands for the one that repetition brings to full resolution; its
    components are the same, and are counted on the coarse grid, which is stride³ times as fast.

    Args:
        probability: (X', Y', Z'), sides of `truth` over `stride`, rounded up.
        truth: (X, Y, Z), bool.
        stride: Voxels to a voxel of `probability`, along each axis.
        spacing_mm: Edge of a voxel of `truth`.
        thresholds: A voxel is predicted above it.
    """
    lesion_of, lesions = components(truth)
    voxels = np.argwhere(lesion_of)
    lesion = lesion_of[tuple(voxels.T)] - 1
    box = np.ravel_multi_index(tuple((voxels // stride).T), probability.shape)
    # Every box that a lesion has voxels in, and how many.
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
    """COUNTS at one threshold, from the (lesion, box, overlap in voxels) triples of a case."""
    component_of, predictions = components(probability > threshold)
    component = component_of.ravel()[box]
    hit = component > 0
    # Overlap of each lesion with each component.
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
    """How many voxels of the volume each box covers: fewer at the far ends (X', Y', Z')."""
    sides = [
        np.minimum(stride, side - np.arange(0, side, stride)).astype(np.float64)
        for side in truth.shape
    ]
    return np.einsum("x,y,z->xyz", *sides)


class LesionReport(NamedTuple):
    """Cases of a data set at every threshold, in numpy arrays.

    Attributes:
        thresholds: (T,), rising.
        cases: (N,), places of the cases in the data set, rising.
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
            found: Which of COUNTS makes the sensitivity: "detected" or "one_to_one".
        """
        total = self.counts.sum(0)
        sensitivity = total[:, COUNTS.index(found)] / max(len(self.lesions), 1)
        return sensitivity, total[:, COUNTS.index("false_positives")] / len(self.cases)

    def choose(self, target_fp: float) -> float:
        """The threshold that finds most lesions with at most so many false positives a patient.

        A prediction that floods the brain is one component, which touches every lesion and is no
        false positive: by the rule of the paper nothing would be better. So the threshold is
        lowered only as long as the target is kept all the way, and lesions are counted one to one.
        The highest threshold of all where none keeps to the target.
        """
        sensitivity, false_positives = self.froc("one_to_one")
        allowed = np.logical_and.accumulate((false_positives <= target_fp)[::-1])[::-1]
        if not allowed.any():
            return float(self.thresholds[-1])
        best = sensitivity[allowed].max()
        # Among equals the one with the fewest false positives, and the furthest from the others.
        return float(self.thresholds[allowed & (sensitivity == best)][-1])

    def number(self, threshold: float) -> int:
        """Which of the thresholds is the nearest."""
        return int(np.abs(self.thresholds - threshold).argmin())

    def at(self, threshold: float) -> dict[str, float]:
        """All scores at one of the thresholds; NaN where there is nothing to score."""
        number = self.number(threshold)
        total = dict(zip(COUNTS, self.counts[:, number].sum(0).tolist(), strict=True))
        lesions, patients = len(self.lesions), len(self.cases)
        nothing = float("nan")
        by_patient = [
            row[COUNTS.index("detected")] / count
            for row, count in zip(self.counts[:, number].tolist(), self.lesions_of(), strict=True)
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

    def lesions_of(self) -> list[int]:
        """How many lesions each case has (N,)."""
        return [int((self.lesions[:, 0] == index).sum()) for index in self.cases]

    def rows(self, threshold: float) -> dict[int, dict[str, float]]:
        """What was counted in each case at one of the thresholds, by its index."""
        number = self.number(threshold)
        return {
            int(index): {"lesions": count, **dict(zip(COUNTS, counts, strict=True))}
            for index, count, counts in zip(
                self.cases, self.lesions_of(), self.counts[:, number].tolist(), strict=True
            )
        }


class LesionMetrics(Metric):
    """Keeps the lesions of every case; `compute` gives a `LesionReport`.

    Cases are told apart by their index, so that one that two ranks have both seen counts once.
    They are kept flat, in one dimension: torchmetrics takes ranks without any case only so.

    Args:
        geometry: Of the network: how coarse its predictions are.
        spacing_mm: Edge of a voxel.
        thresholds: At which to count, rising.
    """

    full_state_update = False
    flat: list[Tensor]

    def __init__(
        self,
        geometry: Geometry,
        spacing_mm: float = 1.0,
        thresholds: Sequence[float] = THRESHOLDS,
    ) -> None:
        super().__init__()
        self.stride = geometry.stride
        self.spacing_mm = spacing_mm
        self.thresholds = tuple(thresholds)
        self.add_state("flat", default=[], dist_reduce_fx="cat")

    def update(self, probability: Tensor, truth: Tensor, index: Tensor) -> None:
        """Add cases: (B, 1, X', Y', Z'), masks (B, 1, X, Y, Z), places in the data set (B,)."""
        for item, number in enumerate(index.tolist()):
            case = match(
                probability[item, 0].float().cpu().numpy(),
                truth[item, 0].cpu().numpy(),
                self.stride,
                self.spacing_mm,
                self.thresholds,
            )
            row = [[number, len(case.lesions)], case.counts.ravel(), case.lesions.ravel()]
            # float32 is what every device has, and exact for what is counted here.
            self.flat.append(
                torch.tensor(np.concatenate(row), dtype=torch.float32, device=index.device)
            )

    def compute(self) -> LesionReport:
        """All cases, by index."""
        # A list state is a tensor already once torchmetrics has gathered it from all ranks.
        flat = torch.cat(self.flat) if isinstance(self.flat, list) else self.flat
        rest = flat.cpu().numpy()
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
