"""Expected against true Dice: correlations, bins and pictures of cases made by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errors import InputError
from experiments.agreement import Scored, bins_of, read, summary_of, write_report
from experiments.tables import write_csv


def evaluation(folder: Path, expected: list[float], dice: list[float]) -> Path:
    """Write the table of an evaluation whose last case has no ET."""
    last = len(dice) - 1
    rows = [
        {
            "case": f"case{number}",
            "dice_WT": d,
            "true_voxels_WT": 10,
            "dice_ET": 0.0 if number == last else d / 2,
            "true_voxels_ET": 0 if number == last else 5,
            "expected_WT": e,
            "expected_ET": e,
        }
        for number, (e, d) in enumerate(zip(expected, dice, strict=True))
    ]
    write_csv(folder / "cases.csv", rows)
    return folder


def test_the_row_of_a_region_by_hand():
    cases = [Scored("a", e, d) for e, d in ((0.5, 0.4), (0.7, 0.5), (0.9, 0.9), (0.8, 0.6))]
    # Deviations: expected -.225 -.025 .175 .075; Dice -.2 -.1 .3 0.
    r = (0.045 + 0.0025 + 0.0525) / math.sqrt(0.0875 * 0.14)
    assert summary_of("WT", cases) == {
        "region": "WT",
        "cases": "4",
        "Pearson": f"{r:.2f}",
        "Spearman": "1.00",
        "expected": "0.725",
        "Dice": "0.600",
        "mean absolute error": "0.125",
    }
    alike = summary_of("WT", [Scored("a", 0.5, 0.4)] * 5)
    assert (alike["Pearson"], alike["Spearman"], alike["cases"]) == ("-", "-", "5")


def test_fifths_are_ranked_by_what_is_expected():
    expected = np.linspace(0.1, 0.9, 11)
    cases = [Scored("a", e, 1 - e) for e in expected[::-1]]
    rows = bins_of("TC", cases)
    assert [row["cases"] for row in rows] == ["3", "2", "2", "2", "2"]
    assert rows[0]["expected"] == f"{expected[:3].mean():.3f}"
    assert rows[0]["Dice"] == f"{1 - expected[:3].mean():.3f}"
    assert [row["fifth"] for row in bins_of("TC", cases[:2])] == ["1", "2"]


def test_evaluations_are_read_together_and_drawn(tmp_path: Path):
    first = evaluation(tmp_path / "first", [0.5, 0.6, math.nan, 0.8], [0.4, 0.5, 0.6, 0.7])
    second = evaluation(tmp_path / "second", [0.9, 0.7], [0.8, 0.6])
    scored = read([first, second])
    assert [case.expected for case in scored["WT"]] == [0.5, 0.6, 0.8, 0.9, 0.7]
    assert [case.dice for case in scored["ET"]] == [0.2, 0.25, 0.4]  # in cases that have it
    text = write_report([first, second], tmp_path / "out").read_text()
    assert "| WT | 5 | 1.00 | 1.00 | 0.700 | 0.600 | 0.100 |" in text
    assert "| ET | 3 |" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"agreement.md", "agreement.csv", "calibration.csv", "agreement.png"}
    with Image.open(tmp_path / "out" / "agreement.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_what_has_no_expectations_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(InputError, match=r"cases\.csv: expected the scores of an evaluation"):
        read([tmp_path])
    (tmp_path / "cases.csv").write_text("")
    with pytest.raises(InputError, match=r"cases\.csv: expected the scores of an evaluation"):
        read([tmp_path])
    alone = evaluation(tmp_path, [math.nan] * 3, [0.1, 0.2, 0.3])
    with pytest.raises(InputError, match=r"expected numbers in expected_REGION, found none"):
        read([alone])
