"""Choices, and a prediction beside the truth."""

import subprocess
import sys

import numpy as np
import pytest

from datamodules.brats import BraTS
from datamodules.cases import Case, check_choice, compared
from errors import InputError
from tests.conftest import ROOT, affine_of, make_arrays, write_case


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
    ras = labels[::-1, ::-1]
    predicted = np.roll(ras, 1, axis=0)

    both = compared(predicted, tmp_path / "p.nii.gz", case, data_set)
    for masks, expected in ((both.prediction, predicted), (both.truth, ras)):
        np.testing.assert_array_equal(
            masks, [expected > 0, np.isin(expected, (1, 4)), expected == 4]
        )
    assert both.spacing_mm == (1, 2, 3)
    np.testing.assert_array_equal(np.diag(both.affine), [1, 2, 3, 1])

    message = rf"^{tmp_path}/p.nii: expected the grid of {case.mask}, found \(19, 24, 16\) beside"
    with pytest.raises(InputError, match=message):
        compared(predicted[1:], tmp_path / "p.nii", case, data_set)
    with pytest.raises(InputError, match=f"^B: expected a mask to compare {tmp_path} with"):
        compared(predicted, tmp_path, Case("B", {}, None), data_set)


def test_importing_is_light():
    heavy = ["torch", "torchio", "sklearn", "nibabel", "scipy", "SimpleITK", "monai"]
    code = f"import sys, datamodules.brats; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
