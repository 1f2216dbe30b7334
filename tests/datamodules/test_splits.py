"""Splits: partitions, strata, folds, and the file that keeps them."""

import json

import numpy as np
import pytest

from datamodules.cases import Case
from datamodules.splits import (
    PARTS,
    SPLIT_NAME,
    FileSplit,
    FoldSplit,
    FractionSplit,
    Split,
    read_names,
)
from errors import InputError


def make_cases(**counts):
    """`make_cases(HGG=3)`: three cases of that grade; `none` stands for no grade."""
    return [
        Case(f"{grade}{n:03d}", {}, None, "" if grade == "none" else grade)
        for grade, count in counts.items()
        for n in range(count)
    ]


def names(split):
    return {part: [case.name for case in getattr(split, part)] for part in PARTS}


def grade_counts(cases):
    return [sum(case.grade == grade for case in cases) for grade in ("HGG", "LGG")]


def assert_partition(split, cases):
    assigned = [case.name for part in PARTS for case in getattr(split, part)]
    assert sorted(assigned) == sorted(case.name for case in cases)
    for part in PARTS:
        assert names(split)[part] == sorted(names(split)[part])


@pytest.mark.parametrize("seed", range(30))
def test_fractions_partition_and_stratify_whatever_the_order(seed):
    rng = np.random.default_rng(seed)
    cases = make_cases(HGG=int(rng.integers(20, 60)), LGG=int(rng.integers(10, 20)))
    split = FractionSplit(0.2, 0.3, seed)(cases)

    assert_partition(split, cases)
    assert len(split.validation) == round(0.2 * len(cases))
    assert len(split.test) == round(0.3 * len(cases))
    for part, share in (("validation", 0.2), ("test", 0.3), ("train", 0.5)):
        expected = [share * count for count in grade_counts(cases)]
        np.testing.assert_allclose(grade_counts(getattr(split, part)), expected, atol=1.51)

    shuffled = [cases[i] for i in rng.permutation(len(cases))]
    assert names(FractionSplit(0.2, 0.3, seed)(shuffled)) == names(split)


def test_the_seed_decides():
    cases = make_cases(none=40)
    splits = [str(names(FractionSplit(0.2, 0.2, seed)(cases))) for seed in range(10)]
    assert len(set(splits)) == 10
    folds = [str(names(FoldSplit(5, 0, seed)(cases))) for seed in range(10)]
    assert len(set(folds)) == 10


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "counts",
    [{"HGG": 1, "LGG": 3}, {"HGG": 7, "LGG": 1}, {"HGG": 1, "LGG": 1, "none": 1}, {"none": 3}],
)
def test_grades_too_rare_to_share_out_still_split(counts, seed):
    cases = make_cases(**counts)
    split = FractionSplit(0.2, 0.2, seed)(cases)
    assert_partition(split, cases)
    assert all(getattr(split, part) for part in PARTS)
    for fold in range(3):
        assert_partition(FoldSplit(3, fold, seed)(cases), cases)


def test_a_share_of_nothing_is_nothing_and_a_small_one_is_one_case():
    split = FractionSplit(0.01, 0, 0)(make_cases(none=10))
    assert [len(getattr(split, part)) for part in PARTS] == [9, 1, 0]


@pytest.mark.parametrize("seed", range(30))
def test_every_case_is_tested_once_and_validated_once_over_the_folds(seed):
    rng = np.random.default_rng(seed)
    folds = int(rng.integers(3, 7))
    cases = make_cases(HGG=int(rng.integers(folds, 40)), LGG=int(rng.integers(1, 20)))
    splits = [FoldSplit(folds, fold, seed)(cases) for fold in range(folds)]

    for split in splits:
        assert_partition(split, cases)
        assert abs(len(split.test) - len(cases) / folds) < 2
    for part in ("validation", "test"):
        held_out = [case.name for split in splits for case in getattr(split, part)]
        assert sorted(held_out) == sorted(case.name for case in cases)
    high_grade = [grade_counts(split.test)[0] for split in splits]
    if grade_counts(cases)[1] >= folds:
        assert max(high_grade) - min(high_grade) <= 1

    shuffled = [cases[i] for i in rng.permutation(len(cases))]
    assert names(FoldSplit(folds, 1, seed)(shuffled)) == names(splits[1])


@pytest.mark.parametrize(
    ("split", "count", "message"),
    [
        (lambda: FractionSplit(0.5, 0.5, 0), 9, r".*found validation=0\.5, test=0\.5"),
        (lambda: FractionSplit(-0.1, 0.5, 0), 9, r".*found validation=-0\.1, test=0\.5"),
        (
            lambda: FractionSplit(0.2, 0.2, 0),
            2,
            "2 cases are too few for 1 of validation, 1 of test and one of training",
        ),
        (lambda: FractionSplit(0, 0, 0), 0, "0 cases are too few .*"),
        (lambda: FoldSplit(2, 0, 0), 9, r".*expected folds >= 3 .*found folds=2, fold=0"),
        (lambda: FoldSplit(5, 5, 0), 9, r".*found folds=5, fold=5"),
        (lambda: FoldSplit(5, 0, 0), 4, "4 cases are too few for 5 folds"),
    ],
)
def test_what_cannot_be_split_is_said(split, count, message):
    with pytest.raises(InputError, match=f"^split: {message}$"):
        split()(make_cases(none=count))


def test_a_written_split_is_read_back(tmp_path):
    cases = make_cases(HGG=6, LGG=5)
    split = FractionSplit(0.2, 0.2, 3)(cases)
    split.write(tmp_path / SPLIT_NAME)
    assert FileSplit(tmp_path / SPLIT_NAME)(cases[::-1]) == split
    assert read_names(tmp_path / SPLIT_NAME) == names(split)


def test_a_file_may_leave_cases_out(tmp_path):
    cases = make_cases(none=3)
    Split(cases[:1], cases[1:2], []).write(tmp_path / SPLIT_NAME)
    assert names(FileSplit(tmp_path / SPLIT_NAME)(cases)) == {
        "train": ["none000"],
        "validation": ["none001"],
        "test": [],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["none000", "x"], "validation": [], "test": []}', "there is no case 'x' among"),
        (
            '{"train": ["none000"], "validation": ["none000"], "test": []}',
            "case 'none000' is named 2 times",
        ),
        ('{"train": ["none000"]}', "expected .*train, validation, test, found other content"),
        ('["none000"]', "expected .*, found other content"),
        ('{"train": "none000", "validation": [], "test": []}', "expected .*, found other content"),
        ('{"train": [0], "validation": [], "test": []}', "expected .*, found other content"),
        ("train", "expected .*, found: Expecting value"),
        (None, "expected .*, found: .*No such file"),
    ],
)
def test_a_split_file_that_does_not_fit_is_named(tmp_path, content, message):
    path = tmp_path / SPLIT_NAME
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"^{path}: {message}") as error:
        FileSplit(path)(make_cases(none=3))
    assert "\n" not in str(error.value)


def test_the_file_is_plain_json(tmp_path):
    FractionSplit(0.25, 0.25, 0)(make_cases(none=4)).write(tmp_path / SPLIT_NAME)
    content = json.loads((tmp_path / SPLIT_NAME).read_text())
    assert list(content) == list(PARTS)
    everyone = sorted(name for part in content.values() for name in part)
    assert everyone == [f"none00{n}" for n in range(4)]
