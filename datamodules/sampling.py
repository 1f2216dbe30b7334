"""Which patches a network sees: how many have a lesion, where they lie, how they are scaled."""

from collections.abc import Callable, Generator, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchio as tio
from torch import Tensor
from torchio.data import PatchSampler

from datamodules.cache import CachedCase, cut

# Cuts a box, first voxel and sides, out of a case (C, X, Y, Z): the channels that a network sees.
Inputs = Callable[[np.ndarray, Sequence[int], Sequence[int]], np.ndarray]


def cut_with_mirrored(volume: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """A box of (C, X, Y, Z), and the one opposite, flipped onto it: (2 C, *size) (section 2.3).

    Opposite across the volume's own middle plane, x to X - 1 - x: the cache centres its volumes on
    the brain's bounding box, so this is the mid-sagittal plane as far as a head lies straight.
    Cut together, the two are scaled and flipped together.
    """
    return np.concatenate([cut(volume, start, size), cut(volume[:, ::-1], start, size)])


def whole(volume: np.ndarray, inputs: Inputs) -> np.ndarray:
    """All of a case as a network sees it: any box of this is the box that `inputs` cuts."""
    return inputs(volume, (0, 0, 0), volume.shape[1:])


class Patch(NamedTuple):
    """Image (C, X, Y, Z) float32 and canonical labels (X, Y, Z) uint8 of one training patch."""

    image: Tensor
    labels: Tensor


class BalancedSampler(PatchSampler):
    """Draws patches, of which an exact share contains a lesion, each at a random scale.

    "The likelihood of sampling patches with a corresponding tumor" is raised (section 3) by
    counting, not by chance: of any n patches in a row, `lesion_share * n` (give or take one) are
    cut around a lesion voxel, every box in the volume that contains the voxel being as likely as
    any other. The other patches lie anywhere in the volume, or where they contain no lesion: then
    the share is exact, and with a share of one half every even batch is half and half.

    Scaling cuts the box that the patch shows at that scale and resamples it, so that no voxel of a
    patch is made up: zooming out of an already cut patch by 0.9 would pad 27 % of it.

    Args:
        patch_size: Side of a patch in voxels, one number or three.
        lesion_share: Share of the patches that contain a lesion for certain, 0 to 1.
        scale: Range of the isotropic scale; above 1 zooms in.
        others: Where the other patches lie: "anywhere", or "lesion_free".
        halo: Voxels at each side of a patch that a valid-convolution network sees but does not
            predict. What it predicts lies inside the volume, the halo may reach beyond.
        region: What "contains a lesion" is about: the "output" inside the halo, which is what the
            loss sees, or the whole "patch".
        uniform_over: "voxels" draws large lesions more often, in proportion to their volume;
            "lesions" draws a lesion, then one of its voxels.
        inputs: Cuts the image: `cut`, or `cut_with_mirrored` for the other hemisphere beside it.
    """

    SCALED_ATTEMPTS = 10
    FREE_ATTEMPTS = 50

    def __init__(
        self,
        patch_size: int | Sequence[int],
        lesion_share: float = 0.5,
        scale: Sequence[float] = (1.0, 1.0),
        others: Literal["anywhere", "lesion_free"] = "anywhere",
        halo: int = 0,
        region: Literal["output", "patch"] = "output",
        uniform_over: Literal["voxels", "lesions"] = "voxels",
        inputs: Inputs = cut,
    ) -> None:
        super().__init__(patch_size if isinstance(patch_size, int) else tuple(patch_size))  # pyright: ignore
        if not 0 <= lesion_share <= 1:
            raise ValueError(f"lesion_share: expected 0 to 1, got {lesion_share}")
        low, high = scale
        if not 0 < low <= high:
            raise ValueError(f"scale: expected 0 < low <= high, got {low}, {high}")
        self.lesion_share = Fraction(lesion_share).limit_denominator(10_000)
        for name, value, known in (
            ("others", others, ("anywhere", "lesion_free")),
            ("region", region, ("output", "patch")),
            ("uniform_over", uniform_over, ("voxels", "lesions")),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected {' or '.join(known)}, got {value}")
        if min(self.size) <= 2 * halo:
            raise ValueError(
                f"patch_size: expected more than twice the halo of {halo}, got {min(self.size)}"
            )
        self.scale = (low, high)
        self.lesion_free = others == "lesion_free"
        self.halo = halo
        self.margin = halo if region == "output" else 0  # around what may contain a lesion
        self.uniform_over = uniform_over
        self.inputs = inputs

    @property
    def size(self) -> tuple[int, int, int]:
        x, y, z = map(int, self.patch_size)
        return x, y, z

    def lesions_before(self, index: int) -> int:
        """How many of the patches 0 .. index - 1 are cut around a lesion."""
        return int(index * self.lesion_share)

    def wants_lesion(self, index: int) -> bool:
        return self.lesions_before(index + 1) > self.lesions_before(index)

    def choose(self, case: CachedCase) -> np.ndarray:
        """Voxels of a case (N,), flat indices, one of which a patch is cut around."""
        if self.uniform_over == "voxels" or not case.lesions:
            return case.lesion
        return case.lesions[int(torch.randint(len(case.lesions), ()))]

    def can_avoid(self, labels: np.ndarray) -> bool:
        """Whether somewhere in (X, Y, Z) a patch contains no lesion, at scale 1."""
        return len(self._free_starts(labels)) > 0

    def draw(self, image: np.ndarray, labels: np.ndarray, lesion: np.ndarray) -> Patch:
        """Cut a patch, by torch's generator: at a lesion if there are voxels of one.

        Args:
            image: (C, X, Y, Z); may be memory mapped, only the box is read.
            labels: (X, Y, Z), canonical labels.
            lesion: Flat indices into `labels` of the voxels to choose from; empty: one of the
                other patches.

        Raises:
            ValueError: A lesion-free patch of a volume that has none.
        """
        if not len(lesion) and self.lesion_free:
            return self._draw_free(image, labels)
        for _ in range(self.SCALED_ATTEMPTS):
            scale = self._draw_scale()
            patch = self._cut(image, labels, self._start(labels, lesion, scale), scale)
            # A lesion of a few voxels can fall between the grid points of a coarser patch.
            if not len(lesion) or self.contains_lesion(patch):
                return patch
        return self._cut(image, labels, self._start(labels, lesion, scale=1), scale=1)

    def _draw_free(self, image: np.ndarray, labels: np.ndarray) -> Patch:
        for _ in range(self.FREE_ATTEMPTS):
            scale = self._draw_scale()
            patch = self._cut(image, labels, self._start(labels, labels[:0], scale), scale)
            # In the brain: that there is no lesion in the air need not be learnt.
            if not self.contains_lesion(patch) and patch.image[(..., *self._inside)].any():
                return patch
        starts = self._free_starts(labels)
        if not len(starts):
            raise ValueError("lesion_free: every patch of this volume contains a lesion")
        start = starts[int(torch.randint(len(starts), ()))]
        return self._cut(image, labels, _triple(int(first) for first in start), scale=1)

    def contains_lesion(self, patch: Patch) -> bool:
        """Whether it does, in the region that counts."""
        return bool(patch.labels[self._inside].any())

    @property
    def _inside(self) -> tuple[slice, ...]:
        return tuple(slice(self.margin, side - self.margin) for side in self.size)

    def _draw_scale(self) -> float:
        return torch.empty(()).uniform_(*self.scale).item()

    def _box(self, scale: float, margin: int) -> tuple[tuple[int, int, int], int]:
        """Sides of what a patch shows at a scale, and of a margin of it, in source voxels."""
        return _triple(max(1, round(side / scale)) for side in self.size), round(margin / scale)

    def _start(self, labels: np.ndarray, lesion: np.ndarray, scale: float) -> tuple[int, int, int]:
        """First voxel of a random box whose output lies inside the volume.

        Where there are lesion voxels, around one of them.
        """
        size, halo = self._box(scale, self.halo)
        ranges = [
            _inside(extent, side, halo) for extent, side in zip(labels.shape, size, strict=True)
        ]
        if len(lesion):
            chosen = lesion[int(torch.randint(len(lesion), ()))]
            voxel = np.unravel_index(int(chosen), labels.shape)
            _, margin = self._box(scale, self.margin)
            ranges = [
                (max(low, int(at) - side + margin + 1), min(high, int(at) - margin))
                for (low, high), at, side in zip(ranges, voxel, size, strict=True)
            ]
        return _triple(int(torch.randint(low, high + 1, ())) for low, high in ranges)

    def _free_starts(self, labels: np.ndarray) -> np.ndarray:
        """First voxels (N, 3) of all boxes at scale 1 that contain no lesion."""
        ranges = [
            _inside(extent, side, self.halo)
            for extent, side in zip(labels.shape, self.size, strict=True)
        ]
        # Lesion voxels in a box are eight look-ups in the sums over everything before a voxel.
        low = [first + self.margin for first, _ in ranges]
        reach = [last - first for first, last in ranges]
        sides = [side - 2 * self.margin for side in self.size]
        shown = cut(labels, low, [r + side for r, side in zip(reach, sides, strict=True)]) > 0
        sums = np.pad(shown, ((1, 0),) * 3).astype(np.int32).cumsum(0).cumsum(1).cumsum(2)
        for axis, side in enumerate(sides):
            sums = np.take(sums, range(side, sums.shape[axis]), axis) - np.take(
                sums, range(sums.shape[axis] - side), axis
            )
        return np.argwhere(sums == 0) + [first for first, _ in ranges]

    def _cut(
        self, image: np.ndarray, labels: np.ndarray, start: tuple[int, int, int], scale: float
    ) -> Patch:
        size, _ = self._box(scale, self.halo)
        box_image = torch.from_numpy(self.inputs(image, start, size)).float()
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


def _inside(extent: int, side: int, halo: int = 0) -> tuple[int, int]:
    """Lowest and highest start of a box whose inner part lies inside an axis.

    Centred where the inner part is the longer.
    """
    if side - 2 * halo > extent:
        return (extent - side) // 2, (extent - side) // 2
    return -halo, extent - side + halo


def _triple(values: Generator[int]) -> tuple[int, int, int]:
    x, y, z = values
    return x, y, z
