"""Splits: partitions, what moves a case and what does not, folds, the file that keeps them."""

import json
from dataclasses import replace
from pathlib import Path

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
    check_distinct,
    read_names,
    with_masks,
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


def part_of(split):
    """Name of each case -> its part."""
    return {case: part for part, cases in names(split).items() for case in cases}


@pytest.mark.parametrize("seed", range(30))
def test_fractions_are_a_partition_whatever_the_order(seed):
    rng = np.random.default_rng(seed)
    cases = make_cases(HGG=int(rng.integers(20, 60)), LGG=int(rng.integers(10, 20)))
    split = FractionSplit(0.2, 0.3, seed)(cases)
    assert_partition(split, cases)
    shuffled = [cases[i] for i in rng.permutation(len(cases))]
    assert names(FractionSplit(0.2, 0.3, seed)(shuffled)) == names(split)


def test_sizes_and_grades_are_right_on_average():
    cases = make_cases(HGG=150, LGG=50)
    splits = [FractionSplit(0.1, 0.3, seed)(cases) for seed in range(200)]
    for part, share in (("validation", 0.1), ("test", 0.3), ("train", 0.6)):
        counts = np.array([grade_counts(getattr(split, part)) for split in splits])
        np.testing.assert_allclose(counts.mean(0), [150 * share, 50 * share], rtol=0.04)
        spread = np.sqrt(200 * share * (1 - share))  # that of a binomial distribution
        np.testing.assert_allclose(counts.sum(1).std(), spread, rtol=0.15)


@pytest.mark.parametrize("seed", range(10))
def test_more_cases_move_none_to_another_part(seed):
    many = make_cases(HGG=60, LGG=40)
    some = many[::3]
    for split in (FractionSplit(0.1, 0.15, seed), FoldSplit(5, seed % 5, seed)):
        before, after = part_of(split(some)), part_of(split(many))
        assert before.items() <= after.items()


@pytest.mark.parametrize("seed", range(10))
def test_larger_shares_take_cases_from_training_only(seed):
    cases = make_cases(none=100)
    before = part_of(FractionSplit(0.1, 0.15, seed)(cases))
    for split in (FractionSplit(0.1, 0.2, seed), FractionSplit(0.15, 0.15, seed)):
        after = part_of(split(cases))
        moved = {(before[name], after[name]) for name in before if before[name] != after[name]}
        assert len(moved) == 1
        assert moved < {("train", "test"), ("train", "validation")}
    # And from there back, none reaches another part on its way.
    assert part_of(FractionSplit(0.1, 0.15, seed)(cases)) == before


def test_the_split_of_a_name_is_the_same_on_every_machine():
    """A change of the hash would give every run that goes on other test cases."""
    cases = [Case(f"phantom_{index:04d}", {}, None) for index in range(12)]
    assert names(FractionSplit(0.2, 0.3, 0)(cases)) == {
        "train": [
            "phantom_0000",
            "phantom_0002",
            "phantom_0003",
            "phantom_0006",
            "phantom_0007",
            "phantom_0008",
            "phantom_0009",
            "phantom_0010",
            "phantom_0011",
        ],
        "validation": ["phantom_0001", "phantom_0004"],
        "test": ["phantom_0005"],
    }


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
def test_every_part_has_a_case_however_few_there_are(counts, seed):
    cases = make_cases(**counts)
    split = FractionSplit(0.2, 0.2, seed)(cases)
    assert_partition(split, cases)
    assert all(getattr(split, part) for part in PARTS)
    for fold in range(3):
        assert_partition(FoldSplit(3, fold, seed)(cases), cases)


def test_a_share_of_nothing_is_nothing_and_a_small_one_is_the_nearest_case():
    cases = make_cases(none=10)
    split = FractionSplit(1e-9, 0, 0)(cases)
    assert [len(getattr(split, part)) for part in PARTS] == [9, 1, 0]
    # A share that is just large enough for one case has the same one.
    shares = (share for share in np.linspace(0.01, 0.9, 90) if part_sizes(share, cases)[1] == 1)
    assert FractionSplit(next(shares), 0, 0)(cases) == split
    everything = FractionSplit(0, 0, 0)(cases)
    assert everything == Split(cases, [], [])


def part_sizes(validation, cases):
    split = FractionSplit(validation, 0, 0)(cases)
    return [len(getattr(split, part)) for part in PARTS]


@pytest.mark.parametrize("seed", range(30))
def test_every_case_is_tested_once_and_validated_once_over_the_folds(seed):
    rng = np.random.default_rng(seed)
    folds = int(rng.integers(3, 7))
    cases = make_cases(HGG=int(rng.integers(folds, 40)), LGG=int(rng.integers(1, 20)))
    splits = [FoldSplit(folds, fold, seed)(cases) for fold in range(folds)]

    for split in splits:
        assert_partition(split, cases)
        assert split.test
        assert split.validation
    for part in ("validation", "test"):
        held_out = [case.name for split in splits for case in getattr(split, part)]
        assert sorted(held_out) == sorted(case.name for case in cases)

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
            "2 cases with a mask are too few for one of each of train, validation, test",
        ),
        (lambda: FractionSplit(0, 0, 0), 0, "0 cases with a mask are too few .*"),
        (lambda: FoldSplit(2, 0, 0), 9, r".*expected folds >= 3 .*found folds=2, fold=0"),
        (lambda: FoldSplit(5, 5, 0), 9, r".*found folds=5, fold=5"),
        (lambda: FoldSplit(5, 0, 0), 4, "4 cases with a mask are too few for 5 folds"),
    ],
)
def test_what_cannot_be_split_is_said(split, count, message):
    with pytest.raises(InputError, match=f"^split: {message}$"):
        split()(make_cases(none=count))


def test_masks_that_are_missing_are_said_to_be_missing():
    cases = [Case(f"c{n}", {"t1": Path(f"folder/c{n}_t1.nii")}, None) for n in range(3)]
    with pytest.raises(InputError, match=r"^folder: expected masks .*, found none of 3 cases"):
        with_masks(cases)
    masked = replace(cases[1], mask=Path("m.nii"))
    assert with_masks([cases[0], masked]) == [masked]


def test_one_patient_is_in_one_part():
    a, b, c = (Case(name, {"t1": Path(f"{name}.nii")}, None) for name in "abc")
    split = Split([a, b], [c], [])
    check_distinct(split, {a.name: ["1"], b.name: ["1"], c.name: ["2"]})  # twice in one part
    with pytest.raises(InputError, match=r"^c.nii: .*found c \(validation\) .* b \(train\)"):
        check_distinct(split, {a.name: ["1"], b.name: ["2", "7"], c.name: ["7"]})


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
        ('["none000"]', "expected a JSON object, found .*; a split is "),
        ('{"train": "none000", "validation": [], "test": []}', "expected .*, found other content"),
        ('{"train": [0], "validation": [], "test": []}', "expected .*, found other content"),
        ("train", "expected JSON, found none .*; a split is "),
        (None, "no such file; a split is .*train, validation, test"),
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
