"""Time and memory that a trained network takes for a whole volume."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_modules.segmentation import SegmentationModule

MIB = 2**20


@torch.inference_mode()
def seconds_a_volume(
    modules: Mapping[str, SegmentationModule],
    volumes: Sequence[Float[Tensor, "c x y z"]],
    repeats: int = 3,
) -> dict[str, np.ndarray]:
    """Measure how long each network takes for the full-resolution logits of each volume.

    The networks take turns, so that a slow phase of the machine slows all of them alike.

    Args:
        modules: Networks by name, each on the device that it is timed on.
        volumes: Images on the CPU; their transfer is not timed.
        repeats: Number of passes over each volume, of which the fastest counts.

    Returns:
        Seconds (V,) of the V volumes, by the name of the network.
    """
    seconds = {name: np.full(len(volumes), np.inf) for name in modules}
    for _ in range(repeats):
        for index, volume in enumerate(volumes):
            for name, module in modules.items():
                image = volume[None].to(module.device)
                synchronise()
                start = time.perf_counter()
                module.logits(image)
                synchronise()
                taken = time.perf_counter() - start
                seconds[name][index] = min(seconds[name][index], taken)
    return seconds


def synchronise() -> None:
    """Wait until the GPU, if there is one, has done all that it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def peak_mib(module: SegmentationModule, volume: Float[Tensor, "c x y z"]) -> float:
    """Measure the most memory, in MiB, that the tensors of one pass over a volume take at once.

    Weights and the image itself are not counted.
    """
    image = volume[None].to(module.device)
    if image.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        module.logits(image)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        module.logits(image)
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    steps = [event.nbytes() for event in events]  # pyright: ignore  (PyTorch's stubs lack it)
    return float(np.max(np.cumsum(steps))) / MIB
