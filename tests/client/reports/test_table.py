"""Tables of reports, as systems export them."""

import math
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pytest
from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]

from client.cohort.errors import ColumnMissingError, SourceMissingError, TableUnreadableError
from client.cohort.outcomes import Code, Rejected, State
from client.reports.report import Report, Status
from client.reports.table import ReportTable


def outcomes(path: Path) -> list[Report | Rejected]:
    return [entry.outcome for entry in ReportTable(path).read()]


def reports(path: Path) -> list[Report]:
    found = outcomes(path)
    assert all(isinstance(outcome, Report) for outcome in found)
    return [outcome for outcome in found if isinstance(outcome, Report)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "reports.csv"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_any_delimiter_and_encoding_is_read(path: Path, delimiter: str, encoding: str) -> None:
    lines = ["Accession Number;Report", 'A1;"Erguß, rechts\nzweite Zeile"', "A2;Unauffällig"]
    path.write_text("\n".join(lines).replace(";", delimiter), encoding=encoding)
    assert [(report.accession, report.text) for report in reports(path)] == [
        ("A1", "Erguß, rechts\nzweite Zeile"),
        ("A2", "Unauffällig"),
    ]


def test_every_column_is_read_under_its_other_names(path: Path) -> None:
    path.write_text(
        "accession,issuer,study_uid,patient,text,status,report_date,lang,Edema,note\n"
        "A1,RIS,1.2,p1,Text.,Corrected,2024-02-29 10:15,de,1,free\n"
    )
    assert reports(path) == [
        Report(
            source="table",
            accession="A1",
            issuer="RIS",
            study_uid="1.2",
            patient="p1",
            text="Text.",
            status=Status.CORRECTED,
            when="20240229101500",
            language="de",
            labels={"Edema": 1.0},
        )
    ]


def test_labels_are_columns_of_nothing_but_labels(path: Path) -> None:
    path.write_text("accession,report,edema,mass,age,none\nA1,x,1,-1,0,\nA2,y,,yes,61,\n")
    first, second = (report.labels for report in reports(path))
    assert set(first) == {"edema", "mass"}
    assert (first["edema"], second["mass"]) == (1, 1)
    assert math.isnan(first["mass"])
    assert math.isnan(second["edema"])


@pytest.mark.parametrize(
    ("word", "status", "remarks"),
    [
        ("", Status.FINAL, ()),
        ("F", Status.FINAL, ()),
        ("Preliminary", Status.PRELIMINARY, ()),
        ("addendum", Status.ADDENDUM, ()),
        ("entered-in-error", Status.WITHDRAWN, ()),
        ("whatever", Status.PRELIMINARY, (Code.W_STATUS,)),
    ],
)
def test_the_words_of_systems_become_a_status(
    path: Path, word: str, status: Status, remarks: tuple[Code, ...]
) -> None:
    path.write_text(f"accession,report,status\nA1,x,{word}\n")
    (report,) = reports(path)
    assert (report.status, report.remarks) == (status, remarks)


def test_a_damaged_row_costs_that_row(path: Path) -> None:
    path.write_text('accession,report\nA1,x\nA2,y,z\n"A3"?,x\n,x\nA5,\n\nA6\nA7,last\n')
    unreadable = Rejected(State.QUARANTINED, Code.E_UNREADABLE)
    empty = Rejected(State.UNPAIRED, Code.E_REPORT_EMPTY)
    first, *others, last = outcomes(path)
    assert others == [unreadable, unreadable, Rejected(State.QUARANTINED, Code.E_NO_KEY), empty, empty]
    assert isinstance(first, Report)
    assert isinstance(last, Report)
    assert [entry.name for entry in ReportTable(path).read()][:2] == ["reports.csv#1", "reports.csv#2"]


def test_an_open_quote_ends_the_table_and_no_more(path: Path) -> None:
    path.write_text('accession,report\nA1,x\nA2,"never closed\nA3,z\n')
    assert isinstance(outcomes(path)[0], Report)
    assert outcomes(path)[1:] == [Rejected(State.QUARANTINED, Code.E_UNREADABLE)]


def test_parquet_is_read_with_its_types(tmp_path: Path) -> None:
    path = tmp_path / "reports.parquet"
    count = 2500
    columns = {
        "accession_number": [float(number) for number in range(count)],
        "report": [None, *(f"Text {number}." for number in range(1, count))],
        "edema": [True, *[False] * (count - 2), None],
        "image": [b"x"] * count,
    }
    parquet.write_table(pa.table(columns), path, row_group_size=1000)
    found = outcomes(path)
    assert found[0] == Rejected(State.UNPAIRED, Code.E_REPORT_EMPTY)
    assert found[1] == Report(source="table", accession="1", text="Text 1.", labels={"edema": 0.0})
    assert len(found) == count


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_without_texts_or_keys_is_refused(tmp_path: Path, kind: str) -> None:
    for columns, message in [
        (("accession", "reprot"), r"no column 'report' \(did you mean 'reprot'\?\)"),
        (("patient_id", "report"), "none of the columns accession_number, study_instance_uid; its columns"),
    ]:
        path = tmp_path / f"t.{kind}"
        if kind == "csv":
            path.write_text(",".join(columns) + "\na,b\n")
        else:
            parquet.write_table(pa.table({name: ["a"] for name in columns}), path)
        with pytest.raises(ColumnMissingError, match=message):
            outcomes(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'"a"?,b\n', "line 1 is not CSV"),
        (b"PAR1junk", "begins like"),
    ],
)
def test_what_is_no_table_is_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(TableUnreadableError, match=message):
        outcomes(path)


def test_an_absent_table_is_named(path: Path) -> None:
    for ask in (ReportTable(path).read, ReportTable(path).stamps):
        with pytest.raises(SourceMissingError, match=r"expected the file .*reports\.csv"):
            list(ask())


def test_a_table_of_headings_alone_holds_no_report(path: Path) -> None:
    path.write_text("accession,report\n")
    assert outcomes(path) == [Rejected(State.IGNORED, Code.E_NOT_REPORT)]
