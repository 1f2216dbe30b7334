"""Scores of regions: by hand, by MONAI, naively; case by case, over batches and ranks."""

import math

import numpy as np
import pytest
import torch
from monai.metrics.confusion_matrix import compute_confusion_matrix_metric, get_confusion_matrix
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice

from lightning_modules.metrics import EvaluationMetrics, RegionMetrics
from lightning_modules.metrics.regions import SCORES, hausdorff95, region_scores, surface
from tests.conftest import ball

NOTHING_OUTSIDE = torch.zeros(1, 1, dtype=torch.int64)
NAN = math.nan


def cube(*starts: int, side: int = 4) -> torch.Tensor:
    """(1, 1, 12, 12, 12) with a cube at each start on the diagonal."""
    mask = torch.zeros(1, 1, 12, 12, 12, dtype=torch.bool)
    for s in starts:
        mask[..., s : s + side, s : s + side, s : s + side] = True
    return mask


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (cube(), cube(), 1.0),  # both empty: brats2020
        (cube(), cube(2), 0.0),  # missed
        (cube(2), cube(), 0.0),  # false alarm
        (cube(2), cube(2), 1.0),
        (cube(3), cube(2), 2 * 27 / 128),
        (cube(2, 8), cube(2), 2 * 64 / 192),
    ],
)
def test_dice_by_hand(prediction: torch.Tensor, truth: torch.Tensor, expected: float):
    metrics = RegionMetrics(["WT"])
    metrics.update(prediction, truth, NOTHING_OUTSIDE, torch.tensor([0]))
    assert metrics.compute()["dice_WT"].item() == pytest.approx(expected)


def test_voxels_that_the_crop_cut_off_count_as_missed():
    metrics = RegionMetrics(["WT"])
    metrics.update(cube(2), cube(2), torch.tensor([[64]]), torch.tensor([0]))
    assert metrics.compute()["dice"].item() == pytest.approx(2 * 64 / (64 + 64 + 64))


def test_agrees_with_monai():
    torch.manual_seed(0)
    prediction, truth = torch.rand(3, 2, 9, 8, 7) > 0.6, torch.rand(3, 2, 9, 8, 7) > 0.7
    metrics = RegionMetrics(["WT", "ET"])
    metrics.update(prediction, truth, torch.zeros(3, 2, dtype=torch.int64), torch.arange(3))
    expected = compute_dice(prediction.float(), truth.float()).mean(0)
    values = metrics.compute()
    torch.testing.assert_close(torch.stack([values["dice_WT"], values["dice_ET"]]), expected)
    torch.testing.assert_close(values["dice"], expected.mean())


def test_rows_are_in_the_order_of_the_cases_and_a_case_counts_once():
    metrics = RegionMetrics(["WT"])
    for index, prediction in ((2, cube()), (0, cube(2)), (2, cube())):
        metrics.update(prediction, cube(2), NOTHING_OUTSIDE, torch.tensor([index]))
    assert metrics.rows() == {0: {"dice_WT": 1.0}, 2: {"dice_WT": 0.0}}
    assert list(metrics.rows()) == [0, 2]
    assert metrics.compute()["dice"].item() == 0.5
    metrics.reset()
    metrics.update(cube(2), cube(2), NOTHING_OUTSIDE, torch.tensor([1]))
    assert list(metrics.rows()) == [1]


# Five pairs of masks and what they score, from the definitions and from the tools that use them.
SHAPE = (48, 48, 48)
BALL = ball(SHAPE, (24, 24, 24), 10)
FAR = np.zeros(SHAPE, bool)
FAR[2:6, 2:6, 2:6] = True
NOTHING = np.zeros(SHAPE, bool)
PAIRS = {
    "both empty": (NOTHING, NOTHING, (1, 1, 1)),
    "missed": (NOTHING, BALL, (1, 1, 1)),
    "false alarm": (BALL, NOTHING, (1, 1, 1)),
    "shifted, and an island": (np.roll(BALL, 1, 0) | FAR, BALL, (1, 1, 1)),
    "shifted, thick slices": (np.roll(BALL, (2, 1), (0, 2)), BALL, (1, 1, 5)),
}
DIAGONAL = math.sqrt(3) * 48
#                          Dice  sens  spec  HD95 max  pooled
EXPECTED = {
    "both empty": {
        "brats2020": (1, 1, 1, 0, 0),
        "brats2023": (1, 1, 1, 0, 0),
        "nan": (NAN, NAN, 1, NAN, NAN),
    },
    "missed": {
        "brats2020": (0, 0, 1, DIAGONAL, DIAGONAL),
        "brats2023": (0, 0, 1, 374, 374),
        "nan": (0, 0, 1, NAN, NAN),
    },
    "false alarm": {
        "brats2020": (0, 0, 0.962, DIAGONAL, DIAGONAL),
        "brats2023": (0, 0, 0.962, 374, 374),
        "nan": (0, NAN, 0.962, NAN, NAN),
    },
    "shifted, and an island": {"brats2020": (0.917, 0.924, 0.996, 23.88, 1.0)},
    "shifted, thick slices": {"brats2020": (0.834, 0.834, 0.994, 3.16, 3.16)},
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("convention", ["brats2020", "brats2023", "nan"])
def test_five_pairs(pair: str, convention: str):
    prediction, truth, spacing_mm = PAIRS[pair]
    found = region_scores(prediction, truth, spacing_mm, convention)
    # Where no mask is empty there is nothing to agree on.
    expected = EXPECTED[pair].get(convention, EXPECTED[pair]["brats2020"])
    assert list(found) == list(SCORES)
    np.testing.assert_allclose(list(found.values()), expected, atol=6e-3, equal_nan=True)


@pytest.mark.parametrize("pair", ["shifted, and an island", "shifted, thick slices"])
def test_five_pairs_by_monai(pair: str):
    """Without empty masks MONAI defines the same scores, but for the pooled HD95."""
    prediction, truth, spacing_mm = PAIRS[pair]
    found = region_scores(prediction, truth, spacing_mm)
    y_pred, y = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth))
    confusion = get_confusion_matrix(y_pred, y)
    assert found["dice"] == pytest.approx(compute_dice(y_pred, y).item())
    for name in ("sensitivity", "specificity"):
        theirs = compute_confusion_matrix_metric(name, confusion).item()
        assert found[name] == pytest.approx(theirs)
    hd95 = compute_hausdorff_distance(
        y_pred, y, include_background=True, percentile=95, spacing=spacing_mm
    )
    assert found["hd95_mm"] == pytest.approx(hd95.item(), rel=1e-6)


def test_hd95_is_monais_on_random_masks():
    draw = np.random.default_rng(0)
    for number in range(50):
        shape = tuple(draw.integers(6, 24, 3).tolist())
        spacing_mm = tuple(draw.choice([0.5, 1, 1.2, 5], 3).tolist())
        share = draw.uniform(0.02, 0.98, 2)
        masks = [draw.random(shape) < s for s in share]
        if number % 2:  # compact ones
            centres = draw.uniform(0, shape, (2, 3))
            masks = [
                ball(shape, tuple(centre), draw.uniform(2, 8)) | (draw.random(shape) < 0.002)
                for centre in centres
            ]
        if not all(mask.any() for mask in masks):
            continue
        y_pred, y = (torch.from_numpy(mask)[None, None].float() for mask in masks)
        theirs = compute_hausdorff_distance(
            y_pred, y, include_background=True, percentile=95, spacing=spacing_mm
        )
        ours = hausdorff95(*masks, spacing_mm)
        assert ours.maximum_mm == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6), number


def naive_surface(mask: np.ndarray) -> np.ndarray:
    found = np.zeros_like(mask)
    for x, y, z in np.argwhere(mask):
        for step in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)]):
            place = np.array([x, y, z]) + step
            inside = ((place >= 0) & (place < mask.shape)).all()
            if not inside or not mask[tuple(place)]:
                found[x, y, z] = True
    return found


def test_hd95_by_naive_loops():
    draw = np.random.default_rng(1)
    masks = [draw.random((7, 6, 5)) < share for share in (0.7, 0.4)]
    spacing_mm = np.array([1, 2, 0.5])
    points = []
    for mask in masks:
        found = surface(np.pad(mask, 1))[1:-1, 1:-1, 1:-1]
        np.testing.assert_array_equal(found, naive_surface(mask))
        points.append(np.argwhere(naive_surface(mask)) * spacing_mm)
    directed = [
        [min(np.linalg.norm(a - b) for b in theirs) for a in ours]
        for ours, theirs in (points, points[::-1])
    ]
    found = hausdorff95(*masks, tuple(spacing_mm))
    assert found.maximum_mm == pytest.approx(max(np.percentile(d, 95) for d in directed))
    assert found.pooled_mm == pytest.approx(np.percentile(directed[0] + directed[1], 95))


def test_hd95_of_equal_masks_is_zero():
    mask = ball((12, 11, 10), (6, 5, 5), 4)
    assert hausdorff95(mask, mask) == (0, 0)
    mask = np.ones((1, 1, 1), bool)
    assert hausdorff95(mask, mask) == (0, 0)


def test_hd95_is_symmetric_and_does_not_depend_on_the_crop():
    draw = np.random.default_rng(2)
    a, b = (ball((30, 28, 26), (14, 13, 12), radius) for radius in (9, 6.5))
    a |= draw.random(a.shape) < 1e-3
    assert hausdorff95(a, b) == hausdorff95(b, a)
    wide = [np.pad(mask, 5) for mask in (a, b)]
    assert hausdorff95(*wide) == hausdorff95(a, b)
    turned = [mask.transpose(2, 0, 1)[::-1] for mask in (a, b)]
    assert hausdorff95(*turned, (3, 1, 2)) == pytest.approx(hausdorff95(a, b, (1, 2, 3)))


def test_the_penalty_is_the_diagonal_of_the_brats_grid():
    truth = np.zeros((240, 240, 155), bool)
    truth[100, 100, 100] = True
    assert region_scores(~truth & truth, truth)["hd95_mm"] == pytest.approx(373.1287, abs=1e-4)


def test_evaluation_has_a_row_of_all_scores_and_tells_empty_masks():
    truth = np.stack([BALL, NOTHING])
    prediction = np.stack([np.roll(BALL, 1, 0), NOTHING])
    metrics = EvaluationMetrics(["WT", "ET"], "nan")
    masks = (torch.from_numpy(array)[None] for array in (prediction, truth))
    metrics.update(*masks, (1, 1, 1), torch.tensor([4]))
    row = metrics.rows()[4]
    assert row["true_voxels_WT"] == row["voxels_WT"] == BALL.sum()
    assert row["true_voxels_ET"] == row["voxels_ET"] == 0
    assert row["hd95_mm_WT"] == 1
    assert math.isnan(row["dice_ET"])
    assert metrics.compute()["dice_WT"].item() == pytest.approx(row["dice_WT"])
