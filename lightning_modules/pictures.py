"""Pictures of slices, with the masks of true and predicted regions."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

Volume = Shaped[np.ndarray, "x y z"]

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}

# One colour for each region, outermost first: painted in this order, inner regions stay visible.
REGION_COLOURS = ("#2a9d8f", "#e9c46a", "#e63946", "#457b9d", "#9b5de5")


def busiest_slice(mask: Volume, axis: int) -> int:
    """Find the slice across `axis` with most true voxels of a mask.

    Returns:
        Its position along the axis; the middle if the mask is empty.
    """
    areas = mask.sum(axis=tuple(other for other in range(3) if other != axis))
    return int(areas.argmax()) if areas.any() else mask.shape[axis] // 2


def plane(volume: Volume, axis: int, position: int) -> Shaped[np.ndarray, "row column"]:
    """Cut a slice out of a volume in RAS order, turned for display.

    Up is superior, or anterior in axial slices. Right is right, or anterior in sagittal slices.
    """
    return np.rot90(volume.take(position, axis))


def black_air(scan: Volume) -> tuple[Volume, dict[str, Any]]:
    """Prepare a scan for `imshow`, in grey and with black air.

    Args:
        scan: Intensities in any units, exactly 0 in the air. 0 is a grey among z-scores, so the air
            gets the value that is drawn in black.

    Returns:
        The scan to draw; further arguments of `imshow`.
    """
    brain = scan[scan != 0]
    low, high = np.percentile(brain, (1, 99.5)).tolist() if brain.size else (0.0, 1.0)
    return np.where(scan == 0, low, scan), {"cmap": "gray", "vmin": low, "vmax": high}


def draw_regions(
    ax: Axes, regions: Mapping[str, Volume], axis: int, position: int, opacity: float = 0.35
) -> None:
    """Paint and outline the regions, given outermost first, in one slice."""
    for mask, colour in zip(regions.values(), REGION_COLOURS, strict=False):
        area = plane(mask, axis, position)
        if area.any():
            ax.contourf(area, levels=[0.5, 1.5], colors=[colour], alpha=opacity)
            ax.contour(area, levels=[0.5], colors=[colour], linewidths=1)


def add_legend(figure: Figure, regions: Iterable[str]) -> None:
    """Add a legend of the regions' colours below a figure with a black background."""
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


def draw_case(image: Volume, rows: Mapping[str, Mapping[str, Volume]], title: str) -> Figure:
    """Draw a scan in three planes: a row without masks, and one for each set of masks.

    The slices are those with most voxels of the outermost region, in the first row that has any.

    Args:
        image: One modality, in RAS order, 0 in the air.
        rows: Masks by region, outermost first, for "truth", "prediction", ...
        title: Name of the case, or more.
    """
    outermost = [next(iter(regions.values())) for regions in rows.values()]
    shown = next((mask for mask in outermost if mask.any()), outermost[0])
    positions = [busiest_slice(shown, axis) for axis in PLANES.values()]
    scan, shades = black_air(image)
    figure = Figure(figsize=(9, 3 * len(rows) + 4), facecolor="black", layout="constrained")
    axes = figure.subplots(len(rows) + 1, len(PLANES))
    for line, (name, regions) in zip(axes, {"scan": {}, **rows}.items(), strict=True):
        for ax, (label, axis), position in zip(line, PLANES.items(), positions, strict=True):
            ax.imshow(plane(scan, axis, position), **shades)
            draw_regions(ax, regions, axis, position)
            ax.set_title(f"{name}, {label} {position}", color="white", fontsize=9)
            ax.set_axis_off()
    figure.suptitle(title, color="white", fontsize=11)
    add_legend(figure, next(iter(rows.values())))
    return figure
