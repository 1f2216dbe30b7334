"""Inference on whole volumes, for networks that are trained on patches.

An inference is called with images (B, C, X, Y, Z) of any size and with a network. It returns logits
(B, R, X, Y, Z) at full resolution, whatever grid the network predicts on.
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

Network = Any  # its `segment` turns images into logits; some inferences need further attributes
Inference = Callable[[Tensor, Network], Tensor]


class SlidingWindow:
    """Averages overlapping windows with Gaussian weights (MONAI); for networks that pad.

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


def _never_alone(
    windows: Float[Tensor, "b c x y z"], segment: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b r x y z"]:
    """Segment windows; on a CPU, double a batch of one.

    PyTorch does not use oneDNN for batches of one where channels * X * Y is small: one window of
    48³ takes six times as long as two.
    """
    if len(windows) == 1 and windows.device.type == "cpu":
        return segment(windows.expand(2, *windows.shape[1:]))[:1]
    return segment(windows)


class WholeVolume:
    """Segments the volume in one pass, zero padded at its far ends; for networks that pad.

    The network's attribute `divisor` is what must divide the sides of its input.
    """

    def __call__(
        self, image: Float[Tensor, "b c x y z"], network: Network
    ) -> Float[Tensor, "b r x y z"]:
        x, y, z = image.shape[2:]
        return network.segment(_padded(image, margin=0, multiple=network.divisor))[..., :x, :y, :z]


class ExactTiles:
    """Segments a volume with a network of valid convolutions, in tiles if it is large.

    The logits are those of one pass over all of the volume, however it is cut: the *output* is cut
    into tiles, and each tile is computed from its own voxels and their halo. Zeros surround the
    volume, as they surround patches at its border in training. A coarse output is repeated to full
    resolution (Krivov & Belyaev 2018, section 2.2).

    MONAI's sliding window does not fit here: it takes the smaller output of a valid convolution for
    a coarser one, and stretches it over the window. TorchIO's aggregator refuses it.

    The network's `segment_volume` segments a volume in one pass, without a halo around it.

    Args:
        geometry: Halo and stride of the network.
        voxels_at_once: The largest number of input voxels in a pass. If memory runs out all the
            same, tiles are halved until it suffices.
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
        """Compute the logits on the network's grid: sides over the stride, rounded up."""
        halo, stride = self.geometry
        if image[0, 0].numel() <= self.voxels_at_once:
            with suppress_out_of_memory("smaller tiles"):
                return network.segment_volume(_padded(image, margin=0, multiple=stride))
        grid = [math.ceil(side / stride) for side in image.shape[2:]]
        padded = _padded(image, margin=halo, multiple=stride)
        tile = list(grid)
        while max(tile) > 1:
            if math.prod(map(self.input_side, tile)) <= self.voxels_at_once:
                with suppress_out_of_memory("smaller tiles"):
                    return self._tiled(padded, network, grid, tile)
            tile = halved(tile)
        return self._tiled(padded, network, grid, tile)

    def input_side(self, output_side: int) -> int:
        """Return the number of input voxels along an axis from the number of output voxels."""
        return output_side * self.geometry.stride + 2 * self.geometry.halo

    def _tiled(
        self,
        padded: Float[Tensor, "b c x y z"],
        network: Network,
        grid: Sequence[int],
        tile: Sequence[int],
    ) -> Float[Tensor, "b r x_ y_ z_"]:
        """Compute output tiles of sides `tile` that cover the output's grid, and join them."""
        stride = self.geometry.stride
        logits: Tensor | None = None
        for start in tile_starts(grid, tile):
            seen = [
                slice(first * stride, first * stride + self.input_side(side))
                for first, side in zip(start, tile, strict=True)
            ]
            part: Tensor = network.segment(padded[(..., *seen)])
            if logits is None:
                logits = part.new_empty(*part.shape[:2], *grid)
            predicted = (
                slice(first, first + side) for first, side in zip(start, tile, strict=True)
            )
            logits[(..., *predicted)] = part
        assert logits is not None
        return logits


class Ensemble:
    """Averages probabilities over networks and mirror images.

    Frey & Nau 2019 (section 2.3) average 16 estimates: those of 2 networks on 8 mirror images.

    Args:
        members: Modules that turn images (B, C, X, Y, Z) into probabilities (B, R, X, Y, Z).
        flip_axes: Axes of a volume (0, 1, 2). The image is mirrored along every subset of them, and
            the estimate is mirrored back.
        precision: Precision of the networks; a half precision is left to autocast.
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
        """How many estimates are averaged."""
        return len(self.members) * len(self.flips)

    def to(self, device: torch.device | str) -> "Ensemble":
        """Move all members to a device, and return the ensemble."""
        for member in self.members:
            member.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b r x y z"]:
        """Predict probabilities, in float32, on the device of the image."""
        half = self.precision is not torch.float32
        mean: Tensor | None = None  # until the end the sum, so that one estimate is held at a time
        with torch.autocast(image.device.type, self.precision, enabled=half):
            for member, flip in product(self.members, self.flips):
                estimate = member(image.flip(flip)).float().flip(flip)
                mean = estimate if mean is None else mean.add_(estimate)
        assert mean is not None
        return mean.div_(self.estimates)

    def computed_on(
        self, image: Float[Tensor, "b c x y z"], device: torch.device | str
    ) -> Float[Tensor, "b r x y z"]:
        """Predict probabilities on a device, or on the CPU if the device runs out of memory.

        Returns:
            Probabilities in float32, on the CPU.
        """
        if torch.device(device).type != "cpu":
            with suppress_out_of_memory("on the CPU"):
                return self.to(device)(image.to(device)).cpu()
        return self.to("cpu")(image.cpu())


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
