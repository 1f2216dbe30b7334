"""What training a network costs, without running it: unequal budgets show beside unequal scores."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

BYTES_PER_WEIGHT = 4 * 4  # float32: the weight, its gradient, and Adam's two moments


@dataclass(frozen=True)
class Cost:
    """Predicted cost of training a network.

    Attributes:
        parameters: Number of trainable weights.
        widths: Filters of each level, fine to coarse.
        gflops: Floating-point operations of convolutions and matrix products in the forward pass of
            one patch, / 10^9.
        memory_mib: Memory of a training step of one batch in float32: weights, gradients and
            moments of Adam, and what the forward pass keeps for the backward pass. The largest
            temporary tensor of a convolution comes on top.
    """

    parameters: int
    widths: list[int]
    gflops: float
    memory_mib: float


def predict_cost(
    network: nn.Module, batch_size: int, channels: int, patch_size: int | Sequence[int]
) -> Cost:
    """Predict the cost for batches (B, C, X, Y, Z); nothing of that size is allocated."""
    sides = [patch_size] * 3 if isinstance(patch_size, int) else patch_size
    network = copy.deepcopy(network)  # a pass changes the running statistics of batch norm
    parameters = sum(w.numel() for w in network.parameters() if w.requires_grad)
    weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
    kept: dict[int, Tensor] = {}  # by storage: what two operations keep is kept once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        saved_tensors_hooks(keep, lambda tensor: tensor),
        FlopCounterMode(display=False) as counter,
    ):
        network(torch.empty(batch_size, channels, *sides))
    activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Cost(
        parameters=parameters,
        widths=list(network.widths),  # pyright: ignore[reportCallIssue, reportArgumentType]
        gflops=counter.get_total_flops() / batch_size / 1e9,
        memory_mib=(parameters * BYTES_PER_WEIGHT + activations) / 2**20,
    )
