"""Lesion-wise detection: sensitivity and false positives a patient, at every threshold.

Lesions are the 26-connected components of the truth at full resolution; the prediction is cut into
26-connected components too. A lesion is detected if one of its voxels is predicted. A false
positive is a predicted component that touches no lesion. False positives are averaged over all
patients, with those who have no lesion. (Krivov & Belyaev 2018, section 3; connectivity and average
are our reading of it.)

Test cases are scored on the grid of their own files: on a coarser grid small lesions vanish from
the truth, and a crop cuts lesions off. Validation during training stays on the network's grid,
where counting is faster, and has only the lesions that are left there. That suffices to rank
checkpoints and to choose a threshold, but its sensitivity is too high beside that of a test.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Real
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

from grids import bounding_box, components
from lightning_modules.metrics.cases import CaseMetrics
from lightning_modules.networks.geometry import Geometry

# Probabilities from 0.018 to 0.9999992, in steps of 0.1 of the logit. The highest is so near to 1
# because a network that was trained with lesions in half of its patches overestimates their
# probability in whole volumes.
THRESHOLDS = tuple(float(1 / (1 + np.exp(-logit))) for logit in np.linspace(-4, 14, 181))

# What is counted in a case at a threshold.
COUNTS = (
    "detected",  # lesions that have a predicted voxel
    "false_positives",  # predicted components that touch no lesion
    "one_to_one",  # detected lesions if every predicted component counts for one lesion at most
    "merged",  # detected lesions that share a predicted component with another lesion
    "split",  # lesions that two or more predicted components touch
    "dice",  # sum over the detected lesions of their Dice with all components that touch them
)
SIZE_BINS_MM = (0.0, 5.0, 10.0, float("inf"))  # edges of the bins of diameters


# Brings probabilities (R, X, Y, Z) from the network's grid to that of the scan. Returns them, the
# true masks of the same shape, and the edges of a voxel in mm.
OnScanGrid = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, Sequence[float]]]


class CaseLesions(NamedTuple):
    """The lesions of one case.

    Attributes:
        counts: `COUNTS` in columns, one row for each of T thresholds.
        lesions: One row for each of L lesions: diameter in mm of the ball of equal volume, and
            highest probability inside.
    """

    counts: Float64[np.ndarray, "t counts"]
    lesions: Float64[np.ndarray, "l 2"]


def match(
    probability: Float[np.ndarray, "x_ y_ z_"],
    truth: Bool[np.ndarray, "x y z"],
    stride: int = 1,
    spacing_mm: float = 1.0,
    thresholds: Sequence[float] = THRESHOLDS,
) -> CaseLesions:
    """Compare a prediction with the lesions of a case.

    A coarse prediction stands for its repetition at full resolution. Both have the same components,
    so they are counted on the coarse grid, which is stride³ times as fast.

    Args:
        probability: Its sides are those of `truth` over the stride, rounded up.
        truth: Lesion mask at full resolution.
        stride: Voxels of `truth` along each side of a voxel of `probability`.
        spacing_mm: Edge of a voxel of `truth` in mm.
        thresholds: Probabilities above which a voxel is predicted.
    """
    if stride == 1:  # nothing is counted outside this box, and a scan is mostly air
        inside = bounding_box((probability > min(thresholds)) | truth)
        probability, truth = probability[inside], truth[inside]
    lesion_of, lesions = components(truth)
    voxels = np.argwhere(lesion_of)
    lesion = lesion_of[tuple(voxels.T)] - 1
    box = np.ravel_multi_index(tuple((voxels // stride).T), probability.shape)
    # Pairs of a lesion and a coarse voxel that overlap, and the number of voxels that they share.
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
    probability: Float[np.ndarray, "x y z"],
    threshold: float,
    lesion: Int[np.ndarray, " pair"],
    box: Int[np.ndarray, " pair"],
    overlap: Int[np.ndarray, " pair"],
    volume: Real[np.ndarray, " l"],
    box_voxels: Float64[np.ndarray, "x y z"],
) -> Float64[np.ndarray, " counts"]:
    """Compute `COUNTS` of a case at one threshold.

    Args:
        probability: Prediction on the coarse grid.
        threshold: Probability above which a voxel is predicted.
        lesion: Lesion of each pair of a lesion and a coarse voxel that overlap.
        box: Flat index of the coarse voxel of each pair.
        overlap: Number of voxels at full resolution that each pair shares.
        volume: Number of voxels of each lesion.
        box_voxels: Number of voxels at full resolution in each coarse voxel.
    """
    predicted_here = probability > threshold
    inside = bounding_box(predicted_here)  # far smaller than the volume at a high threshold
    component_of = np.zeros(probability.shape, np.int32)
    component_of[inside], predictions = components(predicted_here[inside])
    component = component_of.ravel()[box]
    hit = component > 0
    # Overlap in voxels of each lesion (rows) with each predicted component (columns).
    table = coo_array(
        (overlap[hit], (lesion[hit], component[hit] - 1)), shape=(len(volume), predictions)
    ).tocsr()
    table.sum_duplicates()
    # Number of components that touch each lesion, and of lesions that each component touches.
    touched_by = np.diff(table.indptr)
    touches = np.bincount(table.indices, minlength=predictions)
    shares = np.array([(touches[table.indices[a:b]] > 1).any() for a, b in _rows(table.indptr)])
    numbers, voxels = component_of[inside].ravel(), box_voxels[inside].ravel()
    size = np.bincount(numbers, voxels, minlength=predictions + 1)[1:]
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


def _rows(indptr: Int[np.ndarray, " n"]) -> list[tuple[int, int]]:
    """Return where each row of a sparse table starts and ends in its indices."""
    return list(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True))


def _box_voxels(truth: Bool[np.ndarray, "x y z"], stride: int) -> Float64[np.ndarray, "x_ y_ z_"]:
    """Count the voxels of the volume in each box of stride³; boxes at the far ends have fewer."""
    sides = [
        np.minimum(stride, side - np.arange(0, side, stride)).astype(np.float64)
        for side in truth.shape
    ]
    return np.einsum("x,y,z->xyz", *sides)


class LesionReport(NamedTuple):
    """The lesions of all cases at every threshold.

    Attributes:
        thresholds: The T thresholds, rising.
        cases: Indices of the N cases in the data set, rising.
        counts: `COUNTS` of every case at every threshold.
        lesions: One row for each of L lesions: index of the case, diameter in mm, and highest
            probability inside.
    """

    thresholds: Float[np.ndarray, " t"]
    cases: Int[np.ndarray, " n"]
    counts: Float[np.ndarray, "n t counts"]
    lesions: Float[np.ndarray, "l 3"]

    def froc(
        self, found: str = "detected"
    ) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
        """Compute the FROC curve: sensitivity and false positives a patient at every threshold.

        Args:
            found: Which count over the number of all lesions is the sensitivity: "detected" or
                "one_to_one".
        """
        total = self.counts.sum(0)
        sensitivity = total[:, COUNTS.index(found)] / max(len(self.lesions), 1)
        return sensitivity, total[:, COUNTS.index("false_positives")] / len(self.cases)

    def best_threshold(self, target_fp: float) -> float:
        """Find the threshold that detects most lesions within a limit of false positives.

        A prediction that covers all of the brain is one component, which touches every lesion and
        is no false positive: by the paper's rule no prediction is better. So lesions are counted
        one to one, and all higher thresholds must keep to the limit too. If even the highest does
        not, it is returned all the same.

        Args:
            target_fp: The largest number of false positives a patient.
        """
        sensitivity, false_positives = self.froc("one_to_one")
        allowed = np.logical_and.accumulate((false_positives <= target_fp)[::-1])[::-1]
        if not allowed.any():
            return float(self.thresholds[-1])
        best = sensitivity[allowed].max()
        # Among thresholds of equal sensitivity, the highest has the fewest false positives.
        return float(self.thresholds[allowed & (sensitivity == best)][-1])

    def nearest(self, threshold: float) -> int:
        """Return the position in `thresholds` of the one nearest to a probability."""
        return int(np.abs(self.thresholds - threshold).argmin())

    def scores(self, threshold: float) -> dict[str, float]:
        """Compute all scores at the nearest of the thresholds; NaN where one is not defined."""
        position = self.nearest(threshold)
        total = dict(zip(COUNTS, self.counts[:, position].sum(0).tolist(), strict=True))
        lesions, patients = len(self.lesions), len(self.cases)
        undefined = float("nan")
        by_patient = [
            row[COUNTS.index("detected")] / count
            for row, count in zip(
                self.counts[:, position].tolist(), self.lesions_per_case(), strict=True
            )
            if count
        ]
        scores = {
            "sensitivity": total["detected"] / lesions if lesions else undefined,
            "false_positives": total["false_positives"] / patients,
            "sensitivity_one_to_one": total["one_to_one"] / lesions if lesions else undefined,
            "sensitivity_by_patient": float(np.mean(by_patient)) if by_patient else undefined,
            "merged": total["merged"],
            "split": total["split"],
            "lesion_dice": total["dice"] / total["detected"] if total["detected"] else undefined,
        }
        for low, high in pairwise(SIZE_BINS_MM):
            inside = (self.lesions[:, 1] >= low) & (self.lesions[:, 1] < high)
            name = (
                f"sensitivity_{low:g}mm_up" if np.isinf(high) else f"sensitivity_{low:g}-{high:g}mm"
            )
            found = self.lesions[inside, 2] > self.thresholds[position]
            scores[name] = float(found.mean()) if inside.any() else undefined
        return scores

    def lesions_per_case(self) -> list[int]:
        """Count the lesions of each of the N cases."""
        return [int((self.lesions[:, 0] == index).sum()) for index in self.cases]

    def rows(self, threshold: float) -> dict[int, dict[str, float]]:
        """Return `lesions` and `COUNTS` at the nearest of the thresholds, by the case's index."""
        position = self.nearest(threshold)
        return {
            int(index): {"lesions": count, **dict(zip(COUNTS, counts, strict=True))}
            for index, count, counts in zip(
                self.cases, self.lesions_per_case(), self.counts[:, position].tolist(), strict=True
            )
        }


class LesionMetrics(CaseMetrics):
    """Counts detected lesions and false positives, at every threshold.

    A batch with `on_scan_grid` is scored on the grid of the cases' own files, where all of their
    lesions are; a lesion that the network did not see, because a crop cut it off, is missed. Any
    other batch is scored on the network's grid.

    Args:
        geometry: Halo and stride of the network. The probabilities have full resolution; those of a
            network of stride s are constant in boxes of s³ voxels, and are counted as one each on
            the network's grid.
        spacing_mm: Edge of a voxel of the network's grid in mm.
        thresholds: Probabilities at which lesions are counted, rising.
        threshold: The operating point: `compute` and `rows` report the scores at the nearest of the
            thresholds.
    """

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
        index = batch["index"]
        for item, place in enumerate(index.tolist()):
            case = self._match(probability[item].float(), batch, item)
            record = [[place, len(case.lesions)], case.counts.ravel(), case.lesions.ravel()]
            # Every device has float32, which is exact for these counts.
            self.records.append(
                torch.tensor(np.concatenate(record), dtype=torch.float32, device=index.device)
            )

    def _match(
        self, probability: Float[Tensor, "1 x y z"], batch: Mapping[str, Any], item: int
    ) -> CaseLesions:
        """Compare the prediction of one case of a batch with its lesions."""
        if "on_scan_grid" in batch:
            on_scan_grid: OnScanGrid = batch["on_scan_grid"][item]
            found, truth, edges_mm = on_scan_grid(probability.cpu().numpy())
            spacing_mm = float(np.cbrt(np.prod(edges_mm)))  # of a cube of the voxel's volume
            return match(found[0], truth[0], 1, spacing_mm, self.thresholds)
        stride = self.stride
        coarse = probability[0, ::stride, ::stride, ::stride].cpu().numpy()
        truth = batch["mask"][item, 0].cpu().numpy()
        return match(coarse, truth, stride, self.spacing_mm, self.thresholds)

    def report(self) -> LesionReport:
        """Return the lesions of the cases of all ranks at every threshold."""
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
        """Return all scores at the threshold, and `threshold`.

        A score that is not defined, because there is no lesion or no detection, is left out:
        Lightning's checkpoints and sweeps cannot rank NaN.
        """
        threshold = float(self.threshold)
        scores = {**self.report().scores(threshold), "threshold": threshold}
        return {name: value for name, value in scores.items() if not np.isnan(value)}

    def rows(self) -> dict[int, dict[str, float]]:
        """Return `lesions` and `COUNTS` of every case, by its index in the data set."""
        return self.report().rows(float(self.threshold))
