"""The contracting path that D-Net and its U-Net baseline share (Krivov & Belyaev 2018)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.networks.blocks import Level, MakeActivation, MakeNorm, ResidualBlock
from lightning_modules.networks.checkpointing import Checkpointing

# Residual blocks of each level, fine to coarse, with two 3³ convolutions each. The first three are
# fixed by D-Net's input of 68³ and output of 4³: a halo of 2 + 2 * 4 + 4 * 4 = 26 voxels.
BLOCKS_PER_LEVEL = (1, 2, 2, 2, 2)


class ContractingPath(nn.Module):
    """Residual blocks, with max pooling between the levels.

    Args:
        in_channels: Channels of the image.
        filters: Filters of each level, fine to coarse.
        norm: Makes the normalisation of so many channels.
        activation: Makes the nonlinearity.
        padding: 1 keeps the size within a level; 0 loses a voxel on each side in each convolution.
        checkpointing: What the backward pass computes anew.
    """

    def __init__(
        self,
        in_channels: int,
        filters: Sequence[int],
        norm: MakeNorm,
        activation: MakeActivation,
        padding: int,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        levels = []
        channels = in_channels
        for width, blocks in zip(filters, BLOCKS_PER_LEVEL, strict=False):
            level: list[nn.Module] = [nn.MaxPool3d(2)] if levels else []
            for _ in range(blocks):
                on_image = not levels and not level
                level.append(
                    ResidualBlock(
                        channels, width, norm, activation, padding, on_image, checkpointing
                    )
                )
                channels = width
            levels.append(Level(*level, run=checkpointing.blocks))
        self.levels = nn.ModuleList(levels)
        self.run = checkpointing.levels

    def forward(self, x: Float[Tensor, "b c x y z"]) -> list[Tensor]:
        """Compute the features (B, F, X', Y', Z') of every level, fine to coarse."""
        features = []
        for level in self.levels:
            x = self.run(level, x)
            features.append(x)
        return features
