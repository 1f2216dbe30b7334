"""Draw training patches: how many contain a lesion, where they lie and how they are scaled."""

from collections.abc import Callable, Generator, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torchio as tio
from torch import Tensor
from torchio.data import PatchSampler

import grids
from datamodules.cache import CachedCase
from datamodules.resampling import interpolation, resample_image, resample_labels
from errors import InputError

# Takes the channels (C, X, Y, Z) of a case, the first voxel of a box and its sides; returns the
# channels that a network sees there.
Cut = Callable[[np.ndarray, Sequence[int], Sequence[int]], np.ndarray]


class Box(NamedTuple):
    """What a patch shows of a volume; resampled to the size of the patch, it is the patch.

    Attributes:
        start: First voxel of the box, which may lie outside the volume.
        sides: Voxels of the volume along x, y and z.
        labels: (X, Y, Z) uint8, canonical, at the size of the patch already: whether they have a
            lesion decides whether the box is taken.
    """

    start: tuple[int, int, int]
    sides: tuple[int, int, int]
    labels: np.ndarray


def cut_with_mirrored(volume: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Cut a box out of (C, X, Y, Z) together with the opposite one, flipped onto it (section 2.3).

    Opposite means mirrored at the middle plane of the volume, x to X - 1 - x. The cache centres
    its volumes on the bounding box of the brain, so this is the mid-sagittal plane unless the head
    lies askew. Both boxes are channels of one patch, so they are scaled and flipped together.

    Returns:
        (2 C, *size): the box, then the opposite box.
    """
    own, opposite = grids.cut(volume, start, size), grids.cut(volume[:, ::-1], start, size)
    return np.concatenate([own, opposite])


def flipped(volume: np.ndarray, flips: Sequence[bool]) -> np.ndarray:
    """Return a view of a volume (..., X, Y, Z), flipped along the axes that `flips` says."""
    return volume[(..., *(slice(None, None, -1 if flip else 1) for flip in flips))]


def cut_flipped(volume: np.ndarray, box: Box, cut: Cut, flips: Sequence[bool]) -> np.ndarray:
    """Cut a box out of (C, X, Y, Z) and flip it, in one copy.

    Interpolation is symmetric, so that a box that is flipped and scaled is one that is scaled and
    flipped.

    Args:
        volume: Channels of the cache; may be memory-mapped.
        box: What to cut.
        cut: Function that cuts without flipping, `BalancedSampler.cut`.
        flips: Whether to flip along x, y and z.
    """
    start = [
        extent - first - side if flip else first
        for extent, first, side, flip in zip(
            volume.shape[1:], box.start, box.sides, flips, strict=True
        )
    ]
    return cut(flipped(volume, flips), start, box.sides)


def whole(volume: np.ndarray, cut: Cut) -> np.ndarray:
    """Return all of a case as a network sees it; a box of the result equals what `cut` cuts.

    Args:
        volume: Channels (C, X, Y, Z) of the cache.
        cut: Function that cuts the patches in training, `BalancedSampler.cut`.
    """
    return cut(volume, (0, 0, 0), volume.shape[1:])


class Patch(NamedTuple):
    """One training patch.

    Attributes:
        image: (C, X, Y, Z) float32.
        labels: (X, Y, Z) uint8, canonical.
    """

    image: Tensor
    labels: Tensor


class BalancedSampler(PatchSampler):
    """Draws patches, of which an exact share contains a lesion, each at a random scale.

    "The likelihood of sampling patches with a corresponding tumor" is raised (section 3) by
    counting, not by chance: of any n patches in a row, `lesion_share * n` (give or take one) are
    cut around a lesion voxel. Every box that contains the voxel and lies in the volume is equally
    likely. The other patches lie anywhere in the volume, or only where they contain no lesion. In
    the latter case the share is exact, and with a share of one half every batch of even size is
    half and half.

    To scale a patch, the sampler cuts the box that the patch shows at that scale and resamples it,
    so that no voxel of a patch is padding. Zooming out of a patch that is already cut, by 0.9,
    would pad 27 % of it.

    Args:
        patch_size: Side of a patch in voxels, one number or three.
        lesion_share: Share of the patches that contain a lesion for certain, 0 to 1.
        scale: Range of the isotropic scale; above 1 zooms in. Labels are scaled as
            `resample_labels` does.
        others: Where the other patches lie: "anywhere", or "lesion_free".
        halo: Voxels at each side of a patch that a valid-convolution network sees but does not
            predict. What it predicts lies inside the volume; the halo may reach beyond.
        lesion_in: Part of a patch where a lesion counts: the "output" inside the halo, which is
            what the loss sees, or the whole "patch".
        uniform_over: "voxels" draws a lesion voxel, so that large lesions are drawn in proportion
            to their volume; "lesions" draws a lesion, then one of its voxels.
        mirrored: Add the opposite hemisphere as further channels, see `cut_with_mirrored`.

    Attributes:
        cut: Function that cuts the image of a patch; `whole` shows it all of a case.

    Raises:
        InputError: An argument has another value.
    """

    SCALED_ATTEMPTS = 10
    LESION_FREE_ATTEMPTS = 50

    def __init__(
        self,
        patch_size: int | Sequence[int],
        lesion_share: float = 0.5,
        scale: Sequence[float] = (1.0, 1.0),
        others: Literal["anywhere", "lesion_free"] = "anywhere",
        halo: int = 0,
        lesion_in: Literal["output", "patch"] = "output",
        uniform_over: Literal["voxels", "lesions"] = "voxels",
        mirrored: bool = False,
    ) -> None:
        super().__init__(patch_size if isinstance(patch_size, int) else tuple(patch_size))  # pyright: ignore
        if not 0 <= lesion_share <= 1:
            raise InputError(f"lesion_share: expected 0 to 1, found {lesion_share}")
        low, high = scale
        if not 0 < low <= high:
            raise InputError(f"scale: expected 0 < low <= high, found {low}, {high}")
        self.lesion_share = Fraction(lesion_share).limit_denominator(10_000)
        for name, value, known in (
            ("others", others, ("anywhere", "lesion_free")),
            ("lesion_in", lesion_in, ("output", "patch")),
            ("uniform_over", uniform_over, ("voxels", "lesions")),
        ):
            if value not in known:
                raise InputError(f"{name}: expected {' or '.join(known)}, found {value}")
        if min(self.size) <= 2 * halo:
            raise InputError(
                f"patch_size: expected more than twice the halo of {halo}, found {min(self.size)}"
            )
        self.scale = (low, high)
        self.lesion_free = others == "lesion_free"
        self.halo = halo
        # Voxels at each side of a patch where a lesion does not count.
        self.margin = halo if lesion_in == "output" else 0
        self.uniform_over = uniform_over
        self.mirrored = mirrored
        self.cut: Cut = cut_with_mirrored if mirrored else grids.cut

    @property
    def size(self) -> tuple[int, int, int]:
        """Return the sides of a patch in voxels."""
        x, y, z = map(int, self.patch_size)
        return x, y, z

    def lesion_patches_before(self, index: int) -> int:
        """Count the patches among 0 .. index - 1 that are cut around a lesion."""
        return int(index * self.lesion_share)

    def wants_lesion(self, index: int) -> bool:
        """Tell whether patch `index` is cut around a lesion."""
        return self.lesion_patches_before(index + 1) > self.lesion_patches_before(index)

    def draw_lesion(self, case: CachedCase) -> np.ndarray:
        """Draw flat indices (N,) of lesion voxels of a case; the patch is cut around one of them.

        These are all lesion voxels, or the voxels of one lesion; see `uniform_over`.
        """
        if self.uniform_over == "voxels" or not case.lesions:
            return case.lesion
        return case.lesions[int(torch.randint(len(case.lesions), ()))]

    def has_lesion_free_patch(self, labels: np.ndarray) -> bool:
        """Tell whether any patch of the labels (X, Y, Z), at scale 1, contains no lesion."""
        return len(self._lesion_free_starts(labels)) > 0

    def draw(
        self,
        image: np.ndarray,
        labels: np.ndarray,
        lesion: np.ndarray,
        nesting: np.ndarray | None = None,
    ) -> Patch:
        """Draw a patch with torch's global random generator; see `draw_box`."""
        return self.patch(image, self.draw_box(image, labels, lesion, nesting))

    def patch(self, image: np.ndarray, box: Box) -> Patch:
        """Return what a box shows of an image (C, X, Y, Z), at the size of the patch."""
        voxels = torch.from_numpy(self.cut(image, box.start, box.sides))
        return Patch(resample_image(voxels, self.size), torch.from_numpy(box.labels))

    def draw_box(
        self,
        image: np.ndarray,
        labels: np.ndarray,
        lesion: np.ndarray,
        nesting: np.ndarray | None = None,
    ) -> Box:
        """Draw what a patch shows, with torch's global random generator.

        Args:
            image: (C, X, Y, Z); may be memory-mapped, only the box is read.
            labels: (X, Y, Z), canonical.
            lesion: Flat indices (N,) into `labels`; the patch is cut around one of these voxels.
                If there are none, it is one of the other patches.
            nesting: How far inside the others each label from 0 to 255 lies, (256,), see
                `resample_labels`; by default, higher labels lie inside lower ones.

        Raises:
            InputError: A lesion-free patch is wanted of a volume that has none.
        """
        nesting = np.arange(256) if nesting is None else nesting
        if not len(lesion) and self.lesion_free:
            return self._draw_lesion_free(image, labels, nesting)
        for _ in range(self.SCALED_ATTEMPTS):
            scale = self._draw_scale()
            start = self._draw_start(labels, lesion, scale)
            box = self._box(labels, start, scale, nesting)
            # A lesion of a few voxels can fall between the grid points of a coarser patch.
            if not len(lesion) or self.contains_lesion(box):
                return box
        start = self._draw_start(labels, lesion, scale=1)
        return self._box(labels, start, 1, nesting)

    def _draw_lesion_free(self, image: np.ndarray, labels: np.ndarray, nesting: np.ndarray) -> Box:
        for _ in range(self.LESION_FREE_ATTEMPTS):
            scale = self._draw_scale()
            start = self._draw_start(labels, labels[:0], scale)
            box = self._box(labels, start, scale, nesting)
            # Patches of nothing but air are drawn again: they teach a network nothing.
            if not self.contains_lesion(box) and not self._shows_air_alone(image, box):
                return box
        starts = self._lesion_free_starts(labels)
        if not len(starts):
            raise InputError(
                "sampler.others: expected a lesion-free patch, found none in this volume"
            )
        start = starts[int(torch.randint(len(starts), ()))]
        return self._box(labels, _triple(int(first) for first in start), 1, nesting)

    def contains_lesion(self, box: Box) -> bool:
        """Tell whether the patch of a box has a lesion in the part that counts, see `lesion_in`."""
        return bool(box.labels[self._counted_box].any())

    def _shows_air_alone(self, image: np.ndarray, box: Box) -> bool:
        """Tell whether the patch of a box is zero in all of the part that counts.

        Nearly always the first channel tells that it is not.
        """
        used = [
            interpolation(source, length).used(counted.start, counted.stop)
            for source, length, counted in zip(box.sides, self.size, self._counted_box, strict=True)
        ]
        start = [first + inside.start for first, inside in zip(box.start, used, strict=True)]
        sides = [inside.stop - inside.start for inside in used]
        return not any(self.cut(channel[None], start, sides).any() for channel in image)

    @property
    def _counted_box(self) -> tuple[slice, ...]:
        """Return the part of a patch where a lesion counts."""
        return tuple(slice(self.margin, side - self.margin) for side in self.size)

    def _draw_scale(self) -> float:
        return torch.empty(()).uniform_(*self.scale).item()

    def _source_box(self, scale: float, margin: int) -> tuple[tuple[int, int, int], int]:
        """Return the sides of the box that a patch shows at a scale, and of a margin of the patch.

        Both are in voxels of the volume.
        """
        return _triple(max(1, round(side / scale)) for side in self.size), round(margin / scale)

    def _draw_start(
        self, labels: np.ndarray, lesion: np.ndarray, scale: float
    ) -> tuple[int, int, int]:
        """Draw the first voxel of a box whose output lies inside the volume.

        If there are lesion voxels, the box contains one of them where a lesion counts.
        """
        size, halo = self._source_box(scale, self.halo)
        ranges = [
            _start_range(extent, side, halo)
            for extent, side in zip(labels.shape, size, strict=True)
        ]
        if len(lesion):
            flat_index = lesion[int(torch.randint(len(lesion), ()))]
            voxel = np.unravel_index(int(flat_index), labels.shape)
            _, margin = self._source_box(scale, self.margin)
            ranges = [
                (max(low, int(place) - side + margin + 1), min(high, int(place) - margin))
                for (low, high), place, side in zip(ranges, voxel, size, strict=True)
            ]
        return _triple(int(torch.randint(low, high + 1, ())) for low, high in ranges)

    def _lesion_free_starts(self, labels: np.ndarray) -> np.ndarray:
        """Return the first voxels (N, 3) of all boxes at scale 1 that contain no lesion.

        The lesion voxels in every box are counted with a summed-volume table.
        """
        ranges = [
            _start_range(extent, side, self.halo)
            for extent, side in zip(labels.shape, self.size, strict=True)
        ]
        low = [first + self.margin for first, _ in ranges]
        reach = [last - first for first, last in ranges]
        sides = [side - 2 * self.margin for side in self.size]
        covered = [r + side for r, side in zip(reach, sides, strict=True)]
        is_lesion = grids.cut(labels, low, covered) > 0
        sums = np.pad(is_lesion, ((1, 0),) * 3).astype(np.int32).cumsum(0).cumsum(1).cumsum(2)
        for axis, side in enumerate(sides):
            sums = np.take(sums, range(side, sums.shape[axis]), axis) - np.take(
                sums, range(sums.shape[axis] - side), axis
            )
        return np.argwhere(sums == 0) + [first for first, _ in ranges]

    def _box(
        self, labels: np.ndarray, start: tuple[int, int, int], scale: float, nesting: np.ndarray
    ) -> Box:
        """Return the box that a patch shows at a scale."""
        sides, _ = self._source_box(scale, self.halo)
        return Box(
            start, sides, resample_labels(grids.cut(labels, start, sides), self.size, nesting)
        )

    def _generate_patches(
        self, subject: tio.Subject, num_patches: int | None = None
    ) -> Generator[tio.Subject]:
        """Yield patches of one subject with `image` and `labels`; TorchIO's interface."""
        images: Any = subject
        image, labels = images["image"].data.numpy(), images["labels"].data[0].numpy()
        lesion = np.flatnonzero(labels)
        index = 0
        while num_patches is None or index < num_patches:
            patch = self.draw(image, labels, lesion if self.wants_lesion(index) else lesion[:0])
            yield as_subject(patch)
            index += 1


def as_subject(patch: Patch) -> tio.Subject:
    """Wrap a patch for TorchIO's transforms, as `image` and `labels`."""
    return tio.Subject(
        image=tio.ScalarImage(tensor=patch.image), labels=tio.LabelMap(tensor=patch.labels[None])
    )


def _start_range(extent: int, side: int, halo: int = 0) -> tuple[int, int]:
    """Return the lowest and the highest start, along one axis, of a box whose output fits in.

    If its output is longer than the volume, both are the start that centres the box.

    Args:
        extent: Voxels of the volume.
        side: Voxels of the box.
        halo: Voxels at each end of the box that may reach beyond the volume.
    """
    if side - 2 * halo > extent:
        return (extent - side) // 2, (extent - side) // 2
    return -halo, extent - side + halo


def _triple(values: Generator[int]) -> tuple[int, int, int]:
    x, y, z = values
    return x, y, z
