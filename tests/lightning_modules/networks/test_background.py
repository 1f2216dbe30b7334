"""D-Net without the air around the brain: the same logits, fewer operations."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.networks.background import Extents
from lightning_modules.networks.dnet import DNet
from tests.lightning_modules.conftest import one_valid_pass


@torch.inference_mode()
def test_channels_last_is_kept_and_changes_nothing(dnet: DNet):
    image = torch.randn(1, 2, 12, 16, 12)
    last = dnet.segment_volume(image.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(last, dnet.segment_volume(image), rtol=1e-4, atol=1e-5)


SHAPE = (24, 40, 32)


def ball(centre: tuple[int, int, int], radius: float) -> Tensor:
    grid = torch.stack(torch.meshgrid(*map(torch.arange, SHAPE), indexing="ij"), -1)
    return torch.linalg.vector_norm(grid - torch.tensor(centre, dtype=torch.float), dim=-1) < radius


@pytest.mark.parametrize(
    "inside",
    [
        ball((12, 20, 16), 11),
        ball((0, 39, 0), 6),
        ball((2, 3, 4), 2) | ball((22, 35, 28), 3),
        ball((12, 20, 16), 1),
        ball((12, 20, 16), 0),
    ],
    ids=["brain", "corner", "two", "voxel", "nothing"],
)
@torch.inference_mode()
def test_logits_are_exact_where_part_of_the_volume_is_air(dnet: DNet, inside: Tensor):
    image = torch.randn(2, 2, *SHAPE) * inside
    expected = one_valid_pass(dnet, image)
    error = (dnet.segment_volume(image) - expected).abs().max()
    assert error < 1e-5 * max(1, expected.abs().max())


@torch.inference_mode()
def test_the_air_is_left_out(dnet: DNet):
    """A small ball costs less than half of its box, and an empty box next to nothing."""

    def operations(image: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            dnet.segment_volume(image)
        return counter.get_total_flops()

    image = torch.randn(1, 2, *SHAPE)
    whole = operations(image)
    assert operations(image * ball((12, 20, 16), 5)) < whole / 2
    assert operations(image * 0) < whole / 100


def test_extents_by_looking_at_every_voxel():
    torch.manual_seed(0)
    volume = (torch.rand(1, 1, 14, 10, 12) < 0.01).float()
    window = torch.ones(1, 1, 5, 5, 5)
    convolved = nn.functional.conv3d(nn.functional.pad(volume, (3,) * 6), window)
    pooled = nn.functional.max_pool3d(convolved, 2)
    extents = Extents.of_volume(volume).padded(3).convolved(2)
    for found, features in ((extents, convolved), (extents.pooled(), pooled)):
        for x in range(features.shape[2]):
            y, z = found.rectangle(x, x + 1, features.shape[3:])
            places = features[0, 0, x].nonzero()
            if not len(places):
                assert y.start >= y.stop or z.start >= z.stop
                continue
            assert [y.start, z.start] == places.amin(0).tolist()
            assert [y.stop, z.stop] == (places.amax(0) + 1).tolist()
