"""The foreground: the brain of every stripped scan, and no head that is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nilearn.datasets import load_mni152_template
from scipy import ndimage

from datamodules.foreground import find_foreground
from errors import InputError
from tests.conftest import ball

FILE = Path("scan.nii.gz")
TISSUE = 300  # median intensity of the template's tissue in these tests
SPACING_MM = np.full(3, 3.0)
CUT = slice(18, 46)  # axial slices of a field of view that cuts through the head


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    """A real brain's T1 at 3 mm, stripped, in 15 mm of air and more."""
    template = np.pad(load_mni152_template(resolution=3).get_fdata(dtype=np.float32), 5)
    inside = ndimage.binary_fill_holes(template > 0.2 * template.max())  # less is interpolation
    return np.where(inside, np.maximum(template, 0.01) * TISSUE / np.median(template[inside]), 0)


def head_of(brain: np.ndarray, bone: float) -> np.ndarray:
    """Put CSF, bone and scalp around a brain; the intensity of bone is a share of the tissue's."""
    depth_mm: Any = ndimage.distance_transform_edt(brain == 0, sampling=SPACING_MM)
    shells = [depth_mm <= 0, depth_mm <= 3, depth_mm <= 9, depth_mm <= 18]
    return np.select(shells, [brain, 0.4 * TISSUE, bone * TISSUE, 1.2 * TISSUE], 0.0)


def noisy(image: np.ndarray, share: float, kind: str = "magnitude") -> np.ndarray:
    """Add noise whose standard deviation is a share of the tissue's intensity."""
    real, imaginary = np.random.default_rng(0).normal(0, share * TISSUE, (2, *image.shape))
    return {
        "gaussian": image + real,
        "magnitude": np.hypot(image + real, imaginary),
        "whole numbers": np.rint(image + real),
        "clipped at 0": np.rint(np.maximum(image + real, 0)),  # half of the air has one value
        "air alone": np.where(image, image, np.abs(real)),
    }[kind].astype(np.float32)


def foreground(image: np.ndarray) -> np.ndarray:
    return find_foreground(image.astype(np.float32), SPACING_MM, FILE)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def all_but_the_background(image: np.ndarray, background: float) -> np.ndarray:
    """The rule for a constant background, by another library function."""
    return np.asarray(ndimage.binary_fill_holes(image != background))


def test_on_a_constant_background_the_brain_is_all_else(brain: np.ndarray):
    """Holes, negative tissue, z-scores, a cut field of view and tight crops change nothing."""
    inside = brain > 0
    dark = brain.copy()
    dark[inside & (np.random.default_rng(0).random(brain.shape) < 0.02)] = 0
    dark[inside & (np.random.default_rng(1).random(brain.shape) < 0.02)] = -20
    low, high = np.argwhere(inside).min(0), np.argwhere(inside).max(0) + 1
    tight = tuple(map(slice, low, high))
    deep = tuple(map(slice, low + 7, high - 7))  # reaches all six faces
    z_scored = np.where(inside, (brain - TISSUE) / 50, 0)
    whole_z_scored = (brain - brain.mean()) / brain.std()
    for image, background in [
        (brain, 0),
        (brain + 100, 100),
        (dark, 0),
        (z_scored, 0),
        (whole_z_scored, whole_z_scored.min()),
        (brain[:, :, CUT], 0),
        (dark[tight], 0),
        (z_scored[deep], 0),
    ]:
        expected = all_but_the_background(image.astype(np.float32), np.float32(background))
        np.testing.assert_array_equal(foreground(image), expected)


@pytest.mark.parametrize("share", [0.01, 0.05])
@pytest.mark.parametrize(
    "kind", ["gaussian", "magnitude", "whole numbers", "clipped at 0", "air alone"]
)
def test_noise_in_the_air_is_no_brain(brain: np.ndarray, kind: str, share: float):
    for image in (brain, brain[:, :, CUT], brain + 40 * (brain > 0)):
        found = foreground(noisy(image, share, kind))
        assert dice(found, image > 0) >= 0.98
    # Without this rule nearly all voxels would be brain.
    assert all_but_the_background(noisy(brain, share), 0).mean() > 0.9


@pytest.mark.parametrize("bone", [0, 0.15, 0.3])
def test_a_head_is_refused(brain: np.ndarray, bone: float):
    head = head_of(brain, bone)
    expected = f"^{FILE}: expected a skull-stripped brain on a constant background, found"
    for air in (0, 0.02):
        with pytest.raises(InputError, match=rf"{expected} \d\.\d litres, where .* at most 2\.2$"):
            foreground(noisy(head, air))
    # A field of view that shows no more than a brain's volume of it.
    with pytest.raises(InputError, match=rf"{expected} bone: \d+\.?\d* mm below the surface .*$"):
        foreground(noisy(head[:, :, 26:42], 0.02))


def test_a_volume_without_air_is_refused(brain: np.ndarray):
    middle = tuple(slice(side // 2 - 10, side // 2 + 10) for side in brain.shape)
    for image in (brain[middle], noisy(np.full((20, 20, 20), TISSUE), 0.05), noisy(brain, 0.3)):
        with pytest.raises(InputError, match=r"background, found no air: the edges .* ± ") as error:
            foreground(image)
        assert "\n" not in str(error.value)


def test_one_value_everywhere_is_no_brain():
    assert not foreground(np.full((5, 6, 7), 3.0)).any()


def test_small_volumes_and_coarse_slices_work():
    image = np.where(ball((20, 24, 16), (11, 10, 8), 6), TISSUE, 0)
    for spacing_mm in ((1, 1, 1), (1, 1, 5), (0.4, 0.4, 0.4)):
        found = find_foreground(noisy(image, 0.02), np.array(spacing_mm), FILE)
        assert dice(found, image > 0) > 0.98
