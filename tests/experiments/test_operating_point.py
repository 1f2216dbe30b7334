"""Thresholds and least volumes: what chooses them, and what is refused in a single case."""

import logging
from pathlib import Path

import numpy as np
import pytest

from errors import InputError
from experiments.operating_point import (
    THRESHOLDS,
    Candidates,
    OperatingPoint,
    as_good_as_best,
    without_coreless,
)

REGIONS = ("WT", "ET")


def case(seed: int, shape: tuple[int, int, int] = (12, 11, 10)) -> tuple[np.ndarray, np.ndarray]:
    """Make noisy probabilities (2, X, Y, Z), and the truth that they estimate."""
    draw = np.random.default_rng(seed)
    truth = draw.random((2, *shape)) < np.array([0.3, 0.02])[:, None, None, None]
    if seed % 3 == 0:
        truth[1] = False
    probabilities = np.clip(0.35 * truth + draw.normal(0.3, 0.15, truth.shape), 0, 1)
    return probabilities.astype(np.float32), truth


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    return 2 * int((mask & truth).sum()) / int(mask.sum() + truth.sum())


def test_best_point_agrees_with_thresholding_every_case_at_every_candidate():
    cases = [case(seed) for seed in range(7)]  # without ET: seeds 0, 3 and 6
    candidates = Candidates(REGIONS, voxel_mm3=2.0)
    for probabilities, truth in cases:
        candidates.add(probabilities, truth)
    best = candidates.best(with_least_volume=["ET"])
    assert best.least_mm3.keys() == {"ET"}
    for place, region in enumerate(REGIONS):
        having = [(p[place], t[place]) for p, t in cases if t[place].any()]
        scores = {
            threshold: np.mean([dice(p > threshold, truth) for p, truth in having])
            for threshold in THRESHOLDS
        }
        threshold = best.thresholds[region]
        assert candidates.cases_with(region) == len(having)
        assert scores[threshold] == pytest.approx(max(scores.values()))
        without_least = OperatingPoint(best.thresholds)
        assert candidates.mean_dice(without_least)[region] == pytest.approx(scores[threshold])


def test_a_least_volume_takes_away_false_alarms_and_costs_no_dice():
    truth = np.zeros((1, 12, 12, 12), bool)
    truth[0, :6] = True  # 864 mm³
    small = np.zeros((1, 12, 12, 12), np.float32)
    small[0, :3, :3, :2] = 0.9  # 18 mm³ where there is nothing to find
    candidates = Candidates(["ET"], voxel_mm3=1.0)
    candidates.add(np.where(truth, 0.9, 0.1).astype(np.float32), truth)
    candidates.add(small, np.zeros_like(truth))
    best = candidates.best(with_least_volume=["ET"])
    assert best.least_mm3 == {"ET": 30.0}  # the smallest that does
    assert candidates.false_alarm_rate(OperatingPoint(best.thresholds))["ET"] == 1
    assert candidates.false_alarm_rate(best)["ET"] == 0
    assert candidates.mean_dice(best)["ET"] == 1


def test_cases_without_a_region_choose_no_threshold_of_it():
    """One voxel above .9 in a case without ET would move its threshold there by convention."""
    with_it, truth = case(1)
    candidates = Candidates(REGIONS, voxel_mm3=1.0)
    candidates.add(with_it, truth)
    expected = candidates.best().thresholds
    without_it, other = case(3)
    without_it[1, 0, 0, 0] = 0.93
    other[0] = False  # nor WT
    candidates.add(without_it, other)
    assert candidates.best().thresholds == expected


def test_of_equal_thresholds_the_one_nearest_a_half_is_best():
    truth = np.zeros((1, 4, 4, 4), bool)
    truth[0, :2] = True
    candidates = Candidates(["WT"], 1.0)
    candidates.add(np.where(truth, 0.9, 0.1).astype(np.float32), truth)
    assert candidates.best().thresholds == {"WT": 0.5}


@pytest.mark.parametrize(
    ("others", "as_good"),
    [
        # Losses to the best of .02, -.01 and .02: .01 in the mean, and its standard error is .01.
        ((0.80, 0.83, 0.80), [0, 1]),
        # Of .02, .01 and .03: .02, and .0058. All cases prefer the other.
        ((0.80, 0.81, 0.79), [1]),
    ],
)
def test_a_threshold_is_as_good_as_the_best_within_a_standard_error_of_its_loss(
    others: tuple[float, ...], as_good: list[int]
):
    best = (0.82, 0.82, 0.82)
    dice = np.array([(*pair, 0.1) for pair in zip(others, best, strict=True)])
    assert as_good_as_best(dice).tolist() == as_good
    unknown = np.full((1, 3), np.nan)
    assert as_good_as_best(np.concatenate([unknown, dice])).tolist() == as_good
    assert as_good_as_best(dice[:1]).tolist() == [1]  # a single case has no standard error
    assert as_good_as_best(unknown).tolist() == [0, 1, 2]


def test_a_threshold_that_floods_the_brain_is_refused(caplog: pytest.LogCaptureFixture):
    probabilities = np.full((1, 10, 10, 10), 0.42, np.float32)
    probabilities[0, :3] = 0.9  # 30 % of the brain
    point = OperatingPoint({"WT": 0.4})
    with caplog.at_level(logging.WARNING):
        masks = point.masks(probabilities, ["WT"], 1000, 1.0, "case_7")
    assert masks.sum() == 300
    assert caplog.messages == ["case_7: threshold 0.4 of WT refused: it marks 100 % of the brain"]
    assert not point.masks(probabilities + 0.1, ["WT"], 100, 1.0, "case_7").any()


def test_small_regions_are_false_alarms():
    probabilities = np.zeros((2, 8, 8, 8), np.float32)
    probabilities[:, 2:4, 2:4, 2:4] = 0.9
    for least, left in ((8.0, 8), (8.1, 0)):
        point = OperatingPoint({"WT": 0.5, "ET": 0.5}, {"ET": least})
        masks = point.masks(probabilities, REGIONS, 500, 1.0, "case")
        assert masks.sum((1, 2, 3)).tolist() == [8, left]


def test_oedema_without_core_is_left_out_but_for_the_largest_where_there_is_no_core():
    regions = ("WT", "TC", "ET")
    found = np.zeros((3, 12, 12, 12), bool)
    found[0, :3, :3, :3] = found[0, 3, 3, 3] = True  # a corner is shared: one component
    found[1, 3, 3, 3] = True
    found[0, 6:10, 6:10, 6:10] = True  # larger, but without core
    found[0, 0, 11, 0] = found[1, 0, 11, 0] = True  # a second tumour
    found[1, 11, 0, 0] = True  # core without oedema is nothing of this rule's
    kept = without_coreless(found, regions, ["WT"])
    assert kept[0].sum() == 27 + 1 + 1
    assert not kept[0, 6:10, 6:10, 6:10].any()
    np.testing.assert_array_equal(kept[1:], found[1:])
    np.testing.assert_array_equal(without_coreless(found, regions, []), found)

    found[1] = False
    kept = without_coreless(found, regions, ["WT"])
    assert kept[0].sum() == kept[0, 6:10, 6:10, 6:10].sum() == 64
    assert not without_coreless(np.zeros_like(found), regions, ["WT"]).any()

    probabilities = np.where(found, 0.9, 0.1).astype(np.float32)
    for cored, voxels in (((), 93), (("WT",), 64)):
        point = OperatingPoint(dict.fromkeys(regions, 0.5), with_core=cored)
        assert point.masks(probabilities, regions, 1728, 1.0, "case")[0].sum() == voxels


def test_a_condition_on_a_core_needs_networks_that_segment_it(tmp_path: Path):
    OperatingPoint({"WT": 0.5, "ET": 0.5}, with_core=("WT",)).write(tmp_path / "point.json", {})
    with pytest.raises(InputError, match=r"with WT and TC, found none with TC$"):
        OperatingPoint.from_option(str(tmp_path / "point.json"), REGIONS, 0.5, {})


def test_written_and_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    point = OperatingPoint({"WT": 0.55, "ET": 0.4}, {"ET": 30.0}, ("WT",))
    path = tmp_path / "thresholds.json"
    point.write(path, {"checkpoint": ["a.ckpt"], "flips": True})
    assert OperatingPoint.read(path, {"checkpoint": ["a.ckpt"], "flips": True}) == point
    assert [file.name for file in tmp_path.iterdir()] == ["thresholds.json"]
    assert not caplog.messages
    OperatingPoint.read(path, {"checkpoint": ["a.ckpt"], "flips": False})
    assert caplog.messages == [f"{path}: chosen for flips True, used for False"]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"other\.json: expected thresholds"):
        OperatingPoint.read(tmp_path / "other.json", {})
