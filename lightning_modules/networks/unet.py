"""3-D residual U-Net, the baseline of Krivov & Belyaev 2018 (section 2.1)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.networks.blocks import (
    GroupNorm,
    Logits,
    MakeActivation,
    MakeNorm,
    ResidualBlock,
    Upsample,
    widths,
)

# Residual blocks of each level, fine to coarse. Two 3³ convolutions each; the first three levels
# are D-Net's, whose 68³ input and 4³ output fix them: 2 + 2 * 4 + 4 * 4 = 26 voxels of halo.
BLOCKS_PER_LEVEL = (1, 2, 2, 2, 2)


class Segmentation(NamedTuple):
    """What training needs of a network that only segments.

    Attributes:
        logits: (B, R, X', Y', Z'), one channel a region.
    """

    logits: Tensor


class ContractingPath(nn.Module):
    """Residual blocks, with max pooling between the levels.

    Args:
        in_channels: Of the image.
        filters: Of each level, fine to coarse.
        norm, activation: Make the parts.
        padding: 1 keeps the size within a level, 0 loses a voxel a side and convolution.
    """

    def __init__(
        self,
        in_channels: int,
        filters: Sequence[int],
        norm: MakeNorm,
        activation: MakeActivation,
        padding: int,
    ) -> None:
        super().__init__()
        levels = []
        channels = in_channels
        for width, blocks in zip(filters, BLOCKS_PER_LEVEL, strict=False):
            level: list[nn.Module] = [nn.MaxPool3d(2)] if levels else []
            for _ in range(blocks):
                on_image = not levels and not level
                level.append(ResidualBlock(channels, width, norm, activation, padding, on_image))
                channels = width
            levels.append(nn.Sequential(*level))
        self.levels = nn.ModuleList(levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of every level, fine to coarse."""
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


class UNet3D(nn.Module):
    """U-Net of pre-activation residual blocks, zero padded, five levels (section 2.1).

    The upward path interpolates (1³ convolution, trilinear), concatenates the skip (Çiçek et al.
    2016) and runs one residual block a level.

    Args:
        in_channels: Modalities stacked as channels.
        out_channels: Regions, each with its own sigmoid.
        filters: Filters of the finest level.
        ratio: Filters of a level over those of the next finer one.
        depth: Levels.
        norm, activation: Make the parts.
        prior: Probability that the untrained network gives to every voxel: lesions are rare.

    Raises:
        ValueError: The depth is out of range.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        filters: int = 16,
        ratio: float = 2,
        depth: int = 5,
        norm: MakeNorm = GroupNorm,
        activation: MakeActivation = nn.LeakyReLU,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        if not 2 <= depth <= len(BLOCKS_PER_LEVEL):
            raise ValueError(f"depth: expected 2 to {len(BLOCKS_PER_LEVEL)} levels, got {depth}")
        self.divisor = 2 ** (depth - 1)
        self.widths = widths(filters, ratio, depth)
        self.down = ContractingPath(in_channels, self.widths, norm, activation, padding=1)
        coarse_to_fine = self.widths[::-1]
        self.up = nn.ModuleList(Upsample(*pair) for pair in pairwise(coarse_to_fine))
        self.levels = nn.ModuleList(
            ResidualBlock(2 * width, width, norm, activation, padding=1)
            for width in coarse_to_fine[1:]
        )
        self.head = nn.Sequential(
            norm(self.widths[0]), activation(), Logits(self.widths[0], out_channels, prior)
        )

    def forward(self, x: Tensor) -> Segmentation:
        """Segment patches (B, C, X, Y, Z) of sizes that the depth divides."""
        return Segmentation(self.segment(x))

    def segment(self, x: Tensor) -> Tensor:
        """Logits (B, R, X, Y, Z)."""
        x, *skips = reversed(self.down(x))
        for up, level, skip in zip(self.up, self.levels, skips, strict=True):
            x = level(torch.cat([skip, up(x, skip.shape[2:])], dim=1))
        return self.head(x)
