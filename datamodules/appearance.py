"""Change how the modalities of a patch look: contrast, field, sharpness, noise, or which there are.

Domain randomisation (Tobin et al. 2017; Billot et al. 2023, SynthSeg): a network that has seen each
scan in many appearances takes a scan of another scanner for one more of them.

The loader draws numbers, for each modality its own, and the device of the network applies them to
all patches of a batch at once. TorchIO has transforms for most of this, which change one patch
after the other on the CPU, and all its modalities alike. Even with every modality changed, on one
thread and patches of 32³ voxels, they take 1.1 (gamma), 1.3 (blur), 3 (noise), 4 (bias field) and
6 times (thick slices) as long. All of `augmentation=wide` takes 3 % of the proxy's training step.

Intensities are in standard deviations of a modality in the brain, with a mean of 0, and voxels of
exactly 0 are background. They stay 0, and nothing of them gets into the brain.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import InputError

# A scan has an intensity of 0 about so many standard deviations below the mean of the brain: 3 to 5
# in phantoms. A power and a factor act on intensities that are counted from there.
BLACK = 4.0


class Drawn(NamedTuple):
    """What a part of the appearance does to some channels.

    The arrays are those of NumPy, since Lightning moves tensors to the device: on the host they can
    be read without waiting for it.

    Attributes:
        channels: (N,), int64, index of each channel that changes.
        numbers: (N, K), float64, what its change is made of.
    """

    channels: np.ndarray
    numbers: np.ndarray


class Part(ABC):
    """A change that each modality of a patch has with some probability and with its own draw.

    Args:
        probability: Probability that a modality is changed.

    Raises:
        InputError: An argument has another value.
    """

    def __init__(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise InputError(f"probability: expected a number from 0 to 1, found {probability}")
        self.probability = probability

    def draw(self, modalities: int) -> Drawn:
        """Draw which modalities change, and the numbers of each, with PyTorch's generator."""
        chosen = self.choose(modalities)
        return Drawn(chosen.numpy(), self.numbers(chosen, modalities).double().numpy())

    def choose(self, modalities: int) -> Tensor:
        """Draw the indices (N,) of the modalities that change."""
        return (torch.rand(modalities) < self.probability).nonzero()[:, 0]

    @abstractmethod
    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw the numbers (N, K) of the changes of the modalities `chosen` (N,)."""

    @classmethod
    @abstractmethod
    def change(cls, channels: Tensor, drawn: Drawn) -> None:
        """Change some of the channels (M, X, Y, Z), float32, in place."""


class Copied(Part):
    """Replace a modality by a copy of another one."""

    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw how many channels further the copied modality lies: any but its own."""
        # The opposite hemisphere has its modalities in the same order, so that the difference
        # holds there too.
        further = torch.randint(1, max(modalities, 2), (len(chosen), 1))
        return (chosen[:, None] + further) % modalities - chosen[:, None]

    @classmethod
    def change(cls, channels: Tensor, drawn: Drawn) -> None:
        """Change some of the channels (M, X, Y, Z), float32, in place; all copies at once."""
        sources = drawn.channels + drawn.numbers[:, 0].astype(np.int64)
        to, from_ = (torch.from_numpy(i).to(channels.device) for i in (drawn.channels, sources))
        channels.index_copy_(0, to, channels.index_select(0, from_))


class Missing(Part):
    """Remove a modality: all its voxels become 0. One modality at least is left."""

    def choose(self, modalities: int) -> Tensor:
        """Draw the indices (N,) of the modalities that are missing."""
        chosen = super().choose(modalities)
        spared = int(torch.randint(modalities, ()))
        return chosen if len(chosen) < modalities else chosen[chosen != spared]

    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw nothing."""
        return torch.empty(len(chosen), 0)

    @classmethod
    def change(cls, channels: Tensor, drawn: Drawn) -> None:
        """Set some of the channels (M, X, Y, Z) to 0, in place."""
        channels.index_fill_(0, torch.from_numpy(drawn.channels).to(channels.device), 0)


class OwnVoxels(Part):
    """A change of a modality for which its own voxels are enough."""

    @classmethod
    def change(cls, channels: Tensor, drawn: Drawn) -> None:
        """Change the brain in some of the channels (M, X, Y, Z), float32, in place."""
        if not len(drawn.channels):
            return
        index = torch.from_numpy(drawn.channels).to(channels.device)
        image = channels.index_select(0, index)
        # 1 in the foreground, 0 in the background; a comparison takes twice as long.
        foreground = image.sign().abs_()
        changed = cls.changed(image, foreground, drawn.numbers)
        channels.index_copy_(0, index, changed.mul_(foreground))

    @classmethod
    @abstractmethod
    def changed(cls, image: Tensor, foreground: Tensor, numbers: np.ndarray) -> Tensor:
        """Return N channels as they change; what is returned outside the brain does not count.

        Args:
            image: (N, X, Y, Z).
            foreground: (N, X, Y, Z), 1 in the brain and 0 outside.
            numbers: (N, K).
        """


class Contrast(OwnVoxels):
    """Move the classes of intensities against each other, and so the contrast between tissues.

    Each of the intensities `KNOTS` has an offset, and those between two have one in between: a
    piecewise linear curve, which may fall in places. Beyond the ends the offset is constant.

    Args:
        probability: Probability that a modality is changed.
        offset: Range of the offset, in standard deviations.
    """

    KNOTS = (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0)

    def __init__(self, probability: float, offset: Sequence[float]) -> None:
        super().__init__(probability)
        self.offset = _checked("offset", offset)

    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw the offset of each knot."""
        return _uniform(self.offset, len(chosen), len(self.KNOTS))

    @classmethod
    def changed(cls, image: Tensor, foreground: Tensor, numbers: np.ndarray) -> Tensor:
        """Return the sum of the image and of the curve of offsets."""
        offsets = _columns(numbers, image)
        changed = image + offsets[0]
        for knot, offset, following in zip(cls.KNOTS, offsets, offsets[1:], strict=False):
            changed.addcmul_((image - knot).clamp_(0, 1), following - offset)  # knots are 1 apart
        return changed


class Gamma(OwnVoxels):
    """Raise intensities to a power, which keeps the mean of the brain and its contrast there.

    A voxel of value v becomes `BLACK / e * ((1 + v / BLACK) ** e - 1)`.

    Args:
        probability: Probability that a modality is changed.
        exponent: Range of the exponent e; one above 1 stretches what is bright.
    """

    def __init__(self, probability: float, exponent: Sequence[float]) -> None:
        super().__init__(probability)
        self.exponent = _checked("exponent", exponent, above=0)

    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw the exponent."""
        return _uniform(self.exponent, len(chosen), 1)

    @classmethod
    def changed(cls, image: Tensor, foreground: Tensor, numbers: np.ndarray) -> Tensor:
        """Return the power; intensities below black count as black."""
        (exponent,) = _columns(numbers, image)
        power = (image / BLACK + 1).clamp_(min=0).pow_(exponent)
        return power.sub_(1).mul_(BLACK / exponent)


class Bias(OwnVoxels):
    """Multiply intensities, counted from black, by a smooth field, as a receive coil does.

    The logarithm of the field is quadratic along each axis. It takes uniform random values at
    3 x 3 x 3 points from corner to corner.

    Args:
        probability: Probability that a modality is changed.
        strength: Range of the largest logarithm at a point, which is about the relative change.
    """

    def __init__(self, probability: float, strength: Sequence[float]) -> None:
        super().__init__(probability)
        self.strength = _checked("strength", strength, least=0)

    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw the logarithm of the field at the 27 points."""
        strength = _uniform(self.strength, len(chosen), 1)
        return strength * _uniform((-1, 1), len(chosen), 27)

    @classmethod
    def changed(cls, image: Tensor, foreground: Tensor, numbers: np.ndarray) -> Tensor:
        """Return the image in the field."""
        points = torch.as_tensor(numbers, dtype=torch.float32).to(image.device).view(-1, 3, 3, 3)
        bases = []
        for side in image.shape[1:]:
            place = torch.linspace(-1, 1, side, device=image.device)
            basis = [place * (place - 1) / 2, 1 - place**2, place * (place + 1) / 2]
            bases.append(torch.stack(basis, 1)[None])
        field = along_axes(points, bases).exp_()
        return (image + BLACK).mul_(field).sub_(BLACK)


class Intensity(OwnVoxels):
    """Scale and shift a modality, as `augmentation.RandomIntensity` does.

    Args:
        probability: Probability that a modality is changed.
        scale: Range of the scale.
        shift: Range of the shift, in standard deviations.
    """

    def __init__(self, probability: float, scale: Sequence[float], shift: Sequence[float]) -> None:
        super().__init__(probability)
        self.scale = _checked("scale", scale, above=0)
        self.shift = _checked("shift", shift)

    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw scale and shift."""
        count = len(chosen)
        return torch.cat([_uniform(self.scale, count, 1), _uniform(self.shift, count, 1)], 1)

    @classmethod
    def changed(cls, image: Tensor, foreground: Tensor, numbers: np.ndarray) -> Tensor:
        """Return the scaled and shifted image."""
        scale, shift = _columns(numbers, image)
        return (image * scale).add_(shift)


class Filter(OwnVoxels):
    """Filter a modality along each axis, as if the brain went on beyond its border.

    The voxels of the background take the value of the voxel that is filtered. So the filter does
    not darken the border of the brain, and leaves a brain of one intensity as it is.
    """

    @classmethod
    def changed(cls, image: Tensor, foreground: Tensor, numbers: np.ndarray) -> Tensor:
        """Return the filtered image."""
        matrices = [
            cls.matrix(side, *_columns(numbers[:, axis::3], image, dims=2))
            for axis, side in enumerate(image.shape[1:])
        ]
        weight = along_axes(foreground, matrices)
        return along_axes(image, matrices).addcmul_(image, 1 - weight)

    @staticmethod
    @abstractmethod
    def matrix(side: int, *numbers: Tensor) -> Tensor:
        """Return the filter along an axis as a matrix (N, side, side), whose rows sum to 1.

        Args:
            side: Voxels along the axis.
            numbers: Every third of those of `numbers()`, from that of this axis on, each (N, 1, 1).
        """


class Blur(Filter):
    """Blur with a Gaussian, of another width along each axis.

    Args:
        probability: Probability that a modality is changed.
        sd_mm: Range of the standard deviation along an axis, in mm.
        spacing_mm: Edge of a voxel of the volume that patches are cut from, in mm.
    """

    def __init__(self, probability: float, sd_mm: Sequence[float], spacing_mm: float) -> None:
        super().__init__(probability)
        self.sd_mm = _checked("sd_mm", sd_mm, least=0)
        self.spacing_mm = spacing_mm

    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw the standard deviation along x, y and z, in voxels."""
        return _uniform(self.sd_mm, len(chosen), 3) / self.spacing_mm

    @staticmethod
    def matrix(side: int, *numbers: Tensor) -> Tensor:
        """Return the weights of a Gaussian, whose part beyond the patch is left out."""
        (sd,) = numbers
        place = torch.arange(side, dtype=torch.float32, device=sd.device)
        distance = (place[:, None] - place) / sd.clamp(min=1e-3)  # so that 0 blurs nothing
        weights = distance.square_().mul_(-0.5).exp_()
        return weights / weights.sum(-1, keepdim=True)


class Slices(Filter):
    """Acquire a modality in thick slices along one axis, and interpolate linearly between them.

    A slice is the mean over its thickness, and the next one begins where it ends.

    Args:
        probability: Probability that a modality is changed.
        thickness_mm: Range of the thickness; one of a voxel or less changes nothing.
        spacing_mm: Edge of a voxel of the volume that patches are cut from, in mm.
    """

    def __init__(
        self, probability: float, thickness_mm: Sequence[float], spacing_mm: float
    ) -> None:
        super().__init__(probability)
        self.thickness_mm = _checked("thickness_mm", thickness_mm, above=0)
        self.spacing_mm = spacing_mm

    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw thickness, and centre of the first slice, along x, y and z, in voxels."""
        thickness = (_uniform(self.thickness_mm, len(chosen), 1) / self.spacing_mm).clamp(min=1)
        first = (thickness - 1) * torch.rand(len(chosen), 1)
        is_axis = torch.arange(3) == torch.randint(3, (len(chosen), 1))
        return torch.cat([torch.where(is_axis, thickness, 1), is_axis * first], 1)

    @staticmethod
    def matrix(side: int, *numbers: Tensor) -> Tensor:
        """Return the weights with which the voxels of two slices make those between their centres.

        Slices whose centre lies outside the patch are not there.
        """
        thickness, first = numbers
        first = first.clamp(max=side - 1)
        voxel = torch.arange(side, dtype=torch.float32, device=first.device)
        last = ((side - 1 - first) / thickness).floor()
        place = ((voxel[:, None] - first) / thickness).clamp(min=0).minimum(last)
        before = place.floor()
        share = place - before

        def weights(slice_: Tensor) -> Tensor:
            low = first + (slice_ - 0.5) * thickness
            begins, ends = (voxel - 0.5).maximum(low), (voxel + 0.5).minimum(low + thickness)
            overlap = (ends - begins).clamp_(min=0)
            return overlap / overlap.sum(-1, keepdim=True)

        return weights(before) * (1 - share) + weights((before + 1).minimum(last)) * share


class Ringing(Filter):
    """Drop the high frequencies, which leaves ripples at sharp edges (Gibbs).

    Frequencies are those of the discrete cosine transform, for which a patch has no seam.

    Args:
        probability: Probability that a modality is changed.
        kept: Range of the share of the frequencies along an axis that is kept.
    """

    def __init__(self, probability: float, kept: Sequence[float]) -> None:
        super().__init__(probability)
        self.kept = _checked("kept", kept, above=0, most=1)

    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw the share that is kept along x, y and z."""
        return _uniform(self.kept, len(chosen), 3)

    @staticmethod
    def matrix(side: int, *numbers: Tensor) -> Tensor:
        """Return the transform, the choice of frequencies and the inverse transform, as one."""
        (kept,) = numbers
        count = torch.arange(side, dtype=torch.float32, device=kept.device)
        cosines = (math.pi / side * (count[:, None] + 0.5) * count).cos_() * math.sqrt(2 / side)
        cosines[:, 0] = math.sqrt(1 / side)
        return (cosines * (count < kept * side)) @ cosines.T


class Noise(OwnVoxels):
    """Add Gaussian noise, the same on a device whatever the batch, other on another kind of device.

    Args:
        probability: Probability that a modality is changed.
        sd: Range of the standard deviation of the noise, in those of the modality in the brain.
    """

    def __init__(self, probability: float, sd: Sequence[float]) -> None:
        super().__init__(probability)
        self.sd = _checked("sd", sd, least=0)

    def numbers(self, chosen: Tensor, modalities: int) -> Tensor:
        """Draw the standard deviation, and the seed of the noise."""
        seeds = torch.randint(2**31, (len(chosen), 1)).double()
        return torch.cat([_uniform(self.sd, len(chosen), 1).double(), seeds], 1)

    @classmethod
    def changed(cls, image: Tensor, foreground: Tensor, numbers: np.ndarray) -> Tensor:
        """Return the image with noise."""
        noise = torch.empty_like(image)
        generator = torch.Generator(image.device)
        for channel, (sd, seed) in zip(noise, numbers, strict=True):
            channel.normal_(0, sd, generator=generator.manual_seed(int(seed)))
        return noise.add_(image)


Appearance = Mapping[type[Part], Drawn]
SAME_APPEARANCE: Appearance = {}


def draw_appearance(
    parts: Iterable[Part], modalities: int, modality_of_channels: Sequence[int | None]
) -> Appearance:
    """Draw how a patch is to look.

    Args:
        parts: What may change, in this order.
        modalities: Number of modalities.
        modality_of_channels: (C,), see `augmentation.modality_of_channels`. Channels of one
            modality share its draw, but for the values of the noise; others do not change.
    """
    appearance: dict[type[Part], Drawn] = {}
    for part in parts:
        drawn = part.draw(modalities)
        row_of = {int(modality): row for row, modality in enumerate(drawn.channels)}
        changed = [c for c, modality in enumerate(modality_of_channels) if modality in row_of]
        rows = [row_of[modality_of_channels[channel]] for channel in changed]  # pyright: ignore
        appearance[type(part)] = Drawn(np.array(changed, np.int64), drawn.numbers[rows])
    return appearance


def collate_appearances(appearances: Sequence[Appearance], channels: int) -> Appearance:
    """Join what was drawn for each patch of a batch to that for all channels of the batch.

    Args:
        appearances: Those of the patches; all have their parts in the same order.
        channels: Number of channels of a patch.
    """
    joined = {}
    for part in dict.fromkeys(part for appearance in appearances for part in appearance):
        drawn = [(index, a[part]) for index, a in enumerate(appearances) if part in a]
        joined[part] = Drawn(
            np.concatenate([own.channels + index * channels for index, own in drawn]),
            np.concatenate([own.numbers for _, own in drawn]),
        )
    return joined


def change_appearance(image: Tensor, appearance: Appearance) -> Tensor:
    """Change the appearance of patches, in place.

    Args:
        image: (..., X, Y, Z), float32, contiguous. Voxels of exactly 0 are background, and stay 0.
        appearance: What changes, with indices of channels in the flat list of all of them.

    Returns:
        `image`.
    """
    channels = image.view(-1, *image.shape[-3:])
    for part, drawn in appearance.items():
        part.change(channels, drawn)
    return image


def along_axes(volumes: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply volumes (N, X, Y, Z) by a matrix along each axis.

    Args:
        volumes: (N, X, Y, Z).
        matrices: Three of shapes (N, X', X), (N, Y', Y) and (N, Z', Z); or with 1 in place of N.

    Returns:
        (N, X', Y', Z').
    """
    x, y, z = matrices
    count, sides = len(volumes), volumes.shape[1:]
    volumes = (x @ volumes.reshape(count, sides[0], -1)).view(count, -1, *sides[1:])
    volumes = y[:, None] @ volumes
    rows = volumes.reshape(count, -1, sides[2]) @ z.transpose(1, 2)
    return rows.view(*volumes.shape[:3], -1)


def _columns(numbers: np.ndarray, image: Tensor, dims: int = 3) -> tuple[Tensor, ...]:
    """Return each of the K numbers of N channels as (N, 1, ...), on the device of the image."""
    on_device = torch.as_tensor(numbers, dtype=torch.float32).to(image.device)
    return on_device.view(*numbers.shape, *[1] * dims).unbind(1)


def _uniform(limits: tuple[float, float], rows: int, columns: int) -> Tensor:
    """Draw numbers (rows, columns) from a range."""
    return torch.empty(rows, columns).uniform_(*limits)


def _checked(
    name: str,
    limits: Sequence[float],
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
) -> tuple[float, float]:
    """Return a range of numbers as a pair.

    Raises:
        InputError: It is not one, or reaches beyond the bounds.
    """
    low, high = limits
    if not (least <= low <= high <= most and low > above):
        words = f"{least:g} <= " if math.isfinite(least) else ""
        words += f"{above:g} < " if math.isfinite(above) else ""
        words += "low <= high" + (f" <= {most:g}" if math.isfinite(most) else "")
        raise InputError(f"{name}: expected {words}, found {low}, {high}")
    return low, high
