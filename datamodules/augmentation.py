"""Random changes of the intensities of a patch; flips and other geometry are TorchIO's."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torchio as tio
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.intensity_transform import IntensityTransform

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


class RandomIntensity(RandomTransform, IntensityTransform):
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
        super().__init__(copy=copy)
        (least_scale, most_scale), (least_shift, most_shift) = scale, shift
        if not 0 < least_scale <= most_scale:
            raise InputError(f"scale: expected 0 < low <= high, found {least_scale}, {most_scale}")
        if not least_shift <= most_shift:
            raise InputError(f"shift: expected low <= high, found {least_shift}, {most_shift}")
        self.scale = (least_scale, most_scale)
        self.shift = (least_shift, most_shift)
        self.modalities = modalities
        self.modality_of_channels = modality_of_channels(modalities, extras, mirrored)

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        """Change every image (C, X, Y, Z), float32, of a subject; its label maps stay."""
        draws = [
            (self.sample_uniform(*self.scale), self.sample_uniform(*self.shift))
            for _ in range(self.modalities)
        ]
        for image in self.get_images(subject):
            channels = image.data
            if len(channels) != len(self.modality_of_channels):
                raise InputError(
                    f"inputs.extras: expected {len(self.modality_of_channels)} channels to "
                    f"augment, found {len(channels)}"
                )
            for channel, modality in zip(channels, self.modality_of_channels, strict=True):
                if modality is not None:
                    scale, shift = draws[modality]
                    # 1 in the foreground, 0 in the background; a comparison takes twice as long.
                    foreground = channel.sign().abs_()
                    channel.mul_(scale).add_(foreground, alpha=shift)
        return subject
