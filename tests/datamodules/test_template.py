"""Registration to the template."""

import numpy as np
import pytest

from datamodules.template import Registration, register, template
from errors import InputError
from tests.datamodules.conftest import SCAN_AFFINE, SCAN_SPACING_MM, TRUTH


@pytest.fixture(scope="module")
def fitted(scan: np.ndarray) -> Registration:
    return register(scan, SCAN_AFFINE)


def test_registration_finds_a_known_transform(scan: np.ndarray, fitted: Registration):
    brain_mm = np.c_[SCAN_SPACING_MM * np.argwhere(scan > 0), np.ones((scan > 0).sum())]
    error_mm = np.linalg.norm((brain_mm @ (fitted.to_template - TRUTH).T)[:, :3], axis=1)
    assert error_mm.mean() < 1.5
    assert fitted.overlap > 0.9
    assert not fitted.failed
    back = fitted.resample(scan, SCAN_AFFINE, template(4))
    inside = template(4).voxels > 0
    assert np.corrcoef(back[inside], template(4).voxels[inside])[0, 1] > 0.85


def test_registration_is_seeded(scan: np.ndarray, fitted: Registration):
    again = register(scan, SCAN_AFFINE)
    np.testing.assert_allclose(again.to_template, fitted.to_template, atol=1e-3)


def test_air_around_the_brain_changes_nothing(scan: np.ndarray, fitted: Registration):
    moved = SCAN_AFFINE.copy()
    moved[:3, 3] = -5 * SCAN_SPACING_MM
    found = register(np.pad(scan, 5), moved).to_template
    np.testing.assert_allclose(found, fitted.to_template, atol=1e-3)


def test_the_registered_plane_maps_left_to_right(fitted: Registration):
    mirrored = fitted.mirrored_voxels(SCAN_AFFINE)
    np.testing.assert_allclose(mirrored @ mirrored, np.eye(4), atol=1e-9)
    to_template = fitted.to_template @ SCAN_AFFINE
    voxel = np.array([10.0, 20, 30, 1])
    here, there = to_template @ voxel, to_template @ mirrored @ voxel
    np.testing.assert_allclose(there, here * [-1, 1, 1, 1], atol=1e-9)


def test_what_is_no_brain_fails():
    cube = np.zeros((20, 20, 20), np.float32)
    cube[2:-2, 2:-2, 9:11] = np.random.default_rng(0).uniform(1, 2, (16, 16, 2))
    assert register(cube, np.eye(4)).failed
    with pytest.raises(InputError, match="t1: expected a brain, found none"):
        register(np.zeros((20, 20, 20), np.float32), np.eye(4))
