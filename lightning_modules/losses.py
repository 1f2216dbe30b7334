"""The losses of Frey & Nau 2019 (section 2.2) and Krivov & Belyaev 2018 (section 2.2).

Every term is computed in float32, whatever the precision of the network, because the sums run over
hundreds of thousands of voxels.

Two of Frey & Nau's numbers count voxels, and both belong to their patches of 80³ voxels of 1 mm:
the smoothness s of equation 1 and the N of equation 3. On other grids and patches, the terms keep
the balance that they have in the paper. s is a volume, 100 mm³, so that a tumour costs the same
whatever the spacing. N stays 80³, so that a posterior costs the same whatever the patch: Dice and
L2 do not grow with the patch, and divided by its own 32³ voxels the divergence would weigh 15.6
times as much against them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from lightning_modules.networks.aeunet import Latent
from lightning_modules.networks.geometry import Geometry

Terms = dict[str, Tensor]  # scalars by name; `loss` is the one that is minimised

PAPER_SMOOTH_MM3 = 100.0  # the s of equation 1: 100 voxels of 1 mm
PAPER_PATCH_VOXELS = 80**3  # the N of equation 3


@runtime_checkable  # so that beartype can check it while the tests run
class Loss(Protocol):
    """The interface of all losses: terms of training patches, and of whole volumes."""

    def __call__(self, output: Any, batch: Mapping[str, Any]) -> Terms:  # noqa: ANN401
        """Compute all terms of a batch of training patches.

        Args:
            output: The named tuple that the network returns, with `logits` on its own grid.
            batch: A `Batch`, with `image` and `mask` at full resolution.
        """
        ...

    def on_volume(self, logits: Tensor, batch: Mapping[str, Any]) -> Terms:
        """Compute the terms of whole volumes.

        Args:
            logits: The output of the inference, (B, R, X, Y, Z), at full resolution.
            batch: A `VolumeBatch`, with `image` and `mask` at full resolution.
        """
        ...


def soft_dice_by_case(
    logits: Float[Tensor, "b r *xyz"], mask: Shaped[Tensor, "b r *xyz"], smooth: float = 100.0
) -> Float[Tensor, "b r"]:
    """Compute the soft Dice loss of each region of each case (equation 1).

    The paper prints `1 - 2(Σtp + s)/(Σt² + Σp² + s)`, which is -1 if both masks are empty, although
    its text gives the interval [0, 1]. This is `1 - (2Σtp + s)/(Σt² + Σp² + s)`, which lies in it.

    Args:
        logits: Prediction before the sigmoid.
        mask: True masks, with values 0 and 1.
        smooth: The s of the equation, in voxels. The larger it is, the less a few predicted voxels
            cost in a patch without tumour.
    """
    probability = logits.float().sigmoid().flatten(2)
    truth = mask.float().flatten(2)
    overlap = (truth * probability).sum(-1)
    total = truth.square().sum(-1) + probability.square().sum(-1)
    return 1 - (2 * overlap + smooth) / (total + smooth)


def soft_dice(
    logits: Float[Tensor, "b r *xyz"], mask: Shaped[Tensor, "b r *xyz"], smooth: float = 100.0
) -> Float[Tensor, " r"]:
    """Average `soft_dice_by_case` over the batch."""
    return soft_dice_by_case(logits, mask, smooth).mean(0)


def reconstruction_l2(
    reconstruction: Float[Tensor, "b c *xyz"], image: Float[Tensor, "b c *xyz"]
) -> Float[Tensor, ""]:
    """Compute the mean squared error over voxels, channels and batch (equation 2)."""
    return F.mse_loss(reconstruction.float(), image.float())


def gaussian_kl(latent: Latent, voxels: int) -> Float[Tensor, ""]:
    """Compute the divergence of the posterior from N(0, 1), averaged over the batch (equation 3).

    It is `Σ(μ² + σ² - log σ² - 1) / N`, without the usual factor ½.

    Args:
        latent: The posterior of each patch.
        voxels: The N of the equation, the number of voxels of the paper's patch.
    """
    mean, log_variance = latent.mean.float(), latent.log_variance.float()
    divergence = mean.square() + log_variance.exp() - log_variance - 1
    return divergence.sum(1).mean() / voxels


class RegionDice(nn.Module):
    """Weighted sum of the soft Dice losses of all regions, and of their cross entropies if asked.

    Soft Dice is nearly the same for a sure and an unsure voxel at a border, and cross entropy is
    not: with both, as nnU-Net has them, probabilities say more of how often a voxel is tumour.

    Args:
        weights: Weight of each region, by name.
        regions: Names of the network's output channels, in order.
        smooth_mm3: The s of equation 1 as a volume; on a coarser grid, the paper's 100 voxels would
            outweigh small regions.
        spacing_mm: Edge of a voxel in mm.
        cross_entropy_weight: Weight of a region's cross entropy, the mean over its voxels, next to
            its Dice; 0 is the paper's loss.

    Raises:
        ValueError: The names of the weights are not those of the regions.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        regions: Sequence[str],
        smooth_mm3: float = PAPER_SMOOTH_MM3,
        spacing_mm: float = 1.0,
        cross_entropy_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if set(weights) != set(regions):
            raise ValueError(
                f"region_weights: expected a weight for each of {', '.join(regions)}, found those "
                f"of {', '.join(weights)}"
            )
        self.regions = list(regions)
        self.smooth = smooth_mm3 / spacing_mm**3
        self.cross_entropy_weight = cross_entropy_weight
        self.weights: Tensor
        by_channel = torch.tensor([weights[region] for region in regions])
        self.register_buffer("weights", by_channel, persistent=False)

    def forward(self, output: Any, batch: Mapping[str, Any]) -> Terms:  # noqa: ANN401
        """Return `dice_<region>` of each region, unweighted, and the weighted sum, `loss`.

        With a weight of its own, `cross_entropy` is there too: the weighted sum over the regions.
        """
        by_region = soft_dice(output.logits, batch["mask"], self.smooth)
        dice = (self.weights * by_region).sum()
        return self._with_cross_entropy(output.logits, batch["mask"], by_region, dice)

    def on_volume(self, logits: Float[Tensor, "b r x y z"], batch: Mapping[str, Any]) -> Terms:
        """Return `dice_<region>` of each region, and their `loss` over the regions that a case has.

        The loss of a case is the weighted mean over its regions, times the sum of all weights. A
        region that a whole volume does not have would add up to half of the loss as soon as a few
        voxels are above zero, and early stopping would follow such cases.
        """
        by_case = soft_dice_by_case(logits, batch["mask"], self.smooth)
        weights = self.weights * batch["mask"].flatten(2).any(-1)
        case_loss = (weights * by_case).sum(1) / weights.sum(1).clamp(min=1e-6)
        dice = case_loss.mean() * self.weights.sum()
        return self._with_cross_entropy(logits, batch["mask"], by_case.mean(0), dice)

    def _with_cross_entropy(
        self,
        logits: Float[Tensor, "b r x y z"],
        mask: Shaped[Tensor, "b r x y z"],
        by_region: Float[Tensor, " r"],
        dice: Float[Tensor, ""],
    ) -> Terms:
        names = (f"dice_{region}" for region in self.regions)
        terms = dict(zip(names, by_region, strict=True))
        if not self.cross_entropy_weight:
            return {**terms, "loss": dice}
        by_voxel = F.binary_cross_entropy_with_logits(
            logits.float(), mask.float(), reduction="none"
        )
        entropy = (self.weights * by_voxel.mean((0, 2, 3, 4))).sum()
        loss = dice + self.cross_entropy_weight * entropy
        return {**terms, "cross_entropy": entropy, "loss": loss}


class AutoencoderLoss(nn.Module):
    """Weighted sum of segmentation loss, reconstruction error and divergence (equation 4).

    The network reconstructs its whole input, the "real input image" of equation 2: a channel of
    similarity or of the mirrored patch counts as much as a modality. Whole volumes have the terms
    of the segmentation alone, because inference leaves the autoencoder out.

    Args:
        segmentation: Loss of the logits.
        l2_weight: Weight of the reconstruction error.
        kl_weight: Weight of the divergence of the bottleneck's posterior.
        kl_voxels: The N of equation 3. It is that of the paper's patches, whatever the patches that
            the network is trained on; the module's docstring says why.
    """

    def __init__(
        self,
        segmentation: Loss,
        l2_weight: float = 0.1,
        kl_weight: float = 0.1,
        kl_voxels: int = PAPER_PATCH_VOXELS,
    ) -> None:
        super().__init__()
        self.segmentation = segmentation
        self.l2_weight = l2_weight
        self.kl_weight = kl_weight
        self.kl_voxels = kl_voxels

    def forward(self, output: Any, batch: Mapping[str, Any]) -> Terms:  # noqa: ANN401
        """Return the segmentation's terms, `l2` and `kl`; `loss` is the sum of all."""
        terms = self.segmentation(output, batch)
        l2 = reconstruction_l2(output.reconstruction, batch["image"])
        kl = gaussian_kl(output.latent, self.kl_voxels)
        loss = terms["loss"] + self.l2_weight * l2 + self.kl_weight * kl
        return {**terms, "l2": l2, "kl": kl, "loss": loss}

    def on_volume(self, logits: Float[Tensor, "b r x y z"], batch: Mapping[str, Any]) -> Terms:
        return self.segmentation.on_volume(logits, batch)


class CrossEntropy(nn.Module):
    """Binary cross entropy between logits and mask on the network's grid.

    Max pooling brings the mask there: a box of stride³ voxels is positive if any voxel in it is
    (Krivov & Belyaev 2018, section 2.2). For a padded network, with a stride of 1 and no halo, this
    is the usual voxelwise loss.

    Args:
        geometry: Halo and stride of the network.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, output: Any, batch: Mapping[str, Any]) -> Terms:  # noqa: ANN401
        """Return the `loss` of patches, whose logits cover the mask inside the halo."""
        halo, mask = self.geometry.halo, batch["mask"]
        inside = (..., *(slice(halo, side - halo) for side in mask.shape[2:]))
        return self._terms(output.logits, mask[inside])

    def on_volume(self, logits: Float[Tensor, "b r x y z"], batch: Mapping[str, Any]) -> Terms:
        """Return the `loss` of whole volumes, which counts every box of the grid once."""
        stride = self.geometry.stride
        return self._terms(logits[..., ::stride, ::stride, ::stride], batch["mask"])

    def _terms(
        self, logits: Float[Tensor, "b r x_ y_ z_"], mask: Bool[Tensor, "b r x y z"]
    ) -> Terms:
        target = pooled(mask, self.geometry.stride).to(torch.float32)
        return {"loss": F.binary_cross_entropy_with_logits(logits.float(), target)}


def pooled(mask: Bool[Tensor, "b r x y z"], stride: int) -> Bool[Tensor, "b r x_ y_ z_"]:
    """Tell for each box of stride³ voxels whether one of them is true; sides are rounded up."""
    if stride == 1:
        return mask
    # Not every device can pool bytes.
    return F.max_pool3d(mask.float(), stride, ceil_mode=True) > 0
