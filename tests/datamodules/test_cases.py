"""Choices, and a prediction beside the truth."""

import subprocess
import sys

import numpy as np
import pytest

from datamodules.brats import BraTS
from datamodules.cases import Case, check_choice, compared
from errors import InputError
from tests.conftest import ROOT, affine_of, make_arrays, write_case, write_image


@pytest.mark.parametrize("chosen", [["a"], ["b", "a"], ("a", "b", "c")])
def test_a_choice_in_any_order_is_accepted(chosen):
    check_choice("key", chosen, {"a": 1, "b": 2, "c": 3})


@pytest.mark.parametrize(("chosen", "found"), [([], "none"), (["d"], "d"), (["a", "a"], "a, a")])
def test_other_choices_name_the_key(chosen, found):
    message = f"^key: expected a choice of a, b, each at most once; found {found}$"
    with pytest.raises(InputError, match=message):
        check_choice("key", chosen, ("a", "b"))


def test_a_prediction_is_compared_on_the_grid_of_the_mask(tmp_path):
    images, labels, _ = make_arrays()
    affine = affine_of("LPS", spacing_mm=(1, 2, 3))
    write_case(tmp_path / "A", images, labels, affine, prefix="A_")
    data_set = BraTS(tmp_path)
    (case,) = data_set.cases()
    predicted = np.roll(labels, 1, axis=0)
    written = write_image(tmp_path / "p.nii.gz", predicted, affine)

    both = compared(written, case, data_set, data_set)
    for masks, on_disk in ((both.prediction, predicted), (both.truth, labels)):
        expected = on_disk[::-1, ::-1]
        np.testing.assert_array_equal(
            masks, [expected > 0, np.isin(expected, (1, 4)), expected == 4]
        )
    assert both.spacing_mm == (1, 2, 3)
    np.testing.assert_array_equal(np.diag(both.affine), [1, 2, 3, 1])


@pytest.mark.parametrize(
    ("voxels", "axes", "spacing_mm", "origin_mm", "message"),
    [
        (slice(1, None), "LPS", (1, 2, 3), (-40, 13, 7), "found 19 x 24 x 16 voxels beside 20 x"),
        (slice(None), "LPS", (1, 2, 3), (10, 13, 7), "found .* shifted by 50, 0, 0 mm"),
        (slice(None), "LPS", (3, 3, 3), (-40, 13, 7), "found .* voxels of 3 x 3 x 3 beside 1 x"),
        (slice(None), "RAS", (1, 2, 3), (-40, 13, 7), "found .* axes RAS beside LPS"),
    ],
)
def test_a_prediction_elsewhere_is_not_scored(
    tmp_path, voxels, axes, spacing_mm, origin_mm, message
):
    images, labels, _ = make_arrays()
    write_case(tmp_path / "A", images, labels, affine_of("LPS", (1, 2, 3)), prefix="A_")
    data_set = BraTS(tmp_path)
    (case,) = data_set.cases()
    written = tmp_path / "p.nii.gz"
    write_image(written, labels[voxels], affine_of(axes, spacing_mm, origin_mm))
    with pytest.raises(
        InputError, match=f"^{written}: expected the grid of {case.mask}, {message}"
    ):
        compared(written, case, data_set, data_set)


def test_the_file_with_the_wrong_label_is_blamed(tmp_path):
    images, labels, _ = make_arrays()
    write_case(tmp_path / "A", images, labels, prefix="A_")
    data_set = BraTS(tmp_path)
    (case,) = data_set.cases()
    written = write_image(tmp_path / "p.nii.gz", np.where(labels == 2, 9, labels).astype(np.uint8))
    with pytest.raises(InputError, match=f"^{written}: found label 9"):
        compared(written, case, data_set, data_set)
    with pytest.raises(InputError, match=f"^B: expected a mask to compare {written} with"):
        compared(written, Case("B", {}, None), data_set, data_set)


def test_importing_is_light():
    heavy = ["torch", "torchio", "sklearn", "nibabel", "scipy", "SimpleITK", "monai"]
    code = f"import sys, datamodules.brats; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
