"""D-Net without the air around the brain: the same logits, fewer operations."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.networks.background import Columns
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
    """Boxes with brain have the logits of one pass; the others have those of nothing but air."""
    image = torch.randn(2, 2, *SHAPE) * inside
    expected = one_valid_pass(dnet, image)
    air = dnet.segment(torch.zeros(1, 2, 56, 56, 56))
    brain = nn.functional.max_pool3d(inside[None, None].float(), 4) > 0
    expected = torch.where(brain, expected, air)
    error = (dnet.segment_volume(image) - expected).abs().max()
    assert error < 1e-5 * max(1, expected.abs().max())


@torch.inference_mode()
def test_small_tiles_give_the_same(dnet: DNet, monkeypatch: pytest.MonkeyPatch):
    image = torch.randn(1, 2, *SHAPE) * ball((12, 20, 16), 11)
    whole = dnet.segment_volume(image)
    monkeypatch.setattr("lightning_modules.networks.background.TILE_VOXELS", 20)
    torch.testing.assert_close(dnet.segment_volume(image), whole, rtol=1e-4, atol=1e-5)


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


def test_columns_by_looking_at_every_voxel():
    torch.manual_seed(0)
    volume = (torch.rand(14, 10, 12) < 0.01).float()
    start = Columns.enclosing(volume > 0)

    def dilated(voxels: Tensor, width: int) -> Tensor:
        padded = nn.functional.pad(voxels[None], (width,) * 6)
        return nn.functional.max_pool3d(padded, 5, stride=1)[0]

    forward = dilated(volume, 3)  # 3 voxels around, less 2 lost on each side
    backward = dilated(volume, 4)  # an output sees 2 voxels more on each side
    pooled = nn.functional.max_pool3d(forward[None], 2)[0]
    found = start.moved(3).reached(2)
    repeated = volume
    for axis in range(3):
        repeated = repeated.repeat_interleave(2, axis)
    expected = {
        "reached": (found, forward),
        "pooled": (found.pooled(), pooled),
        "seen": (start.seen(2), backward),
        "unpooled": (start.unpooled(), repeated),
    }
    for name, (columns, voxels) in expected.items():
        oracle = Columns.enclosing(voxels > 0)
        inside = oracle.low < oracle.high
        assert torch.equal(columns.low < columns.high, inside), name
        side = voxels.shape[2]
        for ours, theirs in zip(columns, oracle, strict=True):
            assert torch.equal(ours[inside].clamp(0, side), theirs[inside]), name
