"""Losses: values by hand, limits, and agreement with textbook formulas."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.inference import repeated
from lightning_modules.losses import (
    AutoencoderLoss,
    CrossEntropy,
    RegionDice,
    gaussian_kl,
    pooled,
    reconstruction_l2,
    soft_dice,
)
from lightning_modules.networks.aeunet import AEUNet, AEUNetOutput, Latent
from lightning_modules.networks.blocks import Segmentation
from lightning_modules.networks.dnet import GEOMETRY
from lightning_modules.networks.geometry import Geometry

SURE = 50.0  # a logit whose sigmoid is 1 in float32
REGIONS = ["WT", "TC", "ET"]


def random_masks(*shape: int, share: float = 0.5) -> torch.Tensor:
    return torch.rand(shape) < share


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
    logits, mask = torch.randn(3, 2, 4, 4, 4), random_masks(3, 2, 4, 4, 4)
    by_case = [soft_dice(logits[i : i + 1], mask[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(soft_dice(logits, mask), torch.stack(by_case).mean(0))


def test_dice_of_half_precision_is_summed_in_single_precision():
    logits = torch.zeros(1, 1, 80, 80, 80)
    mask = torch.ones_like(logits)
    # Σt² = 512 000 is infinite in float16.
    exact = soft_dice(logits, mask)
    torch.testing.assert_close(soft_dice(logits.half(), mask.half()), exact)


def test_l2_is_the_mean_over_everything():
    image = torch.zeros(2, 4, 3, 3, 3)
    assert reconstruction_l2(image + 3, image).item() == pytest.approx(9)


def test_kl_by_hand():
    # μ = 1 and σ² = e: 1 + e - 1 - 1 = e - 1 for each of two units, over 10 voxels, without ½.
    latent = Latent(mean=torch.ones(3, 2), log_variance=torch.ones(3, 2))
    assert gaussian_kl(latent, voxels=10).item() == pytest.approx(2 * (math.e - 1) / 10)


def test_kl_of_the_standard_normal_is_zero():
    assert gaussian_kl(Latent(torch.zeros(2, 8), torch.zeros(2, 8)), voxels=1).item() == 0


def test_kl_is_twice_the_textbook_divergence():
    mean, log_variance = torch.randn(1, 5), torch.randn(1, 5)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    textbook = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum()
    torch.testing.assert_close(gaussian_kl(Latent(mean, log_variance), voxels=1), 2 * textbook)


def test_region_dice_is_the_weighted_sum_and_names_every_region():
    loss = RegionDice({"WT": 0.5, "ET": 0.2}, ["WT", "ET"], smooth_mm3=8, spacing_mm=2)
    logits, batch = torch.randn(2, 2, 4, 4, 4), {"mask": random_masks(2, 2, 4, 4, 4)}
    wt, et = soft_dice(logits, batch["mask"], smooth=1)
    for terms in (loss(Segmentation(logits), batch), loss.on_volume(logits, batch)):
        assert list(terms) == ["dice_WT", "dice_ET", "loss"]
        torch.testing.assert_close(terms["loss"], 0.5 * wt + 0.2 * et)


def test_cross_entropy_next_to_dice_is_the_weighted_mean_of_minus_the_logs():
    loss, plain = (
        RegionDice({"WT": 0.5, "ET": 0.2}, ["WT", "ET"], cross_entropy_weight=weight)
        for weight in (3.0, 0.0)
    )
    logits, batch = torch.randn(2, 2, 4, 4, 4), {"mask": random_masks(2, 2, 4, 4, 4)}
    right = torch.where(batch["mask"], logits.sigmoid(), 1 - logits.sigmoid())
    wt, et = -right.log().mean(dim=(0, 2, 3, 4))
    for terms, without in (
        (loss(Segmentation(logits), batch), plain(Segmentation(logits), batch)),
        (loss.on_volume(logits, batch), plain.on_volume(logits, batch)),
    ):
        assert list(terms) == ["dice_WT", "dice_ET", "cross_entropy", "loss"]
        torch.testing.assert_close(terms["cross_entropy"], 0.5 * wt + 0.2 * et)
        torch.testing.assert_close(terms["loss"], without["loss"] + 3 * terms["cross_entropy"])


def test_weights_belong_to_regions_by_name_whatever_their_order():
    logits, batch = torch.randn(1, 2, 4, 4, 4), {"mask": random_masks(1, 2, 4, 4, 4)}
    terms = RegionDice({"ET": 0.2, "WT": 0.5}, ["WT", "ET"]).on_volume(logits, batch)
    wt, et = soft_dice(logits, batch["mask"])
    assert (terms["dice_WT"], terms["dice_ET"]) == (wt, et)
    torch.testing.assert_close(terms["loss"], 0.5 * wt + 0.2 * et)


@pytest.mark.parametrize("named", [["WT", "ET"], ["WT", "TC", "ET", "lesion"], ["lesion"]])
def test_weights_of_other_regions_are_refused_in_one_line(named: list[str]):
    with pytest.raises(ValueError, match="region_weights: expected a weight for each of") as error:
        RegionDice(dict.fromkeys(named, 1.0), REGIONS)
    line = str(error.value)
    assert "WT, TC, ET" in line
    assert line.endswith(f"found those of {', '.join(named)}")
    assert "\n" not in line


def autoencoder_loss() -> AutoencoderLoss:
    return AutoencoderLoss(
        RegionDice(dict.fromkeys(REGIONS, 0.33), REGIONS), l2_weight=0.1, kl_weight=0.2
    )


def test_autoencoder_loss_is_equation_4_by_hand():
    logits, mask = torch.randn(2, 3, 4, 4, 4), random_masks(2, 3, 4, 4, 4)
    image = torch.randn(2, 4, 4, 4, 4)
    # An error of 3 everywhere; two units of μ = 1 and σ² = e over 80³ voxels.
    output = AEUNetOutput(logits, image + 3, Latent(torch.ones(2, 2), torch.ones(2, 2)))
    terms = autoencoder_loss()(output, {"image": image, "mask": mask})
    expected = 0.33 * soft_dice(logits, mask).sum() + 0.1 * 9 + 0.2 * 2 * (math.e - 1) / 512_000
    torch.testing.assert_close(terms["loss"], expected)


def test_terms_of_the_autoencoder_network_add_up_to_equation_4():
    network = AEUNet(filters=8, patch_size=16, bottleneck=4)
    batch = {"image": torch.randn(2, 4, 16, 16, 16), "mask": random_masks(2, 3, 16, 16, 16)}
    output = network(batch["image"])
    terms = autoencoder_loss()(output, batch)
    assert list(terms) == ["dice_WT", "dice_TC", "dice_ET", "loss", "l2", "kl"]
    assert terms["l2"] == reconstruction_l2(output.reconstruction, batch["image"])
    assert terms["kl"] == gaussian_kl(output.latent, voxels=512_000)
    regions = terms["dice_WT"] + terms["dice_TC"] + terms["dice_ET"]
    total = 0.33 * regions + 0.1 * terms["l2"] + 0.2 * terms["kl"]
    torch.testing.assert_close(terms["loss"], total)


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize(("choice", "voxels"), [({}, 512_000), ({"kl_voxels": 64}, 64)])
def test_a_posterior_costs_the_same_whatever_the_patch(
    side: int, choice: dict[str, int], voxels: int
):
    """KL by hand: .1 * 1000 units * (1² + 1 - 0 - 1) / N, by default that of an 80³ patch."""
    image, mask = torch.zeros(1, 4, side, side, side), torch.zeros(1, 3, side, side, side)
    sure = torch.full_like(mask, -SURE)
    latent = Latent(torch.ones(1, 1000), torch.zeros(1, 1000))
    terms = AutoencoderLoss(RegionDice(dict.fromkeys(REGIONS, 0.33), REGIONS), **choice)(
        AEUNetOutput(sure, image, latent), {"image": image, "mask": mask}
    )
    assert terms["kl"].item() == pytest.approx(1000 / voxels)
    assert terms["loss"].item() == pytest.approx(0.1 * 1000 / voxels)


def test_a_tumour_costs_the_same_whatever_the_spacing():
    """64 mm³ of tumour, predicted with 1/2: 1 - (2 * 32 + 100) / (64 + 16 + 100) by hand."""
    for side, spacing_mm in ((4, 1.0), (2, 2.0)):
        mask = torch.ones(1, 1, side, side, side)
        loss = RegionDice({"lesion": 1.0}, ["lesion"], spacing_mm=spacing_mm)
        terms = loss(Segmentation(torch.zeros_like(mask)), {"mask": mask})
        assert terms["loss"].item() == pytest.approx(1 - 164 / 180)


def test_on_volumes_the_autoencoder_loss_is_that_of_the_segmentation():
    loss = autoencoder_loss()
    logits, batch = torch.randn(1, 3, 5, 6, 7), {"mask": random_masks(1, 3, 5, 6, 7)}
    terms, expected = loss.on_volume(logits, batch), loss.segmentation.on_volume(logits, batch)
    assert list(terms) == ["dice_WT", "dice_TC", "dice_ET", "loss"]
    assert terms == expected


def test_target_is_the_max_pooled_mask_inside_the_halo():
    mask = torch.zeros(1, 1, 68, 68, 68, dtype=torch.bool)
    mask[..., 26, 26, 26] = True  # first voxel of the first box
    mask[..., 41, 33, 26] = True  # last box along x, second along y
    mask[..., 25, 30, 30] = True  # in the halo
    loss = CrossEntropy(GEOMETRY)
    certain = torch.full((1, 1, 4, 4, 4), -20.0)
    certain[0, 0, 0, 0, 0] = certain[0, 0, 3, 1, 0] = 20
    assert loss(Segmentation(certain), {"mask": mask})["loss"] < 1e-6
    certain[0, 0, 0, 0, 0] = -20
    terms = loss(Segmentation(certain), {"mask": mask})
    assert terms["loss"].item() == pytest.approx(20 / 64, rel=1e-4)


def test_pooling_of_a_mask_rounds_sides_up():
    mask = torch.zeros(1, 1, 9, 8, 5, dtype=torch.bool)
    mask[..., 8, 7, 4] = True
    coarse = pooled(mask, 4)
    assert coarse.shape == (1, 1, 3, 2, 2)
    assert coarse.nonzero().tolist() == [[0, 0, 2, 1, 1]]


@pytest.mark.parametrize("shape", [(12, 8, 16), (9, 8, 5), (3, 14, 7)])
def test_cross_entropy_of_a_volume_is_that_on_the_coarse_grid(shape: tuple[int, int, int]):
    """The inference repeats coarse logits; even so, every box counts once."""
    torch.manual_seed(0)
    coarse = torch.randn(2, 1, *(-(-side // 4) for side in shape))
    mask = random_masks(2, 1, *shape, share=0.01)
    terms = CrossEntropy(GEOMETRY).on_volume(repeated(coarse, 4, shape), {"mask": mask})
    expected = nn.functional.binary_cross_entropy_with_logits(coarse, pooled(mask, 4).float())
    assert terms == {"loss": expected}


def test_voxelwise_loss_is_plain_cross_entropy():
    logits, mask = torch.randn(2, 1, 5, 5, 5), random_masks(2, 1, 5, 5, 5)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, mask.float())
    loss = CrossEntropy(Geometry(0, 1))
    assert loss(Segmentation(logits), {"mask": mask})["loss"] == expected
    assert loss.on_volume(logits, {"mask": mask})["loss"] == expected


def test_a_region_that_a_volume_does_not_have_does_not_count_in_its_loss():
    """A faint prediction of an absent region would add .33 and stop the training."""
    loss = RegionDice({"WT": 0.5, "ET": 0.2}, ["WT", "ET"], smooth_mm3=1)
    mask = torch.zeros(2, 2, 8, 8, 8, dtype=torch.bool)
    mask[0, :, :4], mask[1, 0, :4] = True, True  # the second case has no ET
    logits = torch.where(mask, 1.0, -1.0)
    first = soft_dice(logits[:1], mask[:1], smooth=1)
    second = soft_dice(logits[1:], mask[1:], smooth=1)
    expected = ((0.5 * first[0] + 0.2 * first[1]) + 0.7 * second[0]) / 2
    terms = loss.on_volume(logits, {"mask": mask})
    torch.testing.assert_close(terms["loss"], expected)
    trained = loss(Segmentation(logits), {"mask": mask})["loss"]
    assert trained > terms["loss"]  # patches are scored as in the paper, absent regions too
