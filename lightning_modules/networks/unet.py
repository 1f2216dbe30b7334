"""3-D residual U-Net, the baseline of Krivov & Belyaev 2018 (section 2.1)."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.networks.blocks import (
    GroupNorm,
    Logits,
    MakeActivation,
    MakeNorm,
    ResidualBlock,
    Segmentation,
    Upsample,
    widths,
)
from lightning_modules.networks.checkpointing import CHECKPOINTING
from lightning_modules.networks.contracting import BLOCKS_PER_LEVEL, ContractingPath


class UNet3D(nn.Module):
    """U-Net of zero-padded, pre-activation residual blocks, on five levels (section 2.1).

    On each level, the expanding path upsamples (1³ convolution, trilinear), concatenates the skip
    (Çiçek et al. 2016) and runs one residual block.

    Args:
        in_channels: Number of modalities, stacked as channels.
        out_channels: Number of regions, each with its own sigmoid.
        filters: Filters of the finest level.
        ratio: Filters of a level over those of the next finer one.
        depth: Number of levels.
        norm: Makes the normalisation of so many channels.
        activation: Makes the nonlinearity.
        prior: Probability that the untrained network gives to every voxel, because lesions are
            rare.
        checkpointing: What the backward pass computes anew, a key of `CHECKPOINTING`.

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
        activation: MakeActivation = nn.ReLU,
        prior: float = 0.01,
        checkpointing: str = "none",
    ) -> None:
        super().__init__()
        if not 2 <= depth <= len(BLOCKS_PER_LEVEL):
            raise ValueError(f"depth: expected 2 to {len(BLOCKS_PER_LEVEL)} levels, got {depth}")
        self.divisor = 2 ** (depth - 1)
        self.widths = widths(filters, ratio, depth)
        anew = CHECKPOINTING[checkpointing]
        self.down = ContractingPath(in_channels, self.widths, norm, activation, 1, anew)
        coarse_to_fine = self.widths[::-1]
        self.up = nn.ModuleList(Upsample(*pair) for pair in pairwise(coarse_to_fine))
        self.levels = nn.ModuleList(
            ResidualBlock(2 * width, width, norm, activation, checkpointing=anew)
            for width in coarse_to_fine[1:]
        )
        self.head = nn.Sequential(
            norm(self.widths[0]), activation(), Logits(self.widths[0], out_channels, prior)
        )
        self.checkpointing = anew

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Segmentation:
        """Segment patches whose sides `divisor` divides."""
        return Segmentation(self.segment(x))

    def segment(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b r x y z"]:
        """Compute the logits of patches or volumes whose sides `divisor` divides."""
        x, *skips = reversed(self.down(x))
        for index, skip in enumerate(skips):
            x = self.checkpointing.levels(self._level, x, index, skip)
        return x

    def _level(
        self, x: Float[Tensor, "b i x_ y_ z_"], index: int, skip: Float[Tensor, "b o x y z"]
    ) -> Tensor:
        x = torch.cat([skip, self.up[index](x, skip.shape[2:])], dim=1)
        x = self.checkpointing.blocks(self.levels[index], x)
        if index + 1 < len(self.levels):
            return x
        return self.checkpointing.norms(self.head, x)
