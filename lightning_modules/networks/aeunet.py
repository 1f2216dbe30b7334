"""Autoencoder-regularised 3-D U-Net of Frey & Nau 2019, after Myronenko 2018."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.networks.blocks import (
    Conv3d,
    GroupNorm,
    Level,
    Logits,
    MakeActivation,
    MakeDownsampling,
    MakeNorm,
    ResidualBlock,
    StridedConv,
    Upsample,
    widths,
)
from lightning_modules.networks.checkpointing import CHECKPOINTING, Checkpointing

# Levels beyond the paper's four repeat its deepest one.
BLOCKS_PER_LEVEL = (1, 2, 2, 4, 4, 4)

# Variances of exp(±10) are far beyond what a latent needs and far within the range of float32.
# Without the bound, they diverge to NaN within a few steps at a learning rate of 1e-3.
LOG_VARIANCE_BOUND = 10.0


class Latent(NamedTuple):
    """Gaussian posterior of the bottleneck, in float32."""

    mean: Float[Tensor, "b latent"]
    log_variance: Float[Tensor, "b latent"]


class AEUNetOutput(NamedTuple):
    """The output in training; inference needs the logits alone, from `AEUNet.segment`.

    Attributes:
        logits: Segmentation, with one channel for each region.
        reconstruction: The autoencoder's estimate of the input.
        latent: The posterior from which the reconstruction was sampled.
    """

    logits: Float[Tensor, "b r x y z"]
    reconstruction: Float[Tensor, "b c x y z"]
    latent: Latent


class Encoder(nn.Module):
    """A convolution of the input, then residual blocks with downsampling between the levels.

    Args:
        in_channels: Channels of the image.
        filters: Filters of each level, fine to coarse.
        norm: Makes the normalisation of so many channels.
        activation: Makes the nonlinearity.
        downsampling: Makes the step from one level to the next coarser one.
        dropout: Probability that training sets a channel of the first convolution to zero.
        checkpointing: What the backward pass computes anew.
    """

    def __init__(
        self,
        in_channels: int,
        filters: Sequence[int],
        norm: MakeNorm,
        activation: MakeActivation,
        downsampling: MakeDownsampling,
        dropout: float,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        down: list[nn.Module] = [Conv3d(in_channels, filters[0], 3, padding=1, bias=False)]
        down += [downsampling(*pair) for pair in pairwise(filters)]
        self.down = nn.ModuleList(down)
        # Without dropout there is no layer at all, so that no random number is drawn for it.
        self.dropout = nn.Dropout3d(dropout) if dropout else nn.Identity()
        self.levels = nn.ModuleList(
            Level(
                *(
                    ResidualBlock(width, width, norm, activation, checkpointing=checkpointing)
                    for _ in range(blocks)
                ),
                run=checkpointing.blocks,
            )
            for width, blocks in zip(filters, BLOCKS_PER_LEVEL, strict=False)
        )
        self.run = checkpointing.levels

    def forward(self, x: Float[Tensor, "b c x y z"]) -> list[Tensor]:
        """Compute the features (B, F, X', Y', Z') of every level, fine to coarse."""
        features: list[Tensor] = []
        for index in range(len(self.levels)):
            x = self.run(self._level, x, index)
            features.append(x)
        return features

    def _level(self, x: Float[Tensor, "b i x y z"], index: int) -> Float[Tensor, "b o x_ y_ z_"]:
        x = self.down[index](x)
        return self.levels[index](x if index else self.dropout(x))


class Decoder(nn.Module):
    """Upsampling with one residual block a level, from the coarsest level to the input's grid.

    Args:
        filters: Filters of each level, fine to coarse.
        last: Layer from the features of the finest level to the output.
        norm: Makes the normalisation of so many channels.
        activation: Makes the nonlinearity.
        checkpointing: What the backward pass computes anew.
    """

    def __init__(
        self,
        filters: Sequence[int],
        last: nn.Conv3d,
        norm: MakeNorm,
        activation: MakeActivation,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        coarse_to_fine = list(filters)[::-1]
        self.up = nn.ModuleList(Upsample(*pair) for pair in pairwise(coarse_to_fine))
        self.levels = nn.ModuleList(
            ResidualBlock(width, width, norm, activation, checkpointing=checkpointing)
            for width in coarse_to_fine[1:]
        )
        self.head = nn.Sequential(norm(filters[0]), activation(), last)
        self.checkpointing = checkpointing

    def forward(
        self,
        x: Float[Tensor, "b f x_ y_ z_"],
        sizes: Sequence[torch.Size],
        skips: Sequence[Tensor],
    ) -> Float[Tensor, "b out x y z"]:
        """Decode features of the coarsest level.

        Args:
            x: The features.
            sizes: Sides (X, Y, Z) of the finer levels, coarse to fine.
            skips: Features to add on the finer levels, coarse to fine; none for the autoencoder.
        """
        for index, size in enumerate(sizes):
            x = self.checkpointing.levels(self._level, x, index, size, *skips[index : index + 1])
        return x

    def _level(
        self, x: Float[Tensor, "b i x_ y_ z_"], index: int, size: torch.Size, *skip: Tensor
    ) -> Float[Tensor, "b o x y z"]:
        x = self.up[index](x, size)
        x = self.checkpointing.blocks(self.levels[index], x + skip[0] if skip else x)
        if index + 1 < len(self.levels):
            return x
        return self.checkpointing.norms(self.head, x)


class Bottleneck(nn.Module):
    """Variational bottleneck: encodes features as a Gaussian, and decodes a sample of it.

    In order: a strided convolution to 16 channels, a dense layer to means and log-variances, the
    sample, a dense layer, a 1³ convolution and trilinear upsampling (Myronenko 2018, table 2: VD,
    VDraw, VU).

    Args:
        channels: Channels of the features, before and after.
        size: Sides (X, Y, Z) of the features.
        bottleneck: Number of means, and of log-variances.
        norm: Makes the normalisation of so many channels.
        activation: Makes the nonlinearity.
    """

    CHANNELS = 16

    def __init__(
        self,
        channels: int,
        size: Sequence[int],
        bottleneck: int,
        norm: MakeNorm,
        activation: MakeActivation,
    ) -> None:
        super().__init__()
        self.reduced_shape = (self.CHANNELS, *(math.ceil(s / 2) for s in size))
        units = math.prod(self.reduced_shape)
        self.reduce = nn.Sequential(
            norm(channels), activation(), StridedConv(channels, self.CHANNELS), nn.Flatten()
        )
        self.posterior = nn.Linear(units, 2 * bottleneck)
        self.expand = nn.Linear(bottleneck, units)
        self.activation = activation()
        self.up = Upsample(self.CHANNELS, channels)

    def forward(self, x: Float[Tensor, "b f x y z"]) -> tuple[Float[Tensor, "b f x y z"], Latent]:
        """Return the features decoded from a sample, and the posterior of the sample."""
        reduced = self.reduce(x)
        # Exponentials and their sums overflow in half precision.
        with torch.autocast(x.device.type, enabled=False):
            mean, log_variance = self.posterior(reduced.float()).chunk(2, dim=1)
            # A smooth bound, so that a variance near it still has a gradient.
            log_variance = LOG_VARIANCE_BOUND * torch.tanh(log_variance / LOG_VARIANCE_BOUND)
            sample = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            expanded = self.activation(self.expand(sample))
        features = self.up(expanded.view(-1, *self.reduced_shape), x.shape[2:])
        return features, Latent(mean, log_variance)


class AEUNet(nn.Module):
    """U-Net with an autoencoder branch, which reconstructs the input (section 2.1, figure 1).

    The encoder has 1, 2, 2 and 4 residual blocks a level. The segmentation decoder adds skips and
    ends in logits of every region. The autoencoder branch has its own decoder, without skips, which
    starts from a variational bottleneck. `forward` runs both, for training; `segment` leaves the
    branch out.

    Args:
        in_channels: Number of modalities and further inputs, stacked as channels.
        out_channels: Number of regions; they may overlap, so each has its own sigmoid.
        patch_size: Sides of the training patches in voxels, one number or three. It fixes the dense
            layers of the bottleneck; `segment` takes any sides that `divisor` divides.
        filters: Filters of the finest level.
        ratio: Filters of a level over those of the next finer one; need not be an integer.
        depth: Number of levels, one more than downsampling steps.
        bottleneck: Number of means, and of log-variances, of the autoencoder.
        norm: Makes the normalisation of so many channels.
        activation: Makes the nonlinearity.
        downsampling: Makes the step from one level to the next coarser one.
        dropout: Probability that training sets a channel of the first convolution to zero, in a
            whole patch. Myronenko 2018 has 0.2; Frey & Nau do not mention it.
        prior: Probability that the untrained network gives to every voxel of every region.
        checkpointing: What the backward pass computes anew, a key of `CHECKPOINTING`.

    Raises:
        ValueError: The depth is out of range, or a side of the patches is no multiple of
            2^(depth - 1).
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 3,
        patch_size: int | Sequence[int] = 80,
        filters: int = 32,
        ratio: float = 2,
        depth: int = 4,
        bottleneck: int = 128,
        norm: MakeNorm = GroupNorm,
        activation: MakeActivation = nn.LeakyReLU,
        downsampling: MakeDownsampling = StridedConv,
        dropout: float = 0.0,
        prior: float = 0.5,
        checkpointing: str = "none",
    ) -> None:
        super().__init__()
        if not 2 <= depth <= len(BLOCKS_PER_LEVEL):
            raise ValueError(f"depth: expected 2 to {len(BLOCKS_PER_LEVEL)} levels, got {depth}")
        size = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
        self.divisor = 2 ** (depth - 1)
        if any(side % self.divisor for side in size):
            raise ValueError(
                f"patch_size: {'x'.join(map(str, size))} is not divisible by {self.divisor}, "
                f"as {depth} levels need"
            )
        self.widths = widths(filters, ratio, depth)
        anew = CHECKPOINTING[checkpointing]
        self.encoder = Encoder(
            in_channels, self.widths, norm, activation, downsampling, dropout, anew
        )
        logits = Logits(self.widths[0], out_channels, prior)
        self.decoder = Decoder(self.widths, logits, norm, activation, anew)
        coarsest = [side // self.divisor for side in size]
        self.bottleneck = Bottleneck(self.widths[-1], coarsest, bottleneck, norm, activation)
        image = nn.Conv3d(self.widths[0], in_channels, 1)
        self.autoencoder = Decoder(self.widths, image, norm, activation, anew)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> AEUNetOutput:
        """Segment and reconstruct training patches of the size `patch_size`."""
        *skips, coarsest = self.encoder(x)
        skips.reverse()
        sizes = [skip.shape[2:] for skip in skips]
        features, latent = self.bottleneck(coarsest)
        return AEUNetOutput(
            logits=self.decoder(coarsest, sizes, skips),
            reconstruction=self.autoencoder(features, sizes, skips=()),
            latent=latent,
        )

    def segment(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b r x y z"]:
        """Compute the logits of images whose sides `divisor` divides, without the autoencoder."""
        *skips, coarsest = self.encoder(x)
        skips.reverse()
        return self.decoder(coarsest, [skip.shape[2:] for skip in skips], skips)
