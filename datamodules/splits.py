"""Which cases are for training, validation and testing."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from datamodules.cases import Case
from errors import InputError
from files import write_json

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
    expected = f'expected {{"train": [case names], ...}} with the keys {", ".join(PARTS)}'
    try:
        names = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {expected}, found: {error}") from error
    if not (
        isinstance(names, dict)
        and set(names) == set(PARTS)
        and all(isinstance(part, list) for part in names.values())
        and all(isinstance(name, str) for name in chain.from_iterable(names.values()))
    ):
        raise InputError(f"{path}: {expected}, found other content")
    return names


@dataclass(frozen=True)
class FractionSplit:
    """Draws cases at random, in equal shares of each grade.

    Args:
        validation: Share of the cases for validation, rounded; at least one case unless 0.
        test: Share of the cases for testing, rounded; at least one case unless 0.
        seed: Seed of the draw.

    Raises:
        InputError: A share lies outside [0, 1), or both leave nothing for training; when called,
            there are too few cases.
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
        rest = _by_name(cases)
        sizes = {
            part: max(1, round(share * len(cases))) if share else 0
            for part, share in (("test", self.test), ("validation", self.validation))
        }
        if sum(sizes.values()) >= len(cases):
            raise InputError(
                f"split: {len(cases)} cases are too few for {sizes['validation']} of validation, "
                f"{sizes['test']} of test and one of training"
            )
        parts: dict[str, list[Case]] = {}
        for part, size in sizes.items():
            rest, parts[part] = self._draw(rest, size)
        return Split(train=rest, **parts)

    def _draw(self, cases: list[Case], size: int) -> tuple[list[Case], list[Case]]:
        """Draw `size` cases; returns the others and those that were drawn."""
        if size == 0:
            return cases, []
        from sklearn.model_selection import train_test_split

        # A grade needs so many cases that its share of the smaller part is at least one case.
        strata = _strata(cases, least=-(-len(cases) // min(size, len(cases) - size)))
        rest, drawn = train_test_split(
            range(len(cases)), test_size=size, stratify=strata, random_state=self.seed
        )
        return [cases[i] for i in sorted(rest)], [cases[i] for i in sorted(drawn)]


@dataclass(frozen=True)
class FoldSplit:
    """Takes one fold of a cross-validation, in equal shares of each grade.

    Fold `fold` is the test part and the fold after it the validation part. Over all folds every
    case is tested once, validated once, and never both in one run.

    Args:
        folds: Number of folds, at least 3.
        fold: Fold to test on, from 0.
        seed: Seed of the draw; the same for all folds of one cross-validation.

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
        from sklearn.model_selection import StratifiedKFold

        cases = _by_name(cases)
        if len(cases) < self.folds:
            raise InputError(f"split: {len(cases)} cases are too few for {self.folds} folds")
        splitter = StratifiedKFold(self.folds, shuffle=True, random_state=self.seed)
        strata = _strata(cases, least=self.folds)
        folds = [[cases[i] for i in held_out] for _, held_out in splitter.split(cases, strata)]
        test, validation, *train = folds[self.fold :] + folds[: self.fold]
        return Split(
            _by_name(list(chain.from_iterable(train))), _by_name(validation), _by_name(test)
        )


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


def _strata(cases: list[Case], least: int) -> list[str]:
    """Return the grade of each case; a grade with fewer than `least` cases joins the commonest."""
    counts = Counter(case.grade for case in cases)
    common = min(counts, key=lambda grade: (-counts[grade], grade))
    return [case.grade if counts[case.grade] >= least else common for case in cases]
