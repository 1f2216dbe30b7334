"""Convolutions of rounded numbers are those of bfloat16, and precisions are compared by seed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from errors import InputError
from experiments.benchmarks.precision import RoundConvolutions, scores, table
from lightning_modules.networks.aeunet import AEUNet


@pytest.fixture
def rounding() -> Iterator[None]:
    callback = RoundConvolutions()
    trainer, module = object.__new__(pl.Trainer), pl.LightningModule()
    callback.setup(trainer, module, "fit")
    yield
    callback.teardown(trainer, module, "fit")


def under_autocast(layer: nn.Module, image: Tensor) -> list[Tensor]:
    """What a layer puts out in bfloat16, and the gradients of its weights."""
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(image)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    gradients = [weight.grad for weight in layer.parameters() if weight.grad is not None]
    return [output.float(), *gradients]


LAYERS = [nn.Conv3d(8, 6, 3), nn.ConvTranspose3d(8, 6, 2, stride=2), nn.Linear(8, 6)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_layer_has_the_numbers_of_bfloat16(layer: nn.Module, request: pytest.FixtureRequest):
    image = torch.randn(2, 8, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, exact = under_autocast(layer, image), layer(image)
    request.getfixturevalue("rounding")
    for found, wanted in zip(under_autocast(layer, image), expected, strict=True):
        assert (found == wanted).float().mean() > 0.6  # else a neighbour: sums have an order
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(layer(image), exact, atol=0, rtol=0)  # not under autocast
    assert (exact == expected[0]).float().mean() < 0.05


def test_a_network_is_as_far_from_float32_as_in_bfloat16(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    network = AEUNet(2, 3, filters=8, depth=2, bottleneck=4, patch_size=16)
    image = torch.randn(2, 2, 16, 16, 16)
    exact = network.segment(image)
    with torch.autocast("cpu", torch.bfloat16):
        expected = (network.segment(image) - exact).std().item()
        request.getfixturevalue("rounding")
        found = (network.segment(image) - exact).std().item()
    assert found == pytest.approx(expected, rel=0.2)


def test_precisions_are_compared_seed_by_seed(tmp_path: Path):
    def runs(*dice: float) -> dict[int, dict[str, float]]:
        return {
            seed: {"test/constant": 1.0, "test/dice_WT": value} for seed, value in enumerate(dice)
        }

    found = table({"32-true": runs(0.5, 0.7, 0.9), "bf16-mixed": runs(0.51, 0.73, 0.92)})
    # Differences .01, .03 and .02: mean .02, deviation .01; t of two degrees of freedom: 4.303.
    header, _, *rows = found.splitlines()
    assert header == "| metric | 32-true | bf16-mixed | difference | 95 % | seeds |"
    assert rows == [
        "| test/dice_WT | 0.700 ± 0.200 | 0.720 ± 0.205 | +0.020 | -0.005 to +0.045 | 3 |"
    ]
    with pytest.raises(InputError, match="expected two seeds or more in both precisions"):
        scores(tmp_path)
