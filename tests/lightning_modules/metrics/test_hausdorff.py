"""HD95: by MONAI on random masks, by naive loops, and what must not change it."""

import numpy as np
import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance

from lightning_modules.metrics.hausdorff import hausdorff95, surface
from tests.conftest import ball


def test_hd95_is_monais_on_random_masks():
    draw = np.random.default_rng(0)
    for number in range(50):
        shape = tuple(draw.integers(6, 24, 3).tolist())
        spacing_mm = tuple(draw.choice([0.5, 1, 1.2, 5], 3).tolist())
        share = draw.uniform(0.02, 0.98, 2)
        masks = [draw.random(shape) < s for s in share]
        if number % 2:  # compact masks, with a few single voxels
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
