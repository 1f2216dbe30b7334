"""Whole volumes from valid convolutions: exact for every shape and tile, on the right voxels."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.inference import (
    Ensemble,
    ExactTiles,
    WholeVolume,
    halved,
    repeated,
    tile_starts,
)
from lightning_modules.networks import DNet, UNet3D
from lightning_modules.networks.dnet import Extents, Geometry, geometry
from tests.conftest import ball


@pytest.fixture(scope="module")
def network() -> DNet:
    """Trained-looking: the statistics and the affine part of its norms are not the initial ones."""
    torch.manual_seed(0)
    network = DNet(in_channels=2, filters=8)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
            part.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
            part.weight.data.uniform_(0.5, 2)
            part.bias.data.normal_()
    return network.eval()


def reference(network: DNet, image: Tensor) -> Tensor:
    """One valid pass over the volume with all of its halo, padded by torch."""
    halo, stride = network.halo, network.stride
    x, y, z = (halo + -side % stride for side in image.shape[2:])
    return network.segment(nn.functional.pad(image, (halo, z, halo, y, halo, x)))


@pytest.mark.parametrize("remainder", list(product(range(4), repeat=3)))
@torch.inference_mode()
def test_dense_and_tiled_equal_one_valid_pass_for_every_shape(
    network: DNet, remainder: tuple[int, int, int]
):
    shape = [side + more for side, more in zip((4, 4, 8), remainder, strict=True)]
    image = torch.randn(1, 2, *shape)
    expected = reference(network, image)
    assert expected.shape[2:] == tuple(-(-side // 4) for side in shape)
    for voxels_at_once in (10**7, 60**3):  # whole, and in tiles
        logits = ExactTiles(geometry(), voxels_at_once)(image, network)
        assert (logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("voxels_at_once", [10**7, 64**3, 60**3, 1])
@torch.inference_mode()
def test_bit_for_bit_where_no_sum_is_rounded(voxels_at_once: int):
    """Weights of -1, 0 and 1, images of whole numbers: in float64 nothing depends on the order."""
    torch.manual_seed(0)
    network = DNet(filters=8, norm=nn.Identity, activation=nn.ReLU).double().eval()
    for weight in network.parameters():
        weight.copy_(torch.randint(-1, 2, weight.shape))
    image = torch.randint(-2, 3, (1, 1, 9, 6, 7)).double()
    expected = reference(network, image)
    assert expected.abs().max() > 1e3
    assert torch.equal(ExactTiles(geometry(), voxels_at_once)(image, network), expected)


@torch.inference_mode()
def test_float64_stays_within_1e_12_of_one_pass(network: DNet):
    double = DNet(in_channels=2, filters=8).double().eval()
    double.load_state_dict(network.state_dict())
    image = torch.randn(1, 2, 9, 6, 7, dtype=torch.float64)
    expected = reference(double, image)
    for voxels_at_once in (10**7, 60**3):
        logits = ExactTiles(geometry(), voxels_at_once)(image, double)
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_channels_last_is_kept_and_changes_nothing(network: DNet):
    image = torch.randn(1, 2, 12, 16, 12)
    last = network.dense(image.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(last, network.dense(image), rtol=1e-4, atol=1e-5)


SHAPE = (24, 40, 32)


@pytest.mark.parametrize(
    "inside",
    [
        ball(SHAPE, (12, 20, 16), 11),
        ball(SHAPE, (0, 39, 0), 6),
        ball(SHAPE, (2, 3, 4), 2) | ball(SHAPE, (22, 35, 28), 3),
        ball(SHAPE, (12, 20, 16), 0),
        np.zeros(SHAPE, bool),
    ],
    ids=["brain", "corner", "two", "voxel", "nothing"],
)
@torch.inference_mode()
def test_dense_is_exact_where_part_of_the_volume_is_air(network: DNet, inside: np.ndarray):
    image = torch.randn(2, 2, *SHAPE) * torch.from_numpy(inside)
    expected = reference(network, image)
    error = (network.dense(image) - expected).abs().max()
    assert error < 1e-5 * max(1, expected.abs().max())


@torch.inference_mode()
def test_dense_leaves_out_the_air(network: DNet):
    """A small ball costs less than half of its box; nothing at all costs next to nothing."""

    def operations(image: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            network.dense(image)
        return counter.get_total_flops()

    image = torch.randn(1, 2, *SHAPE)
    whole = operations(image)
    small = torch.from_numpy(ball(SHAPE, (12, 20, 16), 5))
    assert operations(image * small) < whole / 2
    assert operations(image * 0) < whole / 100


def test_extents_by_looking_at_every_voxel():
    torch.manual_seed(0)
    volume = (torch.rand(1, 1, 14, 10, 12) < 0.01).float()
    window = torch.ones(1, 1, 5, 5, 5)
    convolved = nn.functional.conv3d(nn.functional.pad(volume, (3,) * 6), window)
    pooled = nn.functional.max_pool3d(convolved, 2)
    extents = Extents.of(volume).padded(3).convolved(2)
    for found, features in ((extents, convolved), (extents.pooled(), pooled)):
        for x in range(features.shape[2]):
            y, z = found.rectangle(x, x + 1, features.shape[3:])
            places = features[0, 0, x].nonzero()
            if not len(places):
                assert y.start >= y.stop or z.start >= z.stop
                continue
            assert [y.start, z.start] == places.amin(0).tolist()
            assert [y.stop, z.stop] == (places.amax(0) + 1).tolist()


class OwnCell(nn.Module):
    """D-Net's geometry without its context: the highest value of each box."""

    def segment(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool3d(x[..., 26:-26, 26:-26, 26:-26], 4)

    def dense(self, x: Tensor) -> Tensor:
        return self.segment(nn.functional.pad(x, (26,) * 6))


@pytest.mark.parametrize("voxel", [(0, 0, 0), (3, 4, 7), (8, 11, 12), (13, 9, 14)])
@pytest.mark.parametrize("voxels_at_once", [10**7, 1])
def test_a_voxel_lights_its_own_cell(voxel: tuple[int, int, int], voxels_at_once: int):
    image = torch.zeros(1, 1, 14, 13, 15)
    image[(0, 0, *voxel)] = 1
    logits = ExactTiles(geometry(), voxels_at_once)(image, OwnCell())
    assert torch.nonzero(logits[0, 0]).tolist() == [[at // 4 for at in voxel]]
    full = repeated(logits, 4, image.shape[2:])
    assert full.shape == image.shape
    assert full[(0, 0, *voxel)] == 1
    x, y, z = (4 * (at // 4) for at in voxel)
    assert full.sum() == full[..., x : x + 4, y : y + 4, z : z + 4].sum()


class SmallMachine(OwnCell):
    """Runs out of memory as PyTorch does, above a number of voxels."""

    def __init__(self, voxels: int) -> None:
        super().__init__()
        self.voxels = voxels

    def segment(self, x: Tensor) -> Tensor:
        if x[0, 0].numel() > self.voxels:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")
        return super().segment(x)


def test_tiles_shrink_until_memory_is_enough():
    image = torch.rand(1, 1, 33, 30, 27)
    expected = ExactTiles(geometry())(image, OwnCell())
    assert torch.equal(ExactTiles(geometry())(image, SmallMachine(64**3)), expected)
    with pytest.raises(RuntimeError, match="can't allocate"):  # not even one box fits
        ExactTiles(geometry())(image, SmallMachine(50**3))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="channels"):
        ExactTiles(geometry())(torch.rand(1, 3, 8, 8, 8), DNet(in_channels=1).eval())


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


def test_geometry_of_an_input():
    assert geometry() == Geometry(halo=26, stride=4)
    assert geometry().output_side(68) == 4
    with pytest.raises(ValueError, match=r"expected 52 \+ a multiple of 4, found 70"):
        geometry().output_side(70)


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
    torch.testing.assert_close(Ensemble(members)(image), torch.stack(
        [member(image) for member in members]
    ).mean(0))  # fmt: skip


def test_half_precision_comes_back_as_float32():
    image = torch.randn(1, 4, 8, 8, 8)
    network = nn.Sequential(nn.Conv3d(4, 3, 3, padding=1), nn.Sigmoid())
    half = Ensemble([network], precision=torch.bfloat16)(image)
    whole = Ensemble([network])(image)
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, atol=0.02, rtol=0)


def test_an_ensemble_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """A device of which nothing fits the memory; the rest is real."""
    image = torch.randn(1, 1, 4, 4, 4)
    ensemble = Ensemble([Equivariant()])

    def full(device: object) -> Ensemble:
        if str(device) != "cpu":
            raise torch.OutOfMemoryError("out of memory")
        return ensemble

    monkeypatch.setattr(ensemble, "to", full)
    torch.testing.assert_close(ensemble.on(image, "cuda"), image.sigmoid())
