"""Where real scans lie among phantoms: the rank of what is measured on them, for each family.

`python -m experiments.benchmarks.realism SCANS` measures every case of a BraTS folder, and phantoms
of each family, on what networks see: volumes of 2 mm with a mean of 0 and a standard deviation of 1
in the brain. A scan that is one draw among many phantoms has ranks far from 0 and 1.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.benchmarks.transfer import SPACING_MM, phantoms
from experiments.command import command
from experiments.tables import markdown, write_csv
from files import write_text

FAMILIES = ("classic", "creeping", "swelling", "infiltrating")
SEED = 11  # of the phantoms; no network has seen them
PERCENTILES = (5, 25, 75, 95)
WAVELENGTHS_MM = ((24.0, 48.0), (12.0, 24.0), (6.0, 12.0), (4.0, 6.0))
BORDER_MM = 6.0  # how far inside and outside the border of a tumour its slope is looked for
HEALTHY_MM = 6.0  # how far from a tumour the brain counts as healthy
OUTSIDE = 0.025  # a rank nearer to 0 or 1 is one that phantoms hardly have


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print how many measures of each scan lie outside the phantoms of a family."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.realism", description=(__doc__ or "").strip()
    )
    parser.add_argument("scans", type=Path, help="folder of real cases with masks, as of BraTS")
    parser.add_argument("--phantoms", type=int, default=40, help="of a family; default: 40")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/realism"), help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    scans = measure_folder(options.scans)
    measured = {
        family: measure_folder(phantoms(output / family, (family,), options.phantoms, SEED))
        for family in FAMILIES
    }
    rows = [
        {"case": case, **row}
        for case, values in scans.items()
        for row in ranks(values, {family: list(of.values()) for family, of in measured.items()})
    ]
    write_csv(output / "ranks.csv", rows)
    lines = summary(rows)
    write_text(output / "ranks.md", markdown(lines) + "\n")
    print(markdown(lines))


def measure_folder(folder: Path) -> dict[str, dict[str, float]]:
    """Measure all cases with a mask in a folder: case -> measure -> value.

    Raises:
        InputError: There is no case, or a file cannot be used.
    """
    from rich.progress import track

    from datamodules.brats import BraTS
    from datamodules.preprocessing import Preprocessing

    data_set, preprocessing = BraTS(folder), Preprocessing(SPACING_MM, "brain")
    measured = {}
    cases = [case for case in data_set.cases() if case.mask is not None]
    for case in track(cases, f"measuring {folder.name}", disable=not sys.stderr.isatty()):
        volume = preprocessing(case, data_set)
        whole, core, _ = data_set.to_regions(volume.labels)
        values: dict[str, float] = {}
        for modality, image in zip(data_set.modalities, volume.image, strict=True):
            found = measure(image.astype(np.float32), whole, core)
            values |= {f"{modality}: {name}": value for name, value in found.items()}
        measured[case.name] = values
    return measured


def measure(image: np.ndarray, whole: np.ndarray, core: np.ndarray) -> dict[str, float]:
    """Measure one modality; what needs a tumour is NaN without one.

    Args:
        image: (X, Y, Z), standardised, 0 outside the brain.
        whole: Mask of the whole tumour (X, Y, Z).
        core: Mask of its core (X, Y, Z).

    Returns:
        Percentiles of healthy tissue and the steepness in it; how oedema and core differ from its
        median; the slope of the tumour's border, per mm; shares of the variance by wavelength.
    """
    from scipy.ndimage import distance_transform_edt

    brain = image != 0
    inside = np.asarray(distance_transform_edt(whole)) * SPACING_MM
    outside = np.asarray(distance_transform_edt(~whole)) * SPACING_MM
    far = outside > HEALTHY_MM if whole.any() else np.ones_like(brain)
    healthy = image[brain & far]
    middle = float(np.median(healthy))
    values = {
        f"percentile {percentile}": float(np.percentile(healthy, percentile))
        for percentile in PERCENTILES
    }
    steepness = np.sqrt(sum(np.square(axis) for axis in np.gradient(image, SPACING_MM)))
    values["gradient"] = float(np.median(steepness[brain & far]))
    for name, mask in (("oedema", whole & ~core), ("core", core)):
        values[name] = float(np.median(image[mask])) - middle if mask.any() else np.nan
    near = brain & ~core & (inside + outside <= BORDER_MM)  # one of the two is 0
    values["slope of the border"] = np.nan
    if (near & whole).any() and (near & ~whole).any():
        depth_mm = np.where(whole, inside - SPACING_MM / 2, SPACING_MM / 2 - outside)
        values["slope of the border"] = float(np.polyfit(depth_mm[near], image[near], 1)[0])
    return values | spectrum(image)


def spectrum(image: np.ndarray) -> dict[str, float]:
    """Return the share of an image's variance (X, Y, Z) in each band of `WAVELENGTHS_MM`."""
    power = np.square(np.abs(np.fft.fftn(image - image.mean())))
    frequencies = np.meshgrid(
        *(np.fft.fftfreq(side, SPACING_MM) for side in image.shape), indexing="ij"
    )
    radius = np.sqrt(sum(np.square(axis) for axis in frequencies))
    return {
        f"{shortest:g} to {longest:g} mm": float(
            power[(radius > 1 / longest) & (radius <= 1 / shortest)].sum() / power.sum()
        )
        for shortest, longest in WAVELENGTHS_MM
    }


def ranks(
    values: Mapping[str, float], families: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[dict[str, object]]:
    """Make a row for each measure of a scan: its value, and its rank in each family.

    A rank is the share of phantoms with a smaller value, where half of those with the same count.
    """
    rows = []
    for name, value in values.items():
        row: dict[str, object] = {"measure": name, "value": round(value, 4)}
        for family, cases in families.items():
            others = np.array([case[name] for case in cases])
            others = others[~np.isnan(others)]
            if np.isnan(value) or not len(others):
                row[family] = ""
                continue
            below = np.mean(others < value) + np.mean(others == value) / 2
            row[family] = round(float(below), 3)
        rows.append(row)
    return rows


def summary(rows: Sequence[Mapping[str, object]]) -> list[dict[str, str]]:
    """Make a row for each case and family: how many measures lie outside, and which."""
    lines = []
    for case in dict.fromkeys(str(row["case"]) for row in rows):
        for family in FAMILIES:
            own = [row for row in rows if row["case"] == case and row[family] != ""]
            outside = [
                str(row["measure"])
                for row in own
                if not OUTSIDE < float(str(row[family])) < 1 - OUTSIDE
            ]
            lines.append(
                {
                    "case": case,
                    "family": family,
                    "measures": str(len(own)),
                    "outside": str(len(outside)),
                    "which": ", ".join(outside),
                }
            )
    return lines


if __name__ == "__main__":
    with command():
        main()
