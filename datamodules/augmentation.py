"""Random changes of a patch: what TorchIO's flips and our intensities do, drawn before it is done.

TorchIO changes one patch after the other on the CPU, as float32. Flips cost nothing in the copy
that cuts a patch out of its volume; appearance and intensities are changed on the device, as one
batch. So the loader only draws them, with the same random numbers as TorchIO.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torchio as tio
from torch import Tensor
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.intensity_transform import IntensityTransform

from datamodules.appearance import (
    SAME_APPEARANCE,
    Appearance,
    Part,
    change_appearance,
    draw_appearance,
)
from datamodules.preprocessing import Extra
from datamodules.similarity import MirroredByTemplate
from errors import InputError


def modality_of_channels(
    modalities: int, extras: Mapping[str, Extra], mirrored: bool
) -> list[int | None]:
    """Tell which modality each channel of a patch shows.

    Args:
        modalities: Number of modalities, the first channels of every case.
        extras: Further channels of the cache, in the order of the channels.
        mirrored: The channels of the opposite hemisphere follow, see `sampling.cut_with_mirrored`.

    Returns:
        An index below `modalities` for each channel; None for one that is not a scan.
    """
    channels: list[int | None] = list(range(modalities))
    for extra in extras.values():
        channels += range(modalities) if isinstance(extra, MirroredByTemplate) else [None]
    return channels * 2 if mirrored else channels


def change_intensities(image: Tensor, scale_and_shift: Tensor) -> Tensor:
    """Scale and shift the foreground of every channel, in place.

    Args:
        image: (..., C, X, Y, Z), float32. Voxels of exactly 0 are background, and stay 0.
        scale_and_shift: (..., C, 2), float32, or (..., 0, 2), which leaves all as it is.

    Returns:
        `image`.

    Raises:
        InputError: The image has another number of channels.
    """
    channels, expected = image.shape[-4], scale_and_shift.shape[-2]
    if not expected:
        return image
    if channels != expected:
        raise InputError(
            f"inputs.extras: expected {expected} channels to augment, found {channels}"
        )
    scale, shift = scale_and_shift[..., None, None, None].unbind(-4)
    # 1 in the foreground, 0 in the background; a comparison takes twice as long.
    foreground = image.sign().abs_()
    return image.mul_(scale).addcmul_(foreground, shift)


class _OfModalities(RandomTransform, IntensityTransform):
    """What changes the modalities of a patch, each by a draw of its own; masks stay.

    Args:
        modalities: Number of modalities, see `modality_of_channels`.
        extras: Further channels of the cache.
        mirrored: The channels of the opposite hemisphere follow.
        copy: Leave the subject that is passed as it is, and change a copy.
    """

    def __init__(
        self, modalities: int, extras: Mapping[str, Extra], mirrored: bool, copy: bool
    ) -> None:
        super().__init__(copy=copy)
        self.modalities = modalities
        self.modality_of_channels = modality_of_channels(modalities, extras, mirrored)

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        """Change every image (C, X, Y, Z), float32, of a subject by the same draw."""
        drawn = self.draw()
        for image in self.get_images(subject):
            self.change(image.data, drawn)
        return subject

    @abstractmethod
    def draw(self) -> Any:  # noqa: ANN401  (each kind draws its own)
        """Draw what changes in the channels of a patch."""

    @staticmethod
    @abstractmethod
    def change(image: Tensor, drawn: Any, /) -> object:  # noqa: ANN401
        """Change an image (C, X, Y, Z), float32, in place, as drawn."""


class RandomIntensity(_OfModalities):
    """Scale and shift the intensities of each modality at random (Myronenko 2018).

    A voxel of value v becomes `scale * v + shift`, with one draw of both for each modality of a
    patch. The opposite hemisphere is the same scan, so it shares the draw of its modality. Channels
    that are not scans stay as they are: the correlation with a template, for instance, does not
    change when a scan is scaled or shifted. Voxels of exactly 0 are background and stay 0.

    Args:
        scale: Range of the scale.
        shift: Range of the shift, in standard deviations of the modality in the brain, which is
            the unit of the cached images.
        modalities: Number of modalities, see `modality_of_channels`.
        extras: Further channels of the cache.
        mirrored: The channels of the opposite hemisphere follow.
        copy: Leave the subject that is passed as it is, and change a copy.

    Raises:
        InputError: A range is not one; when called, the image has another number of channels.
    """

    def __init__(
        self,
        scale: Sequence[float],
        shift: Sequence[float],
        modalities: int,
        extras: Mapping[str, Extra] = MappingProxyType({}),
        mirrored: bool = False,
        copy: bool = True,
    ) -> None:
        super().__init__(modalities, extras, mirrored, copy)
        (least_scale, most_scale), (least_shift, most_shift) = scale, shift
        if not 0 < least_scale <= most_scale:
            raise InputError(f"scale: expected 0 < low <= high, found {least_scale}, {most_scale}")
        if not least_shift <= most_shift:
            raise InputError(f"shift: expected low <= high, found {least_shift}, {most_shift}")
        self.scale = (least_scale, most_scale)
        self.shift = (least_shift, most_shift)

    change = staticmethod(change_intensities)

    def draw(self) -> Tensor:
        """Draw the scale and the shift of each channel, (C, 2), float32."""
        draws = [
            (self.sample_uniform(*self.scale), self.sample_uniform(*self.shift))
            for _ in range(self.modalities)
        ]
        unchanged = (1.0, 0.0)
        return torch.tensor(
            [unchanged if m is None else draws[m] for m in self.modality_of_channels]
        )


class RandomAppearance(_OfModalities):
    """Change how the modalities of each image look, see `datamodules.appearance`.

    Args:
        parts: What may change, by name, in this order; each at most once.
        modalities: Number of modalities, see `modality_of_channels`.
        extras: Further channels of the cache.
        mirrored: The channels of the opposite hemisphere follow.
        copy: Leave the subject that is passed as it is, and change a copy.

    Raises:
        InputError: A part is there twice.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        modalities: int,
        extras: Mapping[str, Extra] = MappingProxyType({}),
        mirrored: bool = False,
        copy: bool = True,
    ) -> None:
        super().__init__(modalities, extras, mirrored, copy)
        if len({type(part) for part in parts.values()}) < len(parts):
            raise InputError(f"parts: expected each kind once, found {', '.join(parts)}")
        self.parts = parts

    change = staticmethod(change_appearance)

    def draw(self) -> Appearance:
        """Draw what changes in the channels of a patch."""
        return draw_appearance(self.parts.values(), self.modalities, self.modality_of_channels)


class Changes(NamedTuple):
    """What an augmentation does to one patch.

    Attributes:
        flips: Whether it flips the patch along x, y and z.
        appearance: What it does to the appearance of modalities.
        scale_and_shift: (C, 2) or (0, 2), what it does to intensities, see `change_intensities`.
    """

    flips: tuple[bool, bool, bool]
    appearance: Appearance
    scale_and_shift: Tensor


UNCHANGED = Changes((False, False, False), SAME_APPEARANCE, torch.empty(0, 2))


def can_be_drawn(transform: object) -> bool:
    """Tell whether `draw_changes` can say what a transform does: the options of conf/ all can."""
    steps = [transform]
    on_device: list[type] = []
    while steps:
        step = steps.pop(0)
        if type(step) is tio.Compose:
            steps = [*step.transforms, *steps]
        elif type(step) is RandomAppearance or type(step) is RandomIntensity:
            on_device.append(type(step))
        elif type(step) is not tio.RandomFlip or not all(type(axis) is int for axis in step.axes):
            return False
        elif RandomAppearance in on_device:
            return False  # a field does not lie in the patch as before once that is flipped
        if step.include or step.exclude or step.keep:
            return False
    return len(on_device) <= 1


def draw_changes(transform: tio.Transform) -> Changes:
    """Draw what a transform of TorchIO does, with the random numbers that it would draw itself.

    Args:
        transform: One of which `can_be_drawn` is true.
    """
    flips, appearance, scale_and_shift = UNCHANGED
    flips = list(flips)
    steps = [transform]
    while steps:
        step = steps.pop(0)
        if torch.rand(1).item() > step.probability:  # every transform of TorchIO begins so
            continue
        if isinstance(step, tio.Compose):
            steps = [*step.transforms, *steps]
        elif isinstance(step, tio.RandomFlip):
            drawn = step.get_params(step.flip_probability)
            axes = [axis for axis in range(3) if drawn[axis] and axis in step.axes]
            if axes:
                torch.rand(1)  # TorchIO leaves the flip to a second transform, which begins so too
            for axis in axes:
                flips[axis] = not flips[axis]
        elif isinstance(step, RandomAppearance):
            appearance = step.draw()
        elif isinstance(step, RandomIntensity):
            scale_and_shift = step.draw()
    x, y, z = flips
    return Changes((x, y, z), appearance, scale_and_shift)
