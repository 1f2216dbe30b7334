"""Memory for time: what the backward pass computes anew, instead of keeping it (Chen et al. 2016).

No result changes by a bit: the same operations run again on the same numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Tensor]  # `run(part, *inputs)` is `part(*inputs)`


def keep(part: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Run a part of a network, and keep what its backward pass needs."""
    return part(*inputs)


def recompute(part: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Run a part of a network, and keep its inputs alone for the backward pass.

    Args:
        part: A module, or a method of one.
        inputs: What the part takes.
    """
    if not torch.is_grad_enabled():
        return part(*inputs)
    module: nn.Module = getattr(part, "__self__", part)  # pyright: ignore[reportAssignmentType]
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Make the contexts of the first pass and of the second."""
        return nullcontext(), _statistics_kept(norms)

    return cast(Tensor, checkpoint(part, *inputs, use_reentrant=False, context_fn=contexts))


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Keep the running statistics of batch norm: the first pass has updated them already."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum, norm.num_batches_tracked = momentum, batches


class Checkpointing(NamedTuple):
    """How parts of a network are run, from small to large; a larger part has smaller ones in it.

    Attributes:
        norms: Runs norm, activation and convolution. Recomputing them costs the norm and the
            activation again, as the convolution needs nothing but its input.
        blocks: Runs a residual block.
        levels: Runs a whole level: the way to its grid, its blocks, and the head if it has one.
    """

    norms: Run = keep
    blocks: Run = keep
    levels: Run = keep


# The values of `model.checkpointing`.
CHECKPOINTING = {
    "none": Checkpointing(),
    "norms": Checkpointing(recompute),
    "blocks": Checkpointing(recompute, recompute),
    "levels": Checkpointing(recompute, recompute, recompute),
}
