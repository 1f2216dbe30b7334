"""D-Net of Krivov & Belyaev 2018 (section 2.2, figure 1)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.networks.background import features_against_background
from lightning_modules.networks.blocks import (
    Logits,
    MakeActivation,
    MakeNorm,
    Segmentation,
    widths,
)
from lightning_modules.networks.checkpointing import CHECKPOINTING
from lightning_modules.networks.contracting import BLOCKS_PER_LEVEL, ContractingPath
from lightning_modules.networks.geometry import valid_geometry

LEVELS = 3
LOST_PER_BLOCK = 2  # voxels on each side: one for each of its two 3³ convolutions
GEOMETRY = valid_geometry(BLOCKS_PER_LEVEL[:LEVELS], LOST_PER_BLOCK)


class DNet(nn.Module):
    """The first three levels of `UNet3D`'s contracting path, without padding.

    It predicts which boxes of 4³ voxels contain lesion. From a patch of 68³ voxels it predicts the
    4³ boxes of the central 16³ voxels; every box depends on 56³ voxels.

    Args:
        in_channels: Number of modalities, stacked as channels.
        out_channels: Number of regions, each with its own sigmoid.
        patch_size: Sides of the training patches in voxels, one number or three. The network does
            not depend on it; it is only checked.
        filters: Filters of the finest level.
        ratio: Filters of a level over those of the next finer one.
        norm: Makes the normalisation of so many channels.
        activation: Makes the nonlinearity.
        prior: Probability that the untrained network gives to every box, because lesions are rare.
        checkpointing: What the backward pass computes anew, a key of `CHECKPOINTING`.

    Raises:
        ValueError: The patches do not fill whole boxes, or the norm uses statistics of the whole
            image in inference, as group and instance norm do.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        patch_size: int | Sequence[int] = 68,
        filters: int = 16,
        ratio: float = 2,
        norm: MakeNorm = nn.BatchNorm3d,
        activation: MakeActivation = nn.ReLU,
        prior: float = 0.01,
        checkpointing: str = "none",
    ) -> None:
        super().__init__()
        for side in (patch_size,) if isinstance(patch_size, int) else patch_size:
            GEOMETRY.output_side(side)
        self.widths = widths(filters, ratio, LEVELS)
        self.down = ContractingPath(
            in_channels,
            self.widths,
            norm,
            activation,
            padding=0,
            checkpointing=CHECKPOINTING[checkpointing],
        )
        self.head = nn.Sequential(
            norm(self.widths[-1]), activation(), Logits(self.widths[-1], out_channels, prior)
        )
        if any(isinstance(part, nn.GroupNorm | nn.InstanceNorm3d) for part in self.modules()):
            raise ValueError(
                "norm: D-Net needs one that treats every voxel alike in inference, as batch norm "
                "does; with group or instance norm its output would depend on how a volume is cut"
            )

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Segmentation:
        """Segment patches whose sides are twice the halo plus a multiple of the stride."""
        return Segmentation(self.segment(x))

    def segment(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b r x_ y_ z_"]:
        """Compute the logits of the boxes inside the halo."""
        return self.head(self.down(x)[-1])

    def segment_volume(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b r x_ y_ z_"]:
        """Compute the logits of all boxes of a volume that is surrounded by zeros.

        The values are those of `segment` on the volume with a halo of zeros, at less cost; boxes
        without any voxel but 0 have the logits of air, far from any brain.

        Args:
            x: The volume, whose sides the stride divides.

        Returns:
            Logits (B, R, X / stride, Y / stride, Z / stride).
        """
        return self.head(features_against_background(self.down.levels, x, *GEOMETRY))
