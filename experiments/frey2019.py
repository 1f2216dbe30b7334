"""Frey & Nau 2019, table 1 and figures 3 to 5: predicted label maps against the truth.

`python evaluate.py` predicts, or takes a folder of predictions, and ends here. All scores are
taken from the files, on the grid of the truth: what is written is what is scored.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datamodules.brats import BraTSMasks
from datamodules.cases import Case, Compared, DataSet, compared
from datamodules.nifti import read_volume
from errors import InputError
from experiments.tables import markdown, write_csv
from files import write_text
from grids import spacing_mm

TITLES = {
    "dice": "Dice",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "hd95_mm": "HD95 max (mm)",
    "hd95_pooled_mm": "HD95 pooled (mm)",
}
COLOURS = {"ET": "#2a9d6f", "TC": "#457b9d", "WT": "#1b6f79"}  # as in figure 4
ERROR_GRID_MM = 2
ERROR_SMOOTHING_MM = 4.0  # standard deviation
TEMPLATE = "the MNI152 template"
LEAST_TUMOUR = 0.1  # of a case, in a voxel of figure 5: with less there is no error to show

NO_GRADES = (
    "There are no results by grade: the data set names the grade of no case, neither by folders "
    "HGG and LGG nor by a column Grade in a name_mapping*.csv."
)

Rows = dict[str, dict[str, float]]  # case -> `<score>_<region>` -> value


class Pair(NamedTuple):
    """A case and the file of the label map predicted for it."""

    case: Case
    written: Path


def pairs_of(predictions: BraTSMasks, cases: Sequence[Case]) -> list[Pair]:
    """Find the prediction of every case.

    Raises:
        InputError: A case has no prediction.
    """
    written = {case.name: case.mask for case in predictions.cases()}
    pairs = []
    for case in cases:
        path = written.get(case.name)
        if path is None:
            raise InputError(
                f"{predictions.root}: expected a prediction of each of {len(cases)} cases, found "
                f"none of {case.name}"
            )
        pairs.append(Pair(case, path))
    return pairs


def compare(pair: Pair, predictions: BraTSMasks, data_set: DataSet) -> Compared:
    """Read both label maps of a pair as masks of the regions.

    Raises:
        InputError: A file cannot be used, or the two lie on different grids.
    """
    return compared(pair.written, pair.case, predictions, data_set)


def table_1(rows: Rows, regions: Sequence[str]) -> list[dict[str, str]]:
    """Make table 1: mean, standard deviation and median of every score, innermost region first."""
    summaries = {
        "Mean": np.nanmean,
        "Std": lambda values: np.nanstd(values, ddof=1) if len(values) > 1 else np.nan,
        "Median": np.nanmedian,
    }
    table = []
    for name, summary in summaries.items():
        line = {"": name}
        for key, title in TITLES.items():
            for region in reversed(regions):
                values = np.array([row[f"{key}_{region}"] for row in rows.values()])
                defined = values[~np.isnan(values)]
                line[f"{title} {region}"] = f"{summary(defined):.3f}" if len(defined) else "-"
        table.append(line)
    return table


def false_alarms(rows: Rows, regions: Sequence[str]) -> list[dict[str, str]]:
    """Say what the scores of each region rest on, and what is predicted where it is not.

    Scores are over the cases that have a region. In the others, one predicted voxel more or less
    would decide between the best and the worst score.
    """
    table = []
    for region in reversed(regions):
        found = np.array([row[f"voxels_{region}"] for row in rows.values()])
        true = np.array([row[f"true_voxels_{region}"] for row in rows.values()])
        alarms_mm3 = np.array([row[f"false_alarm_mm3_{region}"] for row in rows.values()])
        alarms_mm3 = alarms_mm3[alarms_mm3 > 0]
        table.append(
            {
                "region": region,
                "cases with it": str(int((true > 0).sum())),
                "of these, none predicted": str(int(((true > 0) & (found == 0)).sum())),
                "cases without it": str(int((true == 0).sum())),
                "of these, false alarms": str(len(alarms_mm3)),
                "their volume (mm³)": f"{alarms_mm3.mean():.0f}" if len(alarms_mm3) else "-",
            }
        )
    return table


def borders(rows: Rows, regions: Sequence[str]) -> list[str]:
    """Say where the predicted border of each region lies, in the mean over the cases."""
    lines = []
    for region in reversed(regions):
        values_mm = np.array([row[f"border_mm_{region}"] for row in rows.values()])
        values_mm = values_mm[~np.isnan(values_mm)]
        if len(values_mm):
            mean_mm = values_mm.mean()
            side = "outside" if mean_mm > 0 else "inside"
            lines.append(
                f"The border of {region} lies {abs(mean_mm):.2f} mm {side} the true one, in the "
                f"mean over {len(values_mm)} cases that have it and where it is predicted."
            )
    return lines


def by_grade(rows: Rows, grades: Mapping[str, str], regions: Sequence[str]) -> list[dict[str, str]]:
    """Average Dice by grade: the paper finds that low-grade gliomas without ET are misclassified.

    Args:
        rows: Scores of every case.
        grades: Grade of every case, empty where it is unknown.
        regions: Names of the regions, outermost first.

    Returns:
        A row for each grade: its number of cases; for each region mean Dice, the number of cases
        that have the region, and in how many of the others it is predicted.
    """
    table = []
    for grade in sorted(set(grades.values()), key=lambda grade: (not grade, grade)):
        own = [row for name, row in rows.items() if grades[name] == grade]
        line = {"grade": grade or "unknown", "cases": str(len(own))}
        for region in reversed(regions):
            dice = np.array([row[f"dice_{region}"] for row in own])
            dice = dice[~np.isnan(dice)]
            having = sum(row[f"true_voxels_{region}"] > 0 for row in own)
            alarms = sum(row[f"false_alarm_mm3_{region}"] > 0 for row in own)
            line[f"Dice {region}"] = f"{dice.mean():.3f}" if len(dice) else "-"
            line[f"with {region}"] = str(having)
            line[f"false alarms {region}"] = f"{alarms} of {len(own) - having}"
        table.append(line)
    return table


def draw_figure_4(rows: Rows, regions: Sequence[str], path: Path) -> None:
    """Draw the Dice of every case, its quartiles and its distribution, by region (figure 4)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    draw = np.random.default_rng(0)
    shown = list(reversed(regions))
    for place, region in enumerate(shown):
        values = np.array([row[f"dice_{region}"] for row in rows.values()])
        values = values[~np.isnan(values)]
        colour = COLOURS.get(region, "#6c757d")
        if len(np.unique(values)) > 1:  # one value has no density
            violin = ax.violinplot(
                [values], [place + 0.12], widths=0.7, side="high", showextrema=False
            )
            for body in violin["bodies"]:  # pyright: ignore[reportGeneralTypeIssues]
                body.set(facecolor=colour, alpha=0.6)
                # The smoothing of the density reaches beyond the range of a Dice.
                vertices = body.get_paths()[0].vertices
                vertices[:, 1] = np.clip(vertices[:, 1], 0, 1)
        ax.boxplot(
            [values], positions=[place], widths=0.12, showfliers=False,
            medianprops={"color": "black"},
        )  # fmt: skip
        jitter = draw.uniform(-0.28, -0.12, len(values))
        ax.scatter(place + jitter, values, s=14, color=colour, alpha=0.8, linewidths=0)
    ax.set_xticks(range(len(shown)), shown)
    ax.set_ylim(-0.02, 1.02)
    ax.set_ylabel("Dice")
    ax.set_title(f"Dice of {len(rows)} cases (box: quartiles; whiskers: 1.5 of their range)")
    ax.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def median_case(pairs: Sequence[Pair], rows: Rows, regions: Sequence[str]) -> Pair:
    """Find the case whose mean Dice over the regions that it has is the median one."""

    def mean_dice(pair: Pair) -> float:
        row = rows[pair.case.name]
        scores = np.array([row[f"dice_{region}"] for region in regions])
        return float(np.nan_to_num(scores).sum() / max(1, np.count_nonzero(~np.isnan(scores))))

    return sorted(pairs, key=mean_dice)[len(pairs) // 2]


def draw_figure_3(pair: Pair, predictions: BraTSMasks, data_set: DataSet, path: Path) -> None:
    """Draw the T1 of a case, and truth and prediction over it, in three planes (figure 3).

    A case without T1 is drawn on its first scan. The title names the modality.
    """
    from lightning_modules.pictures import draw_case

    both = compare(pair, predictions, data_set)
    images = pair.case.images
    modality = "t1" if "t1" in images else next(iter(images))
    rows = {
        name: dict(zip(data_set.regions, masks, strict=True))
        for name, masks in {"truth": both.truth, "prediction": both.prediction}.items()
    }
    scan, _ = scan_without_air(images[modality])
    draw_case(scan, rows, f"{pair.case.name}, {modality.upper()}").savefig(path, dpi=100)


def scan_without_air(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a scan (X, Y, Z), RAS, and its affine (4, 4); set all voxels outside the brain to 0.

    Negative intensities are shifted, which registration cannot use. A scan that is not
    skull-stripped stays as it is.
    """
    from datamodules.foreground import find_foreground
    from datamodules.preprocessing import above_background

    scan, affine = read_volume(path)
    try:
        brain = find_foreground(scan, spacing_mm(affine), path)
    except InputError:
        return scan, affine
    return above_background(scan, brain), affine


class ErrorMap:
    """Collects where in the brain a region is missed or falsely predicted, for figure 5.

    Attributes:
        unregistered: Names of the cases that do not fit the template and are left out.
        registered: Number of the other cases.
    """

    def __init__(self) -> None:
        from datamodules.template import template

        self.template = template(ERROR_GRID_MM)
        self.overlap, self.total = (
            np.zeros(self.template.voxels.shape, np.float32) for _ in range(2)
        )
        self.unregistered: list[str] = []
        self.registered = 0

    def add(self, case: Case, both: Compared) -> None:
        """Bring the outermost region of a case to the template, and add it.

        Args:
            case: A case with scans.
            both: Its prediction and its truth.
        """
        from datamodules.template import register

        path = case.images.get("t1", next(iter(case.images.values())))
        scan, affine = scan_without_air(path)
        registration = register(scan, affine)
        if registration.failed:
            self.unregistered.append(case.name)
            return
        self.registered += 1
        found, true = (
            registration.resample(masks[0], affine, self.template) > 0.5
            for masks in (both.prediction, both.truth)
        )
        self.overlap += found & true
        self.total += found.astype(np.float32) + true

    def draw(self, region: str, path: Path) -> None:
        """Draw 1 - Dice at each place of the brain (figure 5), on the template as it is.

        The paper draws on Colin27; the title names the template that is drawn on here.

        The Dice at a voxel is taken over the cases: 2 Σ both / (Σ truth + Σ prediction), where each
        sum is smoothed by a Gaussian. Without any tumour there is no figure.

        Args:
            region: Name of the outermost region.
            path: The picture.
        """
        import nibabel as nib
        from matplotlib.figure import Figure
        from nilearn.plotting import plot_stat_map
        from scipy.ndimage import gaussian_filter

        sigma = ERROR_SMOOTHING_MM / ERROR_GRID_MM
        overlap, total = (gaussian_filter(sums, sigma) for sums in (self.overlap, self.total))
        shown = (total > LEAST_TUMOUR) & (self.template.voxels > 0)
        if not shown.any():
            return
        # nilearn takes 0 for "nothing there", so a place without error gets nearly none.
        error = np.where(shown, np.maximum(1 - 2 * overlap / np.maximum(total, 1e-6), 1e-3), 0)
        affine = self.template.affine
        most_tumour = np.unravel_index(int((total * shown).argmax()), total.shape)
        figure = Figure(figsize=(10, 4))
        plot_stat_map(
            nib.Nifti1Image(error.astype(np.float32), affine),
            bg_img=nib.Nifti1Image(self.template.voxels, affine),
            figure=figure,
            cmap="hot",
            symmetric_cbar=False,
            vmin=0,
            vmax=1,
            threshold=0,
            cut_coords=tuple((affine @ [*most_tumour, 1])[:3].tolist()),
            black_bg=True,
            title=f"1 - Dice of {region}, {self.registered} cases, on {TEMPLATE}",
        )
        figure.savefig(path, dpi=120)


def _basis(cases: int, convention: str) -> str:
    if convention == "nan":
        return f"{cases} cases; the scores of a region are over those that have it."
    return f"{cases} cases; a case without a region is scored as in `{convention}`."


def write_report(
    predictions: BraTSMasks,
    data_set: DataSet,
    cases: Sequence[Case],
    output: Path,
    convention: str = "nan",
    least_mm3: Mapping[str, float] | None = None,
    expected: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Score predictions; write `cases.csv`, `table1.md`, two tables as CSV and the figures.

    The tables are table 1 of the paper and `grades.csv`, which is left out if no grade is known.

    Args:
        predictions: Label maps of all cases.
        data_set: Data set of the cases.
        cases: Cases with masks. Figures 3 and 5 need their scans too, and are left out without.
        output: Folder, made where missing.
        convention: Name of the rules for empty masks.
        least_mm3: Region -> least volume that the predictions were made without. A second table has
            the scores with these volumes.
        expected: Case -> `expected_<region>`, what the networks expect of their own Dice, to stand
            beside the true one.

    Returns:
        The Markdown file.

    Raises:
        InputError: A prediction is missing, or a file cannot be used.
    """
    from rich.progress import track

    from experiments.operating_point import without_small
    from lightning_modules.metrics.regions import case_scores

    regions = data_set.regions
    pairs = pairs_of(predictions, cases)
    errors = ErrorMap() if all(pair.case.images for pair in pairs) else None
    rows: Rows = {}
    filtered_rows: Rows = {}
    for pair in track(pairs, "scoring"):
        both = compare(pair, predictions, data_set)
        row = case_scores(both.prediction, both.truth, regions, both.spacing_mm, convention)
        row |= (expected or {}).get(pair.case.name, {})
        rows[pair.case.name] = filtered_rows[pair.case.name] = row
        voxel_mm3 = float(np.prod(both.spacing_mm))
        filtered = without_small(both.prediction, regions, least_mm3 or {}, voxel_mm3)
        if (filtered != both.prediction).any():
            filtered_rows[pair.case.name] = case_scores(
                filtered, both.truth, regions, both.spacing_mm, convention
            )
        if errors is not None:
            errors.add(pair.case, both)

    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "cases.csv", [{"case": name, **row} for name, row in rows.items()])
    table = table_1(rows, regions)
    write_csv(output / "table1.csv", table)
    lines = [_basis(len(pairs), convention), "", markdown(table), ""]
    lines += [markdown(false_alarms(rows, regions)), ""]
    lines += [*borders(rows, regions), ""]
    grades = {case.name: case.grade for case in cases}
    if any(grades.values()):
        table = by_grade(rows, grades, regions)
        write_csv(output / "grades.csv", table)
        lines += [markdown(table), ""]
    else:
        lines += [NO_GRADES, ""]
    if least_mm3:
        changed = any(filtered_rows[name] is not rows[name] for name in rows)
        same = "" if changed else " the same"
        lines += [f"With least volumes (mm³) of {json.dumps(dict(least_mm3))}:{same}", ""]
        lines += [markdown(table_1(filtered_rows, regions)), ""] if changed else []
    draw_figure_4(rows, regions, output / "figure4.png")
    if errors is not None:
        shown = median_case(pairs, rows, regions)
        draw_figure_3(shown, predictions, data_set, output / "figure3.png")
        lines += [f"Figure 3 shows {shown.case.name}, the case of median Dice."]
        errors.draw(regions[0], output / "figure5.png")
        lines += [f"Figure 5 is drawn on {TEMPLATE} of nilearn, that of the paper on Colin27."]
        if errors.unregistered:
            lines += [f"Not registered, and not in figure 5: {', '.join(errors.unregistered)}."]
    text = output / "table1.md"
    write_text(text, "\n".join(lines) + "\n")
    return text
