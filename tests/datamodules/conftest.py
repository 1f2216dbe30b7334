"""Data that several tests of the data modules share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from datamodules.appearance import Part
from datamodules.template import Registration
from tests.conftest import ROOT, write_metastases

# A scan that is the template, turned, scaled and shifted.
SCAN_SPACING_MM = 4
SCAN_AFFINE = np.diag([SCAN_SPACING_MM, SCAN_SPACING_MM, SCAN_SPACING_MM, 1.0])
SCAN_SHAPE = (48, 56, 46)


def turned(degrees: float, scale: float, shift_mm: float) -> np.ndarray:
    """Make a transform from case to template: turned in the axial plane, scaled, shifted."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    to_template = np.eye(4)
    to_template[:3, :3] = scale * turn
    centre_mm = np.array([96, 110, 92])  # the middle of the grid of the case
    to_template[:3, 3] = np.array([0, -18, 8]) + shift_mm - to_template[:3, :3] @ centre_mm
    return to_template


TRUTH = turned(degrees=6, scale=1.1, shift_mm=3)


@pytest.fixture(scope="session")
def scan() -> np.ndarray:
    """The template on the grid of a case that lies in it as `TRUTH` says, in scanner units."""
    return 1000 * Registration(TRUTH, overlap=1).template_on(SCAN_SHAPE, SCAN_AFFINE)


def lesions_at(*voxels: tuple[int, int, int], side: int = 28) -> np.ndarray:
    """Make a cube of labels with lesions of one voxel."""
    labels = np.zeros((side,) * 3, np.uint8)
    for voxel in voxels:
        labels[voxel] = 1
    return labels


@pytest.fixture(scope="session")
def metastases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lesions in the middle, at corners, many, none; and lesions that leave no box without."""
    root = tmp_path_factory.mktemp("metastases")
    rng = np.random.default_rng(3)
    many = (rng.random((28, 28, 28)) < 0.002).astype(np.uint8)
    everywhere = np.zeros((28, 28, 28), np.uint8)
    everywhere[::3, ::3, ::3] = 1
    for name, labels in {
        "middle": lesions_at((14, 14, 14)),
        "corners": lesions_at((0, 0, 0), (27, 27, 27), (0, 27, 13)),
        "many": many,
        "none": lesions_at(),
        "everywhere": everywhere,
    }.items():
        write_metastases(root / name, labels)
    return root


def wide_parts(probability: float) -> dict[str, Part]:
    """Build the parts of conf/augmentation/wide.yaml with one probability, on a grid of 1 mm."""
    preset: Any = OmegaConf.load(ROOT / "conf/augmentation/wide.yaml")
    parts = {}
    for name in preset.transform.transforms.appearance.parts:
        part = preset[name]
        part.probability = probability
        if "spacing_mm" in part:
            part.spacing_mm = 1
        parts[name] = instantiate(part)
    return parts
