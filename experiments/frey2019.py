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

TITLES = {
    "dice": "Dice",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "hd95_mm": "HD95 max (mm)",
    "hd95_pooled_mm": "HD95 pooled (mm)",
}
COLOURS = {"ET": "#2a9d6f", "TC": "#457b9d", "WT": "#1b6f79"}  # as in figure 4
ERROR_SMOOTHING_MM = 4.0

Rows = dict[str, dict[str, float]]  # of each case, by name: `<score>_<region>`


class Pair(NamedTuple):
    """A case and the label map predicted for it."""

    case: Case
    written: Path


def pairs_of(predictions: BraTSMasks, cases: Sequence[Case]) -> list[Pair]:
    """The prediction of every case.

    Raises:
        InputError: A case without prediction, or without mask.
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
    """Both label maps of a pair, as masks."""
    labels = predictions.canonical_labels(read_volume(pair.written)[0], pair.case)
    return compared(labels, pair.written, pair.case, data_set)


def score(
    pairs: Sequence[Pair],
    predictions: BraTSMasks,
    data_set: DataSet,
    convention: str,
    least_mm3: Mapping[str, float],
) -> Rows:
    """All scores of all cases.

    Args:
        pairs: Cases and predictions.
        predictions: Where the predictions come from.
        data_set: Where the cases come from.
        convention: Name of the rules for empty masks.
        least_mm3: Regions below it are taken out of the prediction first.
    """
    import torch
    from lightning_modules.operating_point import without_small
    from rich.progress import track

    from lightning_modules.metrics import EvaluationMetrics

    metrics = EvaluationMetrics(data_set.regions, convention)
    for number, pair in enumerate(track(pairs, "scoring")):
        both = compare(pair, predictions, data_set)
        voxel_mm3 = float(np.prod(both.spacing_mm))
        found = without_small(both.prediction, data_set.regions, least_mm3, voxel_mm3)
        found, truth = (torch.from_numpy(masks)[None] for masks in (found, both.truth))
        metrics.update(found, truth, both.spacing_mm, torch.tensor([number]))
    return {pairs[number].case.name: row for number, row in metrics.rows().items()}


def table_1(rows: Rows, regions: Sequence[str]) -> list[dict[str, str]]:
    """Mean, standard deviation and median of every score and region, innermost region first.

    Below them how many cases had no such region: with one of a hundred cases more or less, mean
    Dice moves by .01 and mean HD95 by 3.7 mm.
    """
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


def empties(rows: Rows, regions: Sequence[str]) -> list[dict[str, str]]:
    """In how many cases truth and prediction lack a region."""
    table = []
    for region in reversed(regions):
        counts = [(row[f"voxels_{region}"], row[f"true_voxels_{region}"]) for row in rows.values()]
        table.append(
            {
                "region": region,
                "cases": str(len(counts)),
                "no truth": str(sum(true == 0 for _, true in counts)),
                "no prediction": str(sum(found == 0 for found, _ in counts)),
                "neither": str(sum(found == 0 and true == 0 for found, true in counts)),
            }
        )
    return table


def raincloud(rows: Rows, regions: Sequence[str], path: Path) -> None:
    """Figure 4: the Dice of every case, box and distribution, by region."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    draw = np.random.default_rng(0)
    shown = list(reversed(regions))
    for place, region in enumerate(shown):
        values = np.array([row[f"dice_{region}"] for row in rows.values()])
        values = values[~np.isnan(values)]
        colour = COLOURS.get(region, "#6c757d")
        if len(np.unique(values)) > 1:  # a density of one value is none
            violin = ax.violinplot(
                [values], [place + 0.12], widths=0.7, side="high", showextrema=False
            )
            for body in violin["bodies"]:  # pyright: ignore[reportGeneralTypeIssues]
                body.set(facecolor=colour, alpha=0.6)
                # The smoothing reaches beyond what a Dice can be.
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


def example(pairs: Sequence[Pair], rows: Rows, regions: Sequence[str]) -> Pair:
    """The case whose mean Dice is the median one."""
    means = {
        pair.case.name: float(
            np.nan_to_num([rows[pair.case.name][f"dice_{region}"] for region in regions]).mean()
        )
        for pair in pairs
    }
    ranked = sorted(pairs, key=lambda pair: means[pair.case.name])
    return ranked[len(ranked) // 2]


def example_figure(pair: Pair, predictions: BraTSMasks, data_set: DataSet, path: Path) -> None:
    """Figure 3: a scan, the truth and the prediction over it, in three planes."""
    from lightning_modules.pictures import draw_case

    both = compare(pair, predictions, data_set)
    scan, _ = read_volume(list(pair.case.images.values())[-1])
    rows = {
        name: dict(zip(data_set.regions, masks, strict=True))
        for name, masks in {"truth": both.truth, "prediction": both.prediction}.items()
    }
    draw_case(scan, rows, pair.case.name).savefig(path, dpi=100)


def error_figure(
    pairs: Sequence[Pair], predictions: BraTSMasks, data_set: DataSet, path: Path
) -> list[str]:
    """Figure 5: 1 - Dice of the outermost region at each place of the brain, on the template.

    At a voxel of MNI space, the Dice over cases: 2 Σ both / (Σ truth + Σ prediction), each sum
    smoothed by a Gaussian, where there is any tumour.

    Returns:
        The cases that could not be brought there, which the figure leaves out. Without any tumour
        left there is no figure.
    """
    import nibabel as nib
    from matplotlib.figure import Figure
    from nilearn.plotting import plot_stat_map
    from rich.progress import track
    from scipy.ndimage import gaussian_filter

    from datamodules.similarity import register, template

    reference = template(2)
    hit, total = (np.zeros(reference.voxels.shape, np.float32) for _ in range(2))
    failed = []
    for pair in track(pairs, "registering"):
        images = pair.case.images
        scan, affine = read_volume(images.get("t1", next(iter(images.values()))))
        registration = register(scan, affine)
        if registration.failed:
            failed.append(pair.case.name)
            continue
        both = compare(pair, predictions, data_set)
        found, true = (
            registration.resample(masks[0], affine, reference) > 0.5
            for masks in (both.prediction, both.truth)
        )
        hit += found & true
        total += found.astype(np.float32) + true
    sigma = ERROR_SMOOTHING_MM / 2
    hit, total = gaussian_filter(hit, sigma), gaussian_filter(total, sigma)
    # Where less than a tenth of a voxel of one tumour lies there is nothing to say.
    shown = (total > 0.1) & (reference.voxels > 0)
    if not shown.any():
        return failed
    # 0 is nothing to nilearn: a place without error is drawn as one of nearly none.
    error = np.where(shown, np.maximum(1 - 2 * hit / np.maximum(total, 1e-6), 1e-3), 0)
    figure = Figure(figsize=(10, 4))
    background = nib.Nifti1Image(reference.voxels, reference.affine)
    plot_stat_map(
        nib.Nifti1Image(error.astype(np.float32), reference.affine),
        bg_img=background,
        figure=figure,
        cmap="hot",
        symmetric_cbar=False,
        vmin=0,
        vmax=1,
        threshold=0,
        cut_coords=_most(total * shown, reference.affine),
        title=f"1 - Dice of {data_set.regions[0]}, {len(pairs) - len(failed)} cases",
    )
    figure.savefig(path, dpi=120)
    return failed


def _most(weight: np.ndarray, affine: np.ndarray) -> tuple[float, ...]:
    """Position in mm of the voxel with the largest weight."""
    voxel = np.unravel_index(int(weight.argmax()), weight.shape)
    return tuple((affine @ [*voxel, 1])[:3].tolist())


def report(
    predictions: BraTSMasks,
    data_set: DataSet,
    cases: Sequence[Case],
    output: Path,
    convention: str = "brats2020",
    least_mm3: Mapping[str, float] | None = None,
) -> Path:
    """Write `cases.csv`, the tables and the figures; returns the Markdown file.

    Args:
        predictions: Label maps, of all cases.
        data_set: Where the cases come from.
        cases: With masks; figures 3 and 5 need their scans too.
        output: Folder, made if missing.
        convention: Name of the rules for empty masks.
        least_mm3: Least volumes that the predictions were made without: a second table has the
            scores with them.

    Raises:
        InputError: A prediction that is missing, or files that cannot be used.
    """
    output.mkdir(parents=True, exist_ok=True)
    pairs = pairs_of(predictions, cases)
    rows = score(pairs, predictions, data_set, convention, {})
    regions = data_set.regions
    write_csv(output / "cases.csv", [{"case": name, **row} for name, row in rows.items()])
    table = table_1(rows, regions)
    write_csv(output / "table1.csv", table)
    lines = [f"{len(pairs)} cases, empty masks as in `{convention}`.", "", markdown(table), ""]
    lines += [markdown(empties(rows, regions)), ""]
    if least_mm3:
        with_least = score(pairs, predictions, data_set, convention, least_mm3)
        volumes = json.dumps(dict(least_mm3))
        table = table_1(with_least, regions)
        same = " the same" if with_least == rows else ""
        lines += [f"With least volumes (mm³) of {volumes}:{same}", ""]
        lines += [] if same else [markdown(table), ""]
    raincloud(rows, regions, output / "figure4.png")
    if all(pair.case.images for pair in pairs):
        shown = example(pairs, rows, regions)
        example_figure(shown, predictions, data_set, output / "figure3.png")
        lines += [f"Figure 3 shows {shown.case.name}, the case of median Dice."]
        if failed := error_figure(pairs, predictions, data_set, output / "figure5.png"):
            lines += [f"Not registered, and not in figure 5: {', '.join(failed)}."]
    text = output / "table1.md"
    text.write_text("\n".join(lines) + "\n")
    return text
