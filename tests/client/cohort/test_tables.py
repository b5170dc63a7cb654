"""CSV files as hospitals export them."""

import math
from pathlib import Path

import pytest

from client.cohort.errors import ColumnMissingError, SourceMissingError, TableUnreadableError
from client.cohort.tables import KeyedRows, label_value, read_table


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_any_delimiter_and_encoding_is_read(tmp_path: Path, delimiter: str, encoding: str) -> None:
    path = tmp_path / "reports.csv"
    path.write_bytes(
        f'accession{delimiter}report\r\nA1{delimiter}"Lungenödem, \r\nklein"\r\n'.encode(encoding)
    )
    table = read_table(path)
    assert table.values("accession_number") == ["A1"]
    assert table.values("report") == ["Lungenödem, \r\nklein"]


def test_names_are_matched_whatever_their_spelling(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("AccessionNumber,Study Instance UID,Report Text\nA,1.2,x\n")
    table = read_table(path)
    assert table.column("accession_number") == "AccessionNumber"
    assert table.column("study_instance_uid") == "Study Instance UID"
    assert table.column("report") == "Report Text"
    assert table.column("patient_id") is None


def test_missing_column_names_the_nearest_one(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("image,txet\na.png,x\n")
    with pytest.raises(
        ColumnMissingError, match=r"no column 'text' \(did you mean 'txet'\?\); .*image, txet"
    ):
        read_table(path).need("text")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match=r"expected the table .*none\.csv: No such file"):
        read_table(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("", "is empty"), ("a,b\n1,2,3\n", "line 2 is not CSV: 3 cells under 2"), ('a,b\n"x,1\n', "is not CSV")],
)
def test_what_is_not_a_table_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(TableUnreadableError, match=complaint):
        read_table(path)


def test_short_rows_are_filled_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1\n\n,2\n")
    assert read_table(path).rows == [{"a": "1", "b": ""}, {"a": "", "b": "2"}]


def test_label_columns_hold_nothing_but_labels(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("key,edema,effusion,age,empty,view,soft\n1,1.0,yes,54,,PA,0.3\n2,-1,,1,,AP,0\n")
    assert read_table(path).label_columns(without={"key"}) == ["edema", "effusion", "soft"]


@pytest.mark.parametrize(
    ("cell", "value"),
    [("1", 1), ("0.0", 0), ("Yes", 1), ("FALSE", 0), ("0.25", 0.25), ("", math.nan), ("-1", math.nan)],
)
def test_label_cells_are_numbers_or_unknown(cell: str, value: float) -> None:
    assert label_value(cell) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("cell", ["2", "-0.1", "inf", "maybe"])
def test_other_cells_are_no_labels(cell: str) -> None:
    with pytest.raises(ValueError, match=r"label|convert"):
        label_value(cell)


def keyed(tmp_path: Path, lines: str) -> KeyedRows:
    path = tmp_path / "t.csv"
    path.write_text("accession_number,study_instance_uid\n" + lines)
    return KeyedRows(read_table(path))


def test_rows_are_found_by_either_key(tmp_path: Path) -> None:
    rows = keyed(tmp_path, "A1,\n,1.2\n")
    assert rows.find({"accession_number": "A1", "study_instance_uid": "9"}) == [0]
    assert rows.find({"accession_number": "", "study_instance_uid": "1.2"}) == [1]
    assert rows.find({"accession_number": "", "study_instance_uid": ""}) == []


def test_the_last_of_equal_keys_counts(tmp_path: Path) -> None:
    rows = keyed(tmp_path, "A1,1.2\nA1,1.2\n")
    assert rows.find({"accession_number": "A1", "study_instance_uid": "1.2"}) == [1]
    assert rows.find({"accession_number": "A1", "study_instance_uid": "1.3"}) == [1]


def test_two_studies_of_one_accession_number_keep_their_own_rows(tmp_path: Path) -> None:
    rows = keyed(tmp_path, "A1,1.2\nA1,1.3\n")
    assert rows.find({"accession_number": "A1", "study_instance_uid": "1.2"}) == [0]


def test_keys_that_name_different_rows_contradict(tmp_path: Path) -> None:
    rows = keyed(tmp_path, "A1,1.3\nA2,1.2\n")
    assert rows.find({"accession_number": "A1", "study_instance_uid": "1.2"}) == [0, 1]


def test_a_table_without_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ColumnMissingError, match="none of the columns accession_number"):
        KeyedRows(read_table(path))
