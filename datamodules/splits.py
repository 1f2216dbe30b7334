"""Which cases are for training, validation and testing."""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

from datamodules.cases import Case
from errors import InputError
from files import read_json, write_json

SPLIT_NAME = "split.json"  # in the folder of a run
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """The cases of each part, sorted by name."""

    train: list[Case]
    validation: list[Case]
    test: list[Case]

    def write(self, path: str | Path) -> None:
        """Write the names of the cases as JSON, for `read_names` and `FileSplit`."""
        names = {part: [case.name for case in getattr(self, part)] for part in PARTS}
        write_json(Path(path), names)


def read_names(path: str | Path) -> dict[str, list[str]]:
    """Read the names of the cases of each part from a file that `Split.write` has written.

    Returns:
        Names by part: "train", "validation" and "test".

    Raises:
        InputError: The file is missing or has other content.
    """
    expected = f'{{"train": [case names], ...}} with the keys {", ".join(PARTS)}'
    names = read_json(Path(path), f"a split is {expected}")
    if not (
        set(names) == set(PARTS)
        and all(isinstance(part, list) for part in names.values())
        and all(isinstance(name, str) for name in chain.from_iterable(names.values()))
    ):
        raise InputError(f"{path}: expected {expected}, found other content")
    return names


def with_masks(cases: Sequence[Case]) -> list[Case]:
    """Select the cases that have a mask, which training and scores need.

    Raises:
        InputError: None has one.
    """
    selected = [case for case in cases if case.mask is not None]
    if cases and not selected:
        first = next(iter(cases[0].images.values()))
        raise InputError(
            f"{first.parent}: expected masks to train and test with, found none of {len(cases)} "
            "cases; predict.py needs no masks"
        )
    return selected


def check_distinct(split: Split, identities: Mapping[str, Sequence[str]]) -> None:
    """Refuse a split in which one patient is in two parts under two names.

    Args:
        split: The split.
        identities: Name of each of its cases -> identities of its patient, of which one in common
            is enough, see `nifti.identify`.

    Raises:
        InputError: Two cases of different parts show the same patient.
    """
    seen: dict[str, tuple[str, Case]] = {}
    for part in PARTS:
        for case in getattr(split, part):
            for identity in identities[case.name]:
                other_part, other = seen.setdefault(identity, (part, case))
                if other_part != part:
                    path = next(iter(case.images.values()))
                    raise InputError(
                        f"{path}: expected each patient in one part of the split, found "
                        f"{case.name} ({part}) to be the same as {other.name} ({other_part}); "
                        "remove one of them"
                    )


@dataclass(frozen=True)
class FractionSplit:
    """Puts each case into a part by its name alone, so that no case depends on the others.

    The seed and the name of a case are hashed to a number from 0 to 1. Testing takes the numbers
    below `test`, validation those from 1 - `validation` on, and training those between. So a case
    stays in its part when other cases come or go, a larger share takes cases from training only,
    and data sets with the same names (phantoms at several spacings) are split alike.

    In exchange, the sizes of the parts and the share of each grade in them are right on average but
    not exact: of 100 cases, a share of .15 is 15 give or take 4. A part whose share would be left
    without a case gets the case nearest to it; only that case may change when others come or go.

    Args:
        validation: Share of the cases for validation.
        test: Share of the cases for testing.
        seed: Seed of the hash.

    Raises:
        InputError: A share lies outside [0, 1), or both leave nothing for training; when called,
            there are fewer cases than parts.
    """

    validation: float
    test: float
    seed: int

    def __post_init__(self) -> None:
        if not (
            0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1
        ):
            raise InputError(
                f"split: expected shares in [0, 1) with a sum below 1, found "
                f"validation={self.validation}, test={self.test}"
            )

    def __call__(self, cases: Sequence[Case]) -> Split:
        """Split the cases; their order does not matter."""
        wanted = [
            part
            for part in PARTS
            if part == "train" or getattr(self, part)  # a share above 0
        ]
        if len(cases) < len(wanted):
            raise InputError(
                f"split: {len(cases)} cases with a mask are too few for one of each of "
                f"{', '.join(wanted)}"
            )
        ends = (self.test, 1 - self.validation, 1)
        test, train, validation = _by_interval(cases, self.seed, ends)
        return Split(train=train, validation=validation, test=test)


@dataclass(frozen=True)
class FoldSplit:
    """Takes one fold of a cross-validation; the fold of a case depends on its name alone.

    Fold `fold` is the test part and the fold after it the validation part. Over all folds every
    case is tested once, validated once, and never both in one run.

    The seed and the name of a case are hashed to a number from 0 to 1, which the folds share out
    equally. So a case stays in its fold when other cases come or go. In exchange, folds differ in
    size, by chance: of 100 cases, five folds have 20 each, give or take 4; and so do their shares
    of each grade. A fold that would be left without a case gets the case nearest to it.

    Args:
        folds: Number of folds, at least 3.
        fold: Fold to test on, from 0.
        seed: Seed of the hash; the same for all folds of one cross-validation.

    Raises:
        InputError: There are fewer than three folds, or no such fold; when called, there are fewer
            cases than folds.
    """

    folds: int
    fold: int
    seed: int

    def __post_init__(self) -> None:
        if self.folds < 3 or not 0 <= self.fold < self.folds:
            raise InputError(
                f"split: expected folds >= 3 and fold from 0 to folds - 1, found "
                f"folds={self.folds}, fold={self.fold}"
            )

    def __call__(self, cases: Sequence[Case]) -> Split:
        """Split the cases; their order does not matter."""
        if len(cases) < self.folds:
            raise InputError(
                f"split: {len(cases)} cases with a mask are too few for {self.folds} folds"
            )
        ends = [(fold + 1) / self.folds for fold in range(self.folds)]
        folds = _by_interval(cases, self.seed, ends)
        test, validation, *train = folds[self.fold :] + folds[: self.fold]
        return Split(_by_name(list(chain.from_iterable(train))), validation, test)


@dataclass(frozen=True)
class FileSplit:
    """Takes the split from a JSON file, {"train": [case names], "validation": [], "test": []}.

    Cases that the file does not name are in no part, so a study of fewer cases is a file with
    fewer names.

    Args:
        path: File of another run, or one's own.

    Raises:
        InputError: When called: the file is missing or has other content, or it names a case that
            does not exist, or one twice.
    """

    path: str | Path

    def __call__(self, cases: Sequence[Case]) -> Split:
        """Split the cases; their order does not matter."""
        names = read_names(self.path)
        by_name = {case.name: case for case in cases}
        for name, times in Counter(name for part in PARTS for name in names[part]).items():
            if name not in by_name:
                raise InputError(f"{self.path}: there is no case {name!r} among {len(cases)} cases")
            if times > 1:
                raise InputError(f"{self.path}: case {name!r} is named {times} times")
        return Split(*(_by_name([by_name[name] for name in names[part]]) for part in PARTS))


def _by_name(cases: Sequence[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: case.name)


def _hashed(name: str, seed: int) -> float:
    """Hash the name of a case to a number in [0, 1), the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def _by_interval(cases: Sequence[Case], seed: int, ends: Sequence[float]) -> list[list[Case]]:
    """Group cases by the interval of [0, 1) that the hash of their name falls into.

    Args:
        cases: At least as many as there are intervals longer than 0.
        seed: Seed of the hash.
        ends: End of each interval, in order; each begins where the one before ends.

    Returns:
        The cases of each interval, sorted by name. An interval longer than 0 that no hash falls
        into takes the nearest case of a group that has others.
    """
    place = {case.name: _hashed(case.name, seed) for case in cases}
    groups: list[list[Case]] = [[] for _ in ends]
    for case in _by_name(cases):
        groups[bisect_right(ends, place[case.name])].append(case)
    for group, (start, end) in zip(groups, pairwise((0, *ends)), strict=True):
        if not group and end > start:
            middle = (start + end) / 2
            donors = [(donor, case) for donor in groups if len(donor) > 1 for case in donor]
            donor, nearest = min(donors, key=lambda found: abs(place[found[1].name] - middle))
            donor.remove(nearest)
            group.append(nearest)
    return groups
