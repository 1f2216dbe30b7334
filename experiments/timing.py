"""Measured: time and memory that a network takes for a whole volume and for a training step."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from experiments.cost import autocast
from lightning_modules.segmentation import Batch, SegmentationModule

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
    return _allocated_mib(lambda: module.logits(image), image.device)


class TrainingStep:
    """A training step that can be repeated: forward pass, loss, backward pass and optimizer.

    The order is that of Lightning, which sets the gradients of the last step free when the forward
    pass is over.

    Args:
        module: Module to train, on the device of the batch.
        batch: Patches that every step sees.
        precision: A precision of Lightning; it sets autocast, the module has its type already.
    """

    def __init__(
        self, module: SegmentationModule, batch: Batch, precision: str = "32-true"
    ) -> None:
        self.module = module
        self.batch = batch
        self.precision = precision
        self.optimizer = module.make_optimizer(module.network)

    @property
    def device(self) -> torch.device:
        return self.batch["image"].device

    def __call__(self) -> None:
        """Take one step."""
        with autocast(self.precision, self.device.type):
            loss = self.module.terms(self.batch)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def peak_mib(self) -> float:
        """Measure the most memory that a step takes at once: weights, moments and batch included.

        The second step is measured, because the first one makes the gradients and the moments.
        """
        self()
        weights = list(self.module.network.parameters())
        found = [*weights, *(weight.grad for weight in weights), *self.module.network.buffers()]
        found += tree_leaves(list(self.optimizer.state.values()))
        found += self.batch.values()
        before = sum(x.untyped_storage().nbytes() for x in found if isinstance(x, Tensor))
        return before / MIB + _allocated_mib(self, self.device)


def _allocated_mib(compute: Callable[[], object], device: torch.device) -> float:
    """Measure the most memory, in MiB, that a computation takes beside what is there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        compute()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    steps = [event.nbytes() for event in events]  # pyright: ignore  (PyTorch's stubs lack it)
    return float(np.max(np.cumsum(steps))) / MIB
