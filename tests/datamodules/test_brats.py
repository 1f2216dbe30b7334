"""Folders of every BraTS year: files, grades, labels, regions."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from datamodules.brats import BraTS
from errors import InputError
from tests.conftest import MODALITIES, write_brats, write_image

OLD = dict(zip((*MODALITIES, "mask"), ("_t1", "_t1ce", "_t2", "_flair", "_seg"), strict=True))
NEW = dict(zip((*MODALITIES, "mask"), ("-t1n", "-t1c", "-t2w", "-t2f", "-seg"), strict=True))


def write_labels(path, values, dtype=np.uint8):
    voxels = np.zeros((2, 3, 4), dtype)
    voxels.flat[: len(values)] = values
    return write_image(path, voxels)


def make_files(folder, name, endings=OLD, suffix=".nii.gz", without=(), labels=(1, 2, 4)):
    """Make the files of a case; the images are empty, for listing reads none."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, ending in endings.items():
        path = folder / f"{name}{ending}{suffix}"
        if kind == "mask" and kind not in without:
            write_labels(path, labels)
        elif kind not in without:
            path.touch()


def fails(message):
    """The message names it all, in one line."""
    return pytest.raises(InputError, match=f"^{message}$")


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("endings", "places", "grades"),
    [
        (OLD, ["HGG/Brats17_TCIA_1", "LGG/Brats17_2013_0_1"], ["LGG", "HGG"]),
        (OLD, ["train/HGG/Brats18_CBICA_AAB_1", "train/LGG/Brats18_TCIA09_2"], ["HGG", "LGG"]),
        (OLD, ["MICCAI/HGG/BraTS19_CBICA_A_1", "MICCAI/LGG/BraTS19_TCIA10_1"], ["HGG", "LGG"]),
        (OLD, ["BraTS20_Training_001", "BraTS20_Training_002"], ["", ""]),
        (OLD, ["BraTS2021_00000", "BraTS2021_00002"], ["", ""]),
        (NEW, ["BraTS-GLI-00000-000", "BraTS-GLI-00002-000"], ["", ""]),
        (NEW, ["a/b/c/BraTS-GLI-00000-000", "a/BraTS-GLI-00000-001"], ["", ""]),
    ],
)
def test_every_year(tmp_path, endings, places, grades, suffix, with_masks):
    for place in places:
        folder = tmp_path / place
        make_files(folder, folder.name, endings, suffix, without=() if with_masks else ("mask",))

    cases = BraTS(tmp_path).cases()

    assert [case.name for case in cases] == sorted(place.split("/")[-1] for place in places)
    assert [case.grade for case in cases] == grades
    for case in cases:
        (folder,) = (tmp_path / place for place in places if place.endswith(case.name))
        assert tuple(case.images) == MODALITIES
        for modality, path in case.images.items():
            assert path == folder / f"{case.name}{endings[modality]}{suffix}"
        mask = folder / f"{case.name}{endings['mask']}{suffix}"
        assert case.mask == (mask if with_masks else None)


def test_modalities_come_in_the_order_asked_for_and_others_may_be_missing(tmp_path):
    make_files(tmp_path / "A", "A", without=("t2", "t1"))
    (case,) = BraTS(tmp_path, modalities=("flair", "t1ce")).cases()
    assert [path.name for path in case.images.values()] == ["A_flair.nii.gz", "A_t1ce.nii.gz"]


def test_one_flat_folder_holds_many_cases(tmp_path):
    make_files(tmp_path, "P1", without=("mask",))
    make_files(tmp_path, "P1_b")
    make_files(tmp_path, "P10", NEW)
    (tmp_path / "._P1_t1.nii.gz").touch()  # what macOS leaves on foreign disks
    cases = BraTS(tmp_path).cases()
    assert [(case.name, case.mask and case.mask.name) for case in cases] == [
        ("P1", None),
        ("P10", "P10-seg.nii.gz"),
        ("P1_b", "P1_b_seg.nii.gz"),
    ]
    assert cases[2].images["t1"].name == "P1_b_t1.nii.gz"


def test_linked_folders_are_followed(tmp_path):
    make_files(tmp_path / "store" / "A", "A")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "A").symlink_to(tmp_path / "store" / "A")
    assert [case.name for case in BraTS(tmp_path / "data").cases()] == ["A"]


@pytest.mark.parametrize("table", ["name_mapping.csv", "name_mapping_2020.csv"])
def test_grades_of_2020_come_from_the_table(tmp_path, table):
    for n in (1, 2, 3):
        make_files(tmp_path / f"BraTS20_Training_00{n}", f"BraTS20_Training_00{n}")
    (tmp_path / table).write_text(
        "Grade,BraTS_2017_subject_ID,BraTS_2019_subject_ID,BraTS_2020_subject_ID\n"
        "LGG,NA,BraTS19_A_1,BraTS20_Training_001\n"
        "HGG,Brats17_B_1,BraTS19_B_1,BraTS20_Training_002\n"
    )
    (tmp_path / "survival_info.csv").write_text(
        "Grade,BraTS_2020_subject_ID\nX,BraTS20_Training_003"
    )
    assert [case.grade for case in BraTS(tmp_path).cases()] == ["LGG", "HGG", ""]


def test_a_table_that_is_no_text_is_named(tmp_path):
    make_files(tmp_path / "A", "A")
    (tmp_path / "name_mapping.csv").write_bytes("Grade,Größe\n".encode("utf-16"))
    with fails(f"{tmp_path}/name_mapping.csv: expected a CSV file in UTF-8, found: .*"):
        BraTS(tmp_path).cases()


def test_what_is_wrong_with_some_cases_is_said_beside_the_others(tmp_path):
    for name, without in (("A", ()), ("B", ("t1",)), ("C", ()), ("D", ("flair",))):
        make_files(tmp_path / name, name, without=without)
    cases, errors = BraTS(tmp_path).survey()
    assert [case.name for case in cases] == ["A", "C"]
    assert len(errors) == 2
    assert "case B has no t1" in str(errors[0])
    assert "case D has no flair" in str(errors[1])


def test_a_table_without_grades_is_no_error(tmp_path):
    make_files(tmp_path / "BraTS20_Validation_001", "BraTS20_Validation_001", without=("mask",))
    (tmp_path / "name_mapping_validation_data.csv").write_text(
        "BraTS_2020_subject_ID\nBraTS20_Validation_001\n"
    )
    assert [case.grade for case in BraTS(tmp_path).cases()] == [""]


def test_the_misnamed_mask_of_2020_is_found(tmp_path):
    for n in (354, 355):
        name = f"BraTS20_Training_{n}"
        make_files(tmp_path / name, name, without=("mask",) if n == 355 else ())
    write_labels(tmp_path / "BraTS20_Training_355" / "W39_1998.09.19_Segm.nii", (1, 2, 4))
    masks = [case.mask and case.mask.name for case in BraTS(tmp_path).cases()]
    assert masks == ["BraTS20_Training_354_seg.nii.gz", "W39_1998.09.19_Segm.nii"]


@pytest.mark.parametrize(
    ("endings", "missing"),
    [(OLD, "A_t1ce.nii[.gz] or A-t1c.nii[.gz]"), (NEW, "A_t1ce.nii[.gz] or A-t1c.nii[.gz]")],
)
def test_a_missing_modality_is_named(tmp_path, endings, missing):
    make_files(tmp_path / "A", "A", endings, without=("t1ce",))
    with fails(f"{tmp_path}/A: case A has no t1ce; looked for {re.escape(missing)}"):
        BraTS(tmp_path).cases()


def test_a_mask_without_images_is_a_case_without_images(tmp_path):
    write_labels(tmp_path / "A_seg.nii", (1,))
    with fails(f"{tmp_path}: case A has no t1; .*"):
        BraTS(tmp_path).cases()


@pytest.mark.parametrize("other", ["A_t1.nii", "A-t1n.nii.gz"])
def test_a_modality_that_is_there_twice_is_named(tmp_path, other):
    make_files(tmp_path / "A", "A")
    (tmp_path / "A" / other).touch()
    first, second = sorted([other, "A_t1.nii.gz"])
    with fails(f"{tmp_path}/A: case A has its t1 twice: {first}, {second}"):
        BraTS(tmp_path).cases()


def test_a_case_in_two_folders_is_named(tmp_path):
    for folder in ("one", "two"):
        make_files(tmp_path / folder, "A")
    with fails(f"{tmp_path}/two: case A is also in {tmp_path}/one; names must be unique"):
        BraTS(tmp_path).cases()


def test_no_folder_and_no_case_say_what_was_expected(tmp_path):
    expected = r"expected CASE_t1\.nii\.gz, .* or CASE-t1n\.nii\.gz, .*"
    with fails(f"{tmp_path}/x: no such folder; {expected}"):
        BraTS(tmp_path / "x").cases()
    (tmp_path / "readme.txt").touch()
    with fails(f"{tmp_path}: no case found; {expected}"):
        BraTS(tmp_path).cases()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modalities": ["dwi"]}, "modalities: expected a choice of t1, .*; found dwi"),
        ({"modalities": []}, "modalities: .*; found none"),
        ({"modalities": ["t1", "t1"]}, "modalities: .*; found t1, t1"),
        ({"regions": ["WT", "NCR"]}, "regions: expected a choice of WT, TC, ET.*; found WT, NCR"),
    ],
)
def test_unknown_modalities_and_regions_are_named(tmp_path, arguments, message):
    with fails(message):
        BraTS(tmp_path, **arguments)


# Labels


@pytest.mark.parametrize(("on_disk", "labels"), [(4, (1, 2, 4)), (3, (1, 2, 3))])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_enhancing_tumour_is_4_whatever_it_is_on_disk(tmp_path, on_disk, labels, dtype):
    make_files(tmp_path / "A", "A", labels=(1, 2))  # a tumour without enhancement decides nothing
    make_files(tmp_path / "B", "B", labels=labels)
    data_set = BraTS(tmp_path)
    case, _ = data_set.cases()
    canonical = data_set.canonical_labels(np.array([[[0, on_disk, 2, 1]]], dtype), case)
    assert canonical.dtype == np.uint8
    np.testing.assert_array_equal(canonical, [[[0, 4, 2, 1]]])


def test_the_convention_is_that_of_the_first_mask_that_shows_it(tmp_path):
    make_files(tmp_path / "A", "A", without=("mask",))
    make_files(tmp_path / "B", "B", labels=(1, 2))
    make_files(tmp_path / "C", "C", labels=(3,))
    make_files(tmp_path / "D", "D", labels=(4,))
    data_set = BraTS(tmp_path)
    *_, d = data_set.cases()
    reason = f"ET is 3 as in {tmp_path}/C/C_seg.nii.gz"
    with fails(rf"{d.mask}: found label 4, expected only 0, 1, 2, 3 \({reason}\)"):
        data_set.canonical_labels(np.array([[[0, 4]]]), d)


@pytest.mark.parametrize("value", [3, 5, -1, 0.5, 255])
def test_values_without_a_meaning_are_named(tmp_path, value):
    make_files(tmp_path / "A", "A", labels=(1, 2))
    data_set = BraTS(tmp_path)
    (case,) = data_set.cases()
    reason = f"ET is taken to be 4, as no mask in {tmp_path} has a 3 or a 4"
    with fails(rf"{case.mask}: found label {value}, expected only 0, 1, 2, 4 \({reason}\)"):
        data_set.canonical_labels(np.array([[[0, 1, value]]]), case)


@pytest.mark.parametrize(("labels", "et"), [((1, 2, 3), 3), ((1, 2, 4), 4), ((1, 2), 4)])
def test_files_have_the_label_of_et_that_the_masks_have(tmp_path, labels, et):
    make_files(tmp_path / "A", "A", labels=labels)
    assert BraTS(tmp_path).file_values == {0: 0, 1: 1, 2: 2, 4: et}


def test_the_label_of_et_is_an_option_where_no_mask_has_any(tmp_path):
    make_files(tmp_path / "new" / "A", "A", without=("mask",))
    make_files(tmp_path / "old" / "B", "B", labels=(4,))
    trained = BraTS(tmp_path / "gone", et_label=3)
    assert trained.in_folder(tmp_path / "new").file_values[4] == 3
    assert trained.in_folder(tmp_path / "old").file_values[4] == 4
    assert BraTS(tmp_path / "new").file_values[4] == 4
    with fails("et_label: expected 3 or 4, found 2"):
        BraTS(tmp_path, et_label=2)


def test_a_broken_mask_keeps_no_other_case_from_its_labels(tmp_path):
    make_files(tmp_path / "A", "A", without=("mask",))
    (tmp_path / "A" / "A_seg.nii.gz").write_bytes(b"broken")
    make_files(tmp_path / "B", "B", labels=(3,))
    data_set = BraTS(tmp_path)
    _, b = data_set.cases()
    assert data_set.canonical_labels(np.full((1, 1, 1), 3), b).item() == 4


def test_float_error_of_a_scaled_mask_is_forgiven(tmp_path):
    make_files(tmp_path / "A", "A")
    data_set = BraTS(tmp_path)
    (case,) = data_set.cases()
    scaled = np.array([[[1e-6, 1.00001, 1.99999, 3.99998]]], np.float32)
    np.testing.assert_array_equal(data_set.canonical_labels(scaled, case), [[[0, 1, 2, 4]]])


# Regions


def test_regions_are_unions_of_labels(tmp_path):
    labels = np.array([[[0, 1, 2, 4]]], np.uint8)
    expected = {"WT": [0, 1, 1, 1], "TC": [0, 1, 0, 1], "ET": [0, 0, 0, 1]}
    for regions in (("WT", "TC", "ET"), ("ET", "WT"), ("TC",)):
        masks = BraTS(tmp_path, regions=regions).to_regions(labels)
        assert masks.dtype == bool
        np.testing.assert_array_equal(masks[:, 0, 0], [expected[region] for region in regions])


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        # Columns: all eight combinations of WT, TC, ET, as 4 WT + 2 TC + 1 ET.
        (("WT", "TC", "ET"), [0, 0, 0, 0, 2, 2, 1, 4]),
        (("ET", "TC", "WT"), [0, 0, 0, 0, 2, 2, 1, 4]),
        (("WT", "ET"), [0, 0, 0, 0, 2, 4, 2, 4]),
        (("TC", "ET"), [0, 0, 1, 4, 0, 0, 1, 4]),
        (("WT",), [0, 0, 0, 0, 2, 2, 2, 2]),
        (("TC",), [0, 0, 1, 1, 0, 0, 1, 1]),
        (("ET",), [0, 4, 0, 4, 0, 4, 0, 4]),
    ],
)
def test_label_maps_are_consistent(tmp_path, regions, expected):
    combination = np.arange(8)
    masks = {"WT": combination & 4, "TC": combination & 2, "ET": combination & 1}
    stacked = np.stack([masks[region] > 0 for region in regions])[:, None, None]
    data_set = BraTS(tmp_path, regions=regions)
    labels = data_set.to_labels(stacked)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels[0, 0], expected)
    # Once consistent, nothing is lost between masks and labels.
    np.testing.assert_array_equal(data_set.to_labels(data_set.to_regions(labels)), labels)


def test_a_subclass_reads_other_folders_as_plain_brats(tmp_path):
    class Phantoms(BraTS):
        pass

    phantoms = Phantoms(tmp_path, modalities=("flair",), regions=("ET", "WT"))
    there = phantoms.in_folder(tmp_path / "there")
    assert type(there) is BraTS
    assert (there.root, there.modalities, there.regions) == (
        tmp_path / "there",
        ("flair",),
        ("ET", "WT"),
    )


def test_a_data_set_pickles_with_what_it_found(tmp_path):
    make_files(tmp_path / "A", "A", labels=(3,))
    data_set = BraTS(tmp_path)
    (case,) = data_set.cases()
    data_set.canonical_labels(np.zeros((1, 1, 1)), case)
    copy = pickle.loads(pickle.dumps(data_set))
    assert copy.cases() == [case]
    assert copy.canonical_labels(np.full((1, 1, 1), 3), case).item() == 4


def test_a_case_that_is_only_half_written_is_none(tmp_path: Path):
    root = write_brats(tmp_path / "data", cases=2)
    whole = BraTS(root).cases()
    (partial,) = write_brats(tmp_path / "other", cases=1).iterdir()
    partial.rename(root / f".partial-1-{partial.name}")
    assert BraTS(root).cases() == whole
