"""Which queries a table of settings asks."""

from datetime import date
from pathlib import Path

import pytest

from client.cohort import ColumnMissingError, SourceMissingError
from client.pacs.query import queries
from client.pacs.settings import DicomWebTable

TODAY = date(2024, 3, 1)


def filters(**settings: object) -> list[dict[str, str]]:
    table = DicomWebTable.model_validate({"url": "https://pacs", "modalities": [], **settings})
    return [dict(criteria.filters) for criteria in queries(table, today=TODAY)]


def test_without_a_filter_everything_is_asked_for() -> None:
    assert filters() == [{}]


def test_dates_are_asked_day_by_day_over_leap_years_to_today() -> None:
    assert filters(since=date(2024, 2, 28)) == [
        {"StudyDate": day} for day in ("20240228", "20240229", "20240301")
    ]
    assert len(filters(since=date(2020, 1, 1), until=date(2023, 12, 31))) == 1461


def test_a_range_may_be_one_day_or_lie_ahead() -> None:
    assert filters(since=TODAY, until=TODAY) == [{"StudyDate": "20240301"}]
    assert filters(since=date(2024, 3, 2)) == []


def test_every_modality_is_a_query() -> None:
    assert filters(modalities=["CR", "DX"], keys={"StudyDescription": "*CHEST*"}) == [
        {"ModalitiesInStudy": modality, "StudyDescription": "*CHEST*"} for modality in ("CR", "DX")
    ]


def listed(tmp_path: Path, text: str) -> list[dict[str, str]]:
    (tmp_path / "studies.csv").write_text(text)
    return filters(studies=tmp_path / "studies.csv", modalities=["CR"], since=TODAY)


def test_a_list_names_each_study_once_and_replaces_dates(tmp_path: Path) -> None:
    text = "Accession;Study UID;report\nA1;;x\nA1;;y\n;;z\nA2;1.2.3;\n"
    assert listed(tmp_path, text) == [{"AccessionNumber": "A1"}, {"StudyInstanceUID": "1.2.3"}]


@pytest.mark.parametrize("value", ["*", "A?1", "A\\B"])
def test_a_listed_wildcard_is_no_study(tmp_path: Path, value: str) -> None:
    (tmp_path / "studies.csv").write_text(f"accession_number\n{value}\nA1\n")
    table = DicomWebTable.model_validate({"url": "https://pacs", "studies": tmp_path / "studies.csv"})
    assert [(found.name, found.usable) for found in queries(table, today=TODAY)] == [
        ("studies.csv row 1", False),
        ("studies.csv row 2", True),
    ]


def test_a_list_without_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ColumnMissingError, match=r"studies.csv has neither .* its columns are image, text"):
        listed(tmp_path, "image,text\na,b\n")
    with pytest.raises(SourceMissingError, match=r"absent.csv"):
        filters(studies=tmp_path / "absent.csv")
