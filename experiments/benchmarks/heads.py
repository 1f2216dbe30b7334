"""How much heads differ: size, symmetry and likeness to the template, in any folders of brains.

`python -m experiments.benchmarks.heads PHANTOMS SCANS` prints one row for each BraTS folder, with
phantoms beside real scans. Everything is measured on T1, on the grid of its file, after a fit to
the template by translation, rotation and scaling. Only the local similarity leaves out tumours.
"""

import argparse
from pathlib import Path

import numpy as np

from experiments.command import command
from experiments.tables import markdown

RADIUS_MM = 7.0  # of the local similarity
TUMOUR_MARGIN_MM = 3.0  # around the tumour, where its mass effect and its border are

NAMES = {
    "brain (ml)": "{:.0f}",
    "width (mm)": "{:.0f}",
    "length (mm)": "{:.0f}",
    "height (mm)": "{:.0f}",
    "Dice with the template's brain": "{:.3f}",
    "Dice with its mirror image": "{:.3f}",
    "local r with the template": "{:.3f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.heads", description=(__doc__ or "").strip()
    )
    parser.add_argument("folders", type=Path, nargs="+", help="of cases in the layout of BraTS")
    parser.add_argument("--cases", type=int, default=12, help="of each; default: %(default)s")
    options = parser.parse_args()
    rows = []
    for folder in options.folders:
        values = measure_folder(folder, options.cases)
        row = {"folder": folder.name, "cases": str(len(values))}
        for name, column in zip(NAMES, values.T, strict=True):
            mean, low, high = (
                NAMES[name].format(value)
                for value in (np.nanmean(column), np.nanmin(column), np.nanmax(column))
            )
            row[name] = mean if len(values) == 1 else f"{mean} [{low}, {high}]"
        rows.append(row)
    print(markdown(rows))


def measure_folder(folder: Path, count: int) -> np.ndarray:
    """Measure the first cases of a folder: (cases, `NAMES`).

    Raises:
        InputError: There are no such cases, or a file cannot be used.
    """
    from rich.progress import track

    from datamodules.brats import BraTS

    data_set = BraTS(folder, modalities=["t1"])
    cases = data_set.cases()[:count]
    shown = track(cases, description=f"measuring {folder.name}")
    return np.array([measure_head(case.images["t1"], case.mask) for case in shown])


def measure_head(t1_path: Path, mask_path: Path | None) -> list[float]:
    """Measure one head: what `NAMES` lists; NaN where the brain does not fit the template.

    Raises:
        InputError: A file cannot be used.
    """
    from scipy.ndimage import affine_transform, binary_dilation

    from datamodules.nifti import read_volume
    from datamodules.similarity import similarity
    from datamodules.template import register
    from grids import bounding_box, spacing_mm

    t1, affine = read_volume(t1_path)
    brain = t1 != 0
    spacing = spacing_mm(affine)
    extents_mm = [side.stop - side.start for side in bounding_box(brain)] * spacing
    registration = register(t1, affine)
    size = [brain.sum() * spacing.prod() / 1000, *extents_mm, registration.overlap]
    if registration.failed:
        return [*size, np.nan, np.nan]
    mirrored = affine_transform(
        brain.astype(np.float32), registration.mirrored_voxels(affine), order=1
    )
    symmetry = 2 * np.minimum(brain, mirrored).sum() / (brain.sum() + mirrored.sum())
    healthy = brain
    if mask_path is not None:
        margin = max(1, round(TUMOUR_MARGIN_MM / float(spacing.mean())))
        tumour = binary_dilation(read_volume(mask_path)[0] > 0, iterations=margin)
        healthy = brain & np.logical_not(tumour)
    local_r = similarity(t1, affine, registration, RADIUS_MM)[healthy]
    return [*size, symmetry, float(np.nanmean(local_r))]


if __name__ == "__main__":
    with command():
        main()
