"""Scores of regions: by hand, by MONAI; case by case, over batches."""

import math

import numpy as np
import pytest
import torch
from monai.metrics.confusion_matrix import compute_confusion_matrix_metric, get_confusion_matrix
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice

from lightning_modules.metrics import RegionMetrics
from lightning_modules.metrics.regions import SCORES, case_scores, region_scores
from tests.conftest import ball

NAN = math.nan


def update(
    metrics: RegionMetrics,
    prediction: torch.Tensor,
    truth: torch.Tensor,
    *indices: int,
    outside: int = 0,
) -> None:
    """Add cases with predicted masks; `outside` true voxels of each region were cut off."""
    batch = {
        "mask": truth,
        "outside": torch.full(truth.shape[:2], outside),
        "index": torch.tensor(indices),
    }
    metrics.update(prediction.float(), batch)


def cube(*starts: int, side: int = 4) -> torch.Tensor:
    """(1, 1, 12, 12, 12) with a cube at each start on the diagonal."""
    mask = torch.zeros(1, 1, 12, 12, 12, dtype=torch.bool)
    for s in starts:
        mask[..., s : s + side, s : s + side, s : s + side] = True
    return mask


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (cube(), cube(2), 0.0),  # missed
        (cube(2), cube(2), 1.0),
        (cube(3), cube(2), 2 * 27 / 128),
        (cube(2, 8), cube(2), 2 * 64 / 192),
    ],
)
def test_dice_by_hand(prediction: torch.Tensor, truth: torch.Tensor, expected: float):
    metrics = RegionMetrics(["WT"])
    update(metrics, prediction, truth, 0)
    assert metrics.compute()["dice_WT"].item() == pytest.approx(expected)


def test_a_region_is_scored_in_the_cases_that_have_it_and_false_alarms_stand_beside():
    metrics = RegionMetrics(["WT"], spacing_mm=2)
    for index, (prediction, truth) in enumerate(
        [(cube(3), cube(2)), (cube(2), cube()), (cube(), cube()), (cube(), cube())]
    ):
        update(metrics, prediction, truth, index)
    scores = {name: float(value) for name, value in metrics.compute().items()}
    assert scores["dice"] == scores["dice_WT"] == pytest.approx(2 * 27 / 128)
    assert scores["without_WT"] == 3
    assert scores["false_alarms_WT"] == pytest.approx(1 / 3)
    assert scores["false_alarm_mm3_WT"] == pytest.approx(64 * 8 / 3)
    rows = metrics.rows()
    assert math.isnan(rows[0]["false_alarm_mm3_WT"])
    assert math.isnan(rows[1]["dice_WT"])
    assert [rows[index]["false_alarm_mm3_WT"] for index in (1, 2, 3)] == [512, 0, 0]


def test_what_no_case_has_is_not_scored():
    metrics = RegionMetrics(["WT", "ET"])
    update(metrics, torch.cat([cube(2), cube()], 1), torch.cat([cube(2), cube()], 1), 0)
    scores = metrics.compute()
    assert "dice_ET" not in scores
    assert float(scores["dice"]) == float(scores["dice_WT"]) == 1


def test_a_network_that_never_predicts_a_region_does_not_gain_by_it():
    """Seven cases with ET, six without: conventions of BraTS would give it 6/13."""
    scores = {}
    for name, found in (("never", cube()), ("always", cube(3))):
        metrics = RegionMetrics(["ET"])
        for index in range(13):
            update(metrics, found, cube(2) if index < 7 else cube(), index)
        scores[name] = float(metrics.compute()["dice"])
    assert scores == {"never": 0, "always": pytest.approx(2 * 27 / 128)}


def test_voxels_that_the_crop_cut_off_count_as_missed():
    metrics = RegionMetrics(["WT"])
    update(metrics, cube(2), cube(2), 0, outside=64)
    assert metrics.compute()["dice"].item() == pytest.approx(2 * 64 / (64 + 64 + 64))


def test_agrees_with_monai():
    torch.manual_seed(0)
    prediction, truth = torch.rand(3, 2, 9, 8, 7) > 0.6, torch.rand(3, 2, 9, 8, 7) > 0.7
    metrics = RegionMetrics(["WT", "ET"])
    update(metrics, prediction, truth, 0, 1, 2)
    expected = compute_dice(prediction.float(), truth.float()).mean(0)
    values = metrics.compute()
    torch.testing.assert_close(torch.stack([values["dice_WT"], values["dice_ET"]]), expected)
    torch.testing.assert_close(values["dice"], expected.mean())


def test_rows_are_in_the_order_of_the_cases_and_a_case_counts_once():
    metrics = RegionMetrics(["WT"])
    for index, prediction in ((2, cube()), (0, cube(2)), (2, cube())):
        update(metrics, prediction, cube(2), index)
    assert {index: row["dice_WT"] for index, row in metrics.rows().items()} == {0: 1.0, 2: 0.0}
    assert list(metrics.rows()) == [0, 2]
    assert metrics.compute()["dice"].item() == 0.5
    metrics.reset()
    update(metrics, cube(2), cube(2), 1)
    assert list(metrics.rows()) == [1]


# Five pairs of masks and their scores, from the definitions and from tools that use them.
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
#                          Dice  sens  spec  HD95 max  pooled  border
EXPECTED = {
    "both empty": {
        "brats2020": (1, 1, 1, 0, 0, NAN),
        "brats2023": (1, 1, 1, 0, 0, NAN),
        "nan": (NAN, NAN, 1, NAN, NAN, NAN),
    },
    "missed": {
        "brats2020": (0, 0, 1, DIAGONAL, DIAGONAL, NAN),
        "brats2023": (0, 0, 1, 374, 374, NAN),
        "nan": (0, 0, 1, NAN, NAN, NAN),
    },
    "false alarm": {
        "brats2020": (0, 0, 0.962, DIAGONAL, DIAGONAL, NAN),
        "brats2023": (0, 0, 0.962, 374, 374, NAN),
        "nan": (NAN, NAN, 0.962, NAN, NAN, NAN),
    },
    "shifted, and an island": {"brats2020": (0.917, 0.924, 0.996, 23.88, 1.0, 0.695)},
    "shifted, thick slices": {"brats2020": (0.834, 0.834, 0.994, 3.16, 3.16, 0)},
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("convention", ["brats2020", "brats2023", "nan"])
def test_five_pairs(pair: str, convention: str):
    prediction, truth, spacing_mm = PAIRS[pair]
    found = region_scores(prediction, truth, spacing_mm, convention)
    # Conventions differ in the scores of empty masks only.
    expected = EXPECTED[pair].get(convention, EXPECTED[pair]["brats2020"])
    assert list(found) == list(SCORES)
    np.testing.assert_allclose(list(found.values()), expected, atol=6e-3, equal_nan=True)


@pytest.mark.parametrize("pair", ["shifted, and an island", "shifted, thick slices"])
def test_five_pairs_by_monai(pair: str):
    """MONAI has the same scores of masks that are not empty, but no pooled HD95."""
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


def test_the_penalty_is_the_diagonal_of_the_brats_grid():
    truth = np.zeros((240, 240, 155), bool)
    truth[100, 100, 100] = True
    assert region_scores(~truth & truth, truth, convention="brats2020")["hd95_mm"] == pytest.approx(
        373.1287, abs=1e-4
    )


def test_the_row_of_a_case_has_all_scores_and_tells_empty_masks():
    truth = np.stack([BALL, NOTHING])
    prediction = np.stack([np.roll(BALL, 1, 0), NOTHING])
    row = case_scores(prediction, truth, ["WT", "ET"], (1, 1, 1), "nan")
    names = [*SCORES, "voxels", "true_voxels", "false_alarm_mm3"]
    assert list(row) == [f"{name}_{region}" for region in ("WT", "ET") for name in names]
    assert row["true_voxels_WT"] == row["voxels_WT"] == BALL.sum()
    assert row["true_voxels_ET"] == row["voxels_ET"] == 0
    assert row["hd95_mm_WT"] == 1
    assert math.isnan(row["dice_ET"])
    scores = region_scores(prediction[0], truth[0], (1, 1, 1), "nan")
    assert {name: row[f"{name}_WT"] for name in SCORES} == scores


def test_regions_are_predicted_above_the_threshold():
    probability = torch.tensor([0.2, 0.4, 0.6, 0.8]).view(1, 1, 4, 1, 1)
    batch = {
        "mask": torch.tensor([False, True, True, True]).view(1, 1, 4, 1, 1),
        "outside": torch.zeros(1, 1, dtype=torch.int64),
        "index": torch.tensor([0]),
    }
    for threshold, predicted in ((0.5, 2), (0.7, 1), (0.3, 3)):
        metrics = RegionMetrics(["WT"], threshold=threshold)
        metrics.update(probability, batch)
        assert metrics.rows()[0]["dice_WT"] == pytest.approx(2 * predicted / (predicted + 3))
