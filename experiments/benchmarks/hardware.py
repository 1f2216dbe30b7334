"""What a machine does with the networks: steps, memory, whole volumes, growth, and their peers.

Both networks of a comparison take turns in one process, so that a slow phase of the machine slows
them alike; of each, the fastest run counts. Memory is the peak of a training step, as predicted
without allocating it and, for what is run, as measured.

The tables and the plot go to a folder: `steps.md`, `memory.md`, `volumes.md`, `levels.md`,
`growth.md`, `growth.png`, and `machine.md`. On a GPU the paper's full networks are trained; on a
CPU the small one is, and the memory of the others is predicted.
"""

import argparse
import math
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.networks.nets.segresnet import SegResNetVAE
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from datamodules.brats import BraTS
from datamodules.cache import Cache
from experiments.benchmarks.detection import brain
from experiments.benchmarks.detection import module as detector
from experiments.command import command
from experiments.cost import Step, predict_step
from experiments.jobs import composed_jobs
from experiments.results import device_name
from experiments.tables import markdown
from experiments.timing import TrainingStep, seconds_a_volume, synchronise
from files import write_text, written_whole
from lightning_modules.inference import ExactTiles, SlidingWindow, WholeVolume
from lightning_modules.losses import AutoencoderLoss, RegionDice
from lightning_modules.memory import keep_freed
from lightning_modules.metrics import RegionMetrics
from lightning_modules.networks.aeunet import AEUNet
from lightning_modules.networks.checkpointing import CHECKPOINTING
from lightning_modules.networks.dnet import GEOMETRY, DNet
from lightning_modules.networks.geometry import Geometry
from lightning_modules.networks.unet import UNet3D
from lightning_modules.segmentation import Batch, SegmentationModule

REGIONS = ("WT", "TC", "ET")
CROP = (160, 192, 128)  # of the whole brain, as the project plans for one GPU of 6 GB
CONF = Path(__file__).parents[2] / "conf"
TABLES = ("steps", "memory", "levels", "volumes", "growth", "devices")  # the last on a GPU alone
RELU = partial(nn.ReLU, inplace=True)
Rows = list[dict[str, str]]


def aeunet(filters: int, patch: int | Sequence[int], checkpointing: str = "none") -> Any:  # noqa: ANN401
    """Make the module of the AE-U-Net as `conf/` does, for patches of some sides."""
    sides = [patch] * 3 if isinstance(patch, int) else list(patch)
    return SegmentationModule(
        AEUNet(
            patch_size=sides,
            filters=filters,
            activation=partial(nn.LeakyReLU, inplace=True),
            checkpointing=checkpointing,
        ),
        AutoencoderLoss(RegionDice(dict.fromkeys(REGIONS, 0.33), REGIONS)),
        partial(torch.optim.Adam, lr=1e-4, fused=True),
        partial(torch.optim.lr_scheduler.ConstantLR),
        SlidingWindow(sides),
        lambda: RegionMetrics(REGIONS),
    )


def unet(checkpointing: str = "none") -> SegmentationModule:
    """Make the module of the U-Net of Krivov & Belyaev 2018."""
    network = UNet3D(norm=nn.BatchNorm3d, activation=RELU, checkpointing=checkpointing)
    return detector(network, WholeVolume(), Geometry(0, 1))


def dnet(checkpointing: str = "none") -> SegmentationModule:
    """Make the module of D-Net."""
    network = DNet(activation=RELU, checkpointing=checkpointing)
    return detector(network, ExactTiles(GEOMETRY), GEOMETRY)


# The paper's training steps: module by checkpointing, shape of the images, channels of the masks.
Case = tuple[Callable[[str], SegmentationModule], tuple[int, ...], int]
PAPER: dict[str, Case] = {
    "AE-U-Net, 32 filters, 160x192x128": (partial(aeunet, 32, CROP), (1, 4, *CROP), 3),
    "AE-U-Net, 32 filters, 80³": (partial(aeunet, 32, 80), (1, 4, 80, 80, 80), 3),
    "AE-U-Net, 8 filters, 80³": (partial(aeunet, 8, 80), (1, 4, 80, 80, 80), 3),
    "U-Net, 2 of 144x160x128": (unet, (2, 1, 144, 160, 128), 1),
    "D-Net, 64 of 68³": (dnet, (64, 1, 68, 68, 68), 1),
}


def training_step(
    make: Callable[[str], SegmentationModule],
    shape: Sequence[int],
    regions: int,
    device: str,
    checkpointing: str = "none",
    precision: str = "32-true",
) -> TrainingStep:
    """Make a training step on noise."""
    torch.manual_seed(0)
    batch: Batch = {
        "image": torch.randn(*shape, device=device),
        "mask": torch.rand(shape[0], regions, *shape[2:], device=device) > 0.9,
        "case": ["noise"] * shape[0],
    }
    return TrainingStep(make(checkpointing).train().to(device), batch, precision)


def monai_step(filters: int, side: int, device: str, memory_format: Any) -> Callable[[], None]:  # noqa: ANN401
    """Make a training step of MONAI's network of the same kind, with the same loss for regions."""
    network: Any = SegResNetVAE(
        (side,) * 3, init_filters=filters, in_channels=4, out_channels=3, vae_estimate_std=True
    )
    network = network.to(device, memory_format=memory_format)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    loss = RegionDice(dict.fromkeys(REGIONS, 0.33), REGIONS).to(device)
    image = torch.randn(1, 4, side, side, side, device=device)
    image = image.contiguous(memory_format=memory_format)
    batch: Any = {"mask": torch.rand(1, 3, side, side, side, device=device) > 0.9}

    def step() -> None:
        logits, autoencoder = network(image)
        terms = loss(argparse.Namespace(logits=logits), batch)
        optimizer.zero_grad()
        (terms["loss"] + 0.1 * autoencoder).backward()
        optimizer.step()

    return step


def seconds(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time runs in turn; returns the seconds of the fastest of each, after one that warms up."""
    fastest = dict.fromkeys(runs, math.inf)
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            if repeat:
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest


def matmul_gflops(device: str, repeats: int) -> float:
    """Measure how many GFLOP a second a product of two float32 matrices reaches."""
    side = 8192 if device == "cuda" else 1536
    a = torch.randn(side, side, device=device)
    return 2 * side**3 / seconds({"": lambda: a @ a}, 3 * repeats)[""] / 1e9


def predicted(name: str, checkpointing: str, precision: str, device: str) -> Step:
    """Predict the cost of one of the steps in `PAPER`."""
    make, shape, regions = PAPER[name]
    return predict_step(make(checkpointing), shape, regions, precision, device)


def compare_steps(device: str, repeats: int, rate: float) -> Rows:
    """Time training steps: on a CPU those of the small network, on a GPU all of the paper's."""
    name = "AE-U-Net, 8 filters, 80³"
    names = list(PAPER) if device == "cuda" else [name]
    rows: Rows = []
    for name in names:
        make, shape, regions = PAPER[name]
        kinds = [(c, "32-true") for c in CHECKPOINTING]
        kinds += [("none", "bf16-mixed"), ("levels", "bf16-mixed")] if device == "cuda" else []
        runs: dict[str, Callable[[], object]] = {
            f"checkpointing={c}, {p}": training_step(make, shape, regions, device, c, p)
            for c, p in kinds
        }
        if name == "AE-U-Net, 8 filters, 80³":
            runs["MONAI, as shipped"] = monai_step(8, 80, device, torch.contiguous_format)
            runs["MONAI, channels last"] = monai_step(8, 80, device, torch.channels_last_3d)
        taken = seconds(runs, repeats)
        peer = taken.get("MONAI, as shipped")
        for kind, run in runs.items():
            row = {"network": name, "step": kind, "seconds": f"{taken[kind]:.3f}"}
            row["times MONAI's speed"] = f"{peer / taken[kind]:.2f}" if peer else ""
            if isinstance(run, TrainingStep):
                checkpointing = kind.removeprefix("checkpointing=").split(",")[0]
                cost = predicted(name, checkpointing, run.precision, device)
                row["GFLOP"] = f"{cost.gflops:.0f}"
                row["of the matrix rate"] = f"{cost.gflops / taken[kind] / rate:.0%}"
                row["predicted MiB"] = f"{cost.memory.peak:.0f}"
                row["measured MiB"] = f"{run.peak_mib():.0f}"
            rows.append(row)
    return rows


def predict_memory(device: str) -> Rows:
    """Predict the peak memory of the paper's steps in MiB; nothing is run."""
    rows: Rows = []
    for name in PAPER:
        for precision in ("32-true", "bf16-mixed"):
            row = {"training step": name, "precision": precision}
            for checkpointing in CHECKPOINTING:
                peak = predicted(name, checkpointing, precision, device).memory.peak
                row[checkpointing] = f"{peak:.0f}"
            rows.append(row)
    return rows


def compare_levels(device: str, repeats: int, rate: float) -> Rows:
    """Time the 3³ convolutions of each level of the network of 8 filters at 80³."""
    rows: Rows = []
    for level in range(4):
        width, side = 8 * 2**level, 80 // 2**level
        layer = AEUNet(filters=8, patch_size=80).encoder.levels[level][0].body[-1]  # pyright: ignore
        layer = layer.to(device, memory_format=torch.channels_last_3d)
        x = torch.randn(1, width, side, side, side, device=device)
        x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        gradient = torch.randn_like(x)

        def both(layer: Any = layer, x: Tensor = x, gradient: Tensor = gradient) -> None:  # noqa: ANN401
            layer(x).backward(gradient)

        taken = seconds({"forward": partial(layer, x), "both": both}, 3 * repeats)
        gflops = 2 * 27 * width**2 * side**3 / 1e9
        backward = taken["both"] - taken["forward"]
        rows.append(
            {
                "level": f"{width} channels, {side}³",
                "forward": f"{gflops / taken['forward'] / rate:.0%}",
                "backward": f"{2 * gflops / backward / rate:.0%}",
            }
        )
    return rows


def compare_volumes(device: str, repeats: int, rate: float) -> Rows:
    """Time D-Net and the U-Net on a whole brain, with equal blocks and 16 filters."""
    volume = brain((144, 176, 144))
    modules = {"U-Net": unet().eval().to(device), "D-Net": dnet().eval().to(device)}
    taken = seconds_a_volume(modules, [volume], repeats)
    rows: Rows = []
    for name, module in modules.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module.logits(volume[None].to(device))
        gflop, seconds_taken = counter.get_total_flops() / 1e9, taken[name][0]
        rows.append(
            {
                "network": name,
                "seconds": f"{seconds_taken:.3f}",
                "times the U-Net's speed": f"{taken['U-Net'][0] / seconds_taken:.2f}",
                "GFLOP": f"{gflop:.0f}",
                "of the matrix rate": f"{gflop / seconds_taken / rate:.0%}",
            }
        )
    return rows


def measure_growth(device: str, repeats: int) -> dict[str, list[tuple[float, float, float]]]:
    """Measure how time and memory grow; returns (size, seconds, MiB) by what grows."""
    growth: dict[str, list[tuple[float, float, float]]] = {}
    for name, kinds in {
        "voxels of a patch": [(8, side) for side in (32, 48, 64, 80)],
        "filters": [(filters, 32) for filters in (8, 16, 24, 32)],
    }.items():
        steps = {
            (filters, side): training_step(
                partial(aeunet, filters, side), (2, 4, side, side, side), 3, device
            )
            for filters, side in kinds
        }
        taken = seconds({str(kind): step for kind, step in steps.items()}, repeats)
        growth[name] = [
            (
                float(side**3 if name.startswith("voxels") else filters),
                taken[str((filters, side))],
                step.peak_mib(),
            )
            for (filters, side), step in steps.items()
        ]
    for name, module in {"U-Net": unet(), "D-Net": dnet()}.items():
        module = module.eval().to(device)
        points = []
        for side in (64, 96, 128, 160):
            volume = brain((side,) * 3)
            taken = seconds_a_volume({name: module}, [volume], repeats)[name][0]
            points.append((float(side**3), float(taken), math.nan))
        growth[f"voxels of a volume, {name}"] = points
    return growth | measure_preparation()


def measure_preparation() -> dict[str, list[tuple[float, float, float]]]:
    """Measure how what comes before a run grows; returns (size, seconds, NaN) by what grows."""
    import train  # noqa: F401  (registers what the configuration computes with)

    growth: dict[str, list[tuple[float, float, float]]] = {
        "cases, preprocessed": [],
        "cases, out of the cache": [],
        "cells of a sweep, planned": [],
    }
    for count in (8, 16, 32, 64):
        with tempfile.TemporaryDirectory() as folder:
            data_set = BraTS(write_noise(Path(folder) / "data", count))
            cases = data_set.cases()
            cache = Cache(Path(folder) / "cache", 1, "brain", workers=1)
            for name in list(growth)[:2]:
                start = time.perf_counter()
                cache.build(cases, data_set)
                growth[name].append((count, time.perf_counter() - start, math.nan))
    for count in (2, 2, 4, 8, 16):
        arguments = ["-m", f"seed={','.join(map(str, range(count)))}"]
        start = time.perf_counter()
        composed_jobs(arguments, CONF)
        growth["cells of a sweep, planned"].append((count, time.perf_counter() - start, math.nan))
    growth["cells of a sweep, planned"].pop(0)  # has imported what the others use
    return growth


def write_noise(root: Path, cases: int) -> Path:
    """Write a BraTS folder of cubes of noise, 40 mm along a side, in air."""
    random = np.random.default_rng(0)
    for index in range(cases):
        name = f"BraTS2021_{index:05d}"
        (root / name).mkdir(parents=True)
        for part in ("t1", "t1ce", "t2", "flair", "seg"):
            voxels = np.pad(random.integers(500, 1000, (40, 40, 40), np.int16), 6)
            if part == "seg":
                voxels = (voxels > 900).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / name / f"{name}_{part}.nii.gz")
    return root


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Fit the exponent of a power law; NaN if there are no numbers."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0]) if np.isfinite(y).all() else math.nan


def tabulate_growth(growth: Mapping[str, Sequence[tuple[float, float, float]]]) -> Rows:
    """Make a row for everything that grows: the exponents of its time and of its memory."""
    rows: Rows = []
    for name, points in growth.items():
        memory = slope([(size, mib) for size, _, mib in points])
        rows.append(
            {
                "what grows": name,
                "from": f"{points[0][0]:.0f}",
                "to": f"{points[-1][0]:.0f}",
                "exponent of time": f"{slope([(size, s) for size, s, _ in points]):.2f}",
                "exponent of memory": "" if math.isnan(memory) else f"{memory:.2f}",
            }
        )
    return rows


def draw_growth(growth: Mapping[str, Sequence[tuple[float, float, float]]], path: Path) -> None:
    """Draw time and memory over what grows, both axes logarithmic and relative to the least."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    for ax, index, title in zip(figure.subplots(1, 2), (1, 2), ("time", "memory"), strict=True):
        for name, points in growth.items():
            values = np.array(points)
            if np.isfinite(values[:, index]).all():
                ax.loglog(values[:, 0] / values[0, 0], values[:, index] / values[0, index], "o-")
                ax.lines[-1].set_label(name)
        ax.axline((1, 1), (2, 2), color="gray", linestyle=":", label="as much as the size")
        ax.set(xlabel="size over the smallest", ylabel=f"{title} over that of the smallest")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small")
    with written_whole(path) as partial_path:
        figure.savefig(partial_path, dpi=100)


def compare_devices() -> Rows:
    """Compare the logits and gradients of a GPU with those of the CPU, in float32."""
    rows: Rows = []
    for name in ("AE-U-Net, 8 filters, 80³",):
        make, _, regions = PAPER[name]
        results = {}
        for device in ("cpu", "cuda"):
            step = training_step(make, (1, 4, 80, 80, 80), regions, device)
            step.batch["image"] = torch.linspace(-1, 1, 4 * 80**3).view(1, 4, 80, 80, 80).to(device)
            network = step.module.network
            logits = network.segment(step.module.in_memory_format(step.batch["image"]))
            logits.square().mean().backward()
            gradients = [w.grad.flatten().cpu() for w in network.decoder.parameters()]
            results[device] = (logits.detach().cpu(), torch.cat(gradients))
        for kind, ours, theirs in zip(
            ("logits", "gradients"), results["cuda"], results["cpu"], strict=True
        ):
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            rows.append({"network": name, "of": kind, "largest difference": f"{error:.1e}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.hardware",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("experiments/results/benchmarks"),
        help="folder of the tables and the plot; default: %(default)s",
    )
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: all")
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_freed()
    rate = matmul_gflops(device, options.repeats)
    machine = (
        f"{device_name() if device == 'cuda' else platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, a product of float32 "
        f"matrices at {rate:.0f} GFLOP/s, device={device}\n"
    )
    print(machine)
    write_text(options.output / "machine.md", machine)
    growth: dict[str, Any] = {}

    def growth_rows() -> Rows:
        growth.update(measure_growth(device, options.repeats))
        draw_growth(growth, options.output / "growth.png")
        return tabulate_growth(growth)

    tables: dict[str, Callable[[], Rows]] = {
        "steps": lambda: compare_steps(device, options.repeats, rate),
        "memory": lambda: predict_memory(device),
        "levels": lambda: compare_levels(device, options.repeats, rate),
        "volumes": lambda: compare_volumes(device, options.repeats, rate),
        "growth": growth_rows,
    }
    if device == "cuda":
        tables["devices"] = compare_devices
    for name in (name for name in tables if name in options.tables):
        table = markdown(tables[name]())
        print(f"## {name}\n\n{table}\n", flush=True)
        write_text(options.output / f"{name}.md", table + "\n")


if __name__ == "__main__":
    with command():
        main()
