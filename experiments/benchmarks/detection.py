"""Time and memory of D-Net and the U-Net on a whole volume, measured in turn in one process."""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from experiments.timing import peak_mib, seconds_a_volume
from lightning_modules.inference import ExactTiles, Inference, Network, WholeVolume
from lightning_modules.losses import CrossEntropy
from lightning_modules.memory import keep_freed
from lightning_modules.metrics import LesionMetrics
from lightning_modules.networks.dnet import GEOMETRY, DNet
from lightning_modules.networks.geometry import Geometry
from lightning_modules.networks.unet import UNet3D
from lightning_modules.segmentation import SegmentationModule

VOXELS_AT_ONCE = 2**30  # more than any volume has: one pass over all of it


class PaddedOnce(ExactTiles):
    """Computes the same logits from a volume that is padded with its halo of zeros.

    `ExactTiles` saves these voxels, because the features of a constant background are known.
    """

    def coarse(self, image: Tensor, network: Network) -> Tensor:
        halo, stride = self.geometry
        sides = reversed(image.shape[2:])
        padding = [end for side in sides for end in (halo, halo + -side % stride)]
        return network.segment(nn.functional.pad(image, padding))


def module(network: nn.Module, inference: Inference, geometry: Geometry) -> SegmentationModule:
    """Wrap an untrained network as it is used after training; its weights change no time."""
    return SegmentationModule(
        network,
        CrossEntropy(geometry),
        torch.optim.Adam,
        torch.optim.lr_scheduler.ConstantLR,
        inference,
        lambda: LesionMetrics(geometry),
    ).eval()


def brain(shape: Sequence[int]) -> Tensor:
    """Make a volume (1, X, Y, Z) of noise in an ellipsoid, with air in the corners around it."""
    axes = [torch.linspace(-1, 1, side) for side in shape]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)
    return torch.randn(1, *shape) * (radius < 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.detection", description=__doc__
    )
    parser.add_argument("--filters", type=int, default=16, help="default: the paper's %(default)s")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[144, 176, 144], help="default: a brain at 1 mm"
    )
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()
    keep_freed()
    torch.manual_seed(0)
    modules = {
        "unet": module(
            UNet3D(filters=options.filters, norm=nn.BatchNorm3d), WholeVolume(), Geometry(0, 1)
        ),
        "dnet": module(
            DNet(filters=options.filters), ExactTiles(GEOMETRY, VOXELS_AT_ONCE), GEOMETRY
        ),
        "dnet, padded by its halo": module(
            DNet(filters=options.filters), PaddedOnce(GEOMETRY, VOXELS_AT_ONCE), GEOMETRY
        ),
    }
    volume = brain(options.shape)
    seconds = seconds_a_volume(modules, [volume], options.repeats)
    shape = "x".join(map(str, options.shape))
    print(f"{shape}, {options.filters} filters, fastest of {options.repeats}")
    for name, network in modules.items():
        ratio = seconds["unet"][0] / seconds[name][0]
        print(
            f"{name:26} {seconds[name][0]:7.3f} s  {ratio:5.2f} times the U-Net's speed  "
            f"{peak_mib(network, volume):6.0f} MiB"
        )


if __name__ == "__main__":
    main()
