"""Krivov & Belyaev 2018, table 1 and figure 2: D-Net against the U-Net, from finished runs.

`python train.py experiment=detection` trains them and ends here; `python -m experiments.detection
runs/detection` does it again. Every run is tested on the cases of its own `split.json`, at the
threshold that its checkpoint carries, or at one chosen anew on its validation cases for another
target (`--target-fp`).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from hydra.experimental.callback import Callback  # noqa: TID251  (the hook of a sweep's end)

from errors import InputError
from experiments.tables import markdown, write_csv

if TYPE_CHECKING:
    import torch

    from lightning_modules.metrics import LesionReport

NAMES = {"unet": "U-Net", "dnet": "D-Net"}
# Table 1 and section 3 of the paper: 404 T1c scans of a Gamma-Knife centre, a Tesla M40.
PAPER = (
    {"network": "U-Net, paper (other data)", "sensitivity": 0.771, "fp": 0.62, "seconds": 4},
    {"network": "D-Net, paper (other data)", "sensitivity": 0.872, "fp": 1.11, "seconds": 1},
)
DRAWS = 2000


class Tested(NamedTuple):
    """A run, tested again.

    Attributes:
        model: Choice of the group `model`.
        seed: Of the run.
        report: Lesions of the test cases, by index.
        threshold: Of the checkpoint, or chosen anew.
        fit_s: Duration of the training.
        parameters: Of the network.
        module: On the CPU or the GPU, in evaluation mode.
        spacing_mm: Edge of a voxel.
    """

    model: str
    seed: int
    report: "LesionReport"
    threshold: float
    fit_s: float
    parameters: int
    module: Any
    spacing_mm: float


class Interval(NamedTuple):
    """A score with the 95 % interval of a bootstrap over patients."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(hits: np.ndarray, of: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Interval of the ratio of two sums over patients, both drawn together with replacement.

    Patients are drawn, not lesions: the lesions of a patient are not independent, and an interval
    over lesions would be nearly half as wide.

    Args:
        hits: (S, N), of each seed and patient.
        of: (N,), the denominator of each patient.
    """
    patients = np.random.default_rng(seed).integers(hits.shape[1], size=(draws, hits.shape[1]))
    numerator = hits.mean(0)
    value = numerator.sum() / of.sum()
    drawn = numerator[patients].sum(1) / np.maximum(of[patients].sum(1), 1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))


def retest(run: Path, target_fp: float | None = None) -> Tested:
    """Load a finished run and score its test cases.

    Args:
        run: Folder of the run.
        target_fp: Choose the threshold anew, for so many false positives a patient on the
            validation cases.
    """
    import torch
    from lightning_modules.results import Results

    from lightning_modules.checkpoint import load

    results = Results.read(run)
    module, config = load(run / results.checkpoint)
    module = module.to("cuda" if torch.cuda.is_available() else "cpu")
    threshold = float(module.threshold)  # pyright: ignore[reportArgumentType]
    if target_fp is not None:
        threshold = score(module, volumes_of(run, config, "validation")).choose(target_fp)
    return Tested(
        model=config["choices"]["model"],
        seed=config["seed"],
        report=score(module, volumes_of(run, config, "test")),
        threshold=threshold,
        fit_s=results.fit_s,
        parameters=results.cost.parameters,
        module=module,
        spacing_mm=config["data"]["cache"]["spacing_mm"],
    )


def score(module: Any, volumes: Iterable[dict[str, Any]]) -> "LesionReport":  # noqa: ANN401
    """Lesions of volumes, by a `DetectionModule`."""
    import torch

    metrics = module.metrics["test"]
    metrics.reset()
    with torch.inference_mode():
        for volume in volumes:
            image = volume["image"][None].to(module.device)
            index = torch.tensor([volume["index"]])
            metrics.update(module.logits(image).sigmoid(), volume["mask"][None], index)
    return metrics.compute()


def volumes_of(run: Path, config: dict[str, Any], part: str) -> Any:  # noqa: ANN401  (a data set)
    """The "test" or "validation" cases of a run, from its cache."""
    from datamodules.patches import Volumes
    from lightning_modules.checkpoint import build

    data_set, cache = build(config["data"]["data_set"]), build(config["data"]["cache"])
    names = set(json.loads((run / "split.json").read_text())[part])
    cases = [case for case in data_set.cases() if case.name in names]
    mirrored = build(config["data"]["sampler"]).mirrored
    return Volumes(cache.build(cases, data_set), data_set, mirrored)


def seconds_a_volume(
    modules: dict[str, Any], volumes: Sequence["torch.Tensor"], repeats: int = 3
) -> dict[str, np.ndarray]:
    """Durations (V,) of each network on each volume: the fastest of `repeats`, taken in turn."""
    import torch

    durations = {name: np.full(len(volumes), np.inf) for name in modules}
    with torch.inference_mode():
        for _ in range(repeats):
            for number, volume in enumerate(volumes):
                for name, module in modules.items():
                    image = volume[None].to(module.device)
                    synchronise()
                    start = time.perf_counter()
                    module.logits(image)
                    synchronise()
                    taken = time.perf_counter() - start
                    durations[name][number] = min(durations[name][number], taken)
    return durations


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib(module: Any, volume: "torch.Tensor") -> float:  # noqa: ANN401  (any module)
    """Most memory that tensors made in a forward pass take at once."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    image = volume[None].to(module.device)
    if image.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            module.logits(image)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p,
    ):
        module.logits(image)
    assert p.profiler is not None
    assert p.profiler.kineto_results is not None
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    steps = [event.nbytes() for event in events]  # pyright: ignore  (PyTorch's stubs lack it)
    return float(np.max(np.cumsum(steps))) / 2**20


def table(
    tested: Sequence[Tested], durations: dict[str, np.ndarray], memory: dict[str, float]
) -> list[dict[str, str]]:
    """Rows of Table 1: a network each, over its seeds."""
    from lightning_modules.metrics.lesions import COUNTS

    rows = []
    for model, name in NAMES.items():
        runs = [run for run in tested if run.model == model]
        if not runs:
            continue
        # (seeds, patients, counts)
        counts = np.stack([run.report.counts[:, run.report.number(run.threshold)] for run in runs])
        lesions = np.array(runs[0].report.lesions_of())
        everyone = np.ones(len(lesions))
        of = {
            key: bootstrap(counts[:, :, COUNTS.index(key)], size)
            for key, size in (
                ("detected", lesions),
                ("false_positives", everyone),
                ("one_to_one", lesions),
            )
        }
        scores = [run.report.at(run.threshold) for run in runs]
        by_size = {
            key.removeprefix("sensitivity_"): mean_of(scores, key)
            for key in scores[0]
            if key.endswith(("mm", "mm_up"))
        }
        rows.append(
            {
                "network": name,
                "sensitivity": str(of["detected"]),
                "FP a patient": str(of["false_positives"]),
                "one-to-one sensitivity": str(of["one_to_one"]),
                "sensitivity of the seeds": " ".join(f"{s['sensitivity']:.3f}" for s in scores),
                "FP of the seeds": " ".join(f"{s['false_positives']:.2f}" for s in scores),
                "merged": f"{np.mean([s['merged'] for s in scores]):.1f}",
                "split": f"{np.mean([s['split'] for s in scores]):.1f}",
                "lesion Dice": mean_of(scores, "lesion_dice"),
                **by_size,
                "seconds a volume": f"{np.median(durations[model]):.3f}",
                "peak MiB": f"{memory[model]:.0f}",
                "parameters": str(runs[0].parameters),
                "training": f"{np.mean([run.fit_s for run in runs]):.0f} s",
            }
        )
    return rows


def mean_of(scores: Sequence[dict[str, float]], key: str) -> str:
    """Over the seeds in which it is defined; a dash where it is in none."""
    values = [score[key] for score in scores if not np.isnan(score[key])]
    return f"{np.mean(values):.3f}" if values else "-"


def froc_figure(tested: Sequence[Tested], path: Path) -> None:
    """Sensitivity over false positives a patient: every seed, and its operating point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for (model, name), colour in zip(NAMES.items(), ("#457b9d", "#e63946"), strict=True):
        for number, run in enumerate(run for run in tested if run.model == model):
            sensitivity, false_positives = run.report.froc()
            strict, _ = run.report.froc("one_to_one")
            label = name if number == 0 else None
            # Below the threshold of most false positives the components grow together.
            apart = slice(int(false_positives.argmax()), None)
            line = {"color": colour, "alpha": 0.7}
            ax.plot(false_positives[apart], sensitivity[apart], label=label, **line)
            ax.plot(false_positives[apart], strict[apart], ":", **line)
            at = run.report.number(run.threshold)
            ax.plot(false_positives[at], sensitivity[at], "o", color=colour)
    ax.set_xscale("symlog", linthresh=0.25)
    ax.set_xlim(0, 16)
    ax.set_ylim(0, 1)
    ax.set_xlabel("false positives a patient")
    ax.set_ylabel("sensitivity")
    ax.set_title("Test cases (dotted: one to one); dots: thresholds of the validation")
    ax.legend()
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def example_figure(tested: Sequence[Tested], volume: dict[str, Any], path: Path) -> None:
    """Figure 2: the scan, D-Net's and the U-Net's probabilities, the truth, in one slice."""
    import torch
    from matplotlib.figure import Figure

    from lightning_modules.pictures import busiest_slice, plane

    image, truth = volume["image"][0].numpy(), volume["mask"][0].numpy()
    at = busiest_slice(truth, axis=2)
    panels = [("scan", plane(image, 2, at), {"cmap": "gray", "vmin": np.percentile(image, 1)})]
    shown = {"cmap": "magma", "vmin": 0, "vmax": 1}
    for model in ("dnet", "unet"):
        run = next((run for run in tested if run.model == model), None)
        if run is not None:
            with torch.inference_mode():
                probability = run.module(volume["image"][None].to(run.module.device))[0, 0]
            panels.append((NAMES[model], plane(probability.cpu().numpy(), 2, at), shown))
    panels.append(("truth", plane(truth, 2, at), shown))
    figure = Figure(figsize=(3 * len(panels), 3.6), layout="constrained")
    for ax, (title, pixels, options) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        ax.imshow(pixels, **options)
        ax.set_title(title)
        ax.set_axis_off()
    figure.suptitle(f"{volume['case']}, axial {at}")
    figure.savefig(path, dpi=120)


def write_report(folder: Path, target_fp: float | None = None) -> Path:
    """Table, FROC and example from the finished runs below a folder; returns the Markdown file.

    Args:
        folder: Of the runs.
        target_fp: As of `retest`.

    Raises:
        InputError: No finished run, or runs that were tested on different cases.
    """
    runs = sorted(path.parent for path in folder.glob("*/results.json"))
    if not runs:
        raise InputError(f"{folder}: no finished run found; expected */results.json")

    import torch
    from lightning_modules.results import Results
    from rich.progress import track

    from lightning_modules.checkpoint import read
    from lightning_modules.memory import keep_freed

    keep_freed()
    tests = {run: json.loads((run / "split.json").read_text())["test"] for run in runs}
    for run, names in tests.items():
        if names != tests[runs[0]]:
            raise InputError(f"{run}: tested on other cases than {runs[0]}")
    config = read(runs[0] / Results.read(runs[0]).checkpoint)["config"]
    volumes = volumes_of(runs[0], config, "test")
    tested = [retest(run, target_fp) for run in track(runs, "testing")]
    first = {run.model: run for run in reversed(tested)}
    images = [volume["image"] for volume in volumes]
    durations = seconds_a_volume({m: run.module for m, run in first.items()}, images)
    memory = {m: peak_mib(run.module, max(images, key=torch.numel)) for m, run in first.items()}

    output = folder / "report"
    output.mkdir(exist_ok=True)
    rows = table(tested, durations, memory)
    busiest = max(volumes, key=lambda volume: int(volume["mask"].sum()))
    froc_figure(tested, output / "froc.png")
    example_figure(tested, busiest, output / "example.png")
    write_csv(output / "table.csv", rows)
    paper = [
        {
            "network": str(row["network"]),
            "sensitivity": str(row["sensitivity"]),
            "FP a patient": str(row["fp"]),
            "seconds a volume": str(row["seconds"]),
        }
        for row in PAPER
    ]
    lesions, cases = len(tested[0].report.lesions), len(images)
    shape = "x".join(map(str, images[0].shape[1:]))
    device = "GPU" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"{len(runs)} runs, {cases} test cases with {lesions} lesions, volumes as {shape} voxels "
        f"of {tested[0].spacing_mm:g} mm. In brackets: the 95 % interval of a bootstrap over "
        "patients, seeds averaged.",
        "",
        markdown([*rows, *paper]),
        "",
    ]
    if len(durations) == 2:
        ratio = durations["unet"] / durations["dnet"]
        lines.append(
            f"D-Net is {np.median(ratio):.1f} times as fast as the U-Net (median over volumes; "
            f"{ratio.min():.1f} to {ratio.max():.1f}; {device})."
        )
    text = output / "table.md"
    text.write_text("\n".join(lines) + "\n")
    return text


class WriteReport(Callback):
    """Hydra callback: writes the report when the sweep has ended."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:  # noqa: ANN401  (Hydra's own)
        text = write_report(Path(config.hydra.sweep.dir))
        print(text.read_text())
        print(f"table and figures: {text.parent}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.detection", description="D-Net against the U-Net: the report."
    )
    parser.add_argument("folder", type=Path, help="of the runs, such as runs/detection")
    parser.add_argument(
        "--target-fp",
        type=float,
        help="choose thresholds anew on the validation cases, for so many false positives a "
        "patient; default: those in the checkpoints",
    )
    given = parser.parse_args(arguments)
    try:
        print(write_report(given.folder, given.target_fp).read_text())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
