"""Which sources of reports a site has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from client.reports.fhir import FhirReports
from client.reports.hl7 import ACCESSION_FIELDS, Hl7Reports
from client.reports.report import ReportSource
from client.reports.sr import SrReports
from client.reports.table import ReportTable
from client.reports.text_folder import MIMIC, TextFolder
from strategies.settings import PairSource


@dataclass(frozen=True, kw_only=True, repr=False)
class ReportSettings:
    """Where reports lie, beside the structured reports among the images.

    Attributes:
        tables: CSV or Parquet files.
        hl7: Files of HL7 v2 messages, or folders of them.
        fhir: JSON or NDJSON files of DiagnosticReports, or folders of them.
        text: Folders of text files.
        sr: DICOM structured reports that do not lie among the images, or folders of them.
        text_pattern: What the path of a text file says, see ``TextFolder``.
        hl7_accession: Where HL7 messages have the accession number, see ``Hl7Reports``.
    """

    tables: Sequence[Path] = ()
    hl7: Sequence[Path] = ()
    fhir: Sequence[Path] = ()
    text: Sequence[Path] = ()
    sr: Sequence[Path] = ()
    text_pattern: str = MIMIC
    hl7_accession: Sequence[str] = ACCESSION_FIELDS

    @classmethod
    def of(cls, source: PairSource, folder: Path) -> Self:
        """Return what a settings file says; its relative paths are relative to ``folder``."""
        return cls(
            tables=[folder / path for path in source.reports],
            hl7=[folder / path for path in source.reports_hl7],
            fhir=[folder / path for path in source.reports_fhir],
            text=[folder / path for path in source.reports_text],
            sr=[folder / path for path in source.reports_sr],
            text_pattern=source.reports_text_pattern or MIMIC,
            hl7_accession=source.hl7_accession or ACCESSION_FIELDS,
        )

    def __bool__(self) -> bool:
        """Return whether any source is named."""
        return any((self.tables, self.hl7, self.fhir, self.text, self.sr))

    def sources(self) -> Iterator[ReportSource]:
        """Yield the sources; of versions without a time, those of a later source count as later.

        Raises:
            CohortSettingsError: The pattern or a field cannot be meant.
        """
        yield from (ReportTable(path) for path in self.tables)
        yield from (Hl7Reports(path, self.hl7_accession) for path in self.hl7)
        yield from (FhirReports(path) for path in self.fhir)
        yield from (TextFolder(path, self.text_pattern) for path in self.text)
        yield from (SrReports(path) for path in self.sr)

    def facts(self) -> Sequence[object]:
        """Return what beside the files decides on the reports, ready for JSON."""
        return [self.text_pattern, *self.hl7_accession]
