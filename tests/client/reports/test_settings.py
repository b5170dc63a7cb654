"""From a settings file to sources of reports."""

from pathlib import Path

import pytest

from client.cohort.errors import CohortSettingsError
from client.reports.fhir import FhirReports
from client.reports.hl7 import Hl7Reports
from client.reports.settings import ReportSettings
from client.reports.sr import SrReports
from client.reports.table import ReportTable
from client.reports.text_folder import TextFolder
from strategies.settings import PairSource


def parsed(**keys: object) -> ReportSettings:
    return ReportSettings.of(PairSource.parse({"dicom": "d", **keys}, source="test"), Path("/site"))


def test_every_kind_of_source_may_be_named_once_or_often() -> None:
    settings = parsed(
        **{
            "reports": "a.csv",
            "reports-hl7": ["north", "/south"],
            "reports-fhir": "fhir",
            "reports-text": "notes",
            "reports-text-pattern": r"(?P<accession>\w+)",
            "reports-sr": "sr",
            "hl7-accession": ["OBR-2"],
        }
    )
    assert list(settings.sources()) == [
        ReportTable(Path("/site/a.csv")),
        Hl7Reports(Path("/site/north"), ("OBR-2",)),
        Hl7Reports(Path("/south"), ("OBR-2",)),
        FhirReports(Path("/site/fhir")),
        TextFolder(Path("/site/notes"), r"(?P<accession>\w+)"),
        SrReports(Path("/site/sr")),
    ]


def test_images_may_be_all_there_is() -> None:
    assert not parsed()
    assert list(parsed().sources()) == []
    assert parsed(reports="a.csv")


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(CohortSettingsError, match="names no study"):
        list(parsed(**{"reports-text": "notes", "reports-text-pattern": "x"}).sources())


def test_repr_shows_no_path() -> None:
    assert "ward" not in repr(parsed(reports="ward-7.csv"))
