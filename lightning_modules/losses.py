"""The losses: Frey & Nau 2019, section 2.2, and Krivov & Belyaev 2018, section 2.2.

Every term is computed in float32, whatever the precision of the network: the sums run over
hundreds of thousands of voxels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.aeunet import Latent
from lightning_modules.networks.dnet import Geometry


def soft_dice(logits: Tensor, mask: Tensor, smooth: float = 100.0) -> Tensor:
    """Soft Dice loss by region (equation 1), mean over the batch.

    Printed as `1 - 2(Σtp + s)/(Σt² + Σp² + s)`, which is -1 where both masks are empty although the
    text claims the interval [0, 1]; `1 - (2Σtp + s)/(Σt² + Σp² + s)` is in it.

    Args:
        logits: (B, R, ...), before the sigmoid.
        mask: (B, R, ...), 0 or 1.
        smooth: s. A large value lets the network predict a few voxels in a patch without tumour.

    Returns:
        (R,), in [0, 1].
    """
    probability = logits.float().sigmoid().flatten(2)
    truth = mask.float().flatten(2)
    overlap = (truth * probability).sum(-1)
    total = truth.square().sum(-1) + probability.square().sum(-1)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean(0)


def reconstruction_l2(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean squared error over voxels, channels and batch (equation 2); () from two (B, C, ...)."""
    return F.mse_loss(reconstruction.float(), image.float())


def gaussian_kl(latent: Latent, voxels: int) -> Tensor:
    """Divergence of the posterior from N(0, 1), mean over the batch (equation 3).

    `Σ(μ² + σ² - log σ² - 1) / N` without the usual ½, N the voxels of the input patch.
    """
    mean, log_variance = latent.mean.float(), latent.log_variance.float()
    divergence = mean.square() + log_variance.exp() - log_variance - 1
    return divergence.sum(1).mean() / voxels


class RegionLoss(nn.Module):
    """Weighted sum of the soft Dice losses of all regions.

    Args:
        weights: Weight of each region, in the order of the network's output channels.
        smooth_mm3: s of equation 1 as a volume. The paper's 100 voxels are 100 mm³; on a coarser
            grid 100 voxels would outweigh small regions.
        spacing_mm: Edge of a voxel.
    """

    def __init__(
        self, weights: Mapping[str, float], smooth_mm3: float = 100.0, spacing_mm: float = 1.0
    ) -> None:
        super().__init__()
        self.regions = list(weights)
        self.smooth = smooth_mm3 / spacing_mm**3
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor(list(weights.values())), persistent=False)

    def forward(self, logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`dice_<region>` for each region, unweighted, and their weighted sum, `loss`."""
        by_region = soft_dice(logits, mask, self.smooth)
        terms = dict(zip((f"dice_{region}" for region in self.regions), by_region, strict=True))
        return {**terms, "loss": (self.weights * by_region).sum()}


class SparseCrossEntropy(nn.Module):
    """Binary cross entropy against the mask that max pooling brings to the network's grid.

    A box of stride³ voxels is positive if one voxel in it is (Krivov & Belyaev 2018, section 2.2).
    With the geometry of a padded network, stride 1 and no halo, this is the usual voxelwise loss.

    Args:
        geometry: Halo and stride of the network.
        regions: Names of the output channels.
    """

    def __init__(self, geometry: Geometry, regions: Sequence[str] = ("lesion",)) -> None:
        super().__init__()
        self.geometry = geometry
        self.regions = list(regions)

    def forward(self, logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`loss` of logits (B, R, X', Y', Z') of patches with masks (B, R, X, Y, Z)."""
        halo = self.geometry.halo
        inside = (..., *(slice(halo, side - halo) for side in mask.shape[2:]))
        return self.on_volume(logits, mask[inside])

    def on_volume(self, logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`loss` of logits of a whole volume, whose grid starts at the mask's first voxel."""
        target = pooled(mask, self.geometry.stride).to(torch.float32)
        return {"loss": F.binary_cross_entropy_with_logits(logits.float(), target)}


def pooled(mask: Tensor, stride: int) -> Tensor:
    """Whether any voxel of each box of stride³ is true: (B, R, X, Y, Z) to its ⌈sides / stride⌉."""
    if stride == 1:
        return mask
    # Max pooling of bytes is not to be had on every device.
    return F.max_pool3d(mask.float(), stride, ceil_mode=True) > 0
