"""Building blocks of the networks.

Blocks that can be exchanged are passed as constructors: `norm(channels)`, `activation()` and
`downsampling(in_channels, out_channels)`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_modules.networks.checkpointing import CHECKPOINTING, Checkpointing, Run, keep

MakeNorm = Callable[[int], nn.Module]
MakeActivation = Callable[[], nn.Module]
MakeDownsampling = Callable[[int, int], nn.Module]


class Segmentation(NamedTuple):
    """The output in training of a network that has no other output.

    Attributes:
        logits: Segmentation on the network's own grid, with one channel for each region.
    """

    logits: Float[Tensor, "b r x y z"]


def widths(base: int, ratio: float, depth: int) -> list[int]:
    """Compute the filters of each level: `base * ratio**level`, rounded to a multiple of 8.

    Group norm with 8 groups needs multiples of 8. Networks with other norms have the same widths,
    so that norms are compared at equal size.

    >>> widths(8, 1.5, 4)
    [8, 16, 16, 24]
    """
    return [max(8, 8 * int(base * ratio**level / 8 + 0.5)) for level in range(depth)]


# PyTorch's group norm of bfloat16 is slow with fewer channels, and faster by way of float32.
FEWEST_CHANNELS_OF_BFLOAT16 = 16


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that, like other norms, needs the number of channels only.

    Args:
        channels: Number of channels, a multiple of 8.
        groups: The largest number of groups.
        least_channels: The smallest number of channels in a group. The paper has 8 groups of 4
            channels on its finest level; 8 groups of the proxy's 8 channels would be instance norm,
            which removes the brightness of a patch.
    """

    def __init__(self, channels: int, groups: int = 8, least_channels: int = 4) -> None:
        super().__init__(min(groups, channels // least_channels), channels)

    def forward(self, input: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        last = input.is_contiguous(memory_format=torch.channels_last_3d)
        if input.is_cpu and last and input.dtype in (torch.float32, torch.bfloat16):
            return cast(
                Tensor,
                _ChannelsLastGroupNorm.apply(
                    input, self.weight, self.bias, self.num_groups, self.eps
                ),
            )
        return super().forward(input)


class _ChannelsLastGroupNorm(Function):
    """PyTorch's group norm with a backward pass for channels last, in half of the time.

    With x' = (x - mean) rstd, the gradient of x is rstd (w g - <w g> - x' <w g x'>), where <> is
    the mean over a group: for each channel a constant, a multiple of g and one of x. As in PyTorch,
    bfloat16 is computed in float32, and only the result is rounded.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401  (torch leaves its type open)
        x: Float[Tensor, "b c x y z"],
        weight: Float[Tensor, " c"],
        bias: Float[Tensor, " c"],
        groups: int,
        eps: float,
    ) -> Float[Tensor, "b c x y z"]:
        cases, channels = x.shape[:2]
        few = channels < FEWEST_CHANNELS_OF_BFLOAT16
        y, mean, rstd = torch.native_group_norm(
            x.float() if few else x,
            weight,
            bias,
            cases,
            channels,
            math.prod(x.shape[2:]),
            groups,
            eps,
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        g: Float[Tensor, "b c x y z"],
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        (cases, channels), groups = x.shape[:2], mean.shape[1]
        voxels = math.prod(x.shape[2:])

        def of_channels(values: Tensor) -> Tensor:
            return values.repeat_interleave(channels // groups, 1)

        def group_mean(sums: Tensor) -> Tensor:
            in_groups = sums.view(cases, groups, -1)
            return of_channels(in_groups.sum(2) / (in_groups.shape[2] * voxels))

        mean, rstd = of_channels(mean), of_channels(rstd)
        dtype, g, x = x.dtype, g.float(), x.float()
        g_rows, x_rows = (t.permute(0, 2, 3, 4, 1).reshape(cases, voxels, channels) for t in (g, x))
        sum_g = g_rows.sum(1)
        # A product of matrices computes C times too much, and is faster than a sum all the same.
        sum_gx = torch.bmm(g_rows.transpose(1, 2), x_rows).diagonal(dim1=1, dim2=2)
        sum_gx = (sum_gx - mean * sum_g) * rstd
        of_x = -rstd * rstd * group_mean(weight * sum_gx)
        constant = -rstd * group_mean(weight * sum_g) - mean * of_x
        of_g, of_x, constant = (t[..., None, None, None] for t in (rstd * weight, of_x, constant))
        gradient = torch.addcmul(constant, g, of_g).addcmul_(x, of_x)
        return gradient.to(dtype), sum_gx.sum(0), sum_g.sum(0), None, None


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` of padded or valid cubes that is as fast for one image as for a batch.

    On a CPU, PyTorch leaves a batch of one to a slow implementation if channels * X * Y is small.
    Such an image is convolved as a batch of its two halves along x, with the voxels around the cut
    in both. The result is the same up to rounding, in a third to a tenth of the time.
    """

    LARGEST_LEFT_OUT = 20480  # channels * X * Y, in `use_mkldnn` of PyTorch's Convolution.cpp

    def forward(self, input: Float[Tensor, "b i x y z"]) -> Float[Tensor, "b o x_ y_ z_"]:
        cross_section = math.prod(input.shape[1:4])
        if len(input) > 1 or not input.is_cpu or cross_section > self.LARGEST_LEFT_OUT:
            return super().forward(input)
        padding = cast(tuple[int, ...], self.padding)  # a word only if one asks for it
        kernel, stride, pad = self.kernel_size[0], self.stride[0], padding[0]
        size = (input.shape[2] + 2 * pad - kernel) // stride + 1
        half = -(-size // 2)
        # The second half ends with the image; if the size is odd, both have the middle slice.
        reach, second = (half - 1) * stride + kernel, (size - half) * stride
        padded = F.pad(input, (0, 0, 0, 0, pad, pad)) if pad else input
        halves = torch.cat([padded[:, :, :reach], padded[:, :, second : second + reach]])
        others = (self.stride, (0, *padding[1:]), self.dilation, self.groups)
        first, last = F.conv3d(halves, self.weight, self.bias, *others).split(1)
        return torch.cat([first, last[:, :, 2 * half - size :]], dim=2)


class StridedConv(Conv3d):
    """Downsampling by a 3³ convolution of stride 2, as in Frey & Nau 2019."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, bias=False)


class PooledConv(Conv3d):
    """Downsampling by pooling, and a 3³ convolution on the coarse grid.

    It has the parameters of `StridedConv`, under the same names, and convolves as many voxels, so
    that ways of downsampling are compared at equal cost and from the same initial weights.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        pool: Class of the pooling: `nn.MaxPool3d` or `nn.AvgPool3d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, pool: Callable[..., nn.Module] = nn.MaxPool3d
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.pool = pool(2, ceil_mode=True)  # half of an odd side is rounded up, as by a stride

    def forward(self, input: Float[Tensor, "b i x y z"]) -> Float[Tensor, "b o x_ y_ z_"]:
        return super().forward(self.pool(input))


class ResidualBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016): norm, activation, 3³ convolution, twice.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; if they differ, a 1³ convolution is the shortcut.
        norm: Makes the normalisation of so many channels.
        activation: Makes the nonlinearity.
        padding: 1 keeps the size; 0 loses two voxels on each side.
        on_image: Whether the input is the image itself. Then the block starts with the convolution,
            because a norm would remove the image's brightness.
        checkpointing: What the backward pass computes anew.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: MakeNorm,
        activation: MakeActivation,
        padding: int = 1,
        on_image: bool = False,
        checkpointing: Checkpointing = CHECKPOINTING["none"],
    ) -> None:
        super().__init__()
        before = () if on_image else (norm(in_channels), activation())
        self.body = nn.Sequential(
            *before,
            Conv3d(in_channels, out_channels, 3, padding=padding, bias=False),
            norm(out_channels),
            activation(),
            Conv3d(out_channels, out_channels, 3, padding=padding, bias=False),
        )
        # Each ends with a convolution; a tuple, so that the parts have one name in a checkpoint.
        self.halves = (self.body[:-3], self.body[-3:])
        self.run = checkpointing.norms
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else Conv3d(in_channels, out_channels, 1)
        self.lost = 2 * (1 - padding)  # voxels, on each side

    def forward(self, x: Float[Tensor, "b i x y z"]) -> Float[Tensor, "b o x_ y_ z_"]:
        kept = (..., *(slice(self.lost, size - self.lost) for size in x.shape[2:]))
        first, second = self.halves
        return self.shortcut(x[kept]) + self.run(second, self.run(first, x))


class Level(nn.Sequential):
    """Parts of one level of a network, one after another.

    Args:
        parts: Residual blocks, and what lies between levels.
        run: How each part is run in training.
    """

    def __init__(self, *parts: nn.Module, run: Run = keep) -> None:
        super().__init__(*parts)
        self.run = run

    def forward(self, input: Float[Tensor, "b i x y z"]) -> Float[Tensor, "b o x_ y_ z_"]:
        for part in self:
            input = self.run(part, input)
        return input


class Upsample(nn.Module):
    """A 1³ convolution, then trilinear interpolation to the size of the finer level."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1, bias=False)

    def forward(
        self, x: Float[Tensor, "b i x y z"], size: tuple[int, ...]
    ) -> Float[Tensor, "b o x_ y_ z_"]:
        """Upsample to the sides `size` (X', Y', Z')."""
        return F.interpolate(self.conv(x), size, mode="trilinear", align_corners=False)


class Logits(nn.Conv3d):
    """1³ convolution to logits that start near a prior probability (Lin et al. 2017, section 3.3).

    If one voxel in a thousand is lesion, the network would otherwise spend the first hundred steps
    on learning how rare lesions are.

    Args:
        in_channels: Channels of the features.
        out_channels: Number of regions.
        prior: Probability that the untrained network gives to every voxel.
    """

    def __init__(self, in_channels: int, out_channels: int, prior: float) -> None:
        self.prior = prior  # before the constructor, which calls `reset_parameters`
        super().__init__(in_channels, out_channels, 1)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        assert self.bias is not None
        nn.init.constant_(self.bias, math.log(self.prior / (1 - self.prior)))
