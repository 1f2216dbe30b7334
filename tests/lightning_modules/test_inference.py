"""Inference on whole volumes: exact for every shape and tile, on the right voxels; ensembles."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from weakref import WeakSet

import pytest
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from lightning_modules.inference import (
    Ensemble,
    ExactTiles,
    Flip,
    Inference,
    SlidingWindow,
    WholeVolume,
    boxes_around,
    everywhere,
    halved,
    repeated,
    tile_starts,
)
from lightning_modules.networks.aeunet import AEUNet
from lightning_modules.networks.background import features_against_background
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


@torch.inference_mode()
def test_air_has_the_same_logits_in_one_pass_and_in_tiles(dnet: DNet):
    """The air next to the brain sees it, and is not computed all the same."""
    image = torch.zeros(2, 2, 24, 20, 16)
    image[:, :, 9:14, 5:12, 3:9] = torch.randn(2, 2, 5, 7, 6)
    one, tiled = (ExactTiles(GEOMETRY, n).coarse(image, dnet) for n in (IN_ONE_PASS, IN_TILES))
    torch.testing.assert_close(one, tiled, rtol=1e-4, atol=1e-5)
    air = torch.ones(one.shape[2:], dtype=torch.bool)
    air[2:4, 1:3, 0:3] = False
    # All features of air have the same bits. The head takes rows of boxes at once, and processors
    # with wide vectors round the last ones of a row in another way.
    features = features_against_background(dnet.down.levels, image, *GEOMETRY)[..., air]
    assert (features == features[:1, :, :1]).all()
    in_air = one[..., air]
    torch.testing.assert_close(in_air, in_air[..., :1].expand_as(in_air), rtol=2e-7, atol=0)


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


FLIPS = [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]


@pytest.fixture(scope="module")
def padded() -> AEUNet:
    """A network that pads, whose output hangs on all of its input by group norm."""
    torch.manual_seed(0)
    return AEUNet(2, 3, 16, 8, depth=3, bottleneck=4).eval()


def by_monai(image: Tensor, network: nn.Module, overlap: float, batch_size: int = 4) -> Tensor:
    return sliding_window_inference(  # pyright: ignore[reportReturnType]
        image, 16, batch_size, network.segment, overlap, mode="gaussian"
    )


@pytest.mark.parametrize("shape", [(16, 21, 35), (9, 16, 20), (7, 5, 11)])
@pytest.mark.parametrize("overlap", [0.5, 0.1])
@torch.inference_mode()
def test_windows_are_those_of_monai_to_the_bit(
    padded: AEUNet, shape: tuple[int, ...], overlap: float
):
    image = torch.randn(2, 2, *shape)  # two volumes, so that no batch has one window
    expected = by_monai(image, padded, overlap)
    for batch_size in (1, 3, 4):
        assert torch.equal(SlidingWindow(16, overlap, batch_size)(image, padded), expected)


@torch.inference_mode()
def test_flips_share_batches_and_are_those_of_whole_volumes_to_the_bit(padded: AEUNet):
    """The windows of a mirror image lie elsewhere: 23 voxels are not 16 and a multiple of 8."""
    image = torch.randn(1, 2, 16, 18, 23)
    found = list(SlidingWindow(16).estimates(image, padded, everywhere(image), FLIPS))
    assert len(found) == 8
    for flip, logits in zip(FLIPS, found, strict=True):
        assert torch.equal(logits, by_monai(image.flip(flip), padded, 0.5).flip(flip))
    network = Recorder()
    list(SlidingWindow(16, batch_size=5).estimates(image, network, everywhere(image), FLIPS))
    assert [shape[0] for shape in network.shapes] == [5] * 6 + [2]  # 8 times 1 x 2 x 2 windows


@torch.inference_mode()
def test_air_is_computed_once_and_changes_no_bit(padded: AEUNet):
    image = torch.randn(1, 2, 16, 16, 80)
    image[..., 8:48] = 0
    image[0, 0, 3, 4, 70:] = 0  # one of two channels: no air
    for flips in ([()], FLIPS):
        found = list(
            SlidingWindow(16, batch_size=3).estimates(image, padded, everywhere(image), flips)
        )
        for flip, logits in zip(flips, found, strict=True):
            assert torch.equal(logits, by_monai(image.flip(flip), padded, 0.5, 3).flip(flip))
    network = Recorder()
    SlidingWindow(16, batch_size=3)(image, network)  # nine windows, of which four are air
    assert [shape[0] for shape in network.shapes] == [3, 3]
    network = Recorder()
    list(SlidingWindow(16, batch_size=3).estimates(image, network, everywhere(image), FLIPS))
    assert sum(shape[0] for shape in network.shapes) == 8 * 5 + 1


def random_boxes(shape: Sequence[int], count: int, seed: int) -> Tensor:
    """Make candidates (1, X, Y, Z) in a few small boxes."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    for _ in range(count):
        start = [int(torch.randint(side - 3, (), generator=generator)) for side in shape]
        mask[(0, *(slice(first, first + 3) for first in start))] = True
    return mask


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_candidates_have_the_logits_of_all_windows(padded: AEUNet, seed: int):
    image = torch.randn(1, 2, 24, 30, 50)
    candidates = random_boxes(image.shape[2:], 1 + seed % 2, seed)
    inference = SlidingWindow(16)
    expected = inference.estimates(image, padded, everywhere(image), FLIPS[::3])
    found = inference.estimates(image, padded, candidates, FLIPS[::3])
    for some, all_of_them in zip(found, expected, strict=True):
        assert some.isfinite().all()
        assert torch.equal(some[:, :, candidates[0]], all_of_them[:, :, candidates[0]])
        assert not torch.equal(some, all_of_them)  # windows have been left out


def test_only_windows_with_candidates_are_computed():
    network, image = Recorder(), torch.randn(1, 1, 8, 8, 24)
    candidates = torch.zeros(1, 8, 8, 24, dtype=torch.bool)
    inference = SlidingWindow(8, overlap=0.5)  # from voxels 0, 4, 8, 12 and 16
    candidates[0, 3, 3, 9] = True  # in those from 4 and 8
    inference.within(image, network, candidates)
    assert network.shapes == [(2, 1, 8, 8, 8)]
    assert inference.share(candidates) == 2 / 5
    candidates[0, 0, 0, 23] = True  # and in the last
    assert inference.share(candidates) == 3 / 5
    assert inference.share(everywhere(image)) == 1
    assert inference.share(candidates.repeat(2, 1, 1, 1)) == 3 / 5


def boxes_of(*ends: tuple[int, int, int, int, int, int]) -> list[tuple[slice, ...]]:
    return [tuple(slice(*box[n : n + 2]) for n in (0, 2, 4)) for box in ends]


def test_boxes_lie_around_components_and_do_not_overlap():
    mask = torch.zeros(20, 40, 30, dtype=torch.bool)
    mask[3, 5, 7] = mask[19, 39, 29] = True
    corner = (19, 20, 39, 40, 29, 30)
    assert boxes_around(mask, 1, 1) == boxes_of((3, 4, 5, 6, 7, 8), corner)
    # Grown on both ends, moved inwards at the border, and never larger than the volume.
    grown = (0, 10, 1, 11, 3, 13), (10, 20, 30, 40, 20, 30)
    assert boxes_around(mask, 9, 5) == boxes_of(*grown)
    assert boxes_around(mask[:, :12], 16, 8) == boxes_of((0, 16, 0, 12, 0, 16))
    mask[5, 8, 10] = True  # the box of 8 around it overlaps with that of the first
    first, last = boxes_around(mask, 8, 8)
    assert last == boxes_of((12, 20, 32, 40, 22, 30))[0]
    assert all(
        box.start <= low and high < box.stop
        for box, (low, high) in zip(first, ((3, 5), (5, 8), (7, 10)), strict=True)
    )
    assert boxes_around(torch.ones(3, 4, 5, dtype=torch.bool), 64, 32) == boxes_of(
        (0, 3, 0, 4, 0, 5)
    )
    assert boxes_around(torch.zeros(3, 4, 5, dtype=torch.bool), 64, 32) == []


@torch.inference_mode()
def test_a_whole_volume_is_cut_to_boxes_around_candidates():
    """A network that looks at one voxel has the same logits, inside boxes."""
    network, image = Recorder(), torch.randn(2, 3, 70, 40, 96)
    network.divisor = 16
    inference = WholeVolume(least_side=20)
    candidates = torch.zeros(2, 70, 40, 96, dtype=torch.bool)
    candidates[1, 60, 2, 90] = candidates[1, 5, 5, 5] = True
    logits = inference.within(image, network, candidates)
    assert network.shapes == [(1, 3, 32, 32, 32)] * 2
    assert logits.shape == (2, 1, 70, 40, 96)
    torch.testing.assert_close(logits[:, 0][candidates], 2 * image[:, 0][candidates])
    assert inference.share(candidates) == 2 * 32**3 / (2 * 70 * 40 * 96)
    assert inference.share(everywhere(image)) == 1
    candidates[:, ::20, ::10, ::20] = True  # boxes that together are no smaller than the volumes
    assert inference.share(candidates) == 1
    inference.within(image, network, candidates)
    assert network.shapes[2:] == [(2, 3, 80, 48, 96)]


@pytest.mark.parametrize("voxels_at_once", [IN_ONE_PASS, IN_TILES])
@torch.inference_mode()
def test_candidates_have_the_logits_of_exact_tiles(dnet: DNet, voxels_at_once: int):
    image = torch.randn(1, 2, 70, 66, 130)
    candidates = random_boxes(image.shape[2:], 1, seed=1)
    inference = ExactTiles(GEOMETRY, voxels_at_once)
    assert 0 < inference.share(candidates) < 1
    expected = ExactTiles(GEOMETRY)(image, dnet)
    found = inference.within(image, dnet, candidates)
    assert found.shape == expected.shape
    some, all_of_them = (logits[:, :, candidates[0]] for logits in (found, expected))
    assert (some - all_of_them).abs().max() < 1e-5 * max(1, float(all_of_them.abs().max()))
    assert inference.share(everywhere(image)) == 1


INFERENCES: dict[str, Inference] = {
    "sliding window": SlidingWindow(8),
    "whole volume": WholeVolume(),
    "exact tiles": ExactTiles(GEOMETRY),
    "small tiles": ExactTiles(GEOMETRY, voxels_at_once=1),
}


class HalfPrecision(OwnBox):
    divisor = 1

    def segment(self, x: Tensor) -> Tensor:
        return (super().segment(x) if min(x.shape[2:]) > 52 else x[:, :1]).bfloat16()


@pytest.mark.parametrize("inference", INFERENCES.values(), ids=INFERENCES.keys())
def test_logits_of_half_precision_are_added_and_returned_in_float32(inference: Inference):
    image = torch.rand(1, 1, 9, 8, 12)
    logits = inference(image, HalfPrecision())
    assert logits.dtype == torch.float32
    if isinstance(inference, SlidingWindow):  # no sum is rounded to half precision
        torch.testing.assert_close(logits, image.bfloat16().float(), rtol=1e-6, atol=0)


class Module(nn.Module):
    """Takes the part of a `SegmentationModule`: `forward` returns probabilities of volumes."""

    def estimates(
        self, image: Tensor, candidates: Tensor, flips: Sequence[Flip]
    ) -> Iterator[Tensor]:
        for flip in flips:
            yield self(image.flip(flip)).flip(flip)

    def share(self, candidates: Tensor) -> float:
        return float(candidates.float().mean())


class Equivariant(Module):
    """Looks at every voxel by itself: flips with the image."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, :1].sigmoid()


class Leaning(Module):
    """Looks to one side, along one axis: does not flip with the image."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.cumsum(self.axis).sigmoid()


def test_an_ensemble_predicts_nothing_where_there_is_no_candidate():
    image = torch.randn(1, 1, 4, 5, 6)
    candidates = torch.zeros(1, 4, 5, 6, dtype=torch.bool)
    candidates[0, 1:3, 2, 3:] = True
    ensemble = Ensemble([Leaning(2), Leaning(4)], flip_axes=(0, 2))
    expected = torch.where(candidates[:, None], ensemble(image), 0.0)
    assert torch.equal(ensemble.within(image, candidates).probabilities, expected)
    assert torch.equal(ensemble.computed_on(image, candidates, "cpu").probabilities, expected)
    assert ensemble.share(candidates) == pytest.approx(6 / 120)


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


class Fixed(Module):
    """Predicts the same for every image."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.probabilities = probabilities

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.probabilities.clone()


def test_agreement_is_the_dice_of_pairs_by_hand():
    masks = torch.zeros(3, 1, 2, 2, 2, 2)
    masks[0, 0, 0, 0], masks[1, 0, 0, 0, 0], masks[2, 0, 0, :, 0] = 1, 1, 1  # 4, 2 and 4 voxels
    masks[:, 0, 1] = 1  # the second region is all of the volume, for all of them
    image = torch.randn(1, 1, 2, 2, 2)

    def agreement(estimates: torch.Tensor) -> list[float]:
        ensemble = Ensemble([Fixed(estimate) for estimate in estimates])
        return ensemble.within(image, everywhere(image)).agreement[0].tolist()

    # Any two of the three masks share two voxels.
    dice = 2 * (2 + 2 + 2) / ((4 + 2) + (4 + 4) + (2 + 4))
    assert agreement(masks) == [pytest.approx(dice), pytest.approx(1)]
    # Who doubts does not agree, not even with somebody who has the same doubts.
    assert agreement(0.5 * masks) == [pytest.approx(0.5 * dice), pytest.approx(0.5)]
    assert all(map(math.isnan, agreement(masks[:1])))  # there is no other to compare with
    assert all(map(math.isnan, agreement(0 * masks)))


def test_two_networks_and_their_mirror_images_agree_as_all_pairs_do_among_candidates():
    torch.manual_seed(1)
    image = torch.randn(2, 1, 4, 5, 6)
    candidates = torch.rand(2, 4, 5, 6) > 0.3
    members = [Leaning(2), Leaning(4)]
    estimates = [
        member(image.flip(axes)).flip(axes) * candidates[:, None]
        for member in members
        for axes in ([], [2], [4], [2, 4])
    ]
    found = Ensemble(members, flip_axes=(0, 2)).within(image, candidates)
    for item in range(2):
        pairs = [(a[item], b[item]) for a, b in combinations(estimates, 2)]
        shared = sum(float((a * b).sum()) for a, b in pairs)
        total = sum(float((a + b).sum()) for a, b in pairs)
        assert found.agreement[item].tolist() == [pytest.approx(2 * shared / total)]
    assert found.agreement[0] != found.agreement[1]


def test_no_estimate_is_kept():
    alive: WeakSet[torch.Tensor] = WeakSet()
    most = 0

    class Counted(Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            nonlocal most
            estimate = image.sigmoid()
            alive.add(estimate)
            most = max(most, len(alive))
            return estimate

    image = torch.randn(1, 1, 4, 4, 4)
    Ensemble([Counted() for _ in range(9)]).within(image, everywhere(image))
    assert most <= 3  # the sum, the last one and the next


class Convolution(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(4, 3, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image).sigmoid()


def test_half_precision_comes_back_as_float32():
    image = torch.randn(1, 4, 8, 8, 8)
    network = Convolution()
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
    found = ensemble.computed_on(image, everywhere(image), "cuda").probabilities
    torch.testing.assert_close(found, image.sigmoid())
