"""Slices, their orientation, and where a drawing shows a region."""

from pathlib import Path

import numpy as np
from PIL import Image

from lightning_modules.pictures import black_air, busiest_slice, draw_case, plane


def test_busiest_slice():
    mask = np.zeros((5, 6, 7), bool)
    assert [busiest_slice(mask, axis) for axis in range(3)] == [2, 3, 3]
    mask[1, 2:5, 4] = mask[3, 2, 4] = True
    assert [busiest_slice(mask, axis) for axis in range(3)] == [1, 2, 4]


def test_planes_are_the_right_way_up():
    volume = np.zeros((2, 3, 4))
    volume[0, 0, 3] = 1  # the voxel that is leftmost, rearmost and uppermost
    assert plane(volume, 0, 0)[0, 0] == 1  # sagittal: superior is up, posterior left
    assert plane(volume, 1, 0)[0, 0] == 1  # coronal: superior is up, left on the left
    assert plane(volume, 2, 3)[-1, 0] == 1  # axial: posterior is down, left on the left


def test_air_is_drawn_in_black_also_among_z_scores():
    scan = np.zeros((10, 10, 10))
    scan[2:8, 2:8, 2:8] = np.random.default_rng(0).normal(size=(6, 6, 6))
    shown, shades = black_air(scan)
    assert (shown[scan == 0] == shades["vmin"]).all()
    assert shades["vmin"] < -1
    assert (shown[scan != 0] == scan[scan != 0]).all()
    nothing, shades = black_air(np.zeros((2, 2, 2)))
    assert (nothing == shades["vmin"]).all()


def test_a_drawing_shows_the_regions_where_they_are(tmp_path: Path):
    image = np.ones((20, 20, 20), np.float32)
    mask = np.zeros((20, 20, 20), bool)
    mask[4:16, 4:16, 4:16] = True
    nothing = np.zeros_like(mask)
    pixels = {}
    for name, found in {"found": mask, "missed": nothing}.items():
        rows = {"truth": {"WT": mask}, "prediction": {"WT": found}}
        figure = draw_case(image, rows, title=name)
        assert [ax.get_title() for ax in figure.axes[::3]] == [
            "scan, sagittal 4", "truth, sagittal 4", "prediction, sagittal 4"
        ]  # fmt: skip
        figure.savefig(tmp_path / f"{name}.png", dpi=40)
        pixels[name] = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
    # Only the lowest row, which shows the prediction, may differ.
    height = pixels["found"].shape[0]
    differs = np.abs(pixels["found"] - pixels["missed"]).sum(-1) > 100
    assert differs[int(0.65 * height) : int(0.95 * height)].mean() > 0.1
    assert differs[int(0.1 * height) : int(0.6 * height)].mean() == 0
