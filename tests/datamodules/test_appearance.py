"""Each change of appearance is what its formula says, inside the brain, and there alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import fft, ndimage
from torch import Tensor

from datamodules.appearance import (
    BLACK,
    Bias,
    Blur,
    Contrast,
    Copied,
    Drawn,
    Gamma,
    Intensity,
    Missing,
    Noise,
    Part,
    Ringing,
    Slices,
    change_appearance,
    collate_appearances,
    draw_appearance,
)
from datamodules.augmentation import RandomAppearance
from datamodules.similarity import LocalSimilarity
from errors import InputError
from tests.datamodules.conftest import wide_parts

SHAPE = (9, 10, 11)


def brain(channels: int = 1, seed: int = 0) -> Tensor:
    """Make channels (C, X, Y, Z) without background."""
    return torch.randn(channels, *SHAPE, generator=torch.Generator().manual_seed(seed))


def changed(part: type[Part], image: Tensor, *numbers: float) -> Tensor:
    """Return a copy of an image (1, X, Y, Z) with a change of these numbers."""
    return change_appearance(image.clone(), {part: Drawn(np.zeros(1, int), np.array([numbers]))})


def test_contrast_adds_a_piecewise_linear_curve():
    offsets = (0.5, -0.5, 0, 1, -1, 0.2)
    values = torch.tensor([-3.0, -2, -1.5, -0.25, 0.5, 1, 1.5, 2.5, 7]).view(1, -1, 1, 1)
    expected = [-2.5, -1.5, -1.5, -0.375, 1, 2, 1.5, 2.1, 7.2]
    assert changed(Contrast, values, *offsets).flatten().tolist() == pytest.approx(expected)
    image = brain()
    curve = np.interp(image.numpy(), Contrast.KNOTS, offsets)
    found = changed(Contrast, image, *offsets)
    torch.testing.assert_close(found, image + torch.from_numpy(curve).float())


@pytest.mark.parametrize("exponent", [0.5, 1, 2])
def test_gamma_is_a_power_that_keeps_the_mean_and_the_contrast_there(exponent: float):
    values = torch.tensor([-5, -4, -1, 1e-3, 4]).view(1, -1, 1, 1)
    found = changed(Gamma, values, exponent).flatten().tolist()
    power = [BLACK / exponent * (share**exponent - 1) for share in (0, 0, 0.75, 1.00025, 2)]
    assert found == pytest.approx(power, rel=1e-3)
    assert found[3] == pytest.approx(1e-3, rel=2e-3)


def test_a_field_multiplies_what_is_counted_from_black():
    points = np.random.default_rng(0).uniform(-0.3, 0.3, (3, 3, 3))
    image = brain()[:, :, :9, :9]
    field = ((changed(Bias, image, *points.flat) + BLACK) / (image + BLACK)).log()[0].double()
    torch.testing.assert_close(field[::4, ::4, ::4], torch.from_numpy(points), atol=1e-5, rtol=0)
    for axis in range(3):  # quadratic: third differences are 0
        assert field.diff(3, axis).abs().max() < 1e-4
        assert field.diff(2, axis).abs().max() > 1e-3


def test_intensities_are_scaled_and_shifted():
    image = brain()
    torch.testing.assert_close(changed(Intensity, image, 1.5, -0.25), 1.5 * image - 0.25)


@pytest.mark.parametrize("sd", [(0.7, 1.5, 2.5), (0, 1, 0)])
def test_a_blur_is_that_of_scipy(sd: tuple[float, float, float]):
    image = brain()

    def blurred(volume: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(volume, sd, mode="constant", truncate=20)

    expected = blurred(image[0].double().numpy()) / blurred(np.ones(SHAPE))
    torch.testing.assert_close(
        changed(Blur, image, *sd)[0].double(), torch.from_numpy(expected), atol=1e-5, rtol=0
    )


def thick(row: np.ndarray, thickness: float, first: float) -> np.ndarray:
    """Average fine pieces of voxels over each slice, and interpolate between slices."""
    fine = 1000
    places = (np.arange(len(row) * fine) + 0.5) / fine - 0.5
    pieces = row.repeat(fine)
    centres = np.arange(first, len(row) - 1 + 1e-9, thickness)
    means = [pieces[abs(places - centre) < thickness / 2].mean() for centre in centres]
    return np.interp(np.arange(len(row)), centres, means)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("thickness", "first"), [(2, 0.5), (2, 0), (1.5, 0.2), (3.7, 2.1), (1, 0), (20, 5)]
)
def test_thick_slices_are_means_with_lines_between(axis: int, thickness: float, first: float):
    image = brain()
    numbers = [1.0, 1, 1, 0, 0, 0]
    numbers[axis], numbers[axis + 3] = thickness, first
    found = changed(Slices, image, *numbers)[0].numpy()
    expected = np.apply_along_axis(thick, axis, image[0].double().numpy(), thickness, first)
    np.testing.assert_allclose(found, expected, atol=3e-3)
    if thickness == 1:
        np.testing.assert_allclose(found, image[0], atol=1e-6)


def test_thick_slices_by_hand():
    row = torch.tensor([1.0, 3, 5, 9, 2, 4]).view(1, -1, 1, 1)
    found = changed(Slices, row, 2, 1, 1, 0.5, 0, 0)
    assert found.flatten().tolist() == pytest.approx([2, 3.25, 5.75, 6, 4, 3])


def test_ringing_drops_frequencies_of_the_cosine_transform():
    image = brain()
    kept = (0.5, 0.9, 0.61)  # of 9, 10 and 11 frequencies: the first 5, 9 and 7
    spectrum = fft.dctn(image[0].double().numpy())
    spectrum[5:], spectrum[:, 9:], spectrum[:, :, 7:] = 0, 0, 0
    torch.testing.assert_close(
        changed(Ringing, image, *kept)[0].double(),
        torch.from_numpy(fft.idctn(spectrum)),
        atol=1e-5,
        rtol=0,
    )
    edge = torch.where(torch.arange(32) < 16, -1.0, 1.0).view(1, -1, 1, 1)
    assert 1.1 < changed(Ringing, edge, 0.6, 1, 1).max() < 1.3  # Gibbs: 9 % of the step of 2


def test_noise_has_its_standard_deviation_and_its_seed():
    image = torch.full((1, 40, 40, 40), 2.0)
    first, again, other = (changed(Noise, image, 0.2, seed) for seed in (3, 3, 4))
    assert (first - image).std().item() == pytest.approx(0.2, rel=0.02)
    assert (first - image).mean().abs() < 0.005
    assert torch.equal(first, again)
    assert abs(np.corrcoef((first - image).flatten(), (other - image).flatten())[0, 1]) < 0.02
    assert torch.equal(changed(Noise, image, 0, 3), image)


@pytest.mark.parametrize(
    ("part", "numbers"),
    [(Blur, (1, 1, 1)), (Slices, (1, 3, 1, 0, 1, 0)), (Ringing, (0.6, 0.5, 0.9))],
)
def test_a_filter_takes_nothing_from_the_background(part: type[Part], numbers: tuple[float, ...]):
    """Each voxel of the brain is filtered as if its own value stood in the background."""
    image = brain()
    image[0, :4] = 0
    image[0, :, :, 7:] = 0
    found = changed(part, image, *numbers)
    assert torch.equal(found == 0, image == 0)
    for voxel in ((4, 0, 0), (4, 5, 6), (6, 3, 6), (8, 9, 2)):
        filled = changed(part, torch.where(image == 0, image[0][voxel], image), *numbers)
        torch.testing.assert_close(found[0][voxel], filled[0][voxel], atol=1e-5, rtol=0)
    one_intensity = torch.where(image == 0, 0, 1.7)
    torch.testing.assert_close(changed(part, one_intensity, *numbers), one_intensity)


def test_a_modality_is_replaced_by_a_copy_or_is_missing():
    image = brain(8)
    copied = Drawn(np.array([1, 2, 5, 6]), np.array([[1.0], [-1], [1], [-1]]))
    found = change_appearance(image.clone(), {Copied: copied})
    assert torch.equal(found, image[[0, 2, 1, 3, 4, 6, 5, 7]])
    missing = Drawn(np.array([3, 7]), np.empty((2, 0)))
    found = change_appearance(image.clone(), {Missing: missing})
    assert not found[[3, 7]].any()
    assert torch.equal(found[[0, 1, 2, 4, 5, 6]], image[[0, 1, 2, 4, 5, 6]])


@pytest.mark.parametrize("modalities", [1, 2, 4])
def test_one_modality_is_never_missing_and_a_copy_is_of_another(modalities: int):
    torch.manual_seed(0)
    left, sources = set(), set()
    for _ in range(200):
        missing = Missing(1).draw(modalities)
        assert len(missing.channels) == modalities - 1
        left |= set(range(modalities)) - set(missing.channels.tolist())
        copied = Copied(1).draw(modalities)
        assert copied.channels.tolist() == list(range(modalities))
        pairs = zip(copied.channels, copied.channels + copied.numbers[:, 0], strict=True)
        sources |= {(int(to), int(from_)) for to, from_ in pairs}
    assert left == set(range(modalities))
    every = {(a, b) for a in range(modalities) for b in range(modalities) if a != b}
    assert sources == (every or {(0, 0)})


@pytest.mark.parametrize(
    ("part", "low", "high"),
    [
        (Contrast(1, (-0.5, 0.2)), [-0.5] * 6, [0.2] * 6),
        (Gamma(1, (0.6, 1.6)), [0.6], [1.6]),
        (Bias(1, (0, 0.15)), [-0.15] * 27, [0.15] * 27),
        (Intensity(1, (0.6, 1.6), (-0.4, 0.4)), [0.6, -0.4], [1.6, 0.4]),
        (Blur(1, (1, 3), spacing_mm=2), [0.5] * 3, [1.5] * 3),
        (Slices(1, (2, 6), spacing_mm=2), [1] * 3 + [0] * 3, [3] * 3 + [2] * 3),
        (Ringing(1, (0.5, 0.9)), [0.5] * 3, [0.9] * 3),
        (Noise(1, (0, 0.3)), [0, 0], [0.3, 2**31]),
    ],
)
def test_draws_fill_their_ranges(part: Part, low: list[float], high: list[float]):
    torch.manual_seed(0)
    numbers = np.concatenate([part.draw(4).numbers for _ in range(1000)])
    margin = 0.1 * (np.array(high) - low)
    for found, end in ((numbers.min(0), np.array(low)), (numbers.max(0), np.array(high))):
        assert (abs(found - end) < margin).all()
    assert (numbers >= np.array(low) - 1e-6).all()
    assert (numbers <= np.array(high) + 1e-6).all()
    if isinstance(part, Slices):
        assert ((numbers[:, :3] > 1).sum(1) <= 1).all()


@pytest.mark.parametrize("make", [lambda p: Gamma(p, (0.5, 2)), Copied, lambda p: Noise(p, (0, 1))])
def test_each_modality_changes_with_the_probability(make: Callable[[float], Part]):
    torch.manual_seed(0)
    for probability, least, most in ((0, 0, 0), (0.3, 0.25, 0.35), (1, 1, 1)):
        chosen = [make(probability).draw(4).channels.tolist() for _ in range(500)]
        shares = [np.mean([modality in drawn for drawn in chosen]) for modality in range(4)]
        assert all(least <= share <= most for share in shares)


def test_a_mirrored_modality_changes_alike_and_a_similarity_map_stays():
    torch.manual_seed(0)
    parts = wide_parts(0.5).values()
    channels = [0, 1, 2, 3, None] * 2
    for _ in range(50):
        appearance = draw_appearance(parts, 4, channels)
        assert list(appearance) == [type(part) for part in parts]
        for drawn in appearance.values():
            half = len(drawn.channels) // 2
            assert (drawn.channels[:half] + 5).tolist() == drawn.channels[half:].tolist()
            assert not set(drawn.channels.tolist()) & {4, 9}
            assert np.array_equal(drawn.numbers[:half], drawn.numbers[half:])
    image = brain(10)
    transform = RandomAppearance(
        wide_parts(1), 4, extras={"similarity": LocalSimilarity()}, mirrored=True
    )
    found = change_appearance(image.clone(), transform.draw())
    assert torch.equal(found[[4, 9]], image[[4, 9]])
    assert not any(torch.equal(found[c], image[c]) for c in (0, 1, 2, 3, 5, 6, 7, 8))


def test_patches_of_a_batch_change_as_each_alone():
    torch.manual_seed(0)
    transform = RandomAppearance(wide_parts(0.5), 4)
    drawn = [transform.draw() for _ in range(5)]
    drawn[2] = {}  # of a transform that has a probability of its own
    # To the last bit where sides are divisible by 4, as those of patches are, and to rounding else.
    images = torch.randn(5, 4, 8, 12, 16)
    together = change_appearance(images.clone(), collate_appearances(drawn, 4))
    for image, appearance, found in zip(images, drawn, together, strict=True):
        assert torch.equal(change_appearance(image.clone(), appearance), found)
    assert torch.equal(together[2], images[2])


@pytest.mark.parametrize("content", ["brain", "constant", "air", "a voxel", "one modality missing"])
def test_all_is_finite_and_the_background_stays(content: str):
    torch.manual_seed(0)
    transform = RandomAppearance(wide_parts(0.7), 4)
    image = 3 * brain(4)
    image[:, :3] = 0
    if content == "constant":
        image[:] = -7.0
    elif content == "one modality missing":
        image[2] = 0
    elif content != "brain":
        image[:] = 0
        image[:, 5, 5, 5] = float(content == "a voxel")
    for _ in range(30):
        drawn = transform.draw()
        found = change_appearance(image.clone(), drawn)
        assert found.isfinite().all()
        assert found.abs().max() < 100
        expected = image if not len(drawn[Copied].channels) else image.any(0).expand_as(image)
        assert not found[expected == 0].any()


def test_parts_that_cannot_be_drawn_are_refused():
    for make, line in {
        lambda: Noise(1.5, (0, 1)): "probability: expected a number from 0 to 1, found 1.5",
        lambda: Noise(1, (-1, 1)): "sd: expected 0 <= low <= high, found -1, 1",
        lambda: Blur(1, (2, 1), 1): "sd_mm: expected 0 <= low <= high, found 2, 1",
        lambda: Contrast(1, (1, -1)): "offset: expected low <= high, found 1, -1",
        lambda: Gamma(1, (0, 1)): "exponent: expected 0 < low <= high, found 0, 1",
        lambda: Ringing(1, (0.5, 2)): "kept: expected 0 < low <= high <= 1, found 0.5, 2",
        lambda: Intensity(1, (0, 1), (0, 0)): "scale: expected 0 < low <= high, found 0, 1",
        lambda: RandomAppearance({"a": Missing(1), "b": Missing(0)}, 4): "parts: expected each "
        "kind once, found a, b",
    }.items():
        with pytest.raises(InputError) as error:
            make()
        assert str(error.value) == line
