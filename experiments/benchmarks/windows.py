"""CPU time of the sliding window, against MONAI's, in turn in one process.

Both segment the same windows and return the same logits; MONAI's also segments each window of air,
and each mirror image by itself.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from experiments.benchmarks.detection import brain
from experiments.tables import markdown
from lightning_modules.inference import Flip, SlidingWindow, everywhere
from lightning_modules.memory import keep_freed
from lightning_modules.networks.aeunet import AEUNet

ALL_FLIPS = [flip for n in range(4) for flip in combinations((2, 3, 4), n)]
BATCH = 4


class Counted(nn.Module):
    """Counts the windows that a network segments."""

    def __init__(self, network: AEUNet) -> None:
        super().__init__()
        self.network = network
        self.windows = 0

    def segment(self, windows: Tensor) -> Tensor:
        if len(windows) == 1:  # faster than alone, for MONAI's loop too: see inference.py
            return self.segment(windows.expand(2, -1, -1, -1, -1))[:1]
        self.windows += len(windows)
        return self.network.segment(windows)


class Setup(NamedTuple):
    """A volume (1, 4, X, Y, Z), and how windows are laid over it."""

    image: Tensor
    window: int
    overlap: float
    flips: Sequence[Flip]


def by_monai(network: Counted, setup: Setup) -> list[Tensor]:
    """Segment one mirror image after the other."""
    image, window, overlap, flips = setup
    found = []
    for flip in flips:
        logits = sliding_window_inference(
            image.flip(flip), window, BATCH, network.segment, overlap, mode="gaussian"
        )
        assert isinstance(logits, Tensor)
        found.append(logits.flip(flip))
    return found


def by_us(network: Counted, setup: Setup) -> list[Tensor]:
    """Segment all mirror images in common batches."""
    image, window, overlap, flips = setup
    inference = SlidingWindow(window, overlap, BATCH)
    return list(inference.estimates(image, network, everywhere(image), flips))


def setups(scale: float) -> dict[str, Setup]:
    """Describe volumes and windows; at a scale of 1, the brain has 160x192x128 voxels."""

    def scaled(*sides: int) -> list[int]:
        return [16 * round(scale * side / 16) for side in sides]

    inner, outer = scaled(160, 192, 128), scaled(240, 240, 160)
    head = brain(inner).repeat(4, 1, 1, 1)[None]
    missing = [side - within for side, within in zip(outer, inner, strict=True)]
    air = [end for voxels in missing[::-1] for end in (voxels // 2, voxels - voxels // 2)]
    (window,) = scaled(80)
    return {
        "brain in its bounding box": Setup(head, window, 0.5, [()]),
        "the same, small windows": Setup(head, 32, 0.25, [()]),
        "scan that is not cropped": Setup(nn.functional.pad(head, air), window, 0.5, [()]),
        "one window, eight mirror images": Setup(head[..., :40, :40, :40], 48, 0.5, ALL_FLIPS),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.windows", description=__doc__
    )
    parser.add_argument("--filters", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=1, help="of the brain of 160x192x128")
    parser.add_argument("--repeats", type=int, default=2, help="default: %(default)s")
    options = parser.parse_args()
    keep_freed()
    torch.manual_seed(0)
    network = Counted(AEUNet(4, 3, 16, options.filters, bottleneck=4).eval())
    network = network.to(memory_format=torch.channels_last_3d)  # pyright: ignore
    rows = []
    for name, setup in setups(options.scale).items():
        image = setup.image.contiguous(memory_format=torch.channels_last_3d)
        setup = setup._replace(image=image)  # as a module hands it to its inference
        seconds, windows, found = {}, {}, {}
        for _ in range(options.repeats):
            for method in (by_monai, by_us):
                network.windows = 0
                start = time.process_time()
                found[method] = method(network, setup)
                taken = time.process_time() - start
                seconds[method] = min(taken, seconds.get(method, taken))
                windows[method] = network.windows
        equal = all(map(torch.equal, found[by_monai], found[by_us]))
        rows.append(
            {
                "volume": f"{name}, {'x'.join(map(str, image.shape[2:]))}",
                "window": f"{setup.window}³",
                "windows of MONAI": str(windows[by_monai]),
                "windows of ours": str(windows[by_us]),
                "s, MONAI": f"{seconds[by_monai]:.1f}",
                "s, ours": f"{seconds[by_us]:.1f}",
                "ratio": f"{seconds[by_monai] / seconds[by_us]:.2f}",
                "equal": "to the bit" if equal else "no",
            }
        )
    print(markdown(rows))


if __name__ == "__main__":
    main()
