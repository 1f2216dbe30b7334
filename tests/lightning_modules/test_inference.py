"""Inference on whole volumes: exact for every shape and tile, on the right voxels; ensembles."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.inference import (
    Ensemble,
    ExactTiles,
    SlidingWindow,
    WholeVolume,
    halved,
    repeated,
    tile_starts,
)
from lightning_modules.networks.dnet import GEOMETRY, DNet
from lightning_modules.networks.unet import UNet3D
from tests.lightning_modules.conftest import one_valid_pass

IN_ONE_PASS, IN_TILES = 10**7, 60**3  # voxels at once


def at_full_resolution(coarse: Tensor, image: Tensor) -> Tensor:
    x, y, z = image.shape[2:]
    return nn.functional.interpolate(coarse, scale_factor=4, mode="nearest")[..., :x, :y, :z]


@pytest.mark.parametrize("remainder", list(product(range(4), repeat=3)))
@torch.inference_mode()
def test_one_pass_and_tiles_equal_one_valid_pass_for_every_shape(
    dnet: DNet, remainder: tuple[int, int, int]
):
    shape = [side + more for side, more in zip((4, 4, 8), remainder, strict=True)]
    image = torch.randn(1, 2, *shape)
    expected = one_valid_pass(dnet, image)
    assert expected.shape[2:] == tuple(-(-side // 4) for side in shape)
    for voxels_at_once in (IN_ONE_PASS, IN_TILES):
        logits = ExactTiles(GEOMETRY, voxels_at_once)(image, dnet)
        coarse = logits[..., ::4, ::4, ::4]
        assert (coarse - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        assert torch.equal(logits, at_full_resolution(coarse, image))


@pytest.mark.parametrize("voxels_at_once", [IN_ONE_PASS, 64**3, IN_TILES, 1])
@torch.inference_mode()
def test_bit_for_bit_where_no_sum_is_rounded(voxels_at_once: int):
    """Weights of -1, 0 and 1, images of whole numbers: float64 rounds no sum, in any order."""
    torch.manual_seed(0)
    network = DNet(filters=8, norm=nn.Identity, activation=nn.ReLU).double().eval()
    for weight in network.parameters():
        weight.copy_(torch.randint(-1, 2, weight.shape))
    image = torch.randint(-2, 3, (1, 1, 9, 6, 7)).double()
    expected = one_valid_pass(network, image)
    assert expected.abs().max() > 1e3
    logits = ExactTiles(GEOMETRY, voxels_at_once)(image, network)
    assert torch.equal(logits, at_full_resolution(expected, image))
    assert torch.equal(logits[..., ::4, ::4, ::4], expected)


@torch.inference_mode()
def test_float64_stays_within_1e_12_of_one_pass(dnet: DNet):
    double = DNet(in_channels=2, filters=8).double().eval()
    double.load_state_dict(dnet.state_dict())
    image = torch.randn(1, 2, 9, 6, 7, dtype=torch.float64)
    expected = one_valid_pass(double, image)
    full = at_full_resolution(expected, image)
    for voxels_at_once in (IN_ONE_PASS, IN_TILES):
        inference = ExactTiles(GEOMETRY, voxels_at_once)
        coarse = inference.coarse(image, double)
        torch.testing.assert_close(coarse, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(inference(image, double), full, rtol=1e-12, atol=1e-12)


class OwnBox(nn.Module):
    """D-Net's geometry without its context: predicts the highest value of each box."""

    def segment(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool3d(x[..., 26:-26, 26:-26, 26:-26], 4)

    def segment_volume(self, x: Tensor) -> Tensor:
        return self.segment(nn.functional.pad(x, (26,) * 6))


@pytest.mark.parametrize("voxel", [(0, 0, 0), (3, 4, 7), (8, 11, 12), (13, 9, 14)])
@pytest.mark.parametrize("voxels_at_once", [IN_ONE_PASS, 1])
def test_a_voxel_lights_its_own_box(voxel: tuple[int, int, int], voxels_at_once: int):
    image = torch.zeros(1, 1, 14, 13, 15)
    image[(0, 0, *voxel)] = 1
    inference = ExactTiles(GEOMETRY, voxels_at_once)
    coarse = inference.coarse(image, OwnBox())
    assert torch.nonzero(coarse[0, 0]).tolist() == [[position // 4 for position in voxel]]
    full = inference(image, OwnBox())
    assert torch.equal(full, repeated(coarse, 4, image.shape[2:]))
    assert full.shape == image.shape
    assert full[(0, 0, *voxel)] == 1
    x, y, z = (4 * (position // 4) for position in voxel)
    assert full.sum() == full[..., x : x + 4, y : y + 4, z : z + 4].sum()


class SmallMachine(OwnBox):
    """Runs out of memory, as PyTorch does, above a number of voxels."""

    def __init__(self, voxels: int) -> None:
        super().__init__()
        self.voxels = voxels

    def segment(self, x: Tensor) -> Tensor:
        if x[0, 0].numel() > self.voxels:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")
        return super().segment(x)


def test_tiles_shrink_until_memory_is_enough():
    image = torch.rand(1, 1, 33, 30, 27)
    inference = ExactTiles(GEOMETRY)
    coarse, full = inference.coarse(image, OwnBox()), inference(image, OwnBox())
    assert torch.equal(inference.coarse(image, SmallMachine(64**3)), coarse)
    assert torch.equal(inference(image, SmallMachine(64**3)), full)
    with pytest.raises(RuntimeError, match="can't allocate"):  # not even one box fits
        inference(image, SmallMachine(50**3))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="channels"):
        ExactTiles(GEOMETRY)(torch.rand(1, 3, 8, 8, 8), DNet(in_channels=1).eval())


def test_tiles_cover_the_grid_and_stay_inside():
    for grid, tile in (((5, 4, 3), (2, 4, 1)), ((7, 1, 6), (3, 1, 4))):
        seen = torch.zeros(grid)
        for start in tile_starts(grid, tile):
            box = tuple(slice(s, s + side) for s, side in zip(start, tile, strict=True))
            assert seen[box].shape == tile
            seen[box] += 1
        assert seen.min() == 1
    assert halved([4, 9, 2]) == [4, 5, 2]


@torch.inference_mode()
def test_whole_volume_of_any_shape():
    torch.manual_seed(0)
    network = UNet3D(filters=8, norm=nn.BatchNorm3d).eval()
    image = torch.randn(1, 1, 19, 16, 30)
    logits = WholeVolume()(image, network)
    assert logits.shape == (1, 1, 19, 16, 30)
    padded = nn.functional.pad(image, (0, 2, 0, 0, 0, 13))
    assert torch.equal(logits, network.segment(padded)[..., :19, :16, :30])


class Recorder(nn.Module):
    """Looks at every voxel by itself, and records the shapes that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def segment(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return 2 * x[:, :1]


def test_a_single_window_on_a_cpu_is_segmented_as_two():
    network, image = Recorder(), torch.randn(1, 3, 8, 8, 8)
    logits = SlidingWindow(8)(image, network)
    assert network.shapes == [(2, 3, 8, 8, 8)]
    torch.testing.assert_close(logits, 2 * image[:, :1])


def test_windows_overlap_by_their_share():
    network, image = Recorder(), torch.randn(1, 1, 8, 8, 20)
    SlidingWindow((8, 8, 8), overlap=0.5, batch_size=4)(image, network)
    assert network.shapes == [(4, 1, 8, 8, 8)]  # from voxels 0, 4, 8 and 12


class Equivariant(nn.Module):
    """Looks at every voxel by itself: flips with the image."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, :1].sigmoid()


class Leaning(nn.Module):
    """Looks to one side, along one axis: does not flip with the image."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.cumsum(self.axis).sigmoid()


def test_flips_of_an_equivariant_network_change_nothing():
    image = torch.randn(2, 3, 5, 6, 7)
    network = Equivariant()
    ensemble = Ensemble([network], flip_axes=(0, 1, 2))
    assert ensemble.estimates == 8
    torch.testing.assert_close(ensemble(image), network(image), rtol=0, atol=3e-7)


def test_sixteen_estimates_are_the_mean_by_hand():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 4, 5, 6)
    members = [Leaning(2), Leaning(4)]
    ensemble = Ensemble(members, flip_axes=(0, 1, 2))
    assert ensemble.estimates == 16
    estimates = [
        member(image.flip(axes)).flip(axes)
        for member in members
        for axes in ([], [2], [3], [4], [2, 3], [2, 4], [3, 4], [2, 3, 4])
    ]
    expected = torch.stack(estimates).mean(0)
    torch.testing.assert_close(ensemble(image), expected)
    assert not torch.allclose(expected, members[0](image), atol=1e-2)
    without_flips = torch.stack([member(image) for member in members]).mean(0)
    torch.testing.assert_close(Ensemble(members)(image), without_flips)


def test_half_precision_comes_back_as_float32():
    image = torch.randn(1, 4, 8, 8, 8)
    network = nn.Sequential(nn.Conv3d(4, 3, 3, padding=1), nn.Sigmoid())
    half = Ensemble([network], precision=torch.bfloat16)(image)
    whole = Ensemble([network])(image)
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, atol=0.02, rtol=0)


def test_an_ensemble_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """The device has no memory for anything; all else is real."""
    image = torch.randn(1, 1, 4, 4, 4)
    ensemble = Ensemble([Equivariant()])

    def without_memory(device: object) -> Ensemble:
        if str(device) != "cpu":
            raise torch.OutOfMemoryError("out of memory")
        return ensemble

    monkeypatch.setattr(ensemble, "to", without_memory)
    torch.testing.assert_close(ensemble.computed_on(image, "cuda"), image.sigmoid())
