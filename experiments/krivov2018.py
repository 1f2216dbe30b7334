"""Krivov & Belyaev 2018, table 1 and figure 2: D-Net against the U-Net, from finished runs.

`python train.py experiment=detection` trains both networks and writes the report at the end;
`python -m experiments.krivov2018 runs/detection` writes it again. Every run is tested on the test
cases of its own split, or with `--cases` on those of a folder, at the threshold in its checkpoint,
or with `--target-fp` at a threshold that is chosen anew on its validation cases.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.experimental.callback import Callback  # noqa: TID251  (the hook of a sweep's end)

from errors import InputError
from experiments.command import AT_END, command
from experiments.run import RunFolder, finished_runs
from experiments.tables import markdown, write_csv
from files import write_text

if TYPE_CHECKING:
    from datamodules.patches import Volumes
    from experiments.statistics import Ratio
    from lightning_modules.metrics import LesionReport
    from lightning_modules.segmentation import SegmentationModule

FALSE_POSITIVES = "FP a patient"
RATIOS = {  # column of the table -> what is counted
    "sensitivity": "detected",
    FALSE_POSITIVES: "false_positives",
    "one-to-one sensitivity": "one_to_one",
}
NAMES = {"unet": "U-Net", "dnet": "D-Net"}
COLOURS = {"unet": "#457b9d", "dnet": "#e63946"}
# Table 1 and section 3 of the paper: 404 T1c scans of a Gamma-Knife centre, a Tesla M40.
PAPER = (
    {
        "network": "U-Net, paper (other data)",
        "sensitivity": "0.771",
        "FP a patient": "0.62",
        "seconds a volume": "4",
    },
    {
        "network": "D-Net, paper (other data)",
        "sensitivity": "0.872",
        "FP a patient": "1.11",
        "seconds a volume": "1",
    },
)


@dataclass(frozen=True)
class RetestedRun:
    """A finished run that was loaded from its checkpoint and tested again.

    Attributes:
        model: Option of the group `model`: "unet" or "dnet".
        seed: Seed of the run.
        module: The trained network in evaluation mode, on the GPU if there is one.
        report: Lesions of the test cases at every threshold.
        threshold: Probability above which a voxel is predicted, from the checkpoint or chosen anew.
        fit_s: Duration of the training in seconds.
        parameters: Number of trainable weights.
    """

    model: str
    seed: int
    module: "SegmentationModule"
    report: "LesionReport"
    threshold: float
    fit_s: float
    parameters: int

    def counts(self) -> np.ndarray:
        """`COUNTS` (N, C) of the N test cases at the threshold."""
        return self.report.counts[:, self.report.nearest(self.threshold)]


def retest(
    run: RunFolder, target_fp: float | None = None, cases: Path | None = None
) -> RetestedRun:
    """Load a finished run and score its test cases.

    Args:
        run: Folder of the run.
        target_fp: Number of false positives a patient on the validation cases, for which the
            threshold is chosen anew; None keeps the threshold of the checkpoint.
        cases: Folder of other cases to score.

    Raises:
        InputError: The run was trained on one of these.
    """
    import torch

    from experiments.results import Results
    from lightning_modules.checkpoint import load

    results = Results.read(run)
    module, config = load(run.best)
    module = module.to("cuda" if torch.cuda.is_available() else "cpu")
    threshold = module.threshold
    if target_fp is not None:
        validation = score_lesions(module, volumes_of(run, config, "validation"))
        threshold = validation.best_threshold(target_fp)
    return RetestedRun(
        model=config["choices"]["model"],
        seed=config["seed"],
        module=module,
        report=score_lesions(module, volumes_of(run, config, cases or "test")),
        threshold=threshold,
        fit_s=results.fit_s,
        parameters=results.cost.parameters,
    )


def score_lesions(module: "SegmentationModule", volumes: "Volumes") -> "LesionReport":
    """Predict volumes and compare them with the lesions on each scan's grid, at every threshold."""
    import torch
    from torch.utils.data import DataLoader

    from datamodules.patches import collate_volumes

    metrics = module.metrics["test"]
    metrics.reset()
    with torch.inference_mode():
        for batch in DataLoader(volumes, collate_fn=collate_volumes):
            metrics.update(module(batch["image"].to(module.device)), batch)
    return metrics.report()


def volumes_of(run: RunFolder, config: Mapping[str, Any], source: str | Path) -> "Volumes":
    """Open whole volumes with a mask, as a run sees them.

    Args:
        run: Folder of the run.
        config: Configuration of the run, from its checkpoint.
        source: A part of the run's split, "train", "validation" or "test"; or a folder of other
            cases, which have a cache of their own beside that of the run.

    Raises:
        InputError: The run was trained on a case of the folder, or it has none with a mask.
    """
    from datamodules.nifti import identify
    from datamodules.patches import Volumes
    from lightning_modules.checkpoint import build, check_unseen

    data_set, cache = build(config["data"]["data_set"]), build(config["data"]["cache"])
    if isinstance(source, str):
        names = set(run.split()[source])
        cases = [case for case in data_set.cases() if case.name in names]
    else:
        data_set = data_set.in_folder(source)
        cases = [case for case in data_set.cases() if case.mask is not None]
        if not cases:
            raise InputError(f"{source}: expected cases with a mask, found none")
        check_unseen(run.best, {case.name: identify(case.reference) for case in cases})
        cache.root = cache.root.with_name(f"{cache.root.name}-{source.resolve().name}")
    mirrored = build(config["data"]["sampler"]).mirrored
    return Volumes(cache.build(cases, data_set), data_set, mirrored, scan_grids=True)


def table_1(
    tested: Sequence[RetestedRun],
    seconds: Mapping[str, np.ndarray],
    memory_mib: Mapping[str, float],
) -> list[dict[str, str]]:
    """Make the rows of table 1, one for each network, over the seeds of its runs.

    Args:
        tested: Runs of all networks, tested on the same cases.
        seconds: Durations (V,) on the test volumes, by network.
        memory_mib: Peak memory of a pass over the largest volume, by network.
    """
    rows = []
    for model, name in NAMES.items():
        runs = [run for run in tested if run.model == model]
        if not runs:
            continue
        ratios = ratios_of(runs)
        scores = [run.report.scores(run.threshold) for run in runs]
        by_size = {
            key.removeprefix("sensitivity_"): mean_of(scores, key)
            for key in scores[0]
            if key.endswith(("mm", "mm_up"))
        }
        rows.append(
            {
                "network": name,
                **{
                    column: str(ratio.interval(share=column != FALSE_POSITIVES))
                    for column, ratio in ratios.items()
                },
                "sensitivity of the seeds": " ".join(f"{s['sensitivity']:.3f}" for s in scores),
                "FP of the seeds": " ".join(f"{s['false_positives']:.2f}" for s in scores),
                "merged": f"{np.mean([s['merged'] for s in scores]):.1f}",
                "split": f"{np.mean([s['split'] for s in scores]):.1f}",
                "lesion Dice": mean_of(scores, "lesion_dice"),
                **by_size,
                "seconds a volume": f"{np.median(seconds[model]):.3f}",
                "peak MiB": f"{memory_mib[model]:.0f}",
                "parameters": str(runs[0].parameters),
                "training": f"{np.mean([run.fit_s for run in runs]):.0f} s",
            }
        )
    return rows


def ratios_of(runs: Sequence[RetestedRun]) -> dict[str, "Ratio"]:
    """Collect what is counted in every run and patient, by the column of the table."""
    from experiments.statistics import Ratio
    from lightning_modules.metrics.lesions import COUNTS

    counts = np.stack([run.counts() for run in runs])  # (seeds, patients, COUNTS)
    lesions = np.array(runs[0].report.lesions_per_case(), float)
    totals = {FALSE_POSITIVES: np.ones(len(lesions))}
    return {
        column: Ratio(counts[:, :, COUNTS.index(count)], totals.get(column, lesions))
        for column, count in RATIOS.items()
    }


def difference_row(tested: Sequence[RetestedRun]) -> list[dict[str, str]]:
    """Make the row of D-Net minus U-Net over the seeds that both have; none without two such."""
    by_model = {model: {run.seed: run for run in tested if run.model == model} for model in NAMES}
    seeds = sorted(by_model["dnet"].keys() & by_model["unet"].keys())
    if len(seeds) < 2:
        return []
    dnet, unet = (ratios_of([by_model[m][seed] for seed in seeds]) for m in ("dnet", "unet"))
    row = {"network": f"D-Net minus U-Net, {len(seeds)} pairs"}
    return [row | {column: str(dnet[column].minus(unet[column])) for column in RATIOS}]


def mean_of(scores: Sequence[Mapping[str, float]], key: str) -> str:
    """Average a score over the seeds for which it is defined; a dash if there is none."""
    values = [score[key] for score in scores if not np.isnan(score[key])]
    return f"{np.mean(values):.3f}" if values else "-"


def draw_froc(tested: Sequence[RetestedRun], path: Path) -> None:
    """Draw sensitivity over false positives a patient, with the threshold of every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for model, name in NAMES.items():
        colour = COLOURS[model]
        for repeat, run in enumerate(run for run in tested if run.model == model):
            sensitivity, false_positives = run.report.froc()
            one_to_one, _ = run.report.froc("one_to_one")
            label = name if repeat == 0 else None
            # Below the threshold with most false positives, components grow together: the curve
            # would turn back to the left.
            separate = slice(int(false_positives.argmax()), None)
            line = {"color": colour, "alpha": 0.7}
            ax.plot(false_positives[separate], sensitivity[separate], label=label, **line)
            ax.plot(false_positives[separate], one_to_one[separate], ":", **line)
            tested_at = run.report.nearest(run.threshold)
            ax.plot(false_positives[tested_at], sensitivity[tested_at], "o", color=colour)
    ax.set_xscale("symlog", linthresh=0.25)
    ax.set_xlim(0, 16)
    ax.set_ylim(0, 1)
    ax.set_xlabel("false positives a patient")
    ax.set_ylabel("sensitivity")
    ax.set_title("Test cases (dotted: one to one); dots: thresholds of the validation")
    ax.legend()
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_figure_2(tested: Sequence[RetestedRun], volume: Mapping[str, Any], path: Path) -> None:
    """Draw a slice of a scan, the lesions in it, and what both networks find there (figure 2).

    The upper row has the scan and the probabilities; the lower row has the truth and, below each
    network's probabilities, the segmentation at its threshold, over the scan.

    Args:
        tested: Runs, of which the first of each network is shown.
        volume: An item of `Volumes`.
        path: The picture.
    """
    import torch
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from lightning_modules.pictures import PLANES, black_air, busiest_slice, draw_regions, plane

    scan, grey = black_air(volume["image"][0].numpy())
    truth = volume["mask"][0].numpy()
    axis = PLANES["axial"]
    position = busiest_slice(truth, axis)
    shades = {"cmap": "magma", "vmin": 0, "vmax": 1}
    upper = [("scan", scan, grey)]
    lower = [("truth", truth)]
    for model in ("dnet", "unet"):
        run = next((run for run in tested if run.model == model), None)
        if run is not None:
            with torch.inference_mode():
                estimate = run.module(volume["image"][None].to(run.module.device))[0, 0]
            probability = estimate.cpu().numpy()
            upper.append((f"{NAMES[model]}, probability", probability, shades))
            found = probability > run.threshold
            lower.append((f"{NAMES[model]}, above {run.threshold:.3g}", found))
    figure = Figure(figsize=(3 * len(upper), 7), facecolor="black", layout="constrained")
    axes = figure.subplots(2, len(upper))
    for ax, (title, shown, options) in zip(axes[0], upper, strict=True):
        ax.imshow(plane(shown, axis, position), **options)
        ax.set_title(title, color="white", fontsize=9)
    for ax, (title, mask) in zip(axes[1], lower, strict=True):
        ax.imshow(plane(scan, axis, position), **grey)
        draw_regions(ax, {"lesion": mask}, axis, position)
        ax.set_title(title, color="white", fontsize=9)
    for ax in axes.flat:
        ax.set_axis_off()
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), "magma"), ax=axes, shrink=0.5)
    bar.ax.tick_params(colors="white")
    bar.set_label("probability", color="white")
    figure.suptitle(f"{volume['case']}, axial {position}", color="white", fontsize=11)
    figure.savefig(path, dpi=120)


def write_report(folder: Path, target_fp: float | None = None, cases: Path | None = None) -> Path:
    """Write table 1, the FROC curves and figure 2 of the finished runs in a folder.

    Args:
        folder: Folder of the runs; the report goes into `report` below it.
        target_fp: Number of false positives a patient, see `retest`.
        cases: Folder of cases that all runs are tested on; the report then goes into
            `report-<name of this folder>`. By default, each is tested on those of its split.

    Returns:
        The Markdown file with the table.

    Raises:
        InputError: There is no finished run, or two runs were tested on different cases; or a run
            was trained on one of `cases`.
    """
    runs = finished_runs(folder)

    import torch
    from rich.progress import track

    from experiments.timing import peak_mib, seconds_a_volume
    from lightning_modules.checkpoint import CONFIG_KEY, read
    from lightning_modules.memory import keep_freed

    keep_freed()
    for run in runs:
        if cases is None and run.split()["test"] != runs[0].split()["test"]:
            raise InputError(f"{run.path}: tested on other cases than {runs[0].path}")
    config = read(runs[0].best)[CONFIG_KEY]
    data = volumes_of(runs[0], config, cases or "test")
    volumes = [data[index] for index in range(len(data))]
    images = [volume["image"] for volume in volumes]
    tested = [retest(run, target_fp, cases) for run in track(runs, "testing")]
    modules = {run.model: run.module for run in reversed(tested)}  # of each network's first run
    seconds = seconds_a_volume(modules, images)
    largest = max(images, key=torch.numel)
    memory_mib = {model: peak_mib(module, largest) for model, module in modules.items()}

    output = folder / ("report" if cases is None else f"report-{cases.resolve().name}")
    output.mkdir(exist_ok=True)
    rows = [*table_1(tested, seconds, memory_mib), *difference_row(tested)]
    draw_froc(tested, output / "froc.png")
    most_lesion = max(volumes, key=lambda volume: int(volume["mask"].sum()))
    draw_figure_2(tested, most_lesion, output / "example.png")
    write_csv(output / "table.csv", rows)
    shape = "x".join(map(str, images[0].shape[1:]))
    device = "GPU" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"{len(runs)} runs, {len(images)} test cases with {len(tested[0].report.lesions)} lesions, "
        f"volumes as {shape} voxels of {config['data']['cache']['spacing_mm']:g} mm. In brackets: "
        "95 % intervals for other patients and seeds (`statistics.Ratio`); those of differences "
        "are paired by both. Lesions are those of the masks, on the grid of their files; those "
        "that a network does not see count as missed.",
        "",
        markdown([*rows, *PAPER]),
        "",
    ]
    if len(seconds) == len(NAMES):
        ratio = seconds["unet"] / seconds["dnet"]
        lines.append(
            f"D-Net is {np.median(ratio):.1f} times as fast as the U-Net (median over volumes; "
            f"{ratio.min():.1f} to {ratio.max():.1f}; {device})."
        )
    text = output / "table.md"
    write_text(text, "\n".join(lines) + "\n")
    return text


class WriteReport(Callback):
    """Writes the report when a sweep has ended; a callback of Hydra."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:  # noqa: ANN401  (Hydra's own)
        AT_END.append(partial(self.write, Path(config.hydra.sweep.dir)))

    @staticmethod
    def write(folder: Path) -> None:
        """Write the report of a sweep and print its table.

        Raises:
            InputError: See `write_report`.
        """
        text = write_report(folder)
        print(text.read_text())
        print(f"table and figures: {text.parent}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report that the command line asks for.

    Raises:
        InputError: See `write_report`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.krivov2018", description="Compare D-Net with the U-Net."
    )
    parser.add_argument("folder", type=Path, help="folder of the runs, such as runs/detection")
    parser.add_argument(
        "--target-fp",
        type=float,
        help="choose the thresholds anew, for this number of false positives a patient on the "
        "validation cases; default: the thresholds in the checkpoints",
    )
    parser.add_argument(
        "--cases", type=Path, help="folder of cases with masks that all runs are tested on; "
        "default: the test cases of their splits",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    print(write_report(options.folder, options.target_fp, options.cases).read_text())


if __name__ == "__main__":
    with command():
        main()
