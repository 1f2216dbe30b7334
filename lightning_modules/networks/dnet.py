"""D-Net of Krivov & Belyaev 2018 (section 2.2, figure 1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.networks.blocks import Logits, MakeActivation, MakeNorm
from lightning_modules.networks.blocks import widths as level_widths
from lightning_modules.networks.unet import BLOCKS_PER_LEVEL, ContractingPath, Segmentation

LEVELS = 3
LOST = 2  # voxels a side in a residual block, of its level
SLAB = 6  # voxels along x that a CPU computes at once: what its cache holds
NOWHERE = 2**30


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
    halo = sum(LOST * count * 2**level for level, count in enumerate(blocks))
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

        Away from the brain all features are constant, at every level. So the halo is computed as
        far as it can differ from that constant, and of every slab the rectangle that can: half of
        the box around a brain is air, and a box with all of its halo has twice its voxels.

        Args:
            x: (B, C, X, Y, Z), sides that the stride divides.

        Returns:
            (B, R, X / stride, Y / stride, Z / stride).
        """
        extents = Extents.of(x)
        background = x.new_zeros(1, x.shape[1], 1, 1, 1)
        ring = 0  # voxels of this level that x covers beyond the volume, on each side
        needed = self.halo  # the same, for all later convolutions to be valid
        for number, level in enumerate(self.down.levels):
            assert isinstance(level, nn.Sequential)
            blocks = list(level)
            if number:
                x, extents = blocks.pop(0)(x), extents.pooled()
                ring, needed = ring // 2, needed // 2
            halo = LOST * len(blocks)
            needed -= halo
            differs = ring + halo  # how far the output can differ from the constant
            kept = min(needed, differs + differs % 2)  # even: pooling starts at the volume
            width = kept + halo - ring
            x, extents = _surrounded(x, background, width), extents.padded(width)
            for block in blocks:
                background = block(background.expand(-1, -1, *[2 * LOST + 1] * 3))
                extents = extents.convolved(LOST)
                x = _in_slabs(block, x, background, extents)
            ring = kept
        return self.head(x)


class Extents(NamedTuple):
    """Where features can differ from a constant background: a rectangle of every slice along x.

    Attributes:
        low: (X, 2), first voxel along y and z; beyond `high` where all is background.
        high: (X, 2), the voxel after the last.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, volume: Tensor) -> "Extents":
        """Of what is not 0 in (B, C, X, Y, Z)."""
        occupied = (volume != 0).any(dim=1).any(dim=0)
        ends = []
        for profile in (occupied.any(dim=2), occupied.any(dim=1)):  # (X, Y), (X, Z)
            places = torch.arange(profile.shape[1], device=volume.device)
            low = torch.where(profile, places, NOWHERE).amin(dim=1)
            ends.append((low, torch.where(profile, places + 1, -NOWHERE).amax(dim=1)))
        low, high = (torch.stack(end, dim=1).cpu() for end in zip(*ends, strict=True))
        return cls(low, high)

    def padded(self, width: int) -> "Extents":
        """In coordinates with so many more voxels on each side."""
        margins = (0, 0, width, width)
        return Extents(
            nn.functional.pad(self.low + width, margins, value=NOWHERE),
            nn.functional.pad(self.high + width, margins, value=-NOWHERE),
        )

    def convolved(self, lost: int) -> "Extents":
        """After valid convolutions that lose so many voxels on each side."""
        reach = 2 * lost
        low = self.low.unfold(0, reach + 1, 1).amin(-1) - reach
        return Extents(low, self.high.unfold(0, reach + 1, 1).amax(-1))

    def pooled(self) -> "Extents":
        """After pooling by 2."""
        low = self.low.unfold(0, 2, 2).amin(-1).div(2, rounding_mode="floor")
        return Extents(low, -self.high.unfold(0, 2, 2).amax(-1).neg().div(2, rounding_mode="floor"))

    def rectangle(self, start: int, stop: int, sides: Sequence[int]) -> list[slice]:
        """Along y and z, of slices `start` to `stop`, within sides (Y, Z)."""
        low = self.low[start:stop].amin(0).tolist()
        high = self.high[start:stop].amax(0).tolist()
        return [
            slice(max(first, 0), min(last, side))
            for first, last, side in zip(low, high, sides, strict=True)
        ]


def _in_slabs(block: nn.Module, x: Tensor, background: Tensor, extents: Extents) -> Tensor:
    """A block that loses `LOST` voxels a side, where its output can differ from the background.

    Two slabs at a time: for batches of one, PyTorch leaves oneDNN where slabs are thin. A GPU has
    no use for thin ones, and takes two halves.
    """
    reach = 2 * LOST
    sides = [side - reach for side in x.shape[2:]]
    out = _filled(background, (len(x), background.shape[1], *sides), x)
    half = -(-sides[0] // 2)
    thickness = min(SLAB, half) if x.is_cpu else half
    for start in range(0, sides[0], 2 * thickness):
        stop = min(start + 2 * thickness, sides[0])
        y, z = extents.rectangle(start, stop, sides[1:])
        if y.start >= y.stop or z.start >= z.stop:
            continue
        pair = [max(stop - 2 * thickness, 0), stop - thickness]
        around = [slice(axis.start, axis.stop + reach) for axis in (y, z)]
        slabs = [x[(..., slice(s, s + thickness + reach), *around)] for s in pair]
        for first, slab in zip(pair, block(torch.cat(slabs)).split(len(x)), strict=True):
            out[:, :, first : first + thickness, y, z] = slab
    return out


def _surrounded(x: Tensor, background: Tensor, width: int) -> Tensor:
    """x (B, C, X, Y, Z) with `width` voxels of a background (1, C, 1, 1, 1) on each side."""
    sides = [side + 2 * width for side in x.shape[2:]]
    larger = _filled(background, (*x.shape[:2], *sides), x)
    larger[(..., *(slice(width, width + side) for side in x.shape[2:]))] = x
    return larger


def _filled(background: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """A volume (B, C, X, Y, Z) of (1, C, 1, 1, 1), in the memory layout of another."""
    last = like.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    volume = torch.empty(
        tuple(shape), dtype=background.dtype, device=like.device, memory_format=layout
    )
    return volume.copy_(background.expand(*shape))
