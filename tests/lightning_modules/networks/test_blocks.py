"""Building blocks: widths, groups, residuals, up- and downsampling."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_modules.networks.blocks import (
    Conv3d,
    GroupNorm,
    PooledConv,
    ResidualBlock,
    StridedConv,
    Upsample,
    widths,
)

DOWNSAMPLINGS = {
    "stride": StridedConv,
    "avg": partial(PooledConv, pool=nn.AvgPool3d),
    "max": partial(PooledConv, pool=nn.MaxPool3d),
}


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


def test_downsampling_choices_cost_the_same():
    sizes = {
        name: sum(p.numel() for p in make(8, 16).parameters())
        for name, make in DOWNSAMPLINGS.items()
    }
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


def test_a_block_without_padding_is_the_middle_of_a_padded_one():
    padded = ResidualBlock(8, 16, nn.BatchNorm3d, nn.ReLU).eval()
    valid = ResidualBlock(8, 16, nn.BatchNorm3d, nn.ReLU, padding=0).eval()
    valid.load_state_dict(padded.state_dict())
    x = torch.randn(1, 8, 9, 8, 7)
    with torch.no_grad():
        torch.testing.assert_close(valid(x), padded(x)[..., 2:-2, 2:-2, 2:-2])


def test_upsampling_of_a_ramp_is_a_ramp():
    up = Upsample(1, 1)
    nn.init.ones_(up.conv.weight)
    ramp = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 1, 4, 4, 4)
    fine = up(ramp, (8, 8, 8))[0, 0, :, 0, 0]
    torch.testing.assert_close(fine[1:-1], torch.arange(0.25, 3, 0.5)[: len(fine) - 2])


@pytest.mark.parametrize("sides", [(8, 8, 8), (7, 6, 5), (9, 4, 4)])
@pytest.mark.parametrize("options", [{"padding": 1}, {}, {"padding": 1, "stride": 2}])
def test_one_image_is_convolved_like_a_batch(
    sides: tuple[int, ...], options: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    """A batch of one is cut into halves; the oracle is PyTorch's convolution in float64."""
    conv = Conv3d(3, 5, 3, **options)
    image, like = torch.randn(1, 3, *sides), nn.Conv3d(3, 5, 3, **options).double()
    like.load_state_dict(conv.state_dict())
    batches = []
    convolve = torch.nn.functional.conv3d
    monkeypatch.setattr(
        torch.nn.functional, "conv3d", lambda x, *rest: batches.append(len(x)) or convolve(x, *rest)
    )
    results = []
    for layer, x in ((conv, image), (like, image.double())):
        x = x.clone().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        gradients = [x.grad, *(weight.grad for weight in layer.parameters())]
        results.append([t.float() for t in (y, *gradients) if t is not None])
    assert batches[0] == 2
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_group_norm_of_channels_last_has_the_gradient_of_pytorch(channels, dtype, tolerance):
    norm, oracle = GroupNorm(channels), nn.GroupNorm(channels // 4, channels).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    oracle.load_state_dict(norm.state_dict())
    image = (2 + 3 * torch.randn(2, channels, 5, 6, 7)).to(dtype)
    image = image.contiguous(memory_format=torch.channels_last_3d)
    weights = torch.randn(image.shape)
    results = []
    for layer, x in ((norm, image), (oracle, image.double())):
        x = x.clone().requires_grad_()
        y = layer(x)
        (y.float() * weights).sum().backward()
        gradients = [x.grad, layer.weight.grad, layer.bias.grad]
        assert y.dtype == x.dtype
        results.append([t.float() for t in (y, *gradients) if t is not None])
    assert "_ChannelsLastGroupNorm" in type(norm(image.requires_grad_()).grad_fn).__name__
    assert [len(found) for found in results] == [4, 4]
    for ours, expected in zip(*results, strict=True):
        # Of the largest value, as a bfloat16 has eight bits and gradients cancel.
        difference = (ours - expected).abs().max() / expected.abs().max()
        assert difference < tolerance
