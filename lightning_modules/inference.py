"""Inference on whole volumes, for networks that are trained on patches.

An inference is called with images (B, C, X, Y, Z) of any size and with a network. It returns logits
(B, R, X, Y, Z) at full resolution, in float32 at least, whatever grid the network predicts on. Told
which voxels are candidates, it computes no more than their logits need.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, groupby, product
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor

import grids
from lightning_modules.networks.geometry import Geometry

Network = Any  # its `segment` turns images into logits; some inferences need further attributes
Box = tuple[slice, ...]  # a range of voxels along X, Y and Z
Flip = tuple[int, ...]  # the dimensions, of 2, 3 and 4, along which images are mirrored

BOX_MULTIPLE = 32  # sides of boxes around candidates: what networks of up to six levels divide by


class Inference(ABC):
    """Computes the logits of whole volumes, or those of the candidates in them."""

    def __call__(
        self, image: Float[Tensor, "b c x y z"], network: Network
    ) -> Float[Tensor, "b r x y z"]:
        """Compute the logits of all voxels."""
        return self.within(image, network, everywhere(image))

    @abstractmethod
    def within(
        self,
        image: Float[Tensor, "b c x y z"],
        network: Network,
        candidates: Bool[Tensor, "b x y z"],
    ) -> Float[Tensor, "b r x y z"]:
        """Compute the logits of candidates, of which there is one at least.

        The values of other voxels mean nothing, but are finite.
        """

    def estimates(
        self,
        image: Float[Tensor, "b c x y z"],
        network: Network,
        candidates: Bool[Tensor, "b x y z"],
        flips: Sequence[Flip],
    ) -> Iterator[Float[Tensor, "b r x y z"]]:
        """Yield what `within` computes of each mirror image, mirrored back."""
        for flip in flips:
            mirrored = candidates.flip([axis - 1 for axis in flip])
            yield self.within(image.flip(flip), network, mirrored).flip(flip)

    @abstractmethod
    def share(self, candidates: Bool[Tensor, "b x y z"]) -> float:
        """Return how many voxels the network gets for candidates, over how many it gets for all."""


class SlidingWindow(Inference):
    """Averages overlapping windows with Gaussian weights; for networks that pad.

    Windows and weights are those of MONAI's `sliding_window_inference`, and so are the logits. That
    one cannot leave out windows and fill its batches all the same, and under autocast it rounds
    weighted windows to half precision before it adds them.

    All windows with a candidate in them are computed: the logits of candidates are those that they
    have if there are no other voxels. Windows of air are all alike, so that one of them is
    computed. Mirror images share batches.

    Args:
        patch_size: Sides of the window in voxels, one number or three. In a window of the training
            patches' size, voxels have the context that the network has learnt to use.
        overlap: Share of a window's side that the next window covers too.
        batch_size: Number of windows in a forward pass.
    """

    def __init__(
        self, patch_size: int | Sequence[int], overlap: float = 0.5, batch_size: int = 4
    ) -> None:
        self.patch_size = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
        self.overlap = overlap
        self.batch_size = batch_size

    def within(
        self,
        image: Float[Tensor, "b c x y z"],
        network: Network,
        candidates: Bool[Tensor, "b x y z"],
    ) -> Float[Tensor, "b r x y z"]:
        (logits,) = self.estimates(image, network, candidates, [()])
        return logits

    def estimates(
        self,
        image: Float[Tensor, "b c x y z"],
        network: Network,
        candidates: Bool[Tensor, "b x y z"],
        flips: Sequence[Flip],
    ) -> Iterator[Float[Tensor, "b r x y z"]]:
        padding = self._padding(image.shape[2:])
        firsts = padding[-2::-2]  # voxels before the volume along X, Y and Z
        inside = [slice(f, f + side) for f, side in zip(firsts, image.shape[2:], strict=True)]
        image, candidates = F.pad(image, padding), F.pad(candidates, padding)
        sides = image.shape[2:]
        importance = compute_importance_map(self.patch_size, mode="gaussian", device=image.device)
        weights = torch.zeros(sides, device=image.device)
        for box in self._grid(sides):
            weights[box] += importance

        windows = self._windows(candidates.cpu(), (image != 0).any(dim=1).cpu(), flips)
        segmented = self._segmented(image, windows, network.segment)
        for flip, parts in groupby(segmented, key=lambda pair: pair[0].flip):
            logits: Tensor | None = None
            for window, part in parts:
                weighted = in_float32(part) * importance
                if logits is None:
                    logits = weighted.new_zeros(len(image), len(part), *sides)
                logits[(window.image, slice(None), *window.box)] += weighted
            assert logits is not None
            yield logits.div_(weights).flip(flip)[(..., *inside)]

    def share(self, candidates: Bool[Tensor, "b x y z"]) -> float:
        candidates = F.pad(candidates, self._padding(candidates.shape[1:])).cpu()
        grid = self._grid(candidates.shape[1:])
        computed = sum(bool(mask[box].any()) for mask in candidates for box in grid)
        return computed / (len(candidates) * len(grid))

    def _padding(self, sides: Sequence[int]) -> list[int]:
        """Return the zeros around a volume that is smaller than a window, in `F.pad`'s order."""
        missing = [max(0, w - side) for w, side in zip(self.patch_size, sides, strict=True)]
        return [end for voxels in missing[::-1] for end in (voxels // 2, voxels - voxels // 2)]

    def _grid(self, sides: Sequence[int]) -> list[Box]:
        """Return the windows of a volume; the last along an axis is moved inwards."""
        steps = [max(1, int(side * (1 - self.overlap))) for side in self.patch_size]
        return dense_patch_slices(sides, self.patch_size, steps)

    def _windows(
        self,
        candidates: Bool[Tensor, "b x y z"],
        tissue: Bool[Tensor, "b x y z"],
        flips: Sequence[Flip],
    ) -> Iterator["_Window"]:
        """Yield the windows of each mirror image that have candidates in them.

        Args:
            candidates: Voxels whose logits are wanted.
            tissue: Voxels that are not 0 in every channel.
            flips: The mirror images.
        """
        sides = candidates.shape[1:]
        had_air = False
        for flip, image, box in product(flips, range(len(candidates)), self._grid(sides)):
            source = tuple(
                slice(side - along.stop, side - along.start) if axis in flip else along
                for axis, (along, side) in enumerate(zip(box, sides, strict=True), start=2)
            )
            if candidates[image][source].any():
                is_air = not tissue[image][source].any()
                yield _Window(flip, image, source, box, is_air, is_known=is_air and had_air)
                had_air |= is_air

    def _segmented(
        self,
        image: Float[Tensor, "b c x y z"],
        windows: Iterable["_Window"],
        segment: Callable[[Tensor], Tensor],
    ) -> Iterator[tuple["_Window", Float[Tensor, "r x y z"]]]:
        """Yield windows and their logits; all batches but the last are full."""
        air = image.new_empty(0)  # the logits of windows of air, once they are known
        for batch in self._batches(windows):
            cuts = [
                image[(slice(window.image, window.image + 1), slice(None), *window.source)].flip(
                    window.flip
                )
                for window in batch
                if not window.is_known
            ]
            parts = iter(_never_alone(torch.cat(cuts), segment) if cuts else ())
            for window in batch:
                part = air if window.is_known else next(parts)
                if window.is_air:
                    air = part
                yield window, part

    def _batches(self, windows: Iterable["_Window"]) -> Iterator[list["_Window"]]:
        """Divide windows into batches, in which those of known logits do not count."""
        batch: list[_Window] = []
        for window in windows:
            batch.append(window)
            if sum(not window.is_known for window in batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


class _Window(NamedTuple):
    """A window of a mirror image.

    Attributes:
        flip: The mirror image.
        image: Number of the image in the batch.
        source: Where the window lies on the image.
        box: Where it lies on the mirror image.
        is_air: Whether all its voxels are 0.
        is_known: Whether it is not the first such window.
    """

    flip: Flip
    image: int
    source: Box
    box: Box
    is_air: bool
    is_known: bool


def _never_alone(
    windows: Float[Tensor, "b c x y z"], segment: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b r x y z"]:
    """Segment windows; on a CPU, double a batch of one.

    PyTorch does not use oneDNN for batches of one where channels * X * Y is small: one window of
    48³ takes six times as long as two. Doubled, it has the logits that it has in any other batch.
    """
    if len(windows) == 1 and windows.device.type == "cpu":
        return segment(windows.expand(2, *windows.shape[1:]))[:1]
    return segment(windows)


class WholeVolume(Inference):
    """Segments the volume in one pass, zero padded at its far ends; for networks that pad.

    Candidates are segmented in boxes around them, unless the boxes have as many voxels as the
    volume. The network sees nothing outside a box, so that logits are close to those of one pass,
    but not equal.

    The network's attribute `divisor` is what must divide the sides of its input.

    Args:
        least_side: Least sides of a box in voxels, so that lesions are seen with what is around.
    """

    def __init__(self, least_side: int = 64) -> None:
        self.least_side = least_side

    def within(
        self,
        image: Float[Tensor, "b c x y z"],
        network: Network,
        candidates: Bool[Tensor, "b x y z"],
    ) -> Float[Tensor, "b r x y z"]:
        boxes = self._boxes(candidates)
        if _voxels(boxes) >= candidates.numel():
            return self._in_one_pass(image, network)
        logits: Tensor | None = None
        for index, box in boxes:
            part = self._in_one_pass(image[(slice(index, index + 1), slice(None), *box)], network)
            if logits is None:
                logits = part.new_zeros(len(image), part.shape[1], *image.shape[2:])
            logits[(index, slice(None), *box)] = part[0]
        assert logits is not None
        return logits

    def share(self, candidates: Bool[Tensor, "b x y z"]) -> float:
        return min(1, _voxels(self._boxes(candidates)) / candidates.numel())

    def _in_one_pass(
        self, image: Float[Tensor, "b c x y z"], network: Network
    ) -> Float[Tensor, "b r x y z"]:
        x, y, z = image.shape[2:]
        padded = _padded(image, margin=0, multiple=network.divisor)
        return in_float32(network.segment(padded)[..., :x, :y, :z])

    def _boxes(self, candidates: Bool[Tensor, "b x y z"]) -> list[tuple[int, Box]]:
        """Return the number of an image, and a box in it, for all boxes around candidates."""
        return [
            (index, box)
            for index, mask in enumerate(candidates)
            for box in boxes_around(mask, self.least_side, BOX_MULTIPLE)
        ]


class ExactTiles(Inference):
    """Segments a volume with a network of valid convolutions, in tiles if it is large.

    The logits are those of one pass over all of the volume, however it is cut: the *output* is cut
    into tiles, and each tile is computed from its own voxels and their halo. Zeros surround the
    volume, as they surround patches at its border in training. A coarse output is repeated to full
    resolution (Krivov & Belyaev 2018, section 2.2). Candidates are segmented in boxes around them,
    unless the boxes and their halos have as many voxels as the volume.

    MONAI's sliding window does not fit here: it takes the smaller output of a valid convolution for
    a coarser one, and stretches it over the window. TorchIO's aggregator refuses it.

    The network's `segment_volume` segments a volume in one pass, without a halo around it. Boxes
    without any voxel but 0 have the logits that it gives to a volume of zeros: what a detector says
    about air next to a brain is of no use, and not computed.

    Args:
        geometry: Halo and stride of the network.
        voxels_at_once: The largest number of input voxels in a pass. If memory runs out all the
            same, tiles are halved until it suffices.
    """

    def __init__(self, geometry: Geometry, voxels_at_once: int = 10_000_000) -> None:
        self.geometry = geometry
        self.voxels_at_once = voxels_at_once

    def within(
        self,
        image: Float[Tensor, "b c x y z"],
        network: Network,
        candidates: Bool[Tensor, "b x y z"],
    ) -> Float[Tensor, "b r x y z"]:
        if self.share(candidates) == 1:
            coarse = self.coarse(image, network)
        else:
            coarse = self._coarse_in_boxes(image, network, self._boxes(candidates))
        return repeated(coarse, self.geometry.stride, image.shape[2:])

    def share(self, candidates: Bool[Tensor, "b x y z"]) -> float:
        voxels = sum(
            math.prod(self.input_side(_side(along)) for along in box)
            for box in self._boxes(candidates)
        )
        return min(1, len(candidates) * voxels / candidates.numel())

    def coarse(
        self, image: Float[Tensor, "b c x y z"], network: Network
    ) -> Float[Tensor, "b r x_ y_ z_"]:
        """Compute the logits on the network's grid: sides over the stride, rounded up."""
        halo, stride = self.geometry
        if image[0, 0].numel() <= self.voxels_at_once:
            with suppress_out_of_memory("smaller tiles"):
                return in_float32(network.segment_volume(_padded(image, margin=0, multiple=stride)))
        return self._in_tiles(_padded(image, margin=halo, multiple=stride), network)

    def input_side(self, output_side: int) -> int:
        """Return the number of input voxels along an axis from the number of output voxels."""
        return output_side * self.geometry.stride + 2 * self.geometry.halo

    def _boxes(self, candidates: Bool[Tensor, "b x y z"]) -> list[Box]:
        """Return boxes on the network's grid around the candidates of all images."""
        mask = candidates.any(dim=0)[None].float()
        coarse = F.max_pool3d(mask, self.geometry.stride, ceil_mode=True)[0] > 0
        return boxes_around(coarse, least_side=1, multiple=1)

    def _coarse_in_boxes(
        self, image: Float[Tensor, "b c x y z"], network: Network, boxes: Sequence[Box]
    ) -> Float[Tensor, "b r x_ y_ z_"]:
        """Compute the logits in boxes on the network's grid; 0 elsewhere."""
        halo, stride = self.geometry
        padded = _padded(image, margin=halo, multiple=stride)
        logits: Tensor | None = None
        for box in boxes:
            part = self._in_tiles(
                padded[(..., *(self._seen(along.start, _side(along)) for along in box))], network
            )
            if logits is None:
                grid = [math.ceil(side / stride) for side in image.shape[2:]]
                logits = part.new_zeros(*part.shape[:2], *grid)
            logits[(..., *box)] = part
        assert logits is not None
        return logits

    def _seen(self, first: int, side: int) -> slice:
        """Return the voxels, of a volume with its halo, that `side` output voxels are made from."""
        start = first * self.geometry.stride
        return slice(start, start + self.input_side(side))

    def _in_tiles(
        self, padded: Float[Tensor, "b c x y z"], network: Network
    ) -> Float[Tensor, "b r x_ y_ z_"]:
        """Compute the logits of a volume that has its halo, in the largest tiles that fit."""
        grid = [self.geometry.output_side(side) for side in padded.shape[2:]]
        tile = list(grid)
        while max(tile) > 1:
            if math.prod(map(self.input_side, tile)) <= self.voxels_at_once:
                with suppress_out_of_memory("smaller tiles"):
                    return self._tiled(padded, network, grid, tile)
            tile = halved(tile)
        return self._tiled(padded, network, grid, tile)

    def _tiled(
        self,
        padded: Float[Tensor, "b c x y z"],
        network: Network,
        grid: Sequence[int],
        tile: Sequence[int],
    ) -> Float[Tensor, "b r x_ y_ z_"]:
        """Compute output tiles of sides `tile` that cover the output's grid, and join them."""
        halo, stride = self.geometry
        logits: Tensor | None = None
        air = in_float32(
            network.segment_volume(padded.new_zeros(1, padded.shape[1], *[stride] * 3))
        )
        for start in tile_starts(grid, tile):
            seen = padded[(..., *map(self._seen, start, tile))]
            inner = (slice(halo, side - halo) for side in seen.shape[2:])
            voxels = (seen[(..., *inner)] != 0).flatten(0, 1).any(0)
            brain = F.max_pool3d(voxels[None].float(), stride)[0] > 0
            part = torch.where(brain, in_float32(network.segment(seen)), air)
            if logits is None:
                logits = part.new_empty(*part.shape[:2], *grid)
            predicted = (
                slice(first, first + side) for first, side in zip(start, tile, strict=True)
            )
            logits[(..., *predicted)] = part
        assert logits is not None
        return logits


@runtime_checkable
class Member(Protocol):
    """A network with its inference, such as a `SegmentationModule`."""

    def estimates(
        self,
        image: Float[Tensor, "b c x y z"],
        candidates: Bool[Tensor, "b x y z"],
        flips: Sequence[Flip],
    ) -> Iterator[Float[Tensor, "b r x y z"]]:
        """Yield the probabilities of candidates in each mirror image, mirrored back."""
        ...

    def share(self, candidates: Bool[Tensor, "b x y z"]) -> float:
        """Return how many voxels the network gets for candidates, over how many it gets for all."""
        ...

    def to(self, device: torch.device | str) -> object:
        """Move the network to a device."""
        ...


class Averaged(NamedTuple):
    """What several estimates say together.

    Attributes:
        probabilities: (B, R, X, Y, Z) float32, their mean; 0 where there is no candidate.
        agreement: (B, R) float32, the Dice of one estimate with another among the candidates, over
            all pairs of estimates: of probabilities p and q, as they are, it is 2 Σpq / Σ(p + q).
            NaN for one estimate alone. It knows nothing of the truth: estimates that err alike
            agree.
    """

    probabilities: Tensor
    agreement: Tensor


class Ensemble:
    """Averages probabilities over networks and mirror images.

    Frey & Nau 2019 (section 2.3) average 16 estimates: those of 2 networks on 8 mirror images.

    Args:
        members: Networks with the same input and output.
        flip_axes: Axes of a volume (0, 1, 2). The image is mirrored along every subset of them, and
            the estimate is mirrored back.
        precision: Precision of the networks; a half precision is left to autocast.
    """

    def __init__(
        self,
        members: Sequence[Member],
        flip_axes: Sequence[int] = (),
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.members = list(members)
        axes = [axis + 2 for axis in flip_axes]
        self.flips = [flip for n in range(len(axes) + 1) for flip in combinations(axes, n)]
        self.precision = precision

    @property
    def estimates(self) -> int:
        """How many estimates are averaged."""
        return len(self.members) * len(self.flips)

    def to(self, device: torch.device | str) -> "Ensemble":
        """Move all members to a device, and return the ensemble."""
        for member in self.members:
            member.to(device)
        return self

    def share(self, candidates: Bool[Tensor, "b x y z"]) -> float:
        """Return how many voxels the networks get for candidates, over how many for all."""
        return sum(member.share(candidates) for member in self.members) / len(self.members)

    def __call__(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b r x y z"]:
        """Predict the probabilities of all voxels, in float32, on the device of the image."""
        return self.within(image, everywhere(image)).probabilities

    @torch.inference_mode()
    def within(
        self, image: Float[Tensor, "b c x y z"], candidates: Bool[Tensor, "b x y z"]
    ) -> Averaged:
        """Predict the candidates, of which there is one at least, on the device of the image."""
        half = self.precision is not torch.float32
        inside = candidates[:, None]
        mean: Tensor | None = None  # until the end the sum, so that one estimate is held at a time
        shared: Tensor | float = 0.0  # Σpq over all pairs; an estimate forms one with each before
        with torch.autocast(image.device.type, self.precision, enabled=half):
            for member in self.members:
                for estimate in member.estimates(image, candidates, self.flips):
                    if mean is None:
                        mean = estimate.float()
                    else:
                        shared = shared + (mean * estimate).mul_(inside).sum((2, 3, 4))
                        mean.add_(estimate)
        assert mean is not None
        total = mean.mul_(inside).sum((2, 3, 4))
        return Averaged(
            probabilities=mean.div_(self.estimates),
            agreement=2 * shared / ((self.estimates - 1) * total),
        )

    def computed_on(
        self,
        image: Float[Tensor, "b c x y z"],
        candidates: Bool[Tensor, "b x y z"],
        device: torch.device | str,
    ) -> Averaged:
        """Predict as `within` does on a device, or on the CPU if the device runs out of memory.

        Returns:
            Tensors on the CPU.
        """
        if torch.device(device).type != "cpu":
            with suppress_out_of_memory("on the CPU"):
                found = self.to(device).within(image.to(device), candidates.to(device))
                return Averaged(*(tensor.cpu() for tensor in found))
        return self.to("cpu").within(image.cpu(), candidates.cpu())


def everywhere(image: Shaped[Tensor, "b c x y z"]) -> Bool[Tensor, "b x y z"]:
    """Make every voxel of images a candidate."""
    return torch.ones(len(image), *image.shape[2:], dtype=torch.bool, device=image.device)


def in_float32(logits: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert a half precision to float32: logits are added, and compared with thresholds."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def boxes_around(mask: Bool[Tensor, "x y z"], least_side: int, multiple: int) -> list[Box]:
    """Cover a mask with boxes around its components; boxes that overlap are joined.

    Args:
        mask: Voxels to cover.
        least_side: Least sides of a box, where the volume is not smaller.
        multiple: Number that divides the sides, where the volume is not smaller.
    """
    if mask.all():  # as if there were no candidates to choose: worth no search
        return [tuple(slice(0, side) for side in mask.shape)]
    boxes: list[Box] = []
    for found in grids.component_boxes(mask.cpu().numpy()):
        box = _grown(found, mask.shape, least_side, multiple)
        while overlapping := [other for other in boxes if _overlap(box, other)]:
            boxes = [other for other in boxes if other not in overlapping]
            joined = (
                slice(min(along.start for along in axis), max(along.stop for along in axis))
                for axis in zip(box, *overlapping, strict=True)
            )
            box = _grown(tuple(joined), mask.shape, least_side, multiple)
        boxes.append(box)
    return boxes


def _grown(box: Box, sides: Sequence[int], least_side: int, multiple: int) -> Box:
    """Grow a box on both ends, inside a volume of these sides; see `boxes_around`."""
    grown = []
    for along, side in zip(box, sides, strict=True):
        width = min(side, multiple * math.ceil(max(least_side, _side(along)) / multiple))
        start = min(max(along.start - (width - _side(along)) // 2, 0), side - width)
        grown.append(slice(start, start + width))
    return tuple(grown)


def _overlap(first: Box, second: Box) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(first, second, strict=True))


def _side(along: slice) -> int:
    return along.stop - along.start


def _voxels(boxes: Iterable[tuple[int, Box]]) -> int:
    return sum(math.prod(map(_side, box)) for _, box in boxes)


@contextmanager
def suppress_out_of_memory(instead: str) -> Iterator[None]:
    """Leave a `with` block that runs out of memory, with a warning, and continue after it.

    Args:
        instead: What the caller tries next, for the warning.
    """
    try:
        yield
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        logging.warning("out of memory: trying %s", instead)


def tile_starts(grid: Sequence[int], tile: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the first voxels of tiles that cover a grid.

    The last tile along an axis is moved inwards, so that no tile reaches beyond the grid.
    """
    return product(
        *(
            sorted({min(start, side - width) for start in range(0, side, width)})
            for side, width in zip(grid, tile, strict=True)
        )
    )


def halved(tile: Sequence[int]) -> list[int]:
    """Halve the longest side of a tile."""
    longest = max(range(len(tile)), key=lambda axis: tile[axis])
    return [math.ceil(side / 2) if axis == longest else side for axis, side in enumerate(tile)]


def ran_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _padded(
    image: Float[Tensor, "b c x y z"], margin: int, multiple: int
) -> Float[Tensor, "b c x_ y_ z_"]:
    """Pad with `margin` zeros on all sides, after zeros that fill the far ends up to a multiple."""
    sides = reversed(image.shape[2:])
    padding = [end for side in sides for end in (margin, margin + -side % multiple)]
    return F.pad(image, padding)


def repeated(
    coarse: Shaped[Tensor, "b r x_ y_ z_"], stride: int, shape: Sequence[int]
) -> Shaped[Tensor, "b r x y z"]:
    """Repeat every voxel stride³ times, and cut the far ends off to `shape` (X, Y, Z)."""
    if stride > 1:
        for axis in (2, 3, 4):
            coarse = coarse.repeat_interleave(stride, dim=axis)
    x, y, z = shape
    return coarse[..., :x, :y, :z]
