"""Valid convolutions that leave out the empty background.

All voxels around a brain are zero, so that at some distance from it the features of every level are
constant. Only features that can differ from the constant are computed: of the halo, the part that
sees the brain, and of every slab across x, the rectangle that sees the brain. Half of the box
around a brain is air, and the halo doubles the number of voxels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

SLAB_VOXELS = 6  # thickness along x of a slab on a CPU; its features should fit into the cache
NOWHERE = 2**30  # `low` of an empty slice; its `high` is the negative


class Extents(NamedTuple):
    """The rectangle in every slice across x where features can differ from the background.

    Attributes:
        low: First voxel along y and z; beyond `high` if the whole slice is background.
        high: Voxel after the last along y and z.
    """

    low: Int[Tensor, "x 2"]
    high: Int[Tensor, "x 2"]

    @classmethod
    def of_volume(cls, volume: Float[Tensor, "b c x y z"]) -> "Extents":
        """Enclose all voxels that are not 0 in some channel of some case."""
        occupied = (volume != 0).any(dim=1).any(dim=0)
        ends = []
        for profile in (occupied.any(dim=2), occupied.any(dim=1)):  # (X, Y), (X, Z)
            places = torch.arange(profile.shape[1], device=volume.device)
            low = torch.where(profile, places, NOWHERE).amin(dim=1)
            ends.append((low, torch.where(profile, places + 1, -NOWHERE).amax(dim=1)))
        low, high = (torch.stack(end, dim=1).cpu() for end in zip(*ends, strict=True))
        return cls(low, high)

    def padded(self, width: int) -> "Extents":
        """Return the rectangles in a volume that has `width` more voxels on each side."""
        margins = (0, 0, width, width)
        return Extents(
            nn.functional.pad(self.low + width, margins, value=NOWHERE),
            nn.functional.pad(self.high + width, margins, value=-NOWHERE),
        )

    def convolved(self, lost: int) -> "Extents":
        """Return the rectangles after valid convolutions that lose `lost` voxels on each side."""
        reach = 2 * lost
        low = self.low.unfold(0, reach + 1, 1).amin(-1) - reach
        return Extents(low, self.high.unfold(0, reach + 1, 1).amax(-1))

    def pooled(self) -> "Extents":
        """Return the rectangles after pooling by 2."""
        low = self.low.unfold(0, 2, 2).amin(-1).div(2, rounding_mode="floor")
        return Extents(low, -self.high.unfold(0, 2, 2).amax(-1).neg().div(2, rounding_mode="floor"))

    def rectangle(self, start: int, stop: int, sides: Sequence[int]) -> list[slice]:
        """Enclose the rectangles of the slices `start` to `stop` - 1.

        Args:
            start: First slice.
            stop: Slice after the last.
            sides: Sides (Y, Z) of the volume, to which the result is cut.

        Returns:
            Slices along y and z; one of them is empty if all is background.
        """
        low = self.low[start:stop].amin(0).tolist()
        high = self.high[start:stop].amax(0).tolist()
        return [
            slice(max(first, 0), min(last, side))
            for first, last, side in zip(low, high, sides, strict=True)
        ]


def features_against_background(
    levels: Iterable[nn.Module], x: Float[Tensor, "b c x y z"], halo: int, lost_per_block: int
) -> Float[Tensor, "b f x_ y_ z_"]:
    """Compute the coarsest features of a volume that is surrounded by zeros.

    Args:
        levels: Levels of the contracting path, fine to coarse. Each is an `nn.Sequential` of blocks
            of valid convolutions; before the blocks, all levels but the first pool by 2.
        x: The volume; its sides are multiples of the whole path's stride.
        halo: Halo of the whole path, in voxels of the volume.
        lost_per_block: Voxels that a block loses on each side, on its own level.
    """
    extents = Extents.of_volume(x)
    background = x.new_zeros(1, x.shape[1], 1, 1, 1)
    ring = 0  # voxels of the current level that x covers beyond the volume, on each side
    needed = halo  # voxels that all later convolutions need beyond the volume, on each side
    for depth, level in enumerate(levels):
        assert isinstance(level, nn.Sequential)
        blocks = list(level)
        if depth:
            x, extents = blocks.pop(0)(x), extents.pooled()
            ring, needed = ring // 2, needed // 2
        lost = lost_per_block * len(blocks)
        needed -= lost
        differs = ring + lost  # how far beyond the volume the output can differ from the constant
        # Even, so that no voxel of the next level straddles the edge of the volume.
        kept = min(needed, differs + differs % 2)
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
    """Run a block where its output can differ from the background's, slab by slab along x.

    Two slabs are computed at a time, because PyTorch does not use oneDNN for batches of one thin
    slab. A GPU gains nothing from thin slabs, and computes two halves.

    Args:
        block: Block of valid convolutions.
        x: Its input.
        background: Its output on the background.
        extents: Where its output can differ from that.
        lost: Voxels that it loses on each side.
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
    """Put `width` voxels of the background on each side of a volume."""
    sides = [side + 2 * width for side in x.shape[2:]]
    larger = _filled(background, (*x.shape[:2], *sides), x)
    larger[(..., *(slice(width, width + side) for side in x.shape[2:]))] = x
    return larger


def _filled(
    background: Float[Tensor, "1 c 1 1 1"],
    shape: Sequence[int],
    like: Float[Tensor, "b c_ x_ y_ z_"],
) -> Float[Tensor, "b c x y z"]:
    """Make a background volume of a shape (B, C, X, Y, Z), in the memory layout of `like`."""
    last = like.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    volume = torch.empty(
        tuple(shape), dtype=background.dtype, device=like.device, memory_format=layout
    )
    return volume.copy_(background.expand(*shape))
