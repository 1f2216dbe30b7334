"""Initial weights: what seed and name fix, and what no other layer can change."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from lightning_modules.networks.aeunet import AEUNet
from lightning_modules.networks.blocks import Logits, PooledConv
from lightning_modules.networks.initial import initialise

SMALL = {"patch_size": 16, "filters": 8}


def weights(seed: int = 0, **choices: object) -> dict[str, torch.Tensor]:
    network = AEUNet(**{**SMALL, **choices})
    initialise(network, seed)
    return {name: value.detach().clone() for name, value in network.named_parameters()}


@pytest.mark.parametrize(
    ("choices", "differ"),
    [
        ({"norm": nn.BatchNorm3d}, ()),
        ({"activation": nn.ReLU}, ()),
        ({"downsampling": PooledConv}, ()),
        ({"downsampling": partial(PooledConv, pool=nn.AvgPool3d)}, ()),
        ({"bottleneck": 32}, ("bottleneck.posterior", "bottleneck.expand")),
        ({"in_channels": 5}, ("encoder.down.0", "autoencoder.head")),
        ({"depth": 3}, ("decoder", "autoencoder", "bottleneck")),
    ],
)
def test_variants_of_a_network_start_from_the_same_weights(
    choices: dict[str, object], differ: tuple[str, ...]
):
    baseline, level = weights(), weights(**choices)
    common = [name for name in level if not name.startswith(differ)]
    assert len(common) > 20
    for name in common:
        assert torch.equal(level[name], baseline[name]), name


def test_layers_and_seeds_have_streams_of_their_own_whatever_was_drawn_before():
    first = weights()
    torch.rand(7)
    state = torch.get_rng_state()
    again, other = weights(), weights(seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    kernels = [name for name in first if first[name].dim() == 5]
    assert not any(torch.equal(first[name], other[name]) for name in kernels)
    assert len({float(first[name].flatten()[0]) for name in kernels}) == len(kernels)
    network = AEUNet(**SMALL)
    torch.set_rng_state(state)
    initialise(network, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_distributed_as_those_of_torch():
    kernel = weights()["encoder.levels.3.0.body.2.weight"]  # of 64 channels
    bound = math.sqrt(3 / (kernel[0].numel())) / math.sqrt(3)  # Kaiming's, with a slope of √5
    assert kernel.abs().max() <= bound
    assert kernel.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_prior_of_logits_is_kept():
    network = nn.Sequential(Logits(3, 2, prior=0.01))
    before = network[0].weight.clone()
    initialise(network, 0)
    assert not torch.equal(network[0].weight, before)
    assert network[0].bias.sigmoid().tolist() == pytest.approx([0.01, 0.01])
