"""While tests run, beartype checks the shapes in all signatures: see `--jaxtyping-packages`."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from lightning_modules.inference import WholeVolume, repeated
from lightning_modules.losses import soft_dice
from lightning_modules.metrics.hausdorff import hausdorff95
from lightning_modules.metrics.regions import dice
from lightning_modules.networks.unet import UNet3D
from lightning_modules.pictures import plane
from lightning_modules.segmentation import SegmentationModule

IMAGE = torch.zeros(1, 2, 4, 4, 4)
MASK = IMAGE > 0


class WithoutBatch(torch.nn.Module):
    """Returns logits of one image, where the inference expects those of a batch."""

    divisor = 1

    def segment(self, x: torch.Tensor) -> torch.Tensor:
        return x[0]


WRONG_CALLS: dict[str, Callable[[], object]] = {
    "masks of other regions": lambda: soft_dice(IMAGE, MASK[:, :1]),
    "an image without channels": lambda: repeated(IMAGE[0], 2, (8, 8, 8)),
    "logits without a batch": lambda: WholeVolume()(IMAGE, WithoutBatch()),
    "probabilities in place of masks": lambda: dice(IMAGE, MASK, torch.zeros(1, 2).int()),
    "masks on different grids": lambda: hausdorff95(MASK[0, 0].numpy(), MASK[0, 0, 1:].numpy()),
    "a batch in place of patches": lambda: UNet3D(2)({"image": IMAGE}),
    "labels in place of an image": lambda: UNet3D(2)(MASK.long()),
    "channels in place of one modality": lambda: plane(np.zeros((2, 4, 4, 4)), 0, 0),
    "an image without a batch": lambda: SegmentationModule.forward(None, IMAGE[0]),
}


@pytest.mark.parametrize("call", WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_a_wrong_shape_is_refused(call: Callable[[], object]):
    with pytest.raises(TypeCheckError):
        call()
