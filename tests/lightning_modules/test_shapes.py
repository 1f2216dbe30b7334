"""While tests run, beartype checks the shapes in the signatures (`--jaxtyping-packages`)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from lightning_modules.inference import repeated
from lightning_modules.losses import soft_dice
from lightning_modules.metrics.hausdorff import surface
from lightning_modules.metrics.regions import dice
from lightning_modules.networks.blocks import GroupNorm, ResidualBlock
from lightning_modules.segmentation import SegmentationModule

VOLUME = torch.zeros(1, 2, 4, 4, 4)
MASK = VOLUME > 0

WRONG_CALLS: dict[str, Callable[[], object]] = {
    "masks of other regions": lambda: soft_dice(VOLUME, MASK[:, :1]),
    "volumes without channels": lambda: repeated(VOLUME[0], 2, (8, 8, 8)),
    "probabilities in place of masks": lambda: dice(VOLUME, MASK, torch.zeros(1, 2).int()),
    "a mask in two dimensions": lambda: surface(np.zeros((4, 4), bool)),
    "a slice in place of a volume": lambda: ResidualBlock(8, 8, GroupNorm, torch.nn.ReLU)(
        VOLUME[0]
    ),
    "an image without a batch": lambda: SegmentationModule.forward(None, VOLUME[0]),
}


@pytest.mark.parametrize("call", WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_a_wrong_shape_is_refused(call: Callable[[], object]):
    with pytest.raises(TypeCheckError):
        call()
