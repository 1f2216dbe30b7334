"""Rows by case: always whole, sorted, and of the same columns."""

from pathlib import Path

from experiments.tables import CaseRows


def test_rows_are_added_replaced_and_removed_in_any_order(tmp_path: Path):
    rows = CaseRows(tmp_path / "rows.csv", ["case", "value"])
    assert rows.read() == {}
    rows.remove("a")
    for case, value in (("c", 1), ("a, b", 2), ("c", 3)):
        rows.put({"value": value, "case": case})
    assert rows.path.read_text().splitlines() == ["case,value", '"a, b",2', "c,3"]
    assert rows.read() == {"a, b": {"case": "a, b", "value": "2"}, "c": {"case": "c", "value": "3"}}
    rows.remove("c")
    assert list(rows.read()) == ["a, b"]
    rows.remove("a, b")
    assert not list(tmp_path.iterdir())


def test_rows_of_other_columns_and_damaged_ones_are_not_read(tmp_path: Path):
    old = CaseRows(tmp_path / "rows.csv", ["case", "other"])
    old.put({"case": "a", "other": 1})
    rows = CaseRows(old.path, ["case", "value"])
    assert rows.read() == {}
    rows.put({"case": "b", "value": 2})
    assert list(rows.read()) == ["b"]
    rows.path.write_bytes(b"case,value\na,1\nb\nc,2,3\n\xff,4\n")
    assert list(rows.read()) == ["a", "\ufffd"]
