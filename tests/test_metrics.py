"""Dice by hand, by MONAI, case by case, over batches and ranks."""

import pytest
import torch
from monai.metrics.meandice import compute_dice

from lightning_modules.metrics import RegionMetrics

NOTHING_OUTSIDE = torch.zeros(1, 1, dtype=torch.int64)


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
    assert metrics.compute()["dice"].item() == 0.5
    metrics.reset()
    metrics.update(cube(2), cube(2), NOTHING_OUTSIDE, torch.tensor([1]))
    assert list(metrics.rows()) == [1]


def test_what_all_ranks_have_gathered_is_one_tensor():
    """torchmetrics concatenates list states of all ranks; rows must come out the same."""
    metrics = RegionMetrics(["WT"])
    for index in (1, 0):
        metrics.update(cube(2), cube(2 + index), NOTHING_OUTSIDE, torch.tensor([index]))
    apart = metrics.rows()
    metrics.index, metrics.dice = torch.cat(metrics.index), torch.cat(metrics.dice)  # pyright: ignore
    assert metrics.rows() == apart
