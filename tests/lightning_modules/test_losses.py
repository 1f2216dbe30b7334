"""Values by hand, limits, and agreement with textbook formulas."""

import math

import pytest
import torch

from lightning_modules.losses import RegionLoss, gaussian_kl, reconstruction_l2, soft_dice
from lightning_modules.networks.aeunet import Latent

SURE = 50.0  # a logit whose sigmoid is 1 in float32


def test_dice_by_hand():
    # Four voxels, truth 1 1 0 0, probabilities 1/2 everywhere.
    mask = torch.tensor([1.0, 1, 0, 0]).view(1, 1, 4, 1, 1)
    # overlap 2 * 1/2 = 1, Σt² = 2, Σp² = 4 * 1/4 = 1
    expected = 1 - (2 * 1 + 100) / (2 + 1 + 100)
    assert soft_dice(torch.zeros_like(mask), mask).item() == pytest.approx(expected, abs=1e-6)


def test_dice_limits():
    mask = torch.zeros(1, 2, 4, 4, 4)
    mask[:, 0] = 1
    perfect = soft_dice(SURE * (2 * mask - 1), mask)
    opposite = soft_dice(-SURE * (2 * mask - 1), mask, smooth=1e-6)
    assert perfect.tolist() == pytest.approx([0, 0], abs=1e-6)  # the empty region too
    assert opposite.tolist() == pytest.approx([1, 1], abs=1e-6)


def test_dice_is_the_mean_of_the_cases():
    logits, mask = torch.randn(3, 2, 4, 4, 4), torch.rand(3, 2, 4, 4, 4) > 0.5
    by_case = [soft_dice(logits[i : i + 1], mask[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(soft_dice(logits, mask), torch.stack(by_case).mean(0))


def test_dice_of_half_precision_sums_in_single():
    logits = torch.zeros(1, 1, 80, 80, 80)
    mask = torch.ones_like(logits)
    # Σt² = 512 000 is infinite in float16.
    exact = soft_dice(logits, mask)
    torch.testing.assert_close(soft_dice(logits.half(), mask.half()), exact)


def test_l2_is_the_mean_over_everything():
    image = torch.zeros(2, 4, 3, 3, 3)
    assert reconstruction_l2(image + 3, image).item() == pytest.approx(9)


def test_kl_by_hand():
    # μ 1 and σ² e: 1 + e - 1 - 1 = e - 1 for each of two units, over 10 voxels, no ½.
    latent = Latent(mean=torch.ones(3, 2), log_variance=torch.ones(3, 2))
    assert gaussian_kl(latent, voxels=10).item() == pytest.approx(2 * (math.e - 1) / 10)


def test_kl_of_the_standard_normal_is_zero():
    assert gaussian_kl(Latent(torch.zeros(2, 8), torch.zeros(2, 8)), voxels=1).item() == 0


def test_kl_is_twice_the_textbook_divergence():
    mean, log_variance = torch.randn(1, 5), torch.randn(1, 5)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    textbook = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum()
    torch.testing.assert_close(gaussian_kl(Latent(mean, log_variance), voxels=1), 2 * textbook)


def test_weighted_sum_names_every_region():
    loss = RegionLoss({"WT": 0.5, "ET": 0.2}, smooth_mm3=8, spacing_mm=2)
    logits, mask = torch.randn(2, 2, 4, 4, 4), torch.rand(2, 2, 4, 4, 4) > 0.5
    terms = loss(logits, mask)
    wt, et = soft_dice(logits, mask, smooth=1)
    assert list(terms) == ["dice_WT", "dice_ET", "loss"]
    torch.testing.assert_close(terms["loss"], 0.5 * wt + 0.2 * et)
