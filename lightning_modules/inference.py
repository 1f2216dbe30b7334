"""From patches to whole volumes.

An inference is called with an image (B, C, X, Y, Z) of any size and a network, and returns logits
(B, R, X, Y, Z) of all of it at full resolution, whatever grid the network predicts on.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from lightning_modules.networks.geometry import Geometry

Network = Any  # has `segment`, the logits of patches, and what else an inference says it calls
Inference = Callable[[Tensor, Network], Tensor]


class SlidingWindow:
    """Overlapping windows, blended by Gaussian weights (MONAI); for networks that pad.

    Args:
        patch_size: Side of the window in voxels, one number or three. A window of the training
            patches' size keeps the context that the network has learnt to use.
        overlap: Share of a window that its neighbour covers too.
        batch_size: Number of windows in a forward pass.
    """

    def __init__(
        self, patch_size: int | Sequence[int], overlap: float = 0.5, batch_size: int = 4
    ) -> None:
        self.patch_size = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
        self.overlap = overlap
        self.batch_size = batch_size

    def __call__(
        self, image: Float[Tensor, "b c x y z"], network: Network
    ) -> Float[Tensor, "b r x y z"]:
        logits = sliding_window_inference(
            image,
            roi_size=self.patch_size,
            sw_batch_size=self.batch_size,
            predictor=lambda windows: _never_alone(windows, network.segment),
            overlap=self.overlap,
            mode="gaussian",
        )
        return cast(Tensor, logits)


def _never_alone(windows: Tensor, segment: Callable[[Tensor], Tensor]) -> Tensor:
    """Segment a single window on a CPU as two.

    For batches of one, PyTorch leaves oneDNN wherever channels * X * Y is small: one window of 48³
    takes six times as long as two.
    """
    if len(windows) == 1 and windows.device.type == "cpu":
        return segment(windows.expand(2, *windows.shape[1:]))[:1]
    return segment(windows)


class WholeVolume:
    """One pass over the volume, zero padded at its far ends; for networks that pad.

    The network has a `divisor`, which must divide the sides of its input.
    """

    def __call__(
        self, image: Float[Tensor, "b c x y z"], network: Network
    ) -> Float[Tensor, "b r x y z"]:
        x, y, z = image.shape[2:]
        return network.segment(_padded(image, before=0, multiple=network.divisor))[..., :x, :y, :z]


class ExactTiles:
    """A valid-convolution network over a volume: what one pass over all of it would give.

    Around the volume are zeros, as around patches at its border in training. The volume is computed
    in one pass if that fits, else in tiles that are cut from the *output*: each is computed from
    its own voxels and their halo, so that no value depends on how the output was cut. A coarse
    output comes to full resolution by repetition (Krivov & Belyaev 2018, section 2.2). (MONAI's
    sliding window takes a smaller output for a coarser one and stretches it over the window;
    TorchIO's aggregator raises.)

    The network has `segment_volume`: the one pass, without a halo around the volume.

    Args:
        geometry: Halo and stride of the network.
        voxels_at_once: The largest number of input voxels in a pass. Where memory runs out all the
            same, tiles are halved until it does not.
    """

    def __init__(self, geometry: Geometry, voxels_at_once: int = 10_000_000) -> None:
        self.geometry = geometry
        self.voxels_at_once = voxels_at_once

    def __call__(
        self, image: Float[Tensor, "b c x y z"], network: Network
    ) -> Float[Tensor, "b r x y z"]:
        return repeated(self.coarse(image, network), self.geometry.stride, image.shape[2:])

    def coarse(
        self, image: Float[Tensor, "b c x y z"], network: Network
    ) -> Float[Tensor, "b r x_ y_ z_"]:
        """Logits on the network's own grid, whose sides are those of the image over the stride."""
        halo, stride = self.geometry
        if image[0, 0].numel() <= self.voxels_at_once:
            with suppress_out_of_memory("smaller tiles"):
                return network.segment_volume(_padded(image, before=0, multiple=stride))
        grid = [math.ceil(side / stride) for side in image.shape[2:]]
        padded = _padded(image, before=halo, multiple=stride)
        tile = list(grid)
        while max(tile) > 1:
            if math.prod(map(self.input_side, tile)) <= self.voxels_at_once:
                with suppress_out_of_memory("smaller tiles"):
                    return self._tiled(padded, network, grid, tile)
            tile = halved(tile)
        return self._tiled(padded, network, grid, tile)

    def input_side(self, output_side: int) -> int:
        return output_side * self.geometry.stride + 2 * self.geometry.halo

    def _tiled(
        self, padded: Tensor, network: Network, grid: Sequence[int], tile: Sequence[int]
    ) -> Tensor:
        logits: Tensor | None = None
        for start in tile_starts(grid, tile):
            here = [
                slice(s * self.geometry.stride, s * self.geometry.stride + self.input_side(side))
                for s, side in zip(start, tile, strict=True)
            ]
            part: Tensor = network.segment(padded[(..., *here)])
            if logits is None:
                logits = part.new_empty(*part.shape[:2], *grid)
            there = (slice(s, s + side) for s, side in zip(start, tile, strict=True))
            logits[(..., *there)] = part
        assert logits is not None
        return logits


class Ensemble:
    """Mean probability over networks and mirror images: 8 flips x 2 models, 16 estimates (2.3).

    It adds up estimates as they come, so that any number of them takes the memory of two.

    Args:
        members: Modules that turn images (B, C, X, Y, Z) into probabilities (B, R, X, Y, Z).
        flip_axes: The image is mirrored along every subset of these axes of a volume, and the
            estimate is mirrored back.
        precision: Precision of the networks; half precisions are those of autocast.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        flip_axes: Sequence[int] = (),
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.members = list(members)
        axes = [axis + 2 for axis in flip_axes]
        self.flips = [flip for n in range(len(axes) + 1) for flip in combinations(axes, n)]
        self.precision = precision

    @property
    def estimates(self) -> int:
        """Number of estimates that are averaged."""
        return len(self.members) * len(self.flips)

    def to(self, device: torch.device | str) -> "Ensemble":
        """Move all members to a device; returns itself."""
        for member in self.members:
            member.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b r x y z"]:
        """Probabilities in float32, on the device of the image."""
        half = self.precision is not torch.float32
        mean: Tensor | None = None
        with torch.autocast(image.device.type, self.precision, enabled=half):
            for member, flip in product(self.members, self.flips):
                estimate = member(image.flip(flip)).float().flip(flip)
                mean = estimate if mean is None else mean.add_(estimate)
        assert mean is not None
        return mean.div_(self.estimates)

    def computed_on(
        self, image: Float[Tensor, "b c x y z"], device: torch.device | str
    ) -> Float[Tensor, "b r x y z"]:
        """The same, computed on a device, or on the CPU if the device runs out of memory."""
        if torch.device(device).type != "cpu":
            with suppress_out_of_memory("on the CPU"):
                return self.to(device)(image.to(device)).cpu()
        return self.to("cpu")(image.cpu())


@contextmanager
def suppress_out_of_memory(instead: str) -> Iterator[None]:
    """Leave the block if memory runs out in it, with a warning, and continue behind it."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        logging.warning("out of memory: trying %s", instead)


def tile_starts(grid: Sequence[int], tile: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """First voxels of tiles that cover a grid; the last tile of an axis is moved inwards to fit."""
    return product(
        *(
            sorted({min(start, side - width) for start in range(0, side, width)})
            for side, width in zip(grid, tile, strict=True)
        )
    )


def halved(tile: Sequence[int]) -> list[int]:
    """The tile with its longest side halved."""
    longest = max(range(len(tile)), key=lambda axis: tile[axis])
    return [math.ceil(side / 2) if axis == longest else side for axis, side in enumerate(tile)]


def ran_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _padded(image: Tensor, before: int, multiple: int) -> Tensor:
    """Pad (B, C, X, Y, Z) with `before` zeros on all sides, and at the far ends to a multiple."""
    sides = reversed(image.shape[2:])
    padding = [end for side in sides for end in (before, before + -side % multiple)]
    return F.pad(image, padding)


def repeated(
    coarse: Shaped[Tensor, "b r x_ y_ z_"], stride: int, shape: Sequence[int]
) -> Shaped[Tensor, "b r x y z"]:
    """Repeat every voxel as stride³ voxels, and cut the result to `shape` (X, Y, Z)."""
    if stride > 1:
        for axis in (2, 3, 4):
            coarse = coarse.repeat_interleave(stride, dim=axis)
    x, y, z = shape
    return coarse[..., :x, :y, :z]
