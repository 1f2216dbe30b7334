"""How long this machine takes for a training step and for a whole volume, from a few seconds of it.

What is small is run as it is, on noise. Of what is large a part is run, with fewer patches or
smaller ones, and the time is scaled: for a step by its floating-point operations, for a volume by
its voxels. Nothing is run that would not fit in memory.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from experiments.cost import MIB, PRECISIONS, Step, autocast, predict_step
from experiments.jobs import Job
from experiments.timing import TrainingStep, synchronise
from lightning_modules.checkpoint import build
from lightning_modules.segmentation import Batch, SegmentationModule

SLOWEST = 4.0  # GFLOP a second: what would take too long at this rate is run in part first
MEMORY_SHARE = 0.5  # of the free memory that a calibration may take


@dataclass(frozen=True)
class Timed:
    """A duration, and how it was found.

    Attributes:
        seconds: The duration.
        measured_at: What was run: sides of a volume, or of patches and their number.
        scale: The duration over that of what was run; 1 if it was run as it is.
    """

    seconds: float
    measured_at: tuple[int, ...]
    scale: float


def device_of(job: Job) -> torch.device:
    """Return the device that a run trains on, `cuda` or `cpu`."""
    wanted = job.config.trainer.accelerator in ("auto", "gpu", "cuda")
    return torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")


def free_memory_mib(device: torch.device) -> float:
    """Return the memory that tensors may take on a device, in MiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MIB
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) / 2**10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB / 2


def module_of(job: Job) -> SegmentationModule:
    """Build the module of a job, with its weights in memory."""
    return build(job.plain["module"])


def module_without_memory(job: Job) -> SegmentationModule:
    """Build the module of a job without memory for its weights."""
    with torch.device("meta"):
        return module_of(job)


def sides_of(job: Job) -> tuple[int, int, int]:
    """Return the sides of the training patches in voxels."""
    size = job.plain["patches"]["size"]
    x, y, z = [size] * 3 if isinstance(size, int) else size
    return x, y, z


def smallest_side(job: Job) -> tuple[int, int]:
    """Return the smallest side of a patch that a network takes, and the step to the next one."""
    plain = job.plain
    geometry, model = plain["geometry"], plain["model"]
    step = 2 ** (model["depth"] - 1) if "depth" in model else geometry["stride"]
    return 2 * geometry["halo"] + step, step


def predicted(job: Job, batch_size: int | None = None) -> Step:
    """Predict the cost of a training step of a job, or of one with another number of patches."""
    plain = job.plain
    return predict_step(
        module_without_memory(job),
        (batch_size or plain["data"]["batch_size"], plain["model"]["in_channels"], *sides_of(job)),
        plain["model"]["out_channels"],
        plain["trainer"]["precision"],
        device_of(job).type,
    )


def time_step(job: Job, step: Step, budget_s: float) -> Timed:
    """Measure how long a training step of a job takes on this machine, or estimate it.

    Args:
        job: The job.
        step: Its predicted cost.
        budget_s: About how long a single step may take, and all of them together.
    """
    batch_size = job.plain["data"]["batch_size"]
    room = MEMORY_SHARE * free_memory_mib(device_of(job))
    whole = _voxels(job, batch_size)
    parts = sorted(_parts(job, batch_size), key=lambda part: _voxels(*part))
    shares = [_voxels(*part) / whole for part in parts]
    gflops_a_s = SLOWEST
    while True:
        affordable = gflops_a_s * budget_s / step.gflops
        index = max(
            (
                index
                for index, share in enumerate(shares)
                if share <= affordable and share * step.memory.peak <= room
            ),
            default=0,
        )
        part, patches = parts[index]
        gflops = step.gflops if shares[index] == 1 else predicted(part, patches).gflops
        seconds = _run_step(part, patches, budget_s)
        if gflops_a_s != SLOWEST or shares[index] == 1:
            scale = step.gflops / gflops
            return Timed(seconds * scale, (*sides_of(part), patches), scale)
        gflops_a_s = gflops / seconds  # what this machine can do: perhaps a larger part


def slowdown(job: Job, timed: Timed, budget_s: float) -> float:
    """Measure how many times as long as in float32 a step takes in the precision of a job.

    Args:
        job: The job.
        timed: What was run of it.
        budget_s: About how long the steps in float32 may take together.
    """
    *sides, patches = timed.measured_at
    full = job.changed({"patches.size": sides, "trainer.precision": "32-true"})
    return timed.seconds / timed.scale / _run_step(full, patches, budget_s)


def _voxels(job: Job, patches: int) -> int:
    return math.prod(sides_of(job)) * patches


def _parts(job: Job, batch_size: int) -> Iterator[tuple[Job, int]]:
    """Yield steps that compute less, and the whole one: fewer patches, and smaller ones.

    There are at least two patches, where the job has two: on a CPU, PyTorch convolves a single
    small one in another way.
    """
    smallest, grows = smallest_side(job)
    batches = {max(min(2, batch_size), batch_size // divisor) for divisor in (1, 4, 16, 64)}
    sides = sides_of(job)
    yield from product([job], sorted(batches))
    for divisor in (1.5, 2, 3, 4):
        smaller = [
            max(
                min(side, smallest + grows),
                side - math.ceil((side - side / divisor) / grows) * grows,
            )
            for side in sides
        ]
        if math.prod(smaller) < math.prod(sides):
            yield job.changed({"patches.size": smaller}), min(batches)


def _run_step(job: Job, batch_size: int, budget_s: float) -> float:
    """Measure the seconds of a training step."""
    plain, device = job.plain, device_of(job)
    precision = plain["trainer"]["precision"]
    weights = PRECISIONS[precision].weights
    shape = (batch_size, plain["model"]["in_channels"], *sides_of(job))
    mask = torch.rand(batch_size, plain["model"]["out_channels"], *shape[2:], device=device) > 0.9
    image = torch.randn(shape, device=device, dtype=weights)
    batch: Batch = {"image": image, "mask": mask, "case": ["noise"] * batch_size}
    step = TrainingStep(module_of(job).to(device, weights), batch, precision)
    return _fastest(step, budget_s)


def _fastest(run: Callable[[], object], budget_s: float) -> float:
    """Time a run, up to four times within the budget; the first counts only if it is the last."""
    times: list[float] = []
    while len(times) < 4 and sum(times) < budget_s:
        start = time.perf_counter()
        run()
        synchronise()
        times.append(time.perf_counter() - start)
    return min(times[1:] or times)


@torch.inference_mode()
def time_volume(
    job: Job, shape: tuple[int, int, int], step: Step, step_s: float, budget_s: float
) -> Timed:
    """Measure how long the logits of a whole volume take on this machine, or estimate it.

    Args:
        job: The job.
        shape: Sides of the volume in voxels.
        step: Predicted cost of a training step of the job.
        step_s: Seconds that such a step takes.
        budget_s: About how long a pass may take, and all of them together.
    """
    plain, device = job.plain, device_of(job)
    precision = plain["trainer"]["precision"]
    weights = PRECISIONS[precision].weights
    gflops_a_voxel = step.cost.gflops / math.prod(sides_of(job))
    gflops_a_voxel /= (1 - plain["inference"].get("overlap", 0)) ** 3
    affordable = budget_s * step.gflops / step_s / gflops_a_voxel
    mib_a_voxel = 6 * 4 * step.cost.widths[0] / MIB  # some features of the finest level at once
    room = MEMORY_SHARE * free_memory_mib(device) / mib_a_voxel
    part, divisor = shape, 1
    while math.prod(part) > min(affordable, room) and divisor < 8:
        divisor += 1
        part = tuple(max(1, round(side / divisor)) for side in shape)
    smallest, grows = smallest_side(job)
    values: dict[str, Any] = {"patches.size": smallest + grows}  # no weights of the planned size
    if "patch_size" in plain["inference"]:  # as many windows, of as much smaller sides
        window = plain["inference"]["patch_size"]
        sides = [window] * 3 if isinstance(window, int) else window
        shares = [max(smallest, round(side / divisor / grows) * grows) for side in sides]
        values["inference.patch_size"] = sides if divisor == 1 else shares
    job = job.changed(values)
    module = module_of(job).to(device, weights).eval()
    image = torch.randn(1, plain["model"]["in_channels"], *part, device=device, dtype=weights)
    with autocast(precision, device.type):
        seconds = _fastest(lambda: module.logits(image), budget_s)
    scale = math.prod(shape) / math.prod(part)
    return Timed(seconds * scale, part, scale)
