"""D-Net of Krivov & Belyaev 2018 (section 2.2, figure 1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.networks.blocks import Logits, MakeActivation, MakeNorm
from lightning_modules.networks.blocks import widths as level_widths
from lightning_modules.networks.unet import BLOCKS_PER_LEVEL, ContractingPath, Segmentation

LEVELS = 3


class Geometry(NamedTuple):
    """Where the output of a valid-convolution network lies on its input.

    Output voxel j covers the input voxels halo + stride * j, ..., halo + stride * (j + 1) - 1.

    Attributes:
        halo: Input voxels a side that are context only.
        stride: Input voxels to an output voxel.
    """

    halo: int
    stride: int

    def output_side(self, side: int) -> int:
        """Of an input side.

        Raises:
            ValueError: The input does not fill whole output voxels.
        """
        output, rest = divmod(side - 2 * self.halo, self.stride)
        if output < 1 or rest:
            raise ValueError(
                f"patch_size: expected {2 * self.halo} + a multiple of {self.stride}, found {side}"
            )
        return output


def geometry() -> Geometry:
    """Of D-Net, derived from its blocks: each 3³ convolution loses a voxel of its level a side."""
    blocks = BLOCKS_PER_LEVEL[:LEVELS]
    halo = sum(2 * count * 2**level for level, count in enumerate(blocks))
    return Geometry(halo, 2 ** (LEVELS - 1))


def geometry_for(patch_size: int | Sequence[int]) -> Geometry:
    """Of D-Net, for patches of a size that it takes.

    Raises:
        ValueError: As `Geometry.output_side`.
    """
    for side in (patch_size,) if isinstance(patch_size, int) else patch_size:
        geometry().output_side(side)
    return geometry()


def halo() -> int:
    """Of D-Net; the configuration of its patches takes it from here."""
    return geometry().halo


class DNet(nn.Module):
    """The first three levels of `UNet3D`'s contracting path, without padding.

    Predicts which boxes of 4³ voxels have a lesion: 68³ voxels in, 4³ boxes out, those of the
    central 16³. Every output depends on 56³ voxels and on nothing else.

    Args:
        in_channels: Modalities stacked as channels.
        out_channels: Regions, each with its own sigmoid.
        filters: Filters of the finest level.
        ratio: Filters of a level over those of the next finer one.
        norm, activation: Make the parts.
        prior: Probability that the untrained network gives to every voxel: lesions are rare.

    Raises:
        ValueError: A norm that looks at the whole image, as group and instance norm do.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        filters: int = 16,
        ratio: float = 2,
        norm: MakeNorm = nn.BatchNorm3d,
        activation: MakeActivation = nn.LeakyReLU,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        self.halo, self.stride = geometry()
        self.widths = level_widths(filters, ratio, LEVELS)
        self.down = ContractingPath(in_channels, self.widths, norm, activation, padding=0)
        self.head = nn.Sequential(
            norm(self.widths[-1]), activation(), Logits(self.widths[-1], out_channels, prior)
        )
        if any(isinstance(part, nn.GroupNorm | nn.InstanceNorm3d) for part in self.modules()):
            raise ValueError(
                "norm: D-Net needs one that treats every voxel alike in inference, as batch norm "
                "does; with group or instance norm its output would depend on how a volume is cut"
            )

    def forward(self, x: Tensor) -> Segmentation:
        """Detect in patches (B, C, X, Y, Z) of sides 2 * halo + a multiple of the stride."""
        return Segmentation(self.segment(x))

    def segment(self, x: Tensor) -> Tensor:
        """Logits (B, R, X', Y', Z') of the boxes inside the halo."""
        return self.head(self.down(x)[-1])

    def dense(self, x: Tensor) -> Tensor:
        """What `segment` gives of a volume surrounded by zeros without end, at less cost.

        Far from the volume all features are constant, at every level. So the halo is computed as
        far as it differs from that constant, and the rest filled in: at 1 mm a brain with all of
        its halo has more than twice the voxels of the brain.

        Args:
            x: (B, C, X, Y, Z), sides that the stride divides.

        Returns:
            (B, R, X / stride, Y / stride, Z / stride).
        """
        background = x.new_zeros(1, x.shape[1], 1, 1, 1)
        ring = 0  # voxels of this level that x covers beyond the volume, on each side
        needed = self.halo  # the same, for all later convolutions to be valid
        for number, level in enumerate(self.down.levels):
            assert isinstance(level, nn.Sequential)
            blocks = level
            if number:
                x, ring, needed = level[0](x), ring // 2, needed // 2
                blocks = nn.Sequential(*list(level)[1:])
            halo = 2 * len(blocks)
            needed -= halo
            differs = ring + halo  # how far the output can differ from the constant
            kept = min(needed, differs + differs % 2)  # even: pooling starts at the volume
            x = blocks(_surrounded(x, background, kept + halo - ring))
            background = blocks(background.expand(-1, -1, *[2 * halo + 1] * 3))
            ring = kept
        return self.head(x)


def _surrounded(x: Tensor, background: Tensor, width: int) -> Tensor:
    """x (B, C, X, Y, Z) with `width` voxels of a background (1, C, 1, 1, 1) on each side."""
    sides = [side + 2 * width for side in x.shape[2:]]
    larger = torch.empty(
        (*x.shape[:2], *sides),
        dtype=x.dtype,
        device=x.device,
        memory_format=_memory_format(x),
    )
    larger.copy_(background.expand_as(larger))
    larger[(..., *(slice(width, width + side) for side in x.shape[2:]))] = x
    return larger


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format
