"""Metastasis data: folders and labels."""

from pathlib import Path

import numpy as np
import pytest

from datamodules.cases import Case
from datamodules.metastases import Metastases
from errors import InputError
from tests.conftest import write_metastases
from tests.datamodules.conftest import lesions_at


def test_reads_both_ways_to_name_files(tmp_path: Path):
    write_metastases(tmp_path / "a", lesions_at())
    write_metastases(tmp_path / "b", lesions_at(), prefix="b_")
    cases = Metastases(tmp_path).cases()
    assert [case.name for case in cases] == ["a", "b"]
    assert cases[1].images["t1ce"].name == "b_t1ce.nii.gz"
    assert all(case.mask for case in cases)


def test_without_mask_is_a_case_to_predict(tmp_path: Path):
    write_metastases(tmp_path / "a", lesions_at())
    (tmp_path / "a" / "seg.nii.gz").unlink()
    assert Metastases(tmp_path).cases()[0].mask is None


def test_numbered_lesions_are_lesions_and_other_labels_are_refused():
    case = Case("a", {}, Path("a/seg.nii.gz"))
    data_set = Metastases("anywhere")
    labels = np.array([[[0, 1, 7]]], np.float32)
    assert data_set.canonical_labels(labels, case).tolist() == [[[0, 1, 1]]]
    for wrong in (-1, 0.5):
        with pytest.raises(InputError, match=r"a/seg.nii.gz: expected whole numbers"):
            data_set.canonical_labels(np.array([[[wrong]]], np.float32), case)


def test_user_errors_name_what_is_missing(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        Metastases(tmp_path / "nowhere").cases()
    with pytest.raises(InputError, match="no case found"):
        Metastases(tmp_path).cases()
    with pytest.raises(InputError, match="modalities: expected a choice of t1ce"):
        Metastases(tmp_path, ["t1c"])
    with pytest.raises(InputError, match="regions: expected a choice of lesion"):
        Metastases(tmp_path, regions=["WT"])
    write_metastases(tmp_path / "a", lesions_at())
    with pytest.raises(InputError, match=r"expected t1.nii.gz, found seg, t1ce"):
        Metastases(tmp_path, ["t1ce", "t1"]).cases()
    write_metastases(tmp_path / "b", lesions_at())
    (tmp_path / "b" / "b-t1ce.nii").write_bytes(b"")
    with pytest.raises(InputError, match="its t1ce is there twice"):
        Metastases(tmp_path).cases()


def test_another_folder_is_read_in_the_same_way(tmp_path: Path):
    there = Metastases(tmp_path, ["flair", "t1ce"]).in_folder(tmp_path / "there")
    assert there.root == tmp_path / "there"
    assert (there.modalities, there.regions) == (("flair", "t1ce"), ("lesion",))


def test_a_case_that_is_only_half_written_is_none(tmp_path: Path):
    write_metastases(tmp_path / "case", np.zeros((8, 8, 8), np.uint8))
    whole = Metastases(tmp_path).cases()
    write_metastases(tmp_path / ".partial-1-other", np.zeros((8, 8, 8), np.uint8))
    assert Metastases(tmp_path).cases() == whole


def test_label_maps_have_the_values_of_the_regions(tmp_path):
    assert Metastases(tmp_path).file_values == {0: 0, 1: 1}
