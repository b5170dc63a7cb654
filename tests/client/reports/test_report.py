"""What a report is before anything is paired with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.cohort.outcomes import Code, RefusedError, State
from client.reports.report import MAX_TEXT_CHARACTERS, Report, Status, checked, moment


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20240229", "20240229000000"),
        ("202402291015", "20240229101500"),
        ("20240229101530.123456+0100", "20240229101530"),
        ("2024-02-29T10:15:30Z", "20240229101530"),
        ("2024-02-29 10:15", "20240229101500"),
        (" 29.02.2024 ", "20240229000000"),
        ("02/29/2024", ""),
        ("yesterday", ""),
        ("", ""),
    ],
)
def test_moments_of_every_spelling_sort(text: str, expected: str) -> None:
    assert moment(text) == expected


@given(st.datetimes(), st.datetimes())
def test_moments_sort_like_the_times_they_are(first: object, second: object) -> None:
    times = sorted([first, second], key=str)
    assert sorted(moment(str(time)) for time in times) == [moment(str(time)) for time in times]


@pytest.mark.parametrize(
    ("fields", "state", "code"),
    [
        ({"accession": ""}, State.QUARANTINED, Code.E_NO_KEY),
        ({"accession": "", "study_id": "7"}, State.QUARANTINED, Code.E_NO_KEY),
        ({"text": " \n"}, State.UNPAIRED, Code.E_REPORT_EMPTY),
        ({"text": "a" * (MAX_TEXT_CHARACTERS + 1)}, State.QUARANTINED, Code.E_REPORT_TOO_LARGE),
    ],
)
def test_a_report_without_key_or_text_is_refused(fields: dict[str, str], state: State, code: Code) -> None:
    with pytest.raises(RefusedError) as refused:
        checked(Report(**{"source": "test", "accession": "A", "text": "x"} | fields))  # type: ignore[arg-type]
    assert (refused.value.rejected.state, refused.value.rejected.code) == (state, code)


def test_a_withdrawn_report_needs_no_text() -> None:
    report = Report(source="test", accession="A", text="", status=Status.WITHDRAWN)
    assert checked(report) is report


def test_half_a_character_is_replaced() -> None:
    assert checked(Report(source="test", accession="A", text="a\ud800b")).text == "a?b"


def test_repr_shows_nothing_of_the_patient() -> None:
    report = Report(source="hl7", accession="SECRET1", patient="SECRET2", text="SECRET3", when="20240101")
    assert repr(report) == "Report(source='hl7', status='final')"
