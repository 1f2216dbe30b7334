"""Figure 2 of Frey & Nau 2019: where a brain is like a healthy one, and where it is not.

`python -m experiments.inputs FOLDER --output figure_2.png` draws the first case of a BraTS folder
and prints, of every case: the mean local similarity in its tumour, in the rest of the brain, and
where the tumour would lie in the other hemisphere; how straight the head lies.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.cases import Case, DataSet
from datamodules.nifti import read_volume
from errors import InputError
from experiments.tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Likeness:
    """A case beside the template, on the grid of its files, RAS.

    Attributes:
        name: Of the case.
        t1: (X, Y, Z), 0 outside the brain.
        healthy: (X, Y, Z), the template as it lies in the case.
        r: (X, Y, Z), local similarity; NaN where there is none.
        regions: Region -> mask (X, Y, Z), outermost first.
        opposite: (X, Y, Z) bool, the outermost region across the middle of the brain's box, which
            is where mirrored patches are cut, without what is tumour there too.
        opposite_registered: The same across the template's middle plane.
        overlap: Dice of the brain and the template's.
        tilt_degrees: Angle between those two planes.
        offset_mm: How far apart the two bring a voxel of the brain, on average.
    """

    name: str
    t1: np.ndarray
    healthy: np.ndarray
    r: np.ndarray
    regions: dict[str, np.ndarray]
    opposite: np.ndarray
    opposite_registered: np.ndarray
    overlap: float
    tilt_degrees: float
    offset_mm: float

    @property
    def row(self) -> dict[str, str]:
        tumour = next(iter(self.regions.values()))
        return {
            "case": self.name,
            "r in the tumour": self.mean_r(tumour),
            "rest of the brain": self.mean_r(~tumour),
            "mirrored place": self.mean_r(self.opposite),
            "by the template's plane": self.mean_r(self.opposite_registered),
            "overlap": f"{self.overlap:.3f}",
            "tilt (degrees)": f"{self.tilt_degrees:.1f}",
            "mirrored voxels off by (mm)": f"{self.offset_mm:.1f}",
        }

    def mean_r(self, where: np.ndarray) -> str:
        values = self.r[where & ~np.isnan(self.r)]
        return f"{values.mean():.3f}" if values.size else "-"


def likeness(case: Case, data_set: DataSet, radius_mm: float) -> Likeness:
    """Register a case and compare it with the template.

    Raises:
        InputError: No T1, no mask, files of two grids, or a brain that does not fit the template.
    """
    from scipy.ndimage import affine_transform

    from datamodules.similarity import similarity
    from datamodules.template import register

    if case.mask is None or "t1" not in case.images:
        raise InputError(f"{case.name}: expected t1 and a mask, found {', '.join(case.images)}")
    t1, affine = read_volume(case.images["t1"])
    mask, _ = read_volume(case.mask)
    if mask.shape != t1.shape:
        raise InputError(f"{case.mask}: expected {t1.shape} voxels as in t1, found {mask.shape}")
    regions = data_set.to_regions(data_set.canonical_labels(mask, case))
    registration = register(t1, affine)
    if registration.failed:
        raise InputError(
            f"{case.name}: expected a brain that fits the template, found a Dice of "
            f"{registration.overlap:.2f}"
        )

    brain = np.argwhere(t1 != 0)
    by_box = np.diag([-1.0, 1, 1, 1])  # voxel to the one opposite
    by_box[0, 3] = brain[:, 0].min() + brain[:, 0].max()
    by_template = registration.mirrored_voxels(affine)
    apart_mm = np.c_[brain, np.ones(len(brain))] @ (affine @ (by_template - by_box)).T
    normal = registration.to_template[0, :3]  # of the template's plane, in mm of the case

    def mirrored(to_opposite: np.ndarray) -> np.ndarray:
        across = affine_transform(regions[0].astype(np.float32), to_opposite, order=1) > 0.5
        return across & ~regions[0]

    return Likeness(
        name=case.name,
        t1=t1,
        healthy=registration.template_on(t1.shape, affine),
        r=similarity(t1, affine, registration, radius_mm),
        regions=dict(zip(data_set.regions, regions, strict=True)),
        opposite=mirrored(by_box),
        opposite_registered=mirrored(by_template),
        overlap=registration.overlap,
        tilt_degrees=float(np.degrees(np.arccos(abs(normal[0]) / np.linalg.norm(normal)))),
        offset_mm=float(np.linalg.norm(apart_mm[:, :3], axis=1).mean()),
    )


def draw(shown: Likeness, radius_mm: float) -> "Figure":
    """T1, template, similarity and segmentation in three planes, at the slices with most tumour."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from lightning_modules.pictures import PLANES, REGION_COLOURS, busiest_slice, plane

    box = tuple(
        slice(max(0, int(where.min()) - 3), int(where.max()) + 4)
        for where in np.nonzero(shown.t1 != 0)
    )
    t1, healthy, r = (volume[box] for volume in (shown.t1, shown.healthy, shown.r))
    regions = {region: mask[box] for region, mask in shown.regions.items()}
    tumour = next(iter(regions.values()))
    scales = {id(image): float(np.percentile(image[image > 0], 99.5)) for image in (t1, healthy)}
    figure = Figure(figsize=(12, 9), facecolor="black", layout="constrained")
    axes = figure.subplots(len(PLANES), 4)
    similar = {"cmap": "RdBu_r", "norm": Normalize(-1, 1)}
    for line, (name, axis) in zip(axes, PLANES.items(), strict=True):
        position = busiest_slice(tumour, axis)
        outline = plane(tumour, axis, position)
        titles = ("T1", "template", f"similarity, {radius_mm:g} mm", "segmentation")
        for ax, title in zip(line, titles, strict=True):
            ax.set_title(f"{title}, {name}", color="white", fontsize=9)
            ax.set_axis_off()
        for ax, image in zip(line[[0, 1, 3]], (t1, healthy, t1), strict=True):
            shades = {"cmap": "gray", "vmin": 0, "vmax": scales[id(image)]}
            ax.imshow(plane(image, axis, position), **shades)
        line[2].imshow(plane(r, axis, position), **similar)
        if outline.any():
            line[2].contour(outline, levels=[0.5], colors=["lime"], linewidths=1)
        for mask, colour in zip(regions.values(), REGION_COLOURS, strict=False):
            area = plane(mask, axis, position)
            if area.any():
                line[3].contourf(area, levels=[0.5, 1.5], colors=[colour], alpha=0.5)
    bar = figure.colorbar(ScalarMappable(**similar), ax=axes, shrink=0.5)
    bar.ax.tick_params(colors="white")
    bar.set_label("Pearson's r", color="white")
    figure.suptitle(shown.name, color="white")
    figure.legend(
        handles=[
            Patch(color=colour, label=region)
            for region, colour in zip(regions, REGION_COLOURS, strict=False)
        ],
        loc="outside lower right",
        ncols=len(regions),
        frameon=False,
        labelcolor="white",
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.inputs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of one case, or of cases, with masks")
    parser.add_argument("--output", type=Path, default=Path("figure_2.png"))
    parser.add_argument("--cases", type=int, default=1, help="the first N; default: %(default)s")
    parser.add_argument(
        "--radius-mm", type=float, default=7.0, help="of the ball; default: %(default)s"
    )
    given = parser.parse_args()
    try:
        report(given.folder, given.output, given.cases, given.radius_mm)
    except InputError as error:
        logging.error(str(error))
        raise SystemExit(1) from None


def report(folder: Path, output: Path, cases: int, radius_mm: float) -> None:
    """Draw the first case and print a row of each.

    Raises:
        InputError: A folder or a case that cannot be used.
    """
    from datamodules.brats import BraTS

    data_set = BraTS(folder)
    rows = []
    for case in data_set.cases()[:cases]:
        found = likeness(case, data_set, radius_mm)
        if not rows:
            draw(found, radius_mm).savefig(output, dpi=100)
        rows.append(found.row)
    print(markdown(rows))
    print(f"figure: {output}")


if __name__ == "__main__":
    main()
