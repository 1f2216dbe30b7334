"""A D-Net that looks trained, for tests of whole volumes."""

import pytest
import torch
from torch import nn

from lightning_modules.networks.dnet import DNet


@pytest.fixture(scope="session")
def dnet() -> DNet:
    """Two channels; statistics and affine parts of the norms are not the initial ones."""
    torch.manual_seed(0)
    network = DNet(in_channels=2, filters=8)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
            part.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
            part.weight.data.uniform_(0.5, 2)
            part.bias.data.normal_()
    return network.eval()


def one_valid_pass(network: DNet, image: torch.Tensor) -> torch.Tensor:
    """Logits of D-Net's boxes by one pass over the volume with all of its halo, padded by torch."""
    x, y, z = (26 + -side % 4 for side in image.shape[2:])
    return network.segment(nn.functional.pad(image, (26, z, 26, y, 26, x)))
