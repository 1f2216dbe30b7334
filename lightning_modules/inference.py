"""From patches to whole volumes."""

from collections.abc import Callable, Sequence
from typing import cast

from monai.inferers.utils import sliding_window_inference
from torch import Tensor

Segment = Callable[[Tensor], Tensor]


class SlidingWindow:
    """Overlapping windows, blended by Gaussian weights (MONAI).

    Args:
        patch_size: Side of the window in voxels, one number or three. A window of the training
            patches' size keeps the context that the network has learnt to use.
        overlap: Share of a window that its neighbour covers too.
        batch_size: Windows a forward pass.
    """

    def __init__(
        self, patch_size: int | Sequence[int], overlap: float = 0.5, batch_size: int = 4
    ) -> None:
        self.patch_size = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
        self.overlap = overlap
        self.batch_size = batch_size

    def __call__(self, image: Tensor, segment: Segment) -> Tensor:
        """Logits (B, R, X, Y, Z) of an image (B, C, X, Y, Z) of any size."""
        logits = sliding_window_inference(
            image,
            roi_size=self.patch_size,
            sw_batch_size=self.batch_size,
            predictor=lambda windows: _never_alone(windows, segment),
            overlap=self.overlap,
            mode="gaussian",
        )
        return cast(Tensor, logits)


def _never_alone(windows: Tensor, segment: Segment) -> Tensor:
    """Segment a single window on a CPU as two.

    For batches of one, PyTorch leaves oneDNN wherever channels * X * Y is small: one window of 48³
    takes six times as long as two.
    """
    if len(windows) == 1 and windows.device.type == "cpu":
        return segment(windows.expand(2, *windows.shape[1:]))[:1]
    return segment(windows)
