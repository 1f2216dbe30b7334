"""`torch.compile` of a network, with a word on whether it pays."""

import copy
import logging
import time
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from errors import InputError
from experiments.timing import synchronise
from lightning_modules.segmentation import SegmentationModule

STEPS = 3  # timed ones, of which the fastest counts

# Random numbers are PyTorch's own: else the autoencoder would sample others than without compiling.
OPTIONS = {"fallback_random": True}


def compile_network(module: SegmentationModule, trainer: pl.Trainer, shape: Sequence[int]) -> float:
    """Compile the network of a module for training, and log how much faster a step becomes.

    Inference takes other paths through a network, and is not compiled.

    Args:
        module: Module whose network is compiled; its weights stay as they are.
        trainer: Says on which device and in which precision the module will train.
        shape: Shape (B, C, X, Y, Z) of the batches.

    Returns:
        Duration of a forward and backward pass over that without compiling.

    Raises:
        InputError: There is no compiler of C++, or it failed.
    """
    network, device = module.network, trainer.strategy.root_device
    weights = copy.deepcopy(network.state_dict())
    network.to(device)
    image = module.in_memory_format(torch.zeros(*shape, device=device))

    def seconds_a_step() -> float:
        fastest = float("inf")
        for _ in range(STEPS + 1):  # the first one compiles
            synchronise()
            start = time.perf_counter()
            with trainer.precision_plugin.forward_context():
                output = network(image)
            _sum(output).backward()
            synchronise()
            fastest = min(fastest, time.perf_counter() - start)
            network.zero_grad(set_to_none=True)
        return fastest

    with torch.random.fork_rng():  # the run draws the same numbers as without compiling
        eager_s = seconds_a_step()
        network.compile(dynamic=False, options=OPTIONS)
        try:
            ratio = seconds_a_step() / eager_s
        except torch._dynamo.exc.BackendCompilerFailed as error:  # pyright: ignore
            reason = str(error).splitlines()[0]
            raise InputError(
                f"compile: expected a working compiler of C++, found: {reason}"
            ) from error
    network.load_state_dict(weights)  # the passes have moved the statistics of batch norm
    if ratio < 1:
        logging.info("compile: a step takes %.2f of the time without it", ratio)
    else:
        logging.warning(
            "compile: a step takes %.2f times as long as without it here; leave it out", ratio
        )
    return ratio


def _sum(output: Any) -> torch.Tensor:  # noqa: ANN401  (named tuples of tensors, in each other)
    """Add up all that a network puts out, so that every part of it takes a backward pass."""
    if isinstance(output, torch.Tensor):
        return output.float().sum()
    return torch.stack([_sum(part) for part in output]).sum()
