"""Slices that show where a tumour is, and where a network sees it."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}

# One for each region, outermost first: painted in this order, inner regions stay visible.
REGION_COLOURS = ("#2a9d8f", "#e9c46a", "#e63946", "#457b9d", "#9b5de5")


def busiest_slice(mask: np.ndarray, axis: int) -> int:
    """Position along `axis` with most true voxels of (X, Y, Z); the middle where there are none."""
    areas = mask.sum(axis=tuple(other for other in range(3) if other != axis))
    return int(areas.argmax()) if areas.any() else mask.shape[axis] // 2


def plane(volume: np.ndarray, axis: int, position: int) -> np.ndarray:
    """A slice of (X, Y, Z) RAS as it is displayed: superior or anterior up, right on the right."""
    return np.rot90(volume.take(position, axis))


def draw_regions(
    ax: "Axes", regions: Mapping[str, np.ndarray], axis: int, position: int, opacity: float = 0.35
) -> None:
    """Paint a slice of every region (X, Y, Z), outermost first, with its outline."""
    for mask, colour in zip(regions.values(), REGION_COLOURS, strict=False):
        area = plane(mask, axis, position)
        if area.any():
            ax.contourf(area, levels=[0.5, 1.5], colors=[colour], alpha=opacity)
            ax.contour(area, levels=[0.5], colors=[colour], linewidths=1)


def add_legend(figure: "Figure", regions: Iterable[str]) -> None:
    """Name the colours of regions below a figure with a black background."""
    from matplotlib.patches import Patch

    handles = [
        Patch(color=colour, label=region)
        for region, colour in zip(regions, REGION_COLOURS, strict=False)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        labelcolor="white",
    )


def draw_case(
    image: np.ndarray, rows: Mapping[str, Mapping[str, np.ndarray]], title: str
) -> "Figure":
    """Draw a scan in three planes, bare and under the masks of each row.

    Args:
        image: (X, Y, Z) in RAS order, one modality.
        rows: Masks (X, Y, Z) by region, outer regions first, of "truth", "prediction", ... The
            slices are those with most of the outermost region of the first row that has any.
        title: Name of the case, and its scores.
    """
    from matplotlib.figure import Figure

    outermost = [next(iter(regions.values())) for regions in rows.values()]
    shown = next((mask for mask in outermost if mask.any()), outermost[0])
    positions = [busiest_slice(shown, axis) for axis in PLANES.values()]
    brain = image[image != 0]
    low, high = np.percentile(brain, (1, 99.5)) if brain.size else (0, 1)
    scan = np.where(image == 0, low, image)  # 0 is background: black, not the grey of a z-score 0
    figure = Figure(figsize=(9, 3 * len(rows) + 4), facecolor="black", layout="constrained")
    axes = figure.subplots(len(rows) + 1, len(PLANES))
    for line, (name, regions) in zip(axes, {"scan": {}, **rows}.items(), strict=True):
        for ax, (label, axis), position in zip(line, PLANES.items(), positions, strict=True):
            ax.imshow(plane(scan, axis, position), cmap="gray", vmin=low, vmax=high)
            draw_regions(ax, regions, axis, position)
            ax.set_title(f"{name}, {label} {position}", color="white", fontsize=9)
            ax.set_axis_off()
    figure.suptitle(title, color="white", fontsize=11)
    add_legend(figure, next(iter(rows.values())))
    return figure
