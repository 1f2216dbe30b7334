"""AE-U-Net: its size, every choice of its parts, its gradients and its numerical safety."""

from functools import partial
from itertools import product

import pytest
import torch
from monai.networks.nets.segresnet import SegResNet
from torch import nn

from lightning_modules.losses import gaussian_kl, reconstruction_l2
from lightning_modules.networks.aeunet import AEUNet
from lightning_modules.networks.blocks import GroupNorm, PooledConv, StridedConv

NORMS = {"group": GroupNorm, "batch": nn.BatchNorm3d, "instance": nn.InstanceNorm3d}
DOWNSAMPLINGS = {
    "stride": StridedConv,
    "avg": partial(PooledConv, pool=nn.AvgPool3d),
    "max": partial(PooledConv, pool=nn.MaxPool3d),
}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("filters", "expected"), [(8, 2_051_439), (32, 20_889_399)])
def test_parameter_count(filters: int, expected: int):
    assert parameters(AEUNet(filters=filters, patch_size=80)) == expected


def test_segmentation_part_is_as_large_as_monais():
    """MONAI's SegResNet is an independent implementation of the same network."""
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
        # A cube of 16 would be one voxel on the fourth level, whose norm has no gradient.
        patch_size=(32, 16, 16),
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


def test_dropout_zeroes_whole_channels_in_training_only():
    """Spatial dropout after the first convolution, as in Myronenko 2018."""
    network = AEUNet(filters=32, patch_size=16, bottleneck=4, dropout=0.2)
    image = torch.randn(8, 4, 16, 16, 16)
    convolved = network.encoder.down[0](image)
    seen: list[torch.Tensor] = []
    network.encoder.levels[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    network(image)
    dropped = (seen[0] == 0).flatten(2).all(-1)
    assert 0.1 < dropped.float().mean() < 0.3  # of 256 channels
    kept = ~dropped[..., None, None, None]
    torch.testing.assert_close(seen[0], kept * convolved / 0.8)
    network.eval()
    network.segment(image)
    torch.testing.assert_close(seen[1], convolved, rtol=0, atol=0)


def test_dropout_of_0_draws_nothing_and_has_no_weights():
    networks = []
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        networks.append(AEUNet(filters=8, patch_size=16, bottleneck=4, dropout=rate))
    without, with_dropout = (network.state_dict() for network in networks)
    assert list(without) == list(with_dropout)
    assert all(torch.equal(without[name], with_dropout[name]) for name in without)
    before = torch.get_rng_state()
    networks[0].encoder(torch.randn(1, 4, 16, 16, 16, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_autoencoder_has_its_own_decoder():
    """Figure 1 has two decoders; MONAI's SegResNetVAE has one for segmentation and input."""
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
    image = torch.randn(2, 4, side, 16, 8)  # a batch of one would be slow on a CPU
    assert network(image).reconstruction.shape == image.shape
    assert network.segment(torch.randn(1, 4, 16, 8, 32)).shape == (1, 3, 16, 8, 32)


@pytest.mark.parametrize("depth", [1, 7])
def test_a_depth_out_of_range_is_refused(depth: int):
    with pytest.raises(ValueError, match=f"depth: expected 2 to 6 levels, got {depth}"):
        AEUNet(depth=depth)


def test_a_size_that_the_depth_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="patch_size: 20x20x20 is not divisible by 8"):
        AEUNet(patch_size=20)


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


@pytest.mark.process
def test_log_variance_stays_bounded_and_training_finite():
    """At this learning rate, an unbounded log-variance would end in NaN within a few steps."""
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
