"""Halo and stride: derived from the blocks, found by the configuration, checked against patches."""

from collections.abc import Callable

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_modules.networks.dnet import GEOMETRY, DNet
from lightning_modules.networks.geometry import Geometry, valid_geometry

Compose = Callable[..., DictConfig]


def test_output_side_of_a_patch():
    assert GEOMETRY.output_side(68) == 4
    with pytest.raises(ValueError, match=r"expected 52 \+ a multiple of 4, found 70"):
        GEOMETRY.output_side(70)
    with pytest.raises(ValueError, match=r"expected 52 \+ a multiple of 4, found 52"):
        GEOMETRY.output_side(52)


def test_geometry_is_derived_from_the_blocks():
    # A halo of 2 * 1 + 2 * 2 * 2 + 2 * 2 * 4 voxels, and two poolings.
    assert valid_geometry((1, 2, 2), lost_per_block=2) == GEOMETRY == Geometry(halo=26, stride=4)
    assert valid_geometry((3,), lost_per_block=1) == Geometry(halo=3, stride=1)


def test_configured_geometries_are_those_of_the_networks(composed: Compose):
    """`conf/model/*.yaml` state halo and stride as numbers."""
    for model, expected in {
        "dnet": GEOMETRY,
        "unet": Geometry(0, 1),
        "aeunet": Geometry(0, 1),
    }.items():
        config = composed(f"model={model}")
        assert instantiate(config.geometry) == expected
        assert config.data.sampler.halo == expected.halo


@pytest.mark.parametrize("model", ["dnet", "unet", "aeunet"])
def test_networks_predict_on_the_configured_grid(composed: Compose, model: str):
    config = composed(f"model={model}", "patches.size=64", "filters.base=8")
    network = instantiate(config.model, _convert_="all").eval()
    with torch.no_grad():
        logits = network(torch.zeros(1, config.model.in_channels, 64, 64, 64)).logits
    side = instantiate(config.geometry).output_side(64)
    assert logits.shape == (1, config.model.out_channels, side, side, side)


def test_loss_inference_metrics_and_sampler_have_one_geometry(composed: Compose):
    module = instantiate(composed("model=dnet", "filters.base=8").module, _convert_="all")
    assert isinstance(module.network, DNet)
    assert module.loss.geometry == module.inference.geometry == GEOMETRY
    assert module.metrics["val"].stride == GEOMETRY.stride
