"""Features of valid convolutions where they can differ from those of an empty background.

Around a brain all voxels are zero, so that away from it all features are constant, at every level.
Only voxels whose features can differ from that constant are computed: the halo as far as the brain
reaches into it, and in every slab across x the rectangle that the brain reaches. Half of the box
around a brain is air, and a box with all of its halo has twice the voxels of the box.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

SLAB_VOXELS = 6  # along x, computed at once on a CPU: what its cache holds
NOWHERE = 2**30


class Extents(NamedTuple):
    """The rectangle of every slice across x in which features can differ from the background.

    Attributes:
        low: (X, 2), first voxel along y and z; beyond `high` where the whole slice is background.
        high: (X, 2), the voxel after the last.
    """

    low: Int[Tensor, "x 2"]
    high: Int[Tensor, "x 2"]

    @classmethod
    def of_volume(cls, volume: Float[Tensor, "b c x y z"]) -> "Extents":
        """Enclose all voxels that are not 0, in any channel of any case."""
        occupied = (volume != 0).any(dim=1).any(dim=0)
        ends = []
        for profile in (occupied.any(dim=2), occupied.any(dim=1)):  # (X, Y), (X, Z)
            places = torch.arange(profile.shape[1], device=volume.device)
            low = torch.where(profile, places, NOWHERE).amin(dim=1)
            ends.append((low, torch.where(profile, places + 1, -NOWHERE).amax(dim=1)))
        low, high = (torch.stack(end, dim=1).cpu() for end in zip(*ends, strict=True))
        return cls(low, high)

    def padded(self, width: int) -> "Extents":
        """The same rectangles in a volume with `width` more voxels on each side."""
        margins = (0, 0, width, width)
        return Extents(
            nn.functional.pad(self.low + width, margins, value=NOWHERE),
            nn.functional.pad(self.high + width, margins, value=-NOWHERE),
        )

    def convolved(self, lost: int) -> "Extents":
        """The rectangles after valid convolutions that lose `lost` voxels on each side."""
        reach = 2 * lost
        low = self.low.unfold(0, reach + 1, 1).amin(-1) - reach
        return Extents(low, self.high.unfold(0, reach + 1, 1).amax(-1))

    def pooled(self) -> "Extents":
        """The rectangles after pooling by 2."""
        low = self.low.unfold(0, 2, 2).amin(-1).div(2, rounding_mode="floor")
        return Extents(low, -self.high.unfold(0, 2, 2).amax(-1).neg().div(2, rounding_mode="floor"))

    def rectangle(self, start: int, stop: int, sides: Sequence[int]) -> list[slice]:
        """Enclose the rectangles of slices `start` to `stop`, within sides (Y, Z)."""
        low = self.low[start:stop].amin(0).tolist()
        high = self.high[start:stop].amax(0).tolist()
        return [
            slice(max(first, 0), min(last, side))
            for first, last, side in zip(low, high, sides, strict=True)
        ]


def features_against_background(
    levels: Iterable[nn.Module], x: Float[Tensor, "b c x y z"], halo: int, lost_per_block: int
) -> Float[Tensor, "b f x_ y_ z_"]:
    """Compute the coarsest features of a volume that lies in zeros without end.

    Args:
        levels: Sequences of blocks of valid convolutions, fine to coarse; the first module of every
            level but the first pools by 2.
        x: The volume; its sides are multiples of the whole path's stride.
        halo: Voxels of the finest level that the path sees beyond what it predicts.
        lost_per_block: Voxels of its own level that a block loses on each side.
    """
    extents = Extents.of_volume(x)
    background = x.new_zeros(1, x.shape[1], 1, 1, 1)
    ring = 0  # voxels of this level that x covers beyond the volume, on each side
    needed = halo  # voxels that it must cover for all later convolutions to be valid
    for depth, level in enumerate(levels):
        assert isinstance(level, nn.Sequential)
        blocks = list(level)
        if depth:
            x, extents = blocks.pop(0)(x), extents.pooled()
            ring, needed = ring // 2, needed // 2
        lost = lost_per_block * len(blocks)
        needed -= lost
        differs = ring + lost  # how far beyond the volume the output can differ from the constant
        kept = min(needed, differs + differs % 2)  # even, so that pooling starts at the volume
        width = kept + lost - ring
        x, extents = _surrounded(x, background, width), extents.padded(width)
        for block in blocks:
            background = block(background.expand(-1, -1, *[2 * lost_per_block + 1] * 3))
            extents = extents.convolved(lost_per_block)
            x = _in_slabs(block, x, background, extents, lost_per_block)
        ring = kept
    return x


def _in_slabs(
    block: nn.Module,
    x: Float[Tensor, "b c x y z"],
    background: Float[Tensor, "1 f 1 1 1"],
    extents: Extents,
    lost: int,
) -> Float[Tensor, "b f x_ y_ z_"]:
    """Run a block where its output can differ from its output on the background.

    Two slabs at a time, because for batches of one PyTorch leaves oneDNN where slabs are thin. A
    GPU does not gain from thin slabs, and takes two halves.
    """
    reach = 2 * lost
    sides = [side - reach for side in x.shape[2:]]
    out = _filled(background, (len(x), background.shape[1], *sides), x)
    half = -(-sides[0] // 2)
    thickness = min(SLAB_VOXELS, half) if x.is_cpu else half
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


def _surrounded(
    x: Float[Tensor, "b c x y z"], background: Float[Tensor, "1 c 1 1 1"], width: int
) -> Float[Tensor, "b c x_ y_ z_"]:
    """Put `width` voxels of the background on each side of x."""
    sides = [side + 2 * width for side in x.shape[2:]]
    larger = _filled(background, (*x.shape[:2], *sides), x)
    larger[(..., *(slice(width, width + side) for side in x.shape[2:]))] = x
    return larger


def _filled(
    background: Float[Tensor, "1 c 1 1 1"], shape: Sequence[int], like: Tensor
) -> Float[Tensor, "b c x y z"]:
    """Make a volume of this shape out of the background, in the memory layout of `like`."""
    last = like.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    volume = torch.empty(
        tuple(shape), dtype=background.dtype, device=like.device, memory_format=layout
    )
    return volume.copy_(background.expand(*shape))
