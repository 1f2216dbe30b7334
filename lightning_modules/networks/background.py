"""Valid convolutions that leave out the empty background.

All voxels around a brain are zero, so that at some distance from it the features of every level are
constant; and what a detector says about air is of no use. A convolution is computed only where its
output can differ from the constant and some box of the brain depends on it: in tiles, whose ends
along z follow the brain. Half of the box around a brain is air, and the halo doubles the number of
voxels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_modules.networks.blocks import ResidualBlock

TILE_VOXELS = 32  # of the volume, along x and y, in a tile on a CPU; its features fit the cache
NOWHERE = 2**30  # `low` of a column without voxels; its `high` is the negative


Pair = Sequence[Sequence[slice]]  # the places (x, y, z) of the halves of a tile


class Columns(NamedTuple):
    """An interval along z in every column (x, y) of a volume.

    Attributes:
        low: First voxel of the interval; beyond `high` if the column has none.
        high: Voxel after the last.
    """

    low: Int[Tensor, "x y"]
    high: Int[Tensor, "x y"]

    @classmethod
    def enclosing(cls, voxels: Bool[Tensor, "x y z"]) -> "Columns":
        """Enclose the true voxels of every column."""
        places = torch.arange(voxels.shape[2], dtype=torch.int32, device=voxels.device)
        low = torch.where(voxels, places, NOWHERE).amin(2)
        return cls(low.cpu(), torch.where(voxels, places + 1, -NOWHERE).amax(2).cpu())

    def moved(self, width: int) -> "Columns":
        """Return the same intervals in a volume with `width` more voxels on each side, or fewer."""
        margins = (width,) * 4
        low = F.pad(self.low + width, margins, value=NOWHERE)
        return Columns(low, F.pad(self.high + width, margins, value=-NOWHERE))

    def reached(self, lost: int) -> "Columns":
        """Return what depends on the intervals after a valid convolution.

        Args:
            lost: Voxels that the convolution loses on each side.
        """
        return Columns(-_largest(-self.low, 2 * lost) - 2 * lost, _largest(self.high, 2 * lost))

    def seen(self, lost: int) -> "Columns":
        """Return what the intervals depend on before a valid convolution."""
        wide = self.moved(2 * lost)
        return Columns(-_largest(-wide.low, 2 * lost) - 2 * lost, _largest(wide.high, 2 * lost))

    def pooled(self) -> "Columns":
        """Return what depends on the intervals after pooling by 2."""
        low = -F.max_pool2d(-self.low[None].double(), 2)[0]
        high = F.max_pool2d(self.high[None].double(), 2)[0]
        return Columns((low / 2).floor().int(), (high / 2).ceil().int())

    def unpooled(self) -> "Columns":
        """Return what the intervals depend on before pooling by 2."""
        low, high = (ends.repeat_interleave(2, 0).repeat_interleave(2, 1) * 2 for ends in self)
        return Columns(low, high)

    def within(self, other: "Columns") -> "Columns":
        """Return the intersections of the intervals with those of another."""
        return Columns(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))

    def tiles(self, sides: Sequence[int], tile: Sequence[int]) -> Iterator[list[slice]]:
        """Yield tiles (x, y, z) that cover all intervals; those of no voxel have no extent in z.

        Args:
            sides: Sides (X, Y, Z) of the volume, to which the tiles are cut.
            tile: Sides of a tile along x and y.
        """
        for x in range(0, sides[0], tile[0]):
            for y in range(0, sides[1], tile[1]):
                part = slice(x, min(x + tile[0], sides[0])), slice(y, min(y + tile[1], sides[1]))
                low = max(int(self.low[part].amin()), 0)
                high = min(int(self.high[part].amax()), sides[2])
                yield [*part, slice(low, high) if low < high else slice(0, 0)]


def _largest(values: Int[Tensor, "x y"], reach: int) -> Int[Tensor, "x_ y_"]:
    """Return the largest value in every window of `reach` + 1 columns along x and y."""
    return F.max_pool2d(values[None].double(), reach + 1, stride=1)[0].int()


class Step(NamedTuple):
    """One step of the path to the coarsest features.

    Attributes:
        part: A pooling by 2, or a residual block of valid convolutions.
        width: Voxels of the background that surround its input, on each side.
    """

    part: nn.Module
    width: int


def plan(levels: Iterable[nn.Module], halo: int) -> tuple[list[Step], int]:
    """Find out how much of the background around a volume each step needs.

    Of the halo, no more is made than can differ from the constant.

    Args:
        levels: Levels of the contracting path, fine to coarse: a pooling by 2 (but for the first)
            and residual blocks.
        halo: Halo of the whole path, in voxels of the volume.

    Returns:
        The steps, and the voxels that the output covers beyond the volume, on each side.
    """
    steps: list[Step] = []
    ring = 0  # voxels of the current level that are made beyond the volume, on each side
    needed = halo  # voxels that all later convolutions need beyond the volume, on each side
    for level in levels:
        assert isinstance(level, nn.Sequential)
        parts = list(level)
        if not isinstance(parts[0], ResidualBlock):
            steps.append(Step(parts.pop(0), 0))
            ring, needed = ring // 2, needed // 2
        lost = sum(block.lost for block in parts)  # pyright: ignore[reportArgumentType, reportCallIssue]
        needed -= lost
        differs = ring + lost  # how far beyond the volume the output can differ from the constant
        # Even, so that no voxel of the next level straddles the edge of the volume.
        kept = min(needed, differs + differs % 2)
        steps.append(Step(parts[0], kept + lost - ring))
        steps += [Step(block, 0) for block in parts[1:]]
        ring = kept
    return steps, ring


def features_against_background(
    levels: Iterable[nn.Module], x: Float[Tensor, "b c x y z"], halo: int, stride: int
) -> Float[Tensor, "b f x_ y_ z_"]:
    """Compute the coarsest features of a volume that is surrounded by zeros.

    Args:
        levels: Levels of the contracting path, fine to coarse: a pooling by 2 (but for the first)
            and residual blocks of valid convolutions.
        x: The volume; its sides are multiples of the whole path's stride.
        halo: Halo of the whole path, in voxels of the volume.
        stride: Stride of the whole path.

    Returns:
        The features; those of boxes without any voxel but 0 are the features of the background.
    """
    steps, ring = plan(levels, halo)
    occupied = (x != 0).flatten(0, 1).any(dim=0)
    # Where each half of a block can differ from the background.
    columns, differs = Columns.enclosing(occupied), []
    for part, width in steps:
        if isinstance(part, ResidualBlock):
            first = columns.moved(width).reached(part.lost // 2)
            columns = first.reached(part.lost // 2)
            differs.append((first, columns))
        else:
            columns = columns.pooled()
            differs.append((columns, columns))
    # From the end: where the boxes of the brain depend on it.
    boxes = F.max_pool3d(occupied[None].to(x.dtype), stride)[0] > 0
    needed, computed = Columns.enclosing(boxes).moved(ring), []
    for (part, width), (first, second) in zip(steps[::-1], differs[::-1], strict=True):
        if isinstance(part, ResidualBlock):
            before = needed.seen(part.lost // 2)
            computed.append((first.within(before), second.within(needed)))
            needed = before.seen(part.lost // 2).moved(-width)
        else:
            computed.append((first, second))
            needed = needed.unpooled()
    background = x.new_zeros(1, x.shape[1], 1, 1, 1)
    tile = TILE_VOXELS
    for (part, width), places in zip(steps, computed[::-1], strict=True):
        if isinstance(part, ResidualBlock):
            x = _surrounded(x, background, width)
            first, second = places
            x, background = _block(part, x, background, first, second, tile)
        else:
            x, tile = part(x), tile // 2
    inner = slice(ring, -ring or None)
    air = ~boxes[None, None]
    return torch.where(air, background, x[:, :, inner, inner, inner])


def _block(
    block: ResidualBlock,
    x: Float[Tensor, "b c x y z"],
    background: Float[Tensor, "1 c 1 1 1"],
    first_places: Columns,
    second_places: Columns,
    tile: int,
) -> tuple[Float[Tensor, "b f x_ y_ z_"], Float[Tensor, "1 f 1 1 1"]]:
    """Run a block of valid convolutions where it must be computed.

    Its two convolutions are run one after the other over all tiles, as no tile then computes the
    margin that it shares with the next.

    Args:
        block: The block.
        x: Its input.
        background: Its input far from the brain.
        first_places: Where the first convolution must be computed.
        second_places: Where the second one must be.
        tile: Side of a tile along x and y.

    Returns:
        The output, and what it is far from the brain.
    """
    first, second = block.halves
    lost = block.lost // 2

    hidden_background = first(background.expand(-1, -1, *[2 * lost + 1] * 3))
    out_background = block(background.expand(-1, -1, *[2 * block.lost + 1] * 3))

    def run_first(pair: Pair) -> Tensor:
        return first(_seen(x, pair, 0, 2 * lost))

    def run_second(pair: Pair) -> Tensor:
        shortcut = block.shortcut(_seen(x, pair, block.lost, block.lost))
        return second(_seen(hidden, pair, 0, 2 * lost)).add_(shortcut)

    hidden = _in_tiles(run_first, x, hidden_background, first_places, lost, tile)
    out = _in_tiles(run_second, hidden, out_background, second_places, lost, tile)
    return out, out_background


def _in_tiles(
    run: Callable[[Pair], Tensor],
    x: Float[Tensor, "b c x y z"],
    background: Float[Tensor, "1 f 1 1 1"],
    places: Columns,
    lost: int,
    tile: int,
) -> Float[Tensor, "b f x_ y_ z_"]:
    """Run a valid convolution in tiles; what they do not cover is the background.

    Args:
        run: Computes the features of both halves of a tile, one after the other along the batch.
        x: The input.
        background: The output far from the brain.
        places: Where the output must be computed.
        lost: Voxels that the convolution loses on each side.
        tile: Side of a tile along x and y.
    """
    sides = [side - 2 * lost for side in x.shape[2:]]
    out = _empty_like(x, (len(x), background.shape[1], *sides))
    # A GPU gains nothing from small tiles.
    for x_tile, y_tile, z_tile in places.tiles(sides, (tile, tile) if x.is_cpu else sides):
        for air in (slice(0, z_tile.start), slice(z_tile.stop, sides[2])):
            out[:, :, x_tile, y_tile, air] = background
        if z_tile.stop == 0:
            continue
        # Two halves at a time, because PyTorch does not use oneDNN for a batch of one small image.
        half = -(-(x_tile.stop - x_tile.start) // 2)
        starts = (x_tile.start, x_tile.stop - half)
        pair = [[slice(start, start + half), y_tile, z_tile] for start in starts]
        for place, features in zip(pair, run(pair).split(len(x)), strict=True):
            out[(..., *place)] = features
    return out


def _seen(
    x: Float[Tensor, "b c x y z"], places: Sequence[Sequence[slice]], before: int, after: int
) -> Float[Tensor, "n c x_ y_ z_"]:
    """Stack the voxels of some places, with `before` voxels less and `after` more at their ends."""
    return torch.cat(
        [x[(..., *(slice(s.start + before, s.stop + after) for s in place))] for place in places]
    )


def _surrounded(
    x: Float[Tensor, "b c x y z"], background: Float[Tensor, "1 c 1 1 1"], width: int
) -> Float[Tensor, "b c x_ y_ z_"]:
    """Put `width` voxels of the background on each side of a volume."""
    if width == 0:
        return x
    larger = _empty_like(x, (*x.shape[:2], *(side + 2 * width for side in x.shape[2:])))
    larger.copy_(background.expand(larger.shape))
    larger[(..., *(slice(width, width + side) for side in x.shape[2:]))] = x
    return larger


def _empty_like(
    x: Float[Tensor, "b c x y z"], shape: Sequence[int]
) -> Float[Tensor, "b f x_ y_ z_"]:
    """Allocate a volume (B, F, X', Y', Z') in the memory layout of another."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=layout)
