"""Phantoms with metastases."""

from pathlib import Path

import numpy as np
import pytest

from datamodules.cache import Cache
from datamodules.phantom import (
    LARGEST_METASTASIS_MM,
    MOST_METASTASES,
    MetastasisPhantoms,
    make_phantom,
    write_phantoms,
)
from errors import InputError
from grids import components


@pytest.fixture(scope="module")
def phantoms() -> list:
    return [make_phantom(0, index, 3.0, "metastases", ["t1ce"]) for index in range(10)]


def test_phantoms_have_none_to_a_dozen_lesions(phantoms: list):
    counts = [components(case.labels > 0)[1] for case in phantoms]
    assert max(counts) <= MOST_METASTASES
    assert len(set(counts)) > 2
    for case in phantoms:
        assert set(np.unique(case.labels)) <= {0, 1}
        assert list(case.images) == ["t1ce"]
        assert case.grade == ""
        largest = 4 / 3 * np.pi * (LARGEST_METASTASIS_MM + 2) ** 3 / 3**3
        numbered, count = components(case.labels > 0)
        # Two that touch are one component.
        assert all((numbered == n).sum() < 2 * largest for n in range(1, count + 1))


def test_metastases_enhance(phantoms: list):
    for case in phantoms:
        if case.labels.sum() > 10:
            image = case.images["t1ce"].astype(float)
            brain = np.median(image[(image > 0) & (case.labels == 0)])
            assert np.percentile(image[case.labels > 0], 75) > 1.05 * brain


def test_modalities_do_not_change_each_other():
    one = make_phantom(0, 1, 6.0, "metastases", ["t1ce"])
    two = make_phantom(0, 1, 6.0, "metastases", ["flair", "t1ce"])
    np.testing.assert_array_equal(one.images["t1ce"], two.images["t1ce"])
    np.testing.assert_array_equal(one.labels, two.labels)


def test_phantoms_are_written_and_read_as_a_data_set(tmp_path: Path):
    data_set = MetastasisPhantoms(tmp_path / "mets", count=2, spacing_mm=6)
    data_set.prepare()
    cases = data_set.cases()
    assert [case.name for case in cases] == ["phantom_0000", "phantom_0001"]
    volume = Cache(tmp_path / "cache", 6, "brain", workers=1).build(cases, data_set)[0]
    assert volume.image.shape[0] == 1
    with pytest.raises(InputError, match="glioma"):
        write_phantoms(tmp_path / "mets", 2, spacing_mm=6, seed=0)
