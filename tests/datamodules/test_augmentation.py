"""Intensities are scaled and shifted by modality, inside the brain, and nothing else changes."""

import pytest
import torch
import torchio as tio

from datamodules.augmentation import RandomIntensity, modality_of_channels
from datamodules.preprocessing import Extra
from datamodules.similarity import LocalSimilarity, MirroredByTemplate
from errors import InputError

SCALE = (0.9, 1.1)
SHIFT = (-0.1, 0.1)
SIMILARITY = {"similarity": LocalSimilarity()}
BY_TEMPLATE = {"mirrored": MirroredByTemplate()}


def patch_of(channels: int, seed: int = 0) -> tio.Subject:
    """Make a patch with a background of zeros, another one in each channel."""
    image = torch.randn(channels, 6, 7, 8, generator=torch.Generator().manual_seed(seed))
    for index, channel in enumerate(image):
        channel[: 1 + index % 3] = 0
    labels = torch.randint(0, 5, (1, 6, 7, 8), dtype=torch.uint8)
    return tio.Subject(image=tio.ScalarImage(tensor=image), labels=tio.LabelMap(tensor=labels))


def scale_and_shift(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """Fit `after = scale * before + shift` over the foreground of a channel."""
    x, y = before[before != 0].double(), after[before != 0].double()
    scale = (y.max() - y.min()) / (x.max() - x.min())
    shift = y.mean() - scale * x.mean()
    torch.testing.assert_close(scale * x + shift, y, atol=1e-5, rtol=0)
    return round(scale.item(), 4), round(shift.item(), 4)


@pytest.mark.parametrize(
    ("modalities", "extras", "mirrored", "expected"),
    [
        (4, {}, False, [0, 1, 2, 3]),
        (4, SIMILARITY, False, [0, 1, 2, 3, None]),
        (2, {}, True, [0, 1, 0, 1]),
        (2, SIMILARITY, True, [0, 1, None, 0, 1, None]),
        (2, BY_TEMPLATE, False, [0, 1, 0, 1]),
        (1, SIMILARITY, False, [0, None]),
        (1, BY_TEMPLATE, False, [0, 0]),
    ],
)
def test_a_modality_has_one_draw_in_both_hemispheres_and_other_channels_have_none(
    modalities: int, extras: dict[str, Extra], mirrored: bool, expected: list[int | None]
):
    assert modality_of_channels(modalities, extras, mirrored) == expected
    transform = RandomIntensity(SCALE, SHIFT, modalities, extras, mirrored)
    before = patch_of(len(expected))
    after = transform(before)
    draws = [
        scale_and_shift(*pair)
        for pair in zip(before["image"].data, after["image"].data, strict=True)
    ]
    draw_of = dict(zip(expected, draws, strict=True))
    assert draws == [draw_of[modality] for modality in expected]
    assert draw_of.pop(None, (1, 0)) == (1, 0)
    assert len(set(draw_of.values())) == modalities
    assert (1, 0) not in draw_of.values()


def test_draws_fill_their_ranges():
    transform = RandomIntensity(SCALE, SHIFT, 2)
    torch.manual_seed(0)
    draws = []
    for seed in range(150):
        before = patch_of(2, seed)
        for pair in zip(before["image"].data, transform(before)["image"].data, strict=True):
            draws.append(scale_and_shift(*pair))
    for values, (low, high) in zip(zip(*draws, strict=True), (SCALE, SHIFT), strict=True):
        assert low - 1e-4 <= min(values) < low + 0.005
        assert high - 0.005 < max(values) <= high + 1e-4


def test_background_and_labels_stay_and_the_image_is_float32():
    before = patch_of(3)
    after = RandomIntensity(SCALE, (0.1, 0.1), 3)(before)
    assert torch.equal(after["image"].data == 0, before["image"].data == 0)
    assert torch.equal(after["labels"].data, before["labels"].data)
    assert after["image"].data.dtype == torch.float32


def test_what_is_passed_is_changed_only_if_it_may_be():
    before = patch_of(1)
    plain = before["image"].data.clone()
    RandomIntensity(SCALE, SHIFT, 1)(before)
    assert torch.equal(before["image"].data, plain)
    after = RandomIntensity(SCALE, SHIFT, 1, copy=False)(before)
    assert after["image"].data is before["image"].data
    assert not torch.equal(before["image"].data, plain)


def test_what_cannot_be_augmented_is_refused():
    with pytest.raises(InputError, match=r"scale: expected 0 < low <= high, found 0, 1"):
        RandomIntensity((0, 1), SHIFT, 1)
    with pytest.raises(InputError, match=r"shift: expected low <= high, found 1, -1"):
        RandomIntensity(SCALE, (1, -1), 1)
    with pytest.raises(InputError, match=r"inputs.extras: expected 3 channels .* found 4"):
        RandomIntensity(SCALE, SHIFT, 3)(patch_of(4))
