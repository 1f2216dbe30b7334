"""The signed distance between borders: of balls by hand, of random masks by naive loops."""

import math

import numpy as np
import pytest

from lightning_modules.metrics.border import border_mm
from tests.conftest import ball
from tests.lightning_modules.metrics.test_hausdorff import naive_surface


@pytest.mark.parametrize("grown_mm", [-4, -2, -1, 0, 1, 2.5, 4])
@pytest.mark.parametrize("spacing_mm", [1, 2])
def test_a_ball_in_a_ball_is_off_by_the_difference_of_the_radii(grown_mm: float, spacing_mm: int):
    shape, centre = (44, 44, 44), (21.6, 21.3, 21.9)
    radius_mm = 15 * spacing_mm
    truth = ball(shape, centre, radius_mm / spacing_mm)
    found = ball(shape, centre, (radius_mm + grown_mm) / spacing_mm)
    assert border_mm(found, truth, [spacing_mm] * 3) == pytest.approx(
        grown_mm, abs=0.2 * spacing_mm
    )


def test_rows_by_hand():
    truth = np.zeros((1, 1, 20), bool)
    truth[..., 5:10] = True
    found = np.zeros_like(truth)
    found[..., 3:10] = True
    # Every voxel of a row is surface, as it has neighbours outside along X and Y. Two of the seven
    # predicted ones lie outside, 6 and 3 mm away; all five true ones are predicted surface.
    assert border_mm(found, truth, (1, 1, 3)) == pytest.approx((9 / 7 - 0) / 2)
    assert border_mm(truth, found, (1, 1, 3)) == pytest.approx((0 - 9 / 7) / 2)


def test_random_masks_by_naive_loops():
    draw = np.random.default_rng(2)
    spacing_mm = np.array([1, 2, 0.5])
    for share in (0.1, 0.5, 0.9):
        masks = [draw.random((6, 5, 7)) < share for _ in range(2)]
        means = []
        for own, other in (masks, masks[::-1]):
            theirs = np.argwhere(naive_surface(other)) * spacing_mm
            signed = []
            for voxel in np.argwhere(naive_surface(own)):
                distance = min(np.linalg.norm(voxel * spacing_mm - point) for point in theirs)
                signed.append(-distance if other[tuple(voxel)] else distance)
            means.append(np.mean(signed))
        expected = (means[0] - means[1]) / 2
        assert border_mm(masks[0], masks[1], tuple(spacing_mm)) == pytest.approx(expected)
        assert border_mm(masks[1], masks[0], tuple(spacing_mm)) == pytest.approx(-expected)


def test_a_missed_island_pulls_the_border_inwards_and_a_shift_does_not_move_it():
    core, island = (ball((40, 40, 40), (x, 20, 20), radius) for x, radius in ((12, 8), (32, 3)))
    assert border_mm(core, core) == 0
    assert border_mm(core, core | island) == -border_mm(core | island, core) < -0.5
    assert abs(border_mm(np.roll(core, 3, 0), core)) < 1e-9


@pytest.mark.parametrize("empty", [(True, False), (False, True), (True, True)])
def test_there_is_no_border_without_a_mask(empty: tuple[bool, bool]):
    masks = [np.full((3, 4, 5), not nothing) for nothing in empty]
    assert math.isnan(border_mm(*masks))
