"""D-Net against the U-Net on a whole volume: time and memory, in turn, in one process."""

import argparse
from collections.abc import Sequence

import torch
from lightning_modules.detection import DetectionModule
from torch import nn

from experiments.detection import peak_mib, seconds_a_volume
from lightning_modules.inference import ExactTiles, WholeVolume
from lightning_modules.losses import SparseCrossEntropy
from lightning_modules.memory import keep_freed
from lightning_modules.metrics import LesionMetrics
from lightning_modules.networks import DNet, UNet3D
from lightning_modules.networks.dnet import Geometry, geometry


def module(
    network: nn.Module, inference: ExactTiles | WholeVolume, grid: Geometry
) -> DetectionModule:
    """A network as it is used after training; its weights do not matter here."""
    return DetectionModule(
        network,
        SparseCrossEntropy(grid),
        torch.optim.Adam,
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
        inference,
        lambda: LesionMetrics(grid),
    ).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.detection", description=__doc__
    )
    parser.add_argument("--filters", type=int, default=16, help="default: the paper's %(default)s")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[144, 176, 144], help="default: a brain at 1 mm"
    )
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    given = parser.parse_args()
    keep_freed()
    torch.manual_seed(0)
    modules = {
        "unet": module(
            UNet3D(filters=given.filters, norm=nn.BatchNorm3d), WholeVolume(), Geometry(0, 1)
        ),
        "dnet": module(DNet(filters=given.filters), ExactTiles(geometry(), 2**30), geometry()),
        "dnet, padded by its halo": module(
            DNet(filters=given.filters), PaddedOnce(geometry(), 2**30), geometry()
        ),
    }
    volume = brain(given.shape)
    seconds = seconds_a_volume(modules, [volume], given.repeats)
    shape = "x".join(map(str, given.shape))
    print(f"{shape}, {given.filters} filters, fastest of {given.repeats}")
    for name, fitted in modules.items():
        ratio = seconds["unet"][0] / seconds[name][0]
        print(
            f"{name:26} {seconds[name][0]:7.3f} s  {ratio:5.2f} times the U-Net's speed  "
            f"{peak_mib(fitted, volume):6.0f} MiB"
        )


def brain(shape: Sequence[int]) -> torch.Tensor:
    """Noise in the ellipsoid that fills a box (1, X, Y, Z): with air in its corners."""
    axes = [torch.linspace(-1, 1, side) for side in shape]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)
    return torch.randn(1, *shape) * (radius < 1)


class PaddedOnce(ExactTiles):
    """The same logits without knowledge of the constant features around the volume."""

    def __call__(self, image: torch.Tensor, network: DNet) -> torch.Tensor:
        halo, stride = self.geometry
        far = [-side % stride for side in image.shape[2:]]
        padding = [end for more in reversed(far) for end in (halo, halo + more)]
        return network.segment(nn.functional.pad(image, padding))


if __name__ == "__main__":
    main()
