"""Every voxel of a mirrored patch is the opposite voxel, in training and in inference."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio as tio
from torch import Tensor, nn

from datamodules.brats import BraTS
from datamodules.cache import Cache
from datamodules.patches import PatchQueue, Volumes, collate_patches, finish_patches
from datamodules.sampling import BalancedSampler, cut_with_mirrored, whole
from grids import cut
from lightning_modules.inference import Ensemble, Flip, SlidingWindow
from tests.conftest import write_brats


def numbered(shape: tuple[int, ...], channels: int = 2) -> np.ndarray:
    """Make a volume (C, X, Y, Z) without a symmetry: no two voxels are equal, and none is 0."""
    return 1 + np.arange(channels * np.prod(shape), dtype=np.float32).reshape(channels, *shape)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("start", [(0, 0, 0), (3, 1, 2), (-2, -1, 0), (4, 2, 3)])
def test_each_voxel_is_the_one_opposite(side: int, start: tuple[int, int, int]):
    """The definition holds for every voxel, inside the volume, at its borders and beyond them."""
    volume, size = numbered((side, 5, 6)), (4, 3, 4)
    patch = cut_with_mirrored(volume, start, size)
    assert patch.shape == (4, *size)
    np.testing.assert_array_equal(patch[:2], cut(volume, start, size))
    for index in np.ndindex(size):
        x, y, z = np.add(start, index)
        inside = 0 <= x < side and 0 <= y < 5 and 0 <= z < 6
        expected = volume[:, side - 1 - x, y, z] if inside else 0
        np.testing.assert_array_equal(patch[(slice(2, None), *index)], expected)


@pytest.mark.parametrize("side", [6, 7])
def test_the_mirrored_patch_is_the_opposite_patch_turned_round(side: int):
    """The paper takes the patch at the mirrored position and flips it onto the patch."""
    volume, start, size = numbered((side, 5, 6)), (1, 1, 1), (2, 3, 4)
    opposite = (side - start[0] - size[0], *start[1:])
    expected = cut(volume, opposite, size)[:, ::-1]
    np.testing.assert_array_equal(cut_with_mirrored(volume, start, size)[2:], expected)


@pytest.mark.parametrize("side", [10, 11])
def test_any_box_of_the_whole_is_the_box_itself(side: int):
    volume = numbered((side, 9, 8))
    everything = whole(volume, cut_with_mirrored)
    for start in product((-2, 0, side - 5), (0, 3), (0,)):
        box = cut_with_mirrored(volume, start, (6, 5, 8))
        np.testing.assert_array_equal(cut(everything, start, (6, 5, 8)), box)


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("side", [20, 21])
def test_scaled_patches_show_both_sides_at_the_same_scale(scale: float, side: int):
    """The image is x, so its mirror image is X - 1 - x, which linear resampling keeps exactly."""
    image = np.broadcast_to(
        np.arange(side, dtype=np.float32)[None, :, None, None], (1, side, 20, 20)
    )
    labels = np.zeros(image.shape[1:], np.uint8)
    sampler = BalancedSampler(8, lesion_share=0, scale=(scale, scale), mirrored=True)
    torch.manual_seed(0)
    for _ in range(10):
        own, opposite = sampler.draw(image, labels, np.empty(0, np.int64)).image
        assert own.std() > 0
        torch.testing.assert_close(opposite, side - 1 - own)


def test_training_patches_are_windows_of_the_whole_volume_after_flips(tmp_path: Path):
    """Both hemispheres are flipped alike: flipped back, a patch is a box of the whole volume."""
    data_set = BraTS(write_brats(tmp_path / "data", cases=2, shape=(15, 12, 12)))
    cases = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases(), data_set)
    sampler = BalancedSampler(6, mirrored=True)
    flip = tio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5)
    queue = PatchQueue(cases, data_set, sampler, flip, patches_per_epoch=24, seed=0)
    volumes = Volumes(cases, data_set, mirrored=True)
    by_name = {volumes[i]["case"]: volumes[i]["image"] for i in range(2)}
    for case in cases:
        own, opposite = by_name[case.name].split(4)
        assert torch.equal(own, torch.tensor(case.image).float())
        assert torch.equal(opposite, own.flip(1))
    flips_seen = set()
    for index in range(24):
        patch = finish_patches(collate_patches([queue[0, index]]))
        windows = by_name[patch["case"][0]].unfold(1, 6, 1).unfold(2, 6, 1).unfold(3, 6, 1)
        for flip_axes in product((0, 1), repeat=3):
            axes = [axis + 1 for axis in range(3) if flip_axes[axis]]
            turned = patch["image"][0].flip(axes)[:, None, None, None]
            equal = windows == turned
            own = equal[:4].flatten(4).all(-1).all(0)
            if own.any() and patch["image"][0, :4].any():
                assert equal.flatten(4).all(-1).all(0)[own].all()
                flips_seen.add(flip_axes)
                break
        else:
            raise AssertionError(f"patch {index} lies nowhere in its case")
    assert len(flips_seen) > 4


class Asymmetry(nn.Module):
    """A network that subtracts the opposite hemisphere from the patch."""

    def segment(self, x: Tensor) -> Tensor:
        own, opposite = x.chunk(2, dim=1)
        return own - opposite


class Windows(nn.Module):
    def estimates(
        self, image: Tensor, candidates: Tensor, flips: Sequence[Flip]
    ) -> Iterator[Tensor]:
        return SlidingWindow(6, overlap=0.5).estimates(image, Asymmetry(), candidates, flips)

    def share(self, candidates: Tensor) -> float:
        return 1


@pytest.mark.parametrize("side", [14, 15])
def test_windows_and_test_time_flips_keep_the_pair_together(side: int):
    volume = numbered((side, 9, 10), channels=1)
    image = torch.from_numpy(whole(volume, cut_with_mirrored))[None]
    expected = torch.from_numpy(volume - volume[:, ::-1])[None]
    assert expected.abs().max() > 0
    torch.testing.assert_close(Ensemble([Windows()])(image), expected)
    torch.testing.assert_close(Ensemble([Windows()], flip_axes=(0, 1, 2))(image), expected)
