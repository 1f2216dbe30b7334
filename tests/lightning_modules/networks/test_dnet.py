"""D-Net: its size, its receptive field, and its relation to the U-Net."""

import pytest
import torch
from torch import nn

from lightning_modules.networks.blocks import GroupNorm
from lightning_modules.networks.dnet import DNet
from lightning_modules.networks.unet import UNet3D


@pytest.mark.parametrize(("filters", "expected"), [(8, 124_057), (16, 494_769)])
def test_parameter_count(filters: int, expected: int):
    assert sum(p.numel() for p in DNet(filters=filters).parameters()) == expected


def test_receptive_field_is_56_and_68_give_4():
    network = DNet(filters=8).eval()
    image = torch.randn(1, 1, 68, 68, 68, requires_grad=True)
    logits = network(image).logits
    assert logits.shape == (1, 1, 4, 4, 4)
    for box in ((0, 0, 0), (3, 1, 2)):
        (gradient,) = torch.autograd.grad(logits[(0, 0, *box)], image, retain_graph=True)
        reached = gradient[0, 0].nonzero()
        # Max pooling passes on one gradient of eight: it reaches the border in some places only.
        low, high = reached.min(0).values, reached.max(0).values
        start = torch.tensor([4 * index for index in box])
        assert (low >= start).all()
        assert (high <= start + 55).all()
        assert (low - start).max() <= 3
        assert (start + 55 - high).max() <= 3


def test_receptive_field_is_exactly_56_without_pooling_by_the_maximum():
    """Average pooling passes on all gradients: they reach the whole field of 56³, and no more."""
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
    # Far enough from the border, features with and without padding are the same.
    image = torch.randn(1, 1, 80, 80, 80)
    with torch.no_grad():
        valid = small.eval().down(image)[-1]
        padded = large.eval().down(image)[2]
    # 80 - 52 = 28 voxels are 7 boxes, from box 26 / 4 = 6.5: the grids differ by half a box unless
    # the image is moved by two voxels.
    with torch.no_grad():
        moved = large.down(nn.functional.pad(image, (2, 2, 2, 2, 2, 2)))[2]
    assert valid.shape[2:] == (7, 7, 7)
    torch.testing.assert_close(valid, moved[..., 7:14, 7:14, 7:14], rtol=1e-4, atol=1e-5)
    assert padded.shape[2:] == (20, 20, 20)


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_untrained_logits_are_near_the_prior(prior: float):
    torch.manual_seed(0)
    logits = DNet(filters=8, prior=prior).segment(torch.randn(1, 1, 64, 64, 64))
    assert abs(logits.mean() - torch.logit(torch.tensor(prior))) < 0.5


@pytest.mark.parametrize("norm", [GroupNorm, nn.InstanceNorm3d])
def test_norms_with_statistics_of_the_whole_image_are_refused(norm: type[nn.Module]):
    with pytest.raises(ValueError, match="norm: D-Net needs one that treats every voxel alike"):
        DNet(norm=norm)


@pytest.mark.parametrize("patch_size", [70, (68, 68, 66)])
def test_patches_that_do_not_fill_whole_boxes_are_refused(patch_size: int | tuple[int, int, int]):
    with pytest.raises(ValueError, match=r"patch_size: expected 52 \+ a multiple of 4"):
        DNet(patch_size=patch_size)
