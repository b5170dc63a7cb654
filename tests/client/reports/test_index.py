"""Which report an image gets, and which version of it."""

from collections.abc import Iterator
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.cohort.outcomes import Code, RefusedError, Rejected, State
from client.reports.index import ReportIndex, valid_version
from client.reports.report import Report, Status

IMAGE = {"accession_number": "A1", "study_instance_uid": "1.2", "issuer": "", "study_id": "7"}


def report(text: str = "text", *, accession: str = "A1", **fields: object) -> Report:
    return Report(source="test", text=text, accession=accession, **fields)  # type: ignore[arg-type]


@pytest.fixture
def index() -> Iterator[ReportIndex]:
    with ReportIndex() as index:
        yield index


def found(index: ReportIndex, *reports: Report, patient: str = "p1", **keys: str) -> Report | Code | None:
    for each in reports:
        index.add(each)
    try:
        return index.find(IMAGE | keys, patient=patient)
    except RefusedError as refusal:
        return refusal.rejected.code


def text_of(outcome: Report | Code | None) -> str:
    assert isinstance(outcome, Report)
    return outcome.text


def test_what_goes_in_comes_out(index: ReportIndex) -> None:
    whole = report(
        "Befund: ÄÖÜ\nline",
        issuer="RIS",
        study_uid="1.2",
        study_id="7",
        patient="p1",
        status=Status.CORRECTED,
        when="20240101000000",
        language="de",
        labels={"edema": 1.0},
    )
    assert found(index, whole) == whole


@pytest.mark.parametrize(
    ("fields", "pairs"),
    [
        ({}, True),
        ({"accession": "", "study_uid": "1.2"}, True),
        ({"accession": "", "study_id": "7", "patient": "p1"}, True),
        ({"accession": "", "study_id": "7", "patient": "p2"}, False),
        ({"accession": "", "study_id": "8", "patient": "p1"}, False),
        ({"accession": "A2"}, False),
        ({"accession": "A2", "patient": "p1", "when": "20240101000000"}, False),
        ({"accession": "", "study_uid": "1.3", "patient": "p1"}, False),
    ],
)
def test_keys_pair_and_patients_never_do(index: ReportIndex, fields: dict[str, str], pairs: bool) -> None:
    assert (found(index, report(**fields)) is not None) == pairs


def test_empty_keys_pair_with_nothing(index: ReportIndex) -> None:
    index.add(report(accession="", study_uid="1.9"))
    assert index.find({}, patient="") is None
    assert index.find(dict.fromkeys(IMAGE, ""), patient="") is None


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs"),
    [
        ("RIS", "RIS", True),
        ("RIS", "", True),
        ("", "RIS", True),
        ("RIS", "OTHER", False),
        ("1.2.3", "1.2.4", False),
        ("RIS", "1.2.3", True),  # a name and an OID: nobody knows whether they are one
    ],
)
def test_issuers_decide_where_both_are_named(index: ReportIndex, ours: str, theirs: str, pairs: bool) -> None:
    assert (found(index, report(issuer=theirs), issuer=ours) is not None) == pairs


def test_the_study_id_of_another_patient_does_not_help_another_issuers_number(index: ReportIndex) -> None:
    told = report(issuer="OTHER", study_id="7", patient="p2")
    assert found(index, told, issuer="RIS") is None


def test_two_issuers_under_one_number_keep_their_own(index: ReportIndex) -> None:
    reports = [report("north", issuer="NORTH"), report("south", issuer="SOUTH")]
    assert text_of(found(index, *reports, issuer="SOUTH")) == "south"


def test_two_studies_under_one_number_keep_their_own(index: ReportIndex) -> None:
    reports = [report("first", study_uid="1.2"), report("second", study_uid="1.3")]
    assert text_of(found(index, *reports)) == "first"
    assert text_of(found(index, study_instance_uid="1.3")) == "second"
    assert found(index, study_instance_uid="1.4") is Code.E_REPORT_CONFLICT


def test_keys_that_name_two_studies_conflict(index: ReportIndex) -> None:
    reports = [report(study_uid="1.3"), report(accession="A2", study_uid="1.2")]
    assert found(index, *reports) is Code.E_REPORT_CONFLICT


def test_versions_of_the_one_study_that_is_reached_do_not_conflict(index: ReportIndex) -> None:
    assert text_of(found(index, report("old", study_uid="1.3"), report("new", study_uid="1.3"))) == "new"


F, P, C, A, W = Status.FINAL, Status.PRELIMINARY, Status.CORRECTED, Status.ADDENDUM, Status.WITHDRAWN


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([("a", F, "1"), ("b", F, "2")], "b"),
        ([("a", F, "2"), ("b", F, "1")], "a"),
        ([("a", F, ""), ("b", F, "1")], "b"),  # one has no time: the order decides
        ([("a", F, "2"), ("b", F, "")], "b"),
        ([("a", C, ""), ("b", F, "")], "a"),
        ([("a", F, "1"), ("b", C, "1")], "b"),
        ([("a", F, "1"), ("b", P, "2")], "a"),
        ([("a", P, "1"), ("b", P, "2")], "b"),
        ([("a", F, "1"), ("b", A, "2")], "a\n\nADDENDUM:\nb"),
        ([("b", A, "2"), ("c", A, "3"), ("a", F, "1")], "a\n\nADDENDUM:\nb\n\nADDENDUM:\nc"),
        ([("a", F, ""), ("b", A, ""), ("b ", A, "")], "a\n\nADDENDUM:\nb"),
        ([("a", F, "1"), ("b", A, "2"), ("c", C, "3")], "c"),  # the correction holds what was added before
        ([("a", W, "1"), ("b", F, "2")], "b"),
        ([("a", F, "1"), ("b", W, "2")], Code.E_REPORT_WITHDRAWN),
        ([("a", P, "1"), ("b", W, "2")], Code.E_REPORT_WITHDRAWN),
        ([("a", A, "1")], Code.E_ADDENDUM_ONLY),
    ],
)
def test_the_version_that_counts(
    index: ReportIndex, versions: list[tuple[str, Status, str]], expected: str | Code
) -> None:
    outcome = found(index, *(report(text, status=status, when=when) for text, status, when in versions))
    assert (outcome.text if isinstance(outcome, Report) else outcome) == expected


def test_only_a_preliminary_report_is_remarked_on(index: ReportIndex) -> None:
    preliminary, final = found(index, report(status=P)), found(index, report("final"))
    assert isinstance(preliminary, Report)
    assert isinstance(final, Report)
    assert (preliminary.remarks, final.remarks) == ((Code.W_PRELIMINARY,), ())


@given(st.permutations(["1", "2", "3", "4"]))
def test_dated_versions_need_no_order(order: list[str]) -> None:
    statuses = {"1": P, "2": F, "3": A, "4": A}
    versions = [report(when, status=statuses[when], when=when) for when in order]
    assert valid_version(versions).text == "2\n\nADDENDUM:\n3\n\nADDENDUM:\n4"


def test_another_patient_is_refused_in_any_part(index: ReportIndex) -> None:
    assert found(index, report(patient="p2")) is Code.E_PATIENT_MISMATCH
    for parts in permutations([("a", F, "p1"), ("b", A, "p2")]):
        with ReportIndex() as other:
            told = (report(text, status=status, patient=patient) for text, status, patient in parts)
            assert found(other, *told) is Code.E_PATIENT_MISMATCH


def test_the_same_report_twice_is_a_duplicate(index: ReportIndex) -> None:
    assert index.add(report()) is None
    assert index.add(report()) == Rejected(State.DUPLICATE, Code.E_DUPLICATE_REPORT)
    assert index.add(report(when="20240101000000")) is None
    assert len(index) == 2


def test_reports_that_no_image_asked_for_are_counted(index: ReportIndex) -> None:
    for number in range(4):
        index.add(report(accession=f"A{number}"))
    assert index.unpaired == 4
    for _ in range(2):
        index.find(IMAGE, patient="")
    assert index.unpaired == 3


def test_there_is_no_file_to_be_found(index: ReportIndex) -> None:
    index.add(report())
    assert [name for _, _, name in index._database.execute("PRAGMA database_list")] == [""]
