"""What the processes of a distributed run tell each other; a single process only hears itself."""

from typing import Any, TypeVar

import torch
from torch import Tensor

Told = TypeVar("Told")


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def mean_of_ranks(values: Tensor) -> Tensor:
    """Average a tensor over all ranks, which all must call this."""
    if not is_distributed():
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def told_by_ranks(value: Told) -> list[Told]:
    """Return what every rank passes, by rank; all must call this."""
    if not is_distributed():
        return [value]
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, value)
    return told
