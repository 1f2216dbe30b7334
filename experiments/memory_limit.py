"""Which changes make a training step fit in so much memory, the smallest change first.

Checkpointing comes first, because it changes no number; then bfloat16, which rounds; then a smaller
batch, smaller patches and fewer filters, with which another training begins.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from errors import InputError
from experiments.calibration import predicted, sides_of, smallest_side
from experiments.cost import MIB, Memory
from experiments.jobs import Job
from experiments.rules import shown

Values = dict[str, Any]  # what to change, by key

CHECKPOINTING = ("none", "norms", "blocks", "levels")  # each keeps less than the one before
CHECKPOINTING_KEY, PRECISION_KEY = "model.checkpointing", "trainer.precision"
GIGA = 1e9


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
    def size(self) -> tuple[Any, ...]:
        """What changes are ordered by: the heaviest of their parts first."""
        checkpointing = self.values.get(CHECKPOINTING_KEY, CHECKPOINTING[0])
        return (*self.less, PRECISION_KEY in self.values, CHECKPOINTING.index(checkpointing))

    @property
    def overrides(self) -> str:
        """The change as it is typed."""
        words = [f"{key}={shown(value).replace(' ', '')}" for key, value in self.values.items()]
        return " ".join(f"'{word}'" if "[" in word else word for word in words)


def changes_that_fit(job: Job, limit_mib: float) -> list[Change]:
    """Search changes with which a training step fits in memory, the smallest first.

    With and without bfloat16, this is the checkpointing that computes least again. What no
    checkpointing makes fit gets the largest batch, the largest patches and the most filters that
    do, each by itself, without checkpointing and with all of it.

    Args:
        job: The job; if it fits as it is, the first change has no values.
        limit_mib: Memory for weights, gradients, moments, activations and temporaries.

    Raises:
        InputError: None fits; the message says how much the smallest of them takes.
    """
    search = _Search(job, limit_mib)
    plain = job.plain
    kept = CHECKPOINTING.index(plain["model"].get("checkpointing", CHECKPOINTING[-1]))
    recomputed: list[Values] = [{CHECKPOINTING_KEY: more} for more in CHECKPOINTING[kept + 1 :]]
    half: list[Values] = [{PRECISION_KEY: "bf16-mixed"}]
    for precision in ({}, *(half if plain["trainer"]["precision"] == "32-true" else [])):
        options = [{**precision, **values} for values in ({}, *recomputed)]
        if not search.first(options):
            for values in (options[0], *options[1:][-1:]):
                for sizes in (_batches, _patches, _filters):
                    search.largest([{**values, **size} for size in sizes(job)])
    if not search.found:
        raise InputError(
            f"vram_gb: expected at least {search.least_mib * MIB / GIGA:.2f}, which the smallest "
            f"step takes that fewer patches, smaller ones or fewer filters lead to, found "
            f"{limit_mib * MIB / GIGA:g}"
        )
    return sorted(search.found, key=lambda change: change.size)


class _Search:
    """Collects changes that fit.

    Attributes:
        found: Those that fit.
        least_mib: The least memory that any has taken.
    """

    def __init__(self, job: Job, limit_mib: float) -> None:
        self.job = job
        self.limit_mib = limit_mib
        self.found: list[Change] = []
        self.least_mib = math.inf

    def first(self, options: Sequence[Values]) -> bool:
        """Take the first that fits, if there is one."""
        for values in options:
            change = self._change(values)
            if change.memory.peak <= self.limit_mib:
                self.found.append(change)
                return True
        return False

    def largest(self, ladder: Sequence[Values]) -> None:
        """Take the first that fits of a ladder whose memory falls, by halving it."""
        low, high = 0, len(ladder)
        fits: list[Change] = []
        while low < high:
            middle = (low + high) // 2
            change = self._change(ladder[middle])
            if change.memory.peak <= self.limit_mib:
                fits, high = [change], middle
            else:
                low = middle + 1
        self.found += fits

    def _change(self, values: Values) -> Change:
        changed = self.job.changed(values)
        before, after = self.job.plain, changed.plain
        less = (
            1 - after["filters"]["base"] / before["filters"]["base"],
            1 - math.prod(sides_of(changed)) / math.prod(sides_of(self.job)),
            1 - after["data"]["batch_size"] / before["data"]["batch_size"],
        )
        change = Change(values, predicted(changed).memory, less)
        self.least_mib = min(self.least_mib, change.memory.peak)
        return change


def _batches(job: Job) -> Iterator[Values]:
    """Yield smaller batches that the configuration allows, from the largest."""
    size = job.plain["data"]["batch_size"] // 2
    while size:
        with suppress(InputError):
            job.changed({"patches.batch_size": size})
            yield {"patches.batch_size": size}
        size //= 2


def _patches(job: Job) -> Iterator[Values]:
    """Yield smaller patches, from the largest: each time, the longest side loses a step.

    A cube stays a cube.
    """
    smallest, step = smallest_side(job)
    sides = list(sides_of(job))
    cube = len(set(sides)) == 1
    while max(sides) >= smallest + 2 * step:
        sides[sides.index(max(sides))] -= step
        if len(set(sides)) == 1:
            yield {"patches.size": sides[0]}
        elif not cube:
            yield {"patches.size": list(sides)}


def _filters(job: Job) -> Iterator[Values]:
    """Yield fewer filters, from the most; widths are multiples of 8."""
    for filters in range((job.plain["filters"]["base"] - 1) // 8 * 8, 0, -8):
        yield {"filters.base": filters}
