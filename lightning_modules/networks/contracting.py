"""The contracting path that D-Net and its U-Net baseline share (Krivov & Belyaev 2018)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.networks.blocks import MakeActivation, MakeNorm, ResidualBlock

# Residual blocks of each level, fine to coarse, with two 3³ convolutions each. D-Net's 68³ input
# and 4³ output fix the first three levels: 2 + 2 * 4 + 4 * 4 = 26 voxels of halo.
BLOCKS_PER_LEVEL = (1, 2, 2, 2, 2)


class ContractingPath(nn.Module):
    """Residual blocks, with max pooling between the levels.

    Args:
        in_channels: Channels of the image.
        filters: Filters of each level, fine to coarse.
        norm: Makes the normalisation of so many channels.
        activation: Makes the nonlinearity.
        padding: 1 keeps the size within a level, 0 loses a voxel on each side of each convolution.
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

    def forward(self, x: Float[Tensor, "b c x y z"]) -> list[Tensor]:
        """Compute the features of every level, fine to coarse."""
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features
