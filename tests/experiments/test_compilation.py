"""`compile=true`: the loss and gradients of the network without it."""

import copy
import logging
import shutil
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from experiments.compilation import compile_network
from lightning_modules.networks.aeunet import Bottleneck
from lightning_modules.networks.blocks import GroupNorm
from lightning_modules.segmentation import SegmentationModule


class Small(SegmentationModule):
    """A module with the variational bottleneck for a network: norm, convolution, random sample."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.network = Bottleneck(8, (4, 4, 4), 4, GroupNorm, nn.ReLU)
        self.memory_format = torch.channels_last_3d


def compare() -> None:
    logging.basicConfig(level=logging.INFO)
    module = Small()
    eager = copy.deepcopy(module.network)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert compile_network(module, trainer, (2, 8, 4, 4, 4)) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert module.network.state_dict().keys() == eager.state_dict().keys()
    image, results = torch.randn(2, 8, 4, 4, 4), []
    for network in (module.network, eager):
        torch.manual_seed(1)
        features, latent = network(module.in_memory_format(image))
        (features.square().sum() + latent.log_variance.square().sum()).backward()
        results.append([features, *latent, *(weight.grad for weight in network.parameters())])
    for compiled, expected in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    print("equal")


@pytest.mark.process
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler of C++")
def test_compiling_changes_nothing_but_the_rounding():
    """In a process of its own: the checks of shapes in tests cannot be compiled."""
    command = "from tests.experiments.test_compilation import compare; compare()"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stderr
    assert "compile: a step takes" in done.stderr
