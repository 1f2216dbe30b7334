"""Building blocks of the networks.

Blocks that can be exchanged are passed as constructors: `norm(channels)`, `activation()` and
`downsampling(in_channels, out_channels)`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MakeNorm = Callable[[int], nn.Module]
MakeActivation = Callable[[], nn.Module]
MakeDownsampling = Callable[[int, int], nn.Module]


class Segmentation(NamedTuple):
    """The output in training of a network that has no other output.

    Attributes:
        logits: Segmentation on the network's own grid, with one channel for each region.
    """

    logits: Float[Tensor, "b r x y z"]


def widths(base: int, ratio: float, depth: int) -> list[int]:
    """Compute the filters of each level: `base * ratio**level`, rounded to a multiple of 8.

    Group norm with 8 groups needs multiples of 8. Networks with other norms have the same widths,
    so that norms are compared at equal size.

    >>> widths(8, 1.5, 4)
    [8, 16, 16, 24]
    """
    return [max(8, 8 * int(base * ratio**level / 8 + 0.5)) for level in range(depth)]


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that, like other norms, needs the number of channels only.

    Args:
        channels: Number of channels, a multiple of 8.
        groups: The largest number of groups.
        least_channels: The smallest number of channels in a group. The paper has 8 groups of 4
            channels on its finest level; 8 groups of the proxy's 8 channels would be instance norm,
            which removes the brightness of a patch.
    """

    def __init__(self, channels: int, groups: int = 8, least_channels: int = 4) -> None:
        super().__init__(min(groups, channels // least_channels), channels)


class StridedConv(nn.Conv3d):
    """Downsampling by a 3³ convolution of stride 2, as in Frey & Nau 2019."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, bias=False)


class PooledConv(nn.Sequential):
    """Downsampling by pooling, and a 3³ convolution on the coarse grid.

    It has as many parameters and convolves as many voxels as `StridedConv`, so that ways of
    downsampling are compared at equal cost.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        pool: Class of the pooling: `nn.MaxPool3d` or `nn.AvgPool3d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, pool: Callable[..., nn.Module] = nn.MaxPool3d
    ) -> None:
        super().__init__(
            # Half of an odd side is rounded up, as by the strided convolution.
            pool(2, ceil_mode=True),
            nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False),
        )


class ResidualBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016): norm, activation, 3³ convolution, twice.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; if they differ, a 1³ convolution is the shortcut.
        norm: Makes the normalisation of so many channels.
        activation: Makes the nonlinearity.
        padding: 1 keeps the size; 0 loses two voxels on each side.
        on_image: Whether the input is the image itself. Then the block starts with the convolution,
            because a norm would remove the image's brightness.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: MakeNorm,
        activation: MakeActivation,
        padding: int = 1,
        on_image: bool = False,
    ) -> None:
        super().__init__()
        before = () if on_image else (norm(in_channels), activation())
        self.body = nn.Sequential(
            *before,
            nn.Conv3d(in_channels, out_channels, 3, padding=padding, bias=False),
            norm(out_channels),
            activation(),
            nn.Conv3d(out_channels, out_channels, 3, padding=padding, bias=False),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)
        self.lost = 2 * (1 - padding)  # voxels, on each side

    def forward(self, x: Float[Tensor, "b i x y z"]) -> Float[Tensor, "b o x_ y_ z_"]:
        kept = (..., *(slice(self.lost, size - self.lost) for size in x.shape[2:]))
        return self.shortcut(x[kept]) + self.body(x)


class Upsample(nn.Module):
    """A 1³ convolution, then trilinear interpolation to the size of the finer level."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1, bias=False)

    def forward(
        self, x: Float[Tensor, "b i x y z"], size: tuple[int, ...]
    ) -> Float[Tensor, "b o x_ y_ z_"]:
        """Upsample to the sides `size` (X', Y', Z')."""
        return F.interpolate(self.conv(x), size, mode="trilinear", align_corners=False)


class Logits(nn.Conv3d):
    """1³ convolution to logits that start near a prior probability (Lin et al. 2017, section 3.3).

    If one voxel in a thousand is lesion, the network would otherwise spend the first hundred steps
    on learning how rare lesions are.

    Args:
        in_channels: Channels of the features.
        out_channels: Number of regions.
        prior: Probability that the untrained network gives to every voxel.
    """

    def __init__(self, in_channels: int, out_channels: int, prior: float) -> None:
        super().__init__(in_channels, out_channels, 1)
        assert self.bias is not None
        nn.init.constant_(self.bias, math.log(prior / (1 - prior)))
