"""Recomputation: the same bits of every loss, gradient and buffer, in less memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.networks.aeunet import AEUNet
from lightning_modules.networks.checkpointing import CHECKPOINTING
from lightning_modules.networks.dnet import DNet
from lightning_modules.networks.unet import UNet3D

NETWORKS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "aeunet, group": (AEUNet, {"patch_size": 16, "bottleneck": 4, "depth": 3}, (2, 4, 16, 16, 16)),
    "aeunet, batch, dropout": (
        AEUNet,
        {"patch_size": 16, "bottleneck": 4, "norm": nn.BatchNorm3d, "dropout": 0.5},
        (2, 4, 16, 16, 16),
    ),
    "dnet": (DNet, {}, (2, 1, 60, 60, 60)),
    "unet": (UNet3D, {"norm": nn.BatchNorm3d, "depth": 3}, (2, 1, 16, 16, 16)),
}


def kept_bytes(run: Callable[[], Tensor], weights: set[int]) -> tuple[Tensor, int]:
    """Run a forward pass; returns its result and the bytes that it keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(kept.values())


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, torch.float32) for name in NETWORKS), ("aeunet, group", torch.bfloat16)],
)
def test_recomputation_changes_no_bit_and_keeps_less(name: str, precision: torch.dtype):
    make, options, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = make(filters=8, **options)
    image = torch.randn(shape)
    results, kept = {}, {}
    for checkpointing in CHECKPOINTING:
        other = make(filters=8, checkpointing=checkpointing, **options)
        other.load_state_dict(copy.deepcopy(network.state_dict()))
        torch.manual_seed(1)  # of the latent's sample and of dropout

        def forward(other: nn.Module = other) -> Tensor:
            half = precision is torch.bfloat16
            with torch.autocast("cpu", precision, enabled=half):
                output = other(image)
            loss = output.logits.float().square().mean()
            if hasattr(output, "reconstruction"):
                loss = loss + output.reconstruction.float().square().mean()
            return loss

        weights = {weight.data_ptr() for weight in other.parameters()}
        loss, kept[checkpointing] = kept_bytes(forward, weights)
        loss.backward()
        gradients = {name: weight.grad for name, weight in other.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in other.named_buffers()}
        results[checkpointing] = {"loss": loss.detach(), **gradients, **buffers}
    for checkpointing in CHECKPOINTING:
        for key, value in results["none"].items():
            assert torch.equal(value, results[checkpointing][key]), (checkpointing, key)
    sizes = [kept[checkpointing] for checkpointing in ("levels", "blocks", "norms", "none")]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4


def test_inference_recomputes_nothing():
    """A detector's level has batch norm in evaluation mode: it uses its running statistics."""
    plain, other = DNet(filters=8).eval(), DNet(filters=8, checkpointing="levels").eval()
    other.load_state_dict(plain.state_dict())
    image = torch.randn(1, 1, 60, 60, 60)
    with torch.inference_mode():
        assert torch.equal(plain.segment(image), other.segment(image))
