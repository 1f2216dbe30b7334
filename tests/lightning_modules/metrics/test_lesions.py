"""Lesion-wise scores: by hand, by a naive implementation, by MONAI."""

from collections import deque
from itertools import product

import numpy as np
import pytest
import torch
from monai.metrics.froc import compute_fp_tp_probs_nd

from lightning_modules.inference import repeated
from lightning_modules.metrics import LesionMetrics, LesionReport
from lightning_modules.metrics.lesions import COUNTS, THRESHOLDS, match
from lightning_modules.networks.dnet import GEOMETRY
from lightning_modules.networks.geometry import Geometry

FULL = Geometry(halo=0, stride=1)
HALF = THRESHOLDS[len(THRESHOLDS) // 2]


def volume(
    *boxes: tuple[slice | int, ...], shape: tuple[int, int, int] = (12, 12, 12)
) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for box in boxes:
        mask[box] = True
    return mask


def counted(prediction: np.ndarray, truth: np.ndarray, stride: int = 1) -> dict[str, float]:
    case = match(prediction.astype(np.float32), truth, stride, thresholds=[0.5])
    return dict(zip(COUNTS, case.counts[0].tolist(), strict=True))


s = slice
TOYS = {
    # name: prediction, truth, detected, false positives, one-to-one, merged, split
    "one prediction over two lesions": (
        volume((s(1, 9), 4, 4)), volume((s(1, 4), 4, 4), (s(6, 9), 4, 4)), (2, 0, 1, 2, 0)),
    "two predictions in one lesion": (
        volume((s(1, 3), 4, 4), (s(6, 8), 4, 4)), volume((s(1, 9), 4, 4)), (1, 0, 1, 0, 1)),
    "lesions that touch at a corner are one": (
        volume((4, 4, 4)), volume((s(3, 5), s(3, 5), s(3, 5)), (s(5, 7), s(5, 7), s(5, 7))),
        (1, 0, 1, 0, 0)),
    "adjacent, but not touching": (
        volume((s(4, 6), 4, 4)), volume((s(1, 4), 4, 4)), (0, 1, 0, 0, 0)),
    "a tiny lesion missed and a voxel of nothing": (
        volume((1, 1, 1), (6, 6, 6)), volume((6, 6, 6), (9, s(8, 10), 9)), (1, 1, 1, 0, 0)),
    "one voxel hit by a huge ball": (
        volume((s(1, 8), s(1, 8), s(1, 8))), volume((4, 4, 4)), (1, 0, 1, 0, 0)),
    "a bridge from one lesion towards another": (
        volume((s(1, 6), 4, 4)), volume((s(1, 4), 4, 4), (s(7, 9), 4, 4)), (1, 0, 1, 0, 0)),
    "no lesion and no prediction": (volume(), volume(), (0, 0, 0, 0, 0)),
    "no lesion": (volume((1, 1, 1), (5, 5, 5)), volume(), (0, 2, 0, 0, 0)),
    "no prediction": (volume(), volume((1, 1, 1), (5, 5, 5)), (0, 0, 0, 0, 0)),
    "a chain that only a maximum matching solves": (
        # left component touches lesions 1 and 2, right component lesion 2 alone
        volume((s(2, 6), 4, 4), (s(7, 8), 4, 4)), volume((s(1, 3), 4, 4), (s(5, 9), 4, 4)),
        (2, 0, 2, 2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", TOYS)
def test_hand_counted(name: str):
    prediction, truth, expected = TOYS[name]
    counts = counted(prediction, truth)
    assert tuple(counts[key] for key in COUNTS[:5]) == expected


def test_lesion_dice_by_hand():
    # Lesion 3 voxels, two components of 2 and 4 voxels that touch it: 2 * 2 / (3 + 6).
    truth = volume((s(4, 7), 4, 4))
    prediction = volume((s(3, 5), 4, 4), (s(6, 10), 4, 4))
    assert counted(prediction, truth)["dice"] == pytest.approx(2 * 2 / (3 + 6))


def flood_fill(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """26-connected components by flood fill."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    found = []
    while left:
        queue, component = deque([left.pop()]), set()
        while queue:
            voxel = queue.popleft()
            component.add(voxel)
            for step in product((-1, 0, 1), repeat=3):
                near = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if near in left:
                    left.remove(near)
                    queue.append(near)
        found.append(component)
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_agrees_with_flood_fill_at_full_resolution(seed: int, stride: int):
    rng = np.random.default_rng(seed)
    shape = (9, 11, 10)
    truth = rng.random(shape) < 0.04
    coarse = rng.random([-(-side // stride) for side in shape]).astype(np.float32)
    case = match(coarse, truth, stride, thresholds=THRESHOLDS[20:40:5])
    full = coarse.repeat(stride, 0).repeat(stride, 1).repeat(stride, 2)[:9, :11, :10]
    lesions = flood_fill(truth)
    assert len(lesions) == len(case.lesions)
    for number, threshold in enumerate(THRESHOLDS[20:40:5]):
        predicted = flood_fill(full > np.float32(threshold))
        touching = [[p for p in predicted if p & lesion] for lesion in lesions]
        dice = [
            2 * sum(len(p & lesion) for p in near) / (len(lesion) + sum(map(len, near)))
            for lesion, near in zip(lesions, touching, strict=True)
            if near
        ]
        counts = dict(zip(COUNTS, case.counts[number].tolist(), strict=True))
        assert counts["detected"] == sum(map(bool, touching))
        assert counts["false_positives"] == sum(
            not any(p & lesion for lesion in lesions) for p in predicted
        )
        assert counts["split"] == sum(len(near) > 1 for near in touching)
        assert counts["merged"] == sum(
            any(sum(bool(p & other) for other in lesions) > 1 for p in near) for near in touching
        )
        assert counts["dice"] == pytest.approx(sum(dice))


def test_scores_of_lesions_agree_with_monai():
    rng = np.random.default_rng(0)
    truth = volume((s(1, 3), 2, 2), (s(6, 9), s(6, 9), 5), (10, 10, 10))
    probability = rng.random(truth.shape).astype(np.float32)
    numbered = np.zeros(truth.shape, int)
    for number, component in enumerate(flood_fill(truth), start=1):
        numbered[tuple(np.array(sorted(component)).T)] = number
    x, y, z = np.indices(truth.shape).reshape(3, -1)
    _, tp, lesions = compute_fp_tp_probs_nd(
        probability.ravel(), np.stack([x, y, z], axis=1), numbered
    )
    ours = match(probability, truth).lesions[:, 1]
    assert lesions == len(ours) == 3
    np.testing.assert_allclose(sorted(ours), sorted(np.asarray(tp)))


def test_a_lesion_is_detected_exactly_below_its_score():
    rng = np.random.default_rng(1)
    truth = rng.random((8, 8, 8)) < 0.03
    case = match(rng.random((8, 8, 8)).astype(np.float32), truth)
    for threshold, counts in zip(THRESHOLDS, case.counts, strict=True):
        assert counts[0] == (case.lesions[:, 1] > np.float32(threshold)).sum()


def test_diameters_are_of_balls_of_equal_volume():
    grid = np.indices((40, 40, 40)) - 20
    ball = (grid**2).sum(0) <= 12**2
    case = match(np.zeros(ball.shape, np.float32), ball, spacing_mm=0.5)
    assert case.lesions[0, 0] == pytest.approx(12.0, rel=0.02)  # a radius of 12 voxels of ½ mm


def batch(mask: np.ndarray, index: int) -> dict[str, torch.Tensor]:
    return {"mask": torch.from_numpy(mask)[None, None], "index": torch.tensor([index])}


def report(*cases: tuple[np.ndarray, np.ndarray]) -> LesionReport:
    metric = LesionMetrics(FULL)
    for index, (prediction, truth) in enumerate(cases):
        probability = torch.from_numpy(prediction.astype(np.float32))[None, None]
        metric.update(probability, batch(truth, index))
    return metric.report()


def test_patients_without_lesions_count_for_false_positives():
    found = (volume((1, 1, 1)), volume((1, 1, 1)))
    alarm = (volume((1, 1, 1), (5, 5, 5)), volume())
    clear = (volume(), volume())
    scores = report(found, alarm, clear).scores(HALF)
    assert scores["sensitivity"] == 1
    assert scores["false_positives"] == pytest.approx(2 / 3)
    assert scores["sensitivity_by_patient"] == 1


def test_pooled_and_mean_sensitivity_differ():
    many = volume((1, 1, 1), (5, 5, 5), (9, 9, 9))
    scores = report((volume(), many), (volume((1, 1, 1)), volume((1, 1, 1)))).scores(HALF)
    assert scores["sensitivity"] == 0.25
    assert scores["sensitivity_by_patient"] == 0.5


def test_nothing_to_score_is_nan():
    scores = report((volume(), volume())).scores(HALF)
    assert np.isnan(scores["sensitivity"])
    assert np.isnan(scores["lesion_dice"])
    assert scores["false_positives"] == 0


def test_threshold_for_a_target():
    truth = volume((1, 1, 1), (5, 5, 5))
    probability = np.zeros(truth.shape)
    for voxel, value in {(1, 1, 1): 0.9, (5, 5, 5): 0.3, (9, 9, 9): 0.6, (9, 1, 9): 0.2}.items():
        probability[voxel] = value
    found = report((probability, truth))
    strict, loose, all_found = (found.best_threshold(target) for target in (0, 1, 2))
    assert 0.6 <= strict < 0.9
    assert 0.2 <= loose < 0.3
    assert all_found == loose  # no more is found below it
    assert found.scores(strict)["sensitivity"] == 0.5
    assert found.scores(loose)["false_positives"] == 1
    assert report((np.ones(truth.shape), volume())).best_threshold(0) == pytest.approx(
        THRESHOLDS[-1]
    )


def test_a_prediction_everywhere_is_not_the_best_operating_point():
    """Below .2 all is one component, which touches both lesions and is no false positive."""
    truth = volume((1, 1, 1), (5, 5, 5))
    probability = np.full(truth.shape, 0.2)
    probability[1, 1, 1] = 0.9
    probability[5, 5, 5] = 0.8
    probability[9, 9, 9] = 0.5
    found = report((probability, truth))
    flooded = found.scores(0.1)
    assert (flooded["sensitivity"], flooded["false_positives"]) == (1, 0)
    assert flooded["sensitivity_one_to_one"] == 0.5
    assert 0.5 <= found.best_threshold(0) < 0.8


def test_the_threshold_does_not_pass_through_false_positives_to_get_below_them():
    """Below .2 all is one component and no false positive; from .2 to .6 there are 27."""
    truth = volume((1, 1, 1))
    probability = np.full(truth.shape, 0.2)
    probability[3::3, 3::3, 3::3] = 0.6
    probability[1, 1, 1] = 0.3  # below the noise of .6
    found = report((probability, truth))
    assert found.scores(0.1)["sensitivity_one_to_one"] == 1
    assert found.scores(0.1)["false_positives"] == 0
    assert found.scores(0.4)["false_positives"] == 27
    assert found.best_threshold(1) > 0.6


def test_sizes_are_scored_apart():
    small, large = (1, 1, 1), (s(5, 11), s(5, 11), s(5, 11))  # diameters of 1.2 and 7.4 voxels
    scores = report((volume(large), volume(small, large))).scores(HALF)
    assert scores["sensitivity_0-5mm"] == 0
    assert scores["sensitivity_5-10mm"] == 1
    assert np.isnan(scores["sensitivity_10mm_up"])


def test_a_case_seen_twice_counts_once_and_order_does_not_matter():
    rng = np.random.default_rng(0)
    probabilities = torch.from_numpy(rng.random((3, 1, 1, 8, 8, 8), np.float32))
    masks = rng.random((3, 8, 8, 8)) < 0.02
    one, other = LesionMetrics(FULL), LesionMetrics(FULL)
    for index in (0, 1, 2):
        one.update(probabilities[index], batch(masks[index], index))
    for index in (2, 0, 0, 1, 2):  # what two ranks see whose last batches are filled up
        other.update(probabilities[index], batch(masks[index], index))
    for a, b in zip(one.report(), other.report(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.compute() == other.compute()
    assert one.rows() == other.rows()
    assert list(other.rows()) == [0, 1, 2]


def test_rows_name_what_was_counted():
    found = (volume((1, 1, 1), (9, 9, 9)), volume((1, 1, 1), (5, 5, 5)))
    rows = report(found, (volume(), volume())).rows(HALF)
    assert rows[0] == {
        "lesions": 2, "detected": 1, "false_positives": 1, "one_to_one": 1,
        "merged": 0, "split": 0, "dice": 1,
    }  # fmt: skip
    assert set(rows[1].values()) == {0}


@pytest.mark.parametrize("shape", [(16, 12, 8), (13, 9, 14)])
def test_repeated_probabilities_count_as_the_coarse_ones(shape: tuple[int, int, int]):
    """The metric gets probabilities at full resolution, and counts on the network's grid."""
    rng = np.random.default_rng(0)
    truth = rng.random(shape) < 0.01
    coarse = rng.random([-(-side // 4) for side in shape]).astype(np.float32)
    metric = LesionMetrics(GEOMETRY, spacing_mm=1.5)
    full = repeated(torch.from_numpy(coarse)[None, None], 4, shape)
    metric.update(full, batch(truth, 3))
    found, expected = metric.report(), match(coarse, truth, stride=4, spacing_mm=1.5)
    voxelwise = match(full[0, 0].numpy(), truth, stride=1, spacing_mm=1.5)
    assert found.cases.tolist() == [3]
    assert len(expected.lesions) > 3
    assert np.unique(expected.counts[:, COUNTS.index("detected")]).size > 3
    np.testing.assert_array_equal(found.counts[0], expected.counts.astype(np.float32))
    np.testing.assert_array_equal(found.lesions[:, 1:], expected.lesions.astype(np.float32))
    np.testing.assert_allclose(voxelwise.counts, expected.counts, rtol=1e-12)
    np.testing.assert_array_equal(voxelwise.lesions, expected.lesions)


def test_scores_and_rows_are_those_at_the_threshold():
    truth = volume((1, 1, 1), (5, 5, 5))
    probability = torch.zeros(1, 1, *truth.shape)
    for voxel, value in {(1, 1, 1): 0.9, (5, 5, 5): 0.3, (9, 9, 9): 0.6}.items():
        probability[(0, 0, *voxel)] = value
    metric = LesionMetrics(FULL, threshold=0.8)
    metric.update(probability, batch(truth, 7))
    for threshold, detected, false_positives in ((0.8, 1, 0), (0.5, 1, 1), (0.2, 2, 1)):
        metric.threshold.fill_(threshold)
        scores, row = metric.compute(), metric.rows()[7]
        assert scores["threshold"] == pytest.approx(threshold)
        assert scores["sensitivity"] == detected / 2
        assert scores["false_positives"] == false_positives
        assert (row["lesions"], row["detected"]) == (2, detected)
        assert row["false_positives"] == false_positives


def test_scores_that_are_not_defined_are_left_out():
    metric = LesionMetrics(FULL)
    metric.update(torch.zeros(1, 1, 12, 12, 12), batch(volume(), 0))
    defined = {"false_positives": 0, "merged": 0, "split": 0, "threshold": 0.5}
    assert metric.compute() == defined
