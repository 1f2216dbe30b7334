"""Which patches a network sees: how many have a lesion, where they lie, how they are scaled."""

from collections.abc import Generator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchio as tio
from torch import Tensor
from torchio.data import PatchSampler

from datamodules.cache import cut


class Patch(NamedTuple):
    """Image (C, X, Y, Z) float32 and canonical labels (X, Y, Z) uint8 of one training patch."""

    image: Tensor
    labels: Tensor


class BalancedSampler(PatchSampler):
    """Draws patches, of which an exact share contains a lesion, each at a random scale.

    "The likelihood of sampling patches with a corresponding tumor" is raised (section 3) by
    counting, not by chance: of any n patches in a row, `lesion_share * n` (give or take one) are
    cut around a lesion voxel, every box in the volume that contains the voxel being as likely as
    any other. The other patches lie anywhere in the volume.

    Scaling cuts the box that the patch shows at that scale and resamples it, so that no voxel of a
    patch is made up: zooming out of an already cut patch by 0.9 would pad 27 % of it.

    Args:
        patch_size: Side of a patch in voxels, one number or three.
        lesion_share: Share of the patches that contain a lesion for certain, 0 to 1.
        scale: Range of the isotropic scale; above 1 zooms in.
    """

    SCALED_ATTEMPTS = 10

    def __init__(
        self,
        patch_size: int | Sequence[int],
        lesion_share: float = 0.5,
        scale: Sequence[float] = (1.0, 1.0),
    ) -> None:
        super().__init__(patch_size if isinstance(patch_size, int) else tuple(patch_size))  # pyright: ignore
        if not 0 <= lesion_share <= 1:
            raise ValueError(f"lesion_share: expected 0 to 1, got {lesion_share}")
        low, high = scale
        if not 0 < low <= high:
            raise ValueError(f"scale: expected 0 < low <= high, got {low}, {high}")
        self.lesion_share = Fraction(lesion_share).limit_denominator(10_000)
        self.scale = (low, high)

    @property
    def size(self) -> tuple[int, int, int]:
        x, y, z = map(int, self.patch_size)
        return x, y, z

    def lesions_before(self, index: int) -> int:
        """How many of the patches 0 .. index - 1 are cut around a lesion."""
        return int(index * self.lesion_share)

    def wants_lesion(self, index: int) -> bool:
        return self.lesions_before(index + 1) > self.lesions_before(index)

    def draw(self, image: np.ndarray, labels: np.ndarray, lesion: np.ndarray) -> Patch:
        """Cut a patch, by torch's generator: at a lesion if there are voxels of one, or anywhere.

        Args:
            image: (C, X, Y, Z); may be memory mapped, only the box is read.
            labels: (X, Y, Z), canonical labels.
            lesion: Flat indices into `labels` of the voxels to choose from; empty: anywhere.
        """
        for _ in range(self.SCALED_ATTEMPTS):
            scale = torch.empty(()).uniform_(*self.scale).item()
            patch = self._cut(image, labels, lesion, scale)
            # A lesion of a few voxels can fall between the grid points of a coarser patch.
            if not len(lesion) or patch.labels.any():
                return patch
        return self._cut(image, labels, lesion, scale=1)

    def _cut(
        self, image: np.ndarray, labels: np.ndarray, lesion: np.ndarray, scale: float
    ) -> Patch:
        size = _triple(max(1, round(side / scale)) for side in self.size)
        start = _start(labels.shape, size, lesion)
        box_image = torch.from_numpy(cut(image, start, size)).float()
        box_labels = torch.from_numpy(cut(labels, start, size))
        if size == self.size:
            return Patch(box_image, box_labels)
        return Patch(
            F.interpolate(box_image[None], self.size, mode="trilinear", align_corners=False)[0],
            # `nearest-exact` has its grid where `trilinear` has it; `nearest` is shifted.
            F.interpolate(box_labels[None, None], self.size, mode="nearest-exact")[0, 0],
        )

    def _generate_patches(
        self, subject: tio.Subject, num_patches: int | None = None
    ) -> Generator[tio.Subject]:
        """TorchIO's interface: patches of one subject with `image` and `labels`, in balance."""
        images: Any = subject
        image, labels = images["image"].data.numpy(), images["labels"].data[0].numpy()
        lesion = np.flatnonzero(labels)
        index = 0
        while num_patches is None or index < num_patches:
            patch = self.draw(image, labels, lesion if self.wants_lesion(index) else lesion[:0])
            yield as_subject(patch)
            index += 1


def as_subject(patch: Patch) -> tio.Subject:
    """A patch as TorchIO's transforms take it."""
    return tio.Subject(
        image=tio.ScalarImage(tensor=patch.image), labels=tio.LabelMap(tensor=patch.labels[None])
    )


def _start(extents: Sequence[int], size: Sequence[int], lesion: np.ndarray) -> tuple[int, int, int]:
    """First voxel of a random box inside the volume; around one of the lesion's voxels, if any."""
    ranges = [_inside(extent, side) for extent, side in zip(extents, size, strict=True)]
    if len(lesion):
        chosen = lesion[int(torch.randint(len(lesion), ()))]
        voxel = np.unravel_index(int(chosen), tuple(extents))
        ranges = [
            (max(low, int(position) - side + 1), min(high, int(position)))
            for (low, high), position, side in zip(ranges, voxel, size, strict=True)
        ]
    return _triple(int(torch.randint(low, high + 1, ())) for low, high in ranges)


def _inside(extent: int, side: int) -> tuple[int, int]:
    """Lowest and highest start of a box inside an axis; centred where the box is the longer."""
    if side > extent:
        return (extent - side) // 2, (extent - side) // 2
    return 0, extent - side


def _triple(values: Generator[int]) -> tuple[int, int, int]:
    x, y, z = values
    return x, y, z
