"""Shapes, pinned sizes, gradients, numerical safety; every choice of every part."""

from functools import partial
from itertools import product

import pytest
import torch
from monai.networks.nets.segresnet import SegResNet
from torch import nn

from lightning_modules.losses import gaussian_kl, reconstruction_l2
from lightning_modules.networks import AEUNet, DNet, UNet3D
from lightning_modules.networks.blocks import (
    GroupNorm,
    PooledConv,
    ResidualBlock,
    StridedConv,
    Upsample,
    widths,
)

NORMS = {"group": GroupNorm, "batch": nn.BatchNorm3d, "instance": nn.InstanceNorm3d}
DOWNSAMPLINGS = {
    "stride": StridedConv,
    "avg": partial(PooledConv, pool=nn.AvgPool3d),
    "max": partial(PooledConv, pool=nn.MaxPool3d),
}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("base", "ratio", "depth", "expected"),
    [
        (32, 2, 4, [32, 64, 128, 256]),
        (16, 1.5, 4, [16, 24, 40, 56]),  # 36 and 54 are no multiples of 8
        (8, 1.5, 4, [8, 16, 16, 24]),
        (8, 1, 3, [8, 8, 8]),
        (8, 2.5, 3, [8, 24, 48]),
    ],
)
def test_widths(base: int, ratio: float, depth: int, expected: list[int]):
    assert widths(base, ratio, depth) == expected


@pytest.mark.parametrize(
    ("filters", "patch_size", "expected"), [(8, 80, 2_051_439), (32, 80, 20_889_399)]
)
def test_parameter_count(filters: int, patch_size: int, expected: int):
    assert parameters(AEUNet(filters=filters, patch_size=patch_size)) == expected


@pytest.mark.parametrize(
    ("network", "filters", "expected"),
    [(DNet, 8, 124_057), (DNet, 16, 494_769), (UNet3D, 8, 2_534_361)],
)
def test_parameter_count_of_detectors(network: type, filters: int, expected: int):
    assert parameters(network(filters=filters)) == expected


def test_receptive_field_of_dnet_is_56_and_68_give_4():
    network = DNet(filters=8).eval()
    image = torch.randn(1, 1, 68, 68, 68, requires_grad=True)
    logits = network(image).logits
    assert logits.shape == (1, 1, 4, 4, 4)
    for box in ((0, 0, 0), (3, 1, 2)):
        (gradient,) = torch.autograd.grad(logits[(0, 0, *box)], image, retain_graph=True)
        reached = gradient[0, 0].nonzero()
        # Max pooling passes one of eight on: the border is not reached everywhere, but somewhere.
        low, high = reached.min(0).values, reached.max(0).values
        start = torch.tensor([4 * at for at in box])
        assert (low >= start).all()
        assert (high <= start + 55).all()
        assert (low - start).max() <= 3
        assert (start + 55 - high).max() <= 3


def test_receptive_field_of_dnet_is_exactly_56_without_pooling_by_the_maximum():
    """Average pooling passes everything on: the whole field of 56³ is reached, no more."""
    network = DNet(filters=8, activation=nn.Identity).eval()
    for level in list(network.down.levels)[1:]:
        level[0] = nn.AvgPool3d(2)  # pyright: ignore[reportIndexIssue]
    image = torch.randn(1, 1, 68, 68, 68, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(image).logits[0, 0, 1, 0, 3], image)
    reached = gradient[0, 0].nonzero()
    assert reached.min(0).values.tolist() == [4, 0, 12]
    assert reached.max(0).values.tolist() == [59, 55, 67]


def test_dnet_is_the_first_three_levels_of_the_unet():
    small, large = DNet(filters=8, norm=nn.BatchNorm3d), UNet3D(filters=8, norm=nn.BatchNorm3d)
    ours, theirs = small.down.state_dict(), large.down.state_dict()
    kept = {name: value.shape for name, value in theirs.items() if name.split(".")[1] in "012"}
    assert {name: value.shape for name, value in ours.items()} == kept
    small.down.load_state_dict({name: theirs[name] for name in kept})
    # Inside the halo, with and without padding are the same.
    image = torch.randn(1, 1, 80, 80, 80)
    with torch.no_grad():
        valid = small.eval().down(image)[-1]
        padded = large.eval().down(image)[2]
    # 80 - 52 = 28 voxels, 7 boxes, from box 26 / 4 = 6.5: the grids differ by half a box unless
    # the image is moved by two voxels.
    with torch.no_grad():
        moved = large.down(nn.functional.pad(image, (2, 2, 2, 2, 2, 2)))[2]
    assert valid.shape[2:] == (7, 7, 7)
    torch.testing.assert_close(valid, moved[..., 7:14, 7:14, 7:14], rtol=1e-4, atol=1e-5)
    assert padded.shape[2:] == (20, 20, 20)


@pytest.mark.parametrize(("norm", "activation"), list(product(NORMS, [nn.ReLU, nn.LeakyReLU])))
def test_every_weight_of_the_unet_learns(norm: str, activation: type[nn.Module]):
    network = UNet3D(filters=8, depth=3, norm=NORMS[norm], activation=activation)
    network(torch.randn(2, 1, 16, 16, 16)).logits.square().mean().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_segmentation_part_is_as_large_as_monais():
    """MONAI's SegResNet is the same network by other hands, but for its biased norm-free stem."""
    network = AEUNet(filters=8, patch_size=16)
    ours = parameters(network.encoder) + parameters(network.decoder)
    assert ours == parameters(SegResNet(init_filters=8, in_channels=4, out_channels=3))


@pytest.mark.parametrize(
    ("norm", "downsampling", "ratio", "depth"),
    [
        (*choice, *size)
        for choice, size in product(product(NORMS, DOWNSAMPLINGS), [(1.5, 3), (2, 4)])
    ],
)
def test_every_choice_runs_and_every_weight_learns(
    norm: str, downsampling: str, ratio: float, depth: int
):
    network = AEUNet(
        filters=8,
        patch_size=(32, 16, 16),  # of a cube of 16, depth 4 leaves one voxel: constant, no gradient
        ratio=ratio,
        depth=depth,
        bottleneck=4,
        norm=partial(NORMS[norm], affine=True) if norm == "instance" else NORMS[norm],
        downsampling=DOWNSAMPLINGS[downsampling],
    )
    image = torch.randn(2, 4, 32, 16, 16)
    output = network(image)
    assert output.logits.shape == (2, 3, 32, 16, 16)
    assert output.reconstruction.shape == image.shape
    assert output.latent.mean.shape == output.latent.log_variance.shape == (2, 4)
    (output.logits.square().mean() + reconstruction_l2(output.reconstruction, image)).backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_autoencoder_has_its_own_decoder():
    """MONAI's SegResNetVAE reconstructs with the decoder of the segmentation; figure 1 does not."""
    network = AEUNet(filters=8, patch_size=16, bottleneck=4)
    network(torch.randn(1, 4, 16, 16, 16)).reconstruction.sum().backward()
    assert all(p.grad is None for p in network.decoder.parameters())
    assert all(p.grad is not None for p in network.autoencoder.parameters())


def test_segment_is_the_logits_without_the_autoencoder():
    network = AEUNet(filters=8, patch_size=16, bottleneck=4).eval()
    image = torch.randn(1, 4, 16, 16, 16)
    called = []
    for part in (network.bottleneck, network.autoencoder):
        part.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        logits = network.segment(image)
        assert not called
        torch.testing.assert_close(logits, network(image).logits, rtol=0, atol=0)


@pytest.mark.parametrize("side", [8, 24, 40])
def test_any_size_that_the_depth_divides(side: int):
    network = AEUNet(filters=8, patch_size=(side, 16, 8), bottleneck=4)
    image = torch.randn(2, 4, side, 16, 8)  # two: one is slow on a CPU
    assert network(image).reconstruction.shape == image.shape
    assert network.segment(torch.randn(1, 4, 16, 8, 32)).shape == (1, 3, 16, 8, 32)


def test_a_size_that_the_depth_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="patch_size: 20x20x20 is not divisible by 8"):
        AEUNet(patch_size=20)


def test_downsampling_choices_cost_the_same():
    sizes = {name: parameters(make(8, 16)) for name, make in DOWNSAMPLINGS.items()}
    assert len(set(sizes.values())) == 1
    halves = {
        tuple(make(8, 16)(torch.randn(1, 8, 8, 9, 10)).shape) for make in DOWNSAMPLINGS.values()
    }
    assert halves == {(1, 16, 4, 5, 5)}


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 2), (16, 4), (24, 6), (32, 8), (40, 8), (56, 8), (256, 8)]
)
def test_groups_have_at_least_four_channels(channels: int, groups: int):
    norm = GroupNorm(channels)
    assert norm.num_groups == groups
    assert channels % groups == 0
    x = 5 + 3 * torch.randn(2, channels, 4, 4, 4)
    torch.testing.assert_close(norm(x), nn.GroupNorm(groups, channels)(x))


def test_residual_block_is_the_identity_without_its_convolutions():
    block = ResidualBlock(8, 8, GroupNorm, nn.ReLU)
    for module in block.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.zeros_(module.weight)
    x = torch.randn(1, 8, 4, 4, 4)
    torch.testing.assert_close(block(x), x)


def test_activations_in_place_leave_the_skips_alone():
    """The block's first norm must copy: an in-place activation of `x` would corrupt the sum."""
    block = ResidualBlock(8, 8, GroupNorm, partial(nn.LeakyReLU, inplace=True))
    plain = ResidualBlock(8, 8, GroupNorm, partial(nn.LeakyReLU, inplace=False))
    plain.load_state_dict(block.state_dict())
    x = torch.randn(1, 8, 4, 4, 4)
    torch.testing.assert_close(block(x.clone()), plain(x))


def test_upsampling_of_a_ramp_is_a_ramp():
    up = Upsample(1, 1)
    nn.init.ones_(up.conv.weight)
    ramp = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 1, 4, 4, 4)
    fine = up(ramp, (8, 8, 8))[0, 0, :, 0, 0]
    torch.testing.assert_close(fine[1:-1], torch.arange(0.25, 3, 0.5)[: len(fine) - 2])


def test_latent_samples_follow_the_posterior():
    network = AEUNet(filters=8, patch_size=8, bottleneck=4).eval()
    image = torch.randn(1, 4, 8, 8, 8)
    nn.init.zeros_(network.bottleneck.posterior.weight)
    with torch.no_grad():
        network.bottleneck.posterior.bias[4:] = -1e9  # log-variance at its lower bound
        calm = [network(image).reconstruction for _ in range(2)]
        network.bottleneck.posterior.bias[4:] = 4.0
        noisy = [network(image).reconstruction for _ in range(2)]
    spread = [(pair[0] - pair[1]).abs().mean() for pair in (calm, noisy)]
    assert spread[1] > 10 * spread[0]


def test_log_variance_stays_bounded_and_training_finite():
    """At this learning rate an unbounded log-variance ends in NaN within a few steps."""
    torch.manual_seed(0)
    network = AEUNet(filters=8, patch_size=16, bottleneck=16)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(15):
        image = 100 * torch.randn(2, 4, 16, 16, 16)
        output = network(image)
        loss = reconstruction_l2(output.reconstruction, image) + 100 * gaussian_kl(
            output.latent, voxels=1
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        assert output.latent.log_variance.abs().max() <= 10


def test_bottleneck_is_single_precision_under_autocast():
    network = AEUNet(filters=8, patch_size=16, bottleneck=4)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(torch.randn(1, 4, 16, 16, 16))
    assert output.latent.mean.dtype == output.latent.log_variance.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_detectors_start_from_the_prior(prior: float):
    torch.manual_seed(0)
    for network in (UNet3D(filters=8, prior=prior), DNet(filters=8, prior=prior)):
        logits = network.segment(torch.randn(1, 1, 64, 64, 64))
        expected = torch.logit(torch.tensor(prior))
        assert abs(logits.mean() - expected) < 0.5
