"""3-D U-Net: its size, its gradients, and the probability that it starts from."""

from itertools import product

import pytest
import torch
from torch import nn

from lightning_modules.networks.blocks import GroupNorm
from lightning_modules.networks.unet import UNet3D

NORMS = {"group": GroupNorm, "batch": nn.BatchNorm3d, "instance": nn.InstanceNorm3d}


def test_parameter_count():
    assert sum(p.numel() for p in UNet3D(filters=8).parameters()) == 2_534_361


@pytest.mark.parametrize(("norm", "activation"), list(product(NORMS, [nn.ReLU, nn.LeakyReLU])))
def test_every_weight_learns(norm: str, activation: type[nn.Module]):
    network = UNet3D(filters=8, depth=3, norm=NORMS[norm], activation=activation)
    network(torch.randn(2, 1, 16, 16, 16)).logits.square().mean().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_untrained_logits_are_near_the_prior(prior: float):
    torch.manual_seed(0)
    logits = UNet3D(filters=8, prior=prior).segment(torch.randn(1, 1, 64, 64, 64))
    assert abs(logits.mean() - torch.logit(torch.tensor(prior))) < 0.5


@pytest.mark.parametrize("depth", [1, 6])
def test_a_depth_out_of_range_is_refused(depth: int):
    with pytest.raises(ValueError, match=f"depth: expected 2 to 5 levels, got {depth}"):
        UNet3D(depth=depth)
