"""Figure 2 of Frey & Nau 2019: where a brain is like a healthy one, and where it is not.

`python -m experiments.figure_2 FOLDER --output figure_2.png` draws the first case of a BraTS
folder. For every case it prints the mean local similarity in the tumour, in the rest of the brain,
and where the tumour would lie in the other hemisphere, and how straight the head lies.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.cases import Case, DataSet
from datamodules.nifti import read_volume
from errors import InputError
from experiments.command import command
from experiments.tables import markdown
from grids import bounding_box, spacing_mm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN = 3  # voxels that the figure shows around the brain


@dataclass(frozen=True)
class TemplateComparison:
    """A case beside the healthy template, on the grid of the case's files, in RAS order.

    Attributes:
        case: Name of the case.
        t1: (X, Y, Z), 0 outside the brain.
        template: (X, Y, Z), the template as it lies in the case.
        similarity: (X, Y, Z), local Pearson's r; NaN where it is not defined.
        regions: Region -> mask (X, Y, Z), the outermost region first.
        opposite_by_box: (X, Y, Z) bool, the outermost region mirrored across the middle of the
            brain's bounding box, as mirrored patches are, without the voxels that are tumour too.
        opposite_by_template: The same, mirrored across the middle plane of the template.
        overlap: Dice of the brain and the template's brain.
        tilt_degrees: Angle between these two planes.
        offset_mm: Mean distance between the two mirror images of a voxel of the brain.
    """

    case: str
    t1: np.ndarray
    template: np.ndarray
    similarity: np.ndarray
    regions: dict[str, np.ndarray]
    opposite_by_box: np.ndarray
    opposite_by_template: np.ndarray
    overlap: float
    tilt_degrees: float
    offset_mm: float

    @property
    def tumour(self) -> np.ndarray:
        """The outermost region (X, Y, Z), bool."""
        return next(iter(self.regions.values()))

    @property
    def row(self) -> dict[str, str]:
        """The row of this case in the printed table."""
        return {
            "case": self.case,
            "r in the tumour": self.mean_similarity(self.tumour),
            "rest of the brain": self.mean_similarity(~self.tumour),
            "mirrored place": self.mean_similarity(self.opposite_by_box),
            "by the template's plane": self.mean_similarity(self.opposite_by_template),
            "overlap": f"{self.overlap:.3f}",
            "tilt (degrees)": f"{self.tilt_degrees:.1f}",
            "mirrored voxels off by (mm)": f"{self.offset_mm:.1f}",
        }

    def mean_similarity(self, where: np.ndarray) -> str:
        """Average r over the voxels of a mask where it is defined; a dash if there is none."""
        values = self.similarity[where & ~np.isnan(self.similarity)]
        return f"{values.mean():.3f}" if values.size else "-"


def compare_with_template(case: Case, data_set: DataSet, radius_mm: float) -> TemplateComparison:
    """Register a case to the template and compare both.

    Args:
        case: A case with T1 and mask.
        data_set: Data set of the case.
        radius_mm: Radius of the searchlight.

    Raises:
        InputError: The case has no T1 or no mask, its files lie on two grids, the scan shows more
            than the brain, or the brain does not fit the template.
    """
    from scipy.ndimage import affine_transform

    from datamodules.foreground import find_foreground
    from datamodules.preprocessing import above_background
    from datamodules.similarity import similarity
    from datamodules.template import register

    if case.mask is None or "t1" not in case.images:
        raise InputError(f"{case.name}: expected t1 and a mask, found {', '.join(case.images)}")
    t1, affine = read_volume(case.images["t1"])
    mask, _ = read_volume(case.mask)
    if mask.shape != t1.shape:
        raise InputError(f"{case.mask}: expected {t1.shape} voxels as in t1, found {mask.shape}")
    regions = data_set.to_regions(data_set.canonical_labels(mask, case))
    t1 = above_background(t1, find_foreground(t1, spacing_mm(affine), case.images["t1"]))
    registration = register(t1, affine)
    if registration.failed:
        raise InputError(
            f"{case.name}: expected a brain that fits the template, found a Dice of "
            f"{registration.overlap:.2f}"
        )

    brain = np.argwhere(t1 != 0)
    # Both matrices map a voxel to the opposite voxel.
    by_box = np.diag([-1.0, 1, 1, 1])
    by_box[0, 3] = brain[:, 0].min() + brain[:, 0].max()
    by_template = registration.mirrored_voxels(affine)
    apart_mm = np.c_[brain, np.ones(len(brain))] @ (affine @ (by_template - by_box)).T
    normal = registration.to_template[0, :3]  # of the template's middle plane, in mm of the case

    def opposite(to_opposite: np.ndarray) -> np.ndarray:
        mirrored = affine_transform(regions[0].astype(np.float32), to_opposite, order=1) > 0.5
        return mirrored & ~regions[0]

    return TemplateComparison(
        case=case.name,
        t1=t1,
        template=registration.template_on(t1.shape, affine),
        similarity=similarity(t1, affine, registration, radius_mm),
        regions=dict(zip(data_set.regions, regions, strict=True)),
        opposite_by_box=opposite(by_box),
        opposite_by_template=opposite(by_template),
        overlap=registration.overlap,
        tilt_degrees=float(np.degrees(np.arccos(abs(normal[0]) / np.linalg.norm(normal)))),
        offset_mm=float(np.linalg.norm(apart_mm[:, :3], axis=1).mean()),
    )


def draw(comparison: TemplateComparison, radius_mm: float) -> "Figure":
    """Draw T1, template, similarity and regions in three planes, in the slices with most tumour."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from lightning_modules.pictures import (
        PLANES,
        add_legend,
        black_air,
        busiest_slice,
        draw_regions,
        plane,
    )

    box = tuple(
        slice(max(0, side.start - MARGIN), side.stop + MARGIN)
        for side in bounding_box(comparison.t1 != 0)
    )
    t1, template, similarity, tumour = (
        volume[box]
        for volume in (
            comparison.t1,
            comparison.template,
            comparison.similarity,
            comparison.tumour,
        )
    )
    regions = {region: mask[box] for region, mask in comparison.regions.items()}
    (t1, t1_shades), (template, template_shades) = black_air(t1), black_air(template)
    similarity_shades = {"cmap": "RdBu_r", "norm": Normalize(-1, 1)}
    panels = {
        "T1": (t1, t1_shades),
        "template": (template, template_shades),
        f"similarity, {radius_mm:g} mm": (similarity, similarity_shades),
        "segmentation": (t1, t1_shades),
    }
    figure = Figure(figsize=(12, 9), facecolor="black", layout="constrained")
    axes = figure.subplots(len(PLANES), len(panels))
    for line, (name, axis) in zip(axes, PLANES.items(), strict=True):
        position = busiest_slice(tumour, axis)
        for ax, (title, (volume, shades)) in zip(line, panels.items(), strict=True):
            ax.imshow(plane(volume, axis, position), **shades)
            ax.set_title(f"{title}, {name}", color="white", fontsize=9)
            ax.set_axis_off()
        outline = plane(tumour, axis, position)
        if outline.any():
            line[2].contour(outline, levels=[0.5], colors=["lime"], linewidths=1)
        draw_regions(line[3], regions, axis, position, opacity=0.5)
    bar = figure.colorbar(ScalarMappable(**similarity_shades), ax=axes, shrink=0.5)
    bar.ax.tick_params(colors="white")
    bar.set_label("Pearson's r", color="white")
    figure.suptitle(comparison.case, color="white")
    add_legend(figure, regions)
    return figure


def write_figure(folder: Path, output: Path, cases: int, radius_mm: float) -> None:
    """Draw the first case of a folder, and print a row for each of the first cases.

    Args:
        folder: Folder of one case, or of several, with masks.
        output: The picture.
        cases: Number of cases.
        radius_mm: Radius of the searchlight.

    Raises:
        InputError: The folder or a case cannot be used.
    """
    from datamodules.brats import BraTS

    data_set = BraTS(folder)
    rows = []
    for case in data_set.cases()[:cases]:
        comparison = compare_with_template(case, data_set, radius_mm)
        if not rows:
            draw(comparison, radius_mm).savefig(output, dpi=100)
        rows.append(comparison.row)
    print(markdown(rows))
    print(f"figure: {output}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what the command line asks for.

    Raises:
        InputError: See `write_figure`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.figure_2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, help="folder of one case, or of several, in a BraTS layout with masks"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("figure_2.png"), help="default: %(default)s"
    )
    parser.add_argument(
        "--cases", type=int, default=1, help="number of cases to print; default: %(default)s"
    )
    parser.add_argument(
        "--radius-mm",
        type=float,
        default=7.0,
        help="radius of the searchlight; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    write_figure(options.folder, options.output, options.cases, options.radius_mm)


if __name__ == "__main__":
    with command():
        main()
