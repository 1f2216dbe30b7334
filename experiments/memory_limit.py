"""Which changes make a training step fit in so much memory, the smallest change first.

Checkpointing comes first, because it changes no number; then bfloat16, which rounds; then a smaller
batch, smaller patches and fewer filters, which make another training of it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from errors import InputError
from experiments.calibration import predicted, sides_of, smallest_side
from experiments.cost import Memory
from experiments.jobs import Job
from experiments.rules import shown

Values = dict[str, Any]  # what to change, by key

CHECKPOINTING = {"model.checkpointing": "blocks"}
HALF = {"trainer.precision": "bf16-mixed"}


@dataclass(frozen=True)
class Change:
    """A change of the configuration.

    Attributes:
        values: Its values, by key.
        memory: What a training step then takes.
        less: Shares of the filters, of the patch's voxels and of the batch that are given up.
    """

    values: Values
    memory: Memory
    less: tuple[float, float, float]

    @property
    def size(self) -> tuple[object, ...]:
        """What changes are ordered by: the heaviest of its parts first."""
        return (*self.less, "trainer.precision" in self.values, len(self.values))

    @property
    def overrides(self) -> str:
        """The change as it is typed."""
        words = [f"{key}={shown(value).replace(' ', '')}" for key, value in self.values.items()]
        return " ".join(f"'{word}'" if "[" in word else word for word in words)


def changes_that_fit(job: Job, limit_mib: float) -> list[Change]:
    """Search changes with which a training step fits in memory, the smallest first.

    Of every way to shrink a step, the largest size is returned that fits, with and without
    checkpointing and bfloat16. If the job fits as it is, the only change is none.

    Args:
        job: The job.
        limit_mib: Memory for weights, gradients, moments, activations and temporaries.

    Raises:
        InputError: None fits; the message says how much the smallest of them takes.
    """
    found: list[Change] = []
    refused: list[float] = []
    for values in _rounding(job):
        if any(fits.values.items() <= values.items() for fits in found):
            continue  # it fits with less
        change = _change(job, values)
        if change.memory.peak <= limit_mib:
            found.append(change)
            continue
        refused.append(change.memory.peak)
        for sizes in (_batches, _patches, _filters):
            ladder = [{**values, **size} for size in sizes(job)]
            largest = _first_that_fits(job, ladder, limit_mib, refused)
            found += [] if largest is None else [largest]
    if not found:
        raise InputError(
            f"vram_gb: expected at least {min(refused) * 2**20 / 1e9:.2f}, which the smallest step "
            f"takes that a change of batch, patches or filters leads to, found "
            f"{limit_mib * 2**20 / 1e9:g}"
        )
    return sorted(found, key=lambda change: change.size)


def _rounding(job: Job) -> Iterator[Values]:
    """Yield the changes that leave the training what it is, up to rounding; none at first."""
    model, precision = job.plain["model"], job.plain["trainer"]["precision"]
    kinds = [CHECKPOINTING] if model.get("checkpointing") == "none" else []
    kinds += [HALF] if precision == "32-true" else []
    for number in range(len(kinds) + 1):
        for chosen in combinations(kinds, number):
            yield {key: value for values in chosen for key, value in values.items()}


def _batches(job: Job) -> Iterator[Values]:
    """Yield smaller batches that the configuration allows, from the largest."""
    size = job.plain["data"]["batch_size"] // 2
    while size:
        with suppress(InputError):
            job.changed({"patches.batch_size": size})
            yield {"patches.batch_size": size}
        size //= 2


def _patches(job: Job) -> Iterator[Values]:
    """Yield smaller patches, from the largest; each time the longest side loses a step."""
    smallest, step = smallest_side(job)
    sides = list(sides_of(job))
    while max(sides) >= smallest + 2 * step:
        longest = sides.index(max(sides))
        sides[longest] -= step
        equal = len(set(sides)) == 1
        if equal or len(set(sides_of(job))) > 1:
            yield {"patches.size": sides[0] if equal else list(sides)}


def _filters(job: Job) -> Iterator[Values]:
    """Yield fewer filters, from the most; widths are multiples of 8."""
    for filters in range((job.plain["filters"]["base"] - 1) // 8 * 8, 0, -8):
        yield {"filters.base": filters}


def _change(job: Job, values: Values) -> Change:
    changed = job.changed(values)
    before, after = job.plain, changed.plain
    less = (
        1 - after["filters"]["base"] / before["filters"]["base"],
        1 - math.prod(sides_of(changed)) / math.prod(sides_of(job)),
        1 - after["data"]["batch_size"] / before["data"]["batch_size"],
    )
    return Change(values, predicted(changed).memory, less)


def _first_that_fits(
    job: Job, ladder: Sequence[Values], limit_mib: float, refused: list[float]
) -> Change | None:
    """Search the first change of a ladder of falling memory that fits, by halving it."""
    low, high = 0, len(ladder)
    found = None
    while low < high:
        middle = (low + high) // 2
        change = _change(job, ladder[middle])
        if change.memory.peak <= limit_mib:
            found, high = change, middle
        else:
            refused.append(change.memory.peak)
            low = middle + 1
    return found
